//! Hardware devices: what device plugins offer (`deviceplugin/v1beta1`), and which container has what.
//!
//! Plugins make themselves known (`registration`) and tell of their devices as these change
//! (`inventory`); a pod is given devices before anything else is done for it (`plan`, `allocate`), and
//! keeps them until nothing of it runs (`assignments`). What was given is on disk (`checkpoint`) before a
//! container is made with it, so that neither a restart nor a crash gives a device away twice. Plugins
//! come and go without pods noticing: what a plugin said is kept, and running containers ask nobody.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::net::UnixListener;
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::Status;

use crate::ids::PodUid;
use crate::numa::hints::Hints;
use crate::plugins::PluginHandler;

mod allocate;
mod assignments;
mod checkpoint;
pub(crate) mod checksum;
mod client;
mod error;
mod hints;
mod inventory;
mod plan;
mod registration;
mod run_options;
mod wire;

pub use assignments::Statuses;
pub use error::DeviceError;
pub use inventory::{Capacities, Capacity};
pub use plan::{is_extended, wanted};
pub use run_options::RunOptions;

use assignments::Assignments;
use client::Client;
use inventory::Inventory;

/// Pods whose devices' health changed that may wait to be told.
const NEWS: usize = 1024;

/// What pod workers and the sync loop ask of devices.
#[async_trait]
pub trait PodDevices: Send + Sync {
    /// How much pods may have of an extended resource as the pod `uid` sees it: what it has, it may
    /// keep. `None` of what no plugin has told of.
    fn allocatable(&self, uid: &PodUid, resource: &str) -> Option<i64>;

    /// Gives each container of the pod its devices, and has that on disk.
    async fn allocate(&self, pod: &Pod) -> Result<(), DeviceError>;

    /// Gives one container of the pod its devices, and has that on disk.
    async fn allocate_container(&self, pod: &Pod, container: &Container)
    -> Result<(), DeviceError>;

    /// On which of `nodes` the container's devices can be had, or without one all of the pod's.
    fn hints(&self, pod: &Pod, container: Option<&Container>, nodes: &BTreeSet<u32>) -> Hints;

    /// What the container is to be started with.
    async fn run_options(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<RunOptions, DeviceError>;

    /// Nothing of the pod runs any more.
    fn release(&self, uid: &PodUid);

    /// There are no other pods than these.
    fn retain(&self, pods: &HashSet<PodUid>);

    /// The health of what the pod has.
    fn statuses(&self, uid: &PodUid) -> Statuses;

    /// Pods whose devices' health changes, from now on.
    fn news(&self) -> broadcast::Receiver<PodUid>;
}

/// A node without devices.
#[derive(Debug)]
pub struct NoDevices(broadcast::Sender<PodUid>);

impl Default for NoDevices {
    fn default() -> Self {
        Self(broadcast::Sender::new(1))
    }
}

#[async_trait]
impl PodDevices for NoDevices {
    fn allocatable(&self, _: &PodUid, _: &str) -> Option<i64> {
        None
    }

    async fn allocate(&self, _: &Pod) -> Result<(), DeviceError> {
        Ok(())
    }

    async fn allocate_container(&self, _: &Pod, _: &Container) -> Result<(), DeviceError> {
        Ok(())
    }

    fn hints(&self, _: &Pod, _: Option<&Container>, _: &BTreeSet<u32>) -> Hints {
        Hints::new()
    }

    async fn run_options(&self, _: &Pod, _: &Container) -> Result<RunOptions, DeviceError> {
        Ok(RunOptions::default())
    }

    fn release(&self, _: &PodUid) {}

    fn retain(&self, _: &HashSet<PodUid>) {}

    fn statuses(&self, _: &PodUid) -> Statuses {
        Statuses::default()
    }

