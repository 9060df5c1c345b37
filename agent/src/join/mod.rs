//! `longshore join`: from a bootstrap token to a node's own credentials.
//!
//! Nothing is written before the cluster has been proven to be the right one and a certificate has
//! been issued, but for the key of the pending request, so that an interrupted join goes on with the
//! same request.

pub mod adopt;
pub mod csr;
pub mod discover;
pub mod error;
pub mod files;
mod json_patch;
pub mod kubeadm;
pub mod patches;
pub mod proxy_config;
pub mod request;
pub mod settings;
pub mod systemd;
pub mod token;
pub mod verify;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeCondition};
use kube::{Api, Client};

use self::csr::NodeCertificate;
use self::discover::Found;
pub use self::error::JoinError;
use self::files::{NodeFile, Paths};
use self::token::BootstrapToken;
use self::verify::CaPin;
use crate::api::kubeconfig::{Endpoint, Identity, Kubeconfig};
use crate::api::{self, ApiError, REQUEST_TIMEOUT};

/// Takes lines for the person waiting.
pub type Progress<'a> = &'a (dyn Fn(&str) + Send + Sync);

/// How the cluster is found.
#[derive(Clone, Debug)]
pub enum Discovery {
    /// `HOST:PORT`, a token and pins; no pins means that the operator chose to skip them.
    Token {
        /// `HOST:PORT`.
        address: String,
        /// Signs cluster-info.
        token: BootstrapToken,
        /// Pinned CA keys.
        pins: Vec<CaPin>,
    },
    /// A kubeconfig with the CA in it.
    File(PathBuf),
    /// The same, at an `https://` address.
    Url(String),
}

/// What to join.
#[derive(Clone, Debug)]
pub struct JoinRequest {
    /// Where the cluster is.
    pub discovery: Discovery,
    /// Authenticates the certificate request; `None` takes what the discovery file holds.
    pub bootstrap_token: Option<BootstrapToken>,
    /// Name of the Node.
    pub node_name: String,
    /// `--node-ip`.
    pub node_ips: Vec<IpAddr>,
    /// `--container-runtime-endpoint`.
    pub container_runtime_endpoint: Option<String>,
    /// Where files go.
    pub paths: Paths,
    /// Where the CA goes, if not to its place in `paths`.
    pub ca_cert_path: Option<PathBuf>,
    /// Changes to the cluster's KubeletConfiguration.
    pub patches: Vec<patches::Patch>,
    /// Kubelet's flags (`--name=value`) for `longshore run`.
    pub kubelet_flags: Vec<String>,
    /// How long to wait for an API server that is away or not ready.
    pub discovery_timeout: Duration,
    /// How long to wait for the certificate.
    pub timeout: Duration,
    /// What the operator should know of the request itself.
    pub warnings: Vec<String>,
}

impl JoinRequest {
    fn ca_path(&self) -> PathBuf {
        self.ca_cert_path.clone().unwrap_or_else(|| self.paths.ca())
    }
}

/// What joining came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// Name of the Node.
    pub node_name: String,
    /// URL of the API server.
    pub server: String,
    /// The credentials were there and valid already.
    pub already: bool,
    /// The node of a kubelet was taken over.
    pub adopted: bool,
    /// Things that the operator should know.
    pub warnings: Vec<String>,
}

