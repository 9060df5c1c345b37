//! `longshore explain`: explains a field or a reason.

use clap::Args;

use super::{Output, unimplemented};

/// Arguments of `longshore explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// What to explain.
    pub topic: String,
}

/// Runs `longshore explain`.
pub(super) fn run(_args: ExplainArgs, _output: Output) -> anyhow::Result<()> {
    Err(unimplemented("explain"))
}
