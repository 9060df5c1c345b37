//! `/metrics/cadvisor`: containers under cAdvisor's names and labels, so that dashboards and alerts
//! for kubelet work. Pure.

use super::gather::{Interface, Sample, Snapshot};
use super::text::Exposition;
use super::text::Kind::{self, Counter, Gauge};
use crate::node::machine::Machine;
use crate::pod::cgroup::usage::Usage;

type Metric = (&'static str, Kind, &'static str);

/// One cgroup, as the labels name it.
struct Subject<'a> {
    container: &'a str,
    id: String,
    image: &'a str,
    name: &'a str,
    namespace: &'a str,
    pod: &'a str,
}

impl Subject<'_> {
    /// The labels that every sample has, with some more, sorted by name as upstream writes them.
    fn labels<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let mut labels = vec![
            ("container", self.container),
            ("id", self.id.as_str()),
            ("image", self.image),
            ("name", self.name),
            ("namespace", self.namespace),
            ("pod", self.pod),
        ];
        labels.extend_from_slice(more);
        labels.sort_unstable();
        labels
    }
}

pub(super) fn render(
    snapshot: &Snapshot,
    classes: &[(String, Sample)],
    machine: &Machine,
) -> String {
    let mut out = Exposition::default();
    machine_metrics(&mut out, machine);
    let plain = |path: &str| Subject {
        container: "",
        id: format!("/{path}"),
        image: "",
        name: "",
        namespace: "",
        pod: "",
    };
    let root = plain("");
    usage(&mut out, &root, &snapshot.node.sample, Some(snapshot.node.started.as_second() as f64));
    let at = snapshot.node.sample.at.as_millisecond();
    for interface in &snapshot.node.network {
        network(&mut out, &root, interface, at);
    }
    if let Some(fs) = snapshot.node.rootfs {
        file_system(
            &mut out,
            &root,
            (fs.capacity - fs.available.min(fs.capacity), fs.capacity),
            at,
        );
    }
    for (path, sample) in classes {
        usage(&mut out, &plain(path), sample, None);
    }
    for pod in &snapshot.pods {
        let Some((path, sample)) = &pod.cgroup else { continue };
        let subject = Subject {
            container: "",
            id: format!("/{path}"),
            image: "",
            name: "",
            namespace: &pod.key.0,
            pod: &pod.key.1,
        };
        let started = pod.started.map(|time| time.as_second() as f64);
        usage(&mut out, &subject, sample, started);
        // cAdvisor counts a pod's network where its sandbox is.
        let sandbox =
            Subject { id: format!("/{path}/{}", pod.sandbox), name: &pod.sandbox, ..subject };
        for interface in &pod.network {
            network(&mut out, &sandbox, interface, at);
        }
        for container in &pod.containers {
            let Some((path, sample)) = &container.cgroup else { continue };
            let subject = Subject {
                container: &container.name,
                id: format!("/{path}"),
                image: &container.image,
                name: &container.id,
                namespace: &pod.key.0,
                pod: &pod.key.1,
            };
            let started = container.started.map(|time| time.as_millisecond() as f64 / 1e3);
            usage(&mut out, &subject, sample, started);
            if let Some((bytes, _)) = container.layer {
                let size = snapshot.node.imagefs.map_or(0, |fs| fs.capacity);
                file_system(&mut out, &subject, (bytes, size), at);
            }
        }
    }
    let failed = f64::from(u8::from(snapshot.error));
    let help = "1 if there was an error while getting container metrics, 0 otherwise";
    out.sample(("container_scrape_error", Gauge, help), &[], failed, None);
    out.render()
}

fn machine_metrics(out: &mut Exposition, machine: &Machine) {
    let labels = [
        ("boot_id", machine.boot_id.as_str()),
        ("machine_id", machine.machine_id.as_str()),
        ("system_uuid", machine.system_uuid.as_str()),
    ];
    let version = [
        ("cadvisorRevision", ""),
        ("cadvisorVersion", ""),
        ("dockerVersion", ""),
        ("kernelVersion", machine.kernel_version.as_str()),
        ("osVersion", machine.os_image.as_str()),
    ];
    let info = "A metric with a constant '1' value labeled by kernel version, OS version, docker \
                version, cadvisor version & cadvisor revision.";
    out.sample(("cadvisor_version_info", Gauge, info), &version, 1.0, None);
    let mut gauge = |name, help, value: u64| {
        out.sample((name, Gauge, help), &labels, value as f64, None);
    };
    gauge("machine_cpu_cores", "Number of logical CPU cores.", machine.cpus);
    gauge("machine_cpu_physical_cores", "Number of physical CPU cores.", machine.cpus);
    gauge("machine_cpu_sockets", "Number of CPU sockets.", 1);
    gauge("machine_memory_bytes", "Amount of memory installed on the machine.", machine.memory);
    gauge("machine_swap_bytes", "Amount of swap memory available on the machine.", machine.swap);
    let help = "1 if there was an error while getting machine metrics, 0 otherwise.";
    out.sample(("machine_scrape_error", Gauge, help), &[], 0.0, None);
}

