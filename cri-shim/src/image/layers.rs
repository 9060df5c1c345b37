//! Getting an image's layers into the store: in parallel, each once.
//!
//! States of a layer in a pull: waiting for whoever else has the same chain in work, then for whoever
//! has the same content in work, then for a free slot; then unpacking into the pull's work folder.
//! A layer that depends on those below waits for them to be in place. Then it is in place itself.
//! Waits are acyclic: who holds a content's lock waits for nothing but a slot, who holds a chain's
//! for shorter chains.
//!
//! Only an index entry makes layers lasting; those of a pull that failed or was killed are taken
//! over by the next one, and removed if none comes.

use std::{
    collections::HashMap,
    fs,
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{Mutex as AsyncMutex, Semaphore, watch};

use super::{
    ImageError, ImageId, ImageStore,
    blob::{Expected, digest_of},
    index::{LayerRecord, Names},
    layout::{LayerMeta, write_whole},
    lower::complete,
    progress::LayerState,
    steps::step,
    unpack::{UnpackError, Unpacked},
    work::Work,
};
use crate::snapshot::remove_tree;

/// The layers in work, over all pulls and imports of this process.
pub(crate) struct Flights {
    slots: Semaphore,
    locks: Mutex<HashMap<String, Weak<AsyncMutex<()>>>>,
}

impl Flights {
    pub(crate) fn new(parallel: usize) -> Self {
        Self { slots: Semaphore::new(parallel), locks: Mutex::default() }
    }

    fn lock_for(&self, what: &str) -> Arc<AsyncMutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = locks.get(what).and_then(Weak::upgrade) {
            return lock;
        }
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(AsyncMutex::new(()));
        locks.insert(what.to_owned(), Arc::downgrade(&lock));
        lock
    }
}

/// A layer to be had.
#[derive(Debug, Clone)]
pub(crate) struct LayerPlan {
    pub(crate) chain_id: String,
    pub(crate) expected: Expected,
}

/// Plans the layers of an image: the chain ids follow from its config.
///
/// Image-spec config.md "Layer ChainID": the first is the diff id, each further one the digest of
/// `<chain below> <diff id>`.
pub(crate) fn plan_layers(
    diff_ids: &[String],
    blobs: impl Iterator<Item = Option<(String, u64)>>,
) -> Vec<LayerPlan> {
    let mut below: Option<String> = None;
    diff_ids
        .iter()
        .zip(blobs)
        .map(|(diff_id, blob)| {
            let chain_id = match &below {
                None => diff_id.clone(),
                Some(below) => digest_of(format!("{below} {diff_id}").as_bytes()),
            };
            below = Some(chain_id.clone());
            LayerPlan { chain_id, expected: Expected { blob, diff_id: diff_id.clone() } }
        })
        .collect()
}

impl ImageStore {
    /// Makes sure that all `plans` are in place; `unpack` gets a layer's position and the folder
    /// to unpack it into. `tell` hears of each layer's state; errors name the image by `reference`.
    pub(crate) async fn ensure_layers<F, Fut>(
        &self,
        reference: &str,
        work: &Work,
        plans: &[LayerPlan],
        unpack: F,
        tell: impl Fn(usize, LayerState),
    ) -> Result<Vec<LayerRecord>, ImageError>
    where
        F: Fn(usize, PathBuf) -> Fut,
        Fut: Future<Output = Result<Unpacked, ImageError>>,
    {
        // Each says under which key its layer is in place.
        let placed: Vec<watch::Sender<Option<String>>> =
            plans.iter().map(|_| watch::Sender::new(None)).collect();
        let below = async |at: usize| {
            let mut keys = Vec::new();
            for sender in &placed[..at] {
                // The senders live as long as this future.
                if let Ok(key) = sender.subscribe().wait_for(Option::is_some).await {
                    keys.extend(key.clone());
                }
            }
            keys
        };
        let one = async |at: usize| -> Result<LayerRecord, ImageError> {
            let LayerPlan { chain_id, expected } = &plans[at];
            let chain = self.shared.flights.lock_for(&format!("chain {chain_id}"));
            let _chain = chain.lock().await;
            let content = self.shared.flights.lock_for(&expected.diff_id);
            let held = content.lock().await;
            let meta = match self.present(chain_id, &expected.diff_id).await? {
                Some(meta) => meta,
                None => {
                    let slot = self.shared.flights.slots.acquire().await;
                    tell(at, LayerState::Pulling);
                    let folder = work.path().join(at.to_string());
                    // A first try may have left its folder.
                    let _ = remove_tree(&folder);
                    let unpacked = unpack(at, folder.join("d")).await?;
                    drop(slot);
                    let key = if unpacked.stands_alone() {
                        &expected.diff_id
                    } else {
                        drop(held);
                        let (at, below) = (folder.clone(), below(at).await);
                        self.complete(reference, &expected.diff_id, at, &unpacked, &below).await?;
                        chain_id
                    };
                    self.place(key, folder, unpacked).await?
                }
            };
            tell(at, LayerState::Done);
            placed[at].send_replace(Some(meta.key.clone()));
            Ok(LayerRecord { key: meta.key, bytes: meta.bytes, inodes: meta.inodes })
        };
        futures::future::try_join_all((0..plans.len()).map(one)).await
    }

    /// The layer, if it is in place by content or by chain. One that is gets young again, so that it
    /// is not taken for what a forgotten pull left.
    async fn present(
        &self,
        chain_id: &str,
        diff_id: &str,
    ) -> Result<Option<LayerMeta>, ImageError> {
        let layout = self.shared.layout.clone();
        let keys = [diff_id.to_owned(), chain_id.to_owned()];
        blocking(move || {
            let _lock =
                layout.lock(false).map_err(ImageError::io("lock image store", layout.images()))?;
            let found = keys.iter().find_map(|key| layout.layer_meta(key));
            if let Some(meta) = &found {
                let folder = layout.layer(&meta.key);
                fs::File::open(&folder)
                    .and_then(|open| open.set_modified(std::time::SystemTime::now()))
                    .map_err(ImageError::io("set time of", folder))?;
            }
            Ok(found)
        })
        .await
    }

