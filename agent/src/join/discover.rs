//! Finds the cluster: by `HOST:PORT`, a token and pins, or from a file.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use tokio::time::Instant;

use super::token::BootstrapToken;
use super::verify::{self, CaPin, VerifyError};
use super::{JoinError, Progress};
use crate::api::backoff::Backoff;
use crate::api::kubeconfig::{Cluster, Endpoint, Identity, Kubeconfig};
use crate::api::{self, ApiError};

/// How long an unreachable or stumbling server is tried again.
const PATIENCE: Duration = Duration::from_secs(15);
/// A token made this moment is signed by the controller-manager a little later.
const TOKEN_PATIENCE: Duration = Duration::from_secs(8);
/// Wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where a cluster is and how it is known to be the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// URL of the API server.
    pub server: String,
    /// CA certificates, PEM.
    pub ca_pem: Vec<u8>,
    /// Name to verify in the server's certificate instead of the host.
    pub server_name: Option<String>,
}

impl Found {
    /// For use with `identity`.
    pub fn endpoint(&self, identity: Identity) -> Endpoint {
        Endpoint {
            server: self.server.clone(),
            ca: Some(self.ca_pem.clone()),
            insecure: false,
            server_name: self.server_name.clone(),
            identity,
        }
    }

    /// As a kubeconfig's cluster, with the CA in it.
    pub fn cluster(&self) -> Cluster {
        Cluster {
            server: self.server.clone(),
            certificate_authority_data: Some(STANDARD.encode(&self.ca_pem)),
            tls_server_name: self.server_name.clone(),
            ..Cluster::default()
        }
    }
}

/// Reads `cluster-info` from `address` (`HOST:PORT`), checks its signature with `token` and its CA
/// with `pins` (empty: not pinned), and reads it once more over verified TLS.
pub async fn by_token(
    address: &str,
    token: &BootstrapToken,
    pins: &[CaPin],
    progress: Progress<'_>,
) -> Result<Found, JoinError> {
    let server = format!("https://{address}");
    let first = Endpoint {
        server: server.clone(),
        ca: None,
        insecure: true,
        server_name: None,
        identity: Identity::Anonymous,
    };
    progress(&format!("reading cluster-info from {server}"));
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(2));
    let kubeconfig = loop {
        let data = cluster_info(&first, progress).await?;
        match verify::signed_kubeconfig(&data, token) {
            Ok(text) => break text.to_owned(),
            Err(VerifyError::UnknownToken { .. }) if started.elapsed() < TOKEN_PATIENCE => {
                tokio::time::sleep(backoff.next_delay()).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    let found = from_cluster_info(&kubeconfig, &server, pins)?;
    progress("the signature and the pinned CA are right; reading again over verified TLS");
    let verified = Found { server, ..found.clone() };
    let again = cluster_info(&verified.endpoint(Identity::Anonymous), progress).await?;
    let text = verify::signed_kubeconfig(&again, token)?;
    if from_cluster_info(text, &verified.server, pins)? != found {
        return Err(JoinError::Changed);
    }
    Ok(found)
}

/// What the kubeconfig in `cluster-info` says. A control plane behind several addresses names the
/// one to use in it.
fn from_cluster_info(text: &str, fallback: &str, pins: &[CaPin]) -> Result<Found, JoinError> {
    let origin = "in kube-public/cluster-info";
    let parsed = Kubeconfig::parse(text, origin).map_err(ApiError::from)?;
    let cluster = parsed.cluster(origin).map_err(ApiError::from)?;
    let ca_pem = cluster
        .ca(origin, Path::new("/nonexistent"))
        .map_err(ApiError::from)?
        .ok_or_else(|| VerifyError::BadAuthority("there is none".to_owned()))?;
    verify::pinned_authorities(&ca_pem, pins)?;
    let server = if cluster.server.is_empty() { fallback } else { &cluster.server };
    Ok(Found {
        server: server.trim_end_matches('/').to_owned(),
        ca_pem,
        server_name: cluster.tls_server_name.clone(),
    })
}

/// The cluster and, where it has one, the identity in a discovery file.
pub fn by_file(path: &Path) -> Result<(Found, Identity), JoinError> {
    let endpoint = Endpoint::load(path).map_err(ApiError::from)?;
    let Some(ca_pem) = endpoint.ca else {
        return Err(VerifyError::BadAuthority(format!("{} names none", path.display())).into());
    };
    verify::pinned_authorities(&ca_pem, &[])?;
    let found = Found { server: endpoint.server, ca_pem, server_name: endpoint.server_name };
    Ok((found, endpoint.identity))
}

async fn cluster_info(
    endpoint: &Endpoint,
    progress: Progress<'_>,
) -> Result<BTreeMap<String, String>, JoinError> {
    let maps: Api<ConfigMap> = Api::namespaced(api::client(endpoint)?, "kube-public");
    let what = format!("read kube-public/cluster-info from {}", endpoint.server);
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(300), Duration::from_secs(3));
    let mut last = String::new();
    loop {
        let error = match api::timed(&what, TIMEOUT, maps.get("cluster-info")).await {
            Ok(map) => return Ok(map.data.unwrap_or_default()),
            Err(error) => error,
        };
        match error.code() {
            Some(code @ (401 | 403)) => {
                return Err(JoinError::NoAnonymous { server: endpoint.server.clone(), code });
            }
            Some(404) => return Err(JoinError::NoClusterInfo { server: endpoint.server.clone() }),
            _ if started.elapsed() >= PATIENCE => {
                return Err(JoinError::Unreachable {
                    server: endpoint.server.clone(),
                    cause: error,
                });
            }
            _ => {
                let said = error.to_string();
                if said != last {
                    progress(&format!("{said}; trying again"));
                    last = said;
                }
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}
