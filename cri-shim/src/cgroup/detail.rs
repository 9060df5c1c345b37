//! Everything that metrics tell of a cgroup, beyond the few numbers of [`super::stats`]. Read when
//! metrics are asked for, never otherwise.

use std::fs;
use std::path::Path;

use super::{Hierarchies, field};

/// Kernel ticks a second in `cpuacct.stat`, the same on every Linux that Kubernetes runs on.
const USER_HZ: u64 = 100;

/// One moment of a cgroup. What the kernel does not say is zero or absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    pub cpu_user_nanoseconds: u64,
    pub cpu_system_nanoseconds: u64,
    /// The CPU time is limited, so that there are periods.
    pub cfs_quota: bool,
    pub cfs_periods: u64,
    pub cfs_throttled_periods: u64,
    pub cfs_throttled_nanoseconds: u64,
    pub memory_cache: u64,
    pub memory_mapped_file: u64,
    pub memory_kernel: u64,
    pub memory_active_file: u64,
    pub memory_inactive_file: u64,
    pub memory_max_usage: u64,
    pub memory_failures: u64,
    pub oom_kills: u64,
    pub threads: u64,
    /// Zero for any number.
    pub threads_max: u64,
    pub processes: u64,
    pub file_descriptors: u64,
    pub sockets: u64,
    pub io: Vec<DeviceIo>,
}

/// What was read from and written to one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// `major:minor`.
    pub device: String,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Reads a cgroup.
pub fn read(cgroups: &Hierarchies, cgroup: &Path) -> Detail {
    let file = |controller: &str, name: &str| {
        fs::read_to_string(cgroups.controller(controller, cgroup).join(name)).unwrap_or_default()
    };
    let mut detail = if cgroups.v2 { unified(file) } else { per_controller(file) };
    detail.oom_kills = cgroups.oom_kills(cgroup).unwrap_or(0);
    for pid in cgroups.processes(cgroup) {
        detail.processes += 1;
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            detail.file_descriptors += 1;
            let target = fs::read_link(entry.path());
            detail.sockets +=
                u64::from(target.is_ok_and(|t| t.to_string_lossy().starts_with("socket:")));
        }
    }
    detail
}

fn unified(file: impl Fn(&str, &str) -> String) -> Detail {
    let (cpu, memory, events) =
        (file("", "cpu.stat"), file("", "memory.stat"), file("", "memory.events"));
    let of = |text: &str, name: &str| field(text, name).unwrap_or(0);
    let number = |name: &str| file("", name).trim().parse().unwrap_or(0);
    Detail {
        cpu_user_nanoseconds: of(&cpu, "user_usec") * 1000,
        cpu_system_nanoseconds: of(&cpu, "system_usec") * 1000,
        cfs_quota: limited(&file("", "cpu.max")),
        cfs_periods: of(&cpu, "nr_periods"),
        cfs_throttled_periods: of(&cpu, "nr_throttled"),
        cfs_throttled_nanoseconds: of(&cpu, "throttled_usec") * 1000,
        memory_cache: of(&memory, "file"),
        memory_mapped_file: of(&memory, "file_mapped"),
        memory_kernel: of(&memory, "kernel"),
        memory_active_file: of(&memory, "active_file"),
        memory_inactive_file: of(&memory, "inactive_file"),
        memory_max_usage: number("memory.peak"),
        memory_failures: of(&events, "max"),
        threads: number("pids.current"),
        threads_max: number("pids.max"),
        io: io_stat(&file("", "io.stat")),
        ..Detail::default()
    }
}

/// Whether a quota of CPU time is a number: without one it is `max` on v2 and -1 on v1.
fn limited(quota: &str) -> bool {
    quota.split_whitespace().next().is_some_and(|first| first.parse::<u64>().is_ok())
}

