//! `longshore doctor`: checks what this machine lacks to be a node.

use clap::Args;

use super::{Output, unimplemented};

/// Arguments of `longshore doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {}

/// Runs `longshore doctor`.
pub(super) fn run(_args: DoctorArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented("doctor"))
}
