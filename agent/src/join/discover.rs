//! Finds the cluster: by `HOST:PORT`, a token and pins, or from a file.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Limited};
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::ConfigMap;
use tokio::time::Instant;

use super::token::BootstrapToken;
use super::verify::{self, CaPin, VerifyError};
use super::{JoinError, Progress};
use crate::api::backoff::Backoff;
use crate::api::connect::Connector;
use crate::api::kubeconfig::{Cluster, Endpoint, Identity, Kubeconfig};
use crate::api::{self, ApiError, tls};

/// How long an unreachable or stumbling server is tried again (`--discovery-timeout`).
pub const PATIENCE: Duration = Duration::from_secs(15);
/// A token made this moment is signed by the controller-manager a little later.
const TOKEN_PATIENCE: Duration = Duration::from_secs(8);
/// Wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Clocks may differ by this: certificates are issued as valid since five minutes ago.
const MAX_SKEW: Duration = Duration::from_secs(300);
/// Longest discovery document that is read.
const DOCUMENT_LIMIT: usize = 1 << 20;
/// Redirects that are followed.
const REDIRECTS: usize = 5;
const CLUSTER_INFO: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

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
    patience: Duration,
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
        let data = cluster_info(&first, patience, progress).await?;
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
    let again = cluster_info(&verified.endpoint(Identity::Anonymous), patience, progress).await?;
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
    of_endpoint(endpoint, &path.display().to_string())
}

/// As [`by_file`], read from an `https://` address whose server one of this machine's certificate
/// authorities vouches for.
pub async fn by_url(url: &str, progress: Progress<'_>) -> Result<(Found, Identity), JoinError> {
    progress(&format!("reading the discovery file from {url}"));
    let wrong = |cause: String| JoinError::DiscoveryUrl { url: url.to_owned(), cause };
    let text = tokio::time::timeout(TIMEOUT, download(url))
        .await
        .map_err(|_| wrong(format!("no answer within {} s", TIMEOUT.as_secs())))?
        .map_err(wrong)?;
    let text = String::from_utf8(text).map_err(|_| wrong("it is not UTF-8 text".to_owned()))?;
    let parsed = Kubeconfig::parse(&text, url).map_err(ApiError::from)?;
    // Files named by a document from elsewhere are not this machine's to read.
    let endpoint = parsed.endpoint(url, Path::new("/nonexistent")).map_err(ApiError::from)?;
    of_endpoint(endpoint, url)
}

fn of_endpoint(endpoint: Endpoint, origin: &str) -> Result<(Found, Identity), JoinError> {
    let Some(ca_pem) = endpoint.ca else {
        return Err(VerifyError::BadAuthority(format!("{origin} names none")).into());
    };
    verify::pinned_authorities(&ca_pem, &[])?;
    let found = Found { server: endpoint.server, ca_pem, server_name: endpoint.server_name };
    Ok((found, endpoint.identity))
}

