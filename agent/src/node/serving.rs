//! Gets the certificate that the node API is served with from the cluster (`serverTLSBootstrap`),
//! and a new one before it expires or when the node's addresses change. The server reads the file
//! again by itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::api::backoff::Backoff;
use crate::cluster::ClusterConfig;
use crate::join::{self, JoinError, csr, files, request};
use crate::node_api::SERVING_CERTIFICATE;
use crate::source::cluster::Errors;

/// The longest sleep, so that a clock that was set is noticed.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);
/// How long one request is waited for; nobody approves them unless told to.
const TIMEOUT: Duration = Duration::from_secs(900);
/// First part of the names of the files.
const STEM: &str = "kubelet-server";

/// Runs for ever.
pub async fn run(
    client: Client,
    config: ClusterConfig,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    errors: Errors,
) {
    let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
    let random = fastrand::f64();
    loop {
        let names = node.borrow_and_update().as_deref().map(names).unwrap_or_default();
        let wait = match names.is_empty() {
            // Nothing to ask for until the node has addresses.
            true => LOOK_AGAIN,
            false => match due_in(&config, &names, random) {
                wait if !wait.is_zero() => wait.min(LOOK_AGAIN),
                _ => match renew(&client, &config, &names).await {
                    Ok(()) => {
                        errors.clear("serving certificate");
                        backoff.reset();
                        continue;
                    }
                    Err(error) => {
                        errors.set("serving certificate", format!("cannot get one: {error}"));
                        backoff.next_delay()
                    }
                },
            },
        };
        let sleep = tokio::time::sleep(wait);
        tokio::pin!(sleep);
        loop {
            tokio::select! {
                () = &mut sleep => break,
                changed = node.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Statuses change often, addresses hardly ever.
                    let now = node.borrow_and_update().as_deref().map(self::names);
                    if now.unwrap_or_default() != names {
                        break;
                    }
                }
            }
        }
    }
}

/// DNS names and addresses of the node.
fn names(node: &Node) -> BTreeSet<String> {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    addresses.into_iter().flatten().map(|address| address.address.clone()).collect()
}

/// How long the certificate in use is good for `names`.
fn due_in(config: &ClusterConfig, names: &BTreeSet<String>, random: f64) -> Duration {
    let good = || {
        let pem = std::fs::read(config.cert_dir.join(SERVING_CERTIFICATE)).ok()?;
        let node = csr::NodeCertificate::read(&pem)?;
        (node.node_name == config.node_name && names.is_subset(&served(&pem)?)).then_some(node)
    };
    let now = jiff::Timestamp::now().as_second();
    let seconds = good().map_or(0, |good| good.renew_at(random).saturating_sub(now));
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Names and addresses in the first certificate of `pem`.
fn served(pem: &[u8]) -> Option<BTreeSet<String>> {
    let der = CertificateDer::from_pem_slice(pem).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|ip| std::net::IpAddr::from(ip).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|ip| std::net::IpAddr::from(ip).to_string()),
        },
        _ => None,
    };
    Some(names.value.general_names.iter().filter_map(text).collect())
}

async fn renew(
    client: &Client,
    config: &ClusterConfig,
    names: &BTreeSet<String>,
) -> Result<(), JoinError> {
    let names: Vec<String> = names.iter().cloned().collect();
    let made = csr::serving_request(&config.node_name, &names)?;
    let progress = |line: &str| tracing::info!("the node API's certificate: {line}");
    let progress: join::Progress<'_> = &progress;
    let chain =
        request::certificate(client.clone(), &config.node_name, &made, TIMEOUT, progress).await?;
    let stamp = files::stamp(jiff::Timestamp::now());
    files::store_pair(&config.cert_dir, STEM, &chain, &made.key_pem, &stamp)?;
    tracing::info!("the node API has a certificate of the cluster's");
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    #[test]
    fn a_certificate_is_good_while_it_names_all_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let config = ClusterConfig { cert_dir: dir.path().into(), ..ClusterConfig::new("n1") };
        let names: BTreeSet<String> = ["n1", "10.0.0.1", "fd00::1"].map(str::to_owned).into();
        assert!(due_in(&config, &names, 0.5).is_zero(), "there is none");
        let mut params = CertificateParams::new(names.iter().cloned().collect::<Vec<_>>()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "system:node:n1");
        let key = KeyPair::generate().unwrap();
        let chain = params.self_signed(&key).unwrap().pem();
        files::store_pair(dir.path(), STEM, chain.as_bytes(), &key.serialize_pem(), "1").unwrap();
        assert!(!due_in(&config, &names, 0.5).is_zero());
        let mut more = names.clone();
        more.insert("10.0.0.2".to_owned());
        assert!(due_in(&config, &more, 0.5).is_zero(), "an address is new");
        let other = ClusterConfig { node_name: "n2".to_owned(), ..config };
        assert!(due_in(&other, &names, 0.5).is_zero(), "it is another node's");
    }
}
