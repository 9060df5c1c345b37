//! Getting an image's documents and blobs from whichever of its hosts has them: mirrors first, the
//! registry itself last, with bounded retries, and errors told apart.

mod auth;
mod hosts;
mod remote;
mod tls;

use std::{sync::atomic::Ordering, time::Duration};

use prost::bytes::Bytes;
use reqwest::{StatusCode, header::CONTENT_RANGE};
use tokio::sync::mpsc;

pub use tls::init_tls;

use self::{
    hosts::Host,
    remote::{Ask, DOCUMENT_TIMEOUT, Failure, Remote, chain, read_some},
};
use super::{
    ImageError, ImageReference, StoreConfig,
    blob::digest_of,
    manifest::{ACCEPTED, Descriptor, MAX_DOCUMENT},
};
use crate::api::AuthConfig;

/// How often a document is asked for again at the same host.
const DOCUMENT_RETRIES: u32 = 2;

/// The hosts of one reference.
pub(crate) struct Registry {
    wanted: ImageReference,
    remotes: Vec<Remote>,
    retries: u32,
}

impl Registry {
    /// Plans where to get `wanted` from. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ImageError::Config`] for settings that can't be used, [`ImageError::Unauthorized`] for
    /// malformed credentials.
    pub(crate) fn open(
        wanted: &ImageReference,
        auth: Option<&AuthConfig>,
        config: &StoreConfig,
    ) -> Result<Self, ImageError> {
        let remotes = hosts::load(wanted.registry(), &config.registry_dirs)?
            .into_iter()
            .map(|host| Remote::new(host, wanted, auth, config))
            .collect::<Result<_, _>>()?;
        Ok(Self { wanted: wanted.clone(), remotes, retries: config.retries })
    }

    /// The manifest or index that the reference itself names, and its digest.
    ///
    /// # Errors
    /// [`ImageError`] of the last host asked.
    pub(crate) async fn resolve(&self) -> Result<(Vec<u8>, String), ImageError> {
        let named = self.wanted.digest().or(self.wanted.tag()).unwrap_or("latest");
        // A digest needs nobody's word on what it means.
        let may = |host: &Host| match self.wanted.digest() {
            Some(_) => host.pull || host.resolve,
            None => host.resolve,
        };
        let what = format!("manifests/{named}");
        let check = |body: &[u8]| match self.wanted.digest() {
            Some(digest) => self.check("manifest", body, digest),
            None => Ok(()),
        };
        let body = self.document(&what, Some(ACCEPTED), may, check).await?;
        let digest = digest_of(&body);
        Ok((body, digest))
    }

    /// The manifest at `descriptor`.
    ///
    /// # Errors
    /// As [`Registry::resolve`].
    pub(crate) async fn manifest(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let what = format!("manifests/{}", descriptor.digest);
        let check = |body: &[u8]| self.check_described("manifest", body, descriptor);
        self.document(&what, Some(ACCEPTED), |host| host.pull, check).await
    }

    /// A small blob, such as an image's config.
    ///
    /// # Errors
    /// As [`Registry::resolve`].
    pub(crate) async fn small_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, ImageError> {
        if blob.size > MAX_DOCUMENT {
            return Err(self.corrupt(&blob.digest, format!("{} bytes", blob.size)));
        }
        let what = format!("blobs/{}", blob.digest);
        let check = |body: &[u8]| self.check_described("config", body, blob);
        self.document(&what, None, |host| host.pull, check).await
    }

    /// Asks the hosts that `may` in turn, each a few times.
    async fn document(
        &self,
        what: &str,
        accept: Option<&str>,
        may: impl Fn(&Host) -> bool,
        check: impl Fn(&[u8]) -> Result<(), ImageError>,
    ) -> Result<Vec<u8>, ImageError> {
        let ask = Ask { what, accept, offset: 0 };
        let mut errors = Errors::default();
        for remote in self.in_order(may) {
            let mut failures = 0;
            loop {
                let failure = match tokio::time::timeout(DOCUMENT_TIMEOUT, once(remote, ask)).await
                {
                    Ok(Ok(body)) => match check(&body) {
                        Ok(()) => return Ok(body),
                        Err(error) => error.into(),
                    },
                    Ok(Err(failure)) => failure,
                    Err(_) => {
                        let seconds = DOCUMENT_TIMEOUT.as_secs();
                        remote.network(format!("no answer in {seconds} s")).into()
                    }
                };
                failures += 1;
                if failures > DOCUMENT_RETRIES || !failure.error.is_retryable() {
                    remote.failed.store(true, Ordering::Relaxed);
                    errors.add(remote, failure.error);
                    break;
                }
                tokio::time::sleep(pause(failures, failure.wait)).await;
            }
        }
        Err(errors.last(&self.wanted))
    }

