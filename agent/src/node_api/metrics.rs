//! `/metrics`, `/metrics/probes`, `/metrics/slis`: what was counted, and what is looked up when a
//! scrape comes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Shared;
use super::stats::text::{CONTENT_TYPE, Exposition, Kind, classic};
use crate::ids::PodUid;
use crate::join::csr::NodeCertificate;
use crate::join::files::CURRENT;
use crate::metrics::{HttpLabels, METRICS, volume_plugin};
use crate::node::machine::is_unified;
use crate::pod::spec::{is_static, spec_of};
use crate::volume::VolumeUsage;
use Kind::{Counter, Gauge};

/// First parts of paths that are told apart; all else is `other`.
const PATHS: [&str; 20] = [
    "attach",
    "checkpoint",
    "configz",
    "containerLogs",
    "debug",
    "exec",
    "flagz",
    "healthz",
    "logs",
    "metrics",
    "metrics/cadvisor",
    "metrics/probes",
    "metrics/resource",
    "pods",
    "portForward",
    "run",
    "runningpods",
    "stats",
    "statusz",
    "pprof",
];

fn text(body: String) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], body).into_response()
}

/// The part of `path` that its requests are counted under.
fn bucket(path: &str) -> &'static str {
    let path = path.trim_start_matches('/');
    let mut parts = path.splitn(3, '/');
    let first = parts.next().unwrap_or_default();
    let two = match (first, parts.next()) {
        ("metrics", Some(second)) => format!("metrics/{second}"),
        _ => first.to_owned(),
    };
    PATHS.into_iter().find(|known| *known == two).unwrap_or("other")
}

/// Counts requests of the guarded port.
pub(super) async fn count(request: Request, next: Next) -> Response {
    counted("readwrite", request, next).await
}

/// Counts requests of the read-only port.
pub(super) async fn count_read_only(request: Request, next: Next) -> Response {
    counted("readonly", request, next).await
}

