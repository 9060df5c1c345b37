//! `persistentVolumeClaim` and `ephemeral`: from the claim to the PersistentVolume behind it. Pure.

use k8s_openapi::api::core::v1::{
    Container, HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, Volume,
};

use crate::csi::CsiVolume;
use crate::ids::PodUid;

/// Keeps a claim that a pod uses from going.
const PROTECTION: &str = "kubernetes.io/pvc-protection";

/// What is behind a claim.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Backing {
    /// A volume of a CSI driver.
    Csi(Box<CsiVolume>),
    /// A folder of this node, by the PersistentVolume's name.
    Local { name: String, path: String, options: Vec<String>, read_only: bool },
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
    if spec.volume_mode.as_deref() == Some("Block") {
        return Err(format!(
            "volume {name} has volumeMode Block, which this node does not provide; use \
             volumeMode Filesystem"
        ));
    }
    if let Some(volume) = CsiVolume::of(pv, read_only) {
        return Ok(Backing::Csi(Box::new(volume)));
    }
    if let Some(local) = spec.local {
        let options = spec.mount_options.unwrap_or_default();
        return Ok(Backing::Local { name: name.to_owned(), path: local.path, options, read_only });
    }
    if let Some(source) = spec.host_path {
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
         provide; use csi, local or hostPath"
    ))
}

/// Whether any container of the pod mounts the volume `name`: a claim that none mounts is left alone.
pub(super) fn is_used(pod: &Pod, name: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let mounts = |container: &Container| {
        container.volume_mounts.iter().flatten().any(|mount| mount.name == name)
    };
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(mounts)
        || ephemeral.flat_map(|e| e.volume_mounts.iter().flatten()).any(|m| m.name == name)
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
        let local = Backing::Local {
            name: "pv".into(),
            path: "/x".into(),
            options: vec!["noexec".into()],
            read_only: true,
        };
        let spec = with(json!({"local": {"path": "/x"}, "mountOptions": ["noexec"]}));
        assert_eq!(of(spec), Ok(local));
        let Ok(Backing::HostPath(source, true)) = of(with(json!({"hostPath": {"path": "/x"}})))
        else {
            panic!()
        };
        assert_eq!(source.path, "/x");
        for (spec, words) in [
            (with(json!({"nfs": {"server": "s", "path": "/"}})), "is of kind nfs"),
            (with(json!({})), "is of kind unknown"),
            (with(json!({"local": {"path": "/x"}, "volumeMode": "Block"})), "volumeMode Block"),
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
