//! ConfigMaps, Secrets and Services of the folder, for volumes and environments; and where statuses
//! and Events go without an API server.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::{
    ConfigMap, Node, ObjectReference, Pod, PodStatus, Secret, Service,
};
use serde::Serialize;
use tokio::sync::{Notify, broadcast, mpsc, watch};

use super::folder::{FolderChange, Kind, Ready};
use super::keep;
use super::services::{Event, Served};
use crate::ids::{NamespacedName, PodUid};
use crate::objects::{ObjectError, ObjectRef, Objects};
use crate::report::{EventSink, EventType, StatusSink};
use crate::source::file::ObjectSink;

/// Events kept in memory for `longshore status`.
const EVENTS: usize = 200;
/// How long statuses are collected before they are written.
const SETTLE: Duration = Duration::from_millis(200);

/// An Event as kept.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recorded {
    /// When it last happened.
    #[serde(serialize_with = "as_text")]
    pub last: Timestamp,
    /// How often.
    pub count: u64,
    /// `Warning` or `Normal`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `Pod default/web`.
    pub object: String,
    /// As kubelet names it.
    pub reason: String,
    /// For people.
    pub message: String,
}

fn as_text<S: serde::Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(time)
}

/// What a standalone node knows.
pub struct Store {
    config_maps: Mutex<BTreeMap<NamespacedName, Arc<ConfigMap>>>,
    secrets: Mutex<BTreeMap<NamespacedName, Arc<Secret>>>,
    pods: Mutex<HashMap<PodUid, (Arc<Pod>, Option<PodStatus>)>>,
    /// Pods whose kept status is not the last one.
    unwritten: Mutex<HashMap<PodUid, Option<PodStatus>>>,
    wake_writer: Notify,
    statuses: PathBuf,
    served: Arc<Mutex<Served>>,
    events: Mutex<VecDeque<Recorded>>,
    changes: broadcast::Sender<ObjectRef>,
    tell: mpsc::UnboundedSender<Event>,
}

impl Store {
    /// A store that keeps statuses in the folder `statuses` and tells the Service loop by `tell`.
    pub fn new(
        statuses: PathBuf,
        served: Arc<Mutex<Served>>,
        tell: mpsc::UnboundedSender<Event>,
    ) -> Arc<Self> {
        Arc::new(Self {
            config_maps: Mutex::default(),
            secrets: Mutex::default(),
            pods: Mutex::default(),
            unwritten: Mutex::default(),
            wake_writer: Notify::new(),
            statuses,
            served,
            events: Mutex::default(),
            changes: broadcast::channel(256).0,
            tell,
        })
    }

    /// Services as they are served.
    pub fn served(&self) -> Served {
        lock(&self.served).clone()
    }

    /// Events, the newest last.
    pub fn events(&self) -> Vec<Recorded> {
        lock(&self.events).iter().cloned().collect()
    }

    /// Pods with the status last reported.
    pub fn pods(&self) -> Vec<(Arc<Pod>, Option<PodStatus>)> {
        lock(&self.pods).values().cloned().collect()
    }

    fn status_file(&self, uid: &PodUid) -> PathBuf {
        self.statuses.join(format!("{uid}.json"))
    }

    /// Writes statuses to disk, so that the next run knows restart counts and conditions.
    pub async fn run_writer(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) {
        loop {
            let ended = tokio::select! {
                () = self.wake_writer.notified() => false,
                ended = shutdown.wait_for(|ended| *ended) => { drop(ended); true }
            };
            if !ended {
                tokio::time::sleep(SETTLE).await;
            }
            let batch = std::mem::take(&mut *lock(&self.unwritten));
            let store = self.clone();
            let _ = tokio::task::spawn_blocking(move || store.write(batch)).await;
            if ended {
                return;
            }
        }
    }

