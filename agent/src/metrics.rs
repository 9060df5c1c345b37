//! The agent's own metrics under kubelet's names, so that its dashboards and alerts work.
//!
//! One set for the process: what is counted lies deep in the runtime client, the API client and the
//! probes, and a scrape wants all of it. What can be looked up when a scrape comes is not counted
//! here (`node_api::metrics`).

mod devices;
mod dra;
mod images;
mod numa;
mod pods;
mod volumes;

use std::sync::LazyLock;
use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

pub use devices::PodResourcesCall;
use images::ImageMetrics;
pub use volumes::{VolumeWork, volume_plugin};

/// The set of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Label `operation_type`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Operation {
    operation_type: String,
}

/// Labels of requests to the node API.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HttpLabels {
    /// HTTP method.
    pub method: String,
    /// First part of the path.
    pub path: String,
    /// `readwrite` or `readonly`.
    pub server_type: &'static str,
    /// `true` for sessions.
    pub long_running: &'static str,
}

/// Labels of requests to the API server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ClientLabels {
    /// HTTP status, or `<error>`.
    pub code: String,
    /// Host and port of the API server.
    pub host: String,
    /// HTTP method.
    pub method: String,
}

/// Labels of a probe.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProbeLabels {
    /// `Liveness`, `Readiness` or `Startup`.
    pub probe_type: String,
    /// `successful`, `failed` or `unknown`.
    pub result: String,
    /// Container.
    pub container: String,
    /// Pod.
    pub pod: String,
    /// Namespace.
    pub namespace: String,
    /// The pod's UID.
    pub pod_uid: String,
}

/// Labels of the time that a probe takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProbeDuration {
    probe_type: String,
    container: String,
    pod: String,
    namespace: String,
}

impl ProbeDuration {
    fn of(labels: &ProbeLabels) -> Self {
        Self {
            probe_type: labels.probe_type.clone(),
            container: labels.container.clone(),
            pod: labels.pod.clone(),
            namespace: labels.namespace.clone(),
        }
    }
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Upstream's default buckets, seconds.
const DEFAULT: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Buckets of the time a pod takes to start, seconds.
const START: [f64; 26] = [
    0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0,
    180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0,
];

fn histogram() -> Histogram {
    Histogram::new(DEFAULT)
}

/// The metrics.
pub struct Metrics {
    registry: Registry,
    probes_registry: Registry,
    runtime_operations: Family<Operation, Counter>,
    runtime_errors: Family<Operation, Counter>,
    runtime_durations: Histograms<Operation>,
    http: Family<HttpLabels, Counter>,
    http_inflight: Family<HttpLabels, Gauge>,
    http_durations: Histograms<HttpLabels>,
    client: Family<ClientLabels, Counter>,
    client_durations: Histograms<ClientVerb>,
    pod_starts: Histogram,
    pod_sli_starts: Histogram,
    workers: Histograms<Operation>,
    cgroups: Histograms<Operation>,
    relists: Histogram,
    relist_intervals: Histogram,
    last_seen: Gauge,
    probes: Family<ProbeLabels, Counter>,
    probe_durations: Histograms<ProbeDuration>,
    user_namespaced: Counter,
    user_namespaced_errors: Counter,
    pulls: Histograms<PullLabels>,
    volumes: volumes::VolumeMetrics,
    pods: pods::PodMetrics,
    /// Of device plugins, and of who asks for pods' resources.
    devices: devices::DeviceMetrics,
    dra: dra::DraMetrics,
    numa: numa::NumaMetrics,
    evictions: Family<Eviction, Gauge>,
    eviction_ages: Histograms<Eviction>,
    rejections: Family<Rejection, Counter>,
    shutdown_start: Gauge,
    shutdown_end: Gauge,
    pods_started: Counter,
    pods_not_started: Counter,
    containers_started: Family<StartedContainer, Counter>,
    containers_not_started: Family<FailedContainer, Counter>,
    /// Of images and who may pull them.
    pub images: ImageMetrics,
}

/// What a pod used too much of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Eviction {
    eviction_signal: &'static str,
}

