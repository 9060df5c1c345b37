//! Pods, Services, EndpointSlices and the node from the API server, as changes.
//!
//! Every loop tells what it knew at the last run (from its store) when the API server does not
//! answer soon, and the difference to the truth once it does.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::{Client, Resource};
use proxy::object::{Change, NamespacedName as ProxyKey, NodeState};
use tokio::sync::{mpsc, watch};

use super::proxy_object::{
    HEADLESS, SERVICE_PROXY_NAME, TRIGGER_TIME, cidrs, key, node_state, service_change,
    slice_change,
};
use super::{PodChange, PodSource};
use crate::api::watch::{Failure, Seen, Watch};
use crate::cluster::objects::Services;
use crate::cluster::store::Store;
use crate::ids::{NamespacedName, PodUid};

/// A control plane that has not answered for this long is taken for away: the last known objects
/// are told.
const AWAY_AFTER: Duration = Duration::from_secs(5);
/// Marks the API's picture of a static pod.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// Last errors, by what they concern.
#[derive(Clone)]
pub struct Errors(watch::Sender<BTreeMap<&'static str, String>>);

impl Errors {
    /// None yet.
    pub fn new() -> (Self, watch::Receiver<BTreeMap<&'static str, String>>) {
        let (tx, rx) = watch::channel(BTreeMap::new());
        (Self(tx), rx)
    }

    /// `what` failed.
    pub fn set(&self, what: &'static str, message: String) {
        self.0.send_if_modified(|errors| {
            if errors.get(what) == Some(&message) {
                return false;
            }
            tracing::warn!(what, error = %message, "the API server does not do as asked; trying again");
            errors.insert(what, message);
            true
        });
    }

    /// `what` works.
    pub fn clear(&self, what: &'static str) {
        self.0.send_if_modified(|errors| {
            let failed = errors.remove(what).is_some();
            if failed {
                tracing::info!(what, "works again");
            }
            failed
        });
    }
}

/// A pod of the API that is a static pod's picture appeared, changed or went.
#[derive(Clone, Debug)]
pub enum MirrorSeen {
    /// It is there.
    Set(Arc<Pod>),
    /// It is gone.
    Gone(NamespacedName),
    /// All there are have been told.
    Synced,
}

/// Which of the API's pods are being deleted, for whoever confirms their end.
#[derive(Default)]
pub struct Deleting(Mutex<HashMap<PodUid, bool>>);

impl Deleting {
    fn set(&self, uid: PodUid, deleting: bool) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).insert(uid, deleting);
    }

    fn forget(&self, uid: &PodUid) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).remove(uid);
    }

    /// Whether the API has a `deletionTimestamp` for `uid`; `None` if it has no such pod.
    pub fn is_deleting(&self, uid: &PodUid) -> Option<bool> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).get(uid).copied()
    }
}

/// Where pods go.
pub struct PodLoop {
    /// To the sync loop.
    pub pods: mpsc::Sender<PodChange>,
    /// To the mirror loop.
    pub mirrors: mpsc::UnboundedSender<MirrorSeen>,
    /// Told of every deletion, by UID, also after the sync loop has let go of the pod.
    pub deletions: mpsc::UnboundedSender<PodUid>,
    /// Kept up to date.
    pub deleting: Arc<Deleting>,
    /// For the next start.
    pub store: Store,
    /// Shown in status.
    pub errors: Errors,
}

struct KnownPod {
    version: Option<String>,
    mirror: bool,
    key: NamespacedName,
}

