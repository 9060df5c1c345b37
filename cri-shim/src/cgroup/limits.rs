//! The limits of a container as the kernel's files, for its start and for a change while it runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::Hierarchies;

/// One file to write.
#[derive(Debug, PartialEq, Eq)]
pub struct Write {
    pub controller: &'static str,
    pub file: String,
    pub value: String,
    /// Not every kernel has the file, which is as good.
    pub optional: bool,
}

#[derive(Default)]
struct Writes(Vec<Write>);

impl Writes {
    fn add(&mut self, controller: &'static str, file: &str, value: impl ToString) {
        let (file, value) = (file.to_owned(), value.to_string());
        self.0.push(Write { controller, file, value, optional: false });
    }

    fn add_optional(&mut self, controller: &'static str, file: &str, value: impl ToString) {
        self.add(controller, file, value);
        if let Some(last) = self.0.last_mut() {
            last.optional = true;
        }
    }
}

/// The files that are set and what goes into them, in order; on the unified hierarchy when `v2`.
pub fn plan(resources: &LinuxResources, v2: bool) -> Vec<Write> {
    let mut writes = Writes::default();
    if let Some(cpu) = resources.cpu() {
        plan_cpu(&mut writes, cpu, v2);
    }
    if let Some(memory) = resources.memory() {
        plan_memory(&mut writes, memory, v2);
    }
    if let Some(pids) = resources.pids() {
        let limit = pids.limit();
        let value = if limit > 0 { limit.to_string() } else { "max".to_owned() };
        writes.add("pids", "pids.max", value);
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let (size, bytes) = (limit.page_size(), limit.limit());
        if v2 {
            writes.add("hugetlb", &format!("hugetlb.{size}.max"), bytes);
            writes.add_optional("hugetlb", &format!("hugetlb.{size}.rsvd.max"), bytes);
        } else {
            writes.add("hugetlb", &format!("hugetlb.{size}.limit_in_bytes"), bytes);
            writes.add_optional("hugetlb", &format!("hugetlb.{size}.rsvd.limit_in_bytes"), bytes);
        }
    }
    for (file, value) in resources.unified().iter().flatten().filter(|_| v2) {
        if !file.contains('/') {
            writes.add("", file, value);
        }
    }
    writes.0
}

fn plan_cpu(writes: &mut Writes, cpu: &LinuxCpu, v2: bool) {
    let shares = cpu.shares().filter(|shares| *shares > 0);
    let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
    if v2 {
        if let Some(shares) = shares {
            writes.add("cpu", "cpu.weight", weight(shares));
        }
        if quota != 0 || period > 0 {
            let quota = if quota > 0 { quota.to_string() } else { "max".to_owned() };
            let period = if period > 0 { period } else { 100_000 };
            writes.add("cpu", "cpu.max", format!("{quota} {period}"));
        }
    } else {
        if let Some(shares) = shares {
            writes.add("cpu", "cpu.shares", shares);
        }
        if period > 0 {
            writes.add("cpu", "cpu.cfs_period_us", period);
        }
        if quota != 0 {
            writes.add("cpu", "cpu.cfs_quota_us", quota);
        }
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            writes.add("cpuset", file, value);
        }
    }
}

fn plan_memory(writes: &mut Writes, memory: &LinuxMemory, v2: bool) {
    let Some(limit) = memory.limit().filter(|limit| *limit != 0) else { return };
    let both = memory.swap().filter(|both| *both != 0);
    if v2 {
        if let Some(both) = both {
            writes.add("memory", "memory.swap.max", swap(limit, both));
        }
        let value = if limit > 0 { limit.to_string() } else { "max".to_owned() };
        writes.add("memory", "memory.max", value);
        return;
    }
    writes.add("memory", "memory.limit_in_bytes", limit);
    if let Some(both) = both {
        writes.add("memory", "memory.memsw.limit_in_bytes", both);
        // The first of the two fails when the limit grows past the old swap limit.
        writes.add("memory", "memory.limit_in_bytes", limit);
    }
}

