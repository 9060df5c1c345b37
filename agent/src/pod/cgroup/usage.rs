//! What a cgroup uses, read from the kernel: v2, v1, and both at once.

use std::fs;
use std::path::{Path, PathBuf};

use cgroups_rs::fs::Controllers;
use cgroups_rs::fs::hierarchies::{V1, is_cgroup2_unified_mode};

/// Where the hierarchies are mounted.
#[derive(Clone, Debug)]
pub(crate) struct Mounts {
    unified: bool,
    cpu: PathBuf,
    cpuacct: PathBuf,
    memory: PathBuf,
    pids: PathBuf,
    blkio: PathBuf,
}

/// Bytes and operations of one block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceIo {
    /// `major:minor`.
    pub(crate) device: String,
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

/// Usage at one moment; zero where the kernel does not say. Bytes and nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) cpu: u64,
    pub(crate) cpu_user: u64,
    pub(crate) cpu_system: u64,
    pub(crate) periods: u64,
    pub(crate) throttled_periods: u64,
    pub(crate) throttled: u64,
    pub(crate) memory: u64,
    pub(crate) inactive_file: u64,
    pub(crate) anon: u64,
    pub(crate) cache: u64,
    pub(crate) mapped: u64,
    pub(crate) kernel: u64,
    pub(crate) memory_max: u64,
    pub(crate) memory_failures: u64,
    pub(crate) page_faults: u64,
    pub(crate) major_faults: u64,
    pub(crate) swap: u64,
    pub(crate) oom_kills: u64,
    pub(crate) processes: u64,
    pub(crate) memory_limit: Option<u64>,
    pub(crate) swap_limit: Option<u64>,
    /// CPU weight as v1 counts it.
    pub(crate) shares: u64,
    /// Microseconds per period; `None` is no limit.
    pub(crate) quota: Option<u64>,
    pub(crate) period: u64,
    pub(crate) io: Vec<DeviceIo>,
}

impl Usage {
    /// What Kubernetes counts as used: everything but what could be dropped at once.
    pub(crate) fn working_set(&self) -> u64 {
        self.memory.saturating_sub(self.inactive_file)
    }
}

/// No limit reads as `max` on v2 and as a number near 2^63 on v1.
const UNLIMITED: u64 = 1 << 60;

impl Mounts {
    pub(crate) fn find() -> Self {
        if is_cgroup2_unified_mode() {
            let root = PathBuf::from("/sys/fs/cgroup");
            return Self {
                unified: true,
                cpu: root.clone(),
                cpuacct: root.clone(),
                memory: root.clone(),
                pids: root.clone(),
                blkio: root,
            };
        }
        let v1 = V1::new();
        let mount = |controller: Controllers, name: &str| {
            let found = v1.get_mount_point(controller).map(|(point, _)| point);
            found.unwrap_or_else(|| Path::new("/sys/fs/cgroup").join(name))
        };
        Self {
            unified: false,
            cpu: mount(Controllers::Cpu, "cpu"),
            cpuacct: mount(Controllers::CpuAcct, "cpuacct"),
            memory: mount(Controllers::Mem, "memory"),
            pids: mount(Controllers::Pids, "pids"),
            blkio: mount(Controllers::BlkIo, "blkio"),
        }
    }

