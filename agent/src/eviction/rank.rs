//! Which pod goes first, and what it is told.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;

use super::{EvictionThreshold, Observations, Resource};
use crate::pod::quantity::{Notation, ResourceList, amount};
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
    /// What it requests of local disk, bytes.
    pub disk_request: i64,
    /// What it uses; `None` where that is not known.
    pub usage: Option<PodUsage>,
}

/// Puts the candidates in the order in which they go: those of which nothing is known, those over
/// their requests, those of lower priority, those further over. Processes are not requested, nor are
/// inodes; but whoever requests local disk goes after those who did not, as under kubelet.
pub fn plan_victims(resource: Resource, candidates: &mut [Candidate]) {
    candidates.sort_by_key(|candidate| {
        let used = candidate.usage.as_ref().map(|usage| match resource {
            Resource::Memory => usage.memory,
            Resource::Disk => usage.disk,
            Resource::Inodes => usage.inodes,
            Resource::Pids => usage.processes,
        });
        let priority = spec_of(&candidate.pod).priority.unwrap_or(0);
        let beyond = |request: i64| used.map(|used| i128::from(used) - i128::from(request));
        let class = match beyond(candidate.request) {
            _ if resource == Resource::Pids => 0,
            None => 0,
            Some(over) if over > 0 => 1,
            Some(_) => 2,
        };
        let over = match resource {
            Resource::Inodes => beyond(candidate.disk_request),
            _ => beyond(candidate.request),
        };
        (class, priority, Reverse(over.unwrap_or(i128::MAX)))
    });
}

/// What a pod that goes is told, and annotations that tell programs the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// For people.
    pub message: String,
    /// On the Event.
    pub annotations: BTreeMap<String, String>,
}

fn text(resource: Resource, amount: u64) -> String {
    match resource {
        Resource::Memory | Resource::Disk => Notation::Binary.text(amount),
        Resource::Inodes | Resource::Pids => Notation::Decimal.text(amount),
    }
}

/// What `list` requests of `resource`, and as it is written.
fn requested(list: Option<&ResourceList>, resource: Resource) -> Option<(u64, String)> {
    let written = list?.get(resource.name())?;
    let amount = u64::try_from(amount(list, resource.name())?).ok()?;
    Some((amount, Notation::of(&written.0).text(amount)))
}

