//! What a CSI volume is, as a pod or a PersistentVolume describes it, and its names. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{CSIVolumeSource, PersistentVolume, SecretReference};
use sha2::{Digest as _, Sha256};

use crate::ids::{NamespacedName, PodUid};

/// One CSI volume that a pod uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsiVolume {
    /// The PersistentVolume's name, or the volume's in the pod where it is written inline.
    pub spec_name: String,
    /// The driver's name.
    pub driver: String,
    /// How the driver knows it.
    pub handle: String,
    /// Written inline in the pod, and lives as long as it.
    pub ephemeral: bool,
    /// Given as a device, without a file system (`volumeMode: Block`).
    pub block: bool,
    /// Published read-only.
    pub read_only: bool,
    /// The file system's type; empty leaves it to the driver.
    pub fs_type: String,
    /// What the driver wants to be told.
    pub attributes: BTreeMap<String, String>,
    /// As the PersistentVolume has them; `None` where it has none.
    pub access_modes: Option<Vec<String>>,
    /// As the PersistentVolume has them.
    pub mount_options: Vec<String>,
    /// The Secret that staging needs.
    pub stage_secret: Option<NamespacedName>,
    /// The Secret that publishing needs.
    pub publish_secret: Option<NamespacedName>,
    /// The Secret that making it larger needs.
    pub expand_secret: Option<NamespacedName>,
}

impl CsiVolume {
    /// The volume that is written inline in the pod `uid` of `namespace` under `name`.
    pub fn inline(uid: &PodUid, namespace: &str, name: &str, source: &CSIVolumeSource) -> Self {
        let secret = source.node_publish_secret_ref.as_ref().map(|secret| &secret.name);
        Self {
            spec_name: name.to_owned(),
            driver: source.driver.clone(),
            handle: format!("csi-{}", sha256(&[uid.as_str(), name])),
            ephemeral: true,
            block: false,
            read_only: source.read_only.unwrap_or(false),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            access_modes: None,
            mount_options: Vec::new(),
            stage_secret: None,
            expand_secret: None,
            publish_secret: secret
                .filter(|name| !name.is_empty())
                .map(|name| NamespacedName::new(namespace, name)),
        }
    }

    /// The volume behind `pv`; `None` where it is of another kind. `read_only` is the claim's: what
    /// the PersistentVolume says of it concerns only the attaching.
    pub fn of(pv: &PersistentVolume, read_only: bool) -> Option<Self> {
        let spec = pv.spec.as_ref()?;
        let source = spec.csi.as_ref()?;
        let secret = |reference: &Option<SecretReference>| {
            let reference = reference.as_ref()?;
            let name = reference.name.as_deref().filter(|name| !name.is_empty())?;
            Some(NamespacedName::new(reference.namespace.as_deref().unwrap_or_default(), name))
        };
        Some(Self {
            spec_name: pv.metadata.name.clone().unwrap_or_default(),
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
            ephemeral: false,
            block: spec.volume_mode.as_deref() == Some("Block"),
            read_only,
            fs_type: source.fs_type.clone().unwrap_or_default(),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            access_modes: spec.access_modes.clone(),
            mount_options: spec.mount_options.clone().unwrap_or_default(),
            stage_secret: secret(&source.node_stage_secret_ref),
            publish_secret: secret(&source.node_publish_secret_ref),
            expand_secret: secret(&source.node_expand_secret_ref),
        })
    }

    /// Only one pod may have it at a time (KEP-2485). With other modes beside that, it is not known which
    /// one the pod wants.
    pub(super) fn is_for_one_pod(&self) -> bool {
        self.access_modes.as_deref().is_some_and(|modes| *modes == ["ReadWriteOncePod"])
    }

    /// By what its files are found.
    pub(super) fn key(&self) -> Key {
        Key {
            driver: self.driver.clone(),
            handle: self.handle.clone(),
            device: self.block.then(|| self.spec_name.clone()),
        }
    }

    /// How `volumesInUse` and `volumesAttached` of a Node name it.
    pub fn unique_name(&self) -> String {
        unique_name(&self.driver, &self.handle)
    }

    /// The name of the VolumeAttachment that attaches it to `node`.
    pub fn attachment(&self, node: &str) -> String {
        attachment(&self.driver, &self.handle, node)
    }
}

/// A volume as its files are found on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// The driver's name.
    pub(super) driver: String,
    /// How the driver knows it.
    pub(super) handle: String,
    /// The PersistentVolume's name, where it is given as a device.
    pub(super) device: Option<String>,
}

impl Key {
    pub(super) fn unique_name(&self) -> String {
        unique_name(&self.driver, &self.handle)
    }
}

/// How a Node's status names the volume `handle` of `driver`.
fn unique_name(driver: &str, handle: &str) -> String {
    format!("kubernetes.io/csi/{driver}^{handle}")
}

/// The name of a VolumeAttachment.
pub(super) fn attachment(driver: &str, handle: &str, node: &str) -> String {
    format!("csi-{}", sha256(&[handle, driver, node]))
}

/// The hash of all `parts` in a row, in hexadecimal.
pub(super) fn sha256(parts: &[&str]) -> String {
    use std::fmt::Write as _;
    let mut hasher = Sha256::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_persistent_volume_says_all_that_the_driver_is_told() {
        let pv: PersistentVolume = serde_json::from_value(json!({
            "metadata": {"name": "pv-1"},
            "spec": {"accessModes": ["ReadWriteMany"], "mountOptions": ["noatime"],
                "csi": {"driver": "d.example", "volumeHandle": "h", "fsType": "ext4", "readOnly": true,
                    "volumeAttributes": {"a": "b"},
                    "nodeStageSecretRef": {"name": "s", "namespace": "n"},
                    "nodePublishSecretRef": {"name": "p", "namespace": "n"}}}
        }))
        .unwrap();
        let volume = CsiVolume::of(&pv, false).unwrap();
        assert_eq!((&*volume.spec_name, &*volume.handle, volume.read_only), ("pv-1", "h", false));
        assert_eq!(volume.unique_name(), "kubernetes.io/csi/d.example^h");
        assert_eq!(volume.stage_secret, Some(NamespacedName::new("n", "s")));
        assert_eq!(volume.publish_secret, Some(NamespacedName::new("n", "p")));
        assert_eq!(volume.mount_options, ["noatime"]);
        assert_eq!((volume.block, volume.key().device), (false, None));
        let mut device = pv;
        device.spec.as_mut().unwrap().volume_mode = Some("Block".into());
        let volume = CsiVolume::of(&device, false).unwrap();
        assert_eq!((volume.block, volume.key().device), (true, Some("pv-1".into())));
        let other: PersistentVolume =
            serde_json::from_value(json!({"spec": {"hostPath": {"path": "/x"}}})).unwrap();
        assert_eq!(CsiVolume::of(&other, false), None);
    }

    #[test]
    fn names_are_those_that_the_controllers_compute() {
        // sha256sum of the parts in a row: others compute the same names.
        assert_eq!(
            attachment("d.example", "h", "node-1"),
            "csi-82aae9bb9778860e26b71ef08a792d76284696319e623aa0eccedac1f5f363e6"
        );
        let source = CSIVolumeSource { driver: "d".into(), ..Default::default() };
        let inline = CsiVolume::inline(&PodUid::from("uid"), "ns", "v", &source);
        assert_eq!(inline.handle, format!("csi-{}", sha256(&["uidv"])));
    }
}