async fn counted(server_type: &'static str, request: Request, next: Next) -> Response {
    let path = bucket(request.uri().path());
    let method = request.method().as_str();
    let known = ["OPTIONS", "GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "CONNECT"];
    let labels = HttpLabels {
        method: if known.contains(&method) { method } else { "other" }.to_owned(),
        path: path.to_owned(),
        server_type,
        long_running: if ["exec", "attach", "debug"].contains(&path) { "true" } else { "false" },
    };
    METRICS.http_began(&labels);
    // Also when the client goes away before the answer.
    let ended = Ended(labels, Instant::now());
    let response = next.run(request).await;
    drop(ended);
    response
}

struct Ended(HttpLabels, Instant);

impl Drop for Ended {
    fn drop(&mut self) {
        METRICS.http_ended(&self.0, self.1.elapsed());
    }
}

/// `/metrics`.
pub(super) async fn all(State(shared): State<Arc<Shared>>) -> Response {
    let mut out = classic(&METRICS.encode());
    let gatherer = shared.gatherer.clone();
    let looked = tokio::task::spawn_blocking(move || look(&shared)).await;
    out.push_str(&looked.unwrap_or_default());
    out.push_str(&volumes(&gatherer.volumes().await));
    text(out)
}

/// `/metrics/probes`.
pub(super) async fn probes() -> Response {
    let mut out = Exposition::default();
    if let Some(started) = process_start() {
        let help = "Start time of the process since unix epoch in seconds.";
        out.sample(("process_start_time_seconds", Gauge, help), &[], started, None);
    }
    text(out.render() + &classic(&METRICS.encode_probes()))
}

/// `/metrics/slis`.
pub(super) async fn slis(State(shared): State<Arc<Shared>>) -> Response {
    let mut out = Exposition::default();
    let healthy = shared.watched.stuck().await.is_empty();
    for name in super::health::CHECKS {
        let good = name != "syncloop" || healthy;
        let labels = [("name", name), ("type", "healthz")];
        let help = "This metric records the result of a single healthcheck.";
        let value = f64::from(u8::from(good));
        out.sample(("kubernetes_healthcheck", Gauge, help), &labels, value, None);
        let count = shared.checked(name, good);
        for (status, count) in [("success", count.0), ("error", count.1)] {
            let labels = [("name", name), ("status", status), ("type", "healthz")];
            let help = "This metric records the results of all healthcheck.";
            out.sample(
                ("kubernetes_healthchecks_total", Counter, help),
                &labels,
                count as f64,
                None,
            );
        }
    }
    text(out.render())
}

fn look(shared: &Shared) -> String {
    let mut out = Exposition::default();
    process(&mut out);
    let node = shared.node.node_name.as_str();
    out.sample(
        ("kubelet_node_name", Gauge, "The node's name. The count is always 1."),
        &[("node", node)],
        1.0,
        None,
    );
    pods(&mut out, shared);
    certificates(&mut out, shared);
    pulls(&mut out);
    out.render()
}

/// `/metrics` of the proxy's port: its own, and what every part of Kubernetes tells of its process
/// and of its requests to the API server.
pub(super) fn of_proxy(own: &str) -> Response {
    let mut out = Exposition::default();
    process(&mut out);
    text(classic(own) + &starting_with("rest_client_", &classic(&METRICS.encode())) + &out.render())
}

/// The metrics of which the name starts with `prefix`, of a text of many.
fn starting_with(prefix: &str, text: &str) -> String {
    let name = |line: &str| {
        let line = line.strip_prefix("# HELP ").or(line.strip_prefix("# TYPE ")).unwrap_or(line);
        line.starts_with(prefix)
    };
    text.split_inclusive('\n').filter(|line| name(line)).collect()
}

fn build_info(out: &mut Exposition) {
    let version = [
        ("git_version", "v1.36.0"),
        ("longshore_version", env!("CARGO_PKG_VERSION")),
        ("major", "1"),
        ("minor", "36"),
        ("platform", "linux"),
    ];
    let help = "A metric with a constant '1' value labeled by version and platform.";
    out.sample(("kubernetes_build_info", Gauge, help), &version, 1.0, None);
}

/// How full claims are, each once however many pods use it.
fn volumes(usage: &HashMap<PodUid, Vec<VolumeUsage>>) -> String {
    let mut claims = BTreeMap::new();
    for volume in usage.values().flatten() {
        if let Some(claim) = &volume.claim {
            claims.entry(claim.clone()).or_insert(volume);
        }
    }
    let mut out = Exposition::default();
    type Of = fn(&VolumeUsage) -> u64;
    let all: [(&'static str, &'static str, Of); 6] = [
        ("kubelet_volume_stats_capacity_bytes", "Capacity in bytes of the volume", |v| {
            v.bytes.capacity
        }),
        ("kubelet_volume_stats_available_bytes", "Number of available bytes in the volume", |v| {
            v.bytes.available
        }),
        ("kubelet_volume_stats_used_bytes", "Number of used bytes in the volume", |v| v.bytes.used),
        ("kubelet_volume_stats_inodes", "Maximum number of inodes in the volume", |v| {
            v.inodes.capacity
        }),
        ("kubelet_volume_stats_inodes_free", "Number of free inodes in the volume", |v| {
            v.inodes.available
        }),
        ("kubelet_volume_stats_inodes_used", "Number of used inodes in the volume", |v| {
            v.inodes.used
        }),
    ];
    for (name, help, of) in all {
        for (claim, volume) in &claims {
            let labels =
                [("namespace", &*claim.namespace), ("persistentvolumeclaim", &*claim.name)];
            out.sample((name, Gauge, help), &labels, of(volume) as f64, None);
        }
    }
    out.render()
}

/// The built-in runtime's pulls, under containerd's names.
fn pulls(out: &mut Exposition) {
    let counts = cri_shim::image::pull_counts();
    let help = "succeeded and failed counters";
    let name = "containerd_cri_sandboxed_image_pulls_total";
    for (status, count) in [("success", counts.succeeded), ("failure", counts.failed)] {
        out.sample((name, Counter, help), &[("status", status)], count as f64, None);
    }
    let name = "containerd_cri_sandboxed_in_progress_image_pulls_total";
    out.sample((name, Gauge, "in progress pulls"), &[], counts.in_progress as f64, None);
    let name = "longshore_image_pull_received_bytes_total";
    let help = "Bytes of layers received from registries, also by pulls under way.";
    out.sample((name, Counter, help), &[], counts.received_bytes as f64, None);
}

fn pods(out: &mut Exposition, shared: &Shared) {
    let views = shared.sync.table().pods();
    let mut containers =
        BTreeMap::from([("created", 0), ("exited", 0), ("running", 0), ("unknown", 0)]);
    let (mut sandboxes, mut ephemeral) = (0, 0);
    let mut volumes = BTreeMap::<String, usize>::new();
    let mut by_kind = [0_usize; 2];
    for view in &views {
        sandboxes += usize::from(view.sandbox.is_some());
        by_kind[usize::from(is_static(&view.pod))] += usize::from(view.source.is_some());
        ephemeral += spec_of(&view.pod).ephemeral_containers.as_ref().map_or(0, Vec::len);
        let status = &view.status;
        let all = [
            &status.container_statuses,
            &status.init_container_statuses,
            &status.ephemeral_container_statuses,
        ];
        for state in all.into_iter().flatten().flatten().filter_map(|s| s.state.as_ref()) {
            if state.running.is_some() {
                *containers.entry("running").or_default() += 1;
            } else if state.terminated.is_some() {
                *containers.entry("exited").or_default() += 1;
            }
        }
        for volume in spec_of(&view.pod).volumes.iter().flatten() {
            *volumes.entry(volume_plugin(volume)).or_default() += 1;
        }
    }
    let mut gauge = |name, help, labels: &[(&str, &str)], value: usize| {
        out.sample((name, Gauge, help), labels, value as f64, None);
    };
    gauge("kubelet_running_pods", "Number of pods that have a running pod sandbox", &[], sandboxes);
    for (state, count) in containers {
        gauge(
            "kubelet_running_containers",
            "Number of containers currently running",
            &[("container_state", state)],
            count,
        );
    }
    for (name, help) in [
        (
            "kubelet_active_pods",
            "The number of pods the kubelet considers active and which are being considered when admitting new pods. static is true if the pod is not from the apiserver.",
        ),
        (
            "kubelet_desired_pods",
            "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.",
        ),
    ] {
        gauge(name, help, &[("static", "")], by_kind[0]);
        gauge(name, help, &[("static", "true")], by_kind[1]);
    }
    gauge(
        "kubelet_mirror_pods",
        "The number of mirror pods the kubelet will try to create (one per admitted static pod)",
        &[],
        by_kind[1],
    );
    gauge(
        "kubelet_managed_ephemeral_containers",
        "Current number of ephemeral containers in pods managed by this kubelet.",
        &[],
        ephemeral,
    );
    let version = if is_unified() { 2 } else { 1 };
    gauge("kubelet_cgroup_version", "cgroup version on the hosts.", &[], version);
    for (plugin, count) in &volumes {
        for state in ["actual_state_of_world", "desired_state_of_world"] {
            let labels = [("plugin_name", plugin.as_str()), ("state", state)];
            gauge(
                "volume_manager_total_volumes",
                "Number of volumes in Volume Manager",
                &labels,
                *count,
            );
        }
    }
}

fn certificates(out: &mut Exposition, shared: &Shared) {
    let now = jiff::Timestamp::now().as_second();
    let left = |name: &str| {
        let pem = std::fs::read(shared.cert_dir.join(name)).ok()?;
        Some((NodeCertificate::read(&pem)?.not_after - now) as f64)
    };
    for (name, file, help) in [
        (
            "kubelet_certificate_manager_client_ttl_seconds",
            CURRENT,
            "Gauge of the TTL (time-to-live) of the Kubelet's client certificate. The value is in seconds until certificate expiry (negative if already expired). If client certificate is invalid or unused, the value will be +INF.",
        ),
        (
            "kubelet_certificate_manager_server_ttl_seconds",
            super::SERVING_CERTIFICATE,
            "Gauge of the shortest TTL (time-to-live) of the Kubelet's serving certificate. The value is in seconds until certificate expiry (negative if already expired). If serving certificate is invalid or unused, the value will be +INF.",
        ),
    ] {
        out.sample((name, Gauge, help), &[], left(file).unwrap_or(f64::INFINITY), None);
    }
    let errors = shared.watched.errors.as_ref().map(|errors| errors.borrow().clone());
    let failing = |what: &str| {
        f64::from(u8::from(errors.as_ref().is_some_and(|errors| errors.contains_key(what))))
    };
    for (name, what, help) in [
        (
            "kubelet_certificate_manager_client_expiration_renew_errors",
            "certificate",
            "Counter of certificate renewal errors.",
        ),
        (
            "kubelet_server_expiration_renew_errors",
            "serving certificate",
            "Counter of certificate renewal errors.",
        ),
    ] {
        out.sample((name, Counter, help), &[], failing(what), None);
    }
}

fn process_start() -> Option<f64> {
    let me = procfs::process::Process::myself().ok()?;
    let stat = me.stat().ok()?;
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: f64 = text.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok())?;
    Some(booted + stat.starttime as f64 / procfs::ticks_per_second() as f64)
}