/// Why a pod was not let in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rejection {
    reason: &'static str,
}

/// The kind of a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StartedContainer {
    container_type: &'static str,
}

/// One that did not start, and why.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailedContainer {
    code: String,
    container_type: &'static str,
}

/// The size class of a pulled image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PullLabels {
    image_size_in_bytes: &'static str,
}

/// Buckets of the time a pull takes, seconds.
const PULL: [f64; 18] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0,
    1200.0, 1800.0, 2700.0, 3600.0,
];

/// Upstream's classes of sizes: the least a larger one begins above, in MiB, and its name.
const SIZES: [(u64, &str); 12] = [
    (0, "0-10MB"),
    (10, "10MB-100MB"),
    (100, "100MB-500MB"),
    (500, "500MB-1GB"),
    (1 << 10, "1GB-5GB"),
    (5 << 10, "5GB-10GB"),
    (10 << 10, "10GB-20GB"),
    (20 << 10, "20GB-30GB"),
    (30 << 10, "30GB-40GB"),
    (40 << 10, "40GB-60GB"),
    (60 << 10, "60GB-100GB"),
    (100 << 10, "GT100GB"),
];

fn size_class(bytes: u64) -> &'static str {
    let fits = SIZES.iter().rev().find(|(above, _)| bytes > above << 20);
    fits.unwrap_or(&SIZES[0]).1
}

/// Labels of the time that requests to the API server take.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClientVerb {
    host: String,
    verb: String,
}

impl Metrics {
    fn new() -> Self {
        let new = Self {
            registry: Registry::default(),
            probes_registry: Registry::default(),
            runtime_operations: Family::default(),
            runtime_errors: Family::default(),
            runtime_durations: Family::new_with_constructor(histogram),
            http: Family::default(),
            http_inflight: Family::default(),
            http_durations: Family::new_with_constructor(histogram),
            client: Family::default(),
            client_durations: Family::new_with_constructor(histogram),
            pod_starts: Histogram::new(START),
            pod_sli_starts: Histogram::new(START),
            workers: Family::new_with_constructor(histogram),
            cgroups: Family::new_with_constructor(histogram),
            relists: histogram(),
            relist_intervals: histogram(),
            last_seen: Gauge::default(),
            probes: Family::default(),
            probe_durations: Family::new_with_constructor(histogram),
            user_namespaced: Counter::default(),
            user_namespaced_errors: Counter::default(),
            pulls: Family::new_with_constructor(|| Histogram::new(PULL)),
            volumes: volumes::VolumeMetrics::default(),
            pods: pods::PodMetrics::default(),
            devices: devices::DeviceMetrics::default(),
            dra: dra::DraMetrics::default(),
            numa: numa::NumaMetrics::default(),
            evictions: Family::default(),
            eviction_ages: Family::new_with_constructor(histogram),
            rejections: Family::default(),
            pods_started: Counter::default(),
            pods_not_started: Counter::default(),
            shutdown_start: Gauge::default(),
            shutdown_end: Gauge::default(),
            containers_started: Family::default(),
            containers_not_started: Family::default(),
            images: ImageMetrics::new(),
        };
        new.registered()
    }

