//! Where CSI volumes lie: kubelet's layout, which drivers, people and a kubelet that may come back
//! know.

use std::path::{Path, PathBuf};

use super::volume::{Key, sha256};
use crate::ids::PodUid;
use crate::volume;

/// The folder of a pod's CSI volumes in `volumes`.
const POD_PLUGIN: &str = "kubernetes.io~csi";
/// The folder of a device's record.
pub(super) const DATA: &str = "data";

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

    /// Devices of all drivers, with a folder for each PersistentVolume.
    pub(super) fn devices(&self) -> PathBuf {
        self.staged().join("volumeDevices")
    }

    /// The folder of a volume's record on the node, which all its pods share.
    pub(super) fn stage(&self, key: &Key) -> PathBuf {
        match &key.device {
            None => self.staged().join(&key.driver).join(sha256(&[&key.handle])),
            Some(name) => self.devices().join(name).join(DATA),
        }
    }

    /// Where the volume is staged for all pods.
    pub(super) fn staging(&self, key: &Key) -> PathBuf {
        match &key.device {
            None => self.stage(key).join("globalmount"),
            Some(name) => self.devices().join("staging").join(name),
        }
    }

    pub(super) fn pods(&self) -> PathBuf {
        self.of_pods.pods()
    }

    /// The records of all CSI volumes of one pod, each in a folder of the volume's name: of those with
    /// files, or of devices. A device has no folder in kubelet's layout; its record lies where kubelet
    /// lets plugins keep what they need for a pod.
    pub(super) fn of_pod(&self, uid: &PodUid, devices: bool) -> PathBuf {
        let folder = if devices { self.of_pods.plugins(uid) } else { self.of_pods.volumes(uid) };
        folder.join(POD_PLUGIN)
    }

    /// Where the volume is published for the pod whose record of it is in `record`.
    pub(super) fn target(&self, uid: &PodUid, record: &Path, key: &Key) -> PathBuf {
        match &key.device {
            None => record.join("mount"),
            Some(name) => self.published(name).join(uid.as_str()),
        }
    }

    /// Where the device `name` is published, for one pod each.
    pub(super) fn published(&self, name: &str) -> PathBuf {
        self.devices().join("publish").join(name)
    }

    /// The pod's link to its device.
    pub(super) fn link(&self, uid: &PodUid, key: &Key) -> Option<PathBuf> {
        let name = key.device.as_ref()?;
        Some(self.of_pods.devices(uid).join(POD_PLUGIN).join(name))
    }
}
