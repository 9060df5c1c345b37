//! The machine: privileges, cgroups, swap, disks, clock.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Finding, Place, sys};
use crate::node::machine::{FileSystem, Machine, file_system};

/// With less room than this not even one image can be pulled.
const NOTHING_LEFT: u64 = 1 << 30;

/// Whether this is root, and has what root has.
pub fn privileges() -> Vec<Finding> {
    let check = "privileges";
    let root = nix::unistd::geteuid().is_root();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let effective = effective.and_then(|t| u64::from_str_radix(t.trim(), 16).ok());
    vec![plan_privileges(check, root, effective)]
}

fn plan_privileges(check: &'static str, root: bool, capabilities: Option<u64>) -> Finding {
    /// CAP_SYS_ADMIN, CAP_NET_ADMIN of capability.h.
    const NEEDED: [(u32, &str); 2] = [(21, "CAP_SYS_ADMIN"), (12, "CAP_NET_ADMIN")];
    if !root {
        return Finding::error(check, "not run by root", "run it by root, or with sudo");
    }
    let held = capabilities.unwrap_or(u64::MAX);
    match NEEDED.into_iter().find(|(bit, _)| held & (1 << bit) == 0) {
        Some((_, name)) => Finding::error(
            check,
            format!("root without {name}: this is a container without the node's privileges"),
            "run longshore on the machine itself",
        ),
        None => Finding::ok(check, "root"),
    }
}

/// Which cgroups there are and whether they can hold pods.
pub fn cgroups() -> Vec<Finding> {
    let v2 = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok();
    let v1 = fs::read_to_string("/proc/cgroups").unwrap_or_default();
    let mounted: Vec<String> = fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    plan_cgroups(v2.as_deref(), &v1, &mounted)
}

/// `v2`: `cgroup.controllers` of the root; `v1`: /proc/cgroups; `mounted`: names in /sys/fs/cgroup.
pub fn plan_cgroups(v2: Option<&str>, v1: &str, mounted: &[String]) -> Vec<Finding> {
    let check = "cgroups";
    /// Without the first three there are no limits at all.
    const CONTROLLERS: [(&str, bool); 4] =
        [("cpu", true), ("memory", true), ("pids", true), ("cpuset", false)];
    let there = |name: &str| match v2 {
        Some(list) => list.split_whitespace().any(|c| c == name),
        None => mounted.iter().any(|m| m.split(',').any(|part| part == name)),
    };
    let off = |name: &str| {
        v1.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next() == Some(name) && words.nth(2) == Some("0")
        })
    };
    let mut findings = Vec::new();
    for (name, needed) in CONTROLLERS.into_iter().filter(|(name, _)| !there(name)) {
        let remedy = match (off(name), name) {
            (true, "memory") => {
                "boot with cgroup_enable=memory on the kernel's command line".to_owned()
            }
            (true, _) => format!("boot without cgroup_disable={name} on the kernel's command line"),
            _ => format!("mount the cgroup controller {name} (systemd does so when it boots)"),
        };
        let message = format!("no controller {name}");
        findings.push(match needed {
            true => Finding::error(check, message, remedy),
            false => Finding::warning(check, message, remedy),
        });
    }
    if v2.is_none() {
        findings.push(Finding::warning(
            check,
            "cgroup v1: it works, but Kubernetes keeps it in maintenance only, and there is no \
             pressure (PSI) and no memory QoS",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(check, "cgroup v2 with all controllers"));
    }
    findings
}

/// Whether there is swap.
pub fn swap() -> Vec<Finding> {
    vec![plan_swap(Machine::read().swap)]
}

/// `swap`: bytes.
pub fn plan_swap(swap: u64) -> Finding {
    match swap {
        0 => Finding::ok("swap", "off"),
        bytes => Finding::warning(
            "swap",
            format!(
                "{} MiB of swap: pods use none of it without memorySwap.swapBehavior LimitedSwap, but the machine's own processes may be slow \
                 where Kubernetes expects them to be evicted",
                bytes >> 20
            ),
            "swapoff -a and remove swap from /etc/fstab, unless you want it",
        ),
    }
}

/// Whether there is room where pods, images and logs go.
pub fn disks(place: &Place) -> Vec<Finding> {
    let logs = PathBuf::from("/var/log/pods");
    let wanted = [
        (&place.root_dir, "volumes of pods", 0.10),
        (&place.state_dir, "images and containers", 0.15),
        (&logs, "logs", 0.10),
    ];
    let seen: Vec<(PathBuf, &str, f64, Option<FileSystem>)> = wanted
        .into_iter()
        .map(|(path, purpose, share)| (path.clone(), purpose, share, file_system(path)))
        .collect();
    let mut findings: Vec<Finding> = seen
        .iter()
        .filter_map(|(path, purpose, share, fs)| plan_disk(path, purpose, *share, (*fs)?))
        .collect();
    if findings.is_empty() {
        let left = seen.iter().filter_map(|(.., fs)| fs.map(|f| f.available >> 30)).min();
        findings.push(Finding::ok("disk", format!("{} GiB left", left.unwrap_or(0))));
    }
    findings
}

