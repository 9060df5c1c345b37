//! Requests and limits as the kernel's numbers: CPU shares and quota, memory limits, OOM scores.

use std::collections::{BTreeMap, BTreeSet};

use cri_shim::api::{HugepageLimit, LinuxContainerResources};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use crate::device::is_extended;
use crate::dra::is_claimed;
use crate::node_context::{MemoryQos, NodeContext};
use crate::pod::qos::qos_class;
use crate::pod::quantity::{
    Notation, ResourceList, amount, bytes_text, cpu_milli, milli_text, value,
};
use crate::pod::spec::{has_critical_priority, init_containers, is_sidecar, is_static, spec_of};

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
    // A container without a limit of its own is told the pod's (KEP-2837), by which runtimes size
    // themselves.
    let pods = spec_of(pod).resources.as_ref().and_then(|r| r.limits.as_ref());
    let limit = |of: fn(Option<&ResourceList>) -> Option<i64>| {
        of(limits).filter(|own| *own > 0).or_else(|| of(pods)).unwrap_or(0)
    };
    let mut linux = LinuxContainerResources {
        cpu_shares: cpu_shares(cpu_request(resources)),
        memory_limit_in_bytes: limit(|list| amount(list, "memory")),
        oom_score_adj: oom_score_adj(pod, container, node.capacity_memory),
        ..Default::default()
    };
    if node.cpu_cfs_quota {
        linux.cpu_quota = cpu_quota(limit(cpu_milli), node.cpu_cfs_period_us);
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
        if node.oom_group {
            // The kernel ends the container as a whole; half a container helps nobody.
            linux.unified.insert("memory.oom.group".into(), "1".into());
        }
        if let Some(qos) = node.memory_qos {
            linux.unified.extend(memory_qos(pod, container, qos));
        }
        if node.swap.controller {
            let swap = swap_limit(pod, container, node);
            linux.unified.insert("memory.swap.max".into(), swap.to_string());
        }
    } else if node.swap.controller {
        // Memory and swap together: none beyond the memory. Without a limit of that there is none.
        linux.memory_swap_limit_in_bytes = linux.memory_limit_in_bytes;
    }
    linux
}

/// A page of memory, in bytes: the kernel counts in these.
const PAGE: i64 = 4096;

/// Files of cgroup v2 for KEP-2570: what a container requests is spared (guaranteed: never reclaimed;
/// burstable: reclaimed last), and one that comes near its limit is slowed down before it is ended.
fn memory_qos(pod: &Pod, container: &Container, qos: MemoryQos) -> Vec<(String, String)> {
    let resources = container.resources.as_ref();
    let of = |list: Option<&ResourceList>| amount(list, "memory").unwrap_or(0);
    let request = of(resources.and_then(|r| r.requests.as_ref()));
    let limit = of(resources.and_then(|r| r.limits.as_ref()));
    let mut files = Vec::new();
    let mut set = |file: &str, value: i64| files.push((file.to_owned(), value.to_string()));
    match (qos.reserve && request > 0, qos_class(pod)) {
        (true, "Guaranteed") => set("memory.min", request),
        (true, _) => set("memory.low", request),
        (false, _) => {
            set("memory.min", 0);
            set("memory.low", 0);
        }
    }
    if request != limit {
        let top = if limit > 0 { limit } else { qos.allocatable };
        let high = request as f64 + (top as f64 - request as f64) * qos.throttling;
        let high = high.floor() as i64 / PAGE * PAGE;
        if high > request {
            set("memory.high", high);
        }
    }
    files
}

/// Swap that a container may use on cgroup v2, in bytes: as much of the node's as it requests of its
/// memory, for burstable pods alone (KEP-2400). What the node needs to go on never waits for a disk.
fn swap_limit(pod: &Pod, container: &Container, node: &NodeContext) -> u64 {
    let resources = container.resources.as_ref();
    let of = |list: Option<&ResourceList>| amount(list, "memory").unwrap_or(0);
    let request = of(resources.and_then(|r| r.requests.as_ref()));
    let limit = of(resources.and_then(|r| r.limits.as_ref()));
    let critical = is_static(pod) || has_critical_priority(spec_of(pod));
    let request = u64::try_from(request).unwrap_or(0);
    let capacity = node.capacity_memory;
    // A limit alone has become the request as well, in the API.
    if !node.swap.limited
        || critical
        || qos_class(pod) != "Burstable"
        || request == u64::try_from(limit).unwrap_or(0)
        || request > capacity
        || capacity == 0
    {
        return 0;
    }
    // In floating point as kubelet does it, so that both give the same bytes.
    (request as f64 / capacity as f64 * node.swap.capacity as f64) as u64
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
    /// Bytes that its containers request; nothing is set by it.
    pub memory_request: i64,
    /// Bytes that are never reclaimed (`memory.min`, cgroup v2).
    pub memory_min: Option<i64>,
    /// Bytes that are reclaimed last (`memory.low`, cgroup v2).
    pub memory_low: Option<i64>,
}

