//! Renews the node's client certificate before it expires; once it has expired (the node was off for
//! too long) falls back to the bootstrap kubeconfig, else says what to do. Pods run on meanwhile.
//!
//! The files are looked at, not remembered: a certificate that `longshore join` or an operator puts
//! there takes effect within seconds.

use std::time::Duration;

use jiff::Timestamp;

use crate::api::Api;
use crate::api::backoff::Backoff;
use crate::api::kubeconfig::{Endpoint, Identity};
use crate::cluster::{ClusterConfig, bootstrap};
use crate::join::csr::{self, NodeCertificate};
use crate::join::{self, JoinError, files, request};
use crate::source::cluster::Errors;

/// The longest sleep, so that a clock that was set is noticed, and a file that was replaced.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// The same while the certificate cannot be used.
const LOOK_SOON: Duration = Duration::from_secs(5);
/// How long one request for a certificate is waited for.
const TIMEOUT: Duration = Duration::from_secs(900);
/// Name of this loop's error.
const WHAT: &str = "certificate";

/// What is to be done about a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing, for so long.
    In(Duration),
    /// Renewed, with itself as credentials.
    Now,
    /// It is of no use any more.
    Expired,
    /// Its time has not come: a clock is wrong.
    NotYetValid,
}

/// Decides for a certificate at `now` (seconds since the epoch); `random` in 0..1 spreads the
/// renewals of many nodes. `got` is when it was issued, if this process saw that: signers date
/// certificates back by minutes, which of a short life are the most, and none is renewed before half
/// of what was left of it then is over.
pub fn plan_renewal(certificate: &NodeCertificate, got: Option<i64>, now: i64, random: f64) -> Due {
    if now < certificate.not_before {
        return Due::NotYetValid;
    }
    if now >= certificate.not_after {
        return Due::Expired;
    }
    let earliest = got.map_or(i64::MIN, |got| got + (certificate.not_after - got) / 2);
    match u64::try_from(certificate.renew_at(random).max(earliest) - now) {
        Ok(seconds) if seconds > 0 => Due::In(Duration::from_secs(seconds)),
        _ => Due::Now,
    }
}

/// How long to wait after a renewal that failed: less where little of the life is left.
fn patience(backoff: Duration, certificate: &NodeCertificate, now: i64) -> Duration {
    let left = u64::try_from(certificate.not_after - now).unwrap_or(0);
    backoff.min(Duration::from_secs(left / 4)).max(LOOK_SOON)
}

