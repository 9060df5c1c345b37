//! One registry host: its settings, its login, and single requests to it.
//!
//! Redirects are followed here rather than in the HTTP library, so that credentials and configured
//! headers stay with the host they were meant for, and client certificates too.

use std::{
    error::Error as StdError,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant, SystemTime},
};

use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{
        ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
    },
};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{
    super::{ImageError, ImageReference, StoreConfig},
    auth::{self, Challenge, Credentials, Token, TokenService},
    hosts::{Host, Scheme},
    tls,
};
use crate::api::AuthConfig;

/// How long a manifest or a token may take as a whole.
pub(super) const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// The most a registry may want to be waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The most redirects of one request.
const MAX_REDIRECTS: usize = 10;
/// The most that is read of an answer that is only an error or a token, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// A host that can be asked for one image.
pub(super) struct Remote {
    host: Host,
    wanted: ImageReference,
    own: Client,
    elsewhere: Client,
    headers: HeaderMap,
    no_roots: bool,
    /// A loopback registry turned out to speak plain http.
    plain: AtomicBool,
    credentials: Credentials,
    login: Mutex<Login>,
    /// It failed in this pull; the others are asked first.
    pub(super) failed: AtomicBool,
}

/// What requests are sent with.
#[derive(Clone, Default)]
enum Login {
    /// Nothing until the registry asks.
    #[default]
    Open,
    Fixed(HeaderValue),
    Token {
        token: Token,
        service: TokenService,
    },
}

/// A request that failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: ImageError,
    /// How long the registry wants to be left alone.
    pub(super) wait: Option<Duration>,
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self { error, wait: None }
    }
}

/// What is asked of a host.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    /// `manifests/<reference>` or `blobs/<digest>`.
    pub(super) what: &'a str,
    pub(super) accept: Option<&'a str>,
    /// Where to begin, in bytes.
    pub(super) offset: u64,
}