/// Kubelet's words for a pod that goes for `threshold`.
pub fn words(
    threshold: &EvictionThreshold,
    observed: &Observations,
    candidate: &Candidate,
) -> Words {
    let resource = threshold.signal.resource();
    let mut said = format!("The node was low on resource: {}. ", resource.name());
    if let Some((left, capacity)) = observed.get(&threshold.signal) {
        let wanted = threshold.notation.text(threshold.value.of(*capacity));
        let left = text(resource, *left);
        said += &format!("Threshold quantity: {wanted}, available: {left}. ");
    }
    let mut annotations = BTreeMap::new();
    let mut annotate = |name: &str, value: String| annotations.insert(name.to_owned(), value);
    let Some(usage) = &candidate.usage else {
        return Words { message: said, ..Words::default() };
    };
    let larger = |what: &str, name: &str, used: &str, request: &str| {
        let resource = resource.name();
        format!(
            "{what} {name} was using {used}, request is {request}, has larger consumption of {resource}. "
        )
    };
    let spec = spec_of(&candidate.pod);
    let of_pod = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    if resource == Resource::Memory
        && let Some((_, request)) = requested(of_pod, resource)
    {
        let name = candidate.pod.metadata.name.clone().unwrap_or_default();
        let used = text(resource, usage.memory);
        said += &larger("Pod", &name, &used, &request);
        annotate("offending_pod", name);
        annotate("offending_pod_usage", used);
    }
    let (mut names, mut usages) = (Vec::new(), Vec::new());
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let Some(used) = usage.containers.get(&container.name) else { continue };
        let used = match resource {
            Resource::Memory => used.memory,
            Resource::Disk => used.disk,
            Resource::Inodes | Resource::Pids => continue,
        };
        let requests = container.resources.as_ref().and_then(|r| r.requests.as_ref());
        let (request, written) = requested(requests, resource).unwrap_or((0, "0".to_owned()));
        if used > request {
            let used = text(resource, used);
            said += &larger("Container", &container.name, &used, &written);
            names.push(container.name.as_str());
            usages.push(used);
        }
    }
    annotate("offending_containers", names.join(","));
    annotate("offending_containers_usage", usages.join(","));
    annotate("starved_resource", resource.name().to_owned());
    Words { message: said, annotations }
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
        Candidate { pod: Arc::new(pod(&spec)), request, disk_request: 0, usage }
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
    fn where_inodes_are_short_those_go_last_that_request_local_disk() {
        let of = |inodes, disk_request| {
            let usage = PodUsage { inodes, ..PodUsage::default() };
            Candidate { usage: Some(usage), disk_request, ..candidate(0, 0, None) }
        };
        let mut all = [of(90, 1 << 20), of(10, 0), of(50, 0)];
        plan_victims(Resource::Inodes, &mut all);
        assert_eq!(all.map(|c| c.usage.unwrap().inodes), [50, 10, 90]);
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
        let candidate =
            Candidate { pod: Arc::new(pod(spec)), request: 0, disk_request: 0, usage: Some(usage) };
        let of = |signal, value| EvictionThreshold {
            signal,
            value,
            grace: Duration::ZERO,
            min_reclaim: None,
            notation: Notation::Binary,
        };
        let observed = [(Signal::Memory, (50 << 20, 1 << 30)), (Signal::Pids, (4000, 30_000))];
        let told = words(
            &of(Signal::Memory, Threshold::Absolute(100 << 20)),
            &observed.into(),
            &candidate,
        );
        assert_eq!(
            told.message,
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. \
             Container a was using 1Ki, request is 0, has larger consumption of memory. \
             Container b was using 3Mi, request is 2Mi, has larger consumption of memory. "
        );
        let annotations = [
            ("offending_containers", "a,b"),
            ("offending_containers_usage", "1Ki,3Mi"),
            ("starved_resource", "memory"),
        ];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(told.annotations, annotations.into());
        // A share is told by powers of 1024, whatever it is a share of.
        assert_eq!(
            words(&of(Signal::Pids, Threshold::Share(0.5)), &observed.into(), &candidate).message,
            "The node was low on resource: pids. Threshold quantity: 15000, available: 4k. "
        );
        let unknown = Candidate { usage: None, ..candidate.clone() };
        assert_eq!(
            words(&of(Signal::Memory, Threshold::Absolute(1)), &[].into(), &unknown),
            Words { message: "The node was low on resource: memory. ".into(), ..Words::default() }
        );
    }

    #[test]
    fn a_pod_that_requests_memory_as_a_whole_is_told_of_that() {
        let spec = r#"{"resources":{"requests":{"memory":"100M"}},
            "containers":[{"name":"a","image":"i"}]}"#;
        let mut pod = pod(spec);
        pod.metadata.name = Some("p".into());
        let usage = PodUsage { memory: 1 << 30, ..PodUsage::default() };
        let candidate =
            Candidate { pod: Arc::new(pod), usage: Some(usage), ..candidate(0, 0, None) };
        let threshold = EvictionThreshold {
            signal: Signal::PodsMemory,
            value: Threshold::Absolute(1),
            grace: Duration::ZERO,
            min_reclaim: None,
            notation: Notation::Decimal,
        };
        let told = words(&threshold, &[].into(), &candidate);
        assert_eq!(
            told.message,
            "The node was low on resource: memory. \
             Pod p was using 1Gi, request is 100M, has larger consumption of memory. "
        );
        assert_eq!(told.annotations["offending_pod_usage"], "1Gi");
        assert_eq!(told.annotations["offending_containers"], "");
    }
}
