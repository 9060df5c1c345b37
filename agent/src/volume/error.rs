//! What can go wrong with a volume, each with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::csi::CsiError;
use crate::ids::NamespacedName;
use crate::objects::ObjectError;

/// Why a volume could not be put in place or taken away.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The volume names a kind that this node does not provide.
    #[error(
        "unimplemented: volume {volume:?} is of kind {kind}, which this node does not provide; \
         use emptyDir, hostPath, image, configMap, secret, downwardAPI, projected, nfs, \
         persistentVolumeClaim, ephemeral or csi"
    )]
    Unsupported {
        /// Name of the volume in the pod.
        volume: String,
        /// The field of the volume's source.
        kind: String,
    },
    /// The pod asks for something that cannot be had as written.
    #[error("volume {volume:?}: {reason}")]
    Invalid {
        /// Name of the volume in the pod.
        volume: String,
        /// What is wrong, with the field.
        reason: String,
    },
    /// A ConfigMap, Secret or key that the volume needs is not there (yet).
    #[error("volume {volume:?}: {what} not found")]
    NotFound {
        /// Name of the volume in the pod.
        volume: String,
        /// `configmap "name"`, `secret "name" key "k"`.
        what: String,
    },
    /// The object behind the volume could not be read.
    #[error("volume {volume:?}: {source}")]
    Object {
        /// Name of the volume in the pod.
        volume: String,
        /// Why.
        source: ObjectError,
    },
    /// The claim, or the PersistentVolume behind it, cannot be used (yet).
    #[error("volume {volume:?}: error processing PVC {claim}: {reason}")]
    Claim {
        /// Name of the volume in the pod.
        volume: String,
        /// The claim.
        claim: NamespacedName,
        /// Why, in kubelet's words.
        reason: String,
    },
    /// A container uses the volume as what it is not.
    #[error("volume {volume} has volumeMode {mode}, but is specified in {field}")]
    Mode {
        /// Name of the volume in the pod.
        volume: String,
        /// `volumeMode` of the PersistentVolume.
        mode: String,
        /// `volumeMounts` or `volumeDevices`.
        field: &'static str,
    },
    /// A block device of the node cannot be given as written.
    #[error("volume {volume:?}: {reason}")]
    Device {
        /// The PersistentVolume's name.
        volume: String,
        /// What is wrong, with the field.
        reason: String,
    },
    /// A CSI volume is not in place (yet), or not taken back.
    #[error("volume {spec_name:?}: {source}")]
    Csi {
        /// Name of the volume in the pod.
        volume: String,
        /// The PersistentVolume's name, or the volume's in the pod.
        spec_name: String,
        /// Whether it is given as a device.
        block: bool,
        /// Why.
        source: Box<CsiError>,
    },
    /// The kernel refused.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// `mount tmpfs on`, `create`, ...
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl VolumeError {
    /// An `Io` error, for `map_err`.
    pub(crate) fn io(
        operation: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> VolumeError + use<> {
        let path = path.to_path_buf();
        move |source| VolumeError::Io { operation, path, source }
    }

    /// The reason of the Event that tells of it, and of waiting.
    pub(crate) fn reason(&self) -> &'static str {
        if self.is_of_device() { "FailedMapVolume" } else { "FailedMount" }
    }

    fn is_of_device(&self) -> bool {
        match self {
            Self::Device { .. } => true,
            Self::Csi { block, source, .. } => {
                *block && !matches!(**source, CsiError::AttachTimeout(_))
            }
            _ => false,
        }
    }

    /// What that Event says, in kubelet's words.
    pub(crate) fn event(&self) -> String {
        let of_device = self.is_of_device();
        let failed =
            if of_device { "MapVolume.SetUpDevice failed" } else { "MountVolume.SetUp failed" };
        match self {
            Self::Invalid { volume, reason } | Self::Device { volume, reason } => {
                format!("{failed} for volume {volume:?} : {reason}")
            }
            Self::NotFound { volume, what } => {
                format!("{failed} for volume {volume:?} : {what} not found")
            }
            Self::Object { volume, source } => format!("{failed} for volume {volume:?} : {source}"),
            Self::Claim { volume, claim, reason } => format!(
                "Unable to attach or mount volumes: unmounted volumes=[{volume}], unattached \
                 volumes=[], failed to process volumes=[{volume}]: error processing PVC {claim}: \
                 {reason}"
            ),
            Self::Mode { volume, .. } => format!(
                "Unable to attach or mount volumes: unmounted volumes=[{volume}], unattached \
                 volumes=[], failed to process volumes=[{volume}]: {self}"
            ),
            Self::Csi { volume, spec_name, source, .. } => match &**source {
                CsiError::AttachTimeout(why) => format!(
                    "Unable to attach or mount volumes: unmounted volumes=[{volume}], unattached \
                     volumes=[{volume}], failed to process volumes=[]: timed out waiting for the \
                     condition: {why}"
                ),
                other => format!("{failed} for volume {spec_name:?} : {other}"),
            },
            Self::Unsupported { .. } | Self::Io { .. } => format!("{failed}: {self}"),
        }
    }

    /// Whether it is only that nobody waits any more.
    pub(crate) fn is_ending(&self) -> bool {
        matches!(self, Self::Csi { source, .. } if matches!(**source, CsiError::Ending))
    }

    /// Whether trying again without any change to the pod may help.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::Unsupported { .. })
    }
}
