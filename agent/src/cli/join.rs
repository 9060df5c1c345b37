//! `longshore join`: joins this machine to a cluster by bootstrap token.

use clap::Args;

use super::{Output, unimplemented};

/// Arguments of `longshore join`.
#[derive(Debug, Args)]
pub struct JoinArgs {}

/// Runs `longshore join`.
pub(super) fn run(_args: JoinArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented("join"))
}