    fn news(&self) -> broadcast::Receiver<PodUid> {
        self.0.subscribe()
    }
}

/// Who knows which NUMA nodes a container is bound to.
pub trait NumaAffinity: Send + Sync {
    /// The nodes; `None` where it is bound to none.
    fn nodes(&self, uid: &PodUid, container: &str) -> Option<BTreeSet<i64>>;
}

/// Nothing is bound anywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unbound;

impl NumaAffinity for Unbound {
    fn nodes(&self, _: &PodUid, _: &str) -> Option<BTreeSet<i64>> {
        None
    }
}

#[derive(Debug, Default)]
struct State {
    inventory: Inventory,
    assignments: Assignments,
    /// Devices that are being allocated, by resource.
    reserved: BTreeMap<String, BTreeSet<String>>,
    /// The last plugin's number.
    generation: u64,
}

/// A plugin that is connected.
struct Plugin {
    generation: u64,
    client: Client,
    /// The socket in the registry that it came by.
    registration: Option<PathBuf>,
    listening: AbortHandle,
}

/// Each device and the NUMA nodes that it is near to, by resource.
pub type ByResource = BTreeMap<String, BTreeMap<String, BTreeSet<i64>>>;

/// The devices of this node.
pub struct Devices {
    folder: PathBuf,
    affinity: Box<dyn NumaAffinity>,
    state: Mutex<State>,
    plugins: Mutex<HashMap<String, Plugin>>,
    capacities: watch::Sender<Capacities>,
    news: broadcast::Sender<PodUid>,
    /// What is on disk; held while it is written.
    saved: tokio::sync::Mutex<Vec<u8>>,
    /// What is on disk is not what is known, or a plugin came or went.
    changed: Notify,
    first: bool,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Devices").field("folder", &self.folder).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    /// In the folder of plugins under `root`, going on from what is on disk there. Sockets of plugins
    /// are removed, by which these see that they must register again.
    ///
    /// # Errors
    /// If the folder cannot be used.
    pub fn open(root: &Path, affinity: Box<dyn NumaAffinity>) -> Result<Arc<Self>, DeviceError> {
        let folder = root.join("device-plugins");
        // Neither kubelet nor another run of this has been here.
        let first = std::fs::read_dir(&folder).map_or(true, |mut entries| entries.next().is_none());
        registration::clean(&folder)?;
        let known = checkpoint::read(&folder, Instant::now()).map_err(|source| {
            let path = folder.join(checkpoint::FILE);
            DeviceError::Io { operation: "read", path, source }
        })?;
        let (assignments, inventory) = known.unwrap_or_default();
        let capacities = watch::Sender::new(inventory.capacities());
        Ok(Arc::new(Self {
            folder,
            affinity,
            state: Mutex::new(State { inventory, assignments, ..State::default() }),
            plugins: Mutex::default(),
            capacities,
            news: broadcast::Sender::new(NEWS),
            saved: tokio::sync::Mutex::default(),
            changed: Notify::new(),
            first,
        }))
    }

    /// Whether this is the first run on the machine: what a Node of this name says of extended resources is
    /// another's.
    pub fn is_first(&self) -> bool {
        self.first
    }

    /// How much there is, as it changes.
    pub fn capacities(&self) -> watch::Receiver<Capacities> {
        self.capacities.subscribe()
    }

    /// Who takes plugins of the registry.
    pub fn handler(self: &Arc<Self>) -> Arc<dyn PluginHandler> {
        Arc::new(registration::Registered(self.clone()))
    }

    /// Where plugins register; before anything waits for them.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn listen(&self) -> Result<UnixListener, DeviceError> {
        registration::listen(&self.folder)
    }

    /// Takes registrations at `listener` and keeps what is on disk up to date, until `shutdown` turns true.
    ///
    /// # Errors
    /// If the socket fails.
    pub async fn run(
        self: Arc<Self>,
        listener: UnixListener,
        mut shutdown: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let serving = registration::serve(self.clone(), listener, shutdown.clone());
        tokio::select! {
            result = serving => result,
            () = self.keep() => Ok(()),
            () = crate::shutdown::requested(&mut shutdown) => Ok(()),
        }
    }

