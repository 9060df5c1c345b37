//! `longshore man`: the manual pages, one per command, generated from the command line itself so that
//! they cannot say other than `--help`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, CommandFactory};

/// Arguments of `longshore man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder for the pages (`longshore.1`, `longshore-run.1`, ...); made if it is not there
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Writes the pages.
pub(super) fn run(args: ManArgs) -> anyhow::Result<()> {
    write(super::Cli::command(), &args.dir)
}

fn write(command: clap::Command, dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)
        .with_context(|| format!("make the folder {} for manual pages", dir.display()))?;
    clap_mangen::generate_to(command, dir)
        .with_context(|| format!("write manual pages into {}", dir.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_page() {
        let dir = tempfile::tempdir().unwrap();
        let pages = dir.path().join("man1");
        write(crate::cli::Cli::command(), &pages).unwrap();
        let page = |name: &str| std::fs::read_to_string(pages.join(name)).unwrap();
        let main = page("longshore.1");
        let mut command = crate::cli::Cli::command();
        command.build();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let name = format!("longshore-{}.1", sub.get_name());
            assert!(page(&name).starts_with(".ie"), "{name}");
            let listed = format!("longshore\\-{}(1)", sub.get_name().replace('-', "\\-"));
            assert!(main.contains(&listed), "{listed} is not in longshore.1:\n{main}");
        }
        assert!(page("longshore-explain-pod.1").contains("NAMESPACE/NAME"));
    }
}
