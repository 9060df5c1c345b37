//! Credentials from a bootstrap kubeconfig, as kubelet does it at its first start.

use std::time::Duration;

use super::{ClusterConfig, ClusterError};
use crate::api::backoff::Backoff;
use crate::api::kubeconfig::{Cluster, Endpoint, Kubeconfig};
use crate::api::{self, ApiError};
use crate::join::{self, JoinError, csr, files, request};

/// How long one request is waited for before a new one is made.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Makes sure that there is a kubeconfig that `config` can be used with. Where there is none that can
/// be read, asks for a certificate with the bootstrap kubeconfig until there is one. A certificate
/// that has expired holds nobody up: the last known pods run on, and `node::rotate` replaces it.
pub async fn ensure_kubeconfig(config: &ClusterConfig) -> Result<(), ClusterError> {
    let unusable = match Endpoint::load(&config.kubeconfig) {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    if !config.bootstrap_kubeconfig.exists() {
        return Err(match config.kubeconfig.exists() {
            true => ApiError::from(unusable).into(),
            false => ClusterError::NotJoined {
                kubeconfig: config.kubeconfig.clone(),
                bootstrap: config.bootstrap_kubeconfig.clone(),
            },
        });
    }
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        match bootstrap(config).await {
            Ok(()) => return Ok(()),
            Err(error) => {
                tracing::error!(%error, "cannot get this node's certificate; trying again");
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}

/// Asks for a certificate with the bootstrap kubeconfig, once, and writes the kubeconfig.
pub async fn bootstrap(config: &ClusterConfig) -> Result<(), JoinError> {
    let endpoint = Endpoint::load(&config.bootstrap_kubeconfig).map_err(ApiError::from)?;
    let made = csr::node_request(&config.node_name, None)?;
    let progress = |line: &str| tracing::info!("requesting the node's certificate: {line}");
    let progress: join::Progress<'_> = &progress;
    let client = api::client(&endpoint)?;
    let chain = request::certificate(client, &config.node_name, &made, TIMEOUT, progress).await?;
    let stamp = files::stamp(jiff::Timestamp::now());
    let current = files::store_certificate(&config.cert_dir, &chain, &made.key_pem, &stamp)?;
    let found = join::discover::Found {
        server: endpoint.server,
        ca_pem: endpoint.ca.unwrap_or_default(),
        server_name: endpoint.server_name,
    };
    let cluster =
        Cluster { insecure_skip_tls_verify: endpoint.insecure.then_some(true), ..found.cluster() };
    let text = Kubeconfig::with_certificate(cluster, "default-auth", &current)
        .to_yaml()
        .map_err(ApiError::from)?;
    files::write_atomic(&config.kubeconfig, 0o600, text.as_bytes())?;
    Ok(())
}