/// Follows redirects, to HTTPS only.
async fn download(url: &str) -> Result<Vec<u8>, String> {
    let connector = Connector::new(tls::system_config().map_err(|e| e.to_string())?, None, TIMEOUT);
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, http_body_util::Empty<hyper::body::Bytes>>(connector);
    let mut target = url.to_owned();
    for _ in 0..=REDIRECTS {
        let uri: hyper::Uri = target.parse().map_err(|e| format!("{target} is no URL: {e}"))?;
        if uri.scheme() != Some(&hyper::http::uri::Scheme::HTTPS) {
            return Err(format!("{target} is not https: anybody on the way could change it"));
        }
        let answer = client.get(uri).await.map_err(|e| api::chain(&e))?;
        let next = answer
            .headers()
            .get(hyper::header::LOCATION)
            .filter(|_| answer.status().is_redirection());
        if let Some(next) = next {
            next.to_str().map_err(|e| e.to_string())?.clone_into(&mut target);
            continue;
        }
        if !answer.status().is_success() {
            return Err(format!("the server answers {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), DOCUMENT_LIMIT).collect().await;
        return Ok(body.map_err(|e| e.to_string())?.to_bytes().into());
    }
    Err(format!("more than {REDIRECTS} redirects"))
}

/// What a server says to one GET.
struct Answer {
    code: u16,
    date: Option<jiff::Timestamp>,
    body: Vec<u8>,
}

/// Why there is no answer.
enum Silence {
    /// TLS does not trust the server.
    Certificate(tls::Fault, String),
    /// Nothing came in time.
    Late,
    /// Anything else.
    Other(String),
}

async fn get(client: &kube::Client, path: &str) -> Result<Answer, Silence> {
    let request = hyper::Request::get(path).body(kube::client::Body::empty());
    let request = request.map_err(|e| Silence::Other(e.to_string()))?;
    let ask = async {
        let answer = client.send(request).await.map_err(|e| match tls::server_fault(&e) {
            Some(fault) => Silence::Certificate(fault, api::explain(&e)),
            None => Silence::Other(api::explain(&e)),
        })?;
        let date = answer.headers().get(hyper::header::DATE).and_then(|d| d.to_str().ok());
        let date = date.and_then(|d| jiff::fmt::rfc2822::parse(d).ok()).map(|d| d.timestamp());
        let code = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), DOCUMENT_LIMIT).collect().await;
        let body = body.map_err(|e| Silence::Other(api::chain(&*e)))?.to_bytes().into();
        Ok(Answer { code, date, body })
    };
    match tokio::time::timeout(TIMEOUT, ask).await {
        Ok(answer) => answer,
        Err(_) => Err(Silence::Late),
    }
}

/// How far the server's clock is ahead of this machine's, if that is too far.
pub fn clock_skew(server: jiff::Timestamp, here: jiff::Timestamp) -> Option<i64> {
    let seconds = server.as_second() - here.as_second();
    (seconds.unsigned_abs() > MAX_SKEW.as_secs()).then_some(seconds)
}

/// Whether a server that may not be trusted yet has the same time: its own certificate would seem
/// expired, or not yet valid, to a clock that is wrong.
async fn check_clock(endpoint: &Endpoint) -> Result<(), JoinError> {
    let stranger =
        Endpoint { insecure: true, ca: None, identity: Identity::Anonymous, ..endpoint.clone() };
    if let Ok(Answer { date: Some(date), .. }) = get(&api::client(&stranger)?, "/version").await {
        skewed(endpoint, date)?;
    }
    Ok(())
}

fn skewed(endpoint: &Endpoint, date: jiff::Timestamp) -> Result<(), JoinError> {
    match clock_skew(date, jiff::Timestamp::now()) {
        Some(seconds) => Err(JoinError::ClockSkew { server: endpoint.server.clone(), seconds }),
        None => Ok(()),
    }
}

/// Waits up to `patience` until the server is there, is to be trusted, and says that it is ready.
///
/// # Errors
/// Which of these it is not, or that the clocks differ.
pub async fn ready(
    endpoint: &Endpoint,
    patience: Duration,
    progress: Progress<'_>,
) -> Result<(), JoinError> {
    let client = api::client(endpoint)?;
    Trying::new(endpoint, patience, progress)
        .until(async || match get(&client, "/readyz").await {
            // Whoever does not let strangers ask is up.
            Ok(answer) if matches!(answer.code, 200 | 401 | 403 | 404) => {
                Turn::Done(answer.date, Ok(()))
            }
            Ok(answer) => Turn::NotReady(answer),
            Err(silence) => Turn::Silent(silence),
        })
        .await
}

async fn cluster_info(
    endpoint: &Endpoint,
    patience: Duration,
    progress: Progress<'_>,
) -> Result<BTreeMap<String, String>, JoinError> {
    let client = api::client(endpoint)?;
    let server = || endpoint.server.clone();
    Trying::new(endpoint, patience, progress)
        .until(async || {
            let answer = match get(&client, CLUSTER_INFO).await {
                Ok(answer) => answer,
                // A server without its etcd takes requests and does not answer them, while it may
                // still think that it is ready.
                Err(Silence::Late) => match get(&client, "/readyz?verbose").await {
                    Ok(Answer { code: 200, date, .. }) => {
                        let said = "it does not answer for objects; is its etcd up?";
                        return Turn::NotReady(Answer { code: 504, date, body: said.into() });
                    }
                    Ok(ready) => return Turn::NotReady(ready),
                    Err(_) => return Turn::Silent(Silence::Late),
                },
                Err(silence) => return Turn::Silent(silence),
            };
            let date = answer.date;
            match answer.code {
                200 => match serde_json::from_slice::<ConfigMap>(&answer.body) {
                    Ok(map) => Turn::Done(date, Ok(map.data.unwrap_or_default())),
                    Err(_) => Turn::NotReady(answer),
                },
                code @ 401 => {
                    Turn::Done(date, Err(JoinError::NoAnonymous { server: server(), code }))
                }
                // A server that is coming up has no roles and no objects yet.
                code @ (403 | 404) => match get(&client, "/readyz?verbose").await {
                    Ok(ready) if ready.code == 200 || ready.code == code => Turn::Done(
                        date,
                        Err(match code {
                            404 => JoinError::NoClusterInfo { server: server() },
                            _ => JoinError::NoAnonymous { server: server(), code },
                        }),
                    ),
                    Ok(ready) => Turn::NotReady(ready),
                    Err(silence) => Turn::Silent(silence),
                },
                _ => Turn::NotReady(answer),
            }
        })
        .await
}

/// What one try came to.
enum Turn<T> {
    /// An answer that more tries would not change, and the server's time.
    Done(Option<jiff::Timestamp>, Result<T, JoinError>),
    /// It is there and cannot serve.
    NotReady(Answer),
    /// No answer.
    Silent(Silence),
}

/// Asks again until there is an answer or patience is at its end.
struct Trying<'a> {
    endpoint: &'a Endpoint,
    patience: Duration,
    progress: Progress<'a>,
}

