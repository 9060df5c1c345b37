//! `longshore join`: from a bootstrap token to a node's own credentials.
//!
//! Nothing is written before the cluster has been proven to be the right one and a certificate has
//! been issued, but for the key of the pending request, so that an interrupted join goes on with the
//! same request.

pub mod csr;
pub mod discover;
pub mod files;
pub mod proxy_config;
pub mod request;
pub mod systemd;
pub mod token;
pub mod verify;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{Api, Client};

use self::csr::NodeCertificate;
use self::discover::Found;
use self::files::{NodeFile, Paths};
use self::token::BootstrapToken;
use self::verify::CaPin;
use crate::api::kubeconfig::{Endpoint, Identity, Kubeconfig};
use crate::api::{self, ApiError, REQUEST_TIMEOUT};

/// Takes lines for the person waiting.
pub type Progress<'a> = &'a (dyn Fn(&str) + Send + Sync);

/// Why a node did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token has the wrong form.
    #[error(transparent)]
    Token(#[from] token::BadToken),
    /// Not the right cluster.
    #[error(transparent)]
    Verify(#[from] verify::VerifyError),
    /// No certificate.
    #[error(transparent)]
    Csr(#[from] csr::CsrError),
    /// Something on disk.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// No connection.
    #[error(
        "cannot reach the API server at {server}: {cause}; check the address, the network and \
         that the control plane runs (curl -k {server}/version)"
    )]
    Unreachable {
        /// Its URL.
        server: String,
        /// What the last try said.
        cause: ApiError,
    },
    /// `cluster-info` may not be read.
    #[error(
        "{server} does not let anonymous clients read kube-public/cluster-info ({code}); join with \
         --discovery-file instead, or run `kubeadm init phase bootstrap-token` on the control plane"
    )]
    NoAnonymous {
        /// Its URL.
        server: String,
        /// HTTP status.
        code: u16,
    },
    /// There is no `cluster-info`.
    #[error(
        "{server} has no ConfigMap kube-public/cluster-info; run `kubeadm init phase \
         bootstrap-token` on the control plane, or join with --discovery-file"
    )]
    NoClusterInfo {
        /// Its URL.
        server: String,
    },
    /// Two reads of `cluster-info` differ.
    #[error(
        "cluster-info changed between two reads: try again; if it stays, somebody stands between"
    )]
    Changed,
    /// The token does not authenticate.
    #[error(
        "the API server refused the bootstrap token (401): it has expired or is not for \
         authentication; `kubeadm token create --print-join-command` on the control plane makes a \
         new one"
    )]
    TokenRefused,
    /// The token may not ask for certificates.
    #[error(
        "{cause}; the token's group may not request node certificates: run `kubeadm init phase \
         bootstrap-token` on the control plane"
    )]
    MayNotRequest {
        /// What the server said.
        cause: ApiError,
    },
    /// Nobody approved in time.
    #[error(
        "certificate request {name} was not approved and issued within {seconds} s; approve it \
         with `kubectl certificate approve {name}` and run the same join again"
    )]
    NotIssued {
        /// CSR object.
        name: String,
        /// How long was waited.
        seconds: u64,
    },
    /// Somebody deleted the request.
    #[error("certificate request {name} was deleted before it was answered; run the join again")]
    RequestGone {
        /// CSR object.
        name: String,
    },
    /// This node belongs to another cluster or name.
    #[error("{} already holds credentials {of}; run `longshore reset` first", path.display())]
    AlreadyJoined {
        /// kubelet.conf.
        path: PathBuf,
        /// Whose.
        of: String,
    },
    /// Neither token nor file tells which cluster.
    #[error(
        "there is no token to authenticate with: give --token, --token-file or --tls-bootstrap-token"
    )]
    NoToken,
}

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
    /// How long to wait for the certificate.
    pub timeout: Duration,
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
    /// Things that the operator should know.
    pub warnings: Vec<String>,
}

