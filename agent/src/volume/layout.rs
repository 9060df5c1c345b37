//! Where the volumes of a pod lie: kubelet's layout, which CSI drivers and people know.

use std::path::{Path, PathBuf};

use crate::ids::PodUid;

/// Kind of a volume as its directory is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plugin {
    EmptyDir,
    ConfigMap,
    Secret,
    DownwardApi,
    Projected,
    Local,
    Nfs,
}

impl Plugin {
    fn directory(self) -> &'static str {
        match self {
            Self::EmptyDir => "kubernetes.io~empty-dir",
            Self::ConfigMap => "kubernetes.io~configmap",
            Self::Secret => "kubernetes.io~secret",
            Self::DownwardApi => "kubernetes.io~downward-api",
            Self::Projected => "kubernetes.io~projected",
            Self::Local => "kubernetes.io~local-volume",
            Self::Nfs => "kubernetes.io~nfs",
        }
    }
}

/// Where an emptyDir lies in the folder of its pod.
pub(crate) fn empty_dir_path(pod_dir: &Path, name: &str) -> PathBuf {
    pod_dir.join("volumes").join(Plugin::EmptyDir.directory()).join(name)
}

/// The agent's folder of pods.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// Everything of one pod.
    pub(super) fn pod(&self, uid: &PodUid) -> PathBuf {
        self.pods().join(uid.as_str())
    }

    pub(crate) fn volumes(&self, uid: &PodUid) -> PathBuf {
        self.pod(uid).join("volumes")
    }

    /// Links to the pod's devices.
    pub(crate) fn devices(&self, uid: &PodUid) -> PathBuf {
        self.pod(uid).join("volumeDevices")
    }

    /// What plugins keep for the pod.
    pub(crate) fn plugins(&self, uid: &PodUid) -> PathBuf {
        self.pod(uid).join("plugins")
    }

    pub(super) fn device(&self, uid: &PodUid, plugin: Plugin, name: &str) -> PathBuf {
        self.devices(uid).join(plugin.directory()).join(name)
    }

    pub(super) fn volume(&self, uid: &PodUid, plugin: Plugin, name: &str) -> PathBuf {
        self.volumes(uid).join(plugin.directory()).join(name)
    }

    /// All volumes of a kind that the pod has.
    pub(super) fn of_kind(&self, uid: &PodUid, plugin: Plugin) -> PathBuf {
        self.volumes(uid).join(plugin.directory())
    }

    /// File systems on devices, one for each PersistentVolume.
    pub(super) fn local_mounts(&self) -> PathBuf {
        self.root.join("plugins/kubernetes.io/local-volume/mounts")
    }

    /// Where the file system on the device of PersistentVolume `name` is mounted for the node.
    pub(super) fn local_mount(&self, name: &str) -> PathBuf {
        self.local_mounts().join(name)
    }

    /// Everything that containers of the pod have of parts of volumes.
    pub(super) fn sub_paths(&self, uid: &PodUid) -> PathBuf {
        self.pod(uid).join("volume-subpaths")
    }

    /// Where mount `index` of a container is bound to a path inside a volume.
    pub(super) fn sub_path(
        &self,
        uid: &PodUid,
        volume: &str,
        container: &str,
        index: usize,
    ) -> PathBuf {
        self.sub_paths(uid).join(volume).join(container).join(index.to_string())
    }
}

/// Whether `uid` can name a directory: it comes from manifests and from the API.
pub(super) fn is_file_name(uid: &str) -> bool {
    !uid.is_empty() && uid.len() <= 128 && uid != "." && uid != ".." && !uid.contains(['/', '\0'])
}
