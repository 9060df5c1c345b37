//! Volumes that grow while they are used: what the node has to do of it, and what the claim then says.
//! Pure.
//!
//! The controller makes the volume larger, writes the new size into the PersistentVolume, and says in
//! the claim's `allocatedResourceStatuses` that the node shall go on (KEP-1790). The node has the driver
//! make the file system larger, and says in the claim how large it is now.

use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimCondition, PersistentVolumeClaimStatus,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

use crate::pod::quantity;

const STORAGE: &str = "storage";
const PENDING: &str = "NodeResizePending";
const IN_PROGRESS: &str = "NodeResizeInProgress";
const INFEASIBLE: &str = "NodeResizeInfeasible";
const ERROR: &str = "NodeResizeError";
/// Conditions about a change of size.
const CONDITIONS: [&str; 4] =
    ["Resizing", "FileSystemResizePending", "ControllerResizeError", ERROR];

/// A volume that shall grow.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Growth {
    /// To how many bytes.
    pub(super) bytes: i64,
    /// The same as the PersistentVolume says it.
    size: Quantity,
}

/// Whether the volume of `claim`, whose PersistentVolume has `size`, shall grow here.
pub(super) fn growth(claim: &PersistentVolumeClaim, size: Option<&Quantity>) -> Option<Growth> {
    let size = size?;
    let status = claim.status.as_ref()?;
    let asked = status.allocated_resource_statuses.as_ref().and_then(|all| all.get(STORAGE));
    if !asked.is_some_and(|asked| asked == PENDING || asked == IN_PROGRESS) {
        return None;
    }
    let bytes = quantity::value(size)?;
    let now = status.capacity.as_ref().and_then(|all| all.get(STORAGE));
    let larger = now.and_then(quantity::value).is_none_or(|now| now < bytes);
    (larger && bytes > 0).then(|| Growth { bytes, size: size.clone() })
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome<'a> {
    /// It begins.
    Begun,
    /// It is done.
    Grown,
    /// It failed, with the driver's words, and is tried again.
    Failed(&'a str),
    /// It failed for good: the controller has to find another size.
    Infeasible(&'a str),
}

/// The merge patch of the claim's status that tells of `outcome`; `None` if it says so already.
pub(super) fn status_patch(
    claim: &PersistentVolumeClaim,
    growth: &Growth,
    outcome: Outcome<'_>,
    now: jiff::Timestamp,
) -> Option<Value> {
    let none = PersistentVolumeClaimStatus::default();
    let status = claim.status.as_ref().unwrap_or(&none);
    let before = status.conditions.as_deref().unwrap_or_default();
    let told = status.allocated_resource_statuses.as_ref().and_then(|all| all.get(STORAGE));
    let of_size = |c: &PersistentVolumeClaimCondition| CONDITIONS.contains(&c.type_.as_str());
    let failed = |reason: &str| {
        let mut all: Vec<_> = before.iter().filter(|c| c.type_ != ERROR).cloned().collect();
        all.push(PersistentVolumeClaimCondition {
            type_: ERROR.into(),
            status: "True".into(),
            message: Some(format!("failed to expand pvc with {reason}")),
            last_transition_time: Some(Time(now)),
            ..PersistentVolumeClaimCondition::default()
        });
        all
    };
    let same = |all: &[PersistentVolumeClaimCondition]| {
        let words = |all: &[PersistentVolumeClaimCondition]| -> Vec<_> {
            all.iter().map(|c| (c.type_.clone(), c.message.clone())).collect()
        };
        words(all) == words(before)
    };
    let patch = match outcome {
        Outcome::Begun => {
            if told.is_some_and(|told| told == IN_PROGRESS) {
                return None;
            }
            json!({"allocatedResourceStatuses": {STORAGE: IN_PROGRESS}})
        }
        Outcome::Grown => {
            let left: Vec<_> = before.iter().filter(|c| !of_size(c)).cloned().collect();
            json!({"capacity": {STORAGE: growth.size}, "allocatedResourceStatuses": {STORAGE: null},
                "conditions": left})
        }
        Outcome::Failed(reason) => {
            let all = failed(reason);
            if same(&all) {
                return None;
            }
            json!({"conditions": all})
        }
        Outcome::Infeasible(reason) => {
            json!({"allocatedResourceStatuses": {STORAGE: INFEASIBLE}, "conditions": failed(reason)})
        }
    };
    Some(json!({"status": patch}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(status: Value) -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": {"name": "c"}, "status": status})).unwrap()
    }

    fn asked(by: &str) -> PersistentVolumeClaim {
        claim(json!({"capacity": {"storage": "1Gi"}, "allocatedResourceStatuses": {"storage": by},
            "conditions": [{"type": "FileSystemResizePending", "status": "True"},
                {"type": "Other", "status": "True"}]}))
    }

    #[test]
    fn a_volume_grows_when_the_controller_leaves_it_to_the_node() {
        let two = Quantity("2Gi".into());
        let of = |claim: &PersistentVolumeClaim, size: &str| {
            growth(claim, Some(&Quantity(size.into()))).map(|growth| growth.bytes)
        };
        assert_eq!(of(&asked(PENDING), "2Gi"), Some(2 << 30));
        assert_eq!(of(&asked(IN_PROGRESS), "2Gi"), Some(2 << 30), "an earlier agent began");
        assert_eq!(of(&asked(PENDING), "1Gi"), None);
        for other in ["ControllerResizeInProgress", INFEASIBLE] {
            assert_eq!(of(&asked(other), "2Gi"), None, "{other}");
        }
        assert_eq!(of(&claim(json!({"capacity": {"storage": "1Gi"}})), "2Gi"), None);
        assert_eq!(of(&asked(PENDING), "odd"), None);
        assert_eq!(growth(&claim(Value::Null), Some(&two)), None);
        assert_eq!(growth(&asked(PENDING), None), None);
    }

    #[test]
    fn the_claim_says_how_it_went() {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let pending = asked(PENDING);
        let growth = growth(&pending, Some(&Quantity("2Gi".into()))).unwrap();
        let patch =
            |claim: &PersistentVolumeClaim, outcome| status_patch(claim, &growth, outcome, now);
        let begun = patch(&pending, Outcome::Begun).unwrap();
        assert_eq!(
            begun,
            json!({"status": {"allocatedResourceStatuses": {"storage": IN_PROGRESS}}})
        );
        assert_eq!(patch(&asked(IN_PROGRESS), Outcome::Begun), None, "it says so already");
        let grown = &patch(&pending, Outcome::Grown).unwrap()["status"];
        assert_eq!(grown["capacity"], json!({"storage": "2Gi"}));
        assert_eq!(grown["allocatedResourceStatuses"], json!({"storage": null}));
        assert_eq!(grown["conditions"].as_array().unwrap().len(), 1, "those of others stay");

        let failed = patch(&pending, Outcome::Failed("no room")).unwrap();
        let conditions = failed["status"]["conditions"].clone();
        assert_eq!(conditions.as_array().unwrap().len(), 3);
        assert_eq!(conditions[2]["message"], "failed to expand pvc with no room");
        let mut told = pending;
        told.status.as_mut().unwrap().conditions = serde_json::from_value(conditions).unwrap();
        assert_eq!(patch(&told, Outcome::Failed("no room")), None, "nothing twice");
        assert!(patch(&told, Outcome::Failed("other")).is_some());
        let infeasible = &patch(&told, Outcome::Infeasible("no room")).unwrap()["status"];
        assert_eq!(infeasible["allocatedResourceStatuses"], json!({"storage": INFEASIBLE}));
    }
}
