//! The command line: one file per verb.
//!
//! Output is for people by default and for machines with `-o json`. Exit codes: 0 done, 1 failed,
//! 64 bad usage.
#![allow(clippy::print_stderr, reason = "commands talk to people on standard output and error")]

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

mod cluster_setup;
mod completion;
mod doctor;
mod explain;
mod flags;
mod image;
mod join;
mod kubelet_flags;
mod man;
mod places;
mod proxy;
mod proxy_flags;
mod pull_progress;
mod reset;
mod run;
mod socket;
mod status;
mod top;
mod version;

pub use flags::{CgroupDriverFlag, NodeFlags, Part, ProxyModeFlag};

/// Exit code of a command line that cannot be understood (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;

/// A Kubernetes node in one program.
#[derive(Debug, Parser)]
#[command(name = "longshore", version, disable_help_subcommand = true, max_term_width = 100)]
struct Cli {
    /// How to print results.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

/// The shape of a command's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For machines.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node: agent, proxy and CRI shim
    Run(Box<run::RunArgs>),
    /// Join this machine to a cluster by bootstrap token
    Join(Box<join::JoinArgs>),
    /// Take everything that longshore put on this machine away again
    Reset(reset::ResetArgs),
    /// Show node, pods, services and last errors
    Status(status::StatusArgs),
    /// Watch pods, probes, CPU and memory, Services and Events
    Top(top::TopArgs),
    /// Print the manifest that grants nodes what a kubeadm cluster does not
    ClusterSetup(cluster_setup::ClusterSetupArgs),
    /// Import, pull, list and remove images of the built-in runtime
    Image(image::ImageArgs),
    /// Check what this machine lacks to be a node
    Doctor(doctor::DoctorArgs),
    /// Explain why a pod does not run or is not ready, or what happens to packets of a Service
    Explain(explain::ExplainArgs),
    /// Show the rules of Services, or take them away
    Proxy(proxy::ProxyArgs),
    /// Print the version
    Version(version::VersionArgs),
    /// Print a completion script for a shell
    Completion(completion::CompletionArgs),
    /// Write the manual pages into a folder
    Man(man::ManArgs),
}

/// The command line was understood by clap, but makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// An exit code of its own for the error that it is the context of.
#[derive(Debug, thiserror::Error)]
#[error("failed")]
pub struct Exit(pub u8);

/// The verb is part of the contract and not built yet.
fn unimplemented(verb: &str) -> anyhow::Error {
    anyhow::anyhow!("{verb}: unimplemented in this version of longshore")
}

/// Runs the command line `args` (with the program's name first).
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            let asked_for = !error.use_stderr();
            // A closed pipe is the reader's business.
            let _ = error.print();
            return if asked_for { ExitCode::SUCCESS } else { ExitCode::from(EXIT_USAGE) };
        }
    };
    let result = match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Join(args) => join::run(*args, cli.output),
        Command::Reset(args) => reset::run(args, cli.output),
        Command::Status(args) => status::run(args, cli.output),
        Command::Top(args) => top::run(args, cli.output),
        Command::ClusterSetup(args) => cluster_setup::run(args, cli.output),
        Command::Image(args) => image::run(args, cli.output),
        Command::Doctor(args) => doctor::run(args, cli.output),
        Command::Explain(args) => explain::run(args, cli.output),
        Command::Proxy(args) => proxy::run(args, cli.output),
        Command::Version(args) => version::run(args, cli.output),
        Command::Completion(args) => completion::run(args),
        Command::Man(args) => man::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(Exit(code)) = error.downcast_ref::<Exit>() {
                // Without a cause the command has said it all.
                if error.chain().len() > 1 {
                    eprintln!("longshore: {}", error.root_cause());
                }
                return ExitCode::from(*code);
            }
            eprintln!("longshore: {error:#}");
            if error.is::<UsageError>() { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

/// A runtime for commands that do one thing and end.
pub(crate) fn command_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn exit(line: &str) -> ExitCode {
        main(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_codes_tell_failure_from_bad_usage() {
        for (line, code) in [
            ("longshore version", ExitCode::SUCCESS),
            ("longshore version -o json", ExitCode::SUCCESS),
            ("longshore --help", ExitCode::SUCCESS),
            ("longshore", ExitCode::from(64)),
            ("longshore sail", ExitCode::from(64)),
            ("longshore run --no-such-flag", ExitCode::from(64)),
            ("longshore run --healthz-port pineapple", ExitCode::from(64)),
            ("longshore run --only kitchen", ExitCode::from(64)),
            ("longshore completion bash", ExitCode::SUCCESS),
            ("longshore man", ExitCode::from(64)),
            ("longshore man /dev/null/no", ExitCode::FAILURE),
            ("longshore explain service a/b/c", ExitCode::from(64)),
            ("longshore explain service --from pineapple x", ExitCode::from(64)),
            ("longshore explain service x --run-dir /nowhere", ExitCode::FAILURE),
            ("longshore explain pod a/b/c", ExitCode::from(64)),
            ("longshore explain pod x --run-dir /nowhere", ExitCode::FAILURE),
            ("longshore top --once --run-dir /nowhere", ExitCode::FAILURE),
            ("longshore top --interval 0", ExitCode::from(64)),
            ("longshore doctor a:b:c:d", ExitCode::from(64)),
            ("longshore proxy", ExitCode::from(64)),
            ("longshore proxy ruleset --diff --dry-run x", ExitCode::from(64)),
            ("longshore proxy ruleset --run-dir /nowhere", ExitCode::FAILURE),
        ] {
            assert_eq!(format!("{:?}", exit(line)), format!("{code:?}"), "{line}");
        }
    }
}
