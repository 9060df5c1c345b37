//! Volumes: what a pod's containers share, put in place before they start and taken away after
//! they are gone.
//!
//! One file per volume kind; `layout` says where things lie on disk (kubelet's own layout, because
//! CSI drivers and people look there).

use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};

use crate::ids::PodUid;

mod apply;
mod atomic;
mod certificate;
mod claim;
mod command;
mod config_map;
mod device;
mod disks;
mod downward_api;
mod empty_dir;
mod error;
mod gather;
mod growth;
mod host_path;
mod layout;
mod local;
mod mounts;
mod nfs;
mod node;
mod owner;
mod payload;
mod refresh;
mod secret;
mod sub_path;
mod teardown;
mod token;
mod trust_bundle;
mod usage;

pub(crate) use device::link as link_device;
pub use error::VolumeError;
pub(crate) use layout::{Layout, empty_dir_path};
pub(crate) use mounts::mount_points;
pub use node::NodeVolumes;
pub use owner::Group;
pub use refresh::run as run_refresh;
pub use usage::{Room, VolumeUsage};

/// Brings volumes about. Every verb is idempotent and may be repeated after a crash at any instant.
#[async_trait]
pub trait Volumes: Send + Sync {
    /// Puts all volumes of the pod in place.
    async fn mount(&self, pod: &Arc<Pod>) -> Result<(), VolumeError>;

    /// The pod's object is now this one: what volumes show of it is brought up to date soon, if they
    /// are in place. Volumes that show nothing of the pod need not know.
    fn pod_changed(&self, _pod: &Arc<Pod>) {}

    /// The pod ends: nobody waits for its volumes any more, and a `mount` under way gives up.
    fn pod_ends(&self, _uid: &PodUid) {}

    /// The CRI mounts of one container: its `volumeMounts` with `subPath`, `subPathExpr` (expanded
    /// with the container's literal and downward-API environment), `readOnly` and propagation.
    /// `attempt` is the container's restart count; a new attempt resolves its subPaths anew.
    async fn container_mounts(
        &self,
        pod: &Pod,
        container: &Container,
        attempt: u32,
    ) -> Result<Vec<cri_shim::api::Mount>, VolumeError>;

    /// The devices of one container: its `volumeDevices`.
    fn container_devices(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<Vec<cri_shim::api::Device>, VolumeError>;

    /// Takes everything of the pod away: nothing is left under `<root>/pods/<uid>`.
    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError>;

    /// Pods that have something left on disk, for the clean-up of orphans at start.
    async fn on_disk(&self) -> Result<Vec<PodUid>, VolumeError>;
}

#[cfg(test)]
mod tests;
