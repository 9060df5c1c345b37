//! Services of a standalone node: gives them addresses, finds their endpoints, tells the proxy.
//!
//! One event is one object that changed; only the Services that it concerns are planned again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice as ApiSlice;
use proxy::object::{Change, EndpointSlice, NamespacedName as ProxyKey, NodeState};
use tokio::sync::{mpsc, watch};

use super::allocate::{Allocation, Allocator};
use super::endpoints::{NodePod, plan_slices};
use super::keep;
use crate::ids::{NamespacedName, PodUid};
use crate::source::proxy_object;

/// One thing that changed.
#[derive(Debug)]
pub enum Event {
    /// A Service of the folder.
    Service(NamespacedName, Option<Arc<Service>>),
    /// An EndpointSlice of the folder.
    Slice(NamespacedName, Option<Arc<ApiSlice>>),
    /// A pod of the folder.
    Pod(PodUid, Arc<Pod>),
    /// The pod's manifest is gone.
    PodEnding(PodUid),
    /// The pod's status is now this.
    PodStatus(PodUid, Arc<Pod>, Box<PodStatus>),
    /// Nothing of the pod is left.
    PodGone(PodUid),
    /// The folder has been read once.
    FolderRead,
}

/// A Service as it is served, for others to read.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// Services with their addresses filled in.
    pub services: BTreeMap<NamespacedName, Arc<Service>>,
    /// Ready and all endpoints of each Service.
    pub endpoints: BTreeMap<NamespacedName, (usize, usize)>,
    /// Why a Service is not served.
    pub problems: BTreeMap<NamespacedName, String>,
}

/// Longest wait for the status of pods that an earlier run left, before the proxy may take away
/// what is not told.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the loop waits for before it says that all has been told.
enum State {
    /// The folder has not been read.
    Reading,
    /// These pods have not been seen yet.
    Waiting(BTreeSet<PodUid>),
    /// All has been told.
    Synced,
}

/// The loop.
pub struct ServiceLoop {
    node_name: String,
    allocator: Allocator,
    allocations: PathBuf,
    /// Services as their manifests say.
    manifests: BTreeMap<NamespacedName, Arc<Service>>,
    pods: HashMap<PodUid, NodePod>,
    slices: BTreeMap<NamespacedName, BTreeMap<ProxyKey, EndpointSlice>>,
    served: Arc<Mutex<Served>>,
    proxy: mpsc::Sender<Change>,
    state: State,
}

impl ServiceLoop {
    /// Reads what an earlier run gave out from `allocations`.
    pub fn new(
        node_name: &str,
        ranges: Vec<proxy::object::Cidr>,
        node_ports: (u16, u16),
        allocations: PathBuf,
        proxy: mpsc::Sender<Change>,
    ) -> Self {
        let earlier: BTreeMap<String, Allocation> = keep::read(&allocations).unwrap_or_default();
        let earlier = earlier
            .into_iter()
            .filter_map(|(key, allocation)| {
                let (namespace, name) = key.split_once('/')?;
                Some((NamespacedName::new(namespace, name), allocation))
            })
            .collect();
        Self {
            node_name: node_name.into(),
            allocator: Allocator::new(ranges, node_ports, earlier),
            allocations,
            manifests: BTreeMap::new(),
            pods: HashMap::new(),
            slices: BTreeMap::new(),
            served: Arc::default(),
            proxy,
            state: State::Reading,
        }
    }

    /// Services as served, shared with readers.
    pub fn served(&self) -> Arc<Mutex<Served>> {
        self.served.clone()
    }

