//! ConfigMaps, Secrets and Services of the folder, for volumes and environments; and where statuses
//! and Events go without an API server.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::{
    ConfigMap, Node, ObjectReference, Pod, PodStatus, Secret, Service,
};
use serde::Serialize;
use tokio::sync::{broadcast, mpsc};

use super::folder::{FolderChange, Kind, Ready};
use super::services::{Event, Served};
use crate::ids::{NamespacedName, PodUid};
use crate::objects::{ObjectError, ObjectRef, Objects};
use crate::report::{EventSink, EventType, StatusSink};
use crate::source::file::ObjectSink;

/// Events kept in memory for `longshore status`.
const EVENTS: usize = 200;

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
    served: Arc<Mutex<Served>>,
    events: Mutex<VecDeque<Recorded>>,
    changes: broadcast::Sender<ObjectRef>,
    tell: mpsc::UnboundedSender<Event>,
}

impl Store {
    /// A store that tells the Service loop by `tell`, and shows what it serves.
    pub fn new(served: Arc<Mutex<Served>>, tell: mpsc::UnboundedSender<Event>) -> Arc<Self> {
        Arc::new(Self {
            config_maps: Mutex::default(),
            secrets: Mutex::default(),
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
                let _ = self.tell.send(Event::Pod(PodUid::of(&pod), pod));
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
        let _ = self.tell.send(Event::FolderRead);
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
        let event = Event::PodStatus(PodUid::of(pod), pod.clone(), Box::new(status));
        let _ = self.tell.send(event);
    }

    fn gone(&self, pod: &Arc<Pod>) {
        let _ = self.tell.send(Event::PodGone(PodUid::of(pod)));
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
