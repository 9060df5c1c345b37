//! The Node object: registered, kept true, its pod CIDRs handed to the runtime.

pub mod conditions;
pub mod cpu_set;
pub mod housing;
pub mod lease;
pub(crate) mod logind;
pub mod machine;
pub mod object;
pub mod rotate;
pub mod serving;
mod volumes;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeStatus, ObjectReference};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use self::conditions::Pressure;
use self::machine::{Machine, Measured, Places};
use self::object::RuntimeFacts;
use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, REQUEST_TIMEOUT};
use crate::cluster::ClusterConfig;
use crate::device::Capacities;
use crate::eviction::{self, Tracker};
use crate::report::{EventSink, EventType, node_reference};
use crate::runtime::Runtime;
use crate::source::cluster::Errors;

/// How often a node that is not ready yet looks whether it is now.
const SOON: Duration = Duration::from_millis(200);
/// For how long after the start, and after each change, it looks so often.
const SOON_FOR: Duration = Duration::from_secs(30);
/// How long pods wait for pod CIDRs once the node is registered: a cluster that assigns any does so
/// at once, one that never does has pods on its nodes all the same.
const CIDRS_ONCE_REGISTERED: Duration = Duration::from_secs(5);
/// How long pods wait for pod CIDRs where no control plane answers.
const CIDRS_WHILE_AWAY: Duration = Duration::from_secs(10);
/// Images change rarely; they are listed this often.
const IMAGES_EVERY: Duration = Duration::from_secs(60);

/// Where the node object is.
enum State {
    /// Not known to the API server, as far as we know.
    Unregistered,
    /// The API server has it; `since` is when its status was last patched.
    Registered { node: Arc<Node>, since: Instant },
}

/// The devices that the node's object tells of.
pub struct DevicesSeen {
    /// How many there are, by resource.
    pub capacities: watch::Receiver<Capacities>,
    /// Whether this is the first run on the machine: what the object says of extended resources is not
    /// this machine's.
    pub first: bool,
}

impl DevicesSeen {
    /// Of a node that has none and never will.
    pub fn none() -> Self {
        Self { capacities: watch::channel(Capacities::default()).1, first: false }
    }
}

/// What the node's object depends on beside the machine and the runtime.
pub struct Seen {
    /// The object as the API has it.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// Unique names of attachable volumes that pods use.
    pub in_use: watch::Receiver<BTreeSet<String>>,
    /// Devices.
    pub devices: DevicesSeen,
    /// Whether the machine shuts down.
    pub shutting_down: watch::Receiver<bool>,
}

/// What the rest of the agent is told of the node.
pub struct Told {
    /// Turned true once pods may have addresses.
    pub network: watch::Sender<bool>,
    /// The pressure that the node reports.
    pub pressure: watch::Sender<Pressure>,
}

/// Keeps one Node object.
pub struct NodeLoop {
    config: ClusterConfig,
    nodes: Api<Node>,
    runtime: Arc<dyn Runtime>,
    events: Arc<dyn EventSink>,
    errors: Errors,
    watch: watch::Receiver<Option<Arc<Node>>>,
    in_use: watch::Receiver<BTreeSet<String>>,
    devices: DevicesSeen,
    machine: Machine,
    facts: RuntimeFacts,
    images_at: Option<Instant>,
    places: Places,
    pressure: Tracker,
    /// Pod CIDRs that the runtime was told.
    told_cidrs: String,
    runtime_down: bool,
    state: State,
    told: Told,
    /// Whether the machine shuts down.
    shutting_down: watch::Receiver<bool>,
    /// When pods may have addresses at the latest.
    network_by: Instant,
}

