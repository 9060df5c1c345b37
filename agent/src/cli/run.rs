//! `longshore run`: the node itself.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use tracing_subscriber::EnvFilter;

use super::NodeFlags;
use crate::compose;
use crate::config::{self, ConfigError, NodeConfig, Note};
use crate::join::files::{NodeFile, Paths};

/// Arguments of `longshore run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    flags: NodeFlags,
}

/// Threads that run the loops: enough for two cores' worth of waking up, and no more stacks.
const WORKERS: usize = 2;

/// Runs the node until a signal ends it.
pub(super) fn run(args: RunArgs) -> anyhow::Result<()> {
    let config = configure(&args.flags)?;
    trace(&config)?;
    for note in &config.notes {
        match note {
            Note::Inert { field } => tracing::debug!(field, "configuration has no effect here"),
            Note::NotBuilt { field, value } => {
                tracing::warn!(field, value, "configuration is not implemented and has no effect");
            }
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_keep_alive(std::time::Duration::from_secs(5))
        .thread_name("longshore")
        .enable_all()
        .build()
        .context("start the runtime")?;
    let outcome = runtime.block_on(compose::run(config));
    // A file system that hangs must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

/// Flags, and where they say nothing what `longshore join` noted: name, addresses, folders, runtime
/// and the cluster's KubeletConfiguration.
fn with_what_join_noted(flags: &NodeFlags) -> anyhow::Result<NodeFlags> {
    let mut flags = flags.clone();
    if flags.standalone {
        return Ok(flags);
    }
    let named = flags.kubeconfig.as_deref().or(flags.bootstrap_kubeconfig.as_deref());
    let kubernetes_dir = match named.and_then(Path::parent) {
        Some(dir) => std::path::absolute(dir)?,
        None => PathBuf::from("/etc/kubernetes"),
    };
    let Some(noted) = NodeFile::load(&kubernetes_dir)? else { return Ok(flags) };
    flags.hostname_override.get_or_insert(noted.node_name);
    if flags.node_ip.is_empty() {
        flags.node_ip = noted.node_ips;
    }
    if flags.container_runtime_endpoint.is_none() {
        flags.container_runtime_endpoint = noted.container_runtime_endpoint;
    }
    let root_dir = flags.root_dir.get_or_insert(noted.root_dir).clone();
    let paths = Paths { kubernetes_dir, root_dir };
    if flags.config.is_none() && paths.kubelet_config().exists() {
        flags.config = Some(paths.kubelet_config());
    }
    Ok(flags)
}

fn configure(flags: &NodeFlags) -> anyhow::Result<NodeConfig> {
    let flags = &with_what_join_noted(flags)?;
    let text = match &flags.config {
        Some(path) => {
            std::fs::read(path).with_context(|| format!("read --config {}", path.display()))?
        }
        None => Vec::new(),
    };
    let host = compose::host()?;
    let resolved =
        config::parse(&text).and_then(|documents| config::resolve(flags, documents, &host));
    resolved.map_err(|error| match (&flags.config, &error) {
        // What a flag says wrongly is bad usage; what a file says wrongly is a failure.
        (_, ConfigError::Invalid { field, .. }) if field.starts_with("--") => {
            super::UsageError(error.to_string()).into()
        }
        (Some(path), _) => {
            anyhow::Error::new(error).context(format!("--config {}", path.display()))
        }
        (None, _) => error.into(),
    })
}

fn trace(config: &NodeConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log_filter)
        .map_err(|error| super::UsageError(format!("--log-level: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let started = if config.log_json { log.json().try_init() } else { log.try_init() };
    started.map_err(|error| anyhow::anyhow!("start logging: {error}"))
}