/// Joins, or finds that this node has joined already.
pub async fn join(request: &JoinRequest, progress: Progress<'_>) -> Result<Joined, JoinError> {
    if let Some(server) = existing(request, progress).await? {
        write_node_file(request)?;
        let node_name = request.node_name.clone();
        let (already, adopted, warnings) = (true, false, Vec::new());
        return Ok(Joined { node_name, server, already, adopted, warnings });
    }
    let (found, identity) = discovered(request, progress).await?;
    let identity = match (&request.bootstrap_token, identity) {
        (Some(token), _) => Identity::Token(token.bearer()),
        (None, Identity::Anonymous) => return Err(JoinError::NoToken),
        (None, identity) => identity,
    };
    let client = api::client(&found.endpoint(identity))?;
    refuse_taken_name(&client, &request.node_name).await?;
    let (settings, mut warnings) =
        settings::of_cluster(&client, &request.ca_path(), &request.patches).await?;
    let pending = request.paths.cert_dir().join(files::PENDING_KEY);
    let key = std::fs::read_to_string(&pending).ok();
    let node_request = match csr::node_request(&request.node_name, key.as_deref()) {
        Ok(made) => made,
        Err(_) => csr::node_request(&request.node_name, None)?,
    };
    progress(&format!("requesting a certificate for node {}", request.node_name));
    let outcome =
        request::certificate(client, &request.node_name, &node_request, request.timeout, progress)
            .await;
    match &outcome {
        // The next join goes on with the same request.
        Err(JoinError::NotIssued { .. }) => {
            files::write_atomic(&pending, 0o600, node_request.key_pem.as_bytes())?;
        }
        // The answer to this key will stay the same.
        Err(JoinError::Csr(_) | JoinError::RequestGone { .. }) => {
            let _ = std::fs::remove_file(&pending);
        }
        _ => {}
    }
    write(request, &found, &outcome?, &node_request.key_pem, &settings)?;
    warnings.extend(request.warnings.iter().cloned());
    let (node_name, server) = (request.node_name.clone(), found.server);
    Ok(Joined { node_name, server, already: false, adopted: false, warnings })
}

/// The cluster, proven to be the right one and ready, and who this machine is to it.
async fn discovered(
    request: &JoinRequest,
    progress: Progress<'_>,
) -> Result<(Found, Identity), JoinError> {
    let patience = request.discovery_timeout;
    let (found, identity) = match &request.discovery {
        Discovery::Token { address, token, pins } => {
            let found = discover::by_token(address, token, pins, patience, progress).await?;
            return Ok((found, Identity::Anonymous));
        }
        Discovery::File(path) => discover::by_file(path)?,
        Discovery::Url(url) => discover::by_url(url, progress).await?,
    };
    progress(&format!("asking {} whether it is ready", found.server));
    discover::ready(&found.endpoint(Identity::Anonymous), patience, progress).await?;
    Ok((found, identity))
}

/// The server, if valid credentials for this node and cluster are there.
async fn existing(
    request: &JoinRequest,
    progress: Progress<'_>,
) -> Result<Option<String>, JoinError> {
    let path = request.paths.kubelet_conf();
    if !path.exists() {
        return Ok(None);
    }
    let endpoint = match Endpoint::load(&path) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            progress(&format!("{error}; joining anew"));
            return Ok(None);
        }
    };
    let Identity::Certificate { chain, .. } = &endpoint.identity else { return Ok(None) };
    let now = jiff::Timestamp::now().as_second();
    let certificate = match NodeCertificate::read(chain) {
        Some(certificate) if certificate.is_valid_at(now) => certificate,
        _ => {
            progress("the certificate held has expired; joining anew");
            return Ok(None);
        }
    };
    let taken = |of: String| JoinError::AlreadyJoined { path: path.clone(), of };
    if certificate.node_name != request.node_name {
        return Err(taken(format!("of node {}", certificate.node_name)));
    }
    let ca = endpoint.ca.clone().unwrap_or_default();
    let other = match &request.discovery {
        Discovery::Token { pins, .. } => verify::pinned_authorities(&ca, pins).is_err(),
        Discovery::File(file) => discover::by_file(file)?.0.ca_pem != ca,
        Discovery::Url(url) => discover::by_url(url, progress).await?.0.ca_pem != ca,
    };
    if other {
        return Err(taken(format!("of another cluster ({})", endpoint.server)));
    }
    let nodes: Api<Node> = Api::all(api::client(&endpoint)?);
    let what = format!("check the credentials in {}", path.display());
    match api::timed(what, REQUEST_TIMEOUT, nodes.get_opt(&request.node_name)).await {
        Err(error) if error.code() == Some(401) => {
            progress("the cluster no longer takes the certificate held; joining anew");
            Ok(None)
        }
        Err(error) if error.code() != Some(403) => {
            Err(JoinError::Unreachable { server: endpoint.server, cause: error.to_string() })
        }
        _ => Ok(Some(endpoint.server)),
    }
}

