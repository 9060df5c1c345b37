//! Finding what a plugin started, whatever became of its parents: each call's processes bear a mark
//! in their environment, which they inherit. Process groups and parents lose those that detach.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    sys::signal::{Signal, kill as signal, killpg},
    unistd::Pid,
};

/// The variable that holds the mark.
pub(crate) const VARIABLE: &str = "LONGSHORE_CNI_CALL";

/// The mark of one call.
#[derive(Debug)]
pub(crate) struct Mark(String);

impl Mark {
    /// A mark of a call about `container` and its network namespace, which no other call has.
    pub(crate) fn new(container: &str, netns: &str) -> Self {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        Self(format!("{}{}/{call}", subject(container, netns), std::process::id()))
    }

    pub(crate) fn value(&self) -> &str {
        &self.0
    }
}

/// Kills all processes of one call.
pub(crate) fn kill(mark: &Mark) {
    kill_where(|value| value == mark.0.as_bytes());
}

/// What all marks about a container begin with. The namespace's path tells it from a container of
/// another shim on this machine.
fn subject(container: &str, netns: &str) -> String {
    format!("{container}@{netns}/")
}

/// Kills all processes of calls about `container`, of earlier shims too.
pub(crate) fn kill_of(container: &str, netns: &str) {
    let prefix = subject(container, netns);
    kill_where(|value| value.starts_with(prefix.as_bytes()));
}

fn kill_where(is_doomed: impl Fn(&[u8]) -> bool) {
    // What forks while we look is found by the next look.
    for _ in 0..10 {
        let doomed: Vec<Pid> = processes().filter(|pid| marked(*pid, &is_doomed)).collect();
        if doomed.is_empty() {
            return;
        }
        for pid in doomed {
            let _ = killpg(pid, Signal::SIGKILL);
            let _ = signal(pid, Signal::SIGKILL);
        }
    }
}

fn processes() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw)
}

/// Whether a living process bears a mark. A dead one's environment is empty.
fn marked(pid: Pid, is_doomed: &impl Fn(&[u8]) -> bool) -> bool {
    let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else {
        return false;
    };
    environment
        .split(|byte| *byte == 0)
        .filter_map(|entry| entry.strip_prefix(VARIABLE.as_bytes())?.strip_prefix(b"="))
        .any(is_doomed)
}
