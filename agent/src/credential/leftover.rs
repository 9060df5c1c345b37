//! Programs that an agent left running when it was killed: they would wait for their registry for as long as
//! they like, beside those of the next agent. They are known by a mark in their environment, which what
//! they start inherits.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The variable that holds the mark.
pub(super) const VARIABLE: &str = "LONGSHORE_CREDENTIAL_PROVIDER";

/// What the programs of the node with this root directory bear. Not its path, which another node on the
/// machine may have as well.
///
/// # Errors
/// It is not there.
pub fn mark(root_dir: &Path) -> io::Result<String> {
    let found = fs::metadata(root_dir)?;
    Ok(format!("{}:{}", found.dev(), found.ino()))
}

/// Kills all that bear this mark. Only for who is alone in using the root directory.
pub fn end_leftovers(mark: &str) {
    // What forks while we look is found by the next look.
    for _ in 0..10 {
        let doomed: Vec<Pid> = processes().filter(|pid| bears(*pid, mark)).collect();
        if doomed.is_empty() {
            return;
        }
        for pid in doomed {
            tracing::info!(%pid, "ending a credential provider's program of an earlier run");
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

fn processes() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw)
}

/// A dead process's environment is empty.
fn bears(pid: Pid, mark: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .filter_map(|entry| entry.strip_prefix(VARIABLE.as_bytes())?.strip_prefix(b"="))
        .any(|value| value == mark.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn those_of_this_node_are_ended_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let own = mark(dir.path()).unwrap();
        let start =
            |mark: &str| Command::new("sleep").arg("1000").env(VARIABLE, mark).spawn().unwrap();
        let (mut left, mut other) = (start(&own), start("0:0"));
        end_leftovers(&own);
        assert_eq!(left.wait().unwrap().signal(), Some(9));
        assert!(other.try_wait().unwrap().is_none(), "another node's was ended");
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(mark(&dir.path().join("none")).is_err());
    }
}