impl NodeLoop {
    /// For the node of `config`; `seen` is what it goes by, `told` is who listens.
    pub fn new(
        config: ClusterConfig,
        client: Client,
        runtime: Arc<dyn Runtime>,
        events: Arc<dyn EventSink>,
        errors: Errors,
        seen: Seen,
        told: Told,
    ) -> Self {
        let pressure = Tracker::new(config.eviction.clone());
        let places = Places::new(&config.root_dir, config.pods_cgroup.clone());
        Self {
            config,
            nodes: Api::all(client),
            runtime,
            events,
            errors,
            watch: seen.node,
            in_use: seen.in_use,
            devices: seen.devices,
            machine: Machine::read(),
            facts: RuntimeFacts::default(),
            images_at: None,
            places,
            pressure,
            told_cidrs: String::new(),
            runtime_down: false,
            state: State::Unregistered,
            told,
            shutting_down: seen.shutting_down,
            network_by: Instant::now() + CIDRS_WHILE_AWAY,
        }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let reference = self.reference();
        self.events.record(
            reference,
            EventType::Normal,
            "Starting",
            "Starting kubelet.".to_owned(),
        );
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(7));
        let mut soon_until = Instant::now() + SOON_FOR;
        loop {
            let wait = match self.reconcile().await {
                Ok(ready) => {
                    self.errors.clear("node status");
                    backoff.reset();
                    if ready || Instant::now() > soon_until {
                        self.config.status_update_frequency
                    } else {
                        SOON
                    }
                }
                Err(error) => {
                    self.errors.set("node status", error.to_string());
                    backoff.next_delay()
                }
            };
            let until = Instant::now() + wait;
            loop {
                self.settle_network();
                let settled = *self.told.network.borrow();
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    () = tokio::time::sleep_until(self.network_by), if !settled => {}
                    // Pods wait for it, and so does whoever may detach a volume.
                    Ok(()) = self.in_use.changed() => break,
                    // The scheduler waits for devices.
                    Ok(()) = self.devices.capacities.changed() => break,
                    // Whoever could say so may be gone; then it does not.
                    Ok(()) = self.shutting_down.changed() => break,
                    changed = self.watch.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        if self.observe() {
                            soon_until = Instant::now() + SOON_FOR;
                            break;
                        }
                    }
                }
            }
        }
    }

    fn reference(&self) -> ObjectReference {
        node_reference(&self.config.node_name)
    }

    /// Takes what the watch shows; whether it calls for action.
    fn observe(&mut self) -> bool {
        let seen = self.watch.borrow_and_update().clone();
        match (&mut self.state, seen) {
            (State::Registered { node, .. }, Some(seen)) => {
                if version(&seen) < version(node) {
                    return false;
                }
                if seen.metadata.uid != node.metadata.uid {
                    tracing::warn!(
                        node = seen.metadata.name,
                        "the Node object is another one now; registering anew"
                    );
                    self.state = State::Unregistered;
                    return true;
                }
                let cidrs = pod_cidrs(&seen);
                *node = seen;
                cidrs != self.told_cidrs
            }
            (State::Registered { node, .. }, None) => {
                // An old deletion may arrive after we registered anew; registering is idempotent.
                tracing::warn!(
                    node = node.metadata.name,
                    "the Node object is gone; registering anew"
                );
                self.state = State::Unregistered;
                true
            }
            // What an earlier run knew is of use while the control plane is away.
            (State::Unregistered, Some(seen)) => pod_cidrs(&seen) != self.told_cidrs,
            (State::Unregistered, None) => false,
        }
    }

    /// One look at everything; whether pods could run.
    async fn reconcile(&mut self) -> Result<bool, ApiError> {
        self.hand_on_cidrs().await;
        let mut not_ready = self.look_at_runtime().await;
        let ready = not_ready.is_empty();
        if *self.shutting_down.borrow_and_update() {
            not_ready.push("node is shutting down".to_owned());
        }
        let status = self.status(&not_ready);
        match &self.state {
            State::Unregistered => self.register(status).await?,
            State::Registered { .. } => self.patch_status(status).await?,
        }
        Ok(ready)
    }

    /// Tells the runtime the pod CIDRs of the node object.
    async fn hand_on_cidrs(&mut self) {
        let seen = self.watch.borrow().clone();
        let cidrs = match &self.state {
            State::Registered { node, .. } => pod_cidrs(node),
            State::Unregistered => seen.map(|node| pod_cidrs(&node)).unwrap_or_default(),
        };
        if cidrs.is_empty() || cidrs == self.told_cidrs {
            return;
        }
        match self.runtime.update_runtime_config(&cidrs).await {
            Ok(()) => {
                tracing::info!(cidrs, "the runtime has the node's pod CIDRs");
                self.told_cidrs = cidrs;
            }
            Err(error) => tracing::warn!(%error, cidrs, "the runtime does not take the pod CIDRs"),
        }
    }

    /// Lets pods have addresses once the runtime knows the pod CIDRs, or waiting makes no sense.
    fn settle_network(&mut self) {
        if *self.told.network.borrow() {
            return;
        }
        // An earlier run registered this node, and it has none.
        let without = matches!(self.state, State::Unregistered)
            && self.watch.borrow().as_ref().is_some_and(|node| pod_cidrs(node).is_empty());
        let late = Instant::now() >= self.network_by;
        if self.told_cidrs.is_empty() && !without && !late {
            return;
        }
        if self.told_cidrs.is_empty() {
            tracing::warn!(
                "the node has no pod CIDR: without a CNI configuration its pods get addresses of \
                 the runtime's own range; kube-controller-manager assigns one with \
                 --allocate-node-cidrs"
            );
        }
        self.told.network.send_replace(true);
    }

    /// Why pods cannot run; empty if they can.
    async fn look_at_runtime(&mut self) -> Vec<String> {
        let status = match self.runtime.status().await {
            Ok(status) => status,
            Err(error) => {
                // After a restart the runtime may have forgotten its CIDRs.
                self.runtime_down = true;
                return vec![format!("container runtime is down: {error}")];
            }
        };
        if std::mem::take(&mut self.runtime_down) {
            self.told_cidrs.clear();
            self.facts.version.clear();
            self.hand_on_cidrs().await;
        }
        if self.facts.version.is_empty()
            && let Ok(version) = self.runtime.version().await
        {
            self.facts.version = object::runtime_version(&version);
        }
        self.facts.handlers = object::handlers(&status);
        self.facts.features = object::features(&status);
        if self.images_at.is_none_or(|at| at.elapsed() >= IMAGES_EVERY) {
            if let Ok(images) = self.runtime.list_images().await {
                let max = self.config.max_images.unwrap_or(usize::MAX);
                self.facts.images = object::images(&images, max);
                self.images_at = Some(Instant::now());
            }
            if let Ok(info) = self.runtime.image_fs_info().await {
                self.places.learn(&info);
            }
        }
        object::not_ready(&status)
    }

    fn status(&mut self, not_ready: &[String]) -> NodeStatus {
        let now = jiff::Timestamp::now();
        let measured = Measured::read(&self.places);
        let observed = eviction::observe(&measured, self.machine.memory);
        let pressure = self.pressure.look(&observed, now).pressure;
        self.told.pressure.send_if_modified(|told| std::mem::replace(told, pressure) != pressure);
        let before = match &self.state {
            State::Registered { node, .. } => node.status.clone().unwrap_or_default(),
            State::Unregistered => NodeStatus::default(),
        };
        let conditions_before = before.conditions.unwrap_or_default();
        let addresses_before = before.addresses.unwrap_or_default();
        let (mut capacity, mut allocatable) =
            object::resources(&self.config, &self.machine, measured.nodefs);
        object::add_devices(
            &self.devices.capacities.borrow_and_update(),
            &mut capacity,
            &mut allocatable,
        );
        let routes = machine::default_addresses();
        NodeStatus {
            addresses: Some(object::plan_addresses(&self.config, &routes, &addresses_before)),
            capacity: Some(capacity),
            allocatable: Some(allocatable),
            conditions: Some(conditions::conditions(pressure, not_ready, &conditions_before, now)),
            daemon_endpoints: object::daemon_endpoints(self.config.node_api_port),
            images: Some(self.facts.images.clone()),
            node_info: Some(object::system_info(&self.machine, &self.facts)),
            features: self.facts.features.clone(),
            runtime_handlers: (!self.facts.handlers.is_empty())
                .then(|| self.facts.handlers.clone()),
            declared_features: (!self.config.declared_features.is_empty())
                .then(|| self.config.declared_features.clone()),
            ..NodeStatus::default()
        }
    }

    async fn register(&mut self, status: NodeStatus) -> Result<(), ApiError> {
        let name = self.config.node_name.clone();
        let what = format!("get node {name}");
        let existing = api::timed(what, REQUEST_TIMEOUT, self.nodes.get_opt(&name)).await?;
        let mut status = status;
        if let Some(before) = existing.as_ref().and_then(|node| node.status.as_ref()) {
            status.addresses = Some(object::plan_addresses(
                &self.config,
                &machine::default_addresses(),
                before.addresses.as_deref().unwrap_or_default(),
            ));
            if self.devices.first {
                object::reset_extended(before, &mut status);
            }
            // A restart is no transition: what was so before stays so since then.
            conditions::keep_transitions(
                status.conditions.as_deref_mut().unwrap_or_default(),
                before.conditions.as_deref().unwrap_or_default(),
            );
        }
        let node = match existing {
            Some(node) => {
                let patch = object::plan_metadata_patch(&node, &self.config, &self.machine);
                match patch {
                    Some(patch) => self.patch_metadata(patch).await?,
                    None => node,
                }
            }
            None if !self.config.register_node => return Ok(()),
            None => {
                let node = object::new_node(&self.config, &self.machine, status.clone());
                let params = PostParams::default();
                let create = self.nodes.create(&params, &node);
                let node =
                    api::timed(format!("create node {name}"), REQUEST_TIMEOUT, create).await?;
                tracing::info!(node = name, "registered");
                node
            }
        };
        self.state = State::Registered {
            node: Arc::new(node),
            since: Instant::now() - self.config.status_report_frequency,
        };
        self.network_by = self.network_by.min(Instant::now() + CIDRS_ONCE_REGISTERED);
        self.hand_on_cidrs().await;
        self.patch_status(status).await
    }

    async fn patch_metadata(&self, patch: serde_json::Value) -> Result<Node, ApiError> {
        let (name, params) = (&self.config.node_name, PatchParams::default());
        let patch = Patch::Strategic(patch);
        let request = self.nodes.patch(name, &params, &patch);
        api::timed(format!("patch the labels of node {name}"), REQUEST_TIMEOUT, request).await
    }

    async fn patch_status(&mut self, status: NodeStatus) -> Result<(), ApiError> {
        let State::Registered { node, since } = &self.state else { return Ok(()) };
        let due = since.elapsed() >= self.config.status_report_frequency;
        let old = node.status.clone().unwrap_or_default();
        let told = old.volumes_in_use.as_deref().unwrap_or_default();
        let wanted = self.in_use.borrow_and_update().clone();
        let in_use = volumes::in_use(&self.config.root_dir, told, wanted);
        let status = NodeStatus { volumes_in_use: Some(in_use), ..status };
        let Some(patch) = object::plan_status_patch(&old, &status, due) else { return Ok(()) };
        let name = self.config.node_name.clone();
        let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
        let request = self.nodes.patch_status(&name, &params, &patch);
        let what = format!("patch the status of node {name}");
        match api::timed(what, REQUEST_TIMEOUT, request).await {
            Ok(node) => {
                self.record_transitions(&old, &status);
                self.state = State::Registered { node: Arc::new(node), since: Instant::now() };
                Ok(())
            }
            Err(error) => {
                if error.code() == Some(404) {
                    self.state = State::Unregistered;
                }
                Err(error)
            }
        }
    }

    fn record_transitions(&self, old: &NodeStatus, new: &NodeStatus) {
        for condition in new.conditions.iter().flatten() {
            let before = old.conditions.iter().flatten().find(|c| c.type_ == condition.type_);
            if before.is_some_and(|b| b.status == condition.status) {
                continue;
            }
            let on = condition.status == "True";
            let reason = match (condition.type_.as_str(), on) {
                ("Ready", true) => "NodeReady",
                ("Ready", false) => "NodeNotReady",
                ("MemoryPressure", true) => "NodeHasInsufficientMemory",
                ("MemoryPressure", false) => "NodeHasSufficientMemory",
                ("DiskPressure", true) => "NodeHasDiskPressure",
                ("DiskPressure", false) => "NodeHasNoDiskPressure",
                ("PIDPressure", true) => "NodeHasInsufficientPID",
                ("PIDPressure", false) => "NodeHasSufficientPID",
                _ => continue,
            };
            let message = format!("Node {} status is now: {reason}", self.config.node_name);
            self.events.record(self.reference(), EventType::Normal, reason, message);
        }
    }
}

fn version(node: &Node) -> u64 {
    node.metadata.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// Pod CIDRs of `node`, comma separated as the CRI takes them.
fn pod_cidrs(node: &Node) -> String {
    let Some(spec) = &node.spec else { return String::new() };
    match spec.pod_cidrs.as_ref().filter(|c| !c.is_empty()) {
        Some(cidrs) => cidrs.join(","),
        None => spec.pod_cidr.clone().unwrap_or_default(),
    }
}
