//! `longshore completion`: a completion script for a shell.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Arguments of `longshore completion`.
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// Which shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script.
pub(super) fn run(args: CompletionArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    let mut command = super::Cli::command();
    clap_complete::generate(args.shell, &mut command, "longshore", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(())
}