/// Sets limits; the first failure ends it.
///
/// # Errors
/// With the file and the value.
pub fn apply(cgroups: &Hierarchies, cgroup: &Path, resources: &LinuxResources) -> io::Result<()> {
    set(cgroups, cgroup, resources, |_| {})
}

/// Changes limits of what runs: all, or after a failure none, as far as the kernel takes the old
/// ones back.
///
/// # Errors
/// With the file and the value.
pub fn change(cgroups: &Hierarchies, cgroup: &Path, resources: &LinuxResources) -> io::Result<()> {
    let mut before: Vec<(PathBuf, String)> = Vec::new();
    let changed = set(cgroups, cgroup, resources, |path| {
        before.extend(fs::read_to_string(path).ok().map(|value| (path.to_path_buf(), value)));
    });
    if changed.is_err() {
        for (path, value) in before.iter().rev() {
            // Best effort: the first error is the one to tell.
            let _ = fs::write(path, value.trim_end());
        }
    }
    changed
}

fn set(
    cgroups: &Hierarchies,
    cgroup: &Path,
    resources: &LinuxResources,
    mut before_write: impl FnMut(&Path),
) -> io::Result<()> {
    let writes = plan(resources, cgroups.v2);
    for (at, write) in writes.iter().enumerate() {
        let path = cgroups.controller(write.controller, cgroup).join(&write.file);
        let again = writes[at + 1..].iter().any(|later| later.file == write.file);
        before_write(&path);
        match fs::write(&path, &write.value) {
            Ok(()) => {}
            Err(_) if again || (write.optional && !path.exists()) => {}
            Err(error) => {
                let text = format!("writing {:?} to {}: {error}", write.value, path.display());
                return Err(io::Error::new(error.kind(), text));
            }
        }
    }
    Ok(())
}

/// v2's limit of swap alone, from the limit of memory and that of memory and swap together;
/// `max` when there is none.
fn swap(memory: i64, both: i64) -> String {
    if both < 0 { "max".to_owned() } else { swap_bytes(memory, both).to_string() }
}

/// The same where there is a limit, in bytes.
pub fn swap_bytes(memory: i64, both: i64) -> i64 {
    if both == 0 { 0 } else { both.saturating_sub(memory).max(0) }
}

/// cgroup v1 shares (2..262144) as a v2 weight (1..10000), as runc converts them for containers:
/// the curve through both ends and the defaults, 1024 and 100.
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
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::api::{HugepageLimit, LinuxContainerResources};
    use crate::spec::Host;
    use crate::spec::resources::plan_limits;

    fn planned(resources: &LinuxContainerResources, v2: bool) -> Vec<(String, String)> {
        let host = Host { cgroup_v2: v2, swap_accounting: true, hugetlb: true, ..Host::default() };
        let resources = plan_limits(resources, &host).unwrap();
        plan(&resources, v2).into_iter().map(|w| (w.file, w.value)).collect()
    }

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
        let files: Vec<_> = planned(&resources, false).into_iter().map(|(file, _)| file).collect();
        assert_eq!(
            files,
            ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]
        );
    }

    #[test]
    fn on_v2_swap_is_told_apart_from_memory() {
        let limited = |swap| LinuxContainerResources {
            memory_limit_in_bytes: 100,
            memory_swap_limit_in_bytes: swap,
            ..Default::default()
        };
        let swap = |resources| planned(&resources, true)[0].clone();
        assert_eq!(swap(limited(0)), ("memory.swap.max".into(), "0".into()));
        assert_eq!(swap(limited(150)), ("memory.swap.max".into(), "50".into()));
        assert_eq!(swap(limited(-1)), ("memory.swap.max".into(), "max".into()));
    }

    #[test]
    fn huge_pages_are_bounded_in_use_and_in_reserve() {
        let limit = HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 };
        let resources =
            LinuxContainerResources { hugepage_limits: vec![limit], ..Default::default() };
        let bytes = (4 << 20).to_string();
        let expected = |files: [&str; 2]| files.map(|f| (f.to_owned(), bytes.clone())).to_vec();
        assert_eq!(
            planned(&resources, true),
            expected(["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"])
        );
        assert_eq!(
            planned(&resources, false),
            expected(["hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.rsvd.limit_in_bytes"])
        );
    }
}
