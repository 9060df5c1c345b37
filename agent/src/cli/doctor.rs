//! `longshore doctor`: checks what this machine lacks to be a node, before a join and after.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::places::Places;
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
    #[command(flatten)]
    places: Places,
    /// Folder of CNI network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Folder of CNI plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    /// The host's resolver configuration, for pods
    #[arg(long, value_name = "FILE", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
}

/// Runs `longshore doctor`.
pub(super) fn run(args: DoctorArgs, output: Output) -> anyhow::Result<()> {
    let places = args.places;
    let noted = NodeFile::load(&places.kubernetes_dir).ok().flatten();
    let server = args.server.as_deref().map(super::join::checked_address).transpose()?;
    let place = Place {
        root_dir: places.root_dir(noted.as_ref()),
        container_runtime_endpoint: places.runtime(noted.as_ref()),
        kubernetes_dir: places.kubernetes_dir,
        state_dir: places.state_dir,
        run_dir: places.run_dir,
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
