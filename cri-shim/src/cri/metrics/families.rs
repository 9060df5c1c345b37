//! The metrics by name, as cAdvisor has them, so that dashboards and alerts find them; and their
//! samples from what was read. Pure.

use crate::api::{self, MetricType};
use crate::cgroup::detail::Detail;
use crate::cgroup::stats::Usage;

/// Labels of every metric, in order; the family's own come after.
pub const LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// A metric's name, text, kind and own labels.
pub struct Family {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: MetricType,
    pub labels: &'static [&'static str],
}

const fn counter(
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
) -> Family {
    Family { name, help, kind: MetricType::Counter, labels }
}

const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family { name, help, kind: MetricType::Gauge, labels: &[] }
}

/// All families.
pub const FAMILIES: &[Family] = &[
    counter("container_cpu_usage_seconds_total", "CPU time consumed in seconds.", &["cpu"]),
    counter("container_cpu_user_seconds_total", "User CPU time consumed in seconds.", &[]),
    counter("container_cpu_system_seconds_total", "System CPU time consumed in seconds.", &[]),
    counter("container_cpu_cfs_periods_total", "Enforcement periods of the CPU quota.", &[]),
    counter("container_cpu_cfs_throttled_periods_total", "Periods that were throttled.", &[]),
    counter("container_cpu_cfs_throttled_seconds_total", "Time throttled in seconds.", &[]),
    gauge("container_memory_usage_bytes", "Memory in use, whenever it was accessed."),
    gauge("container_memory_working_set_bytes", "Memory that cannot be dropped at once."),
    gauge("container_memory_rss", "Memory that belongs to no file, in bytes."),
    gauge("container_memory_cache", "Page cache in bytes."),
    gauge("container_memory_swap", "Swap in use in bytes."),
    gauge("container_memory_mapped_file", "Memory of mapped files in bytes."),
    gauge("container_memory_kernel_usage", "Kernel memory in bytes."),
    gauge("container_memory_max_usage_bytes", "The most memory that was in use."),
    gauge("container_memory_total_active_file_bytes", "Active page cache in bytes."),
    gauge("container_memory_total_inactive_file_bytes", "Inactive page cache in bytes."),
    counter("container_memory_failcnt", "Times that the memory limit was hit.", &[]),
    counter("container_memory_failures_total", "Page faults.", &["failure_type", "scope"]),
    counter("container_oom_events_total", "Processes killed for want of memory.", &[]),
    counter("container_fs_reads_bytes_total", "Bytes read.", &["device"]),
    counter("container_fs_writes_bytes_total", "Bytes written.", &["device"]),
    counter("container_fs_reads_total", "Reads completed.", &["device"]),
    counter("container_fs_writes_total", "Writes completed.", &["device"]),
    counter(
        "container_blkio_device_usage_total",
        "Bytes read and written.",
        &["device", "major", "minor", "operation"],
    ),
    gauge("container_fs_usage_bytes", "Bytes in the writable layer."),
    gauge("container_fs_limit_bytes", "Bytes of the file system under the writable layer."),
    gauge("container_fs_inodes_total", "Inodes of the file system under the writable layer."),
    gauge("container_fs_inodes_free", "Of them, those that are free."),
    gauge("container_fs_inodes_used", "Inodes in the writable layer."),
    gauge("container_processes", "Processes running."),
    gauge("container_threads", "Threads running."),
    gauge("container_threads_max", "The most threads allowed, 0 for any number."),
    gauge("container_file_descriptors", "Open file descriptors."),
    gauge("container_sockets", "Open sockets."),
    gauge("container_start_time_seconds", "Start in seconds since the epoch."),
    gauge("container_last_seen", "Time of this sample in seconds since the epoch."),
    gauge("container_spec_cpu_period", "CPU period in microseconds."),
    gauge("container_spec_cpu_quota", "CPU quota in microseconds."),
    gauge("container_spec_cpu_shares", "CPU shares."),
    gauge("container_spec_memory_limit_bytes", "Memory limit in bytes."),
    gauge("container_spec_memory_swap_limit_bytes", "Limit of memory and swap in bytes."),
    counter("container_pressure_cpu_waiting_seconds_total", "Some tasks waited for CPU.", &[]),
    counter("container_pressure_cpu_stalled_seconds_total", "All tasks waited for CPU.", &[]),
    counter(
        "container_pressure_memory_waiting_seconds_total",
        "Some tasks waited for memory.",
        &[],
    ),
    counter("container_pressure_memory_stalled_seconds_total", "All tasks waited for memory.", &[]),
    counter("container_pressure_io_waiting_seconds_total", "Some tasks waited for I/O.", &[]),
    counter("container_pressure_io_stalled_seconds_total", "All tasks waited for I/O.", &[]),
    counter("container_network_receive_bytes_total", "Bytes received.", &["interface"]),
    counter("container_network_receive_packets_total", "Packets received.", &["interface"]),
    counter("container_network_receive_errors_total", "Errors while receiving.", &["interface"]),
    counter(
        "container_network_receive_packets_dropped_total",
        "Packets dropped while receiving.",
        &["interface"],
    ),
    counter("container_network_transmit_bytes_total", "Bytes sent.", &["interface"]),
    counter("container_network_transmit_packets_total", "Packets sent.", &["interface"]),
    counter("container_network_transmit_errors_total", "Errors while sending.", &["interface"]),
    counter(
        "container_network_transmit_packets_dropped_total",
        "Packets dropped while sending.",
        &["interface"],
    ),
];

