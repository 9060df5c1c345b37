//! In which cgroups processes belong that are no pod's: this one (`kubeletCgroups`), and those that nobody
//! has put anywhere (`systemCgroups`).
//!
//! Under systemd every process has a unit, and nothing is left to move; so this is for machines without it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::pod::cgroup::hierarchies;

/// How often it is looked after, as under kubelet.
const PERIOD: Duration = Duration::from_secs(60);
/// How often what is forked meanwhile is looked for at once.
const ROUNDS: usize = 10;

/// The cgroups, as paths from the hierarchies' roots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Housing {
    /// Of this process.
    pub own: Option<String>,
    /// Of what lies in the root.
    pub system: Option<String>,
}

/// Keeps processes where they belong, for ever.
pub async fn keep(housing: Housing) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let housing = housing.clone();
        let placed = tokio::task::spawn_blocking(move || place(&housing, &hierarchies())).await;
        if let Ok(Err(error)) = placed {
            tracing::warn!(error, "processes are not in the cgroups that the configuration says");
        }
    }
}

fn place(housing: &Housing, mounts: &[PathBuf]) -> Result<(), String> {
    let mut failed = Vec::new();
    for mount in mounts {
        if let Some(system) = &housing.system {
            failed.extend(empty(mount, &mount.join(system.trim_matches('/'))).err());
        }
        if let Some(own) = &housing.own {
            let own = mount.join(own.trim_matches('/'));
            failed.extend(put(&own, std::process::id()).err());
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}

/// Moves all processes of `from` to `to`, but init and the kernel's own.
fn empty(from: &Path, to: &Path) -> Result<(), String> {
    for _ in 0..ROUNDS {
        let list = from.join("cgroup.procs");
        let text =
            fs::read_to_string(&list).map_err(|e| format!("read {}: {e}", list.display()))?;
        let pids = text.lines().filter_map(|line| line.trim().parse::<u32>().ok());
        // 0 is a process of another PID namespace.
        let pids: Vec<u32> = pids.filter(|pid| *pid > 1 && !is_of_the_kernel(*pid)).collect();
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            put(to, pid)?;
        }
    }
    Ok(())
}

/// The kernel's own have no program.
fn is_of_the_kernel(pid: u32) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe"));
    program.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn put(cgroup: &Path, pid: u32) -> Result<(), String> {
    let procs = cgroup.join("cgroup.procs");
    let told = |error: io::Error| format!("move process {pid} to {}: {error}", cgroup.display());
    fs::create_dir_all(cgroup).map_err(told)?;
    let there = fs::read_to_string(&procs).unwrap_or_default();
    if there.lines().any(|line| line.trim() == pid.to_string()) {
        return Ok(());
    }
    match fs::write(&procs, pid.to_string()) {
        // It has ended.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        written => written.map_err(told),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// With real cgroups, in a subtree of its own.
    #[test]
    fn what_is_in_one_cgroup_moves_to_the_other() {
        let mounts = hierarchies();
        let mount = &mounts[0];
        let root = mount.join(format!("longshore-test-housing-{}", std::process::id()));
        let (from, to) = (root.join("from"), root.join("to"));
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        put(&from, child.id()).unwrap();
        put(&from, child.id()).unwrap();
        empty(&from, &to).unwrap();
        let pids = |cgroup: &Path| fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        assert_eq!(pids(&from), "");
        assert_eq!(pids(&to).trim(), child.id().to_string());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(put(&to, child.id()), Ok(()), "whoever has ended needs no place");
        for cgroup in [&from, &to, &root] {
            fs::remove_dir(cgroup).unwrap();
        }
    }

    #[test]
    fn init_and_the_kernels_own_stay() {
        assert!(!is_of_the_kernel(std::process::id()));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "0\n1\n").unwrap();
        empty(dir.path(), &dir.path().join("to")).unwrap();
        assert!(!dir.path().join("to").exists());
        let missing = empty(&dir.path().join("no"), dir.path()).unwrap_err();
        assert!(missing.contains("read "), "{missing}");
    }
}
