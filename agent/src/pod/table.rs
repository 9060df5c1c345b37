//! The pods of this node as others may see them: health, `longshore status`, the node's status.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::source::PodSource;

/// One pod as it was last seen.
#[derive(Clone, Debug)]
pub struct PodView {
    /// The object.
    pub pod: Arc<Pod>,
    /// Its status as last published.
    pub status: PodStatus,
    /// Where it came from; `None` for an orphan that is being cleaned up.
    pub source: Option<PodSource>,
    /// Its containers' ids by name, newest instance only.
    pub containers: HashMap<String, String>,
    /// Its sandbox's id.
    pub sandbox: Option<String>,
    /// It is over and uses nothing of the node any more but its logs.
    pub finished: bool,
}

/// How the sync loop is doing.
#[derive(Clone, Debug)]
pub struct LoopHealth {
    /// When the loop last went round.
    pub last_turn: Instant,
    /// Whether the runtime answered when last asked, and what it said if not.
    pub runtime_error: Option<String>,
    /// Whether every source has told all it knew and orphans were seen to.
    pub synced: bool,
}

#[derive(Debug)]
struct Inner {
    pods: RwLock<HashMap<PodUid, PodView>>,
    health: Mutex<LoopHealth>,
    version: watch::Sender<u64>,
}

/// The table; clones share it.
#[derive(Clone, Debug)]
pub struct PodTable(Arc<Inner>);

impl Default for PodTable {
    fn default() -> Self {
        Self(Arc::new(Inner {
            pods: RwLock::default(),
            health: Mutex::new(LoopHealth {
                last_turn: Instant::now(),
                runtime_error: Some("not asked yet".into()),
                synced: false,
            }),
            version: watch::Sender::new(0),
        }))
    }
}

impl PodTable {
    /// All pods.
    pub fn pods(&self) -> Vec<PodView> {
        self.0.pods.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// One pod.
    pub fn pod(&self, uid: &PodUid) -> Option<PodView> {
        self.0.pods.read().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// The pod of this name; of two, the one that is not being deleted.
    pub fn named(&self, namespace: &str, name: &str) -> Option<PodView> {
        let pods = self.0.pods.read().unwrap_or_else(PoisonError::into_inner);
        let named = pods.values().filter(|view| {
            let meta = &view.pod.metadata;
            view.source.is_some()
                && meta.name.as_deref() == Some(name)
                && meta.namespace.as_deref().unwrap_or("default") == namespace
        });
        named.min_by_key(|view| view.pod.metadata.deletion_timestamp.is_some()).cloned()
    }

    /// Whether container `name` of pod `uid` runs as instance `id` (without `<runtime>://`).
    pub fn runs(&self, uid: &PodUid, name: &str, id: &str) -> bool {
        let pods = self.0.pods.read().unwrap_or_else(PoisonError::into_inner);
        let Some(view) = pods.get(uid) else { return false };
        let status = &view.status;
        let all = [
            &status.container_statuses,
            &status.init_container_statuses,
            &status.ephemeral_container_statuses,
        ];
        all.into_iter().flatten().flatten().any(|status| {
            status.name == name
                && status.state.as_ref().is_some_and(|state| state.running.is_some())
                && status.container_id.as_deref().is_some_and(|full| full.ends_with(id))
        })
    }

    /// Number of pods.
    pub fn len(&self) -> usize {
        self.0.pods.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there is no pod.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How the loop is doing.
    pub fn health(&self) -> LoopHealth {
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes whenever a pod in the table does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// Puts a pod in, for tests of those who read.
    #[cfg(test)]
    pub(crate) fn put(&self, view: PodView) {
        self.set(&PodUid::of(&view.pod), view);
    }

    pub(super) fn set(&self, uid: &PodUid, view: PodView) {
        {
            let mut pods = self.0.pods.write().unwrap_or_else(PoisonError::into_inner);
            let same = pods.get(uid).is_some_and(|old| {
                Arc::ptr_eq(&old.pod, &view.pod)
                    && old.status == view.status
                    && old.containers == view.containers
                    && old.sandbox == view.sandbox
                    && old.finished == view.finished
            });
            if same {
                return;
            }
            let runs = |view: &PodView| view.status.phase.as_deref() == Some("Running");
            // A pod of an earlier run of this agent is not seen to start.
            if runs(&view) && pods.get(uid).is_some_and(|old| !runs(old)) {
                let since = |time: &Option<Time>| {
                    time.as_ref().map(|t| Timestamp::now().duration_since(t.0).as_secs_f64())
                };
                let created = since(&view.pod.metadata.creation_timestamp);
                METRICS.pod_started(since(&view.status.start_time).unwrap_or(0.0), created);
            }
            pods.insert(uid.clone(), view);
        }
        self.0.version.send_modify(|v| *v += 1);
    }

    pub(super) fn remove(&self, uid: &PodUid) {
        self.0.pods.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.0.version.send_modify(|v| *v += 1);
    }

    pub(super) fn update_health(&self, change: impl FnOnce(&mut LoopHealth)) {
        change(&mut self.0.health.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
