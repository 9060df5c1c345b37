//! `longshore join --adopt`: takes over the node of a kubeadm worker in place.
//!
//! kubelet.conf, its certificates, the Node object, the container runtime and the pods stay as they
//! are; the kubelet's configuration and flags are read where kubeadm keeps them. What is written is
//! what `longshore run` must know beside these.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Node;
use kube::Api;

use super::csr::NodeCertificate;
use super::error::JoinError;
use super::files::{self, NodeFile, Paths, Staged};
use super::{Joined, Progress, discover, settings};
use crate::api::kubeconfig::{Endpoint, Identity};
use crate::api::{self, REQUEST_TIMEOUT};
use crate::config;
use crate::doctor::processes::{self, Process};

/// What to adopt.
#[derive(Clone, Debug)]
pub struct AdoptRequest {
    /// Where the kubelet's files are.
    pub paths: Paths,
    /// Where distributions keep `KUBELET_EXTRA_ARGS`.
    pub extra_args: Vec<PathBuf>,
    /// Another runtime than the kubelet's.
    pub container_runtime_endpoint: Option<String>,
    /// How long to wait for an API server that is away or not ready.
    pub discovery_timeout: std::time::Duration,
}

/// What the kubelet was told on its command line, as kubeadm and distributions keep it:
/// `NAME="--flag=value --flag value"`.
pub fn kubelet_arguments(environment: &str, name: &str) -> Vec<String> {
    let mut value = "";
    for line in environment.lines() {
        let line = line.trim();
        if let Some((key, text)) = line.split_once('=')
            && key.trim_start_matches("export ").trim() == name
        {
            value = text.trim();
        }
    }
    let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
    let value = match quote {
        Some(quote) => value.trim_matches(quote),
        None => value,
    };
    let mut arguments: Vec<String> = Vec::new();
    for word in value.split_whitespace() {
        match arguments.last_mut() {
            _ if word.starts_with('-') => arguments.push(word.to_owned()),
            // `--flag value`
            Some(flag) if !flag.contains('=') => {
                flag.push('=');
                flag.push_str(word.trim_matches(['"', '\'']));
            }
            _ => {}
        }
    }
    arguments
}

/// What stands in the way of a takeover: the kubelet that still runs. `systemd` can stop it.
pub fn plan_takeover(processes: &[Process], systemd: bool) -> Result<bool, JoinError> {
    let Some(kubelet) = processes.iter().find(|p| p.here && p.name == "kubelet") else {
        return Ok(false);
    };
    if systemd {
        return Ok(true);
    }
    Err(JoinError::CannotAdopt {
        cause: format!("kubelet runs (process {})", kubelet.pid),
        remedy: "stop it, and keep it from starting again; its pods run on meanwhile".to_owned(),
    })
}

/// Adopts, but for stopping the kubelet and starting longshore.
///
/// # Errors
/// What is missing; nothing has been written then.
pub async fn adopt(
    request: &AdoptRequest,
    take_flags: impl Fn(&[String]) -> (Vec<String>, Vec<String>),
    progress: Progress<'_>,
) -> Result<Joined, JoinError> {
    let paths = &request.paths;
    let (endpoint, node_name) = credentials(&paths.kubelet_conf())?;
    let configured = kubelet_config(&paths.kubelet_config())?;
    let mut arguments =
        read_arguments(&paths.root_dir.join("kubeadm-flags.env"), "KUBELET_KUBEADM_ARGS");
    for file in &request.extra_args {
        arguments.extend(read_arguments(file, "KUBELET_EXTRA_ARGS"));
    }
    let (mut kubelet_flags, mut warnings) = take_flags(&arguments);
    // Both are kept apart from other flags, as `longshore reset` and `doctor` need them too.
    let flag = |name: &str| {
        let prefix = format!("--{name}=");
        kubelet_flags.iter().rev().find_map(|f| f.strip_prefix(&prefix)).map(str::to_owned)
    };
    let endpoint_flag = flag("container-runtime-endpoint");
    let container_runtime_endpoint = request
        .container_runtime_endpoint
        .clone()
        .or(endpoint_flag)
        .or(configured)
        .filter(|endpoint| !endpoint.is_empty());
    kubelet_flags.retain(|f| {
        !["--container-runtime-endpoint=", "--hostname-override="].iter().any(|p| f.starts_with(p))
    });
    progress(&format!("asking {} for node {node_name}", endpoint.server));
    discover::ready(&endpoint, request.discovery_timeout, progress).await?;
    let client = api::client(&endpoint)?;
    let nodes: Api<Node> = Api::all(client.clone());
    let what = format!("get node {node_name}");
    match api::timed(what, REQUEST_TIMEOUT, nodes.get_opt(&node_name)).await {
        Ok(Some(_)) => {}
        Ok(None) => warnings.push(format!(
            "the cluster has no node {node_name}: it is registered anew when longshore starts"
        )),
        Err(error) if error.code() == Some(401) => {
            return Err(JoinError::CannotAdopt {
                cause: format!("{} does not take its certificate", endpoint.server),
                remedy: JOIN_ANEW.to_owned(),
            });
        }
        Err(error) => return Err(error.into()),
    }
    let proxy = settings::proxy_of_cluster(&client, &mut warnings).await?;
    let file = NodeFile {
        version: 1,
        node_name: node_name.clone(),
        node_ips: Vec::new(),
        root_dir: paths.root_dir.clone(),
        container_runtime_endpoint,
        kubelet_flags,
    };
    let text = serde_json::to_vec_pretty(&file).map_err(|e| files::FileError {
        what: "write",
        path: paths.node_file(),
        cause: e.into(),
    })?;
    let mut staged = Staged::default();
    if let Some(proxy) = proxy {
        staged.add(&paths.proxy_config(), 0o600, proxy.as_bytes())?;
    }
    staged.add(&paths.node_file(), 0o600, &text)?;
    staged.commit()?;
    if processes::gather().iter().any(|p| p.here && p.name == "kube-proxy") {
        warnings.push(
            "kube-proxy runs on this node and programs the same Services: keep its DaemonSet off this \
             node (README, \"Using it\")"
                .to_owned(),
        );
    }
    let server = endpoint.server;
    Ok(Joined { node_name, server, already: false, adopted: true, warnings })
}

