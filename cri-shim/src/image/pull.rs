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
    blob::{Expected, unpack_blob},
    index::Names,
    layers::{blocking, plan_layers, unpack_error},
    manifest::{self, Descriptor, Document},
    progress::{Counted, Layer, Pull, PullProgress},
    registry::Registry,
    unpack::Unpacked,
    work::Work,
};
use crate::api::AuthConfig;

/// What a reference led to.
struct Resolved {
    registry: Registry,
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
        let pull = self.shared.pulls.begin(reference.to_string());
        let counted = Counted::new();
        let patience = self.shared.config.progress_timeout;
        let pulled = tokio::select! {
            pulled = self.pull_in(&reference, auth.as_ref(), &pull) => pulled,
            () = pull.stalled(patience) => Err(ImageError::Network {
                reference: reference.to_string(),
                host: reference.registry().to_owned(),
                reason: format!("no progress for {} s", patience.as_secs()),
            }),
        };
        if pulled.is_ok() {
            counted.succeeded();
        }
        pulled
    }

    /// The pulls in flight.
    pub fn pulls(&self) -> Vec<PullProgress> {
        self.shared.pulls.list()
    }

    async fn pull_in(
        &self,
        reference: &ImageReference,
        auth: Option<&AuthConfig>,
        pull: &Pull,
    ) -> Result<ImageId, ImageError> {
        let resolved = resolve(Registry::open(reference, auth, &self.shared.config)?, reference);
        let resolved = resolved.await?;
        let config = parse_config(reference, &resolved.config)?;
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
        pull.plan(resolved.layers.iter().map(|l| Layer::new(&l.digest, l.size)).collect());
        let progress = pull.layers();
        let names = vec![Names {
            repo_tag: reference.repo_tag(),
            repo_digest: Some(reference.repo_digest(&resolved.digest)),
        }];
        // A layer may be removed by another process between its check and the commit.
        for _ in 0..3 {
            let work = self.start_work().await?;
            let fetch = |at: usize, folder| {
                let (resolved, work) = (&resolved, Arc::clone(&work));
                let (expected, progress) = (plans[at].expected.clone(), Arc::clone(&progress));
                async move {
                    let layer = &resolved.layers[at];
                    self.fetch(
                        reference,
                        &resolved.registry,
                        layer,
                        expected,
                        folder,
                        work,
                        progress,
                        at,
                    )
                    .await
                }
            };
            let tell = |at: usize, state| progress[at].set(state);
            let layers =
                self.ensure_layers(&reference.to_string(), &work, &plans, fetch, tell).await?;
            let committed =
                self.commit(resolved.config.clone(), layers, names.clone(), false).await?;
            if let Some(id) = committed {
                tracing::debug!(image = %reference, %id, "pulled");
                return Ok(id);
            }
        }
        Err(vanished(&reference.to_string()))
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of one layer's way")]
    async fn fetch(
        &self,
        reference: &ImageReference,
        registry: &Registry,
        layer: &Descriptor,
        expected: Expected,
        folder: PathBuf,
        work: Arc<Work>,
        progress: Arc<[Layer]>,
        at: usize,
    ) -> Result<Unpacked, ImageError> {
        // Chunks are as large as the HTTP library reads at once, up to some 100 kB.
        let (sender, receiver) = mpsc::channel(16);
        let limits = self.shared.limits();
        let (name, object) = (reference.to_string(), format!("layer {}", layer.digest));
        let counted = Arc::clone(&progress);
        let unpacked = blocking(move || {
            let chunks = Chunks { receiver, current: Bytes::new(), progress: counted, at };
            let unpacked = unpack_blob(chunks, &expected, &folder, limits);
            // The folder must not go before this thread is done with it.
            drop(work);
            unpacked.map_err(|error| unpack_error(&name, &object, error))
        });
        progress[at].begin();
        let count = |bytes| progress[at].receive(bytes);
        let (fed, unpacked) = tokio::join!(registry.feed(layer, sender, count), unpacked);
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

async fn resolve(registry: Registry, reference: &ImageReference) -> Result<Resolved, ImageError> {
    let name = reference.to_string();
    let (text, digest) = registry.resolve().await?;
    let mut document = manifest::parse(&name, &text)?;
    let machine = manifest::this_machine();
    // An index may name another; deeper nesting is nobody's practice.
    for _ in 0..2 {
        let Document::Index(manifests) = &document else { break };
        let chosen = manifest::choose(manifests, &machine).ok_or_else(|| ImageError::NotFound {
            reference: name.clone(),
            reason: format!("it has no image for {}/{}", machine.os, machine.architecture),
        })?;
        let text = registry.manifest(chosen).await?;
        document = manifest::parse(&name, &text)?;
    }
    match document {
        Document::Image { config, layers } => {
            let config = registry.small_blob(&config).await?;
            Ok(Resolved { registry, digest, config, layers })
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
    progress: Arc<[Layer]>,
    at: usize,
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
        self.progress[self.at].unpack(most as u64);
        Ok(most)
    }
}
