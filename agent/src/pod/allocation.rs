//! What of the node a pod has been given, apart from what its spec asks for by now (KEP-1287). A
//! resize is taken up whole once it fits; until then the pod is worked on as if nobody had asked.
//! Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod, PodCondition, ResourceRequirements};
use serde::{Deserialize, Serialize};

use super::config::resources::PodSums;
use super::quantity::{ResourceList, amount, cpu_milli};
use super::spec::{init_containers, spec_of};

/// Condition of a resize that has not been taken up.
pub const PENDING: &str = "PodResizePending";
/// Condition of a resize that has been taken up and is being put into effect.
pub const IN_PROGRESS: &str = "PodResizeInProgress";

/// The resources that a pod may use. Survives restarts beside the pod's status.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// Of the pod as a whole, where it has such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<ResourceRequirements>,
    /// By container, init containers included.
    pub containers: BTreeMap<String, ResourceRequirements>,
}

fn all(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = spec_of(pod);
    init_containers(spec).iter().chain(&spec.containers)
}

/// Whether both are the same amounts of CPU and memory, the only ones that can be resized.
fn same(a: Option<&ResourceRequirements>, b: Option<&ResourceRequirements>) -> bool {
    let amounts = |list: Option<&ResourceList>| (cpu_milli(list), amount(list, "memory"));
    let both = |r: Option<&ResourceRequirements>| {
        let lists = r.map(|r| (r.requests.as_ref(), r.limits.as_ref())).unwrap_or_default();
        (amounts(lists.0), amounts(lists.1))
    };
    both(a) == both(b)
}

impl Allocation {
    /// What the spec asks for.
    pub fn asked(pod: &Pod) -> Self {
        Self {
            pod: spec_of(pod).resources.clone(),
            containers: all(pod)
                .map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default()))
                .collect(),
        }
    }

    /// Whether the spec asks for just this.
    pub fn is_asked_by(&self, pod: &Pod) -> bool {
        same(self.pod.as_ref(), spec_of(pod).resources.as_ref())
            && all(pod).all(|c| match self.containers.get(&c.name) {
                Some(own) => same(Some(own), c.resources.as_ref()),
                None => true,
            })
    }

    /// The pod as if its spec asked for this.
    pub fn in_place_of(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        if self.is_asked_by(pod) {
            return pod.clone();
        }
        let mut given = Pod::clone(pod);
        if let Some(spec) = &mut given.spec {
            spec.resources.clone_from(&self.pod);
            let inits = spec.init_containers.iter_mut().flatten();
            for container in inits.chain(&mut spec.containers) {
                if let Some(own) = self.containers.get(&container.name) {
                    container.resources = Some(own.clone());
                }
            }
        }
        Arc::new(given)
    }
}

/// Why a resize waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// `Deferred` or `Infeasible`.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Generation of the spec that asks.
    pub generation: Option<i64>,
}

impl Pending {
    /// What an earlier agent said.
    pub fn of(conditions: Option<&Vec<PodCondition>>) -> Option<Self> {
        let told = conditions?.iter().find(|c| c.type_ == PENDING)?;
        Some(Self {
            reason: told.reason.clone()?,
            message: told.message.clone().unwrap_or_default(),
            generation: told.observed_generation,
        })
    }
}

/// A resize that has been taken up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Generation of the spec that asked.
    pub generation: Option<i64>,
    /// What went wrong; it is tried again.
    pub error: Option<String>,
}

impl Progress {
    /// What an earlier agent had begun.
    pub fn of(conditions: Option<&Vec<PodCondition>>) -> Option<Self> {
        let told = conditions?.iter().find(|c| c.type_ == IN_PROGRESS)?;
        let error = told.message.clone().filter(|_| told.reason.as_deref() == Some("Error"));
        Some(Self { generation: told.observed_generation, error })
    }
}