impl<'a> Trying<'a> {
    fn new(endpoint: &'a Endpoint, patience: Duration, progress: Progress<'a>) -> Self {
        Self { endpoint, patience, progress }
    }

    async fn until<T>(self, ask: impl AsyncFn() -> Turn<T>) -> Result<T, JoinError> {
        let started = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(300), Duration::from_secs(3));
        let (mut last, server) = (String::new(), &self.endpoint.server);
        loop {
            let (said, error) = match ask().await {
                Turn::Done(date, outcome) => {
                    if let Some(date) = date {
                        skewed(self.endpoint, date)?;
                    }
                    return outcome;
                }
                Turn::NotReady(answer) => {
                    if let Some(date) = answer.date {
                        skewed(self.endpoint, date)?;
                    }
                    let said = not_ready(&answer);
                    (said.clone(), JoinError::NotReady { server: server.clone(), said })
                }
                Turn::Silent(Silence::Certificate(fault, cause)) => {
                    check_clock(self.endpoint).await?;
                    return Err(JoinError::ServerCertificate {
                        server: server.clone(),
                        fault,
                        cause,
                    });
                }
                Turn::Silent(silence) => {
                    let cause = match silence {
                        Silence::Other(cause) | Silence::Certificate(_, cause) => cause,
                        Silence::Late => format!("no answer within {} s", TIMEOUT.as_secs()),
                    };
                    (cause.clone(), JoinError::Unreachable { server: server.clone(), cause })
                }
            };
            if started.elapsed() >= self.patience {
                return Err(error);
            }
            if said != last {
                (self.progress)(&format!("{server}: {said}; trying again"));
                last = said;
            }
            let left = self.patience.saturating_sub(started.elapsed());
            tokio::time::sleep(backoff.next_delay().min(left)).await;
        }
    }
}

/// What an unready server's answer says: the checks that fail, else its message.
fn not_ready(answer: &Answer) -> String {
    let text = String::from_utf8_lossy(&answer.body);
    let failing: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("[-]")).collect();
    let message = serde_json::from_slice::<serde_json::Value>(&answer.body)
        .ok()
        .and_then(|status| status["message"].as_str().map(str::to_owned))
        .or_else(|| text.lines().next().map(|line| line.chars().take(200).collect()))
        .unwrap_or_default();
    match failing.is_empty() {
        true => format!("{} {message}", answer.code),
        false => format!("{} {}", answer.code, failing.join(", ")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn clocks_may_differ_by_five_minutes() {
        let at = |s| jiff::Timestamp::from_second(s).unwrap();
        assert_eq!(clock_skew(at(1000), at(700)), None);
        assert_eq!(clock_skew(at(1000), at(699)), Some(301));
        assert_eq!(clock_skew(at(0), at(301)), Some(-301));
    }

    #[test]
    fn an_unready_server_is_quoted_by_what_fails() {
        let said = |body: &str| {
            not_ready(&Answer { code: 500, date: None, body: body.as_bytes().to_vec() })
        };
        let verbose = "[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed\n";
        assert_eq!(said(verbose), "500 etcd failed: reason withheld");
        assert_eq!(
            said(r#"{"kind":"Status","message":"etcdserver: leader changed"}"#),
            "500 etcdserver: leader changed"
        );
        assert_eq!(said("starting"), "500 starting");
        assert_eq!(said(""), "500 ");
    }

    #[tokio::test]
    async fn discovery_files_come_by_https_only() {
        for url in ["http://127.0.0.1/x", "file:///etc/passwd", "nonsense"] {
            let error = by_url(url, &|_| {}).await.err().unwrap();
            assert_eq!(error.exit_code(), 20, "{url}: {error}");
        }
    }
}
