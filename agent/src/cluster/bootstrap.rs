//! Credentials from a bootstrap kubeconfig, as kubelet does it at its first start.

use std::time::Duration;

use super::{ClusterConfig, ClusterError};
use crate::api::backoff::Backoff;
use crate::api::kubeconfig::{Cluster, Endpoint, Identity, Kubeconfig};
use crate::api::{self, ApiError};
use crate::join::{self, JoinError, csr, files, request};

/// How long one request is waited for before a new one is made.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Makes sure that the kubeconfig of `config` can be used: it is there, and its certificate has not
/// expired. Otherwise asks for a certificate with the bootstrap kubeconfig until there is one.
pub async fn ensure_kubeconfig(config: &ClusterConfig) -> Result<(), ClusterError> {
    let usable = usable(config);
    if matches!(usable, Ok(true)) {
        return Ok(());
    }
    if !config.bootstrap_kubeconfig.exists() {
        return match usable {
            // Expired: the server says so, and `status` shows it; static pods go on.
            Ok(_) if config.kubeconfig.exists() => Ok(()),
            Ok(_) => Err(ClusterError::NotJoined {
                kubeconfig: config.kubeconfig.clone(),
                bootstrap: config.bootstrap_kubeconfig.clone(),
            }),
            Err(error) => Err(error.into()),
        };
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

fn usable(config: &ClusterConfig) -> Result<bool, ApiError> {
    if !config.kubeconfig.exists() {
        return Ok(false);
    }
    let endpoint = Endpoint::load(&config.kubeconfig)?;
    Ok(match &endpoint.identity {
        Identity::Certificate { chain, .. } => csr::NodeCertificate::read(chain)
            .is_none_or(|c| c.is_valid_at(jiff::Timestamp::now().as_second())),
        _ => true,
    })
}

async fn bootstrap(config: &ClusterConfig) -> Result<(), JoinError> {
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