fn process(out: &mut Exposition) {
    build_info(out);
    let Some((me, stat)) =
        procfs::process::Process::myself().ok().and_then(|me| me.stat().ok().map(|s| (me, s)))
    else {
        return;
    };
    let cpu = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
    let mut put = |name, kind, help, value: f64| out.sample((name, kind, help), &[], value, None);
    put(
        "process_cpu_seconds_total",
        Counter,
        "Total user and system CPU time spent in seconds.",
        cpu,
    );
    put(
        "process_resident_memory_bytes",
        Gauge,
        "Resident memory size in bytes.",
        (stat.rss * procfs::page_size()) as f64,
    );
    put("process_virtual_memory_bytes", Gauge, "Virtual memory size in bytes.", stat.vsize as f64);
    if let Ok(open) = me.fd_count() {
        put("process_open_fds", Gauge, "Number of open file descriptors.", open as f64);
    }
    if let Ok((soft, _)) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
    {
        put("process_max_fds", Gauge, "Maximum number of open file descriptors.", soft as f64);
    }
    if let Ok((soft, _)) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_AS) {
        // As Go's: no limit is the largest number.
        put(
            "process_virtual_memory_max_bytes",
            Gauge,
            "Maximum amount of virtual memory available in bytes.",
            soft as f64,
        );
    }
    if let Some(started) = process_start() {
        put(
            "process_start_time_seconds",
            Gauge,
            "Start time of the process since unix epoch in seconds.",
            started,
        );
    }
    // Dashboards look for it; a task is what a goroutine is.
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        let tasks = runtime.metrics().num_alive_tasks();
        put("go_goroutines", Gauge, "Number of goroutines that currently exist.", tasks as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_told_of_once() {
        use crate::ids::NamespacedName;
        use crate::volume::Room;
        let room = Room { available: 1, capacity: 3, used: 2 };
        let usage = |claim: Option<&str>| VolumeUsage {
            name: "v".into(),
            claim: claim.map(|claim| NamespacedName::new("n", claim)),
            bytes: room,
            inodes: Room::default(),
            at: jiff::Timestamp::UNIX_EPOCH,
        };
        let all = HashMap::from([
            (PodUid::from("a"), vec![usage(Some("c")), usage(None)]),
            (PodUid::from("b"), vec![usage(Some("c"))]),
        ]);
        let text = volumes(&all);
        let sample =
            "kubelet_volume_stats_used_bytes{namespace=\"n\",persistentvolumeclaim=\"c\"} 2";
        assert_eq!(text.lines().filter(|line| *line == sample).count(), 1, "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("kubelet_")).count(), 6, "{text}");
        assert_eq!(volumes(&HashMap::new()), "");
    }

    #[test]
    fn requests_are_counted_under_few_names() {
        for (path, expected) in [
            ("/pods", "pods"),
            ("/metrics/cadvisor", "metrics/cadvisor"),
            ("/metrics", "metrics"),
            ("/metrics/no", "other"),
            ("/exec/a/b/c", "exec"),
            ("/", "other"),
            ("/../etc", "other"),
        ] {
            assert_eq!(bucket(path), expected, "{path}");
        }
    }
}
