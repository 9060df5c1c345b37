//! How full volumes are that claims or drivers provide: asked for when somebody looks, and not more
//! often than once a minute for each pod.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::node::{NodeVolumes, Place};
use crate::ids::{NamespacedName, PodUid};
use crate::node::machine::file_system;

/// A measurement counts so long (kubelet's `volumeStatsAggPeriod`).
const FRESH: Duration = Duration::from_secs(60);
/// A volume that does not answer sooner is left out.
const PATIENCE: Duration = Duration::from_secs(5);

/// Room of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Left for ordinary users.
    pub available: u64,
    /// All there is.
    pub capacity: u64,
    /// Taken.
    pub used: u64,
}

/// How full one volume of a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeUsage {
    /// Name of the volume in the pod.
    pub name: String,
    /// The claim behind it.
    pub claim: Option<NamespacedName>,
    /// In bytes.
    pub bytes: Room,
    /// In inodes.
    pub inodes: Room,
    /// When it was measured.
    pub at: jiff::Timestamp,
}

/// Who can say how full a volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// The driver, by the volume's handle.
    Driver(String, String),
    /// The file system that it is on.
    FileSystem,
    /// Nobody: it is a part of the node's own.
    Nobody,
}

/// What was measured of a pod's volumes, and when.
pub(super) type Measured = (Instant, Vec<VolumeUsage>);

/// File systems that are being asked.
#[derive(Clone, Default)]
pub(super) struct AskingAll(Arc<Mutex<HashSet<PathBuf>>>);

/// One of them, until it has answered.
struct Asking {
    path: PathBuf,
    all: AskingAll,
}

impl AskingAll {
    fn lock(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while it owes an answer.
    fn begin(&self, path: &Path) -> Option<Asking> {
        let new = self.lock().insert(path.to_owned());
        new.then(|| Asking { path: path.to_owned(), all: self.clone() })
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.all.lock().remove(&self.path);
    }
}

impl NodeVolumes {
    /// How full the volumes of pods are that claims or drivers provide.
    pub async fn usage(&self) -> HashMap<PodUid, Vec<VolumeUsage>> {
        let pods = self.places();
        let measuring = pods.into_iter().map(async |(uid, places)| {
            if let Some(known) = self.measured(&uid).filter(|(at, _)| at.elapsed() < FRESH) {
                return (uid, known.1);
            }
            let one = places.iter().map(async |(name, place)| {
                tokio::time::timeout(PATIENCE, self.measure(name, place)).await.ok().flatten()
            });
            let found = futures::future::join_all(one).await;
            let mut found: Vec<VolumeUsage> = found.into_iter().flatten().collect();
            found.sort_by(|a, b| a.name.cmp(&b.name));
            self.keep_measured(&uid, (Instant::now(), found.clone()));
            (uid, found)
        });
        futures::future::join_all(measuring).await.into_iter().collect()
    }

    async fn measure(&self, name: &str, place: &Place) -> Option<VolumeUsage> {
        let (bytes, inodes) = match &place.measure {
            Measure::Nobody => return None,
            Measure::FileSystem => {
                // A file system that hangs must hang neither the runtime nor more than one thread.
                let asking = self.asking().begin(&place.path)?;
                let fs = tokio::task::spawn_blocking(move || file_system(&asking.path));
                let fs = fs.await.ok()??;
                let room = |available: u64, free: u64, capacity: u64| Room {
                    available,
                    capacity,
                    used: capacity.saturating_sub(free),
                };
                (
                    room(fs.available, fs.available, fs.capacity),
                    room(fs.inodes_free, fs.inodes_free, fs.inodes),
                )
            }
            Measure::Driver(driver, handle) => {
                match self.csi()?.usage(driver, handle, &place.path).await {
                    Ok(found) => found?,
                    Err(error) => {
                        tracing::debug!(driver, handle, %error, "no statistics of a volume");
                        return None;
                    }
                }
            }
        };
        let at = jiff::Timestamp::now();
        Some(VolumeUsage { name: name.to_owned(), claim: place.claim.clone(), bytes, inodes, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_owes_an_answer_is_not_asked_again() {
        let all = AskingAll::default();
        let one = all.begin(Path::new("/a"));
        assert!(one.is_some() && all.begin(Path::new("/a")).is_none());
        assert!(all.begin(Path::new("/b")).is_some());
        drop(one);
        assert!(all.begin(Path::new("/a")).is_some());
    }
}
