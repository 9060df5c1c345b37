//! What is counted of pods and their sandboxes beside their starts.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{Histograms, Metrics, histogram};

/// Label `runtime_handler`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Handler {
    runtime_handler: String,
}

/// Label `static`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Static {
    r#static: &'static str,
}

/// The metrics.
pub(super) struct PodMetrics {
    sandboxes: Histograms<Handler>,
    sandboxes_failed: Family<Handler, Counter>,
    containers: Histogram,
    restarted: Family<Static, Counter>,
    orphaned: Counter,
}

impl Default for PodMetrics {
    fn default() -> Self {
        Self {
            sandboxes: Family::new_with_constructor(histogram),
            sandboxes_failed: Family::default(),
            containers: Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0]),
            restarted: Family::default(),
            orphaned: Counter::default(),
        }
    }
}

impl PodMetrics {
    pub(super) fn register(&self, all: &mut Registry) {
        all.register(
            "kubelet_run_podsandbox_duration_seconds",
            "Duration in seconds of the run_podsandbox operations. Broken down by RuntimeClass.Handler",
            self.sandboxes.clone(),
        );
        all.register(
            "kubelet_run_podsandbox_errors",
            "Cumulative number of the run_podsandbox operation errors by RuntimeClass.Handler",
            self.sandboxes_failed.clone(),
        );
        all.register(
            "kubelet_containers_per_pod_count",
            "The number of containers per pod",
            self.containers.clone(),
        );
        all.register(
            "kubelet_restarted_pods",
            "Number of pods that have been restarted because they were deleted and recreated with the same UID",
            self.restarted.clone(),
        );
        all.register(
            "kubelet_orphaned_runtime_pods",
            "Number of pods that have been detected in the container runtime without being known",
            self.orphaned.clone(),
        );
    }
}

impl Metrics {
    /// The runtime was told to make a sandbox.
    pub fn sandbox_run(&self, handler: &str, took: Duration, failed: bool) {
        let labels = Handler { runtime_handler: handler.to_owned() };
        self.pods.sandboxes.get_or_create(&labels).observe(took.as_secs_f64());
        if failed {
            self.pods.sandboxes_failed.get_or_create(&labels).inc();
        }
    }

    /// A pod with so many containers has come.
    pub fn pod_came(&self, containers: usize) {
        self.pods.containers.observe(containers as f64);
    }

    /// A pod came back under the UID of one that was going.
    pub fn pod_restarted(&self, from_file: bool) {
        let r#static = if from_file { "true" } else { "" };
        self.pods.restarted.get_or_create(&Static { r#static }).inc();
    }

    /// The runtime has a pod that no source knows.
    pub fn orphan_found(&self) {
        self.pods.orphaned.inc();
    }
}
