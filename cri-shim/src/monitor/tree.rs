//! Killing a process and everything it started, for an exec that timed out.
//!
//! A process belongs to the tree when it descends from the root, or is in the session that the
//! root leads, which also catches children whose parents have ended. Those that left both are in the
//! exec's own cgroup (see `exec::group`).

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A tree that still grows after this many looks is killed as it is.
const MAX_LOOKS: usize = 100;

/// Sends SIGKILL to `root` and its tree, looking among `candidates` (the container's processes).
///
/// The tree is stopped first, look after look until one finds nobody new: a process that is killed
/// between a look and the next may have forked meanwhile, and its child would be nobody's.
pub(super) fn kill_tree(root: Pid, candidates: impl Fn() -> Vec<Pid>) {
    let mut stopped: Vec<i32> = Vec::new();
    for _ in 0..MAX_LOOKS {
        let found = tree(root, &candidates());
        let new: Vec<i32> = found.into_iter().filter(|pid| !stopped.contains(pid)).collect();
        if new.is_empty() {
            break;
        }
        for pid in &new {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGSTOP);
        }
        stopped.extend(new);
    }
    for pid in stopped {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

fn tree(root: Pid, candidates: &[Pid]) -> Vec<i32> {
    let mut parents: HashMap<i32, i32> = HashMap::new();
    let mut found = vec![root.as_raw()];
    for pid in candidates {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((parent, session)) = parent_and_session(&stat) else { continue };
        parents.insert(pid.as_raw(), parent);
        if session == root.as_raw() && *pid != root {
            found.push(pid.as_raw());
        }
    }
    loop {
        let more: Vec<i32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

/// Fields 4 and 6 of `/proc/<pid>/stat`; the name in field 2 may hold anything.
fn parent_and_session(stat: &str) -> Option<(i32, i32)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some((parent, session))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn reads_stat_with_an_odd_name() {
        let stat = "42 (a) b (c) S 7 42 41 0 -1 4194560";
        assert_eq!(parent_and_session(stat), Some((7, 41)));
    }

    /// A shell that forks without end, each child with a session of its own.
    #[test]
    fn a_tree_that_grows_while_it_is_killed_is_killed_whole() {
        use std::os::unix::process::CommandExt as _;
        use std::process::{Command, Stdio};

        for round in 0..5 {
            let mark = format!("77{:05}.{round}", std::process::id() % 100_000);
            let script = format!("while :; do setsid sleep {mark} & done");
            let mut shell = Command::new("sh");
            shell.args(["-c", &script]).stdin(Stdio::null()).stderr(Stdio::null());
            let mut shell = shell.process_group(0).spawn().unwrap();
            let root = Pid::from_raw(shell.id() as i32);
            let everybody = || -> Vec<Pid> {
                let entries = fs::read_dir("/proc").unwrap().flatten();
                let number = |e: fs::DirEntry| e.file_name().to_str()?.parse().ok();
                entries.filter_map(number).map(Pid::from_raw).collect()
            };
            let ours = || -> Vec<Pid> {
                let named = |pid: &Pid| {
                    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    String::from_utf8_lossy(&line).contains(&mark)
                };
                everybody().into_iter().filter(named).collect()
            };
            while ours().len() < 5 {}
            kill_tree(root, everybody);
            shell.wait().unwrap();
            for _ in 0..500 {
                if ours().is_empty() {
                    break;
                }
                std::thread::park_timeout(std::time::Duration::from_millis(10));
            }
            let left = ours();
            for pid in &left {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            assert!(left.is_empty(), "round {round}: {left:?} live on");
        }
    }
}
