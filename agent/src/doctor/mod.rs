//! `longshore doctor`: what this machine lacks to be a node, or to stay one, and what to do about it.
//!
//! Each check is a pure decision over plain facts (`plan_*`), beside the few lines that gather them.
//! A check that cannot look says so; none of them changes anything.

pub mod cluster;
pub mod kernel;
pub mod machine;
pub mod network;
pub mod ports;
pub mod processes;
mod sys;

use std::path::PathBuf;

use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; something may not work, or not as well.
    Warning,
    /// The node will not work.
    Error,
}

/// What one check came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `kernel`, `cgroups`, `swap`, `ports`, `time`, `disk`, `dns`, `api`, `cni`,
    /// `certificates`, `processes`, ...
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do; nothing where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, message: message.into(), remedy: None }
    }

    /// Something may not work.
    pub fn warning(
        check: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let (message, remedy) = (message.into(), Some(remedy.into()));
        Self { check, level: Level::Warning, message, remedy }
    }

    /// The node will not work.
    pub fn error(
        check: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { level: Level::Error, ..Self::warning(check, message, remedy) }
    }
}

/// Where to look.
#[derive(Clone, Debug)]
pub struct Place {
    /// Folder of kubelet.conf.
    pub kubernetes_dir: PathBuf,
    /// `--root-dir`.
    pub root_dir: PathBuf,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// `--run-dir`.
    pub run_dir: PathBuf,
    /// `--cni-conf-dir`.
    pub cni_conf_dir: PathBuf,
    /// `--cni-bin-dir`, and where distributions put plugins.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// `--resolv-conf`.
    pub resolv_conf: PathBuf,
    /// `--container-runtime-endpoint`.
    pub container_runtime_endpoint: Option<String>,
    /// `HOST:PORT` of an API server to be joined.
    pub server: Option<String>,
}

/// Looks at everything, in an order that has causes before their effects.
pub async fn examine(place: &Place) -> Vec<Finding> {
    let running = processes::longshore_runs(&place.run_dir);
    let mut findings = Vec::new();
    findings.extend(machine::privileges());
    findings.extend(kernel::check());
    findings.extend(machine::cgroups());
    findings.extend(machine::swap());
    findings.extend(machine::disks(place));
    findings.extend(machine::time());
    findings.extend(processes::check(place, running));
    findings.extend(ports::check(running));
    findings.extend(network::dns(place));
    findings.extend(network::cni(place));
    findings.extend(cluster::certificates(place));
    findings.extend(cluster::api(place).await);
    findings
}

/// The table for people.
pub fn render(findings: &[Finding]) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    for finding in findings {
        let word = match finding.level {
            Level::Ok => "ok",
            Level::Warning => "WARNING",
            Level::Error => "ERROR",
        };
        let _ = writeln!(out, "{word:8}{:14}{}", finding.check, finding.message);
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(out, "{:8}{:14}-> {remedy}", "", "");
        }
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let _ = match (count(Level::Error), count(Level::Warning)) {
        (0, 0) => writeln!(out, "\nnothing is wrong"),
        (errors, warnings) => writeln!(out, "\n{errors} errors, {warnings} warnings"),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_stand_below_what_they_are_for() {
        let findings = [
            Finding::ok("kernel", "6.1"),
            Finding::warning("swap", "on", "swapoff -a"),
            Finding::error("disk", "full", "make room"),
        ];
        insta::assert_snapshot!(render(&findings), @r"
        ok      kernel        6.1
        WARNING swap          on
                              -> swapoff -a
        ERROR   disk          full
                              -> make room

        1 errors, 1 warnings
        ");
    }
}
