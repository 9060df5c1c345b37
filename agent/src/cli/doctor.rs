//! `longshore doctor`: checks what this machine lacks to be a node, before a join and after.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Output, command_runtime};
use crate::doctor::{self, Level, Place};
use crate::join::files::NodeFile;

/// Arguments of `longshore doctor`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 no errors (there may be warnings), 1 errors, 64 bad usage")]
pub struct DoctorArgs {
    /// API server that this machine is to join
    #[arg(value_name = "HOST:PORT")]
    server: Option<String>,
    /// Directory of kubelet.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/kubernetes")]
    kubernetes_dir: PathBuf,
    /// Directory of pods and certificates [default: as joined, else /var/lib/kubelet]
    #[arg(long, value_name = "DIR")]
    root_dir: Option<PathBuf>,
    /// State of the CRI shim
    #[arg(long, value_name = "DIR", default_value = "/var/lib/longshore")]
    state_dir: PathBuf,
    /// The node's run directory
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    run_dir: PathBuf,
    /// Folder of CNI network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Folder of CNI plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// The host's resolver configuration, for pods
    #[arg(long, value_name = "FILE", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// CRI endpoint if not the built-in runtime [default: as joined]
    #[arg(long, value_name = "ENDPOINT", visible_alias = "cri-socket")]
    container_runtime_endpoint: Option<String>,
}

/// Runs `longshore doctor`.
pub(super) fn run(args: DoctorArgs, output: Output) -> anyhow::Result<()> {
    let noted = NodeFile::load(&args.kubernetes_dir).ok().flatten();
    let server = args.server.as_deref().map(super::join::checked_address).transpose()?;
    let place = Place {
        root_dir: args
            .root_dir
            .or_else(|| noted.as_ref().map(|n| n.root_dir.clone()))
            .unwrap_or_else(|| PathBuf::from("/var/lib/kubelet")),
        container_runtime_endpoint: args
            .container_runtime_endpoint
            .or_else(|| noted.and_then(|n| n.container_runtime_endpoint)),
        kubernetes_dir: args.kubernetes_dir,
        state_dir: args.state_dir,
        run_dir: args.run_dir,
        cni_conf_dir: args.cni_conf_dir,
        cni_bin_dirs: vec![args.cni_bin_dir, PathBuf::from("/usr/lib/cni")],
        resolv_conf: args.resolv_conf,
        server,
    };
    let findings = command_runtime()?.block_on(doctor::examine(&place));
    let errors = findings.iter().filter(|f| f.level == Level::Error).count();
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => writeln!(out, "{}", json!({"ok": errors == 0, "findings": findings}))?,
        Output::Text => out.write_all(doctor::render(&findings).as_bytes())?,
    }
    match errors {
        0 => Ok(()),
        _ => Err(super::Exit(1).into()),
    }
}
