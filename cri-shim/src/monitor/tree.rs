//! Killing a process and everything it started, for an exec that timed out.
//!
//! A process belongs to the tree when it descends from the root, or is in the session that the
//! root leads, which also catches children whose parents have ended.

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Sends SIGKILL to `root` and its tree, looking among `candidates` (the container's processes).
pub(super) fn kill_tree(root: Pid, candidates: &[Pid]) {
    let mut parents: HashMap<i32, i32> = HashMap::new();
    let mut doomed = vec![root.as_raw()];
    for pid in candidates {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((parent, session)) = parent_and_session(&stat) else { continue };
        parents.insert(pid.as_raw(), parent);
        if session == root.as_raw() && *pid != root {
            doomed.push(pid.as_raw());
        }
    }
    loop {
        let more: Vec<i32> = parents
            .iter()
            .filter(|(pid, parent)| doomed.contains(parent) && !doomed.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        doomed.extend(more);
    }
    for pid in doomed {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
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
mod tests {
    use super::*;

    #[test]
    fn reads_stat_with_an_odd_name() {
        let stat = "42 (a) b (c) S 7 42 41 0 -1 4194560";
        assert_eq!(parent_and_session(stat), Some((7, 41)));
    }
}
