//! Which pod goes first, and what it is told.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;

use super::{EvictionThreshold, Observations, Resource};
use crate::pod::quantity::{amount, bytes_text};
use crate::pod::spec::spec_of;

/// What one container uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContainerUsage {
    /// Working set, bytes.
    pub memory: u64,
    /// Writable layer and logs, bytes.
    pub disk: u64,
}

/// What one pod uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodUsage {
    /// Working set, bytes.
    pub memory: u64,
    /// On the file system that is short, bytes.
    pub disk: u64,
    /// On the file system that is short.
    pub inodes: u64,
    /// Processes.
    pub processes: u64,
    /// By container.
    pub containers: BTreeMap<String, ContainerUsage>,
}

/// A pod that may go.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The pod.
    pub pod: std::sync::Arc<Pod>,
    /// What it requests of the resource that is short, 0 where it cannot be requested.
    pub request: i64,
    /// What it uses; `None` where that is not known.
    pub usage: Option<PodUsage>,
}

/// Puts the candidates in the order in which they go: those of which nothing is known, those over
/// their requests, those of lower priority, those further over. Processes are not requested.
pub fn plan_victims(resource: Resource, candidates: &mut [Candidate]) {
    candidates.sort_by_key(|candidate| {
        let used = candidate.usage.as_ref().map(|usage| match resource {
            Resource::Memory => usage.memory,
            Resource::Disk => usage.disk,
            Resource::Inodes => usage.inodes,
            Resource::Pids => usage.processes,
        });
        let priority = spec_of(&candidate.pod).priority.unwrap_or(0);
        let over = used.map(|used| i128::from(used) - i128::from(candidate.request));
        let class = match over {
            _ if resource == Resource::Pids => 0,
            None => 0,
            Some(over) if over > 0 => 1,
            Some(_) => 2,
        };
        (class, priority, Reverse(over.unwrap_or(i128::MAX)))
    });
}

/// A number with the largest suffix of a power of 1000 that leaves a whole number.
fn count_text(count: u64) -> String {
    let mut rest = count;
    let mut suffix = "";
    for larger in ["k", "M", "G", "T", "P", "E"] {
        if rest == 0 || !rest.is_multiple_of(1000) {
            break;
        }
        rest /= 1000;
        suffix = larger;
    }
    format!("{rest}{suffix}")
}

fn text(resource: Resource, amount: u64) -> String {
    match resource {
        Resource::Memory | Resource::Disk => {
            bytes_text(i64::try_from(amount).unwrap_or(i64::MAX)).0
        }
        Resource::Inodes | Resource::Pids => count_text(amount),
    }
}

/// Kubelet's words for a pod that goes for `threshold`.
pub fn words(
    threshold: &EvictionThreshold,
    observed: &Observations,
    candidate: &Candidate,
) -> String {
    let resource = threshold.signal.resource();
    let mut said = format!("The node was low on resource: {}. ", resource.name());
    if let Some((left, capacity)) = observed.get(&threshold.signal) {
        let (wanted, left) = (text(resource, threshold.value.of(*capacity)), text(resource, *left));
        said += &format!("Threshold quantity: {wanted}, available: {left}. ");
    }
    let Some(usage) = &candidate.usage else { return said };
    let spec = spec_of(&candidate.pod);
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let Some(used) = usage.containers.get(&container.name) else { continue };
        let used = match resource {
            Resource::Memory => used.memory,
            Resource::Disk => used.disk,
            Resource::Inodes | Resource::Pids => continue,
        };
        let requests = container.resources.as_ref().and_then(|r| r.requests.as_ref());
        let request = amount(requests, resource.name()).unwrap_or(0);
        if i128::from(used) > i128::from(request) {
            said += &format!(
                "Container {} was using {}, request is {}, has larger consumption of {}. ",
                container.name,
                text(resource, used),
                bytes_text(request).0,
                resource.name()
            );
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::config::Threshold;
    use crate::eviction::Signal;
    use crate::pod::testing::pod;

    fn candidate(priority: i32, request: i64, memory: Option<u64>) -> Candidate {
        let spec = format!(r#"{{"priority":{priority},"containers":[]}}"#);
        let usage = memory.map(|memory| PodUsage {
            memory,
            disk: memory,
            processes: memory,
            ..PodUsage::default()
        });
        Candidate { pod: Arc::new(pod(&spec)), request, usage }
    }

    #[test]
    fn the_one_over_its_requests_goes_then_the_least_important_then_the_largest() {
        let within = candidate(0, 100, Some(90));
        let over = candidate(10, 100, Some(110));
        let important = candidate(20, 0, Some(900));
        let further = candidate(10, 50, Some(100));
        let unknown = candidate(30, 0, None);
        let order = |resource| {
            let mut all = [&within, &over, &important, &further, &unknown].map(Clone::clone);
            plan_victims(resource, &mut all);
            all.map(|c| (spec_of(&c.pod).priority.unwrap(), c.request))
        };
        let by_requests = [(30, 0), (10, 50), (10, 100), (20, 0), (0, 100)];
        assert_eq!(order(Resource::Memory), by_requests);
        assert_eq!(order(Resource::Disk), by_requests);
        let by_priority = [(0, 100), (10, 50), (10, 100), (20, 0), (30, 0)];
        assert_eq!(order(Resource::Pids), by_priority);
    }

    #[test]
    fn a_pod_is_told_what_was_short_and_which_containers_used_more_than_they_asked_for() {
        let spec = r#"{"containers":[{"name":"a","image":"i"},
            {"name":"b","image":"i","resources":{"requests":{"memory":"2Mi"}}},
            {"name":"c","image":"i","resources":{"requests":{"memory":"4Mi"}}}]}"#;
        let used = |memory| ContainerUsage { memory, disk: 0 };
        let containers = [("a", 1 << 10), ("b", 3 << 20), ("c", 4 << 20)];
        let usage = PodUsage {
            containers: containers.map(|(name, m)| (name.to_owned(), used(m))).into(),
            ..PodUsage::default()
        };
        let candidate = Candidate { pod: Arc::new(pod(spec)), request: 0, usage: Some(usage) };
        let of = |signal, value| EvictionThreshold {
            signal,
            value,
            grace: Duration::ZERO,
            min_reclaim: None,
        };
        let observed = [(Signal::Memory, (50 << 20, 1 << 30)), (Signal::Pids, (4000, 30_000))];
        assert_eq!(
            words(
                &of(Signal::Memory, Threshold::Absolute(100 << 20)),
                &observed.into(),
                &candidate
            ),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. \
             Container a was using 1Ki, request is 0, has larger consumption of memory. \
             Container b was using 3Mi, request is 2Mi, has larger consumption of memory. "
        );
        assert_eq!(
            words(&of(Signal::Pids, Threshold::Share(0.5)), &observed.into(), &candidate),
            "The node was low on resource: pids. Threshold quantity: 15k, available: 4k. "
        );
    }
}