impl Remote {
    /// Gets ready to ask `host`. Nothing is sent yet.
    pub(super) fn new(
        host: Host,
        wanted: &ImageReference,
        auth: Option<&AuthConfig>,
        config: &StoreConfig,
    ) -> Result<Self, ImageError> {
        let tls = tls::settings(&host)?;
        let build = |tls: rustls::ClientConfig| {
            Client::builder()
                .tls_backend_preconfigured(tls)
                .redirect(reqwest::redirect::Policy::none())
                .user_agent(concat!("longshore/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(host.dial_timeout.unwrap_or(config.connect_timeout))
                .read_timeout(config.read_timeout)
                .build()
                .map_err(|error| ImageError::Network {
                    reference: wanted.to_string(),
                    host: host.address.clone(),
                    reason: chain(&error),
                })
        };
        let unauthorized =
            |reason| ImageError::Unauthorized { reference: wanted.to_string(), reason };
        let credentials = Credentials::of(auth, &host.address).map_err(unauthorized)?;
        let login = match &credentials {
            Credentials::Bearer(_) => credentials.header().map_or(Login::Open, Login::Fixed),
            _ => Login::Open,
        };
        let mut headers = HeaderMap::new();
        for (name, value) in &host.headers {
            if let (Ok(name), Ok(value)) =
                (HeaderName::try_from(name), HeaderValue::try_from(value))
            {
                headers.append(name, value);
            }
        }
        Ok(Self {
            own: build(tls.own)?,
            elsewhere: build(tls.elsewhere)?,
            headers,
            no_roots: tls.no_roots,
            plain: AtomicBool::new(host.scheme == Scheme::Http),
            credentials,
            login: Mutex::new(login),
            wanted: wanted.clone(),
            failed: AtomicBool::new(false),
            host,
        })
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// Sends `ask`, logging in where that is wanted; gives only successful answers.
    pub(super) async fn get(&self, ask: Ask<'_>) -> Result<Response, Failure> {
        let mut sent = self.authorization(None).await?;
        let mut asked = false;
        loop {
            let answer = self.send_either(ask, sent.as_ref()).await?;
            let status = answer.status();
            if status == StatusCode::UNAUTHORIZED && !asked {
                asked = true;
                let challenge = auth::challenge(answer.headers());
                if let Some(header) = self.meet(challenge, sent.as_ref()).await? {
                    sent = Some(header);
                    continue;
                }
            }
            if status.is_success() {
                return Ok(answer);
            }
            return Err(self.refused(answer).await);
        }
    }

    /// The header to send, after renewing a token that ends.
    async fn authorization(
        &self,
        refused: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let mut login = self.login.lock().await;
        match &*login {
            Login::Open => Ok(None),
            Login::Fixed(header) => Ok(Some(header.clone())),
            Login::Token { token, .. }
                if token.is_good(Instant::now()) && refused != Some(&token.header) =>
            {
                Ok(Some(token.header.clone()))
            }
            Login::Token { service, .. } => {
                let service = service.clone();
                let token = self.token(&service).await?;
                let header = token.header.clone();
                *login = Login::Token { token, service };
                Ok(Some(header))
            }
        }
    }

    /// What meets `challenge` better than `sent` did; none if nothing does.
    async fn meet(
        &self,
        challenge: Option<Challenge>,
        sent: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let mut login = self.login.lock().await;
        // Another request may have logged in meanwhile.
        let current = match &*login {
            Login::Open => None,
            Login::Fixed(header) => Some(header),
            Login::Token { token, .. } => Some(&token.header),
        };
        if current.is_some() && current != sent {
            return Ok(current.cloned());
        }
        let (new, header) = match challenge {
            Some(Challenge::Bearer(_)) if matches!(self.credentials, Credentials::Bearer(_)) => {
                return Ok(None);
            }
            Some(Challenge::Bearer(service)) => {
                let token = self.token(&service).await?;
                let header = token.header.clone();
                (Login::Token { token, service }, header)
            }
            Some(Challenge::Basic) => match self.credentials.header() {
                Some(header) => (Login::Fixed(header.clone()), header),
                None => return Ok(None),
            },
            None => return Ok(None),
        };
        *login = new;
        Ok((sent != Some(&header)).then_some(header))
    }

    /// Asks a token service.
    async fn token(&self, service: &TokenService) -> Result<Token, Failure> {
        let unauthorized = |reason: String| ImageError::Unauthorized {
            reference: self.wanted.to_string(),
            reason,
        };
        let request =
            service.request(&self.credentials, self.wanted.repository()).map_err(unauthorized)?;
        let url = request.url;
        let secret = request.authorization.is_some() || request.form.is_some();
        let plain_registry = self.plain.load(Ordering::Relaxed);
        if secret && url.scheme() != "https" && !plain_registry && !is_loopback(&url) {
            let reason = format!("its token service {} would get the password unencrypted", url);
            return Err(unauthorized(reason).into());
        }
        let name = url.host_str().unwrap_or_default().to_owned();
        let own = self.parse(&self.base())?.origin() == url.origin();
        let client = if own { &self.own } else { &self.elsewhere };
        let method = if request.form.is_some() { Method::POST } else { Method::GET };
        let mut builder = client.request(method, url).timeout(DOCUMENT_TIMEOUT);
        if let Some(header) = request.authorization {
            builder = builder.header(AUTHORIZATION, header);
        }
        if let Some(form) = request.form {
            builder =
                builder.header("content-type", "application/x-www-form-urlencoded").body(form);
        }
        let answer = builder.send().await.map_err(|error| {
            self.network(format!("token service {name}: {}", chain(&error.without_url())))
        })?;
        let status = answer.status();
        if matches!(
            status,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST
        ) {
            // The body may echo what was sent.
            return Err(self.bad_credentials().into());
        }
        if !status.is_success() {
            let wait = wait_of(answer.headers());
            let error = self.network(format!("token service {name} answered {status}"));
            return Err(Failure { error, wait });
        }
        let body = read_some(answer, MAX_ANSWER)
            .await
            .map_err(|error| self.network(format!("token service {name}: {error}")))?;
        Ok(Token::read(&body, Instant::now()).map_err(unauthorized)?)
    }

    /// Sends `ask` by https or http; a loopback registry that is not known yet is tried by both.
    async fn send_either(
        &self,
        ask: Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let guess = self.host.scheme == Scheme::Either && !self.plain.load(Ordering::Relaxed);
        let secure = match self.send(ask, authorization).await {
            Err(error) if guess && speaks_no_tls(&*error) => error,
            sent => return Ok(sent.map_err(|error| self.unreachable(&*error))?),
        };
        self.plain.store(true, Ordering::Relaxed);
        match self.send(ask, authorization).await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                // Which of the two it was meant to speak nobody knows.
                self.plain.store(false, Ordering::Relaxed);
                let (secure, error) = (chain(&*secure), chain(&*error));
                let reason = format!("{secure}; over plain http: {error}");
                Err(self.network(reason).into())
            }
        }
    }

    fn base(&self) -> String {
        let scheme = if self.plain.load(Ordering::Relaxed) { "http" } else { "https" };
        format!("{scheme}://{}{}", self.host.address, self.host.path)
    }

    fn parse(&self, url: &str) -> Result<Url, ImageError> {
        Url::parse(url).map_err(|error| self.network(format!("{url}: {error}")))
    }

    /// Sends `ask` and follows where it is sent on to.
    async fn send(
        &self,
        ask: Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Box<dyn StdError + Send + Sync>> {
        let mut url =
            Url::parse(&format!("{}/{}/{}", self.base(), self.wanted.repository(), ask.what))?;
        if self.host.mirror {
            url.query_pairs_mut().append_pair("ns", self.wanted.registry());
        }
        let origin = url.origin();
        for _ in 0..=MAX_REDIRECTS {
            let own = url.origin() == origin;
            let client = if own { &self.own } else { &self.elsewhere };
            let mut request = client.get(url.clone());
            if own {
                request = request.headers(self.headers.clone());
                if let Some(header) = authorization {
                    request = request.header(AUTHORIZATION, header.clone());
                }
            }
            if let Some(accept) = ask.accept {
                request = request.header(ACCEPT, accept);
            }
            if ask.offset > 0 {
                request = request.header(RANGE, format!("bytes={}-", ask.offset));
            }
            // Addresses of redirects may carry signatures that are as good as credentials.
            let answer = request.send().await.map_err(reqwest::Error::without_url)?;
            let location = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let (true, Some(location)) = (answer.status().is_redirection(), location) else {
                return Ok(answer);
            };
            let next = url.join(location)?;
            if !matches!(next.scheme(), "https" | "http")
                || (next.scheme() == "http" && url.scheme() == "https" && !is_loopback(&next))
            {
                let host = next.host_str().unwrap_or_default();
                return Err(format!("it redirects to {host} by {}", next.scheme()).into());
            }
            url = next;
        }
        Err(format!("more than {MAX_REDIRECTS} redirects").into())
    }

    /// The error of an answer that is none.
    async fn refused(&self, answer: Response) -> Failure {
        let status = answer.status();
        let wait = wait_of(answer.headers());
        let body = read_some(answer, MAX_ANSWER).await.unwrap_or_default();
        let said = said(&body);
        let host = &self.host.address;
        let text = match said.is_empty() {
            true => format!("{host} answered {status}"),
            false => format!("{host} says {}", said.join(", ")),
        };
        let reference = self.wanted.to_string();
        let error = match status {
            StatusCode::UNAUTHORIZED => self.bad_credentials(),
            StatusCode::FORBIDDEN => ImageError::Unauthorized { reference, reason: text },
            StatusCode::NOT_FOUND => ImageError::NotFound { reference, reason: text },
            status if is_transient(status) => self.network(text),
            _ => ImageError::Unsupported { reference, reason: text },
        };
        Failure { error, wait }
    }

    fn bad_credentials(&self) -> ImageError {
        let host = &self.host.address;
        let reason = match self.credentials {
            Credentials::Anonymous => format!("{host} requires credentials"),
            _ => format!("{host} refuses the credentials"),
        };
        ImageError::Unauthorized { reference: self.wanted.to_string(), reason }
    }

    fn unreachable(&self, error: &(dyn StdError + 'static)) -> ImageError {
        let mut reason = chain(error);
        if self.no_roots && !self.plain.load(Ordering::Relaxed) {
            reason.push_str(
                "; this machine has no root certificates: install the package ca-certificates, or \
                 name a file by SSL_CERT_FILE",
            );
        }
        self.network(reason)
    }

    pub(super) fn network(&self, reason: String) -> ImageError {
        let reference = self.wanted.to_string();
        ImageError::Network { reference, host: self.host.address.clone(), reason }
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback()),
        None => false,
    }
}

fn is_transient(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// How long the registry asks to wait, in seconds or until a time (RFC 9110 section 10.2.3).
fn wait_of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text)
            .ok()?
            .duration_since(SystemTime::now())
            .unwrap_or_default(),
    };
    Some(wait.min(LONGEST_WAIT))
}

