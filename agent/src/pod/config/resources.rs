//! Requests and limits as the kernel's numbers: CPU shares and quota, memory limits, OOM scores.

use cri_shim::api::{HugepageLimit, LinuxContainerResources};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use crate::node_context::NodeContext;
use crate::pod::qos::qos_class;
use crate::pod::quantity::{amount, cpu_milli, value};
use crate::pod::spec::{init_containers, is_sidecar, spec_of};

/// Bounds of cgroup v1 `cpu.shares`.
const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
/// Smallest CFS quota that the kernel takes, in microseconds.
const MIN_QUOTA_US: i64 = 1000;
/// Priority from which a pod is critical to its node (`system-node-critical`).
const NODE_CRITICAL: i32 = 2_000_001_000;

/// CPU shares for a request in milli-CPUs.
pub fn cpu_shares(milli: i64) -> i64 {
    if milli <= 0 { MIN_SHARES } else { (milli * 1024 / 1000).clamp(MIN_SHARES, MAX_SHARES) }
}

/// CFS quota in microseconds for a limit in milli-CPUs; 0 is none.
pub fn cpu_quota(milli: i64, period_us: u64) -> i64 {
    if milli <= 0 {
        return 0;
    }
    let period = i64::try_from(period_us).unwrap_or(100_000);
    (milli.saturating_mul(period) / 1000).max(MIN_QUOTA_US)
}

/// The CPU request in milli-CPUs: a limit alone is also the request.
fn cpu_request(resources: Option<&ResourceRequirements>) -> i64 {
    let requests = resources.and_then(|r| r.requests.as_ref());
    let limits = resources.and_then(|r| r.limits.as_ref());
    cpu_milli(requests).or_else(|| cpu_milli(limits)).unwrap_or(0)
}

fn memory_request(resources: Option<&ResourceRequirements>) -> i64 {
    let requests = resources.and_then(|r| r.requests.as_ref());
    let limits = resources.and_then(|r| r.limits.as_ref());
    amount(requests, "memory").or_else(|| amount(limits, "memory")).unwrap_or(0)
}

/// `oom_score_adj` of a container (KEP-less, as documented under "Node out of memory behavior"):
/// what asked for much of the node's memory is killed last among the burstable.
pub fn oom_score_adj(pod: &Pod, container: &Container, capacity: u64) -> i64 {
    if spec_of(pod).priority.is_some_and(|p| p >= NODE_CRITICAL) {
        return -997;
    }
    match qos_class(pod) {
        "Guaranteed" => return -997,
        "BestEffort" => return 1000,
        _ => {}
    }
    let capacity = i64::try_from(capacity).unwrap_or(i64::MAX);
    let score = |request: i64| {
        if capacity == 0 {
            return 999;
        }
        let share = i128::from(request) * 1000 / i128::from(capacity);
        (1000 - i64::try_from(share).unwrap_or(1000)).clamp(3, 999)
    };
    let own = score(memory_request(container.resources.as_ref()));
    let spec = spec_of(pod);
    let sidecar = init_containers(spec).iter().any(|c| c.name == container.name && is_sidecar(c));
    if !sidecar {
        return own;
    }
    // A sidecar is not killed before the containers it serves.
    let lowest = spec.containers.iter().map(|c| score(memory_request(c.resources.as_ref()))).min();
    lowest.map_or(own, |l| own.min(l))
}

/// Resources of one container. `unified` is whether the node has cgroup v2.
pub fn container_resources(
    pod: &Pod,
    container: &Container,
    node: &NodeContext,
    unified: bool,
) -> LinuxContainerResources {
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|r| r.limits.as_ref());
    let mut linux = LinuxContainerResources {
        cpu_shares: cpu_shares(cpu_request(resources)),
        memory_limit_in_bytes: amount(limits, "memory").unwrap_or(0),
        oom_score_adj: oom_score_adj(pod, container, node.capacity_memory),
        ..Default::default()
    };
    if node.cpu_cfs_quota {
        linux.cpu_quota = cpu_quota(cpu_milli(limits).unwrap_or(0), node.cpu_cfs_period_us);
        linux.cpu_period = i64::try_from(node.cpu_cfs_period_us).unwrap_or(100_000);
    }
    for (name, quantity) in limits.into_iter().flatten() {
        if let Some(size) = name.strip_prefix("hugepages-")
            && let Some(limit) = value(quantity).and_then(|v| u64::try_from(v).ok())
        {
            linux.hugepage_limits.push(HugepageLimit { page_size: page_size(size), limit });
        }
    }
    if unified {
        // The kernel ends the container as a whole; half a container helps nobody.
        linux.unified.insert("memory.oom.group".into(), "1".into());
        linux.memory_swap_limit_in_bytes = linux.memory_limit_in_bytes;
    }
    linux
}

/// `2Mi` as the kernel writes it: `2MB`.
fn page_size(size: &str) -> String {
    format!("{}B", size.strip_suffix('i').unwrap_or(size))
}

/// Limits of a pod's cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodLimits {
    /// CPU shares.
    pub cpu_shares: i64,
    /// CFS quota in microseconds; `None` where a container has no CPU limit.
    pub cpu_quota: Option<i64>,
    /// Bytes; `None` where a container has no memory limit.
    pub memory: Option<i64>,
}

/// Sums over the pod as the scheduler counts them: containers and sidecars together, or the
/// largest step of initialization, and the overhead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodSums {
    /// Milli-CPUs.
    pub cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Bytes.
    pub ephemeral: i64,
}

