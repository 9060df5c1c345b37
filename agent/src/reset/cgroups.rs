//! Cgroups of pods: their processes killed, their folders removed, in every hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where cgroup hierarchies are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Names of the cgroup that all pods are in, by driver.
const KUBEPODS: [&str; 2] = ["kubepods", "kubepods.slice"];
/// A killed process leaves its cgroup a little later.
const TRIES: u32 = 50;

/// Removes the cgroups of pods `uids` under `root`, and `kubepods` itself if no pod of anybody else
/// is left in it.
pub(super) fn remove_pods(root: &str, uids: &[String]) -> (String, Vec<String>) {
    let (mut removed, mut failures) = (0, Vec::new());
    for hierarchy in hierarchies(Path::new(CGROUPS)) {
        let base = hierarchy.join(root.trim_start_matches('/'));
        for top in KUBEPODS.map(|name| base.join(name)) {
            for cgroup in pod_cgroups(&top, uids) {
                match remove_tree(&cgroup) {
                    Ok(()) => removed += 1,
                    Err(e) => failures.push(format!("cannot remove {}: {e}", cgroup.display())),
                }
            }
            remove_empty(&top);
        }
    }
    (format!("{removed} removed"), failures)
}

/// Those of `slices` without a process of anybody, the innermost first.
pub(super) fn empty_slices(mut slices: Vec<String>) -> Vec<String> {
    let hierarchies = hierarchies(Path::new(CGROUPS));
    slices.retain(|slice| {
        let folder: PathBuf = crate::pod::cgroup::slice_folders(slice).iter().collect();
        !hierarchies.iter().any(|hierarchy| has_processes(&hierarchy.join(&folder)))
    });
    slices.sort_by_key(|slice| std::cmp::Reverse(slice.matches('-').count()));
    slices
}

fn has_processes(cgroup: &Path) -> bool {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let mut below = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    !own.trim().is_empty() || below.any(|entry| has_processes(&entry.path()))
}

/// The root of each hierarchy: of the one unified, or of each v1 controller.
fn hierarchies(root: &Path) -> Vec<PathBuf> {
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    // Links such as `cpu` -> `cpu,cpuacct` name the same hierarchy again.
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Cgroups named after one of `uids` in `top`, directly or in a QoS class.
fn pod_cgroups(top: &Path, uids: &[String]) -> Vec<PathBuf> {
    let children = |dir: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
    };
    let direct = children(top);
    let nested: Vec<PathBuf> = direct.iter().flat_map(|dir| children(dir)).collect();
    direct.into_iter().chain(nested).filter(|path| names_one_of(path, uids)).collect()
}

fn names_one_of(path: &Path, uids: &[String]) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".slice").unwrap_or(&name);
    let Some(at) = name.rfind("pod") else { return false };
    let uid = name.get(at + 3..).unwrap_or_default().replace('_', "-");
    !uid.is_empty() && uids.contains(&uid)
}

fn remove_tree(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    for attempt in 0.. {
        kill_all(cgroup);
        match fs::remove_dir(cgroup) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if attempt >= TRIES => return Err(e),
            Err(_) => pause(),
        }
    }
    Ok(())
}

#[allow(clippy::disallowed_methods, reason = "runs on a thread for blocking work")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

fn kill_all(cgroup: &Path) {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let own = nix::unistd::getpid();
    for pid in processes.lines().filter_map(|l| l.trim().parse().ok()).map(Pid::from_raw) {
        // 0 is a process of another PID namespace: not ours to name.
        if pid.as_raw() > 0 && pid != own {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Removes `top` and its QoS classes as far as they are empty.
fn remove_empty(top: &Path) {
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
    let _ = fs::remove_dir(top);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn slices_within_others_are_stopped_first() {
        let slices = ["kubepods", "kubepods-burstable-podx", "kubepods-burstable"];
        // None of them is there, so none has processes.
        let empty = empty_slices(slices.map(|s| format!("{s}-lstest.slice")).to_vec());
        assert_eq!(
            empty,
            ["kubepods-burstable-podx", "kubepods-burstable", "kubepods"]
                .map(|s| format!("{s}-lstest.slice"))
        );
    }

    #[test]
    fn only_cgroups_of_the_pods_asked_for_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("kubepods");
        for path in
            ["poda-1", "burstable/poda-2", "burstable/podb-1", "besteffort/x-poda_3.slice/c"]
        {
            fs::create_dir_all(top.join(path)).unwrap();
        }
        let uids = ["a-1", "a-2", "a-3"].map(str::to_owned);
        let mut found: Vec<_> = pod_cgroups(&top, &uids)
            .into_iter()
            .map(|p| p.strip_prefix(&top).unwrap().display().to_string())
            .collect();
        found.sort();
        assert_eq!(found, ["besteffort/x-poda_3.slice", "burstable/poda-2", "poda-1"]);
    }
}
