//! Where CSI volumes lie: kubelet's layout, which drivers, people and a kubelet that may come back
//! know.

use std::path::{Path, PathBuf};

use super::volume::sha256;
use crate::ids::PodUid;
use crate::volume;

/// The folder of a pod's CSI volumes in `volumes`.
const POD_PLUGIN: &str = "kubernetes.io~csi";

/// Paths under the agent's root.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    root: PathBuf,
    of_pods: volume::Layout,
}

impl Layout {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf(), of_pods: volume::Layout::new(root) }
    }

    /// Where drivers have their folders.
    pub(super) fn plugins(&self) -> PathBuf {
        self.root.join("plugins")
    }

    /// All volumes of all drivers that are staged.
    pub(super) fn staged(&self) -> PathBuf {
        self.plugins().join("kubernetes.io/csi")
    }

    /// The folder of one staged volume; what is mounted is [`Layout::global`] in it.
    pub(super) fn stage(&self, driver: &str, handle: &str) -> PathBuf {
        self.staged().join(driver).join(sha256(&[handle]))
    }

    /// Where the volume of a stage folder is mounted for all pods.
    pub(super) fn global(stage: &Path) -> PathBuf {
        stage.join("globalmount")
    }

    pub(super) fn pods(&self) -> PathBuf {
        self.of_pods.pods()
    }

    /// All CSI volumes of one pod.
    pub(super) fn of_pod(&self, uid: &PodUid) -> PathBuf {
        self.of_pods.volumes(uid).join(POD_PLUGIN)
    }

    /// The folder of one volume of a pod; what is mounted is [`Layout::target`] in it.
    pub(super) fn volume(&self, uid: &PodUid, spec_name: &str) -> PathBuf {
        self.of_pod(uid).join(spec_name)
    }

    /// Where the volume of a pod's volume folder is mounted.
    pub(super) fn target(volume: &Path) -> PathBuf {
        volume.join("mount")
    }
}
