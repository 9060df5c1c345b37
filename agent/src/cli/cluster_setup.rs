//! `longshore cluster-setup`: prints what an administrator applies once.

use clap::Args;

use super::{Output, unimplemented};

/// Arguments of `longshore cluster-setup`.
#[derive(Debug, Args)]
pub struct ClusterSetupArgs {}

/// Runs `longshore cluster-setup`.
pub(super) fn run(_args: ClusterSetupArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented("cluster-setup"))
}
