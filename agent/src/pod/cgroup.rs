//! Pod and QoS cgroups: `kubepods/{burstable,besteffort}/pod<uid>`, laid out as kubelet does, so
//! that tools find them.
//!
//! Names are pure; `PodCgroups` is the effect. The runtime makes the containers' own cgroups below.

use async_trait::async_trait;

use super::config::resources::PodLimits;
use crate::ids::PodUid;
use crate::node_context::CgroupDriver;

mod fs;
pub mod node;
mod reserve;
mod slices;
pub(crate) mod usage;

pub use fs::{KernelCgroups, hierarchies};
pub use node::{Group, GroupLimits};
pub use reserve::QosReserve;

/// Why a cgroup is not as it should be.
#[derive(Debug, thiserror::Error)]
#[error("{operation} cgroup {path}: {cause}")]
pub struct CgroupError {
    /// What was tried.
    pub operation: &'static str,
    /// Which cgroup.
    pub path: String,
    /// What the kernel or systemd said.
    pub cause: String,
}

/// Cgroups of pods.
#[async_trait]
pub trait PodCgroups: Send + Sync + 'static {
    /// Makes the pod's cgroup with its limits, and gives the name that the runtime takes as
    /// `cgroup_parent`; empty where pods have no cgroups. Idempotent.
    async fn ensure(
        &self,
        uid: &PodUid,
        qos: &str,
        limits: PodLimits,
    ) -> Result<String, CgroupError>;
    /// Counts in a pod whose cgroup an earlier agent has made: its class has the sum of its pods.
    fn known(&self, _uid: &PodUid, _qos: &str, _limits: PodLimits) {}
    /// Takes the pod's cgroup away, whatever its QoS class was. Idempotent.
    async fn remove(&self, uid: &PodUid) -> Result<(), CgroupError>;
    /// Pods that have a cgroup.
    async fn list(&self) -> Result<Vec<PodUid>, CgroupError>;
    /// Sets what a group of the node may use. Idempotent; does nothing where pods have no cgroups.
    async fn bound(&self, _group: &Group, _limits: GroupLimits) -> Result<(), CgroupError> {
        Ok(())
    }
    /// Keeps what pods requested from those of lower classes, as far as it can be by now.
    async fn keep_requested(&self) {}
    /// Whether the node has cgroup v2.
    fn unified(&self) -> bool;
}

/// No cgroups for pods (`cgroupsPerQOS: false`): the runtime puts containers where it likes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCgroups;

#[async_trait]
impl PodCgroups for NoCgroups {
    async fn ensure(&self, _: &PodUid, _: &str, _: PodLimits) -> Result<String, CgroupError> {
        Ok(String::new())
    }
    async fn remove(&self, _: &PodUid) -> Result<(), CgroupError> {
        Ok(())
    }
    async fn list(&self) -> Result<Vec<PodUid>, CgroupError> {
        Ok(Vec::new())
    }
    fn unified(&self) -> bool {
        false
    }
}

/// Folders below the cgroup root that lead to the pod's cgroup.
pub fn pod_path(qos: &str, uid: &PodUid) -> Vec<String> {
    let mut path = vec!["kubepods".to_owned()];
    match qos {
        "Burstable" => path.push("burstable".into()),
        "BestEffort" => path.push("besteffort".into()),
        _ => {}
    }
    path.push(format!("pod{uid}"));
    path
}

/// The name that a runtime takes as `cgroup_parent` for `path` below `root`.
pub fn parent_name(driver: CgroupDriver, root: &str, path: &[String]) -> String {
    match driver {
        CgroupDriver::Cgroupfs => {
            let root = root.trim_matches('/');
            let sep = if root.is_empty() { "" } else { "/" };
            format!("/{root}{sep}{}", path.join("/"))
        }
        CgroupDriver::Systemd => slice_name(root, path),
    }
}

/// `kubepods-burstable-podX.slice`; dashes in a part become underscores, as systemd nests by dash.
pub fn slice_name(root: &str, path: &[String]) -> String {
    let parts: Vec<String> = root
        .split('/')
        .filter(|p| !p.is_empty())
        .map(|p| p.trim_end_matches(".slice").to_owned())
        .chain(path.iter().cloned())
        .map(|p| p.replace('-', "_"))
        .collect();
    format!("{}.slice", parts.join("-"))
}

/// Folders in which systemd nests `slice`: one for each dash.
pub fn slice_folders(slice: &str) -> Vec<String> {
    let name = slice.trim_end_matches(".slice");
    let mut so_far = String::new();
    let mut folders = Vec::new();
    for part in name.split('-') {
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        folders.push(format!("{so_far}.slice"));
    }
    folders
}

/// The folder of the cgroup that `path` below `root` leads to, relative to the hierarchies' mounts.
pub fn folder(driver: CgroupDriver, root: &str, path: &[String]) -> String {
    match driver {
        CgroupDriver::Cgroupfs => {
            parent_name(driver, root, path).trim_start_matches('/').to_owned()
        }
        CgroupDriver::Systemd => slice_folders(&slice_name(root, path)).join("/"),
    }
}

/// The folder of the cgroup that all pods are in.
pub fn pods_folder(driver: CgroupDriver, root: &str) -> String {
    folder(driver, root, &["kubepods".to_owned()])
}

/// CPU shares (2 to 262144) as a v2 weight (1 to 10000), the linear map that runc and systemd use.
pub fn cpu_weight(shares: i64) -> i64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kubelets() {
        let uid = PodUid::from("1f-2e");
        for (driver, root, qos, name) in [
            (CgroupDriver::Cgroupfs, "/", "Burstable", "/kubepods/burstable/pod1f-2e"),
            (CgroupDriver::Cgroupfs, "/x", "Guaranteed", "/x/kubepods/pod1f-2e"),
            (CgroupDriver::Systemd, "/", "BestEffort", "kubepods-besteffort-pod1f_2e.slice"),
            (CgroupDriver::Systemd, "/", "Guaranteed", "kubepods-pod1f_2e.slice"),
        ] {
            assert_eq!(parent_name(driver, root, &pod_path(qos, &uid)), name);
        }
        assert_eq!(
            slice_folders("kubepods-burstable-podx.slice"),
            ["kubepods.slice", "kubepods-burstable.slice", "kubepods-burstable-podx.slice"]
        );
    }

    #[test]
    fn weights_span_the_range() {
        for (shares, weight) in [(2, 1), (1024, 39), (262_144, 10_000)] {
            assert_eq!(cpu_weight(shares), weight);
        }
    }
}
