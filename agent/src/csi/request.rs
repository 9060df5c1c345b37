//! What a driver can do, and what it is asked for a volume. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSIDriver;

use super::volume::CsiVolume;
use super::wire::csi::node_service_capability::Type;
use super::wire::csi::node_service_capability::rpc::Type as Rpc;
use super::wire::csi::volume_capability::access_mode::Mode;
use super::wire::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use super::wire::csi::{NodeServiceCapability, VolumeCapability};

/// What the node part of a driver can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// STAGE_UNSTAGE_VOLUME.
    pub(super) stage: bool,
    /// GET_VOLUME_STATS: tells how full a volume is.
    pub(super) stats: bool,
    /// EXPAND_VOLUME: makes a volume larger.
    pub(super) expand: bool,
    /// SINGLE_NODE_MULTI_WRITER: knows the access modes of one node and of one pod apart.
    pub(super) single_node_multi_writer: bool,
    /// VOLUME_MOUNT_GROUP: gives the volume to the pod's fsGroup itself.
    pub(super) mount_group: bool,
}

impl Capabilities {
    pub(super) fn of(told: &[NodeServiceCapability]) -> Self {
        let has = |wanted: Rpc| {
            told.iter().any(|capability| match &capability.r#type {
                Some(Type::Rpc(rpc)) => rpc.r#type == i32::from(wanted),
                None => false,
            })
        };
        Self {
            stage: has(Rpc::StageUnstageVolume),
            stats: has(Rpc::GetVolumeStats),
            expand: has(Rpc::ExpandVolume),
            single_node_multi_writer: has(Rpc::SingleNodeMultiWriter),
            mount_group: has(Rpc::VolumeMountGroup),
        }
    }
}

/// Kubernetes' access mode as CSI has it.
fn access_mode(mode: &str, capable: bool) -> Mode {
    match (mode, capable) {
        ("ReadWriteOnce", true) => Mode::SingleNodeMultiWriter,
        ("ReadWriteOncePod", true) => Mode::SingleNodeSingleWriter,
        ("ReadWriteOnce" | "ReadWriteOncePod", false) => Mode::SingleNodeWriter,
        ("ReadOnlyMany", _) => Mode::MultiNodeReaderOnly,
        ("ReadWriteMany", _) => Mode::MultiNodeMultiWriter,
        _ => Mode::Unknown,
    }
}

/// How the volume shall be used; `group` is the pod's fsGroup.
pub(super) fn capability(
    volume: &CsiVolume,
    capabilities: Capabilities,
    group: Option<u32>,
) -> VolumeCapability {
    let modes = volume.access_modes.as_deref().unwrap_or_default();
    // Only the first counts, as everywhere in Kubernetes.
    let mode = modes.first().map_or("ReadWriteOnce", String::as_str);
    let mode = access_mode(mode, capabilities.single_node_multi_writer);
    let group = group.filter(|_| capabilities.mount_group);
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(if volume.block {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: volume.fs_type.clone(),
                mount_flags: volume.mount_options.clone(),
                volume_mount_group: group.map(|group| group.to_string()).unwrap_or_default(),
            })
        }),
    }
}

/// Whether the volume has to be attached to the node first.
pub(super) fn attach_required(volume: &CsiVolume, driver: Option<&CSIDriver>) -> bool {
    !volume.ephemeral && driver.and_then(|d| d.spec.attach_required).unwrap_or(true)
}

/// Why the driver does not provide such a volume, if it does not.
pub(super) fn unsupported_lifecycle(
    volume: &CsiVolume,
    driver: Option<&CSIDriver>,
) -> Option<String> {
    let mode = lifecycle(volume);
    let Some(driver) = driver else {
        return volume.ephemeral.then(|| {
            format!(
                "volume mode {mode:?} not supported by driver {} (no CSIDriver object)",
                volume.driver
            )
        });
    };
    let modes = driver.spec.volume_lifecycle_modes.as_deref().unwrap_or_default();
    // What the API server fills in.
    let supported =
        if modes.is_empty() { !volume.ephemeral } else { modes.iter().any(|m| m == mode) };
    (!supported).then(|| {
        format!(
            "volume mode {mode:?} not supported by driver {} (only supports {modes:?})",
            volume.driver
        )
    })
}

