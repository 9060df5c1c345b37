//! Where a node keeps its things: what commands say that look at a whole node or take it away.

use std::path::PathBuf;

use clap::Args;

use crate::join::files::NodeFile;

/// The node's folders and its runtime, by the names that `longshore run` has for them.
#[derive(Debug, Args)]
pub(super) struct Places {
    /// Directory of kubelet.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/kubernetes")]
    pub(super) kubernetes_dir: PathBuf,
    /// Directory of pods and certificates [default: as joined, else /var/lib/kubelet]
    #[arg(long, value_name = "DIR")]
    root_dir: Option<PathBuf>,
    /// State of the CRI shim
    #[arg(long, value_name = "DIR", default_value = "/var/lib/longshore")]
    pub(super) state_dir: PathBuf,
    /// Sockets and network namespaces of the CRI shim
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    pub(super) run_dir: PathBuf,
    /// CRI endpoint if not the built-in runtime [default: as joined]
    #[arg(long, value_name = "ENDPOINT", visible_alias = "cri-socket")]
    container_runtime_endpoint: Option<String>,
}

impl Places {
    /// The directory of pods: as said, as noted by a join, or kubelet's.
    pub(super) fn root_dir(&self, noted: Option<&NodeFile>) -> PathBuf {
        let said = self.root_dir.clone().or_else(|| noted.map(|n| n.root_dir.clone()));
        said.unwrap_or_else(|| PathBuf::from("/var/lib/kubelet"))
    }

    /// The runtime's endpoint: as said, or as noted by a join.
    pub(super) fn runtime(&self, noted: Option<&NodeFile>) -> Option<String> {
        let said = self.container_runtime_endpoint.clone();
        said.or_else(|| noted?.container_runtime_endpoint.clone())
    }
}
