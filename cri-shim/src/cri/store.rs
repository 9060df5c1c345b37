//! Sandboxes and containers in memory, found by id, by a unique prefix of it, and by name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::watch;
use tonic::Status;

use crate::api;
use crate::cgroup::rate::Rate;
use crate::client::MonitorClient;
use crate::monitor::protocol::{Exited, Started};
use crate::state::{ContainerRecord, SandboxRecord};

/// A sandbox.
pub struct Sandbox {
    pub id: String,
    pub config: api::PodSandboxConfig,
    pub monitor: MonitorClient,
    /// The first process of the shared PID namespace.
    pub init: Option<i32>,
    record: Mutex<SandboxRecord>,
    ready: watch::Sender<bool>,
    /// CPU use between the last two looks.
    pub cpu: Mutex<Rate>,
    /// Held by verbs that change the sandbox.
    pub changing: tokio::sync::Mutex<()>,
}

impl Sandbox {
    pub fn new(
        record: SandboxRecord,
        config: api::PodSandboxConfig,
        monitor: MonitorClient,
        init: Option<i32>,
        ready: bool,
    ) -> Self {
        Sandbox {
            id: record.id.clone(),
            config,
            monitor,
            init,
            record: Mutex::new(record),
            ready: watch::Sender::new(ready),
            cpu: Mutex::default(),
            changing: tokio::sync::Mutex::new(()),
        }
    }

    pub fn record(&self) -> MutexGuard<'_, SandboxRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    pub fn set_not_ready(&self) {
        self.ready.send_replace(false);
    }

    pub fn metadata(&self) -> api::PodSandboxMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    pub fn namespaces(&self) -> api::NamespaceOption {
        self.config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.clone())
            .unwrap_or_default()
    }

    pub fn host_network(&self) -> bool {
        self.namespaces().network() == api::NamespaceMode::Node
    }
}

/// What happened to a container so far.
#[derive(Clone, Debug, Default)]
pub struct ContainerStatus {
    pub started: Option<Started>,
    pub exited: Option<Exited>,
    /// A start is under way.
    pub starting: bool,
    /// The event of its end has been sent: only now may the event of its removal.
    pub end_told: bool,
}

impl ContainerStatus {
    pub fn state(&self) -> api::ContainerState {
        match (&self.started, &self.exited) {
            (_, Some(_)) => api::ContainerState::ContainerExited,
            (Some(_), None) => api::ContainerState::ContainerRunning,
            (None, None) => api::ContainerState::ContainerCreated,
        }
    }
}

/// A container.
pub struct Container {
    pub id: String,
    pub sandbox: Arc<Sandbox>,
    config: RwLock<Arc<api::ContainerConfig>>,
    record: Mutex<ContainerRecord>,
    pub status: watch::Sender<ContainerStatus>,
    /// Its standard input has been ended for all its clients.
    pub stdin_ended: watch::Sender<bool>,
    /// CPU use between the last two looks.
    pub cpu: Mutex<Rate>,
    /// Held by verbs that change the container.
    pub changing: tokio::sync::Mutex<()>,
    /// Held while its poststop hooks run.
    pub poststop: tokio::sync::Mutex<()>,
}

impl Container {
    pub fn new(
        record: ContainerRecord,
        config: api::ContainerConfig,
        sandbox: Arc<Sandbox>,
        status: ContainerStatus,
    ) -> Self {
        Container {
            id: record.id.clone(),
            sandbox,
            config: RwLock::new(Arc::new(config)),
            record: Mutex::new(record),
            status: watch::Sender::new(status),
            stdin_ended: watch::Sender::new(false),
            cpu: Mutex::default(),
            poststop: tokio::sync::Mutex::new(()),
            changing: tokio::sync::Mutex::new(()),
        }
    }

    pub fn config(&self) -> Arc<api::ContainerConfig> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_config(&self, config: api::ContainerConfig) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    pub fn record(&self) -> MutexGuard<'_, ContainerRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn state(&self) -> api::ContainerState {
        self.status.borrow().state()
    }

    pub fn metadata(&self) -> api::ContainerMetadata {
        self.config().metadata.clone().unwrap_or_default()
    }

    /// Waits until the container has exited.
    pub async fn exited(&self) -> Exited {
        let mut status = self.status.subscribe();
        match status.wait_for(|s| s.exited.is_some()).await {
            Ok(status) => status.exited.clone().unwrap_or_default(),
            Err(_) => Exited::default(),
        }
    }

    /// Waits until the event of the end of a container that has ended has been sent.
    pub async fn end_told(&self) {
        let mut status = self.status.subscribe();
        let _ = status.wait_for(|s| s.exited.is_none() || s.end_told).await;
    }
}

#[derive(Default)]
struct Index {
    sandboxes: HashMap<String, Arc<Sandbox>>,
    containers: HashMap<String, Arc<Container>>,
    /// The containers of each sandbox, oldest first: a change in one pod looks at no other.
    of_sandbox: HashMap<String, Vec<Arc<Container>>>,
    /// Names in use, also by what is being made: name to id.
    sandbox_names: HashMap<SandboxName, String>,
    container_names: HashMap<ContainerName, String>,
}

/// What the CRI says is unique of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SandboxName {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub attempt: u32,
}