fn per_controller(file: impl Fn(&str, &str) -> String) -> Detail {
    let (cpu, times, memory) =
        (file("cpu", "cpu.stat"), file("cpuacct", "cpuacct.stat"), file("memory", "memory.stat"));
    let of = |text: &str, name: &str| field(text, name).unwrap_or(0);
    let number = |controller: &str, name: &str| file(controller, name).trim().parse().unwrap_or(0);
    let ticks = 1_000_000_000 / USER_HZ;
    Detail {
        cpu_user_nanoseconds: of(&times, "user") * ticks,
        cpu_system_nanoseconds: of(&times, "system") * ticks,
        cfs_quota: limited(&file("cpu", "cpu.cfs_quota_us")),
        cfs_periods: of(&cpu, "nr_periods"),
        cfs_throttled_periods: of(&cpu, "nr_throttled"),
        cfs_throttled_nanoseconds: of(&cpu, "throttled_time"),
        memory_cache: of(&memory, "total_cache"),
        memory_mapped_file: of(&memory, "total_mapped_file"),
        memory_kernel: number("memory", "memory.kmem.usage_in_bytes"),
        memory_active_file: of(&memory, "total_active_file"),
        memory_inactive_file: of(&memory, "total_inactive_file"),
        memory_max_usage: number("memory", "memory.max_usage_in_bytes"),
        memory_failures: number("memory", "memory.failcnt"),
        threads: number("pids", "pids.current"),
        threads_max: number("pids", "pids.max"),
        io: blkio(
            &file("blkio", "blkio.throttle.io_service_bytes_recursive"),
            &file("blkio", "blkio.throttle.io_serviced_recursive"),
        ),
        ..Detail::default()
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 ...`, a line a device.
fn io_stat(text: &str) -> Vec<DeviceIo> {
    let device = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let value = |name: &str| {
            let mut pairs = rest.split(' ').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).and_then(|(_, v)| v.parse().ok()).unwrap_or(0)
        };
        Some(DeviceIo {
            device: device.to_owned(),
            read_bytes: value("rbytes"),
            written_bytes: value("wbytes"),
            reads: value("rios"),
            writes: value("wios"),
        })
    };
    text.lines().filter_map(device).collect()
}

/// `8:0 Read 1`, a line for each device and operation; the total has no device.
fn blkio(bytes: &str, operations: &str) -> Vec<DeviceIo> {
    let mut devices: Vec<DeviceIo> = Vec::new();
    for (text, counts_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let mut parts = line.split(' ');
            let (Some(name), Some(operation), Some(Ok(value))) =
                (parts.next(), parts.next(), parts.next().map(str::parse::<u64>))
            else {
                continue;
            };
            let at = devices.iter().position(|d| d.device == name).unwrap_or_else(|| {
                devices.push(DeviceIo { device: name.to_owned(), ..DeviceIo::default() });
                devices.len() - 1
            });
            match (operation, counts_bytes) {
                ("Read", true) => devices[at].read_bytes = value,
                ("Write", true) => devices[at].written_bytes = value,
                ("Read", false) => devices[at].reads = value,
                ("Write", false) => devices[at].writes = value,
                _ => {}
            }
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_hierarchies_tell_the_same() {
        let v2 = unified(|_, name| {
            let text = match name {
                "cpu.stat" => {
                    "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\nnr_periods 7\nnr_throttled 2\nthrottled_usec 90\n"
                }
                "memory.stat" => {
                    "anon 1\nfile 4096\nkernel 64\nfile_mapped 10\ninactive_file 5\nactive_file 6\n"
                }
                "memory.events" => "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n",
                "cpu.max" => "50000 100000\n",
                "memory.peak" => "9999\n",
                "pids.current" => "4\n",
                "io.stat" => "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
                _ => "",
            };
            text.to_owned()
        });
        let v1 = per_controller(|controller, name| {
            let text = match (controller, name) {
                ("cpu", "cpu.stat") => "nr_periods 7\nnr_throttled 2\nthrottled_time 90000\n",
                ("cpu", "cpu.cfs_quota_us") => "50000\n",
                ("cpuacct", "cpuacct.stat") => "user 1\nsystem 2\n",
                ("memory", "memory.stat") => {
                    "cache 0\ntotal_cache 4096\ntotal_mapped_file 10\ntotal_inactive_file 5\ntotal_active_file 6\n"
                }
                ("memory", "memory.kmem.usage_in_bytes") => "64\n",
                ("memory", "memory.failcnt") => "3\n",
                ("memory", "memory.max_usage_in_bytes") => "9999\n",
                ("pids", "pids.current") => "4\n",
                ("blkio", "blkio.throttle.io_service_bytes_recursive") => {
                    "8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n"
                }
                ("blkio", "blkio.throttle.io_serviced_recursive") => {
                    "8:0 Read 3\n8:0 Write 4\nTotal 7\n"
                }
                _ => "",
            };
            text.to_owned()
        });
        assert_eq!((v2.cpu_user_nanoseconds, v2.cpu_system_nanoseconds), (3_000_000, 2_000_000));
        assert_eq!((v1.cpu_user_nanoseconds, v1.cpu_system_nanoseconds), (10_000_000, 20_000_000));
        assert!(v2.cfs_quota && !limited("max 100000\n") && !limited("-1\n") && !limited(""));
        let same = |detail: Detail| Detail {
            cpu_user_nanoseconds: 0,
            cpu_system_nanoseconds: 0,
            ..detail
        };
        assert_eq!(same(v1), same(v2));
    }
}
