//! Metrics of CPUs and memory that containers have to themselves, and of their alignment.

use std::collections::BTreeMap;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::Metrics;

/// Labels `scope` and `boundary`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Aligned {
    scope: &'static str,
    boundary: &'static str,
}

/// Label `numa_node`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Node {
    numa_node: String,
}

/// The metrics.
pub(super) struct NumaMetrics {
    cpu_requests: Counter,
    cpu_errors: Counter,
    shared_milli: Gauge,
    exclusive: Gauge,
    per_node: Family<Node, Gauge>,
    memory_requests: Counter,
    memory_errors: Counter,
    admissions: Counter,
    admission_errors: Counter,
    admission_time: Histogram,
    /// Gauges, as the encoder would have the names of counters end in `_total`, which upstream's do not.
    aligned: Family<Aligned, Gauge>,
    unaligned: Family<Aligned, Gauge>,
}

impl Default for NumaMetrics {
    fn default() -> Self {
        Self {
            cpu_requests: Counter::default(),
            cpu_errors: Counter::default(),
            shared_milli: Gauge::default(),
            exclusive: Gauge::default(),
            per_node: Family::default(),
            memory_requests: Counter::default(),
            memory_errors: Counter::default(),
            admissions: Counter::default(),
            admission_errors: Counter::default(),
            admission_time: Histogram::new(exponential_buckets(0.05, 2.0, 15)),
            aligned: Family::default(),
            unaligned: Family::default(),
        }
    }
}

impl NumaMetrics {
    pub(super) fn register(&self, all: &mut Registry) {
        for (name, help, counter) in [
            (
                "kubelet_cpu_manager_pinning_requests",
                "The number of cpu core allocations which required pinning",
                &self.cpu_requests,
            ),
            (
                "kubelet_cpu_manager_pinning_errors",
                "The number of cpu core allocations which required pinning failed",
                &self.cpu_errors,
            ),
            (
                "kubelet_memory_manager_pinning_requests",
                "The number of memory pages allocations which required pinning",
                &self.memory_requests,
            ),
            (
                "kubelet_memory_manager_pinning_errors",
                "The number of memory pages allocations which required pinning that failed",
                &self.memory_errors,
            ),
            (
                "kubelet_topology_manager_admission_requests",
                "The number of admission requests where resources have to be aligned",
                &self.admissions,
            ),
            (
                "kubelet_topology_manager_admission_errors",
                "The number of admission request failures where resources could not be aligned",
                &self.admission_errors,
            ),
        ] {
            all.register(name, help, counter.clone());
        }
        all.register(
            "kubelet_topology_manager_admission_duration_ms",
            "Duration in milliseconds to serve a pod admission request",
            self.admission_time.clone(),
        );
        all.register(
            "kubelet_cpu_manager_shared_pool_size_millicores",
            "The size of the shared CPU pool for non-guaranteed QoS pods, in millicores",
            self.shared_milli.clone(),
        );
        all.register(
            "kubelet_cpu_manager_exclusive_cpu_allocation_count",
            "The total number of CPUs exclusively allocated to containers running on this node",
            self.exclusive.clone(),
        );
        all.register(
            "kubelet_cpu_manager_allocation_per_numa",
            "Number of CPUs allocated per NUMA node",
            self.per_node.clone(),
        );
        all.register(
            "kubelet_container_aligned_compute_resources_count",
            "Cumulative number of aligned compute resources allocated to containers by alignment type",
            self.aligned.clone(),
        );
        all.register(
            "kubelet_container_aligned_compute_resources_failure_count",
            "Cumulative number of failures to allocate aligned compute resources to containers by alignment type",
            self.unaligned.clone(),
        );
    }
}

impl Metrics {
    /// So many CPUs can be had, and are had, on each node.
    pub fn cpus_assigned(&self, free: usize, exclusive: usize, by_node: &BTreeMap<u32, usize>) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.numa.shared_milli.set(number(free.saturating_mul(1000)));
        self.numa.exclusive.set(number(exclusive));
        for (node, count) in by_node {
            let node = Node { numa_node: node.to_string() };
            self.numa.per_node.get_or_create(&node).set(number(*count));
        }
    }

    fn aligned_as(&self, scope: &'static str, boundary: &'static str, well: bool) {
        let family = if well { &self.numa.aligned } else { &self.numa.unaligned };
        family.get_or_create(&Aligned { scope, boundary }).inc();
    }

    /// A container was, or could not be, given CPUs; of whole cores, where that is asked for.
    pub fn cpus_pinned(&self, well: bool, whole_cores: bool) {
        self.numa.cpu_requests.inc();
        if !well {
            self.numa.cpu_errors.inc();
        }
        if whole_cores {
            self.aligned_as("container", "physical_cpu", well);
        }
    }

    /// A container was given CPUs, all of one cache maybe.
    pub fn cpus_on_cache(&self, one: bool) {
        if one {
            self.aligned_as("container", "uncore_cache", true);
        }
    }

    /// A container was, or could not be, given memory.
    pub fn memory_pinned(&self, well: bool) {
        self.numa.memory_requests.inc();
        if !well {
            self.numa.memory_errors.inc();
        }
    }

    /// What a container or pod has must be, and is or cannot be, on one node.
    pub fn aligned(&self, pod: bool, well: bool) {
        self.aligned_as(if pod { "pod" } else { "container" }, "numa_node", well);
    }

    /// A pod was let in or refused.
    pub fn pod_aligned(&self, took: Duration, failed: bool) {
        self.numa.admissions.inc();
        self.numa.admission_time.observe(took.as_secs_f64() * 1000.0);
        if failed {
            self.numa.admission_errors.inc();
        }
    }
}