impl PodLoop {
    /// Runs for ever: pods of `node_name`.
    pub async fn run(self, client: Client, node_name: String) {
        let fields = format!("spec.nodeName={node_name}");
        let mut watch = Watch::<Pod>::new(kube::Api::all(client), &fields);
        let mut known: HashMap<PodUid, KnownPod> = HashMap::new();
        let mut listed: HashSet<PodUid> = HashSet::new();
        let (mut synced, mut told) = (false, false);
        let away = tokio::time::sleep(AWAY_AFTER);
        tokio::pin!(away);
        loop {
            let seen = tokio::select! {
                seen = watch.next() => seen,
                () = &mut away, if !told => {
                    told = true;
                    self.tell_last_known(&mut known).await;
                    continue;
                }
            };
            match seen {
                Seen::Restarted => listed.clear(),
                Seen::Listed(pod) => {
                    listed.insert(PodUid::of(&pod));
                    self.set(&mut known, pod).await;
                }
                Seen::Complete => {
                    self.errors.clear("pods");
                    let gone: Vec<PodUid> =
                        known.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                    for uid in gone {
                        self.removed(&mut known, &uid).await;
                    }
                    self.store.keep(|uid| listed.contains(&PodUid::from(uid)));
                    listed.clear();
                    let _ = self.mirrors.send(MirrorSeen::Synced);
                    told = true;
                    if !synced {
                        synced = true;
                        let _ = self.pods.send(PodChange::Synced(PodSource::Cluster)).await;
                    }
                }
                Seen::Applied(pod) => {
                    self.errors.clear("pods");
                    self.set(&mut known, pod).await;
                }
                Seen::Deleted(pod) => self.removed(&mut known, &PodUid::of(&pod)).await,
                Seen::Failed(failure) => {
                    self.errors.set("pods", failure.message);
                    if !told {
                        told = true;
                        self.tell_last_known(&mut known).await;
                    }
                }
            }
        }
    }

    async fn set(&self, known: &mut HashMap<PodUid, KnownPod>, mut pod: Pod) {
        let uid = PodUid::of(&pod);
        if uid.as_str().is_empty() {
            return;
        }
        let version = pod.metadata.resource_version.clone();
        if known.get(&uid).is_some_and(|k| k.version == version) {
            return;
        }
        pod.metadata.managed_fields = None;
        let mirror = pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR));
        let key = NamespacedName::of_pod(&pod);
        known.insert(uid.clone(), KnownPod { version, mirror, key });
        if mirror {
            let _ = self.mirrors.send(MirrorSeen::Set(Arc::new(pod)));
            return;
        }
        let deleting = pod.metadata.deletion_timestamp.is_some();
        self.deleting.set(uid.clone(), deleting);
        self.store.put(uid.as_str(), &pod);
        let _ = self.pods.send(PodChange::Set(PodSource::Cluster, Arc::new(pod))).await;
        if deleting {
            let _ = self.deletions.send(uid);
        }
    }

    async fn removed(&self, known: &mut HashMap<PodUid, KnownPod>, uid: &PodUid) {
        let Some(pod) = known.remove(uid) else { return };
        if pod.mirror {
            let _ = self.mirrors.send(MirrorSeen::Gone(pod.key));
            return;
        }
        self.deleting.forget(uid);
        self.store.remove(uid.as_str());
        let _ = self.pods.send(PodChange::Removed(PodSource::Cluster, uid.clone())).await;
    }

    /// Tells the pods of the last run. `Synced` is not told: what the API server has besides is not
    /// known, so nothing may be taken for orphaned.
    async fn tell_last_known(&self, known: &mut HashMap<PodUid, KnownPod>) {
        let pods: Vec<Pod> = self.store.load().into_iter().flatten().collect();
        tracing::warn!(pods = pods.len(), "the API server is away: running the last known pods");
        for mut pod in pods {
            // Whatever the API says later is news, even at the same version.
            pod.metadata.managed_fields = None;
            self.set(known, pod).await;
        }
    }
}

/// Where Services and slices go.
#[derive(Clone)]
pub struct ServiceLoops {
    /// To the proxy.
    pub proxy: mpsc::Sender<Change>,
    /// For the service environment variables of pods, if this process runs any.
    pub services: Option<Arc<Services>>,
    /// This node.
    pub node_name: String,
    /// Whether the proxy is served by this process.
    pub serve: bool,
    /// Shown in status.
    pub errors: Errors,
    /// Which of the two kinds have been told once.
    pub synced: Arc<Synced>,
}

/// Counts what has been told completely.
#[derive(Default)]
pub struct Synced(Mutex<(bool, bool)>);

impl Synced {
    /// True exactly once: when both are complete.
    fn note(&self, slices: bool) -> bool {
        let mut told = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let before = told.0 && told.1;
        if slices {
            told.1 = true
        } else {
            told.0 = true
        }
        !before && told.0 && told.1
    }
}