/// The descriptors of all families.
pub fn descriptors() -> Vec<api::MetricDescriptor> {
    let descriptor = |family: &Family| api::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: LABELS.iter().chain(family.labels).map(|l| (*l).to_owned()).collect(),
    };
    FAMILIES.iter().map(descriptor).collect()
}

/// One value of a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub family: &'static str,
    pub labels: Vec<String>,
    pub value: u64,
}

/// A value without labels of its own.
pub fn sample(family: &'static str, value: u64) -> Sample {
    Sample { family, labels: Vec::new(), value }
}

/// What a cgroup tells, of a container or a whole pod. The CRI has whole numbers only.
pub fn of_cgroup(usage: &Usage, detail: &Detail) -> Vec<Sample> {
    const SECOND: u64 = 1_000_000_000;
    let labelled = |family, labels: &[&str], value| Sample {
        family,
        labels: labels.iter().map(|l| (*l).to_owned()).collect(),
        value,
    };
    let mut samples = vec![
        labelled("container_cpu_usage_seconds_total", &["total"], usage.cpu_nanoseconds / SECOND),
        sample("container_cpu_user_seconds_total", detail.cpu_user_nanoseconds / SECOND),
        sample("container_cpu_system_seconds_total", detail.cpu_system_nanoseconds / SECOND),
        sample("container_memory_usage_bytes", usage.memory),
        sample("container_memory_working_set_bytes", usage.working_set()),
        sample("container_memory_rss", usage.rss),
        sample("container_memory_cache", detail.memory_cache),
        sample("container_memory_swap", usage.swap.unwrap_or(0)),
        sample("container_memory_mapped_file", detail.memory_mapped_file),
        sample("container_memory_kernel_usage", detail.memory_kernel),
        sample("container_memory_max_usage_bytes", detail.memory_max_usage),
        sample("container_memory_total_active_file_bytes", detail.memory_active_file),
        sample("container_memory_total_inactive_file_bytes", detail.memory_inactive_file),
        sample("container_memory_failcnt", detail.memory_failures),
        sample("container_oom_events_total", detail.oom_kills),
        sample("container_processes", detail.processes),
        sample("container_threads", detail.threads),
        sample("container_threads_max", detail.threads_max),
        sample("container_file_descriptors", detail.file_descriptors),
        sample("container_sockets", detail.sockets),
        sample("container_last_seen", usage.timestamp as u64 / SECOND),
    ];
    for (kind, value) in [("pgfault", usage.page_faults), ("pgmajfault", usage.major_page_faults)] {
        for scope in ["container", "hierarchy"] {
            samples.push(labelled("container_memory_failures_total", &[kind, scope], value));
        }
    }
    // Without a quota there are no series either; with one there are before its first period ends.
    if detail.cfs_quota || detail.cfs_periods > 0 {
        let throttled = detail.cfs_throttled_nanoseconds / SECOND;
        samples.extend([
            sample("container_cpu_cfs_periods_total", detail.cfs_periods),
            sample("container_cpu_cfs_throttled_periods_total", detail.cfs_throttled_periods),
            sample("container_cpu_cfs_throttled_seconds_total", throttled),
        ]);
    }
    for io in &detail.io {
        let device = [io.device.as_str()];
        samples.extend([
            labelled("container_fs_reads_bytes_total", &device, io.read_bytes),
            labelled("container_fs_writes_bytes_total", &device, io.written_bytes),
            labelled("container_fs_reads_total", &device, io.reads),
            labelled("container_fs_writes_total", &device, io.writes),
        ]);
        let (major, minor) = io.device.split_once(':').unwrap_or_default();
        for (operation, bytes) in [("Read", io.read_bytes), ("Write", io.written_bytes)] {
            let labels = [device[0], major, minor, operation];
            samples.push(labelled("container_blkio_device_usage_total", &labels, bytes));
        }
    }
    let pressures = [
        (
            &usage.cpu_pressure,
            "container_pressure_cpu_waiting_seconds_total",
            "container_pressure_cpu_stalled_seconds_total",
        ),
        (
            &usage.memory_pressure,
            "container_pressure_memory_waiting_seconds_total",
            "container_pressure_memory_stalled_seconds_total",
        ),
        (
            &usage.io_pressure,
            "container_pressure_io_waiting_seconds_total",
            "container_pressure_io_stalled_seconds_total",
        ),
    ];
    for (pressure, waiting, stalled) in pressures {
        if let Some(pressure) = pressure {
            samples.push(sample(waiting, pressure.some.total / 1_000_000));
            samples.push(sample(stalled, pressure.full.total / 1_000_000));
        }
    }
    samples
}