    /// Runs until the senders are gone or `shutdown` becomes true.
    pub async fn run(
        mut self,
        node: NodeState,
        mut events: mpsc::UnboundedReceiver<Event>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let _ = self.proxy.send(Change::Node(node)).await;
        let deadline = tokio::time::sleep(PATIENCE);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.reconcile(event).await,
                    None => return,
                },
                () = &mut deadline, if matches!(self.state, State::Waiting(_)) => {
                    self.state = State::Waiting(BTreeSet::new());
                }
                () = crate::shutdown::requested(&mut shutdown) => {return }
            }
            if matches!(&self.state, State::Waiting(pods) if pods.is_empty()) {
                self.state = State::Synced;
                self.forget_allocations();
                let _ = self.proxy.send(Change::Synced).await;
            }
        }
    }

    async fn reconcile(&mut self, event: Event) {
        match event {
            Event::Service(key, Some(service)) => {
                self.manifests.insert(key.clone(), service);
                self.serve(&key).await;
                // What it gave back may be what others wait for.
                let waiting: Vec<_> = lock(&self.served).problems.keys().cloned().collect();
                for other in waiting.into_iter().filter(|other| *other != key) {
                    self.serve(&other).await;
                }
            }
            Event::Service(key, None) => {
                self.manifests.remove(&key);
                self.allocator.release(&key);
                self.withdraw(&key).await;
                self.keep_allocations();
                let waiting: Vec<_> = lock(&self.served).problems.keys().cloned().collect();
                for other in waiting {
                    self.serve(&other).await;
                }
            }
            Event::Slice(key, slice) => {
                let change = match slice {
                    Some(slice) => proxy_object::slice_change(&slice, &self.node_name),
                    None => Change::SliceGone(ProxyKey {
                        namespace: key.namespace.clone(),
                        name: key.name.clone(),
                    }),
                };
                let _ = self.proxy.send(change).await;
            }
            Event::Pod(uid, pod) => {
                let status = pod.status.clone();
                let seen = status.is_some();
                self.pods.insert(uid.clone(), NodePod { pod, status, terminating: false });
                if seen {
                    self.select(&uid).await;
                }
            }
            Event::PodStatus(uid, pod, status) => {
                let entry = self.pods.entry(uid.clone()).or_insert_with(|| NodePod {
                    pod,
                    status: None,
                    terminating: false,
                });
                entry.status = Some(*status);
                if let State::Waiting(pods) = &mut self.state {
                    pods.remove(&uid);
                }
                self.select(&uid).await;
            }
            Event::PodEnding(uid) => {
                if let Some(pod) = self.pods.get_mut(&uid) {
                    pod.terminating = true;
                    self.select(&uid).await;
                }
            }
            Event::PodGone(uid) => {
                // A pod whose manifest came back meanwhile starts anew under its UID.
                if self.pods.get(&uid).is_some_and(|pod| pod.terminating)
                    && let Some(pod) = self.pods.remove(&uid)
                {
                    self.select_labels(&pod.pod).await;
                }
                if let State::Waiting(pods) = &mut self.state {
                    pods.remove(&uid);
                }
            }
            Event::FolderRead => {
                let waiting = self.pods.iter().filter(|(_, pod)| pod.status.is_none());
                self.state = State::Waiting(waiting.map(|(uid, _)| uid.clone()).collect());
            }
        }
    }

    /// Plans the Services again that select the pod.
    async fn select(&mut self, uid: &PodUid) {
        if let Some(pod) = self.pods.get(uid).map(|pod| pod.pod.clone()) {
            self.select_labels(&pod).await;
        }
    }

    async fn select_labels(&mut self, pod: &Pod) {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let labels = pod.metadata.labels.as_ref();
        let selects = |service: &Service| {
            let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            selector.is_some_and(|selector| {
                !selector.is_empty()
                    && selector.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v))
            })
        };
        let chosen: Vec<(NamespacedName, Arc<Service>)> = lock(&self.served)
            .services
            .iter()
            .filter(|(key, service)| &*key.namespace == namespace && selects(service))
            .map(|(key, service)| (key.clone(), service.clone()))
            .collect();
        for (key, service) in chosen {
            self.apply_slices(&key, &service).await;
        }
    }

    /// Gives the Service its addresses, and tells it with its slices.
    async fn serve(&mut self, key: &NamespacedName) {
        let Some(manifest) = self.manifests.get(key) else { return };
        let mut service = Service::clone(manifest);
        if let Err(problem) = self.allocator.allocate(key, &mut service) {
            let problem = problem.to_string();
            if lock(&self.served).problems.get(key) != Some(&problem) {
                tracing::error!(service = %key, %problem, "Service refused");
            }
            self.withdraw(key).await;
            lock(&self.served).problems.insert(key.clone(), problem);
            return;
        }
        // Before it is told: after a crash the address is the same.
        self.keep_allocations();
        let service = Arc::new(service);
        {
            let mut served = lock(&self.served);
            served.problems.remove(key);
            served.services.insert(key.clone(), service.clone());
        }
        // Endpoints first, so that a new Service never rejects what it could serve.
        self.apply_slices(key, &service).await;
        let _ = self.proxy.send(proxy_object::service_change(&service)).await;
    }

    async fn withdraw(&mut self, key: &NamespacedName) {
        let had = {
            let mut served = lock(&self.served);
            served.problems.remove(key);
            served.endpoints.remove(key);
            served.services.remove(key).is_some()
        };
        if had {
            let gone = ProxyKey { namespace: key.namespace.clone(), name: key.name.clone() };
            let _ = self.proxy.send(Change::ServiceGone(gone)).await;
        }
        for slice in self.slices.remove(key).unwrap_or_default().into_keys() {
            let _ = self.proxy.send(Change::SliceGone(slice)).await;
        }
    }

    /// Tells the difference between the slices told and those that are right now.
    async fn apply_slices(&mut self, key: &NamespacedName, service: &Service) {
        let namespace = &*key.namespace;
        let pods: Vec<NodePod> = self
            .pods
            .values()
            .filter(|pod| pod.pod.metadata.namespace.as_deref().unwrap_or("default") == namespace)
            .cloned()
            .collect();
        let wanted = plan_slices(service, &pods);
        let all = wanted.values().flat_map(|slice| &slice.endpoints);
        let counts = all.fold((0, 0), |(ready, all), e| (ready + usize::from(e.ready), all + 1));
        lock(&self.served).endpoints.insert(key.clone(), counts);
        let told = self.slices.remove(key).unwrap_or_default();
        for (name, slice) in &wanted {
            if told.get(name) != Some(slice) {
                let _ = self.proxy.send(Change::Slice(slice.clone())).await;
            }
        }
        for name in told.into_keys().filter(|name| !wanted.contains_key(name)) {
            let _ = self.proxy.send(Change::SliceGone(name)).await;
        }
        if !wanted.is_empty() {
            self.slices.insert(key.clone(), wanted);
        }
    }

    /// Lets go of what was given to Services whose manifests went while we were not running.
    fn forget_allocations(&mut self) {
        let gone: Vec<_> = self
            .allocator
            .given()
            .keys()
            .filter(|key| !self.manifests.contains_key(*key))
            .cloned()
            .collect();
        if gone.is_empty() {
            return;
        }
        for key in &gone {
            self.allocator.release(key);
        }
        self.keep_allocations();
    }

    fn keep_allocations(&self) {
        let given: BTreeMap<String, &Allocation> = self
            .allocator
            .given()
            .iter()
            .map(|(key, allocation)| (key.to_string(), allocation))
            .collect();
        if let Err(error) = keep::write_if_changed(&self.allocations, &given) {
            tracing::warn!(path = %self.allocations.display(), %error, "cannot keep the addresses given to Services");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