    /// Names of the cgroups below `cgroup`.
    pub(crate) fn children(&self, cgroup: &str) -> Vec<String> {
        let entries = fs::read_dir(self.memory.join(cgroup)).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Reads what `cgroup`, relative to the mounts, uses; `None` if there is none.
    pub(crate) fn read(&self, cgroup: &str) -> Option<Usage> {
        let memory = self.memory.join(cgroup);
        if !memory.is_dir() {
            return None;
        }
        Some(if self.unified { self.read_v2(&memory) } else { self.read_v1(cgroup) })
    }

    fn read_v2(&self, dir: &Path) -> Usage {
        let text = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let number = |name: &str| text(name).trim().parse::<u64>().ok();
        let (cpu, memory) = (text("cpu.stat"), text("memory.stat"));
        let micro = |name| field(&cpu, name) * 1000;
        let events = text("memory.events");
        let max = text("cpu.max");
        let mut max = max.split_whitespace();
        let quota = max.next().and_then(|quota| quota.parse().ok());
        let weight = number("cpu.weight").unwrap_or(0);
        Usage {
            cpu: micro("usage_usec"),
            cpu_user: micro("user_usec"),
            cpu_system: micro("system_usec"),
            periods: field(&cpu, "nr_periods"),
            throttled_periods: field(&cpu, "nr_throttled"),
            throttled: micro("throttled_usec"),
            memory: number("memory.current").unwrap_or(0),
            inactive_file: field(&memory, "inactive_file"),
            anon: field(&memory, "anon"),
            cache: field(&memory, "file"),
            mapped: field(&memory, "file_mapped"),
            kernel: field(&memory, "kernel"),
            memory_max: number("memory.peak").unwrap_or(0),
            memory_failures: field(&events, "max"),
            page_faults: field(&memory, "pgfault"),
            major_faults: field(&memory, "pgmajfault"),
            swap: number("memory.swap.current").unwrap_or(0),
            oom_kills: field(&events, "oom_kill"),
            processes: number("pids.current").unwrap_or(0),
            memory_limit: number("memory.max"),
            swap_limit: number("memory.swap.max"),
            shares: if weight == 0 { 0 } else { 2 + (weight - 1) * 262_142 / 9999 },
            quota,
            period: max.next().and_then(|period| period.parse().ok()).unwrap_or(0),
            io: io_v2(&text("io.stat")),
        }
    }

    fn read_v1(&self, cgroup: &str) -> Usage {
        let text = |mount: &Path, name: &str| {
            fs::read_to_string(mount.join(cgroup).join(name)).unwrap_or_default()
        };
        let number = |mount: &Path, name: &str| text(mount, name).trim().parse::<u64>().ok();
        let limit = |value: Option<u64>| value.filter(|limit| *limit < UNLIMITED);
        let stat = text(&self.memory, "memory.stat");
        let cpu = text(&self.cpu, "cpu.stat");
        // In ticks, of which there are a hundred a second.
        let ticks = text(&self.cpuacct, "cpuacct.stat");
        let memory = number(&self.memory, "memory.usage_in_bytes").unwrap_or(0);
        let with_swap = limit(number(&self.memory, "memory.memsw.limit_in_bytes"));
        let memory_limit = limit(number(&self.memory, "memory.limit_in_bytes"));
        let quota = text(&self.cpu, "cpu.cfs_quota_us");
        Usage {
            cpu: number(&self.cpuacct, "cpuacct.usage").unwrap_or(0),
            cpu_user: field(&ticks, "user") * 10_000_000,
            cpu_system: field(&ticks, "system") * 10_000_000,
            periods: field(&cpu, "nr_periods"),
            throttled_periods: field(&cpu, "nr_throttled"),
            throttled: field(&cpu, "throttled_time"),
            memory,
            inactive_file: field(&stat, "total_inactive_file"),
            anon: field(&stat, "total_rss"),
            cache: field(&stat, "total_cache"),
            mapped: field(&stat, "total_mapped_file"),
            kernel: number(&self.memory, "memory.kmem.usage_in_bytes").unwrap_or(0),
            memory_max: number(&self.memory, "memory.max_usage_in_bytes").unwrap_or(0),
            memory_failures: number(&self.memory, "memory.failcnt").unwrap_or(0),
            page_faults: field(&stat, "total_pgfault"),
            major_faults: field(&stat, "total_pgmajfault"),
            swap: field(&stat, "total_swap"),
            oom_kills: field(&text(&self.memory, "memory.oom_control"), "oom_kill"),
            processes: number(&self.pids, "pids.current").unwrap_or(0),
            memory_limit,
            swap_limit: with_swap.map(|both| both.saturating_sub(memory_limit.unwrap_or(0))),
            shares: number(&self.cpu, "cpu.shares").unwrap_or(0),
            quota: quota.trim().parse().ok(),
            period: number(&self.cpu, "cpu.cfs_period_us").unwrap_or(0),
            io: io_v1(
                &text(&self.blkio, "blkio.throttle.io_service_bytes_recursive"),
                &text(&self.blkio, "blkio.throttle.io_serviced_recursive"),
            ),
        }
    }
}

/// The number after `name` in a file of names and numbers; 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    let found = text.lines().find_map(|line| {
        let (found, value) = line.split_once(' ')?;
        (found == name).then(|| value.trim().parse().ok()).flatten()
    });
    found.unwrap_or(0)
}

fn io_v2(text: &str) -> Vec<DeviceIo> {
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let number = |name: &str| {
                rest.split_whitespace()
                    .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
                    .unwrap_or(0)
            };
            Some(DeviceIo {
                device: device.to_owned(),
                read_bytes: number("rbytes"),
                written_bytes: number("wbytes"),
                reads: number("rios"),
                writes: number("wios"),
            })
        })
        .collect()
}

fn io_v1(bytes: &str, operations: &str) -> Vec<DeviceIo> {
    let mut devices: Vec<DeviceIo> = Vec::new();
    let mut put = |text: &str, set: fn(&mut DeviceIo, &str, u64)| {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(device), Some(what), Some(value)) =
                (words.next(), words.next(), words.next().and_then(|v| v.parse().ok()))
            else {
                continue;
            };
            let at = devices.iter().position(|io| io.device == device).unwrap_or_else(|| {
                devices.push(DeviceIo { device: device.to_owned(), ..DeviceIo::default() });
                devices.len() - 1
            });
            set(&mut devices[at], what, value);
        }
    };
    put(bytes, |io, what, value| match what {
        "Read" => io.read_bytes = value,
        "Write" => io.written_bytes = value,
        _ => {}
    });
    put(operations, |io, what, value| match what {
        "Read" => io.reads = value,
        "Write" => io.writes = value,
        _ => {}
    });
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machines_root_cgroup_can_be_read() {
        let mounts = Mounts::find();
        let usage = mounts.read("").unwrap();
        assert!(usage.cpu > 0, "{usage:?}");
        assert!(mounts.read("no/such/cgroup").is_none());
    }

    #[test]
    fn block_devices_are_counted_by_either_version() {
        let expected =
            DeviceIo { device: "8:0".into(), read_bytes: 1, written_bytes: 2, reads: 3, writes: 4 };
        let v2 = io_v2("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n");
        assert_eq!(v2, std::slice::from_ref(&expected));
        let bytes = "8:0 Read 1\n8:0 Write 2\n8:0 Sync 9\n8:0 Total 3\nTotal 3\n";
        let operations = "8:0 Read 3\n8:0 Write 4\nTotal 7\n";
        assert_eq!(io_v1(bytes, operations), [expected]);
    }
}
