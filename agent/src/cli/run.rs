//! `longshore run`: the node itself.

use clap::Args;

use super::{NodeFlags, unimplemented};

/// Arguments of `longshore run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    flags: NodeFlags,
}

/// Runs the node until a signal ends it.
pub(super) fn run(args: RunArgs) -> anyhow::Result<()> {
    let _ = args.flags;
    Err(unimplemented("run"))
}