    /// Gives up plugins whose time is over, and writes down what changed. Runs for ever.
    async fn keep(&self) {
        loop {
            let next = lock(&self.state).inventory.next_expiry();
            let expiry = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = expiry => {
                    if lock(&self.state).inventory.expire(Instant::now()) {
                        self.publish();
                    }
                }
            }
            if let Err(error) = self.save().await {
                tracing::error!(%error, "what devices there are, or are free again, is not on disk");
            }
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Tells what there is.
    fn publish(&self) {
        let now = lock(&self.state).inventory.capacities();
        self.capacities.send_if_modified(|told| {
            let news = *told != now;
            *told = now;
            news
        });
        self.changed.notify_one();
    }

    /// Has what is known on disk.
    async fn save(&self) -> Result<(), DeviceError> {
        let mut saved = self.saved.lock().await;
        let text = {
            let state = lock(&self.state);
            checkpoint::encode(&state.assignments, &state.inventory)
        };
        if *saved == text {
            return Ok(());
        }
        let (folder, writing) = (self.folder.clone(), text.clone());
        match tokio::task::spawn_blocking(move || checkpoint::write(&folder, &writing)).await {
            Ok(written) => written?,
            Err(cause) => {
                return Err(DeviceError::Io {
                    operation: "write",
                    path: self.folder.join(checkpoint::FILE),
                    source: std::io::Error::other(cause),
                });
            }
        }
        *saved = text;
        Ok(())
    }

    /// Takes the plugin of `resource` that listens at `socket`.
    async fn connect(
        self: &Arc<Self>,
        resource: &str,
        socket: &Path,
        registration: Option<&Path>,
    ) -> Result<(), Status> {
        let (client, options) = Client::connect(socket).await?;
        let generation = {
            let mut state = lock(&self.state);
            state.generation += 1;
            let generation = state.generation;
            state.inventory.connected(resource, generation, options);
            generation
        };
        tracing::info!(resource, socket = %socket.display(), ?options, "device plugin connected");
        let listening = tokio::spawn({
            let (devices, client, resource) = (self.clone(), client.clone(), resource.to_owned());
            async move {
                let end = devices.hear(&resource, generation, &client).await;
                devices.stopped(&resource, generation, &end);
            }
        });
        let registration = registration.map(Path::to_path_buf);
        let listening = listening.abort_handle();
        let plugin = Plugin { generation, client, registration, listening };
        let before = lock(&self.plugins).insert(resource.to_owned(), plugin);
        if let Some(before) = before {
            before.listening.abort();
        }
        self.publish();
        Ok(())
    }

    /// Takes in what the plugin tells, until it ends; why it did.
    async fn hear(&self, resource: &str, generation: u64, client: &Client) -> String {
        let mut stream = match client.list_and_watch().await {
            Ok(stream) => stream,
            Err(status) => return status.message().to_owned(),
        };
        loop {
            let told = match stream.message().await {
                Ok(Some(told)) => told,
                Ok(None) => return "it ended ListAndWatch".to_owned(),
                Err(status) => return status.message().to_owned(),
            };
            let holders = {
                let mut state = lock(&self.state);
                let news = state.inventory.told(resource, generation, &told.devices);
                state.assignments.holders(resource, &news)
            };
            self.publish();
            for uid in holders {
                // Nobody listens before the sync loop runs.
                let _ = self.news.send(uid);
            }
        }
    }

    fn stopped(&self, resource: &str, generation: u64, why: &str) {
        let current = lock(&self.state).inventory.stopped(resource, generation, Instant::now());
        if !current {
            return;
        }
        lock(&self.plugins)
            .retain(|name, plugin| name != resource || plugin.generation != generation);
        tracing::warn!(
            resource,
            why,
            "device plugin is gone; its devices are not given out until it registers again"
        );
        self.publish();
    }

    /// The plugin that came by this socket of the registry is gone.
    fn disconnect(&self, resource: &str, registration: &Path) {
        let ours = {
            let mut plugins = lock(&self.plugins);
            match plugins.get(resource) {
                Some(plugin) if plugin.registration.as_deref() == Some(registration) => {
                    plugins.remove(resource)
                }
                _ => None,
            }
        };
        if let Some(plugin) = ours {
            plugin.listening.abort();
            self.stopped(resource, plugin.generation, "its socket is gone");
        }
    }

    fn client(&self, resource: &str) -> Option<Client> {
        lock(&self.plugins).get(resource).map(|plugin| plugin.client.clone())
    }

    /// The devices that a container has.
    pub fn of_container(&self, uid: &PodUid, container: &str) -> ByResource {
        let state = lock(&self.state);
        let own = state.assignments.of(uid, container).into_iter().flatten();
        own.map(|(resource, own)| (resource.clone(), own.with_nodes())).collect()
    }

    /// All devices that pods may have, used or not.
    pub fn usable(&self) -> ByResource {
        let usable = lock(&self.state).inventory.all_usable().into_iter();
        let nodes = |devices: BTreeMap<String, inventory::Device>| {
            devices.into_iter().map(|(id, device)| (id, device.numa)).collect()
        };
        usable.map(|(resource, devices)| (resource, nodes(devices))).collect()
    }
}
