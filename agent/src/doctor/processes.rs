//! Other programs that do a node's work on this machine.

use std::fs;
use std::path::Path;

use super::{Finding, Place};

const CHECK: &str = "processes";

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its program's name.
    pub name: String,
    /// Whether it is in this process's network: others are another node's.
    pub here: bool,
}

/// Programs that clash with this node: name, what they clash with, remedy, whether nothing works
/// beside them.
const RIVALS: [(&str, &str, &str, bool); 4] = [
    (
        "kubelet",
        "it drives the same pods and holds the same ports",
        "systemctl disable --now kubelet, or take its node over with `longshore join --adopt`",
        true,
    ),
    (
        "kube-proxy",
        "it programs the same Services",
        "keep its DaemonSet off this node (README, \"Using it\"), or run `longshore run --only agent \
         --only cri`",
        false,
    ),
    (
        "crio",
        "another container runtime: it is not used, and its containers use this node's resources",
        "systemctl disable --now crio, or use it: --container-runtime-endpoint \
         unix:///run/crio/crio.sock",
        false,
    ),
    (
        "containerd",
        "another container runtime: it is not used, and its containers use this node's resources",
        "systemctl disable --now containerd, or use it: --container-runtime-endpoint \
         unix:///run/containerd/containerd.sock",
        false,
    ),
];

/// Looks for them.
pub fn check(place: &Place, longshore_runs: bool) -> Vec<Finding> {
    plan_processes(&gather(), place.container_runtime_endpoint.as_deref(), longshore_runs)
}

/// The findings; `endpoint` is the runtime in use, if not the built-in one.
pub fn plan_processes(
    processes: &[Process],
    endpoint: Option<&str>,
    longshore_runs: bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, clash, remedy, fatal) in RIVALS {
        // A runtime that is in use is no rival.
        if endpoint.is_some_and(|endpoint| endpoint.contains(name)) {
            continue;
        }
        let Some(process) = processes.iter().find(|p| p.name == name && p.here) else { continue };
        let message = format!("{name} runs (process {}): {clash}", process.pid);
        findings.push(match fatal {
            true => Finding::error(CHECK, message, remedy),
            false => Finding::warning(CHECK, message, remedy),
        });
    }
    if findings.is_empty() {
        let state = if longshore_runs { "longshore runs" } else { "longshore does not run" };
        findings.push(Finding::ok(CHECK, format!("{state}, and nothing that clashes with it")));
    }
    findings
}

/// Whether an agent holds the lock of `run_dir`.
pub fn longshore_runs(run_dir: &Path) -> bool {
    let file = fs::OpenOptions::new().write(true).open(run_dir.join("agent.lock"));
    let lock = nix::fcntl::FlockArg::LockSharedNonblock;
    file.is_ok_and(|file| nix::fcntl::Flock::lock(file, lock).is_err())
}

/// All processes that this one can see.
pub fn gather() -> Vec<Process> {
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = network("self");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let Some(pid) = file_name.to_str().filter(|n| n.parse::<u32>().is_ok()) else { continue };
        let Ok(name) = fs::read_to_string(entry.path().join("comm")) else { continue };
        found.push(Process {
            pid: pid.parse().unwrap_or_default(),
            name: name.trim().to_owned(),
            here: own.is_some() && network(pid) == own,
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn rivals_are_found_in_the_same_network_only() {
        let process = |name: &str, here| Process { pid: 7, name: name.to_owned(), here };
        let levels = |processes: &[Process], endpoint| {
            let findings = plan_processes(processes, endpoint, false);
            findings.into_iter().map(|f| f.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(&[process("kubelet", true)], None), [Level::Error]);
        assert_eq!(levels(&[process("kubelet", false)], None), [Level::Ok]);
        let both = [process("containerd", true), process("kube-proxy", true)];
        assert_eq!(levels(&both, None), [Level::Warning, Level::Warning]);
        let socket = Some("unix:///run/containerd/containerd.sock");
        assert_eq!(levels(&both, socket), [Level::Warning]);
    }

    #[test]
    fn this_test_is_seen() {
        let own = std::process::id();
        assert!(gather().iter().any(|p| p.pid == own && p.here));
    }
}