    /// The hosts that `may`, those that failed already at the end.
    fn in_order(&self, may: impl Fn(&Host) -> bool) -> Vec<&Remote> {
        let mut remotes: Vec<_> = self.remotes.iter().filter(|remote| may(remote.host())).collect();
        remotes.sort_by_key(|remote| remote.failed.load(Ordering::Relaxed));
        remotes
    }

    /// Sends a blob's bytes to `sink` and counts them in `meter`. A broken download is taken up
    /// where it ended, at the next host if there is one. Ends early, as a success, when the
    /// receiver is gone.
    ///
    /// # Errors
    /// [`ImageError`] of the last host asked.
    pub(crate) async fn feed(
        &self,
        blob: &Descriptor,
        sink: mpsc::Sender<Bytes>,
        meter: impl Fn(u64),
    ) -> Result<(), ImageError> {
        let mut received = 0;
        let mut errors = Errors::default();
        for remote in self.in_order(|host| host.pull) {
            let mut failures = 0;
            loop {
                let before = received;
                let failure = match self.some(remote, blob, &mut received, &sink, &meter).await {
                    Ok(()) => return Ok(()),
                    Err(failure) => failure,
                };
                failures = if received > before { 1 } else { failures + 1 };
                if !failure.error.is_retryable() {
                    errors.add(remote, failure.error);
                    break;
                }
                if failures > self.retries {
                    let reason = match failure.error {
                        ImageError::Network { reason, .. } => reason,
                        error => error.to_string(),
                    };
                    errors.add(
                        remote,
                        remote.network(format!(
                            "layer {} broke off after {received} of {} bytes, {failures} times: \
                             {reason}",
                            blob.digest, blob.size
                        )),
                    );
                    break;
                }
                tokio::time::sleep(pause(failures, failure.wait)).await;
            }
            remote.failed.store(true, Ordering::Relaxed);
        }
        Err(errors.last(&self.wanted))
    }

    /// One request for what is missing of `blob`.
    async fn some(
        &self,
        remote: &Remote,
        blob: &Descriptor,
        received: &mut u64,
        sink: &mpsc::Sender<Bytes>,
        meter: &impl Fn(u64),
    ) -> Result<(), Failure> {
        let what = format!("blobs/{}", blob.digest);
        let mut answer = remote.get(Ask { what: &what, accept: None, offset: *received }).await?;
        let range = answer.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let mut skip = match answer.status() {
            StatusCode::PARTIAL_CONTENT => match range.and_then(range_start) {
                Some(start) if start <= *received => *received - start,
                _ => {
                    let reason = format!("it was asked for byte {received} and sent {range:?}");
                    return Err(remote.network(reason).into());
                }
            },
            // A server without ranges starts over.
            _ => *received,
        };
        loop {
            let mut bytes = match answer.chunk().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) if *received >= blob.size => return Ok(()),
                Ok(None) => {
                    return Err(remote.network("the connection ended early".to_owned()).into());
                }
                Err(error) => {
                    return Err(remote.network(chain(&error.without_url())).into());
                }
            };
            let dropped = skip.min(bytes.len() as u64);
            skip -= dropped;
            let mut bytes = bytes.split_off(dropped as usize);
            // One byte too many is enough for the reader to refuse the blob.
            let most = (blob.size + 1).saturating_sub(*received);
            bytes.truncate(usize::try_from(most).unwrap_or(usize::MAX));
            *received += bytes.len() as u64;
            meter(bytes.len() as u64);
            let full = *received > blob.size;
            if !bytes.is_empty() && sink.send(bytes).await.is_err() || full {
                return Ok(());
            }
        }
    }

    fn check_described(
        &self,
        object: &str,
        body: &[u8],
        described: &Descriptor,
    ) -> Result<(), ImageError> {
        self.check(object, body, &described.digest)?;
        let size = body.len() as u64;
        if size == described.size {
            Ok(())
        } else {
            Err(self.corrupt(object, format!("{size} bytes instead of {}", described.size)))
        }
    }

    fn check(&self, object: &str, body: &[u8], digest: &str) -> Result<(), ImageError> {
        let actual = digest_of(body);
        if actual == digest {
            Ok(())
        } else {
            Err(self.corrupt(object, format!("its digest is {actual} instead of {digest}")))
        }
    }

    fn corrupt(&self, object: &str, reason: String) -> ImageError {
        ImageError::Corrupt {
            reference: self.wanted.to_string(),
            object: object.to_owned(),
            reason,
        }
    }
}