impl From<&api::PodSandboxMetadata> for SandboxName {
    fn from(metadata: &api::PodSandboxMetadata) -> Self {
        SandboxName {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
            attempt: metadata.attempt,
        }
    }
}

/// What the CRI says is unique of a container in its sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerName {
    pub sandbox: String,
    pub name: String,
    pub attempt: u32,
}

/// All sandboxes and containers.
#[derive(Default)]
pub struct Store(RwLock<Index>);

impl Store {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Index> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name for `id`; the id that has it already otherwise.
    pub fn reserve_sandbox(&self, name: SandboxName, id: &str) -> Result<(), String> {
        reserve(&mut self.write().sandbox_names, name, id)
    }

    pub fn release_sandbox(&self, name: &SandboxName) {
        self.write().sandbox_names.remove(name);
    }

    /// Takes a name for `id`; the id that has it already otherwise.
    pub fn reserve_container(&self, name: ContainerName, id: &str) -> Result<(), String> {
        reserve(&mut self.write().container_names, name, id)
    }

    pub fn release_container(&self, name: &ContainerName) {
        self.write().container_names.remove(name);
    }

    pub fn add_sandbox(&self, sandbox: Arc<Sandbox>) {
        let mut index = self.write();
        index.sandbox_names.insert((&sandbox.metadata()).into(), sandbox.id.clone());
        index.sandboxes.insert(sandbox.id.clone(), sandbox);
    }

    pub fn add_container(&self, container: Arc<Container>) {
        let mut index = self.write();
        index.container_names.insert(container_name(&container), container.id.clone());
        let siblings = index.of_sandbox.entry(container.sandbox.id.clone()).or_default();
        siblings.push(container.clone());
        index.containers.insert(container.id.clone(), container);
    }

    pub fn drop_sandbox(&self, id: &str) {
        let mut index = self.write();
        if let Some(sandbox) = index.sandboxes.remove(id) {
            index.sandbox_names.remove(&(&sandbox.metadata()).into());
        }
    }

    pub fn drop_container(&self, id: &str) {
        let mut index = self.write();
        if let Some(container) = index.containers.remove(id) {
            index.container_names.remove(&container_name(&container));
            if let Some(siblings) = index.of_sandbox.get_mut(&container.sandbox.id) {
                siblings.retain(|other| other.id != id);
                if siblings.is_empty() {
                    index.of_sandbox.remove(&container.sandbox.id);
                }
            }
        }
    }

    /// By id or unique prefix.
    pub fn find_sandbox(&self, id: &str) -> Option<Arc<Sandbox>> {
        find(&self.read().sandboxes, id)
    }

    /// By id or unique prefix.
    pub fn find_container(&self, id: &str) -> Option<Arc<Container>> {
        find(&self.read().containers, id)
    }

    /// A sandbox that may be gone, which is no reason to answer a call that names none.
    pub fn named_sandbox(&self, id: &str) -> Result<Option<Arc<Sandbox>>, Status> {
        named(&self.read().sandboxes, id)
    }

    /// The same of a container.
    pub fn named_container(&self, id: &str) -> Result<Option<Arc<Container>>, Status> {
        named(&self.read().containers, id)
    }

    /// A sandbox that has to be there.
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Status> {
        self.find_sandbox(id).ok_or_else(|| Status::not_found(format!("no pod sandbox {id:?}")))
    }

    /// A container that has to be there.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        self.find_container(id).ok_or_else(|| Status::not_found(format!("no container {id:?}")))
    }

    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.read().sandboxes.values().cloned().collect()
    }

    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.read().containers.values().cloned().collect()
    }

    pub fn containers_of(&self, sandbox: &str) -> Vec<Arc<Container>> {
        self.read().of_sandbox.get(sandbox).cloned().unwrap_or_default()
    }
}

fn container_name(container: &Container) -> ContainerName {
    let metadata = container.metadata();
    ContainerName {
        sandbox: container.sandbox.id.clone(),
        name: metadata.name,
        attempt: metadata.attempt,
    }
}

fn reserve<K: std::hash::Hash + Eq>(
    names: &mut HashMap<K, String>,
    name: K,
    id: &str,
) -> Result<(), String> {
    match names.entry(name) {
        std::collections::hash_map::Entry::Occupied(taken) => Err(taken.get().clone()),
        std::collections::hash_map::Entry::Vacant(free) => {
            free.insert(id.to_owned());
            Ok(())
        }
    }
}

fn named<T>(all: &HashMap<String, Arc<T>>, id: &str) -> Result<Option<Arc<T>>, Status> {
    match find(all, id) {
        None if id.len() < 64 && all.keys().any(|full| full.starts_with(id)) => Err(
            Status::invalid_argument(format!("{id:?} begins more than one id; give more of it")),
        ),
        None if id.is_empty() => Err(Status::invalid_argument("no id is given")),
        found => Ok(found),
    }
}

fn find<T>(all: &HashMap<String, Arc<T>>, id: &str) -> Option<Arc<T>> {
    if let Some(found) = all.get(id) {
        return Some(found.clone());
    }
    if id.is_empty() || id.len() >= 64 {
        return None;
    }
    let mut matching = all.iter().filter(|(full, _)| full.starts_with(id));
    match (matching.next(), matching.next()) {
        (Some((_, only)), None) => Some(only.clone()),
        _ => None,
    }
}