/// What a container was given.
pub fn of_limits(resources: &api::LinuxContainerResources) -> Vec<Sample> {
    let given = [
        ("container_spec_cpu_period", resources.cpu_period),
        ("container_spec_cpu_quota", resources.cpu_quota),
        ("container_spec_cpu_shares", resources.cpu_shares),
        ("container_spec_memory_limit_bytes", resources.memory_limit_in_bytes),
        ("container_spec_memory_swap_limit_bytes", resources.memory_swap_limit_in_bytes),
    ];
    let set =
        given.into_iter().filter_map(|(family, value)| Some((family, u64::try_from(value).ok()?)));
    set.filter(|(family, value)| *value > 0 || family.starts_with("container_spec_memory"))
        .map(|(family, value)| sample(family, value))
        .collect()
}

/// The counters of `/proc/net/dev`, without loopback.
pub fn of_network(text: &str) -> Vec<Sample> {
    const COLUMNS: [(usize, &str); 8] = [
        (0, "container_network_receive_bytes_total"),
        (1, "container_network_receive_packets_total"),
        (2, "container_network_receive_errors_total"),
        (3, "container_network_receive_packets_dropped_total"),
        (8, "container_network_transmit_bytes_total"),
        (9, "container_network_transmit_packets_total"),
        (10, "container_network_transmit_errors_total"),
        (11, "container_network_transmit_packets_dropped_total"),
    ];
    let mut samples = Vec::new();
    for line in text.lines() {
        let Some((interface, counters)) = line.split_once(':') else { continue };
        let counters: Vec<u64> =
            counters.split_whitespace().filter_map(|c| c.parse().ok()).collect();
        if interface.trim() == "lo" || counters.len() < 16 {
            continue;
        }
        samples.extend(COLUMNS.map(|(column, family)| Sample {
            family,
            labels: vec![interface.trim().to_owned()],
            value: counters[column],
        }));
    }
    samples
}

/// Samples as the CRI has them; `labels` are the values of [`LABELS`].
pub fn render(samples: Vec<Sample>, labels: &[String; 6], timestamp: i64) -> Vec<api::Metric> {
    let kind =
        |name| FAMILIES.iter().find(|f| f.name == name).map_or(MetricType::Gauge, |f| f.kind);
    let metric = |sample: Sample| api::Metric {
        name: sample.family.to_owned(),
        timestamp,
        metric_type: kind(sample.family) as i32,
        label_values: labels.iter().cloned().chain(sample.labels).collect(),
        value: Some(api::UInt64Value { value: sample.value }),
    };
    samples.into_iter().map(metric).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::detail::DeviceIo;
    use crate::cgroup::pressure::Pressure;

    #[test]
    fn every_sample_is_of_a_family_and_has_its_labels() {
        let usage = Usage {
            cpu_pressure: Some(Pressure::default()),
            memory_pressure: Some(Pressure::default()),
            io_pressure: Some(Pressure::default()),
            ..Usage::default()
        };
        // A limit without a period that has ended.
        let detail = Detail { cfs_quota: true, io: vec![DeviceIo::default()], ..Detail::default() };
        let network = "eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16";
        let resources = api::LinuxContainerResources {
            cpu_period: 1,
            cpu_quota: 1,
            cpu_shares: 1,
            ..Default::default()
        };
        let other = [
            "container_fs_usage_bytes",
            "container_fs_limit_bytes",
            "container_fs_inodes_total",
            "container_fs_inodes_free",
            "container_fs_inodes_used",
            "container_start_time_seconds",
        ];
        let samples = [
            of_cgroup(&usage, &detail),
            of_limits(&resources),
            of_network(network),
            other.map(|family| sample(family, 0)).to_vec(),
        ]
        .concat();
        for sample in &samples {
            let family = FAMILIES.iter().find(|f| f.name == sample.family).unwrap();
            assert_eq!(family.labels.len(), sample.labels.len(), "{}", family.name);
        }
        for family in FAMILIES {
            assert!(
                samples.iter().any(|s| s.family == family.name),
                "{} has no sample",
                family.name
            );
        }
        let sent = samples.iter().find(|s| s.family == "container_network_transmit_bytes_total");
        assert_eq!(sent.map(|s| s.value), Some(9));
        assert_eq!(descriptors().len(), FAMILIES.len());
    }
}