/// In which order resizes that wait are looked at again: those first that need no more than the
/// pod has, then by priority, Guaranteed pods, and age.
pub fn rank(pod: &Pod, has: PodSums, asks: PodSums, guaranteed: bool) -> impl Ord + use<> {
    let more = asks.cpu > has.cpu || asks.memory > has.memory;
    let priority = spec_of(pod).priority.unwrap_or_default();
    let since = pod.status.as_ref().and_then(|s| s.conditions.as_ref()).and_then(|conditions| {
        let pending = conditions.iter().find(|c| c.type_ == PENDING)?;
        pending.last_transition_time.as_ref().map(|t| t.0)
    });
    (more, std::cmp::Reverse(priority), !guaranteed, since.is_none(), since)
}

/// An Event's message about a resize: `what`, and the resources that it is about as JSON.
pub fn summary(what: &str, pod: &Pod, generation: Option<i64>, error: &str) -> String {
    #[derive(Serialize)]
    struct Of<'a> {
        name: &'a str,
        resources: ResourceRequirements,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Summary<'a> {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        init_containers: Vec<Of<'a>>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        containers: Vec<Of<'a>>,
        generation: i64,
        #[serde(skip_serializing_if = "str::is_empty")]
        error: &'a str,
    }
    fn list(containers: &[Container]) -> Vec<Of<'_>> {
        let resources = |c: &Container| c.resources.clone().unwrap_or_default();
        containers.iter().map(|c| Of { name: &c.name, resources: resources(c) }).collect()
    }
    let spec = spec_of(pod);
    let summary = Summary {
        init_containers: list(init_containers(spec)),
        containers: list(&spec.containers),
        generation: generation.unwrap_or_default(),
        error,
    };
    match serde_json::to_string(&summary) {
        Ok(text) => format!("{what}: {text}"),
        Err(_) => what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    const SMALL: &str = r#"{"containers":[{"name":"c","resources":{"requests":{"cpu":"100m"}}}]}"#;
    const LARGE: &str = r#"{"containers":[{"name":"c","resources":{"requests":{"cpu":"1"}}}],
        "resources":{"limits":{"memory":"1Gi"}}}"#;

    #[test]
    fn what_is_given_stands_in_for_what_is_asked() {
        let (small, large) = (pod(SMALL), Arc::new(pod(LARGE)));
        let has = Allocation::asked(&small);
        assert!(has.is_asked_by(&small) && !has.is_asked_by(&large));
        let given = has.in_place_of(&large);
        assert_eq!(given.spec, small.spec);
        assert_eq!(given.metadata, large.metadata);
        let same = Allocation::asked(&large);
        assert!(Arc::ptr_eq(&same.in_place_of(&large), &large));
        // The same amounts, written otherwise.
        let other = pod(&LARGE.replace("\"1\"", "\"1000m\"").replace("1Gi", "1024Mi"));
        assert!(same.is_asked_by(&other));
        let read: Allocation =
            serde_json::from_str(&serde_json::to_string(&same).unwrap()).unwrap();
        assert_eq!(read, same);
    }

    #[test]
    fn events_carry_the_resources() {
        assert_eq!(
            summary("Pod resize started", &pod(SMALL), Some(3), ""),
            r#"Pod resize started: {"containers":[{"name":"c","resources":{"requests":{"cpu":"100m"}}}],"generation":3}"#
        );
    }

    #[test]
    fn what_shrinks_or_matters_more_comes_first() {
        let sums = |cpu| PodSums { cpu, ..PodSums::default() };
        let plain = pod(SMALL);
        let mut important = plain.clone();
        important.spec.as_mut().unwrap().priority = Some(5);
        let of = |pod: &Pod, asks, guaranteed| rank(pod, sums(100), sums(asks), guaranteed);
        assert!(of(&plain, 50, false) < of(&important, 200, false));
        assert!(of(&important, 200, false) < of(&plain, 200, true));
        assert!(of(&plain, 200, true) < of(&plain, 200, false));
    }
}
