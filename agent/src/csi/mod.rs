//! CSI: volumes that a driver on this node provides.
//!
//! Drivers make themselves known by sockets (`registration`); the API hears of them (`node_info`). A
//! pod's volume is attached by somebody else (`attach`), staged once for the node and published for
//! each pod (`mount`), and taken back in the opposite order (`unmount`). What was done stands in
//! small files beside the volumes (`record`), and nowhere else: whoever comes next goes on from
//! there.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use tokio::sync::{OwnedMutexGuard, watch};

use self::drivers::Drivers;
use self::layout::Layout;
use self::node_info::{Published, Publisher};
use self::volume::Key;
use crate::node_context::NodeContext;
use crate::objects::{ObjectRef, Objects};
use crate::plugins::PluginHandler;

mod attach;
mod client;
mod device;
mod drivers;
mod error;
mod expand;
mod in_use;
mod layout;
mod migrated;
mod mount;
mod node_info;
mod record;
mod registration;
mod request;
mod unmount;
mod usage;
mod volume;
mod wire;

pub use error::CsiError;
pub use in_use::InUse;
pub use mount::Placed;
pub use volume::CsiVolume;

/// The CSI volumes of one node.
pub struct Csi {
    node_name: String,
    /// Which boot of the machine this is.
    boot: String,
    layout: Layout,
    drivers: Drivers,
    in_use: Arc<InUse>,
    objects: Arc<dyn Objects>,
    node: watch::Receiver<Option<Arc<Node>>>,
    /// What the API knows of the drivers.
    published: watch::Sender<Published>,
    /// Who works on a volume, by its unique name and by its folder: one at a time.
    busy: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl Csi {
    /// For the node of `context`; `node` shows its object.
    pub fn new(
        context: &NodeContext,
        objects: Arc<dyn Objects>,
        node: watch::Receiver<Option<Arc<Node>>>,
        in_use: Arc<InUse>,
    ) -> Arc<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Arc::new(Self {
            node_name: context.node_name.clone(),
            boot: boot.trim().to_owned(),
            layout: Layout::new(&context.root_dir),
            drivers: Drivers::default(),
            in_use,
            objects,
            node,
            published: watch::Sender::new(Published::default()),
            busy: Mutex::default(),
        })
    }

    /// Who takes drivers that make themselves known.
    pub fn handler(self: &Arc<Self>) -> Arc<dyn PluginHandler> {
        let published = self.published.subscribe();
        Arc::new(registration::Drivers { csi: self.clone(), published })
    }

    /// Tells the API of the drivers, until `shutdown` turns true.
    pub async fn run(self: Arc<Self>, client: Client, mut shutdown: watch::Receiver<bool>) {
        let (infos, published) = (self.drivers.infos(), self.published.clone());
        let publisher =
            Publisher::new(client, &self.node_name, self.node.clone(), infos, published);
        let mut end = shutdown.clone();
        tokio::select! {
            // It ends only with what it watches.
            () = publisher.run() => crate::shutdown::requested(&mut shutdown).await,
            () = crate::shutdown::requested(&mut end) => {}
        }
    }

    /// The driver `name` may be asked for volumes from now on.
    fn registered(self: &Arc<Self>, name: &str) {
        tracing::info!(driver = name, "CSI driver registered");
        self.objects.announce(ObjectRef::CsiDriver(name.into()));
        let (csi, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move { csi.take_back_unused(&name).await });
    }

    /// The socket by which the driver `name` was registered is gone.
    fn unregistered(&self, name: &str, socket: &Path) {
        if self.drivers.remove(name, socket) {
            tracing::info!(driver = name, "CSI driver is no longer registered");
            self.drivers.tell(name, None);
        }
    }

    /// Waits until nobody else works on the volume, nor on another that lies where it does.
    async fn only(&self, key: &Key) -> [OwnedMutexGuard<()>; 2] {
        let stage = self.layout.stage(key).display().to_string();
        [self.alone(key.unique_name()).await, self.alone(stage).await]
    }

    async fn alone(&self, name: String) -> OwnedMutexGuard<()> {
        let mutex = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            match busy.get(&name).and_then(Weak::upgrade) {
                Some(mutex) => mutex,
                None => {
                    busy.retain(|_, mutex| mutex.strong_count() > 0);
                    let mutex = Arc::new(tokio::sync::Mutex::new(()));
                    busy.insert(name, Arc::downgrade(&mutex));
                    mutex
                }
            }
        };
        mutex.lock_owned().await
    }
}

/// File system work off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CsiError> + Send + 'static,
) -> Result<T, CsiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(cause) => Err(CsiError::Io {
            operation: "run work on",
            path: PathBuf::new(),
            source: std::io::Error::other(cause),
        }),
    }
}

/// Whether something is mounted on `path`, which need not exist.
fn is_mount_point(path: &Path) -> Result<bool, CsiError> {
    Ok(mounts_at(path)?.is_some_and(|(path, points)| points.contains(&path)))
}

/// Whether something is mounted on `path`, which need not exist, or below it.
fn has_mounts(path: &Path) -> Result<bool, CsiError> {
    let below =
        |(path, points): (PathBuf, Vec<PathBuf>)| points.iter().any(|p| p.starts_with(&path));
    Ok(mounts_at(path)?.is_some_and(below))
}

/// `path` as the kernel's table has it, for the agent's root may be reached through a link, and what
/// the table has; `None` where there is not even a folder for it.
fn mounts_at(path: &Path) -> Result<Option<(PathBuf, Vec<PathBuf>)>, CsiError> {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else { return Ok(None) };
    let path = match parent.canonicalize() {
        Ok(parent) => parent.join(name),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CsiError::io("look at", parent)(error)),
    };
    let table = Path::new("/proc/thread-self/mountinfo");
    let text = std::fs::read(table).map_err(CsiError::io("read", table))?;
    Ok(Some((path, crate::volume::mount_points(&text))))
}

/// The names of what is in `folder`; none where there is no such folder.
fn entries(folder: &Path) -> Result<BTreeSet<PathBuf>, CsiError> {
    match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        other => {
            let found = other.map_err(CsiError::io("read", folder))?;
            found
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<Result<_, _>>()
                .map_err(CsiError::io("read", folder))
        }
    }
}
