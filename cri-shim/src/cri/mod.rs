//! The CRI's RuntimeService and ImageService, one file per group of verbs.
//!
//! [`Shim`] is what the verbs share. A sandbox or container in memory is its immutable record plus
//! a status; the status is never stored by the shim, it follows from what the monitors wrote
//! (`started.json`, `exited.json`), so a restarted shim derives the same one.
//!
//! ```text
//!   CREATED --StartContainer--> RUNNING --exit--> EXITED
//!      \------- start failed (exit 128, StartError) ------/
//! ```

use std::sync::Arc;

use tonic::Status;

use crate::Config;
use crate::apparmor::AppArmor;
use crate::cgroup::Hierarchies;
use crate::image::ImageStore;
use crate::network::Network;
use crate::seccomp::Programs;
use crate::selinux::SeLinux;
use crate::snapshot::SnapshotStore;
use crate::spec::Host;
use crate::state::Layout;
use crate::state::durability::Durability;
use crate::streaming::Urls;
use crate::systemd::Systemd;
use crate::zygote::Zygote;

mod checkpoint;
mod container_create;
mod container_list;
mod container_remove;
mod container_start;
mod container_stop;
mod criu;
mod declared;
mod devices;
mod edits;
mod events;
mod exec;
mod images;
mod labels;
mod logs;
mod metrics;
mod mount_sources;
mod poststop;
pub mod recovery;
mod resources;
mod sandbox_files;
mod sandbox_list;
mod sandbox_run;
mod sandbox_stop;
mod scopes;
mod service;
mod stats;
mod status;
pub mod store;
mod stream;
mod userns;
mod watch;

pub use events::Events;
pub use labels::Levels;
pub use store::Store;
pub use userns::UsernsSupport;

/// How long a monitor or the kernel may take for something that takes milliseconds.
pub(crate) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// What all verbs share.
pub struct Shim {
    pub config: Config,
    pub layout: Layout,
    pub host: Host,
    pub cgroups: Hierarchies,
    pub boot_id: String,
    pub images: ImageStore,
    pub snapshots: SnapshotStore,
    pub network: Arc<dyn Network>,
    pub zygote: Zygote,
    pub store: Store,
    pub events: Events,
    pub durability: Durability,
    pub programs: Programs,
    pub urls: Arc<Urls>,
    pub systemd: Systemd,
    pub userns: UsernsSupport,
    pub apparmor: AppArmor,
    pub selinux: SeLinux,
    pub levels: Levels,
}

/// The services, over one shared [`Shim`].
#[derive(Clone)]
pub struct Service(pub Arc<Shim>);

/// An internal error of a verb, with what was being done.
pub(crate) fn internal(doing: &str, error: impl std::fmt::Display) -> Status {
    Status::internal(format!("{doing}: {error}"))
}

/// Whether every label of `selector` is among `labels`.
pub(crate) fn selected(
    labels: &std::collections::HashMap<String, String>,
    selector: &std::collections::HashMap<String, String>,
) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Runs what blocks on the disk or the kernel off the runtime's threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|e| internal("running a blocking task", e))
}
