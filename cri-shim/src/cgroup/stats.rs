//! What a container or a pod uses, read from its cgroup.

use std::fs;
use std::path::Path;

use super::pressure::{self, Pressure};
use super::{Hierarchies, field};
use crate::api;
use crate::monitor::record;

/// Usage at one moment; zero where the kernel does not say.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Nanoseconds since the epoch.
    pub timestamp: i64,
    pub cpu_nanoseconds: u64,
    /// All memory charged, in bytes.
    pub memory: u64,
    /// Of it, file pages that could be dropped at once.
    pub inactive_file: u64,
    /// Of it, memory that belongs to no file.
    pub rss: u64,
    /// None when unlimited.
    pub memory_limit: Option<u64>,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub swap: Option<u64>,
    /// None when unlimited, or when the kernel does not count swap.
    pub swap_limit: Option<u64>,
    pub cpu_pressure: Option<Pressure>,
    pub memory_pressure: Option<Pressure>,
    pub io_pressure: Option<Pressure>,
}

impl Usage {
    /// What Kubernetes counts as used: everything but what could be dropped at once.
    pub fn working_set(&self) -> u64 {
        self.memory.saturating_sub(self.inactive_file)
    }
}

/// No limit reads as "max" on v2 and as a number near 2^63 on v1.
const UNLIMITED: u64 = 1 << 60;

/// Reads a cgroup's usage.
pub fn read(cgroups: &Hierarchies, cgroup: &Path) -> Usage {
    let file = |controller: &str, name: &str| {
        fs::read_to_string(cgroups.controller(controller, cgroup).join(name)).unwrap_or_default()
    };
    let number = |controller: &str, name: &str| file(controller, name).trim().parse::<u64>().ok();
    let timestamp = record::now();
    let limit = |value: Option<u64>| value.filter(|v| *v < UNLIMITED);
    if cgroups.v2 {
        let stat = file("", "memory.stat");
        return Usage {
            timestamp,
            cpu_nanoseconds: field(&file("", "cpu.stat"), "usage_usec").unwrap_or(0) * 1000,
            memory: number("", "memory.current").unwrap_or(0),
            inactive_file: field(&stat, "inactive_file").unwrap_or(0),
            rss: field(&stat, "anon").unwrap_or(0),
            memory_limit: limit(number("", "memory.max")),
            page_faults: field(&stat, "pgfault").unwrap_or(0),
            major_page_faults: field(&stat, "pgmajfault").unwrap_or(0),
            swap: number("", "memory.swap.current"),
            swap_limit: limit(number("", "memory.swap.max")),
            cpu_pressure: pressure::read(cgroups, cgroup, "cpu"),
            memory_pressure: pressure::read(cgroups, cgroup, "memory"),
            io_pressure: pressure::read(cgroups, cgroup, "io"),
        };
    }
    let stat = file("memory", "memory.stat");
    let total = |name: &str| field(&stat, name).unwrap_or(0);
    let memory_limit = limit(number("memory", "memory.limit_in_bytes"));
    // v1 limits memory and swap together.
    let both = limit(number("memory", "memory.memsw.limit_in_bytes"));
    Usage {
        timestamp,
        cpu_nanoseconds: number("cpuacct", "cpuacct.usage").unwrap_or(0),
        memory: number("memory", "memory.usage_in_bytes").unwrap_or(0),
        inactive_file: total("total_inactive_file"),
        rss: total("total_rss"),
        memory_limit,
        page_faults: total("total_pgfault"),
        major_page_faults: total("total_pgmajfault"),
        swap: field(&stat, "total_swap"),
        swap_limit: both.zip(memory_limit).map(|(both, memory)| both.saturating_sub(memory)),
        ..Usage::default()
    }
}

/// The counters of `/proc/net/dev`, without loopback; the pod's default interface first.
pub fn interfaces(text: &str) -> Vec<api::NetworkInterfaceUsage> {
    let value = |value: u64| Some(api::UInt64Value { value });
    let mut found: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> =
                counters.split_whitespace().filter_map(|c| c.parse().ok()).collect();
            let name = name.trim();
            if name == "lo" || counters.len() < 16 {
                return None;
            }
            Some(api::NetworkInterfaceUsage {
                name: name.to_owned(),
                rx_bytes: value(counters[0]),
                rx_errors: value(counters[2]),
                tx_bytes: value(counters[8]),
                tx_errors: value(counters[10]),
            })
        })
        .collect();
    found.sort_by_key(|i| (i.name != "eth0", i.name.clone()));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_net_dev_gives_counters_without_loopback() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  \
            eth0:    2200      20    3    0    0     0          0         0     4400      40    5    0    0     0       0          0\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "eth0");
        assert_eq!(found[0].rx_bytes, Some(api::UInt64Value { value: 2200 }));
        assert_eq!(found[0].tx_errors, Some(api::UInt64Value { value: 5 }));
    }
}