/// An error if a ready node of this name is there: two machines under one name fight each other.
async fn refuse_taken_name(client: &Client, name: &str) -> Result<(), JoinError> {
    let nodes: Api<Node> = Api::all(client.clone());
    let looked = api::timed("look for the node", REQUEST_TIMEOUT, nodes.get_opt(name)).await;
    let status = match looked {
        Ok(Some(node)) => node.status.unwrap_or_default(),
        Err(error) if error.code() == Some(401) => return Err(JoinError::TokenRefused),
        // Not every token may look; the request that follows says what else is wrong.
        Ok(None) | Err(_) => return Ok(()),
    };
    let ready = |c: &NodeCondition| c.type_ == "Ready" && c.status == "True";
    if !status.conditions.iter().flatten().any(ready) {
        return Ok(());
    }
    let address = status.addresses.into_iter().flatten().find(|a| a.type_ == "InternalIP");
    let address = address.map_or_else(|| "an unknown address".to_owned(), |a| a.address);
    Err(JoinError::NameTaken { name: name.to_owned(), address })
}

/// Writes everything; kubelet.conf last, as its being there means that the node has joined.
fn write(
    request: &JoinRequest,
    found: &Found,
    chain: &[u8],
    key_pem: &str,
    settings: &settings::Settings,
) -> Result<(), JoinError> {
    let paths = &request.paths;
    let cert_dir = paths.cert_dir();
    let current = cert_dir.join(files::CURRENT);
    let conf = Kubeconfig::with_certificate(found.cluster(), "default-auth", &current)
        .to_yaml()
        .map_err(ApiError::from)?;
    let stamp = files::stamp(jiff::Timestamp::now());
    let pem = cert_dir.join(format!("kubelet-client-{stamp}.pem"));
    let (mut staged, mut last) = (files::Staged::default(), files::Staged::default());
    staged.add(&request.ca_path(), 0o644, &found.ca_pem)?;
    if let Some(text) = &settings.kubelet {
        staged.add(&paths.kubelet_config(), 0o600, text.as_bytes())?;
    }
    if let Some(text) = &settings.proxy {
        staged.add(&paths.proxy_config(), 0o600, text.as_bytes())?;
    }
    staged.add(&paths.node_file(), 0o600, &node_file(request)?)?;
    staged.add(&pem, 0o600, &files::pair(chain, key_pem))?;
    last.add(&paths.kubelet_conf(), 0o600, conf.as_bytes())?;
    staged.commit()?;
    files::link_current(&cert_dir, "kubelet-client", &pem)?;
    last.commit()?;
    let _ = std::fs::remove_file(cert_dir.join(files::PENDING_KEY));
    Ok(())
}

fn node_file(request: &JoinRequest) -> Result<Vec<u8>, files::FileError> {
    let file = NodeFile {
        version: 1,
        node_name: request.node_name.clone(),
        node_ips: request.node_ips.clone(),
        root_dir: request.paths.root_dir.clone(),
        container_runtime_endpoint: request.container_runtime_endpoint.clone(),
        kubelet_flags: request.kubelet_flags.clone(),
    };
    serde_json::to_vec_pretty(&file).map_err(|e| files::FileError {
        what: "write",
        path: request.paths.node_file(),
        cause: e.into(),
    })
}

fn write_node_file(request: &JoinRequest) -> Result<(), JoinError> {
    files::write_atomic(&request.paths.node_file(), 0o600, &node_file(request)?)?;
    Ok(())
}
