//! Renews the node's client certificate before it expires.

use std::time::Duration;

use crate::api::Api;
use crate::api::backoff::Backoff;
use crate::api::kubeconfig::{Endpoint, Identity};
use crate::cluster::ClusterConfig;
use crate::join::{self, JoinError, csr, files, request};
use crate::source::cluster::Errors;

/// The longest sleep, so that a clock that was set is noticed.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);
/// How long one request for a certificate is waited for.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Watches the certificate in use for ever. Kubeconfigs without a client certificate are left alone.
pub async fn run(api: Api, config: ClusterConfig, errors: Errors) {
    let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
    let random = fastrand::f64();
    loop {
        let wait = match due_in(&config, random) {
            None => LOOK_AGAIN,
            Some(wait) if !wait.is_zero() => wait.min(LOOK_AGAIN),
            Some(_) => match renew(&api, &config).await {
                Ok(()) => {
                    errors.clear("certificate");
                    backoff.reset();
                    continue;
                }
                Err(error) => {
                    errors.set("certificate", format!("cannot renew it: {error}"));
                    backoff.next_delay()
                }
            },
        };
        tokio::time::sleep(wait).await;
    }
}

/// How long until the certificate is to be renewed; `None` if there is none of a node's own.
fn due_in(config: &ClusterConfig, random: f64) -> Option<Duration> {
    let endpoint = Endpoint::load(&config.kubeconfig).ok()?;
    let Identity::Certificate { chain, .. } = endpoint.identity else { return None };
    let certificate = csr::NodeCertificate::read(&chain)?;
    let now = jiff::Timestamp::now().as_second();
    let seconds = certificate.renew_at(random).saturating_sub(now);
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

async fn renew(api: &Api, config: &ClusterConfig) -> Result<(), JoinError> {
    let made = csr::node_request(&config.node_name, None)?;
    let progress = |line: &str| tracing::info!("renewing the client certificate: {line}");
    let progress: join::Progress<'_> = &progress;
    let chain =
        request::certificate(api.main.clone(), &config.node_name, &made, TIMEOUT, progress).await?;
    let stamp = files::stamp(jiff::Timestamp::now());
    files::store_certificate(&config.cert_dir, &chain, &made.key_pem, &stamp)?;
    api.reload()?;
    tracing::info!("the client certificate is renewed");
    Ok(())
}
