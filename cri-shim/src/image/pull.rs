//! Pulling an image: resolve the reference at the first host that can, then fetch and unpack its
//! layers while they come in.

use std::{
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
};

use oci_spec::image::ImageConfiguration;
use prost::bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::{
    ImageError, ImageId, ImageReference, ImageStore,
    blob::unpack_blob,
    hosts,
    index::Names,
    layers::{blocking, plan_layers, unpack_error},
    manifest::{self, Descriptor, Document},
    registry::Remote,
    unpack::Unpacked,
    work::Work,
};
use crate::api::AuthConfig;

/// What a reference led to.
struct Resolved {
    remote: Remote,
    /// Digest of what the reference itself names: a manifest or an index.
    digest: String,
    config: Vec<u8>,
    layers: Vec<Descriptor>,
}

impl ImageStore {
    /// Pulls `reference` and returns the image's id. Layers that are there already, or that another
    /// pull is at, are not fetched again.
    ///
    /// # Errors
    /// [`ImageError`]; nothing becomes visible then.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<AuthConfig>,
    ) -> Result<ImageId, ImageError> {
        let reference = ImageReference::parse(reference)?;
        let resolved = self.resolve(&reference, auth.as_ref()).await?;
        let config = parse_config(&reference, &resolved.config)?;
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != resolved.layers.len() {
            return Err(ImageError::Corrupt {
                reference: reference.to_string(),
                object: "config".to_owned(),
                reason: format!(
                    "it lists {} layers, the manifest {}",
                    diff_ids.len(),
                    resolved.layers.len()
                ),
            });
        }
        let blobs = resolved.layers.iter().map(|layer| Some((layer.digest.clone(), layer.size)));
        let plans = plan_layers(diff_ids, blobs);
        let names = vec![Names {
            repo_tag: reference.repo_tag(),
            repo_digest: Some(reference.repo_digest(&resolved.digest)),
        }];
        // A layer may be removed by another process between its check and the commit.
        for _ in 0..3 {
            let work = self.start_work().await?;
            let fetch = |at: usize, folder| {
                let (resolved, plans, work) = (&resolved, &plans, Arc::clone(&work));
                let reference = &reference;
                async move {
                    let layer = &resolved.layers[at];
                    self.fetch(reference, &resolved.remote, layer, plans, at, folder, work).await
                }
            };
            let layers = self.ensure_layers(&work, &plans, fetch).await?;
            let committed =
                self.commit(resolved.config.clone(), layers, names.clone(), false).await?;
            if let Some(id) = committed {
                tracing::debug!(image = %reference, %id, host = resolved.remote.host(), "pulled");
                return Ok(id);
            }
        }
        Err(vanished(&reference.to_string()))
    }

    /// Asks the registry's hosts in turn.
    async fn resolve(
        &self,
        reference: &ImageReference,
        auth: Option<&AuthConfig>,
    ) -> Result<Resolved, ImageError> {
        let config = &self.shared.config;
        let mut last: Option<ImageError> = None;
        for host in hosts::load(reference.registry(), &config.registry_dirs)? {
            let tls_failed = last.as_ref().is_some_and(ImageError::is_retryable);
            if host.only_after_failed_tls && !tls_failed {
                continue;
            }
            if !host.resolve && reference.digest().is_none() {
                continue;
            }
            let found = match Remote::open(&host, reference, auth, config).await {
                Ok(remote) => resolve_at(remote, reference).await,
                Err(error) => Err(error),
            };
            match found {
                Ok(resolved) => return Ok(resolved),
                Err(error) => {
                    tracing::debug!(image = %reference, host = host.authority, %error, "no image");
                    last = Some(match (last, error) {
                        // Which of the two the registry was meant to speak nobody knows.
                        (
                            Some(ImageError::Network { reference, host: name, reason }),
                            ImageError::Network { reason: plain, .. },
                        ) if host.only_after_failed_tls => {
                            let reason = format!("{reason}; over plain http: {plain}");
                            ImageError::Network { reference, host: name, reason }
                        }
                        (_, error) => error,
                    });
                }
            }
        }
        Err(last.unwrap_or_else(|| ImageError::NotFound {
            reference: reference.to_string(),
            reason: "no configured host may resolve it".to_owned(),
        }))
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of one layer's way")]
    async fn fetch(
        &self,
        reference: &ImageReference,
        remote: &Remote,
        layer: &Descriptor,
        plans: &[super::layers::LayerPlan],
        at: usize,
        folder: PathBuf,
        work: Arc<Work>,
    ) -> Result<Unpacked, ImageError> {
        let (sender, receiver) = mpsc::channel(64);
        let limits = self.shared.limits();
        let expected = plans[at].expected.clone();
        let (name, object) = (reference.to_string(), format!("layer {}", layer.digest));
        let unpacked = blocking(move || {
            let unpacked = unpack_blob(Chunks::new(receiver), &expected, &folder, limits);
            // The folder must not go before this thread is done with it.
            drop(work);
            unpacked.map_err(|error| unpack_error(&name, &object, error))
        });
        let (fed, unpacked) = tokio::join!(remote.feed(layer, sender), unpacked);
        // A broken download makes the unpacking fail too; the download's error says why.
        fed?;
        unpacked
    }

    pub(crate) async fn start_work(&self) -> Result<Arc<Work>, ImageError> {
        let layout = self.shared.layout.clone();
        blocking(move || {
            let work = Work::new(&layout).map_err(ImageError::io("create", layout.tmp()))?;
            Ok(Arc::new(work))
        })
        .await
    }
}

async fn resolve_at(remote: Remote, reference: &ImageReference) -> Result<Resolved, ImageError> {
    let name = reference.to_string();
    let (text, digest) = remote.document(None).await?;
    let mut document = manifest::parse(&name, &text)?;
    let machine = manifest::this_machine();
    // An index may name another; deeper nesting is nobody's practice.
    for _ in 0..2 {
        let Document::Index(manifests) = &document else { break };
        let chosen = manifest::choose(manifests, &machine).ok_or_else(|| ImageError::NotFound {
            reference: name.clone(),
            reason: format!("it has no image for {}/{}", machine.os, machine.architecture),
        })?;
        let (text, _) = remote.document(Some(&chosen.digest)).await?;
        document = manifest::parse(&name, &text)?;
    }
    match document {
        Document::Image { config, layers } => {
            let config = remote.small_blob(&config).await?;
            Ok(Resolved { remote, digest, config, layers })
        }
        Document::Index(_) => Err(ImageError::Unsupported {
            reference: name,
            reason: "its index is nested too deeply".to_owned(),
        }),
    }
}

/// Reads an image's config.
pub(crate) fn parse_config(
    reference: &impl ToString,
    text: &[u8],
) -> Result<ImageConfiguration, ImageError> {
    serde_json::from_slice(text).map_err(|error| ImageError::Corrupt {
        reference: reference.to_string(),
        object: "config".to_owned(),
        reason: error.to_string(),
    })
}

pub(crate) fn vanished(reference: &str) -> ImageError {
    ImageError::Corrupt {
        reference: reference.to_owned(),
        object: "image store".to_owned(),
        reason: "layers were removed again and again while they were fetched; try again".to_owned(),
    }
}

/// Bytes from an async download, for a blocking reader.
struct Chunks {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Chunks {
    fn new(receiver: mpsc::Receiver<Bytes>) -> Self {
        Self { receiver, current: Bytes::new() }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => return Ok(0),
            }
        }
        let most = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..most]);
        Ok(most)
    }
}