    fn registered(mut self) -> Self {
        let mut registry = Registry::default();
        let all = &mut registry;
        self.devices.register(all);
        self.dra.register(all);
        self.numa.register(all);
        self.volumes.register(all);
        self.pods.register(all);
        // Counters end in `_total`, which the encoder adds; help ends in a full stop, likewise.
        all.register(
            "kubelet_runtime_operations",
            "Cumulative number of runtime operations by operation type",
            self.runtime_operations.clone(),
        );
        all.register(
            "kubelet_runtime_operations_errors",
            "Cumulative number of runtime operation errors by operation type",
            self.runtime_errors.clone(),
        );
        all.register(
            "kubelet_runtime_operations_duration_seconds",
            "Duration in seconds of runtime operations. Broken down by operation type",
            self.runtime_durations.clone(),
        );
        all.register(
            "kubelet_http_requests",
            "Number of the http requests received since the server started",
            self.http.clone(),
        );
        all.register(
            "kubelet_http_inflight_requests",
            "Number of the inflight http requests",
            self.http_inflight.clone(),
        );
        all.register(
            "kubelet_http_requests_duration_seconds",
            "Duration in seconds to serve http requests",
            self.http_durations.clone(),
        );
        all.register(
            "rest_client_requests",
            "Number of HTTP requests, partitioned by status code, method, and host",
            self.client.clone(),
        );
        all.register(
            "rest_client_request_duration_seconds",
            "Request latency in seconds. Broken down by verb, and host",
            self.client_durations.clone(),
        );
        all.register("kubelet_pod_start_duration_seconds", "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run", self.pod_starts.clone());
        all.register("kubelet_pod_start_sli_duration_seconds", "Duration in seconds to start a pod, excluding time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch", self.pod_sli_starts.clone());
        all.register("kubelet_pod_worker_duration_seconds", "Duration in seconds to sync a single pod. Broken down by operation type: create, update, or sync", self.workers.clone());
        all.register(
            "kubelet_cgroup_manager_duration_seconds",
            "Duration in seconds for cgroup manager operations. Broken down by method",
            self.cgroups.clone(),
        );
        all.register(
            "kubelet_pleg_relist_duration_seconds",
            "Duration in seconds for relisting pods in PLEG",
            self.relists.clone(),
        );
        all.register(
            "kubelet_pleg_relist_interval_seconds",
            "Interval in seconds between relisting in PLEG",
            self.relist_intervals.clone(),
        );
        all.register(
            "kubelet_pleg_last_seen_seconds",
            "Timestamp in seconds when PLEG was last seen active",
            self.last_seen.clone(),
        );
        all.register(
            "kubelet_started_user_namespaced_pods",
            "Cumulative number of pods with user namespaces started. This metric will only be collected on Linux",
            self.user_namespaced.clone(),
        );
        all.register(
            "kubelet_started_user_namespaced_pods_errors",
            "Cumulative number of errors when starting pods with user namespaces. This metric will only be collected on Linux",
            self.user_namespaced_errors.clone(),
        );
        all.register(
            "kubelet_image_pull_duration_seconds",
            "Duration in seconds to pull an image",
            self.pulls.clone(),
        );
        all.register(
            "kubelet_started_pods",
            "Cumulative number of pods started",
            self.pods_started.clone(),
        );
        all.register(
            "kubelet_started_pods_errors",
            "Cumulative number of errors when starting pods",
            self.pods_not_started.clone(),
        );
        all.register(
            "kubelet_started_containers",
            "Cumulative number of containers started",
            self.containers_started.clone(),
        );
        all.register(
            "kubelet_started_containers_errors",
            "Cumulative number of errors when starting containers",
            self.containers_not_started.clone(),
        );
        // A gauge, as the encoder would name a counter kubelet_evictions_total, which upstream's is not.
        all.register(
            "kubelet_evictions",
            "Cumulative number of pod evictions by eviction signal",
            self.evictions.clone(),
        );
        all.register(
            "kubelet_eviction_stats_age_seconds",
            "Time between when stats are collected, and when pod is evicted based on those stats by eviction signal",
            self.eviction_ages.clone(),
        );
        all.register(
            "kubelet_admission_rejections",
            "Cumulative number of pods that were not let in",
            self.rejections.clone(),
        );
        all.register(
            "kubelet_graceful_shutdown_start_time_seconds",
            "Last graceful shutdown start time since unix epoch in seconds",
            self.shutdown_start.clone(),
        );
        all.register(
            "kubelet_graceful_shutdown_end_time_seconds",
            "Last graceful shutdown end time since unix epoch in seconds",
            self.shutdown_end.clone(),
        );
        self.images.register(all);
        self.probes_registry.register(
            "prober_probe",
            "Cumulative number of a liveness, readiness or startup probe for a container by result",
            self.probes.clone(),
        );
        self.probes_registry.register(
            "prober_probe_duration_seconds",
            "Duration in seconds for a probe response",
            self.probe_durations.clone(),
        );
        self.registry = registry;
        self
    }