/// Whether a failed connection says that the other side expects no TLS. A certificate that is not
/// to be trusted says the contrary.
fn speaks_no_tls(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            use rustls::Error as E;
            return !matches!(tls, E::InvalidCertificate(_) | E::AlertReceived(_));
        }
        // What an I/O error wraps is not its source, but its own self.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    true
}

/// The codes and messages of a registry's error (distribution "errors").
fn said(body: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Errors {
        #[serde(default)]
        errors: Vec<Said>,
    }
    #[derive(Deserialize)]
    struct Said {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let plain =
        |text: &str| -> String { text.chars().filter(|c| !c.is_control()).take(200).collect() };
    match serde_json::from_slice::<Errors>(body) {
        Ok(Errors { errors }) => errors
            .iter()
            .take(3)
            .map(|said| format!("{}: {}", plain(&said.code), plain(&said.message)))
            .collect(),
        Err(_) => Vec::new(),
    }
}

/// Reads an answer that must not be long.
pub(super) async fn read_some(mut answer: Response, most: usize) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(bytes) = answer.chunk().await.map_err(|error| chain(&error.without_url()))? {
        if body.len() + bytes.len() > most {
            return Err(format!("its answer is longer than {most} bytes"));
        }
        body.extend_from_slice(&bytes);
    }
    Ok(body)
}

/// An error with its causes: the outermost alone is often just "error sending request".
pub(super) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_read_and_bounded() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            wait_of(&headers)
        };
        assert_eq!(wait("3"), Some(Duration::from_secs(3)));
        assert_eq!(wait("99999"), Some(LONGEST_WAIT));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(wait("Sat, 06 Nov 2094 08:49:37 GMT"), Some(LONGEST_WAIT));
        assert_eq!(wait("soon"), None);
        assert_eq!(wait("-1"), None);
    }

    #[test]
    fn what_a_registry_says_is_shown_in_bounds() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\nway","detail":{"x":1}},{}]}"#;
        assert_eq!(said(body), ["DENIED: noway", ": "]);
        assert!(said(b"<html>").is_empty() && said(b"{}").is_empty());
        let long = format!(r#"{{"errors":[{{"code":"X","message":"{}"}}]}}"#, "m".repeat(5000));
        assert_eq!(said(long.as_bytes())[0].len(), 203);
    }
}