const JOIN_ANEW: &str = "join this machine anew: on the control plane `kubeadm token create \
                         --print-join-command`, here `longshore join` with what it prints";

/// The node's credentials and name.
fn credentials(conf: &Path) -> Result<(Endpoint, String), JoinError> {
    let cannot = |cause: String| JoinError::CannotAdopt { cause, remedy: JOIN_ANEW.to_owned() };
    if !conf.exists() {
        return Err(cannot(format!("there is no {}", conf.display())));
    }
    let endpoint = Endpoint::load(conf).map_err(|error| cannot(error.to_string()))?;
    let Identity::Certificate { chain, .. } = &endpoint.identity else {
        return Err(cannot(format!("{} holds no client certificate", conf.display())));
    };
    let certificate = NodeCertificate::read(chain)
        .ok_or_else(|| cannot(format!("{} is not a node's", conf.display())))?;
    if !certificate.is_valid_at(jiff::Timestamp::now().as_second()) {
        return Err(cannot(format!("the certificate in {} has expired", conf.display())));
    }
    Ok((endpoint, certificate.node_name))
}

/// Checks the kubelet's configuration; the runtime that it names.
fn kubelet_config(path: &Path) -> Result<Option<String>, JoinError> {
    let text = std::fs::read(path).map_err(|cause| JoinError::CannotAdopt {
        cause: format!("cannot read the kubelet's configuration {}: {cause}", path.display()),
        remedy: "say where the kubelet's files are: --root-dir".to_owned(),
    })?;
    let documents = config::parse(&text).map_err(|error| JoinError::CannotAdopt {
        cause: format!("the kubelet's configuration {}: {error}", path.display()),
        remedy: "correct it".to_owned(),
    })?;
    Ok(documents.kubelet.container_runtime_endpoint)
}

fn read_arguments(path: &Path, name: &str) -> Vec<String> {
    std::fs::read_to_string(path).map(|text| kubelet_arguments(&text, name)).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_found_in_environment_files() {
        let text = "# comment\nKUBELET_KUBEADM_ARGS=\"--hostname-override=n --node-ip 10.0.0.1 \
                    --node-labels=a=b\"\nOTHER=x\n";
        assert_eq!(
            kubelet_arguments(text, "KUBELET_KUBEADM_ARGS"),
            ["--hostname-override=n", "--node-ip=10.0.0.1", "--node-labels=a=b"]
        );
        assert_eq!(
            kubelet_arguments("KUBELET_EXTRA_ARGS=--v=2\n", "KUBELET_EXTRA_ARGS"),
            ["--v=2"]
        );
        assert!(kubelet_arguments("KUBELET_EXTRA_ARGS=\n", "KUBELET_EXTRA_ARGS").is_empty());
        assert!(kubelet_arguments("", "X").is_empty());
    }

    #[test]
    fn a_kubelet_that_runs_is_stopped_by_systemd_or_by_the_operator() {
        let kubelet = |here| [Process { pid: 7, name: "kubelet".to_owned(), here }];
        assert!(!plan_takeover(&kubelet(false), false).unwrap());
        assert!(plan_takeover(&kubelet(true), true).unwrap());
        let error = plan_takeover(&kubelet(true), false).unwrap_err();
        assert_eq!(error.exit_code(), 23);
        assert!(error.to_string().contains("process 7"), "{error}");
    }

    #[test]
    fn without_credentials_there_is_nothing_to_adopt() {
        let dir = tempfile::tempdir().unwrap();
        let error = credentials(&dir.path().join("kubelet.conf")).err().unwrap();
        assert_eq!(error.exit_code(), 23);
        assert!(error.to_string().contains("kubeadm token create"), "{error}");
    }
}