impl ServiceLoops {
    async fn send(&self, change: Change) {
        if self.serve {
            let _ = self.proxy.send(change).await;
        }
    }

    async fn complete(&self, slices: bool) {
        if self.synced.note(slices) {
            self.send(Change::Synced).await;
        }
    }

    /// Runs for ever: Services.
    pub async fn run_services(self, client: Client, store: Store) {
        let mut watch = Watch::<Service>::new(kube::Api::all(client), "");
        let mut list = List::default();
        let away = tokio::time::sleep(AWAY_AFTER);
        tokio::pin!(away);
        loop {
            let seen = tokio::select! {
                seen = watch.next() => seen,
                () = &mut away, if !list.told => {
                    self.last_known_services(&mut list, &store).await;
                    continue;
                }
            };
            match seen {
                Seen::Restarted => list.restart(),
                Seen::Listed(service) => {
                    if list.note(&service) {
                        self.service(service, &store).await;
                    }
                }
                Seen::Complete => {
                    self.errors.clear("services");
                    for gone in list.complete(&store) {
                        self.service_gone(gone).await;
                    }
                    self.complete(false).await;
                    tokio::task::spawn_blocking(crate::sys::release_memory);
                }
                Seen::Applied(service) => {
                    self.errors.clear("services");
                    list.note(&service);
                    self.service(service, &store).await;
                }
                Seen::Deleted(service) => {
                    let gone = key(&service.metadata);
                    list.forget(&gone);
                    store.remove(&text(&gone));
                    self.service_gone(gone).await;
                }
                Seen::Failed(failure) => {
                    if !list.told {
                        self.last_known_services(&mut list, &store).await;
                    }
                    self.failed("services", failure).await;
                }
            }
        }
    }

    async fn service(&self, mut service: Service, store: &Store) {
        trim_service(&mut service);
        let key = key(&service.metadata);
        store.put(&text(&key), &service);
        self.send(service_change(&service)).await;
        if let Some(services) = &self.services {
            services.put(&ours(&key), &service);
        }
    }

    async fn service_gone(&self, gone: ProxyKey) {
        if let Some(services) = &self.services {
            services.remove(&ours(&gone));
        }
        self.send(Change::ServiceGone(gone)).await;
    }

    async fn last_known_services(&self, list: &mut List, store: &Store) {
        list.told = true;
        // With nothing on disk an earlier run's rules are the best there is.
        let Some(services) = store.load::<Service>() else { return };
        for service in services {
            list.recall(&service);
            self.service(service, store).await;
        }
        self.complete(false).await;
    }

    /// Runs for ever: EndpointSlices.
    pub async fn run_slices(self, client: Client, store: Store) {
        let selector = format!("!{HEADLESS}");
        let mut watch = Watch::<EndpointSlice>::new(kube::Api::all(client), "").labels(&selector);
        let mut list = List::default();
        let mut refused = false;
        let away = tokio::time::sleep(AWAY_AFTER);
        tokio::pin!(away);
        loop {
            let seen = tokio::select! {
                seen = watch.next() => seen,
                () = &mut away, if !list.told && !refused => {
                    self.last_known_slices(&mut list, &store).await;
                    continue;
                }
            };
            match seen {
                Seen::Restarted => list.restart(),
                Seen::Listed(slice) => {
                    if list.note(&slice) {
                        self.slice(slice, &store).await;
                    }
                }
                Seen::Complete => {
                    self.errors.clear("endpointslices");
                    self.send(Change::SourceError(None)).await;
                    for gone in list.complete(&store) {
                        self.send(Change::SliceGone(gone)).await;
                    }
                    self.complete(true).await;
                    tokio::task::spawn_blocking(crate::sys::release_memory);
                }
                Seen::Applied(slice) => {
                    self.errors.clear("endpointslices");
                    list.note(&slice);
                    self.slice(slice, &store).await;
                }
                Seen::Deleted(slice) => {
                    let gone = key(&slice.metadata);
                    list.forget(&gone);
                    store.remove(&text(&gone));
                    self.send(Change::SliceGone(gone)).await;
                }
                Seen::Failed(failure) => {
                    refused = failure.forbidden;
                    if !list.told && !refused {
                        self.last_known_slices(&mut list, &store).await;
                    }
                    self.failed("endpointslices", failure).await;
                }
            }
        }
    }

