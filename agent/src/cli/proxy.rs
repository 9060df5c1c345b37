//! `longshore proxy`: shows the rules of Services, and takes them away.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::json;

use super::{Output, UsageError, command_runtime, socket};
use crate::proxy_api;

/// Arguments of `longshore proxy`.
#[derive(Debug, Args)]
pub struct ProxyArgs {
    #[command(subcommand)]
    command: ProxyCommand,
}

#[derive(Debug, Subcommand)]
enum ProxyCommand {
    /// Print the rules that the running proxy wants, in nft syntax (iptables mode: iptables-restore)
    Ruleset(RulesetArgs),
    /// Remove all rules of longshore's and of upstream's kube-proxy, in nftables and iptables
    ///
    /// For handing over to another proxy; a running longshore makes its rules anew.
    Cleanup,
}

#[derive(Debug, Args)]
struct RulesetArgs {
    /// Only what would have to change in the kernel; nothing is printed if all is right
    #[arg(long)]
    diff: bool,
    /// What these manifests (Services, EndpointSlices) would change; nothing is applied
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "diff")]
    dry_run: Vec<PathBuf>,
    /// The node's run directory
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    run_dir: PathBuf,
}

/// Runs `longshore proxy`.
pub(super) fn run(args: ProxyArgs, output: Output) -> anyhow::Result<()> {
    match args.command {
        ProxyCommand::Ruleset(args) => ruleset(&args, output),
        ProxyCommand::Cleanup => cleanup(output),
    }
}

fn ruleset(args: &RulesetArgs, output: Output) -> anyhow::Result<()> {
    let socket = proxy_api::path(&args.run_dir);
    let text = if args.dry_run.is_empty() {
        socket::get(&socket, &format!("/ruleset?diff={}", args.diff))?
    } else {
        let mut manifests = Vec::new();
        for file in &args.dry_run {
            let text = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
            manifests.extend(text);
            manifests.extend(b"\n---\n");
        }
        socket::post(&socket, "/dry-run", manifests)?
    };
    let mut out = std::io::stdout().lock();
    match output {
        Output::Text => out.write_all(text.as_bytes())?,
        Output::Json => {
            let commands: Vec<&str> = text.lines().collect();
            writeln!(out, "{}", json!({"commands": commands}))?;
        }
    }
    Ok(())
}

fn cleanup(output: Output) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(UsageError("cleanup removes rules: run it as root".to_owned()).into());
    }
    command_runtime()?.block_on(proxy::cleanup())?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Text => writeln!(out, "no rules of a Service proxy are left")?,
        Output::Json => writeln!(out, "{}", json!({"cleaned": true}))?,
    }
    Ok(())
}
