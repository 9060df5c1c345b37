//! Talking to registries: one host at a time, with the host's settings, bounded retries, and errors
//! told apart.

use std::time::Duration;

use futures::StreamExt;
use oci_client::{
    Client, Reference, RegistryOperation,
    client::{
        BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol,
        LayerDescriptor, SizedStream,
    },
    errors::{OciDistributionError, OciErrorCode},
    secrets::RegistryAuth,
};
use prost::bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    ImageError, ImageReference, StoreConfig,
    auth::{self, Credentials},
    blob::digest_of,
    hosts::Host,
    manifest::{ACCEPTED, Descriptor, MAX_DOCUMENT},
};
use crate::api::AuthConfig;

/// How long a manifest may take as a whole.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// A registry or mirror, ready to be asked for one image.
pub(crate) struct Remote {
    client: Client,
    image: Reference,
    wanted: ImageReference,
    host: String,
    auth: RegistryAuth,
    retries: u32,
}

impl Remote {
    /// Connects to `host` and logs in.
    pub(crate) async fn open(
        host: &Host,
        wanted: &ImageReference,
        auth: Option<&AuthConfig>,
        config: &StoreConfig,
    ) -> Result<Self, ImageError> {
        super::init_tls();
        check_roots()?;
        let mut pem = Vec::new();
        for path in &host.ca {
            let data = std::fs::read(path)
                .map_err(|e| ImageError::Config { path: path.clone(), reason: e.to_string() })?;
            pem.push(data);
        }
        let settings = ClientConfig {
            protocol: if host.plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
            accept_invalid_certificates: host.skip_verify,
            connect_timeout: Some(config.connect_timeout),
            read_timeout: Some(config.read_timeout),
            user_agent: concat!("longshore/", env!("CARGO_PKG_VERSION")),
            extra_root_certificates: pem
                .iter()
                .map(|data| Certificate { encoding: CertificateEncoding::Pem, data: data.clone() })
                .collect(),
            ..ClientConfig::default()
        };
        let fail = |reason: String| ImageError::Network {
            reference: wanted.to_string(),
            host: host.authority.clone(),
            reason,
        };
        let client = Client::try_from(settings).map_err(|error| fail(chain(&error)))?;
        let repository = if host.repository_prefix.is_empty() {
            wanted.repository().to_owned()
        } else {
            format!("{}/{}", host.repository_prefix, wanted.repository())
        };
        let registry =
            if host.mirror { wanted.registry().to_owned() } else { host.authority.clone() };
        let tag = wanted.tag().unwrap_or("latest").to_owned();
        let mut image = match wanted.digest() {
            Some(digest) => Reference::with_digest(registry, repository, digest.to_owned()),
            None => Reference::with_tag(registry, repository, tag),
        };
        if host.mirror {
            image.set_mirror_registry(host.authority.clone());
        }
        let auth = match auth::credentials(auth, wanted, &host.authority)? {
            Credentials::Ready(auth) => auth,
            Credentials::Identity(token) => {
                let http = plain_client(host, &pem, config).map_err(|e| fail(chain(&e)))?;
                let scheme = if host.plain_http { "http" } else { "https" };
                let base = format!("{scheme}://{}", host.authority);
                auth::exchange(&http, &base, &image, &token).await.map_err(|reason| {
                    ImageError::Unauthorized { reference: wanted.to_string(), reason }
                })?
            }
        };
        let remote = Self {
            client,
            image,
            wanted: wanted.clone(),
            host: host.authority.clone(),
            auth,
            retries: config.retries,
        };
        let login = || remote.client.auth(&remote.image, &remote.auth, RegistryOperation::Pull);
        remote.retrying(if host.probe { 0 } else { 2 }, login).await?;
        Ok(remote)
    }

    /// The manifest or index at `digest`, or at the reference itself, with its digest.
    pub(crate) async fn document(
        &self,
        digest: Option<&str>,
    ) -> Result<(Vec<u8>, String), ImageError> {
        let image = match digest {
            Some(digest) => self.image.clone_with_digest(digest.to_owned()),
            None => self.image.clone(),
        };
        let (body, _) = self
            .retrying(2, || self.client.pull_manifest_raw(&image, &self.auth, ACCEPTED))
            .await?;
        if body.len() as u64 > MAX_DOCUMENT {
            return Err(self.corrupt("manifest", format!("{} bytes", body.len())));
        }
        let actual = digest_of(&body);
        match image.digest() {
            Some(expected) if expected != actual => {
                Err(self
                    .corrupt("manifest", format!("its digest is {actual} instead of {expected}")))
            }
            _ => Ok((body.to_vec(), actual)),
        }
    }