    async fn slice(&self, mut slice: EndpointSlice, store: &Store) {
        slice.metadata.managed_fields = None;
        slice.metadata.owner_references = None;
        if let Some(annotations) = &mut slice.metadata.annotations {
            annotations.retain(|name, _| name == TRIGGER_TIME);
        }
        store.put(&text(&key(&slice.metadata)), &slice);
        self.send(slice_change(&slice, &self.node_name)).await;
    }

    async fn last_known_slices(&self, list: &mut List, store: &Store) {
        list.told = true;
        let Some(slices) = store.load::<EndpointSlice>() else { return };
        for slice in slices {
            list.recall(&slice);
            self.slice(slice, store).await;
        }
        self.complete(true).await;
    }

    async fn failed(&self, what: &'static str, failure: Failure) {
        let message = if failure.forbidden {
            format!(
                "not allowed to read {what}: {}; an administrator grants it with: longshore \
                 cluster-setup | kubectl apply -f -",
                failure.message
            )
        } else {
            format!("cannot read {what}: {}", failure.message)
        };
        if failure.forbidden {
            self.send(Change::SourceError(Some(message.clone()))).await;
        }
        self.errors.set(what, message);
    }
}

/// What a list-and-watch has told, as keyed hashes of keys and of versions: there are tens of
/// thousands, each kept in full elsewhere. That two of 100,000 keys meet has odds of 1 to 3 billion.
#[derive(Default)]
struct List {
    hasher: RandomState,
    held: HashMap<u64, Option<u64>>,
    listed: HashSet<u64>,
    told: bool,
}

impl List {
    fn restart(&mut self) {
        self.listed.clear();
    }

    fn hash(&self, namespace: &str, name: &str) -> u64 {
        self.hasher.hash_one((namespace, name))
    }

    fn hash_of<K: Resource>(&self, object: &K) -> u64 {
        let meta = object.meta();
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        self.hash(namespace, meta.name.as_deref().unwrap_or_default())
    }

    /// Notes `object`; whether it is news.
    fn note<K: Resource>(&mut self, object: &K) -> bool {
        let hash = self.hash_of(object);
        let version = object.meta().resource_version.as_deref();
        let version = version.map(|version| self.hasher.hash_one(version));
        self.listed.insert(hash);
        let before = self.held.insert(hash, version);
        version.is_none() || before != Some(version)
    }

    /// Notes an object from disk: the next time it is seen it is news.
    fn recall<K: Resource>(&mut self, object: &K) {
        self.held.insert(self.hash_of(object), None);
    }

    fn forget(&mut self, key: &ProxyKey) {
        self.held.remove(&self.hash(&key.namespace, &key.name));
    }

    /// Ends a list: what it did not name is forgotten, also by the `store`, and returned.
    fn complete(&mut self, store: &Store) -> Vec<ProxyKey> {
        self.told = true;
        let listed = std::mem::take(&mut self.listed);
        self.held.retain(|hash, _| listed.contains(hash));
        self.held.shrink_to_fit();
        let gone = store.keep(|text| {
            text.split_once('/')
                .is_some_and(|(space, name)| self.held.contains_key(&self.hash(space, name)))
        });
        gone.iter()
            .filter_map(|text| text.split_once('/'))
            .map(|(namespace, name)| ProxyKey { namespace: namespace.into(), name: name.into() })
            .collect()
    }
}

fn text(key: &ProxyKey) -> String {
    format!("{}/{}", key.namespace, key.name)
}

fn ours(key: &ProxyKey) -> NamespacedName {
    NamespacedName { namespace: key.namespace.clone(), name: key.name.clone() }
}

/// Takes away what neither the proxy nor the environment needs: a node holds every Service there is.
fn trim_service(service: &mut Service) {
    let metadata = &mut service.metadata;
    metadata.managed_fields = None;
    metadata.annotations = None;
    metadata.owner_references = None;
    metadata.finalizers = None;
    if let Some(labels) = &mut metadata.labels {
        labels.retain(|label, _| label == SERVICE_PROXY_NAME || label == HEADLESS);
    }
    if let Some(spec) = &mut service.spec {
        spec.selector = None;
    }
}