async fn once(remote: &Remote, ask: Ask<'_>) -> Result<Vec<u8>, Failure> {
    let answer = remote.get(ask).await?;
    let read = read_some(answer, usize::try_from(MAX_DOCUMENT).unwrap_or(usize::MAX)).await;
    read.map_err(|reason| remote.network(reason).into())
}

/// What the hosts said, of which the last one's word counts: it is the registry itself, or nearest
/// to it.
#[derive(Default)]
struct Errors {
    last: Option<ImageError>,
    before: Vec<String>,
}

impl Errors {
    fn add(&mut self, remote: &Remote, error: ImageError) {
        let address = &remote.host().address;
        tracing::debug!(host = address, %error, "host could not serve");
        if let Some(before) = self.last.replace(error) {
            self.before.push(before.to_string());
        }
    }

    fn last(self, wanted: &ImageReference) -> ImageError {
        let before = match self.before.is_empty() {
            true => String::new(),
            false => format!(" (asked before: {})", self.before.join("; ")),
        };
        match self.last {
            Some(ImageError::Network { reference, host, reason }) => {
                ImageError::Network { reference, host, reason: reason + &before }
            }
            Some(ImageError::NotFound { reference, reason }) => {
                ImageError::NotFound { reference, reason: reason + &before }
            }
            Some(error) => error,
            None => ImageError::NotFound {
                reference: wanted.to_string(),
                reason: "no configured host may be asked for it; see its hosts.toml".to_owned(),
            },
        }
    }
}

/// Where a `Content-Range: bytes 5-9/10` begins (RFC 9110 section 14.4).
fn range_start(text: &str) -> Option<u64> {
    text.trim().strip_prefix("bytes")?.trim_start().split('-').next()?.parse().ok()
}

/// How long to wait after so many failures in a row: as the registry says, and longer each time.
fn pause(failures: u32, wait: Option<Duration>) -> Duration {
    let own = Duration::from_millis(250 << failures.saturating_sub(1).min(5))
        + Duration::from_millis(fastrand::u64(..100));
    wait.map_or(own, |wait| wait.max(own))
}

/// `hosts.toml` and challenges, for `fuzz`.
#[cfg(fuzzing)]
pub(super) fn fuzz(text: &str) {
    for host in hosts::plan("quay.io", std::path::Path::new("/x"), text).unwrap_or_default() {
        assert!(!host.address.is_empty() && !host.path.contains("//"));
    }
    let mut headers = reqwest::header::HeaderMap::new();
    if let Ok(value) = text.parse() {
        headers.insert(reqwest::header::WWW_AUTHENTICATE, value);
        if let Some(auth::Challenge::Bearer(service)) = auth::challenge(&headers) {
            assert!(!service.realm.is_empty());
        }
    }
    let _ = range_start(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_pauses() {
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("bytes */10"), None);
        assert_eq!(range_start("5-9/10"), None);
        assert!(pause(1, None) < pause(3, None));
        assert_eq!(pause(1, Some(Duration::from_secs(7))), Duration::from_secs(7));
        assert!(pause(u32::MAX, None) < Duration::from_secs(9));
    }
}