fn usage(out: &mut Exposition, subject: &Subject<'_>, sample: &Sample, started: Option<f64>) {
    let at = Some(sample.at.as_millisecond());
    let u = &sample.usage;
    let seconds = |nanos: u64| nanos as f64 / 1e9;
    let labels = subject.labels(&[]);
    let mut put = |metric: Metric, value: f64| out.sample(metric, &labels, value, at);
    put(
        (
            "container_cpu_user_seconds_total",
            Counter,
            "Cumulative user cpu time consumed in seconds.",
        ),
        seconds(u.cpu_user),
    );
    put(
        (
            "container_cpu_system_seconds_total",
            Counter,
            "Cumulative system cpu time consumed in seconds.",
        ),
        seconds(u.cpu_system),
    );
    if u.quota.is_some() {
        put(
            (
                "container_cpu_cfs_periods_total",
                Counter,
                "Number of elapsed enforcement period intervals.",
            ),
            u.periods as f64,
        );
        put(
            (
                "container_cpu_cfs_throttled_periods_total",
                Counter,
                "Number of throttled period intervals.",
            ),
            u.throttled_periods as f64,
        );
        put(
            (
                "container_cpu_cfs_throttled_seconds_total",
                Counter,
                "Total time duration the container has been throttled.",
            ),
            seconds(u.throttled),
        );
    }
    put(
        (
            "container_cpu_load_average_10s",
            Gauge,
            "Value of container cpu load average over the last 10 seconds.",
        ),
        0.0,
    );
    put(("container_memory_cache", Gauge, "Number of bytes of page cache memory."), u.cache as f64);
    put(("container_memory_rss", Gauge, "Size of RSS in bytes."), u.anon as f64);
    put(
        ("container_memory_mapped_file", Gauge, "Size of memory mapped files in bytes."),
        u.mapped as f64,
    );
    put(("container_memory_swap", Gauge, "Container swap usage in bytes."), u.swap as f64);
    put(
        ("container_memory_kernel_usage", Gauge, "Size of kernel memory allocated in bytes."),
        u.kernel as f64,
    );
    put(
        ("container_memory_failcnt", Counter, "Number of memory usage hits limits"),
        u.memory_failures as f64,
    );
    put(
        (
            "container_memory_usage_bytes",
            Gauge,
            "Current memory usage in bytes, including all memory regardless of when it was accessed",
        ),
        u.memory as f64,
    );
    put(
        ("container_memory_max_usage_bytes", Gauge, "Maximum memory usage recorded in bytes"),
        u.memory_max as f64,
    );
    put(
        ("container_memory_working_set_bytes", Gauge, "Current working set in bytes."),
        u.working_set() as f64,
    );
    put(
        ("container_memory_total_active_file_bytes", Gauge, "Current total active file in bytes."),
        u.cache.saturating_sub(u.inactive_file) as f64,
    );
    put(
        (
            "container_memory_total_inactive_file_bytes",
            Gauge,
            "Current total inactive file in bytes.",
        ),
        u.inactive_file as f64,
    );
    put(
        (
            "container_oom_events_total",
            Counter,
            "Count of out of memory events observed for the container",
        ),
        u.oom_kills as f64,
    );
    put(
        ("container_processes", Gauge, "Number of processes running inside the container."),
        u.processes as f64,
    );
    put(
        ("container_last_seen", Gauge, "Last time a container was seen by the exporter"),
        sample.at.as_second() as f64,
    );
    if let Some(started) = started {
        put(
            (
                "container_start_time_seconds",
                Gauge,
                "Start time of the container since unix epoch in seconds.",
            ),
            started,
        );
    }
    spec(&mut put, u);
    let total = subject.labels(&[("cpu", "total")]);
    out.sample(
        ("container_cpu_usage_seconds_total", Counter, "Cumulative cpu time consumed in seconds."),
        &total,
        seconds(u.cpu),
        at,
    );
    for (failure, count) in [("pgfault", u.page_faults), ("pgmajfault", u.major_faults)] {
        for scope in ["container", "hierarchy"] {
            let labels = subject.labels(&[("failure_type", failure), ("scope", scope)]);
            let help = "Cumulative count of memory allocation failures.";
            out.sample(
                ("container_memory_failures_total", Counter, help),
                &labels,
                count as f64,
                at,
            );
        }
    }
    for io in &u.io {
        let mut put = |metric: Metric, value: u64| {
            let labels = subject.labels(&[("device", io.device.as_str())]);
            out.sample(metric, &labels, value as f64, at);
        };
        put(
            ("container_fs_reads_bytes_total", Counter, "Cumulative count of bytes read"),
            io.read_bytes,
        );
        put(
            ("container_fs_writes_bytes_total", Counter, "Cumulative count of bytes written"),
            io.written_bytes,
        );
        put(("container_fs_reads_total", Counter, "Cumulative count of reads completed"), io.reads);
        put(
            ("container_fs_writes_total", Counter, "Cumulative count of writes completed"),
            io.writes,
        );
    }
}

