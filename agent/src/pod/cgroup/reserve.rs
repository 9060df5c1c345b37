//! Memory that pods requested is kept from pods of lower classes (`qosReserved`): the classes' cgroups
//! are bounded by what is left.
//!
//! A bound is never below what is in use: nobody is ended because another pod came.

use std::collections::HashMap;
use std::sync::PoisonError;

use cgroups_rs::fs::{Cgroup, Resources};

use super::fs::{Chain, KernelCgroups, blocking};
use super::{CgroupError, usage};
use crate::ids::PodUid;
use crate::pod::config::resources::PodLimits;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QosReserve {
    /// Per cent of what is requested.
    pub percent: i64,
    /// Memory that all pods may use, bytes.
    pub allocatable: i64,
}

/// What pods with requests have requested: whether the pod is Guaranteed, and bytes.
pub(super) type Requests = HashMap<PodUid, (bool, i64)>;

impl QosReserve {
    /// Bytes that burstable pods, and those of best effort, may use together.
    fn plan(self, requests: &Requests) -> [(&'static str, i64); 2] {
        let kept = |guaranteed| {
            let of_class = requests.values().filter(|(class, _)| *class == guaranteed);
            let sum: i64 = of_class.map(|(_, bytes)| *bytes).fold(0, i64::saturating_add);
            i64::try_from(i128::from(sum) * i128::from(self.percent) / 100).unwrap_or(i64::MAX)
        };
        let burstable = self.allocatable.saturating_sub(kept(true));
        let best_effort = burstable.saturating_sub(kept(false));
        [("burstable", burstable.max(0)), ("besteffort", best_effort.max(0))]
    }
}

impl KernelCgroups {
    /// Counts what a pod requests, or takes it out.
    pub(super) fn count_request(&self, uid: &PodUid, of: Option<(&str, PodLimits)>) {
        let mut all = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner);
        match of {
            Some((qos, limits)) if qos != "BestEffort" => {
                all.insert(uid.clone(), (qos == "Guaranteed", limits.memory_request));
            }
            _ => {
                all.remove(uid);
            }
        }
    }

    /// Bounds the classes by what is requested above them; one that cannot be is bounded later.
    pub(super) async fn bound_classes(&self) {
        let Some(reserve) = self.0.reserve else { return };
        let plan = {
            let all = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner);
            reserve.plan(&all)
        };
        for (class, bytes) in plan {
            if let Err(error) = self.bound_class(class, bytes).await {
                tracing::warn!(%error, "requested memory is not kept from a class of pods");
            }
        }
    }

    async fn bound_class(&self, class: &'static str, bytes: i64) -> Result<(), CgroupError> {
        let path = vec!["kubepods".to_owned(), class.to_owned()];
        let folder = self.0.folder(&path);
        let Some(used) = usage::Mounts::find().read(&folder) else { return Ok(()) };
        let bytes = bytes.max(i64::try_from(used.memory).unwrap_or(i64::MAX));
        if let Some(slices) = &self.0.slices {
            slices.bound_class(&path, bytes).await?;
        }
        blocking(&self.0, move |inner| {
            let cgroup = Cgroup::load(inner.hierarchy(), &folder);
            let mut resources = Resources::default();
            resources.memory.memory_hard_limit = Some(bytes);
            cgroup.apply(&resources).map_err(|e| CgroupError {
                operation: "set limits of",
                path: folder,
                cause: Chain(&e).to_string(),
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node_context::NodeContext;
    use crate::pod::cgroup::PodCgroups;

    #[test]
    fn a_class_has_what_those_above_it_did_not_request() {
        let reserve = |percent| QosReserve { percent, allocatable: 1000 };
        let pods = [("g", (true, 300)), ("h", (true, 100)), ("b", (false, 200))];
        let all: Requests = pods.map(|(uid, of)| (PodUid::from(uid), of)).into();
        assert_eq!(reserve(50).plan(&all), [("burstable", 800), ("besteffort", 700)]);
        assert_eq!(reserve(100).plan(&all), [("burstable", 600), ("besteffort", 400)]);
        assert_eq!(reserve(0).plan(&all), [("burstable", 1000), ("besteffort", 1000)]);
        let much: Requests = [(PodUid::from("g"), (true, 5000))].into();
        assert_eq!(reserve(100).plan(&much), [("burstable", 0), ("besteffort", 0)]);
    }

    /// Makes real cgroups, in a subtree of its own.
    #[tokio::test]
    async fn classes_are_bounded_as_pods_come_and_go() {
        let root = format!("/longshore-test-reserve-{}", std::process::id());
        let reserve = QosReserve { percent: 50, allocatable: 1 << 30 };
        let node = NodeContext {
            cgroup_root: root.clone(),
            qos_reserve: Some(reserve),
            ..NodeContext::new("n", vec![])
        };
        let cgroups = KernelCgroups::new(&node);
        let limit = |class: &str| {
            let folder = format!("{}/kubepods/{class}", root.trim_start_matches('/'));
            usage::Mounts::find().read(&folder).unwrap().memory_limit
        };
        let asks = |memory_request| PodLimits { memory_request, ..PodLimits::default() };
        let (guaranteed, burstable, other) =
            (PodUid::from("1"), PodUid::from("2"), PodUid::from("3"));
        cgroups.ensure(&other, "BestEffort", asks(0)).await.unwrap();
        assert_eq!(limit("besteffort"), Some(1 << 30));
        cgroups.ensure(&burstable, "Burstable", asks(256 << 20)).await.unwrap();
        cgroups.ensure(&guaranteed, "Guaranteed", asks(512 << 20)).await.unwrap();
        assert_eq!(limit("burstable"), Some(768 << 20));
        assert_eq!(limit("besteffort"), Some(640 << 20));
        cgroups.remove(&guaranteed).await.unwrap();
        assert_eq!(limit("burstable"), Some(1 << 30));
        for uid in [&burstable, &other] {
            cgroups.remove(uid).await.unwrap();
        }
        cgroups.remove_root();
    }
}
