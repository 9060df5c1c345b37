//! `persistentVolumeClaim` and `ephemeral`: from the claim to the PersistentVolume behind it. Pure.

use k8s_openapi::api::core::v1::{
    Container, HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, Volume,
};

use super::local::LocalVolume;
use super::nfs::NfsVolume;
use crate::csi::CsiVolume;
use crate::ids::PodUid;
use crate::pod::spec::ephemeral_as_container;

/// Keeps a claim that a pod uses from going.
const PROTECTION: &str = "kubernetes.io/pvc-protection";
/// `volumeMode` of what is given as a device.
pub(super) const BLOCK: &str = "Block";
/// `volumeMode` of what is mounted.
pub(super) const FILESYSTEM: &str = "Filesystem";

/// What is behind a claim.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Backing {
    /// A volume of a CSI driver.
    Csi(Box<CsiVolume>),
    /// A folder or a file system of this node.
    Local(LocalVolume),
    /// A folder of a server.
    Nfs(NfsVolume),
    /// A block device of this node, by the PersistentVolume's name.
    Device { name: String, path: String, read_only: bool },
    /// A path of the host.
    HostPath(HostPathVolumeSource, bool),
}

/// The name of the claim that `volume` of `pod` names, and whether it is used read-only; `None` for
/// a volume of another kind.
pub(super) fn claim_of(pod: &Pod, volume: &Volume) -> Option<(String, bool)> {
    if let Some(source) = &volume.persistent_volume_claim {
        return Some((source.claim_name.clone(), source.read_only.unwrap_or(false)));
    }
    volume.ephemeral.as_ref()?;
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    Some((format!("{pod_name}-{}", volume.name), false))
}

/// The PersistentVolume's name that the claim is bound to, or why the pod cannot use the claim; in
/// kubelet's words.
pub(super) fn bound_to(
    pod: &Pod,
    volume: &Volume,
    claim: Option<&PersistentVolumeClaim>,
    name: &str,
) -> Result<String, String> {
    let Some(claim) = claim else {
        return Err(format!(
            "failed to fetch PVC from API server: persistentvolumeclaims {name:?} not found"
        ));
    };
    let metadata = &claim.metadata;
    let protected = metadata.finalizers.iter().flatten().any(|f| f == PROTECTION);
    if metadata.deletion_timestamp.is_some() && !protected {
        return Err("PVC is being deleted".into());
    }
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    if phase != Some("Bound") {
        return Err("PVC is not bound".into());
    }
    if volume.ephemeral.is_some() {
        let uid = PodUid::of(pod);
        let owned = metadata.owner_references.iter().flatten().any(|owner| {
            owner.controller == Some(true) && owner.uid == uid.as_str() && owner.kind == "Pod"
        });
        if !owned {
            return Err(format!(
                "PVC {name} was not created for pod {} (pod is not owner)",
                pod.metadata.name.as_deref().unwrap_or_default()
            ));
        }
    }
    match claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()) {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err("PVC has empty pvc.Spec.VolumeName".into()),
    }
}

/// What the PersistentVolume `name` of a claim with `claim_uid` is made of, or why it cannot be used.
pub(super) fn backing(
    pv: Option<&PersistentVolume>,
    name: &str,
    claim_uid: &str,
    read_only: bool,
) -> Result<Backing, String> {
    let Some(pv) = pv else {
        return Err(format!(
            "failed to fetch PV {name} from API server: persistentvolumes {name:?} not found"
        ));
    };
    let spec = pv.spec.clone().unwrap_or_default();
    let Some(claim) = &spec.claim_ref else {
        return Err(format!(
            "found PV object {name} but it has a nil pv.Spec.ClaimRef indicating it is not yet \
             bound to the claim"
        ));
    };
    let uid = claim.uid.as_deref().unwrap_or_default();
    if uid != claim_uid {
        return Err(format!(
            "found PV object {name} but its pv.Spec.ClaimRef.UID {uid} does not point to claim.UID \
             {claim_uid}"
        ));
    }
    if let Some(volume) = CsiVolume::of(pv, read_only) {
        return Ok(Backing::Csi(Box::new(volume)));
    }
    if let Some(volume) = CsiVolume::of_in_tree(pv, read_only) {
        let reason = |reason| format!("PersistentVolume {name} is of no CSI driver: {reason}");
        return volume.map(Box::new).map(Backing::Csi).map_err(reason);
    }
    let block = spec.volume_mode.as_deref() == Some(BLOCK);
    if let Some(local) = spec.local {
        if block {
            return Ok(Backing::Device { name: name.to_owned(), path: local.path, read_only });
        }
        return Ok(Backing::Local(LocalVolume {
            name: name.to_owned(),
            path: local.path,
            fs_type: local.fs_type,
            options: spec.mount_options.unwrap_or_default(),
            read_only,
        }));
    }
    if !block && let Some(source) = spec.nfs {
        return Ok(Backing::Nfs(NfsVolume {
            name: name.to_owned(),
            server: source.server,
            path: source.path,
            options: spec.mount_options.unwrap_or_default(),
            read_only,
        }));
    }
    if let Some(source) = spec.host_path {
        if block {
            return Err(format!(
                "PersistentVolume {name} is of kind hostPath, which has no volumeMode Block; use \
                 local or csi"
            ));
        }
        return Ok(Backing::HostPath(source, read_only));
    }
    let fields = serde_json::to_value(&spec).unwrap_or_default();
    let common = [
        "accessModes",
        "capacity",
        "claimRef",
        "mountOptions",
        "nodeAffinity",
        "persistentVolumeReclaimPolicy",
        "storageClassName",
        "volumeAttributesClassName",
        "volumeMode",
    ];
    let kind = fields
        .as_object()
        .and_then(|fields| fields.keys().find(|field| !common.contains(&field.as_str())))
        .map_or("unknown", String::as_str);
    Err(format!(
        "unimplemented: PersistentVolume {name} is of kind {kind}, which this node does not \
         provide; use csi, local, nfs or hostPath"
    ))
}