/// Joins, or finds that this node has joined already.
pub async fn join(request: &JoinRequest, progress: Progress<'_>) -> Result<Joined, JoinError> {
    let mut warnings = Vec::new();
    if let Some(server) = existing(request, progress).await? {
        write_node_file(request)?;
        let (node_name, already) = (request.node_name.clone(), true);
        return Ok(Joined { node_name, server, already, warnings });
    }
    let (found, identity) = match &request.discovery {
        Discovery::Token { address, token, pins } => {
            (discover::by_token(address, token, pins, progress).await?, Identity::Anonymous)
        }
        Discovery::File(path) => discover::by_file(path)?,
    };
    let identity = match (&request.bootstrap_token, identity) {
        (Some(token), _) => Identity::Token(token.bearer()),
        (None, Identity::Anonymous) => return Err(JoinError::NoToken),
        (None, identity) => identity,
    };
    let client = api::client(&found.endpoint(identity))?;
    if let Some(warning) = same_name(&client, &request.node_name).await {
        warnings.push(warning);
    }
    let pending = request.paths.cert_dir().join(files::PENDING_KEY);
    let key = std::fs::read_to_string(&pending).ok();
    let node_request = match csr::node_request(&request.node_name, key.as_deref()) {
        Ok(made) => made,
        Err(_) => csr::node_request(&request.node_name, None)?,
    };
    progress(&format!("requesting a certificate for node {}", request.node_name));
    let chain = {
        let wait = request::certificate(
            client.clone(),
            &request.node_name,
            &node_request,
            request.timeout,
            progress,
        );
        let outcome = wait.await;
        if matches!(outcome, Err(JoinError::NotIssued { .. })) {
            files::write_atomic(&pending, 0o600, node_request.key_pem.as_bytes())?;
        }
        outcome?
    };
    let config = system_config(&client, "kubelet-config", "kubelet").await;
    let proxy_config = system_config(&client, "kube-proxy", "config.conf").await;
    write(request, &found, &chain, &node_request.key_pem)?;
    match config {
        Ok(Some(text)) => {
            files::write_atomic(&request.paths.kubelet_config(), 0o644, text.as_bytes())?;
        }
        Ok(None) => warnings.push(
            "the cluster has no ConfigMap kube-system/kubelet-config: defaults are used; pods get \
             no clusterDNS unless --config says so"
                .to_owned(),
        ),
        Err(error) => warnings.push(format!(
            "{error}: defaults are used; pods get no clusterDNS unless --config says so"
        )),
    }
    // A cluster without kube-proxy has none, and the token may not be let to read it.
    let proxy_config = match proxy_config {
        Ok(Some(text)) => Some(proxy_config::plan_proxy_config(&text)),
        Ok(None) | Err(_) => None,
    };
    match proxy_config {
        Some(Ok(text)) => {
            files::write_atomic(&request.paths.proxy_config(), 0o644, text.as_bytes())?;
        }
        Some(Err(why)) => warnings.push(format!(
            "config.conf of kube-system/kube-proxy is not used: {why}; say --cluster-cidr to \
             `longshore run` if Services are to tell pods' traffic from other traffic"
        )),
        None => {}
    }
    let (node_name, server) = (request.node_name.clone(), found.server);
    Ok(Joined { node_name, server, already: false, warnings })
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
            Err(JoinError::Unreachable { server: endpoint.server, cause: error })
        }
        _ => Ok(Some(endpoint.server)),
    }
}

/// A warning if a ready node of this name is there: two machines under one name fight each other.
async fn same_name(client: &Client, name: &str) -> Option<String> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node =
        api::timed("look for the node", REQUEST_TIMEOUT, nodes.get_opt(name)).await.ok()??;
    let ready = node
        .status
        .and_then(|s| s.conditions)
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
    ready.then(|| {
        format!(
            "a ready node named {name} is in the cluster already; if that is another machine, give \
             this one another --node-name"
        )
    })
}

/// One key of a ConfigMap that kubeadm keeps for the cluster's nodes.
async fn system_config(client: &Client, name: &str, key: &str) -> Result<Option<String>, ApiError> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let what = format!("read kube-system/{name}");
    let map = api::timed(what, REQUEST_TIMEOUT, maps.get_opt(name)).await?;
    Ok(map.and_then(|m| m.data).and_then(|mut d| d.remove(key)))
}

/// Writes everything; kubelet.conf last, as its being there means that the node has joined.
fn write(
    request: &JoinRequest,
    found: &Found,
    chain: &[u8],
    key_pem: &str,
) -> Result<(), JoinError> {
    let paths = &request.paths;
    files::write_atomic(&paths.ca(), 0o644, &found.ca_pem)?;
    let stamp = files::stamp(jiff::Timestamp::now());
    let current = files::store_certificate(&paths.cert_dir(), chain, key_pem, &stamp)?;
    write_node_file(request)?;
    let text = Kubeconfig::with_certificate(found.cluster(), "default-auth", &current)
        .to_yaml()
        .map_err(ApiError::from)?;
    files::write_atomic(&paths.kubelet_conf(), 0o600, text.as_bytes())?;
    Ok(())
}

fn write_node_file(request: &JoinRequest) -> Result<(), JoinError> {
    let file = NodeFile {
        version: 1,
        node_name: request.node_name.clone(),
        node_ips: request.node_ips.clone(),
        root_dir: request.paths.root_dir.clone(),
        container_runtime_endpoint: request.container_runtime_endpoint.clone(),
    };
    let path = request.paths.node_file();
    let text = serde_json::to_vec_pretty(&file).map_err(|e| files::FileError {
        what: "write",
        path: path.clone(),
        cause: e.into(),
    })?;
    files::write_atomic(&path, 0o644, &text)?;
    Ok(())
}