    /// Completes a layer in its work folder with what it needs of those below.
    async fn complete(
        &self,
        reference: &str,
        diff_id: &str,
        folder: PathBuf,
        unpacked: &Unpacked,
        below: &[String],
    ) -> Result<(), ImageError> {
        let layout = &self.shared.layout;
        let below: Vec<_> = below.iter().rev().map(|key| layout.layer_files(key)).collect();
        let (reference, object) = (reference.to_owned(), format!("layer {diff_id}"));
        let unpacked = unpacked.clone();
        blocking(move || {
            complete(&folder, &unpacked, &below)
                .map_err(|error| unpack_error(&reference, &object, error))
        })
        .await
    }

    /// Moves an unpacked layer to its place.
    async fn place(
        &self,
        key: &str,
        folder: PathBuf,
        unpacked: Unpacked,
    ) -> Result<LayerMeta, ImageError> {
        let layout = self.shared.layout.clone();
        let meta = LayerMeta {
            version: 1,
            key: key.to_owned(),
            bytes: unpacked.bytes,
            inodes: unpacked.inodes,
            boot: boot_id(),
        };
        blocking(move || {
            step("layer unpacked");
            let record = folder.join("layer.json");
            let text = serde_json::to_vec(&meta)
                .map_err(|error| ImageError::io("encode", &record)(error.into()))?;
            fs::write(&record, text).map_err(ImageError::io("write", &record))?;
            step("layer described");
            let _lock =
                layout.lock(false).map_err(ImageError::io("lock image store", layout.images()))?;
            let target = layout.layer(&meta.key);
            let moved = match fs::rename(&folder, &target) {
                Ok(()) => Ok(meta),
                // Another process was first, and its layer is as good.
                Err(_) if layout.layer_meta(&meta.key).is_some() => Ok(meta),
                Err(error) => Err(ImageError::io("move layer to", target)(error)),
            };
            step("layer placed");
            moved
        })
        .await
    }

    /// Makes an image visible. Nothing if a layer was removed meanwhile by another process: the
    /// caller starts over.
    ///
    /// With `wait`, everything has reached the disk before. Else that happens behind the caller's
    /// back, as it may take long where others write a lot; should the machine stop before, the
    /// next start forgets the image.
    pub(crate) async fn commit(
        &self,
        config: Vec<u8>,
        layers: Vec<LayerRecord>,
        names: Vec<Names>,
        wait: bool,
    ) -> Result<Option<ImageId>, ImageError> {
        let store = self.clone();
        let (id, synced) = blocking(move || {
            let layout = &store.shared.layout;
            let id = digest_of(&config);
            let known = store.read_index()?.images.contains_key(&id);
            if !known {
                let path = layout.config(&id);
                write_whole(&path, &config, 0o600)
                    .map_err(ImageError::io("write image config", &path))?;
                step("config written");
                if wait {
                    store.sync()?;
                }
            }
            let _lock = store.lock(true)?;
            let whole = layers.iter().all(|l| layout.layer_meta(&l.key).is_some());
            if !whole || !layout.config(&id).exists() {
                return Ok((None, true));
            }
            let mut index = (*store.read_index()?).clone();
            let before = index.clone();
            for name in &names {
                index.add(&id, layers.clone(), name);
            }
            let synced = known || wait;
            if let Some(record) = index.images.get_mut(&id).filter(|_| !synced) {
                record.unsynced = boot_id();
            }
            if index != before {
                store.write_index(&index)?;
            }
            Ok((Some(ImageId(id)), synced))
        })
        .await?;
        if let Some(id) = id.clone().filter(|_| !synced) {
            let store = self.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = store.settle(&id) {
                    tracing::warn!(image = %id, %error, "image is not known to be on disk");
                }
            });
        }
        Ok(id)
    }

    /// Waits until an image is on disk, and notes it.
    fn settle(&self, id: &ImageId) -> Result<(), ImageError> {
        self.sync()?;
        let _lock = self.lock(true)?;
        let mut index = (*self.read_index()?).clone();
        match index.images.get_mut(id.as_str()).map(|record| record.unsynced.take()) {
            Some(Some(_)) => self.write_index(&index),
            _ => Ok(()),
        }
    }

    fn sync(&self) -> Result<(), ImageError> {
        let folder = self.shared.layout.images();
        fs::File::open(&folder)
            .and_then(|open| Ok(nix::unistd::syncfs(&open)?))
            .map_err(ImageError::io("sync", folder))
    }
}

/// What tells this boot of the machine from others.
pub(crate) fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// Names an unpacking failure of `reference`'s layer `object`.
pub(crate) fn unpack_error(reference: &str, object: &str, error: UnpackError) -> ImageError {
    match error {
        UnpackError::Disk { operation, path, source } => ImageError::io(operation, path)(source),
        error => ImageError::Corrupt {
            reference: reference.to_owned(),
            object: object.to_owned(),
            reason: error.to_string(),
        },
    }
}

/// Runs file work outside the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ImageError::io("run blocking work of", "the image store")(
            std::io::Error::other(error),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_specification() {
        let (a, b) = (digest_of(b"a"), digest_of(b"b"));
        let plans = plan_layers(&[a.clone(), b.clone()], std::iter::repeat(None));
        assert_eq!(plans[0].chain_id, a);
        assert_eq!(plans[1].chain_id, digest_of(format!("{a} {b}").as_bytes()));
    }
}