/// Whether any container of the pod uses the volume `name`: a claim that none uses is left alone.
pub(super) fn is_used(pod: &Pod, name: &str) -> bool {
    is_mounted(pod, name) || is_device(pod, name)
}

fn is_mounted(pod: &Pod, name: &str) -> bool {
    containers(pod).any(|c| c.volume_mounts.iter().flatten().any(|mount| mount.name == name))
}

fn is_device(pod: &Pod, name: &str) -> bool {
    containers(pod).any(|c| c.volume_devices.iter().flatten().any(|device| device.name == name))
}

fn containers(pod: &Pod) -> impl Iterator<Item = Container> {
    pod.spec.iter().flat_map(|spec| {
        let ephemeral = spec.ephemeral_containers.iter().flatten();
        let init = spec.init_containers.iter().flatten();
        let others = spec.containers.iter().chain(init).cloned();
        others.chain(ephemeral.map(ephemeral_as_container))
    })
}

/// The `volumeMode` of a PersistentVolume and the field by which a container of the pod uses the volume
/// `name` all the same, if one does.
pub(super) fn mode_mismatch(
    pod: &Pod,
    name: &str,
    pv: Option<&PersistentVolume>,
) -> Option<(String, &'static str)> {
    let mode = pv.and_then(|pv| pv.spec.as_ref()?.volume_mode.as_deref()).unwrap_or(FILESYSTEM);
    if mode != FILESYSTEM && is_mounted(pod, name) {
        return Some((mode.to_owned(), "volumeMounts"));
    }
    (mode != BLOCK && is_device(pod, name)).then(|| (mode.to_owned(), "volumeDevices"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"containers": [{"name": "c", "volumeMounts": [{"name": "used", "mountPath": "/"}]}]}}))
        .unwrap()
    }

    fn volume(value: Value) -> Volume {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_claim_is_named_or_made_for_the_pod() {
        let of = |value| claim_of(&pod(), &volume(value));
        let named =
            json!({"name": "v", "persistentVolumeClaim": {"claimName": "c", "readOnly": true}});
        assert_eq!(of(named), Some(("c".into(), true)));
        let made = json!({"name": "v", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}});
        assert_eq!(of(made), Some(("p-v".into(), false)));
        assert_eq!(of(json!({"name": "v", "emptyDir": {}})), None);
        assert!(is_used(&pod(), "used") && !is_used(&pod(), "other"));
    }

    #[test]
    fn a_volume_is_used_as_its_mode_says() {
        let with = |containers: Value| {
            let mut spec = json!({"containers": [{"name": "c"}]});
            spec.as_object_mut().unwrap().extend(containers.as_object().unwrap().clone());
            serde_json::from_value::<Pod>(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
        };
        let mount = json!([{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]);
        let device = json!([{"name": "c", "volumeDevices": [{"name": "v", "devicePath": "/v"}]}]);
        let pv = |mode: Option<&str>| {
            let spec = json!({"volumeMode": mode});
            serde_json::from_value::<PersistentVolume>(json!({"spec": spec})).unwrap()
        };
        for list in ["containers", "initContainers", "ephemeralContainers"] {
            let (mounted, raw) = (with(json!({list: mount})), with(json!({list: device})));
            assert!(is_used(&mounted, "v") && is_used(&raw, "v") && !is_used(&raw, "w"), "{list}");
            for (pod, mode, wrong) in [
                (&mounted, None, None),
                (&mounted, Some("Filesystem"), None),
                (&mounted, Some("Block"), Some("volumeMounts")),
                (&raw, Some("Block"), None),
                (&raw, Some("Filesystem"), Some("volumeDevices")),
                (&raw, None, Some("volumeDevices")),
            ] {
                let found = mode_mismatch(pod, "v", Some(&pv(mode)));
                assert_eq!(found.as_ref().map(|(_, field)| *field), wrong, "{list} {mode:?}");
                let told = found.is_none_or(|(told, _)| told == mode.unwrap_or("Filesystem"));
                assert!(told, "{list} {mode:?}");
            }
        }
    }

    #[test]
    fn a_claim_counts_once_it_is_bound_and_while_it_stays() {
        let named = volume(json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}));
        let bound = json!({"metadata": {"name": "c"}, "spec": {"volumeName": "pv"}, "status": {"phase": "Bound"}});
        let with = |path: &str, value: Value| {
            let mut claim = bound.clone();
            *claim.pointer_mut(path).unwrap() = value;
            claim
        };
        let of = |claim: Value| {
            let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap();
            bound_to(&pod(), &named, Some(&claim), "c")
        };
        assert_eq!(of(bound.clone()), Ok("pv".into()));
        assert_eq!(of(with("/status/phase", json!("Pending"))), Err("PVC is not bound".into()));
        assert_eq!(of(with("/status", json!({}))), Err("PVC is not bound".into()));
        assert!(of(with("/spec/volumeName", json!(""))).unwrap_err().contains("VolumeName"));
        let going = json!({"name": "c", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(of(with("/metadata", going.clone())), Err("PVC is being deleted".into()));
        let mut kept = going;
        kept["finalizers"] = json!([PROTECTION]);
        assert_eq!(of(with("/metadata", kept)), Ok("pv".into()), "running pods keep theirs");
        assert!(bound_to(&pod(), &named, None, "c").unwrap_err().contains("\"c\" not found"));

        let made = volume(json!({"name": "v", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}));
        for (owner, ok) in [
            (
                json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u", "controller": true}),
                true,
            ),
            (
                json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "old", "controller": true}),
                false,
            ),
            (json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}), false),
        ] {
            let claim = with("/metadata", json!({"name": "p-v", "ownerReferences": [owner]}));
            let claim: PersistentVolumeClaim = serde_json::from_value(claim).unwrap();
            assert_eq!(bound_to(&pod(), &made, Some(&claim), "p-v").is_ok(), ok, "{claim:?}");
        }
    }

    #[test]
    fn a_volume_is_of_its_claim_and_of_a_kind_that_is_provided() {
        let of = |spec: Value| {
            let pv: PersistentVolume =
                serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap();
            backing(Some(&pv), "pv", "cu", true)
        };
        let with = |source: Value| {
            let mut spec = json!({"claimRef": {"uid": "cu"}, "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"], "volumeMode": "Filesystem"});
            spec.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
            spec
        };
        let Ok(Backing::Csi(csi)) = of(with(json!({"csi": {"driver": "d", "volumeHandle": "h"}})))
        else {
            panic!()
        };
        assert!(csi.read_only);
        let local = Backing::Local(LocalVolume {
            name: "pv".into(),
            path: "/x".into(),
            fs_type: Some("xfs".into()),
            options: vec!["noexec".into()],
            read_only: true,
        });
        let spec = json!({"local": {"path": "/x", "fsType": "xfs"}, "mountOptions": ["noexec"]});
        assert_eq!(of(with(spec)), Ok(local));
        let nfs = Backing::Nfs(NfsVolume {
            name: "pv".into(),
            server: "s".into(),
            path: "/".into(),
            options: vec!["hard".into()],
            read_only: true,
        });
        let spec = json!({"nfs": {"server": "s", "path": "/"}, "mountOptions": ["hard"]});
        assert_eq!(of(with(spec)), Ok(nfs));
        let spec = json!({"cinder": {"volumeID": "c"}});
        assert!(matches!(of(with(spec)), Ok(Backing::Csi(csi)) if csi.handle == "c"));
        let device = Backing::Device { name: "pv".into(), path: "/dev/x".into(), read_only: true };
        let spec = json!({"local": {"path": "/dev/x"}, "volumeMode": "Block"});
        assert_eq!(of(with(spec)), Ok(device));
        let spec = json!({"csi": {"driver": "d", "volumeHandle": "h"}, "volumeMode": "Block"});
        assert!(matches!(of(with(spec)), Ok(Backing::Csi(csi)) if csi.block));
        let Ok(Backing::HostPath(source, true)) = of(with(json!({"hostPath": {"path": "/x"}})))
        else {
            panic!()
        };
        assert_eq!(source.path, "/x");
        for (spec, words) in [
            (with(json!({"rbd": {"monitors": [], "image": "i"}})), "is of kind rbd"),
            (with(json!({"awsElasticBlockStore": {"volumeID": "aws://x"}})), "Invalid format"),
            (with(json!({})), "is of kind unknown"),
            (
                with(json!({"hostPath": {"path": "/x"}, "volumeMode": "Block"})),
                "no volumeMode Block",
            ),
            (
                with(json!({"local": {"path": "/x"}, "claimRef": {"uid": "other"}})),
                "does not point",
            ),
            (json!({"local": {"path": "/x"}}), "nil pv.Spec.ClaimRef"),
        ] {
            let reason = of(spec).unwrap_err();
            assert!(reason.contains(words), "{reason}");
        }
        assert!(backing(None, "pv", "cu", false).unwrap_err().contains("failed to fetch PV pv"));
    }
}
