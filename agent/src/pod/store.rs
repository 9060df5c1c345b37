//! The last published status of each pod on disk, so that an agent restart flips no condition and
//! forgets no last state, with or without a control plane.
//!
//! One file a pod, written whole by one background thread that skips what is already outdated: the
//! way of a status to its readers never waits for a disk.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use k8s_openapi::api::core::v1::PodStatus;
use serde::{Deserialize, Serialize};

use super::allocation::Allocation;
use crate::ids::PodUid;

/// Layout of the files.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved<S> {
    version: u32,
    status: S,
    #[serde(default)]
    allocation: Option<Allocation>,
}

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kept {
    pub(crate) status: PodStatus,
    /// What it may use; earlier versions did not say.
    pub(crate) allocation: Option<Allocation>,
}

#[derive(Default)]
struct Queue {
    /// What to write; `None` removes.
    pending: Batch,
    /// What is being written: until that is done, the disk says something older.
    writing: Batch,
    closed: bool,
}

type Batch = HashMap<PodUid, Option<Arc<Kept>>>;

struct Shared {
    dir: PathBuf,
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// Statuses on disk.
pub(crate) struct StatusStore(Arc<Shared>);

impl StatusStore {
    /// Keeps statuses in `dir`.
    pub(crate) fn new(dir: PathBuf) -> Self {
        let shared = Arc::new(Shared { dir, queue: Mutex::default(), wake: Condvar::new() });
        let worker = shared.clone();
        let spawned = std::thread::Builder::new()
            .name("pod-status".into())
            .stack_size(256 << 10)
            .spawn(move || worker.write_all());
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot keep pod statuses on disk: no thread");
        }
        Self(shared)
    }

    /// The status of the pod as last saved.
    pub(crate) fn load(&self, uid: &PodUid) -> Option<PodStatus> {
        self.kept(uid).map(|kept| kept.status)
    }

    /// All that is kept of the pod. A file that cannot be read is set aside.
    pub(crate) fn kept(&self, uid: &PodUid) -> Option<Kept> {
        if let Some(newer) = self.0.unwritten(uid) {
            return newer.as_deref().cloned();
        }
        let path = self.0.path(uid)?;
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read a saved pod status");
                return None;
            }
        };
        match serde_json::from_slice::<Saved<PodStatus>>(&bytes) {
            Ok(saved) if saved.version == VERSION => {
                Some(Kept { status: saved.status, allocation: saved.allocation })
            }
            other => {
                let why = match other {
                    Ok(saved) => format!("version {}, expected {VERSION}", saved.version),
                    Err(error) => error.to_string(),
                };
                tracing::error!(path = %path.display(), why, "saved pod status set aside");
                let _ = std::fs::rename(&path, path.with_extension("unreadable"));
                None
            }
        }
    }

    /// Whether there is a saved status of the pod.
    pub(crate) fn exists(&self, uid: &PodUid) -> bool {
        if let Some(newer) = self.0.unwritten(uid) {
            return newer.is_some();
        }
        self.0.path(uid).is_some_and(|path| path.exists())
    }

    /// Saves the status, soon.
    pub(crate) fn save(&self, uid: &PodUid, status: &PodStatus, allocation: Allocation) {
        let kept = Kept { status: status.clone(), allocation: Some(allocation) };
        self.0.push(uid, Some(Arc::new(kept)));
    }

    /// Forgets the pod.
    pub(crate) fn remove(&self, uid: &PodUid) {
        self.0.push(uid, None);
    }

    /// Pods with a saved status.
    pub(crate) fn saved(&self) -> Vec<PodUid> {
        let Ok(entries) = std::fs::read_dir(&self.0.dir) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter_map(|name| name.strip_suffix(".json").map(PodUid::from))
            .collect()
    }
}

impl Drop for StatusStore {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        self.0.wake.notify_all();
    }
}

impl Shared {
    fn path(&self, uid: &PodUid) -> Option<PathBuf> {
        // A UID comes from an API object: it must not lead out of the folder.
        let name = uid.as_str();
        let plain = !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        plain.then(|| self.dir.join(format!("{name}.json")))
    }

    /// What was said of the pod that the disk does not say yet; `Some(None)` is to forget it.
    fn unwritten(&self, uid: &PodUid) -> Option<Option<Arc<Kept>>> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.pending.get(uid).or_else(|| queue.writing.get(uid)).cloned()
    }

    fn push(&self, uid: &PodUid, kept: Option<Arc<Kept>>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.pending.insert(uid.clone(), kept);
        self.wake.notify_all();
    }

    fn write_all(&self) {
        loop {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.writing.clear();
            while queue.pending.is_empty() {
                if queue.closed {
                    return;
                }
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let batch = std::mem::take(&mut queue.pending);
            queue.writing.clone_from(&batch);
            drop(queue);
            for (uid, status) in batch {
                let Some(path) = self.path(&uid) else { continue };
                let done = match status {
                    Some(status) => write(&self.dir, &path, &status),
                    None => match std::fs::remove_file(&path) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                        _ => Ok(()),
                    },
                };
                if let Err(error) = done {
                    tracing::warn!(path = %path.display(), %error, "cannot save a pod status");
                }
            }
        }
    }
}

fn write(dir: &Path, path: &Path, kept: &Kept) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    let Kept { status, allocation } = kept;
    let saved = Saved { version: VERSION, status, allocation: allocation.clone() };
    serde_json::to_writer(&mut file, &saved)?;
    file.flush()?;
    file.as_file().sync_data()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(store: &StatusStore) {
        loop {
            let queue = store.0.queue.lock().unwrap();
            if queue.pending.is_empty() && queue.writing.is_empty() {
                return;
            }
            drop(queue);
            std::thread::yield_now();
        }
    }

    #[test]
    fn statuses_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = StatusStore::new(dir.path().join("s"));
        let uid = PodUid::from("u-1");
        assert_eq!(store.load(&uid), None);
        let status = PodStatus { phase: Some("Running".into()), ..Default::default() };
        let pod = crate::pod::testing::pod(
            r#"{"containers":[{"name":"c","resources":{"limits":{"cpu":"1"}}}]}"#,
        );
        let allocation = Allocation::asked(&pod);
        store.save(&uid, &status, allocation.clone());
        settle(&store);
        let kept = Kept { status: status.clone(), allocation: Some(allocation) };
        assert_eq!(store.kept(&uid), Some(kept));
        // As a version before wrote it.
        let older = serde_json::json!({"version": 1, "status": &status}).to_string();
        std::fs::write(dir.path().join("s/u-1.json"), older).unwrap();
        assert_eq!(store.kept(&uid), Some(Kept { status, allocation: None }));
        assert_eq!(store.saved(), std::slice::from_ref(&uid));
        store.remove(&uid);
        // At once, whatever the disk says meanwhile.
        assert!(!store.exists(&uid));
        assert_eq!(store.load(&uid), None);
        settle(&store);
        std::fs::write(dir.path().join("s/u-1.json"), b"{").unwrap();
        assert_eq!(store.load(&uid), None);
        assert_eq!(store.saved(), []);
        assert_eq!(store.load(&PodUid::from("../x")), None);
    }
}