    /// A request to the runtime was answered.
    pub fn runtime_operation(&self, verb: &'static str, took: Duration, failed: bool) {
        let operation = Operation { operation_type: snake(verb) };
        self.runtime_operations.get_or_create(&operation).inc();
        self.runtime_durations.get_or_create(&operation).observe(took.as_secs_f64());
        if failed {
            self.runtime_errors.get_or_create(&operation).inc();
        }
    }

    /// An image of so many bytes was pulled.
    pub fn image_pulled(&self, bytes: u64, took: Duration) {
        let labels = PullLabels { image_size_in_bytes: size_class(bytes) };
        self.pulls.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A pod must go for what it uses.
    pub fn evicted(&self, eviction_signal: &'static str) {
        self.evictions.get_or_create(&Eviction { eviction_signal }).inc();
    }

    /// A pod goes for a signal that was measured so long ago.
    pub fn eviction_stats_aged(&self, eviction_signal: &'static str, age: Duration) {
        self.eviction_ages.get_or_create(&Eviction { eviction_signal }).observe(age.as_secs_f64());
    }

    /// When the node's last graceful shutdown began, and ended if it has.
    pub fn graceful_shutdown(&self, start: Timestamp, end: Option<Timestamp>) {
        self.shutdown_start.set(start.as_second());
        self.shutdown_end.set(end.map_or(0, Timestamp::as_second));
    }

    /// A pod was not let in. Reasons that upstream does not list are counted as `Other`.
    pub fn pod_rejected(&self, reason: &str) {
        const LISTED: [&str; 12] = [
            "AppArmor",
            "PodOSSelectorNodeLabelDoesNotMatch",
            "PodOSNotSupported",
            "SupplementalGroupsPolicyNotSupported",
            "SysctlForbidden",
            "Evicted",
            "OutOfcpu",
            "OutOfmemory",
            "OutOfephemeral-storage",
            "OutOfpods",
            "NodeShutdown",
            "UnexpectedAdmissionError",
        ];
        let reason = LISTED.into_iter().find(|listed| *listed == reason).unwrap_or("Other");
        self.rejections.get_or_create(&Rejection { reason }).inc();
    }

    /// A pod's sandbox was to be made.
    pub fn pod_sandbox_made(&self, failed: bool) {
        self.pods_started.inc();
        if failed {
            self.pods_not_started.inc();
        }
    }

    /// A container was to be started; `code` is the reason why it was not.
    pub fn container_started(&self, container_type: &'static str, code: Option<&str>) {
        self.containers_started.get_or_create(&StartedContainer { container_type }).inc();
        if let Some(code) = code {
            let labels = FailedContainer { code: code.to_owned(), container_type };
            self.containers_not_started.get_or_create(&labels).inc();
        }
    }

    /// A request to the node API came.
    pub fn http_began(&self, labels: &HttpLabels) {
        self.http.get_or_create(labels).inc();
        self.http_inflight.get_or_create(labels).inc();
    }

    /// It is answered.
    pub fn http_ended(&self, labels: &HttpLabels, took: Duration) {
        self.http_inflight.get_or_create(labels).dec();
        self.http_durations.get_or_create(labels).observe(took.as_secs_f64());
    }

    /// The API server was asked.
    pub fn client_request(&self, labels: &ClientLabels, took: Duration) {
        self.client.get_or_create(labels).inc();
        let verb = ClientVerb { host: labels.host.clone(), verb: labels.method.clone() };
        self.client_durations.get_or_create(&verb).observe(took.as_secs_f64());
    }

    /// A pod runs for the first time, so long after it was seen and created.
    pub fn pod_started(&self, since_seen: f64, since_created: Option<f64>) {
        self.pod_starts.observe(since_seen.max(0.0));
        if let Some(created) = since_created {
            self.pod_sli_starts.observe(created.max(0.0));
        }
    }

    /// A sandbox with a user namespace was to be made.
    pub fn user_namespaced_pod_started(&self, failed: bool) {
        self.user_namespaced.inc();
        if failed {
            self.user_namespaced_errors.inc();
        }
    }

    /// A pod's worker took a turn.
    pub fn worker_turned(&self, took: Duration) {
        let sync = Operation { operation_type: "sync".to_owned() };
        self.workers.get_or_create(&sync).observe(took.as_secs_f64());
    }

    /// A cgroup was made, changed or removed.
    pub fn cgroup_operation(&self, operation: &str, took: Duration) {
        let operation = Operation { operation_type: operation.to_owned() };
        self.cgroups.get_or_create(&operation).observe(took.as_secs_f64());
    }

    /// The runtime was listed.
    pub fn relisted(&self, took: Duration, since_last: Option<Duration>) {
        self.relists.observe(took.as_secs_f64());
        self.last_seen.set(Timestamp::now().as_second());
        if let Some(since) = since_last {
            self.relist_intervals.observe(since.as_secs_f64());
        }
    }

    /// A probe was asked; how long it took, where it did not fail.
    pub fn probed(&self, labels: &ProbeLabels, took: Option<Duration>) {
        self.probes.get_or_create(labels).inc();
        if let Some(took) = took {
            let labels = ProbeDuration::of(labels);
            self.probe_durations.get_or_create(&labels).observe(took.as_secs_f64());
        }
    }

    /// A probe is asked no more.
    pub fn forget_probe(&self, labels: &ProbeLabels) {
        for result in ["successful", "failed", "unknown"] {
            self.probes.remove(&ProbeLabels { result: result.to_owned(), ..labels.clone() });
        }
        self.probe_durations.remove(&ProbeDuration::of(labels));
    }

    /// All but the probes', in OpenMetrics text.
    pub fn encode(&self) -> String {
        encode(&self.registry)
    }

    /// The probes', in OpenMetrics text.
    pub fn encode_probes(&self) -> String {
        encode(&self.probes_registry)
    }
}

fn encode(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}

/// `RunPodSandbox` as upstream's metrics write it: `run_podsandbox`.
fn snake(verb: &str) -> String {
    let mut out = String::with_capacity(verb.len() + 4);
    let verb = verb.replace("PodSandbox", "Podsandbox");
    for c in verb.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_named_as_upstream_names_them() {
        for (verb, name) in [
            ("RunPodSandbox", "run_podsandbox"),
            ("PodSandboxStatus", "podsandbox_status"),
            ("CreateContainer", "create_container"),
            ("ExecSync", "exec_sync"),
            ("Version", "version"),
        ] {
            assert_eq!(snake(verb), name);
        }
    }

    #[test]
    fn pulls_are_told_apart_by_size() {
        for (bytes, class) in [
            (0, "0-10MB"),
            (10 << 20, "0-10MB"),
            ((10 << 20) + 1, "10MB-100MB"),
            (2 << 30, "1GB-5GB"),
            (u64::MAX, "GT100GB"),
        ] {
            assert_eq!(size_class(bytes), class);
        }
        let metrics = Metrics::new();
        metrics.image_pulled(300 << 20, Duration::from_secs(4));
        let line = r#"kubelet_image_pull_duration_seconds_bucket{le="5.0",image_size_in_bytes="100MB-500MB"} 1"#;
        assert!(metrics.encode().contains(line), "{}", metrics.encode());
    }

    #[test]
    fn probes_are_forgotten_with_their_container() {
        let metrics = Metrics::new();
        let labels = ProbeLabels {
            probe_type: "Liveness".into(),
            result: "successful".into(),
            container: "c".into(),
            pod: "p".into(),
            namespace: "ns".into(),
            pod_uid: "u".into(),
        };
        metrics.probed(&labels, Some(Duration::from_millis(1)));
        assert!(metrics.encode_probes().contains("prober_probe_total{probe_type=\"Liveness\""));
        metrics.forget_probe(&labels);
        assert!(!metrics.encode_probes().contains("Liveness"));
    }
}
