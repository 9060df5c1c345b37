//! Changing the limits of a running container.

use std::fs;
use std::io;
use std::path::Path;

use super::Hierarchies;
use crate::api::LinuxContainerResources;
use crate::spec::Host;

/// One file to write.
#[derive(Debug, PartialEq, Eq)]
pub struct Write {
    pub controller: &'static str,
    pub file: String,
    pub value: String,
}

/// The files that change and what goes into them, in order.
pub fn plan(resources: &LinuxContainerResources, host: &Host) -> Vec<Write> {
    let mut writes = Vec::new();
    let mut write = |controller, file: &str, value: String| {
        writes.push(Write { controller, file: file.to_owned(), value });
    };
    let (limit, quota) = (resources.memory_limit_in_bytes, resources.cpu_quota);
    if host.cgroup_v2 {
        if resources.cpu_shares > 0 {
            write("cpu", "cpu.weight", weight(resources.cpu_shares as u64).to_string());
        }
        if quota != 0 || resources.cpu_period > 0 {
            let quota = if quota > 0 { quota.to_string() } else { "max".to_owned() };
            let period = if resources.cpu_period > 0 { resources.cpu_period } else { 100_000 };
            write("cpu", "cpu.max", format!("{quota} {period}"));
        }
        if limit != 0 {
            if host.swap_accounting {
                let swap = swap(limit, resources.memory_swap_limit_in_bytes);
                write("memory", "memory.swap.max", swap.to_string());
            }
            let value = if limit > 0 { limit.to_string() } else { "max".to_owned() };
            write("memory", "memory.max", value);
        }
        for (file, value) in &resources.unified {
            if !file.contains('/') {
                write("", file, value.clone());
            }
        }
    } else {
        if resources.cpu_shares > 0 {
            write("cpu", "cpu.shares", resources.cpu_shares.to_string());
        }
        if resources.cpu_period > 0 {
            write("cpu", "cpu.cfs_period_us", resources.cpu_period.to_string());
        }
        if quota != 0 {
            write("cpu", "cpu.cfs_quota_us", quota.to_string());
        }
        if limit != 0 {
            write("memory", "memory.limit_in_bytes", limit.to_string());
            if host.swap_accounting {
                let swap = match resources.memory_swap_limit_in_bytes {
                    0 => limit,
                    given => given,
                };
                write("memory", "memory.memsw.limit_in_bytes", swap.to_string());
                // The first of the two fails when the limit grows past the old swap limit.
                write("memory", "memory.limit_in_bytes", limit.to_string());
            }
        }
    }
    if !resources.cpuset_cpus.is_empty() {
        write("cpuset", "cpuset.cpus", resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        write("cpuset", "cpuset.mems", resources.cpuset_mems.clone());
    }
    writes
}

/// Applies new limits; the first failure ends it.
pub fn apply(
    cgroups: &Hierarchies,
    cgroup: &Path,
    resources: &LinuxContainerResources,
    host: &Host,
) -> io::Result<()> {
    let writes = plan(resources, host);
    for (at, write) in writes.iter().enumerate() {
        let path = cgroups.controller(write.controller, cgroup).join(&write.file);
        let again = writes[at + 1..].iter().any(|later| later.file == write.file);
        match fs::write(&path, &write.value) {
            Ok(()) => {}
            Err(_) if again => {}
            Err(error) => {
                let text = format!("writing {:?} to {}: {error}", write.value, path.display());
                return Err(io::Error::new(error.kind(), text));
            }
        }
    }
    Ok(())
}

/// v2's limit of swap alone, from the limit of memory and that of memory and swap together.
pub fn swap(memory: i64, both: i64) -> i64 {
    if both == 0 { 0 } else { both.saturating_sub(memory).max(0) }
}

/// cgroup v1 shares (2..262144) as a v2 weight (1..10000), as libcontainer and runc convert them for
/// containers: the curve through both ends and the defaults, 1024 and 100.
pub fn weight(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1..=2 => 1,
        262_144.. => 10_000,
        shares => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights_over_the_whole_range() {
        for (shares, expected) in [(2, 1), (51, 11), (1024, 100), (262_144, 10_000)] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn a_v1_memory_limit_is_written_on_both_sides_of_the_swap_limit() {
        let resources =
            LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
        let host = Host { swap_accounting: true, ..Default::default() };
        let files: Vec<_> = plan(&resources, &host).into_iter().map(|w| w.file).collect();
        assert_eq!(
            files,
            ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]
        );
    }
}