fn spec(put: &mut impl FnMut(Metric, f64), u: &Usage) {
    put(("container_spec_cpu_period", Gauge, "CPU period of the container."), u.period as f64);
    if let Some(quota) = u.quota {
        put(("container_spec_cpu_quota", Gauge, "CPU quota of the container."), quota as f64);
    }
    put(("container_spec_cpu_shares", Gauge, "CPU share of the container."), u.shares as f64);
    let limit = |limit: Option<u64>| limit.unwrap_or(0) as f64;
    put(
        ("container_spec_memory_limit_bytes", Gauge, "Memory limit for the container."),
        limit(u.memory_limit),
    );
    put(
        ("container_spec_memory_swap_limit_bytes", Gauge, "Memory swap limit for the container."),
        limit(u.swap_limit),
    );
    put(
        (
            "container_spec_memory_reservation_limit_bytes",
            Gauge,
            "Memory reservation limit for the container.",
        ),
        0.0,
    );
}

fn network(out: &mut Exposition, subject: &Subject<'_>, interface: &Interface, at: i64) {
    let labels = subject.labels(&[("interface", interface.name.as_str())]);
    let names: [(Metric, u64); 8] = [
        (
            (
                "container_network_receive_bytes_total",
                Counter,
                "Cumulative count of bytes received",
            ),
            interface.received[0],
        ),
        (
            (
                "container_network_receive_packets_total",
                Counter,
                "Cumulative count of packets received",
            ),
            interface.received[1],
        ),
        (
            (
                "container_network_receive_errors_total",
                Counter,
                "Cumulative count of errors encountered while receiving",
            ),
            interface.received[2],
        ),
        (
            (
                "container_network_receive_packets_dropped_total",
                Counter,
                "Cumulative count of packets dropped while receiving",
            ),
            interface.received[3],
        ),
        (
            (
                "container_network_transmit_bytes_total",
                Counter,
                "Cumulative count of bytes transmitted",
            ),
            interface.sent[0],
        ),
        (
            (
                "container_network_transmit_packets_total",
                Counter,
                "Cumulative count of packets transmitted",
            ),
            interface.sent[1],
        ),
        (
            (
                "container_network_transmit_errors_total",
                Counter,
                "Cumulative count of errors encountered while transmitting",
            ),
            interface.sent[2],
        ),
        (
            (
                "container_network_transmit_packets_dropped_total",
                Counter,
                "Cumulative count of packets dropped while transmitting",
            ),
            interface.sent[3],
        ),
    ];
    for (metric, value) in names {
        out.sample(metric, &labels, value as f64, Some(at));
    }
}

fn file_system(out: &mut Exposition, subject: &Subject<'_>, (used, size): (u64, u64), at: i64) {
    let labels = subject.labels(&[("device", "")]);
    let help = "Number of bytes that are consumed by the container on this filesystem.";
    out.sample(("container_fs_usage_bytes", Gauge, help), &labels, used as f64, Some(at));
    let help = "Number of bytes that can be consumed by the container on this filesystem.";
    out.sample(("container_fs_limit_bytes", Gauge, help), &labels, size as f64, Some(at));
}