    /// A small blob, such as an image's config.
    pub(crate) async fn small_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, ImageError> {
        if blob.size > MAX_DOCUMENT {
            return Err(self.corrupt(&blob.digest, format!("{} bytes", blob.size)));
        }
        let (sender, mut receiver) = mpsc::channel::<Bytes>(64);
        let collect = async {
            let mut content = Vec::new();
            while let Some(bytes) = receiver.recv().await {
                content.extend_from_slice(&bytes);
            }
            content
        };
        let (fed, content) = tokio::join!(self.feed(blob, sender), collect);
        fed?;
        let actual = digest_of(&content);
        if actual == blob.digest {
            Ok(content)
        } else {
            let reason = format!("its digest is {actual} instead of {}", blob.digest);
            Err(self.corrupt("config", reason))
        }
    }

    /// Sends a blob's bytes to `sink`, taking a broken download up where it ended. Ends early, as a
    /// success, when the receiver is gone.
    pub(crate) async fn feed(
        &self,
        blob: &Descriptor,
        sink: mpsc::Sender<Bytes>,
    ) -> Result<(), ImageError> {
        let mut received: u64 = 0;
        let mut failures = 0;
        while received < blob.size || (blob.size == 0 && failures == 0) {
            let before = received;
            let failure = match self.open_blob(blob, received).await {
                Ok((stream, mut skip)) => {
                    let mut stream = stream.stream;
                    loop {
                        match stream.next().await {
                            None => break "the connection ended early".to_owned(),
                            Some(Err(error)) => break chain(&error),
                            Some(Ok(mut bytes)) => {
                                // A server without ranges starts over.
                                let drop = skip.min(bytes.len() as u64);
                                skip -= drop;
                                let mut bytes = bytes.split_off(drop as usize);
                                let most = blob.size.saturating_sub(received) + 1;
                                bytes.truncate(usize::try_from(most).unwrap_or(usize::MAX));
                                received += bytes.len() as u64;
                                if !bytes.is_empty() && sink.send(bytes).await.is_err() {
                                    return Ok(());
                                }
                                if received >= blob.size && skip == 0 {
                                    return Ok(());
                                }
                            }
                        }
                    }
                }
                Err(error) if !error.is_retryable() => return Err(error),
                Err(error) => error.to_string(),
            };
            failures = if received > before { 1 } else { failures + 1 };
            if blob.size == 0 {
                return Ok(());
            }
            if failures > self.retries {
                return Err(self.network(format!(
                    "layer {} broke off after {received} of {} bytes, {failures} times: {failure}",
                    blob.digest, blob.size
                )));
            }
            tokio::time::sleep(pause(failures)).await;
        }
        Ok(())
    }

    /// A stream from `offset`, and how many bytes of it are to be dropped.
    async fn open_blob(
        &self,
        blob: &Descriptor,
        offset: u64,
    ) -> Result<(SizedStream, u64), ImageError> {
        let urls = None;
        let layer = &LayerDescriptor { digest: &blob.digest, urls: &urls };
        if offset == 0 {
            let stream = self.client.pull_blob_stream(&self.image, layer).await;
            return Ok((stream.map_err(|error| self.classify(error))?, 0));
        }
        match self.client.pull_blob_stream_partial(&self.image, layer, offset, None).await {
            Ok(BlobResponse::Partial(stream)) => Ok((stream, 0)),
            Ok(BlobResponse::Full(stream)) => Ok((stream, offset)),
            Err(error) => Err(self.classify(error)),
        }
    }