/// `volumeLifecycleMode` of the volume.
pub(super) fn lifecycle(volume: &CsiVolume) -> &'static str {
    if volume.ephemeral { "Ephemeral" } else { "Persistent" }
}

/// Whether the node gives the volume's files to the pod's fsGroup.
pub(super) fn applies_group(volume: &CsiVolume, driver: Option<&CSIDriver>) -> bool {
    let policy = driver.and_then(|d| d.spec.fs_group_policy.as_deref());
    match policy.unwrap_or("ReadWriteOnceWithFSType") {
        _ if volume.read_only || volume.block => false,
        "None" => false,
        "File" => true,
        _ if volume.fs_type.is_empty() => false,
        // One of the pod's own is always for this node alone.
        _ if volume.ephemeral => true,
        _ => volume
            .access_modes
            .iter()
            .flatten()
            .any(|mode| matches!(mode.as_str(), "ReadWriteOnce" | "ReadWriteOncePod")),
    }
}

/// What is told of the pod, where the driver asks for it (`podInfoOnMount`).
pub(super) fn pod_info(pod: &Pod, volume: &CsiVolume) -> BTreeMap<String, String> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let account = pod.spec.as_ref().and_then(|s| s.service_account_name.clone());
    let told = [
        ("pod.name", text(&pod.metadata.name)),
        ("pod.namespace", text(&pod.metadata.namespace)),
        ("pod.uid", text(&pod.metadata.uid)),
        ("serviceAccount.name", account.unwrap_or_default()),
        ("ephemeral", volume.ephemeral.to_string()),
    ];
    told.into_iter().map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::csi::wire::csi::node_service_capability::Rpc as RpcMessage;

    fn volume(ephemeral: bool, fs_type: &str, modes: Option<&[&str]>) -> CsiVolume {
        CsiVolume {
            spec_name: "v".into(),
            driver: "d".into(),
            handle: "h".into(),
            ephemeral,
            block: false,
            read_only: false,
            fs_type: fs_type.into(),
            attributes: BTreeMap::new(),
            access_modes: modes.map(|modes| modes.iter().map(|m| (*m).into()).collect()),
            mount_options: vec!["noatime".into()],
            stage_secret: None,
            publish_secret: None,
            expand_secret: None,
        }
    }

    fn driver(spec: serde_json::Value) -> CSIDriver {
        serde_json::from_value(json!({"metadata": {"name": "d"}, "spec": spec})).unwrap()
    }

    #[test]
    fn the_first_access_mode_counts_as_the_driver_knows_it() {
        for (modes, capable, expected) in [
            (None, false, Mode::SingleNodeWriter),
            (Some(&["ReadWriteOnce"][..]), true, Mode::SingleNodeMultiWriter),
            (Some(&["ReadWriteOncePod"]), false, Mode::SingleNodeWriter),
            (Some(&["ReadWriteOncePod"]), true, Mode::SingleNodeSingleWriter),
            (Some(&["ReadOnlyMany", "ReadWriteMany"]), true, Mode::MultiNodeReaderOnly),
            (Some(&["ReadWriteMany", "ReadOnlyMany"]), false, Mode::MultiNodeMultiWriter),
        ] {
            let caps = Capabilities { single_node_multi_writer: capable, ..Default::default() };
            let wanted = capability(&volume(false, "", modes), caps, Some(7));
            assert_eq!(wanted.access_mode.unwrap().mode, i32::from(expected), "{modes:?}");
            let Some(AccessType::Mount(mount)) = wanted.access_type else { panic!("a block") };
            assert_eq!(mount.volume_mount_group, "", "the driver cannot");
            assert_eq!(mount.mount_flags, ["noatime"]);
        }
        let caps = Capabilities { mount_group: true, ..Default::default() };
        let wanted = capability(&volume(false, "xfs", None), caps, Some(7));
        let Some(AccessType::Mount(mount)) = wanted.access_type else { panic!("a block") };
        assert_eq!((&*mount.volume_mount_group, &*mount.fs_type), ("7", "xfs"));
        let device = CsiVolume { block: true, ..volume(false, "xfs", None) };
        let wanted = capability(&device, caps, Some(7));
        assert_eq!(wanted.access_type, Some(AccessType::Block(BlockVolume {})));
    }

    #[test]
    fn capabilities_are_read_and_unknown_ones_ignored() {
        let rpc = |number| NodeServiceCapability {
            r#type: Some(Type::Rpc(RpcMessage { r#type: number })),
        };
        let none = NodeServiceCapability { r#type: None };
        let told = [rpc(1), rpc(99), none, rpc(6)];
        let expected = Capabilities { stage: true, mount_group: true, ..Default::default() };
        assert_eq!(Capabilities::of(&told), expected);
    }

    #[test]
    fn the_group_is_applied_as_the_policy_says() {
        let rwo: Option<&[&str]> = Some(&["ReadWriteOnce"]);
        let rwx: Option<&[&str]> = Some(&["ReadWriteMany"]);
        let policy = |name: &str| Some(driver(json!({"fsGroupPolicy": name})));
        for (ephemeral, fs_type, modes, driver, expected) in [
            (false, "ext4", rwo, None, true),
            (false, "", rwo, None, false),
            (false, "ext4", rwx, None, false),
            (false, "ext4", None, None, false),
            (true, "ext4", None, None, true),
            (true, "", None, None, false),
            (false, "", rwx, policy("File"), true),
            (false, "ext4", rwo, policy("None"), false),
            (false, "ext4", rwo, policy("ReadWriteOnceWithFSType"), true),
        ] {
            let mut volume = volume(ephemeral, fs_type, modes);
            assert_eq!(applies_group(&volume, driver.as_ref()), expected, "{fs_type} {modes:?}");
            volume.read_only = true;
            assert!(!applies_group(&volume, driver.as_ref()));
            (volume.read_only, volume.block) = (false, true);
            assert!(!applies_group(&volume, driver.as_ref()), "a device has no files");
        }
    }

    #[test]
    fn a_driver_provides_the_lifecycles_that_it_lists() {
        let both = driver(json!({"volumeLifecycleModes": ["Persistent", "Ephemeral"]}));
        let persistent = driver(json!({"volumeLifecycleModes": ["Persistent"]}));
        let silent = driver(json!({}));
        for (ephemeral, driver, expected) in [
            (false, None, true),
            (true, None, false),
            (false, Some(&silent), true),
            (true, Some(&silent), false),
            (true, Some(&both), true),
            (true, Some(&persistent), false),
        ] {
            let reason = unsupported_lifecycle(&volume(ephemeral, "", None), driver);
            assert_eq!(reason.is_none(), expected, "{reason:?}");
        }
    }

    #[test]
    fn attaching_is_for_those_that_ask_and_for_those_that_say_nothing() {
        let no = driver(json!({"attachRequired": false}));
        assert!(attach_required(&volume(false, "", None), None));
        assert!(attach_required(&volume(false, "", None), Some(&driver(json!({})))));
        assert!(!attach_required(&volume(false, "", None), Some(&no)));
        assert!(!attach_required(&volume(true, "", None), None));
    }

    #[test]
    fn the_driver_is_told_of_the_pod() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"containers": [], "serviceAccountName": "sa"}}))
            .unwrap();
        let told = pod_info(&pod, &volume(true, "", None));
        assert_eq!(told["csi.storage.k8s.io/pod.name"], "p");
        assert_eq!(told["csi.storage.k8s.io/pod.namespace"], "n");
        assert_eq!(told["csi.storage.k8s.io/pod.uid"], "u");
        assert_eq!(told["csi.storage.k8s.io/serviceAccount.name"], "sa");
        assert_eq!(told["csi.storage.k8s.io/ephemeral"], "true");
    }
}