    fn write(&self, batch: HashMap<PodUid, Option<PodStatus>>) {
        for (uid, status) in batch {
            let path = self.status_file(&uid);
            let written = match status {
                Some(status) => keep::write_if_changed(&path, &status),
                None => match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                },
            };
            if let Err(error) = written {
                tracing::warn!(path = %path.display(), %error, "cannot keep a pod's status");
            }
        }
    }

    /// Removes statuses of pods that went while nobody looked.
    fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(&self.statuses) else { return };
        let pods = lock(&self.pods);
        for entry in entries.filter_map(Result::ok) {
            let path = entry.path();
            let uid = Path::new(&path).file_stem().and_then(|stem| stem.to_str());
            if uid.is_none_or(|uid| !pods.contains_key(&PodUid::from(uid))) {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

impl ObjectSink for Store {
    fn apply(&self, change: FolderChange) {
        match change {
            FolderChange::Set(key, Ready::ConfigMap(map)) => {
                lock(&self.config_maps).insert(key.clone(), map);
                let _ = self.changes.send(ObjectRef::ConfigMap(key));
            }
            FolderChange::Set(key, Ready::Secret(secret)) => {
                lock(&self.secrets).insert(key.clone(), secret);
                let _ = self.changes.send(ObjectRef::Secret(key));
            }
            FolderChange::Set(key, Ready::Service(service)) => {
                let _ = self.tell.send(Event::Service(key, Some(service)));
            }
            FolderChange::Set(key, Ready::Slice(slice)) => {
                let _ = self.tell.send(Event::Slice(key, Some(slice)));
            }
            FolderChange::Set(_, Ready::Pod(pod)) => {
                let uid = PodUid::of(&pod);
                let status = self.last_status(&uid);
                let mut known = Pod::clone(&pod);
                known.status = status.clone();
                lock(&self.pods).insert(uid.clone(), (pod, status));
                let _ = self.tell.send(Event::Pod(uid, Arc::new(known)));
            }
            FolderChange::PodRemoved(_, uid) => {
                let _ = self.tell.send(Event::PodEnding(uid));
            }
            FolderChange::Removed((kind, key)) => match kind {
                Kind::ConfigMap => {
                    lock(&self.config_maps).remove(&key);
                    let _ = self.changes.send(ObjectRef::ConfigMap(key));
                }
                Kind::Secret => {
                    lock(&self.secrets).remove(&key);
                    let _ = self.changes.send(ObjectRef::Secret(key));
                }
                Kind::Service => {
                    let _ = self.tell.send(Event::Service(key, None));
                }
                Kind::EndpointSlice => {
                    let _ = self.tell.send(Event::Slice(key, None));
                }
                Kind::Pod => {}
            },
        }
    }

    fn synced(&self) {
        self.sweep();
        let _ = self.tell.send(Event::FolderRead);
    }

    fn last_status(&self, uid: &PodUid) -> Option<PodStatus> {
        if let Some((_, Some(status))) = lock(&self.pods).get(uid) {
            return Some(status.clone());
        }
        keep::read(&self.status_file(uid))
    }
}

#[async_trait]
impl Objects for Store {
    async fn config_map(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        Ok(lock(&self.config_maps).get(key).cloned())
    }

    async fn secret(&self, key: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError> {
        Ok(lock(&self.secrets).get(key).cloned())
    }

    async fn service_account_token(
        &self,
        _: &NamespacedName,
        _: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError> {
        Err(ObjectError::Standalone { what: "a service account token" })
    }

    fn services(&self, namespace: &str) -> Vec<Arc<Service>> {
        let served = lock(&self.served);
        let wanted = |key: &NamespacedName| {
            &*key.namespace == namespace
                || (&*key.namespace == "default" && &*key.name == "kubernetes")
        };
        served.services.iter().filter(|(key, _)| wanted(key)).map(|(_, s)| s.clone()).collect()
    }

    fn node(&self) -> Option<Arc<Node>> {
        None
    }

    fn retain(&self, _: &Pod) {}

    fn release(&self, _: &PodUid) {}

    fn changes(&self) -> broadcast::Receiver<ObjectRef> {
        self.changes.subscribe()
    }
}

impl StatusSink for Store {
    fn publish(&self, pod: &Arc<Pod>, status: PodStatus) {
        let uid = PodUid::of(pod);
        lock(&self.pods).insert(uid.clone(), (pod.clone(), Some(status.clone())));
        lock(&self.unwritten).insert(uid.clone(), Some(status.clone()));
        self.wake_writer.notify_one();
        let _ = self.tell.send(Event::PodStatus(uid, pod.clone(), Box::new(status)));
    }

    fn gone(&self, pod: &Arc<Pod>) {
        let uid = PodUid::of(pod);
        lock(&self.pods).remove(&uid);
        lock(&self.unwritten).insert(uid.clone(), None);
        self.wake_writer.notify_one();
        let _ = self.tell.send(Event::PodGone(uid));
    }
}

impl EventSink for Store {
    fn record(&self, regarding: ObjectReference, kind: EventType, reason: &str, message: String) {
        let object = format!(
            "{} {}/{}",
            regarding.kind.as_deref().unwrap_or_default(),
            regarding.namespace.as_deref().unwrap_or_default(),
            regarding.name.as_deref().unwrap_or_default()
        );
        let (kind, last) = match kind {
            EventType::Normal => ("Normal", Timestamp::now()),
            EventType::Warning => ("Warning", Timestamp::now()),
        };
        let mut events = lock(&self.events);
        let same = events.iter().position(|known| {
            known.object == object && known.reason == reason && known.message == message
        });
        let count = match same.and_then(|at| events.remove(at)) {
            Some(known) => known.count + 1,
            None => 1,
        };
        // A repeated Event is logged at each power of two.
        if count.is_power_of_two() {
            match kind {
                "Warning" => tracing::warn!(%object, reason, count, "{message}"),
                _ => tracing::info!(%object, reason, count, "{message}"),
            }
        }
        if events.len() >= EVENTS {
            events.pop_front();
        }
        events.push_back(Recorded { last, count, kind, object, reason: reason.into(), message });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