    async fn retrying<T, Fut>(
        &self,
        retries: u32,
        attempt: impl Fn() -> Fut,
    ) -> Result<T, ImageError>
    where
        Fut: Future<Output = Result<T, OciDistributionError>>,
    {
        let mut failures = 0;
        loop {
            let error = match tokio::time::timeout(DOCUMENT_TIMEOUT, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => self.classify(error),
                Err(_) => self.network(format!("no answer in {} s", DOCUMENT_TIMEOUT.as_secs())),
            };
            failures += 1;
            if failures > retries || !error.is_retryable() {
                return Err(error);
            }
            tokio::time::sleep(pause(failures)).await;
        }
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    fn corrupt(&self, object: &str, reason: String) -> ImageError {
        ImageError::Corrupt {
            reference: self.wanted.to_string(),
            object: object.to_owned(),
            reason,
        }
    }

    fn network(&self, reason: String) -> ImageError {
        let reference = self.wanted.to_string();
        ImageError::Network { reference, host: self.host.clone(), reason }
    }

    fn classify(&self, error: OciDistributionError) -> ImageError {
        use OciDistributionError as E;
        let reference = self.wanted.to_string();
        let not_found = |reason| ImageError::NotFound { reference: reference.clone(), reason };
        let unauthorized =
            |reason| ImageError::Unauthorized { reference: reference.clone(), reason };
        match error {
            E::AuthenticationFailure(_) => {
                // The body may echo what was sent.
                unauthorized(format!("{} refuses the credentials", self.host))
            }
            E::UnauthorizedError { .. } => unauthorized(match self.auth {
                RegistryAuth::Anonymous => format!("{} requires credentials", self.host),
                _ => format!("{} refuses the credentials", self.host),
            }),
            E::RegistryError { envelope, .. } => {
                let texts: Vec<_> = envelope
                    .errors
                    .iter()
                    .map(|error| format!("{:?}: {}", error.code, error.message))
                    .collect();
                let text = format!("{} says {}", self.host, texts.join(", "));
                match envelope.errors.first().map(|error| &error.code) {
                    Some(
                        OciErrorCode::ManifestUnknown
                        | OciErrorCode::NameUnknown
                        | OciErrorCode::NotFound
                        | OciErrorCode::BlobUnknown
                        | OciErrorCode::ManifestBlobUnknown,
                    ) => not_found(text),
                    Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => unauthorized(text),
                    Some(OciErrorCode::Toomanyrequests) => self.network(text),
                    _ => ImageError::Unsupported { reference, reason: text },
                }
            }
            E::ServerError { code: 404, .. } => {
                not_found(format!("{} does not have it", self.host))
            }
            E::ServerError { code: 403, .. } => unauthorized(format!("{} forbids it", self.host)),
            E::ServerError { code, .. } => self.network(format!("it answered {code}")),
            E::DigestError(error) => self.corrupt("content", error.to_string()),
            E::ManifestEncodingError(_) | E::ManifestParsingError(_) | E::JsonError(_) => {
                self.corrupt("answer", error.to_string())
            }
            E::UnsupportedMediaTypeError(_)
            | E::UnsupportedSchemaVersionError(_)
            | E::IncompatibleLayerMediaTypeError(_) => {
                ImageError::Unsupported { reference, reason: error.to_string() }
            }
            E::RequestError(error) => self.network(chain(&error.without_url())),
            error => self.network(chain(&error)),
        }
    }
}

/// Without any root certificate on the machine, making an HTTP client panics deep in a library, even
/// one that is to trust other certificates or to speak plain http.
fn check_roots() -> Result<(), ImageError> {
    if rustls_native_certs::load_native_certs().certs.is_empty() {
        return Err(ImageError::Config {
            path: "/etc/ssl/certs".into(),
            reason: "this machine has no root certificates; install the package ca-certificates, \
                     or name a file by SSL_CERT_FILE"
                .to_owned(),
        });
    }
    Ok(())
}

/// An error with its causes: the outermost alone is often just "error sending request".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

fn pause(failures: u32) -> Duration {
    Duration::from_millis(250 << failures.saturating_sub(1).min(4))
        + Duration::from_millis(fastrand::u64(..100))
}

fn plain_client(
    host: &Host,
    pem: &[Vec<u8>],
    config: &StoreConfig,
) -> Result<reqwest::Client, reqwest::Error> {
    let mut roots = Vec::new();
    for data in pem {
        roots.extend(reqwest::Certificate::from_pem_bundle(data)?);
    }
    reqwest::Client::builder()
        .tls_danger_accept_invalid_certs(host.skip_verify)
        .tls_certs_merge(roots)
        .connect_timeout(config.connect_timeout)
        .timeout(DOCUMENT_TIMEOUT)
        .build()
}
