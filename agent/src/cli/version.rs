//! `longshore version`.

use std::io::Write;

use clap::Args;

use super::Output;

/// The Kubernetes API level that this node speaks, reported as `kubeletVersion`.
pub const KUBERNETES_VERSION: &str = "v1.36.0";

/// Arguments of `longshore version`.
#[derive(Debug, Args)]
pub struct VersionArgs {}

/// Prints the version.
pub(super) fn run(_args: VersionArgs, output: Output) -> anyhow::Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = std::io::stdout().lock();
    match output {
        Output::Text => writeln!(out, "longshore {version} (Kubernetes {KUBERNETES_VERSION})")?,
        Output::Json => writeln!(
            out,
            "{}",
            serde_json::json!({"version": version, "kubernetesVersion": KUBERNETES_VERSION})
        )?,
    }
    Ok(())
}