impl PodLimits {
    /// Room for both: what is set while one turns into the other.
    pub fn room_for(self, other: Self) -> Self {
        let both = |a: Option<i64>, b: Option<i64>| a.zip(b).map(|(a, b)| a.max(b));
        Self {
            cpu_shares: self.cpu_shares.max(other.cpu_shares),
            cpu_quota: both(self.cpu_quota, other.cpu_quota),
            memory: both(self.memory, other.memory),
            memory_request: self.memory_request.max(other.memory_request),
            memory_min: self.memory_min.max(other.memory_min),
            memory_low: self.memory_low.max(other.memory_low),
        }
    }
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

/// What the pod requests of resources that Kubernetes itself knows nothing of.
pub fn extended_requests(pod: &Pod) -> BTreeMap<String, i64> {
    let spec = spec_of(pod);
    let list = |c: &Container| c.resources.as_ref().and_then(|r| r.requests.clone());
    let all = spec.containers.iter().chain(init_containers(spec)).filter_map(list);
    let names: BTreeSet<String> = all.flat_map(BTreeMap::into_keys).collect();
    let of = |name: String| {
        let own = |c: &Container| {
            // What the scheduler had claimed is counted with the claim.
            if is_claimed(pod, &c.name, &name) {
                return 0;
            }
            amount(c.resources.as_ref().and_then(|r| r.requests.as_ref()), &name).unwrap_or(0)
        };
        let sum = fold(pod, own, amount(spec.overhead.as_ref(), &name).unwrap_or(0));
        (name, sum)
    };
    names.into_iter().filter(|name| is_extended(name)).map(of).filter(|(_, sum)| *sum > 0).collect()
}

/// `resource` in `list`: milli-CPUs, bytes, or a count.
fn named(list: Option<&ResourceList>, resource: &str) -> Option<i64> {
    if resource == "cpu" { cpu_milli(list) } else { amount(list, resource) }
}

/// What the pod may use of `resource`: what it says itself, else the sum over its containers where
/// every one has a limit.
fn pod_limit(pod: &Pod, resource: &str) -> Option<i64> {
    let spec = spec_of(pod);
    let own = spec.resources.as_ref().and_then(|r| r.limits.as_ref());
    if let Some(own) = named(own, resource) {
        return Some(own);
    }
    let of = |c: &Container| {
        named(c.resources.as_ref().and_then(|r| r.limits.as_ref()), resource).filter(|v| *v > 0)
    };
    let mut all = spec.containers.iter().chain(init_containers(spec));
    if !all.all(|c| of(c).is_some()) {
        return None;
    }
    let over = named(spec.overhead.as_ref(), resource).unwrap_or(0);
    Some(fold(pod, |c| of(c).unwrap_or(0), over))
}

/// Bytes of local disk that the pod may use, and how its first limit is written: the sum of the limits
/// there are; `None` where no container has one.
pub fn ephemeral_limit(pod: &Pod) -> Option<(i64, Notation)> {
    const RESOURCE: &str = "ephemeral-storage";
    let spec = spec_of(pod);
    let written = |c: &Container| c.resources.as_ref()?.limits.as_ref()?.get(RESOURCE).cloned();
    let mut all = spec.containers.iter().chain(init_containers(spec));
    let notation = Notation::of(&all.find_map(written)?.0);
    let own = |c: &Container| written(c).as_ref().and_then(value).unwrap_or(0);
    let sum = fold(pod, own, 0);
    let over = if sum == 0 { 0 } else { amount(spec.overhead.as_ref(), RESOURCE).unwrap_or(0) };
    Some((sum.saturating_add(over), notation))
}

/// Resources of the pod as a whole, for its status: what it requests of everything that is
/// requested, and the CPU and memory that it may use.
pub fn pod_resources(pod: &Pod) -> ResourceRequirements {
    let spec = spec_of(pod);
    let lists = |r: &ResourceRequirements| [r.requests.clone(), r.limits.clone()];
    let all = || init_containers(spec).iter().chain(&spec.containers);
    let written: Vec<ResourceList> = all()
        .filter_map(|c| c.resources.as_ref())
        .chain(&spec.resources)
        .flat_map(lists)
        .flatten()
        .chain(spec.overhead.clone())
        .collect();
    // As somebody wrote it, if the amount is the same: people look for what they wrote.
    let text = |resource: &str, amount: i64| {
        let same = |list: &&ResourceList| named(Some(list), resource) == Some(amount);
        let found = written.iter().find(same).and_then(|list| list.get(resource)).cloned();
        found.unwrap_or_else(|| match resource {
            "cpu" => milli_text(amount),
            _ => bytes_text(amount),
        })
    };
    let sums = pod_requests(pod);
    let names: BTreeSet<&String> = written.iter().flat_map(BTreeMap::keys).collect();
    let requests = names.into_iter().filter_map(|name| {
        let sum = match name.as_str() {
            "cpu" => sums.cpu,
            "memory" => sums.memory,
            other => {
                let of = |c: &Container| {
                    let requests = c.resources.as_ref().and_then(|r| r.requests.as_ref());
                    amount(requests, other).unwrap_or(0)
                };
                let own = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
                let over = amount(spec.overhead.as_ref(), other).unwrap_or(0);
                match amount(own, other) {
                    Some(own) => own.saturating_add(over),
                    None => fold(pod, of, over),
                }
            }
        };
        (sum > 0).then(|| (name.clone(), text(name, sum)))
    });
    let limits = ["cpu", "memory"].into_iter().filter_map(|name| {
        Some((name.to_owned(), text(name, pod_limit(pod, name).filter(|v| *v > 0)?)))
    });
    let some = |list: ResourceList| (!list.is_empty()).then_some(list);
    ResourceRequirements {
        requests: some(requests.collect()),
        limits: some(limits.collect()),
        ..ResourceRequirements::default()
    }
}

/// Limits of the pod's own cgroup: a limit holds for the pod only where every container has one.
pub fn pod_limits(pod: &Pod, node: &NodeContext) -> PodLimits {
    let requests = pod_requests(pod);
    let spared = node.memory_qos.filter(|qos| qos.reserve).map(|_| requests.memory);
    let spared = spared.filter(|bytes| *bytes > 0);
    let class = qos_class(pod);
    PodLimits {
        memory_min: spared.filter(|_| class == "Guaranteed"),
        memory_low: spared.filter(|_| class != "Guaranteed"),
        cpu_shares: if class == "BestEffort" { MIN_SHARES } else { cpu_shares(requests.cpu) },
        cpu_quota: pod_limit(pod, "cpu")
            .filter(|_| node.cpu_cfs_quota)
            .map(|milli| cpu_quota(milli, node.cpu_cfs_period_us)),
        memory: pod_limit(pod, "memory"),
        memory_request: requests.memory,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node_context::SwapUse;
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
    fn memory_is_spared_by_request_and_throttled_below_the_limit() {
        let qos = MemoryQos { throttling: 0.9, reserve: true, allocatable: 10 << 30 };
        let node = NodeContext { memory_qos: Some(qos), ..NodeContext::new("n", vec![]) };
        let given = |node: &NodeContext, resources: &str, unified: bool| {
            let pod = pod(&format!(r#"{{"containers":[{{"name":"a","resources":{resources}}}]}}"#));
            let linux = container_resources(&pod, &spec_of(&pod).containers[0], node, unified);
            let file = |name: &str| linux.unified.get(name).and_then(|v| v.parse::<i64>().ok());
            let limits = pod_limits(&pod, node);
            let files = ["memory.min", "memory.low", "memory.high"].map(file);
            (files, (limits.memory_min, limits.memory_low))
        };
        let (mib, zero) = (1 << 20, Some(0));
        // 10 Mi + 0.9 * (20 Mi - 10 Mi), and 0.9 of what the node has.
        let (high, most) = (Some(19 * mib), Some(9_663_676_416 / PAGE * PAGE));
        let guaranteed =
            r#"{"limits":{"cpu":"1","memory":"10Mi"},"requests":{"cpu":"1","memory":"10Mi"}}"#;
        let burstable = r#"{"limits":{"memory":"20Mi"},"requests":{"memory":"10Mi"}}"#;
        let ten = Some(10 * mib);
        assert_eq!(given(&node, guaranteed, true), ([ten, None, None], (ten, None)));
        assert_eq!(given(&node, burstable, true), ([None, ten, high], (None, ten)));
        assert_eq!(given(&node, "{}", true).0, [zero, zero, None]);
        assert_eq!(given(&node, r#"{"requests":{"cpu":"1"}}"#, true).0, [zero, zero, None]);
        let requested = r#"{"requests":{"memory":"1"}}"#;
        assert_eq!(given(&node, requested, true).0, [None, Some(1), most]);
        assert_eq!(given(&node, burstable, false).0, [None; 3]);
        let qos = MemoryQos { reserve: false, ..qos };
        let node = NodeContext { memory_qos: Some(qos), ..node };
        assert_eq!(given(&node, burstable, true), ([zero, zero, high], (None, None)));
    }

    #[test]
    fn swap_is_shared_by_memory_requests_among_the_burstable() {
        let swap = SwapUse { limited: true, controller: true, capacity: 4 << 30 };
        let mut node =
            NodeContext { swap, capacity_memory: 16 << 30, ..NodeContext::new("n", vec![]) };
        let given = |node: &NodeContext, spec: &str, unified: bool| {
            let pod = pod(spec);
            let linux = container_resources(&pod, &spec_of(&pod).containers[0], node, unified);
            let v2 = linux.unified.get("memory.swap.max").cloned();
            (v2, linux.memory_swap_limit_in_bytes)
        };
        let of = |resources: &str, more: &str| {
            format!(r#"{{{more}"containers":[{{"name":"a","resources":{resources}}}]}}"#)
        };
        let burstable = r#"{"requests":{"memory":"1Gi"},"limits":{"memory":"2Gi"}}"#;
        for (resources, more, swap) in [
            (burstable, "", 256 << 20),
            (r#"{"requests":{"memory":"1Gi"}}"#, "", 256 << 20),
            (r#"{"requests":{"memory":"1000003"}}"#, "", 250_000),
            // Critical, without a memory request, guaranteed in memory, more than there is, best effort.
            (burstable, r#""priority":2000000000,"#, 0),
            (r#"{"requests":{"cpu":"1"}}"#, "", 0),
            (r#"{"requests":{"memory":"1Gi","cpu":"1"},"limits":{"memory":"1Gi"}}"#, "", 0),
            (r#"{"requests":{"memory":"17Gi"}}"#, "", 0),
            ("{}", "", 0),
        ] {
            let given = given(&node, &of(resources, more), true);
            assert_eq!(given, (Some(swap.to_string()), 0), "{resources} {more}");
        }
        let burstable = of(burstable, "");
        // v1 counts both together and has no LimitedSwap.
        assert_eq!(given(&node, &burstable, false), (None, 2 << 30));
        node.swap.limited = false;
        assert_eq!(given(&node, &burstable, true), (Some("0".into()), 0));
        node.swap.controller = false;
        assert_eq!(given(&node, &burstable, true), (None, 0));
        assert_eq!(given(&node, &burstable, false), (None, 0));
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
            PodLimits {
                cpu_shares: 1024,
                cpu_quota: Some(100_000),
                memory: Some(2 << 30),
                memory_request: 2 << 30,
                ..PodLimits::default()
            }
        );
        let one = pod(&format!(r#"{{"containers":[{{"name":"a",{limited}}},{{"name":"b"}}]}}"#));
        let expected =
            PodLimits { cpu_shares: 512, memory_request: 1 << 30, ..PodLimits::default() };
        assert_eq!(pod_limits(&one, &node), expected);
    }

    #[test]
    fn pods_have_resources_of_their_own() {
        let node = NodeContext::new("n", vec![]);
        let pod =
            pod(r#"{"resources":{"requests":{"cpu":"1"},"limits":{"cpu":"2","memory":"1Gi"}},
            "containers":[{"name":"a","resources":{"limits":{"memory":"512Mi"}}},{"name":"b"}]}"#);
        assert_eq!(
            pod_limits(&pod, &node),
            PodLimits {
                cpu_shares: 1024,
                cpu_quota: Some(200_000),
                memory: Some(1 << 30),
                memory_request: 512 << 20,
                ..PodLimits::default()
            }
        );
        // A container without a limit is told the pod's.
        let given = |n: usize| {
            let linux = container_resources(&pod, &spec_of(&pod).containers[n], &node, false);
            (linux.cpu_quota, linux.memory_limit_in_bytes)
        };
        assert_eq!([given(0), given(1)], [(200_000, 512 << 20), (200_000, 1 << 30)]);
    }

    #[test]
    fn statuses_tell_what_the_pod_has_as_a_whole() {
        for (spec, expected) in [
            (r#"{"containers":[{"name":"a"}]}"#, "{}"),
            (
                r#"{"containers":[{"name":"a","resources":{"requests":{"cpu":"0.1","memory":"64M"}}}]}"#,
                r#"{"requests":{"cpu":"0.1","memory":"64M"}}"#,
            ),
            (
                r#"{"containers":[{"name":"a","resources":{"limits":{"cpu":"500m","memory":"64Mi"}}},
                    {"name":"b","resources":{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"250m","ephemeral-storage":"1Gi"}}}]}"#,
                r#"{"limits":{"cpu":"1500m","memory":"1088Mi"},"requests":{"cpu":"750m","ephemeral-storage":"1Gi","memory":"1088Mi"}}"#,
            ),
            (
                r#"{"resources":{"requests":{"cpu":"1"},"limits":{"memory":"1Gi"}},"overhead":{"cpu":"250m"},
                    "containers":[{"name":"a","resources":{"requests":{"memory":"1Mi"}}}]}"#,
                r#"{"limits":{"memory":"1Gi"},"requests":{"cpu":"1250m","memory":"1Mi"}}"#,
            ),
        ] {
            let found = serde_json::to_string(&pod_resources(&pod(spec))).unwrap();
            assert_eq!(found, expected, "{spec}");
        }
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