fn fold(pod: &Pod, of: impl Fn(&Container) -> i64, overhead: i64) -> i64 {
    let spec = spec_of(pod);
    let mut sidecars: i64 = 0;
    let mut peak: i64 = 0;
    for c in init_containers(spec) {
        if is_sidecar(c) {
            sidecars = sidecars.saturating_add(of(c));
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.saturating_add(of(c)));
        }
    }
    let mains: i64 = spec.containers.iter().map(&of).fold(sidecars, i64::saturating_add);
    mains.max(peak).saturating_add(overhead)
}

/// What the pod requests.
pub fn pod_requests(pod: &Pod) -> PodSums {
    let spec = spec_of(pod);
    let over = spec.overhead.as_ref();
    let own = spec.resources.as_ref();
    let requests = |c: &Container| c.resources.clone();
    let mut sums = PodSums {
        cpu: fold(pod, |c| cpu_request(requests(c).as_ref()), cpu_milli(over).unwrap_or(0)),
        memory: fold(
            pod,
            |c| memory_request(requests(c).as_ref()),
            amount(over, "memory").unwrap_or(0),
        ),
        ephemeral: fold(
            pod,
            |c| {
                let r = c.resources.as_ref().and_then(|r| r.requests.as_ref());
                amount(r, "ephemeral-storage").unwrap_or(0)
            },
            amount(over, "ephemeral-storage").unwrap_or(0),
        ),
    };
    if let Some(own) = own {
        let list = own.requests.as_ref().or(own.limits.as_ref());
        if let Some(cpu) = cpu_milli(list) {
            sums.cpu = cpu + cpu_milli(over).unwrap_or(0);
        }
        if let Some(memory) = amount(list, "memory") {
            sums.memory = memory + amount(over, "memory").unwrap_or(0);
        }
    }
    sums
}

/// Limits of the pod's own cgroup: a limit holds for the pod only where every container has one.
pub fn pod_limits(pod: &Pod, node: &NodeContext) -> PodLimits {
    let spec = spec_of(pod);
    let all = || spec.containers.iter().chain(init_containers(spec));
    let limit = |resource: &str| {
        if let Some(own) = spec.resources.as_ref().and_then(|r| r.limits.as_ref()) {
            let own =
                if resource == "cpu" { cpu_milli(Some(own)) } else { amount(Some(own), resource) };
            if own.is_some() {
                return own;
            }
        }
        let of = |c: &Container| {
            let limits = c.resources.as_ref().and_then(|r| r.limits.as_ref());
            if resource == "cpu" { cpu_milli(limits) } else { amount(limits, resource) }
                .filter(|v| *v > 0)
        };
        if !all().all(|c| of(c).is_some()) {
            return None;
        }
        let over = spec.overhead.as_ref();
        let over = if resource == "cpu" { cpu_milli(over) } else { amount(over, resource) };
        Some(fold(pod, |c| of(c).unwrap_or(0), over.unwrap_or(0)))
    };
    PodLimits {
        cpu_shares: if qos_class(pod) == "BestEffort" {
            MIN_SHARES
        } else {
            cpu_shares(pod_requests(pod).cpu)
        },
        cpu_quota: limit("cpu")
            .filter(|_| node.cpu_cfs_quota)
            .map(|milli| cpu_quota(milli, node.cpu_cfs_period_us)),
        memory: limit("memory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn cpu_numbers() {
        for (milli, shares, quota) in
            [(0, 2, 0), (1, 2, 1000), (100, 102, 10_000), (1000, 1024, 100_000)]
        {
            assert_eq!((cpu_shares(milli), cpu_quota(milli, 100_000)), (shares, quota));
        }
        assert_eq!(cpu_shares(i64::from(i32::MAX)), MAX_SHARES);
    }

    #[test]
    fn oom_scores() {
        let capacity = 4 << 30;
        for (container, score) in [
            (r#"{"name":"a"}"#, 1000),
            (r#"{"name":"a","resources":{"limits":{"cpu":"1","memory":"1Gi"}}}"#, -997),
            (r#"{"name":"a","resources":{"requests":{"memory":"1Gi"}}}"#, 750),
            (r#"{"name":"a","resources":{"requests":{"memory":"1"}}}"#, 999),
            (r#"{"name":"a","resources":{"requests":{"memory":"4Gi"}}}"#, 3),
        ] {
            let pod = pod(&format!(r#"{{"containers":[{container}]}}"#));
            assert_eq!(oom_score_adj(&pod, &spec_of(&pod).containers[0], capacity), score);
        }
    }

    #[test]
    fn pod_limits_need_every_container_limited() {
        let node = NodeContext::new("n", vec![]);
        let limited = r#""resources":{"limits":{"cpu":"500m","memory":"1Gi"}}"#;
        let both = pod(&format!(
            r#"{{"containers":[{{"name":"a",{limited}}},{{"name":"b",{limited}}}]}}"#
        ));
        assert_eq!(
            pod_limits(&both, &node),
            PodLimits { cpu_shares: 1024, cpu_quota: Some(100_000), memory: Some(2 << 30) }
        );
        let one = pod(&format!(r#"{{"containers":[{{"name":"a",{limited}}},{{"name":"b"}}]}}"#));
        assert_eq!(
            pod_limits(&one, &node),
            PodLimits { cpu_shares: 512, cpu_quota: None, memory: None }
        );
    }

    #[test]
    fn requests_count_the_peak_of_initialization() {
        let pod = pod(r#"{"initContainers":[
                {"name":"side","restartPolicy":"Always","resources":{"requests":{"cpu":"100m"}}},
                {"name":"setup","resources":{"requests":{"cpu":"2"}}}],
              "containers":[{"name":"a","resources":{"requests":{"cpu":"1"}}}],
              "overhead":{"cpu":"50m"}}"#);
        assert_eq!(pod_requests(&pod).cpu, 2150);
    }
}
