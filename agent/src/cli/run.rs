//! `longshore run`: the node itself.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::{Map, Value};

use super::NodeFlags;
use crate::compose;
use crate::config::{self, ConfigError, NodeConfig, Note};
use crate::join::files::{NodeFile, Paths};
use crate::logging::{self, LogError};

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
    crate::sys::keep_one_heap();
    let config = configure(&args.flags)?;
    trace(&config)?;
    for note in &config.notes {
        match note {
            Note::Inert { field } => tracing::debug!(field, "configuration has no effect here"),
            Note::NotBuilt { field, value } => {
                tracing::warn!(field, value, "configuration is not implemented and has no effect");
            }
            Note::NoEffect { field, value, reason } => {
                tracing::warn!(field, value, reason, "configuration has no effect here");
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

/// Flags and configuration files, and where they say nothing what `longshore join` noted: name,
/// addresses, folders, runtime, the cluster's KubeletConfiguration and KubeProxyConfiguration.
fn with_what_join_noted(flags: &NodeFlags) -> anyhow::Result<(NodeFlags, Vec<PathBuf>)> {
    let mut flags = flags.clone();
    let given: Vec<PathBuf> = flags.config.iter().cloned().collect();
    if flags.standalone {
        return Ok((flags, given));
    }
    let named = flags.kubeconfig.as_deref().or(flags.bootstrap_kubeconfig.as_deref());
    let kubernetes_dir = match named.and_then(Path::parent) {
        Some(dir) => std::path::absolute(dir)?,
        None => PathBuf::from("/etc/kubernetes"),
    };
    let Some(noted) = NodeFile::load(&kubernetes_dir)? else { return Ok((flags, given)) };
    flags.hostname_override.get_or_insert(noted.node_name);
    if flags.node_ip.is_empty() {
        flags.node_ip = noted.node_ips;
    }
    if flags.container_runtime_endpoint.is_none() {
        flags.container_runtime_endpoint = noted.container_runtime_endpoint;
    }
    if !noted.kubelet_flags.is_empty() {
        let wrong = |error| anyhow::anyhow!("{}: kubeletFlags: {error}", paths_of(&kubernetes_dir));
        flags = flags.or(NodeFlags::parse(&noted.kubelet_flags).map_err(wrong)?);
    }
    let root_dir = flags.root_dir.get_or_insert(noted.root_dir).clone();
    let paths = Paths { kubernetes_dir, root_dir };
    if !given.is_empty() {
        return Ok((flags, given));
    }
    let noted = [paths.kubelet_config(), paths.proxy_config()];
    Ok((flags, noted.into_iter().filter(|path| path.exists()).collect()))
}

fn paths_of(kubernetes_dir: &Path) -> String {
    let paths = Paths { kubernetes_dir: kubernetes_dir.to_owned(), root_dir: PathBuf::new() };
    paths.node_file().display().to_string()
}

fn configure(flags: &NodeFlags) -> anyhow::Result<NodeConfig> {
    let (flags, files) = &with_what_join_noted(flags)?;
    let mut text = Vec::new();
    for path in files {
        let read =
            std::fs::read(path).with_context(|| format!("read --config {}", path.display()))?;
        text.extend_from_slice(&read);
        text.extend_from_slice(b"\n---\n");
    }
    let host = compose::host()?;
    let overlays = flags.config_dir.as_deref().map(overlays).transpose()?.unwrap_or_default();
    let resolved = config::parse(&text)
        .and_then(|documents| {
            documents.with_kubelet(|fields| {
                overlays.iter().for_each(|over| config::merge(fields, over));
                flags.kubelet.put_into(fields);
            })
        })
        .and_then(|documents| config::resolve(flags, documents, &host));
    resolved.map_err(|error| match &error {
        // What a flag says wrongly is bad usage; what a file says wrongly is a failure.
        ConfigError::Invalid { field, .. } if field.starts_with("--") => {
            super::UsageError(error.to_string()).into()
        }
        ConfigError::Invalid { field, .. } if flags.kubelet.flag_of(field).is_some() => {
            let flag = flags.kubelet.flag_of(field).unwrap_or_default();
            super::UsageError(format!("{flag}: {error}")).into()
        }
        _ if files.is_empty() => error.into(),
        _ => {
            let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
            anyhow::Error::new(error).context(format!("--config {}", names.join(" and ")))
        }
    })
}

/// What the files of `--config-dir` say: those named `*.conf`, in the order of their paths, each with
/// one KubeletConfiguration.
fn overlays(folder: &Path) -> anyhow::Result<Vec<Map<String, Value>>> {
    let mut folders = vec![folder.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        let failed = || format!("read --config-dir {}", folder.display());
        for entry in std::fs::read_dir(&folder).with_context(failed)? {
            let path = entry.with_context(failed)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "conf") {
                files.push(path);
            }
        }
    }
    files.sort();
    let read = |path: &PathBuf| {
        let documents = config::parse(&std::fs::read(path)?)?;
        anyhow::ensure!(
            !documents.kubelet_written.is_empty(),
            "it holds no KubeletConfiguration (kubelet.config.k8s.io/v1beta1)"
        );
        Ok(documents.kubelet_written)
    };
    files
        .iter()
        .map(|path| read(path).with_context(|| format!("--config-dir: {}", path.display())))
        .collect()
}

fn trace(config: &NodeConfig) -> anyhow::Result<()> {
    logging::start(&config.log_filter, config.log_json).map_err(|error| match error {
        LogError::Filter(_) => super::UsageError(error.to_string()).into(),
        other => other.into(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const KIND: &str = "kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\n";

    #[test]
    fn drop_in_files_go_over_one_another_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{KIND}{text}\n")).unwrap();
        };
        write(
            "20-b.conf",
            "maxPods: 20\nclusterDNS: [10.0.0.2]\nevictionHard: {pid.available: 5%}",
        );
        write("10-a.conf", "maxPods: 10\nevictionHard: {memory.available: 1Gi}");
        write(
            "30/c.conf",
            "authentication: {anonymous: {enabled: null}, x509: {clientCAFile: /ca}}",
        );
        write("99-other.yaml", "maxPods: 99");
        let mut all: Map<String, Value> = json!({"maxPods": 1, "clusterDNS": ["10.0.0.1"],
            "authentication": {"anonymous": {"enabled": true}}})
        .as_object()
        .unwrap()
        .clone();
        overlays(dir.path()).unwrap().iter().for_each(|over| config::merge(&mut all, over));
        all.retain(|name, _| name != "kind" && name != "apiVersion");
        let expected = json!({"maxPods": 20, "clusterDNS": ["10.0.0.2"],
            "evictionHard": {"memory.available": "1Gi", "pid.available": "5%"},
            "authentication": {"anonymous": {}, "x509": {"clientCAFile": "/ca"}}});
        assert_eq!(Value::from(all), expected);

        write("40-bad.conf", "maxPod: 5");
        let error = format!("{:#}", overlays(dir.path()).unwrap_err());
        assert!(error.contains("40-bad.conf") && error.contains("maxPods"), "{error}");
        std::fs::write(dir.path().join("40-bad.conf"), "").unwrap();
        let error = format!("{:#}", overlays(dir.path()).unwrap_err());
        assert!(error.contains("no KubeletConfiguration"), "{error}");
        assert!(overlays(&dir.path().join("none")).is_err());
    }
}