/// Watches the certificate in use for ever. Kubeconfigs without a client certificate are left alone.
pub async fn run(api: Api, config: ClusterConfig, errors: Errors) {
    let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
    let mut random = fastrand::f64();
    let mut used = held(&config).map(|(chain, _)| chain);
    let mut got = None;
    loop {
        let Some((chain, certificate)) = held(&config) else {
            tokio::time::sleep(LOOK_AGAIN).await;
            continue;
        };
        if used.as_ref() != Some(&chain) {
            match api.reload() {
                Ok(()) => {
                    tracing::info!("the client certificate is another one now; it is used");
                    used = Some(chain);
                    got = Some(Timestamp::now().as_second());
                    random = fastrand::f64();
                    backoff.reset();
                }
                Err(error) => errors.set(WHAT, format!("cannot use the new one: {error}")),
            }
        }
        let now = Timestamp::now().as_second();
        let wait = match plan_renewal(&certificate, got, now, random) {
            Due::In(wait) => {
                errors.clear(WHAT);
                wait.min(LOOK_AGAIN)
            }
            // Whoever does without renewals replaces the file in time, or it expires.
            Due::Now if !config.rotate_certificates => {
                errors.clear(WHAT);
                LOOK_AGAIN
            }
            Due::Now => match renew(&api, &config, &certificate, now).await {
                Ok(()) => continue,
                Err(error) => {
                    errors.set(WHAT, format!("cannot renew it: {error}"));
                    patience(backoff.next_delay(), &certificate, now)
                }
            },
            Due::Expired => match replace(&config, &certificate).await {
                Ok(()) => continue,
                Err(error) => {
                    errors.set(WHAT, error);
                    LOOK_SOON
                }
            },
            Due::NotYetValid => {
                let from = time(certificate.not_before);
                errors.set(
                    WHAT,
                    format!("it is not valid before {from}: is the clock of this machine right?"),
                );
                LOOK_SOON
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// The certificate that the kubeconfig has now, if it is a node's own.
fn held(config: &ClusterConfig) -> Option<(Vec<u8>, NodeCertificate)> {
    let endpoint = Endpoint::load(&config.kubeconfig).ok()?;
    let Identity::Certificate { chain, .. } = endpoint.identity else { return None };
    let certificate = NodeCertificate::read(&chain)?;
    Some((chain, certificate))
}

async fn renew(
    api: &Api,
    config: &ClusterConfig,
    old: &NodeCertificate,
    now: i64,
) -> Result<(), JoinError> {
    let made = csr::node_request(&config.node_name, None)?;
    let progress = |line: &str| tracing::info!("renewing the client certificate: {line}");
    let progress: join::Progress<'_> = &progress;
    // Past its end the old one is good for nothing, not even for waiting.
    let left = Duration::from_secs(u64::try_from(old.not_after - now).unwrap_or(0));
    let timeout = TIMEOUT.min(left).max(LOOK_SOON);
    let chain =
        request::certificate(api.main.clone(), &config.node_name, &made, timeout, progress).await?;
    store(config, &chain, &made.key_pem)?;
    tracing::info!("the client certificate is renewed");
    Ok(())
}

/// Puts a new certificate where the kubeconfig looks for it.
fn store(config: &ClusterConfig, chain: &[u8], key_pem: &str) -> Result<(), JoinError> {
    let stamp = files::stamp(Timestamp::now());
    files::store_certificate(&config.cert_dir, chain, key_pem, &stamp)?;
    Ok(())
}

/// Gets a certificate with the bootstrap kubeconfig, once the old one has expired.
async fn replace(config: &ClusterConfig, old: &NodeCertificate) -> Result<(), String> {
    let since = time(old.not_after);
    let (conf, bootstrap) = (config.kubeconfig.display(), config.bootstrap_kubeconfig.display());
    let remedy = format!(
        "its pods run on, but the cluster counts this node as lost; on the control plane run \
         `kubeadm token create --print-join-command`, then here `longshore join` with what it \
         prints (or put a kubeconfig with a valid token at {bootstrap}); it is taken up without a \
         restart"
    );
    if !config.bootstrap_kubeconfig.exists() {
        return Err(format!("the one in {conf} expired at {since}: {remedy}"));
    }
    bootstrap::bootstrap(config).await.map_err(|error| {
        format!(
            "the one in {conf} expired at {since}, and {bootstrap} does not get a new one ({error}): \
             {remedy}"
        )
    })
}

fn time(seconds: i64) -> String {
    Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |t| t.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;

    fn certificate() -> NodeCertificate {
        NodeCertificate { node_name: "n".to_owned(), not_before: 1000, not_after: 1000 + HOUR }
    }

    #[test]
    fn a_certificate_is_renewed_between_70_and_90_percent_of_its_life() {
        let due = |now, random| plan_renewal(&certificate(), None, now, random);
        let within = |now, random, minutes: u64| match due(now, random) {
            Due::In(wait) => wait.as_secs().abs_diff(minutes * 60) <= 1,
            _ => false,
        };
        assert!(within(1000, 0.0, 42) && within(1000, 1.0, 54), "{:?}", due(1000, 1.0));
        assert!(within(1000 + 42 * 60, 1.0, 12));
        assert_eq!(due(1000 + 42 * 60, 0.0), Due::Now);
        assert_eq!(due(1000 + HOUR - 1, 1.0), Due::Now);
        assert_eq!(due(1000 + HOUR, 0.0), Due::Expired);
        assert_eq!(due(999, 0.0), Due::NotYetValid);
    }

    #[test]
    fn one_that_is_dated_back_is_not_renewed_at_once() {
        // Issued for two minutes, as if five minutes ago.
        let short =
            NodeCertificate { node_name: "n".to_owned(), not_before: 1000, not_after: 1420 };
        assert_eq!(plan_renewal(&short, None, 1300, 0.0), Due::Now);
        let due = plan_renewal(&short, Some(1300), 1300, 0.0);
        assert_eq!(due, Due::In(Duration::from_secs(60)));
        assert_eq!(plan_renewal(&short, Some(1300), 1360, 0.0), Due::Now);
    }

    #[test]
    fn little_life_left_means_little_patience() {
        let wait = |now| patience(Duration::from_secs(300), &certificate(), now).as_secs();
        assert_eq!(wait(1000), 300);
        assert_eq!(wait(1000 + HOUR - 400), 100);
        assert_eq!(wait(1000 + HOUR - 4), LOOK_SOON.as_secs());
    }
}
