//! `longshore reset`: takes everything away again.

use clap::Args;

use super::{Output, unimplemented};

/// Arguments of `longshore reset`.
#[derive(Debug, Args)]
pub struct ResetArgs {}

/// Runs `longshore reset`.
pub(super) fn run(_args: ResetArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented("reset"))
}