/// What is to be said of a file system; `share` is the eviction threshold.
pub fn plan_disk(path: &Path, purpose: &str, share: f64, fs: FileSystem) -> Option<Finding> {
    let (path, full) = (path.display(), fs.capacity as f64 * share);
    let remedy = "make room, or put it on another disk; `longshore image ls` shows images";
    if (fs.available as f64) < full {
        let message = format!(
            "{path} ({purpose}) has {} MiB left, below the {:.0} % at which the node counts as full: \
             pods are evicted and none is scheduled here",
            fs.available >> 20,
            share * 100.0
        );
        return Some(match fs.available < NOTHING_LEFT {
            true => Finding::error("disk", message, remedy),
            false => Finding::warning("disk", message, remedy),
        });
    }
    if fs.inodes > 0 && fs.inodes_free * 20 < fs.inodes {
        return Some(Finding::error(
            "disk",
            format!("{path} ({purpose}) has less than 5 % of its inodes left"),
            remedy,
        ));
    }
    ((fs.available as f64) < full * 1.5).then(|| {
        let message = format!("{path} ({purpose}) has only {} MiB left", fs.available >> 20);
        Finding::warning("disk", message, remedy)
    })
}

/// Whether somebody keeps the clock right.
pub fn time() -> Vec<Finding> {
    vec![plan_time(sys::clock_is_synchronized())]
}

/// `synchronized`: what the kernel says.
pub fn plan_time(synchronized: Option<bool>) -> Finding {
    match synchronized {
        Some(false) => Finding::warning(
            "time",
            "the clock is not synchronized: certificates and tokens need the right time",
            "timedatectl set-ntp true (package systemd-timesyncd or chrony)",
        ),
        Some(true) => Finding::ok("time", "the clock is synchronized"),
        None => Finding::ok("time", "the kernel does not say whether the clock is synchronized"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn controllers_are_looked_for_in_either_version() {
        let levels = |v2: Option<&str>, mounted: &[&str]| {
            let mounted: Vec<String> = mounted.iter().map(|m| (*m).to_owned()).collect();
            let v1 = "#subsys_name hierarchy num enabled\nmemory 0 1 0\n";
            plan_cgroups(v2, v1, &mounted).into_iter().map(|f| f.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(Some("cpuset cpu io memory pids"), &[]), [Level::Ok]);
        assert_eq!(levels(Some("cpuset cpu io pids"), &[]), [Level::Error]);
        let v1 = ["cpu,cpuacct", "memory", "pids", "cpuset"];
        assert_eq!(levels(None, &v1), [Level::Warning]);
        assert_eq!(levels(None, &v1[1..]), [Level::Error, Level::Warning]);
        let no_memory = plan_cgroups(Some("cpu pids cpuset"), "memory 0 1 0", &[]);
        assert!(no_memory[0].remedy.as_ref().is_some_and(|r| r.contains("cgroup_enable=memory")));
    }

    #[test]
    fn disks_are_judged_by_the_eviction_thresholds() {
        let level = |available: u64, inodes_free| {
            let (capacity, available) = (100u64 << 30, available << 30);
            let fs = FileSystem { capacity, available, inodes: 100, inodes_free };
            plan_disk(Path::new("/x"), "p", 0.10, fs).map(|f| f.level)
        };
        assert_eq!(level(0, 50), Some(Level::Error));
        assert_eq!(level(9, 50), Some(Level::Warning));
        assert_eq!(level(12, 50), Some(Level::Warning));
        assert_eq!(level(50, 4), Some(Level::Error));
        assert_eq!(level(50, 50), None);
    }

    #[test]
    fn swap_clock_and_privileges() {
        assert_eq!(plan_swap(0).level, Level::Ok);
        assert_eq!(plan_swap(1 << 30).level, Level::Warning);
        assert_eq!(plan_time(Some(false)).level, Level::Warning);
        assert_eq!(plan_privileges("p", false, None).level, Level::Error);
        assert_eq!(plan_privileges("p", true, Some(1 << 12)).level, Level::Error);
        assert_eq!(plan_privileges("p", true, Some(1 << 12 | 1 << 21)).level, Level::Ok);
    }
}