/// Runs for ever: ranges of cluster IPs, for the proxy. Nothing depends on them but that packets to
/// addresses that no Service has end here: who may not read them goes without.
pub async fn run_service_cidrs(client: Client, proxy: mpsc::Sender<Change>) {
    let mut watch = Watch::<ServiceCIDR>::new(kube::Api::all(client), "");
    let mut known: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut listed = BTreeMap::new();
    loop {
        let of = |object: ServiceCIDR| {
            let cidrs = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
            (object.metadata.name.unwrap_or_default(), cidrs)
        };
        match watch.next().await {
            Seen::Restarted => {
                listed = BTreeMap::new();
                continue;
            }
            Seen::Listed(object) => {
                listed.extend([of(object)]);
                continue;
            }
            Seen::Complete => known = std::mem::take(&mut listed),
            Seen::Applied(object) => known.extend([of(object)]),
            Seen::Deleted(object) => drop(known.remove(&of(object).0)),
            Seen::Failed(failure) => {
                tracing::debug!(message = failure.message, "ServiceCIDRs are not known");
                continue;
            }
        }
        let all: Vec<String> = known.values().flatten().cloned().collect();
        let cidrs = cidrs(&all).into_iter().map(|cidr| cidr.network()).collect();
        let _ = proxy.send(Change::ServiceCidrs(cidrs)).await;
    }
}

/// Runs for ever: the node's own object, also for the proxy.
pub async fn run_node(
    client: Client,
    node_name: String,
    node: watch::Sender<Option<Arc<Node>>>,
    proxy: Option<mpsc::Sender<Change>>,
    store: Store,
    errors: Errors,
) {
    let fields = format!("metadata.name={node_name}");
    let mut watch = Watch::<Node>::new(kube::Api::all(client), &fields);
    let mut told: Option<NodeState> = None;
    let mut listed = None;
    let mut known = false;
    loop {
        let seen = match watch.next().await {
            Seen::Restarted => {
                listed = None;
                continue;
            }
            Seen::Listed(object) => {
                listed = Some(object);
                continue;
            }
            Seen::Complete => listed.take(),
            Seen::Applied(object) => Some(object),
            Seen::Deleted(_) => None,
            Seen::Failed(failure) => {
                errors.set("node", failure.message);
                if known {
                    continue;
                }
                store
                    .load::<Node>()
                    .into_iter()
                    .flatten()
                    .find(|n| n.metadata.name.as_ref() == Some(&node_name))
            }
        };
        known = true;
        let seen = seen.map(|mut object| {
            object.metadata.managed_fields = None;
            Arc::new(object)
        });
        if let Some(object) = &seen {
            errors.clear("node");
            let mut stored = (**object).clone();
            // What changes with every heartbeat is not worth writing.
            if let Some(status) = &mut stored.status {
                status.conditions = None;
                status.images = None;
            }
            stored.metadata.resource_version = None;
            store.put(&node_name, &stored);
            let state = node_state(object);
            if let Some(proxy) = &proxy
                && told.as_ref() != Some(&state)
            {
                let _ = proxy.send(Change::Node(state.clone())).await;
                told = Some(state);
            }
        }
        node.send_replace(seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, version: &str) -> Service {
        let mut service = Service::default();
        service.metadata.namespace = Some("n".into());
        service.metadata.name = Some(name.into());
        service.metadata.resource_version = Some(version.into());
        service
    }

    #[test]
    fn a_list_tells_what_is_news_and_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "services");
        let mut list = List::default();
        for name in ["a", "b", "c"] {
            store.put(&format!("n/{name}"), &service(name, "1"));
            assert!(list.note(&service(name, "1")));
        }
        assert!(list.complete(&store).is_empty());
        list.restart();
        assert!(!list.note(&service("a", "1")) && list.note(&service("b", "2")));
        let gone = list.complete(&store);
        assert_eq!(gone.iter().map(text).collect::<Vec<_>>(), ["n/c"]);
        // What was gone is news when it is back; so is all that only the disk told of.
        assert!(list.note(&service("c", "1")));
        list.recall(&service("a", "1"));
        assert!(list.note(&service("a", "1")));
        list.forget(&key(&service("b", "2").metadata));
        assert!(list.note(&service("b", "2")));
    }
}
