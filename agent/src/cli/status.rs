//! `longshore status`: shows node, pods, services and last errors.

use clap::Args;

use super::{Output, unimplemented};

/// Arguments of `longshore status`.
#[derive(Debug, Args)]
pub struct StatusArgs {}

/// Runs `longshore status`.
pub(super) fn run(_args: StatusArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented("status"))
}
