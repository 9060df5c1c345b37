//! Static pods from an address (`staticPodURL`): asked for at `httpCheckFrequency`, and handed to the
//! folder's source as one more file of it.
//!
//! An address that does not answer, or not with pods, takes nothing away. What it last said is kept on
//! disk by the source, so that a boot with the address away runs the same pods.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION};
use hyper::http::uri::{Authority, PathAndQuery, Scheme, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::api::connect::Connector;
use crate::api::{chain, tls};
use crate::standalone::yaml::MAX_FILE;

/// Wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Redirects that are followed.
const REDIRECTS: usize = 10;

/// Why an address cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// It is no address of a web server.
    #[error("{0:?} is no http:// or https:// URL")]
    Address(String),
    /// A header cannot be sent.
    #[error("header {0:?} cannot be sent in HTTP; check its name, and its value for line breaks")]
    Header(String),
}

/// What is asked for, and how often.
#[derive(Clone)]
pub struct PodUrl {
    uri: Uri,
    headers: HeaderMap,
    period: Duration,
}

impl std::fmt::Debug for PodUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Headers may hold credentials.
        f.debug_tuple("PodUrl").field(&self.shown()).finish()
    }
}

impl PodUrl {
    /// To ask `url` with `headers` every `period`.
    ///
    /// # Errors
    /// The address or a header cannot be used; no value is in the error's text.
    pub fn new<'a>(
        url: &str,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
        period: Duration,
    ) -> Result<Self, UrlError> {
        let without_secrets = url.split(['?', '#']).next().unwrap_or_default();
        let shown = match without_secrets.split_once('@') {
            Some((_, host)) => format!("...@{host}"),
            None => without_secrets.to_owned(),
        };
        let wrong = || UrlError::Address(shown.clone());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let mut parts = uri.into_parts();
        let known = [Some(Scheme::HTTP), Some(Scheme::HTTPS)].contains(&parts.scheme);
        let authority = parts.authority.take().filter(|_| known).ok_or_else(wrong)?;
        let mut all = HeaderMap::new();
        let host = match authority.as_str().rsplit_once('@') {
            Some((user, host)) => {
                let basic = format!("Basic {}", STANDARD.encode(user));
                all.insert(AUTHORIZATION, HeaderValue::try_from(basic).map_err(|_| wrong())?);
                host.to_owned()
            }
            None => authority.to_string(),
        };
        parts.authority = Some(Authority::try_from(host).map_err(|_| wrong())?);
        parts.path_and_query.get_or_insert_with(|| PathAndQuery::from_static("/"));
        for (name, value) in headers {
            let refused = || UrlError::Header(name.to_owned());
            let name = HeaderName::try_from(name).map_err(|_| refused())?;
            let mut value = HeaderValue::try_from(value).map_err(|_| refused())?;
            value.set_sensitive(true);
            all.append(name, value);
        }
        Ok(Self { uri: Uri::from_parts(parts).map_err(|_| wrong())?, headers: all, period })
    }

    /// For people: without a query, which may hold a token.
    pub fn shown(&self) -> String {
        let scheme = self.uri.scheme_str().unwrap_or("http");
        let host = self.uri.authority().map_or("", Authority::as_str);
        format!("{scheme}://{host}{}", self.uri.path())
    }
}

/// The address as a source has it.
pub struct UrlSide {
    /// What problems are told under.
    pub name: String,
    /// What it says.
    pub said: watch::Receiver<Said>,
    /// Where its last good answer is kept.
    pub kept: PathBuf,
    /// What was last taken of what it says.
    pub taken: Said,
}

/// What an address said last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Said {
    /// It was not asked yet.
    #[default]
    Nothing,
    /// This.
    Text(Bytes),
    /// Nothing that could be used, and why.
    Failed(String),
}

/// Asks `url` for as long as somebody listens.
pub async fn poll(url: PodUrl, said: watch::Sender<Said>) {
    let trusted = match tls::system_config() {
        // Nobody is to be trusted on the way to an address without TLS.
        Err(_) if url.uri.scheme() == Some(&Scheme::HTTP) => tls::trusting_nobody(),
        trusted => trusted,
    };
    let client = trusted.map_err(|error| error.to_string()).map(|tls| {
        let connector = Connector::new(tls, None, TIMEOUT);
        Client::builder(TokioExecutor::new()).build::<_, Empty<Bytes>>(connector)
    });
    let mut ticks = tokio::time::interval(url.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = said.closed() => return,
        }
        let answer = match &client {
            Ok(client) => tokio::time::timeout(TIMEOUT, ask(client, &url))
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs()))),
            Err(error) => Err(error.clone()),
        };
        let now = match answer {
            Ok(text) if text.is_empty() => {
                Said::Failed("an empty answer; a PodList without items ends all pods".into())
            }
            Ok(text) => Said::Text(text),
            Err(error) => Said::Failed(error),
        };
        said.send_if_modified(|last| {
            let news = *last != now;
            *last = now;
            news
        });
    }
}

async fn ask(client: &Client<Connector, Empty<Bytes>>, url: &PodUrl) -> Result<Bytes, String> {
    let mut target = url.uri.clone();
    for _ in 0..=REDIRECTS {
        let mut request = hyper::Request::get(target.clone());
        // Another server than the one they are meant for does not get the headers.
        if (target.scheme(), target.authority()) == (url.uri.scheme(), url.uri.authority())
            && let Some(headers) = request.headers_mut()
        {
            *headers = url.headers.clone();
        }
        let request = request.body(Empty::new()).map_err(|e| e.to_string())?;
        let answer = client.request(request).await.map_err(|e| chain(&e))?;
        let status = answer.status();
        if let Some(next) = answer.headers().get(LOCATION).filter(|_| status.is_redirection()) {
            target = redirected(&target, next.to_str().map_err(|e| e.to_string())?)?;
            continue;
        }
        if status != hyper::StatusCode::OK {
            return Err(format!("the server answers {status}"));
        }
        let limit = usize::try_from(MAX_FILE).unwrap_or(usize::MAX);
        let body = Limited::new(answer.into_body(), limit).collect().await;
        return Ok(body.map_err(|e| chain(&*e))?.to_bytes());
    }
    Err(format!("more than {REDIRECTS} redirects"))
}

/// Where `location` leads from `from`: an address, or a path on the same server.
fn redirected(from: &Uri, location: &str) -> Result<Uri, String> {
    let wrong = || "a redirect to what is no http:// or https:// URL".to_owned();
    let to: Uri = location.parse().map_err(|_| wrong())?;
    let mut parts = to.into_parts();
    if parts.authority.is_none() {
        if !location.starts_with('/') {
            return Err(wrong());
        }
        parts.scheme = from.scheme().cloned();
        parts.authority = from.authority().cloned();
    }
    let to = Uri::from_parts(parts).map_err(|_| wrong())?;
    match to.scheme_str() {
        Some("https") => Ok(to),
        Some("http") if from.scheme() == Some(&Scheme::HTTP) => Ok(to),
        Some("http") => Err("a redirect from https to http".to_owned()),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Answers each request with what it is told; keeps what was asked.
    async fn serve(answer: Arc<Mutex<String>>) -> (std::net::SocketAddr, Arc<Mutex<Vec<String>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut link, _)) = listener.accept().await {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(link.read_u8().await.unwrap());
                }
                seen.lock().unwrap().push(String::from_utf8(request).unwrap());
                let answer = answer.lock().unwrap().clone();
                link.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (address, asked)
    }

    fn ok(body: &str) -> String {
        format!(
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    async fn next(said: &mut watch::Receiver<Said>) -> Said {
        let changed = tokio::time::timeout(Duration::from_secs(30), said.changed()).await;
        changed.expect("nothing is said").unwrap();
        said.borrow_and_update().clone()
    }

    #[tokio::test]
    async fn an_address_is_asked_with_its_headers_again_and_again() {
        let answer = Arc::new(Mutex::new(ok("one")));
        let (address, asked) = serve(answer.clone()).await;
        let headers = [("X-Token", "a"), ("X-Token", "b")];
        let period = Duration::from_millis(20);
        let url = format!("http://user:word@{address}/pods?key=hidden");
        let url = PodUrl::new(&url, headers, period).unwrap();
        assert_eq!(url.shown(), format!("http://{address}/pods"));
        assert!(!format!("{url:?}").contains("hidden"));
        let (tell, mut said) = watch::channel(Said::Nothing);
        tokio::spawn(poll(url, tell));
        assert_eq!(next(&mut said).await, Said::Text("one".into()));
        let request = asked.lock().unwrap()[0].clone();
        assert!(request.starts_with("GET /pods?key=hidden HTTP/1.1\r\n"), "{request}");
        for header in ["x-token: a", "x-token: b", "authorization: Basic dXNlcjp3b3Jk"] {
            assert!(request.contains(&format!("{header}\r\n")), "{request}");
        }
        for (answered, expected) in [
            (ok("two"), Said::Text("two".into())),
            (ok(""), Said::Failed("an empty answer; a PodList without items ends all pods".into())),
            (
                "HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".into(),
                Said::Failed("the server answers 503 Service Unavailable".into()),
            ),
            (ok("two"), Said::Text("two".into())),
        ] {
            *answer.lock().unwrap() = answered;
            assert_eq!(next(&mut said).await, expected);
        }
    }

    #[tokio::test]
    async fn a_redirect_takes_no_credentials_elsewhere() {
        let target = Arc::new(Mutex::new(ok("there")));
        let (there, asked_there) = serve(target).await;
        let moved = format!(
            "HTTP/1.1 302 Found\r\nlocation: http://{there}/x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        let (here, asked_here) = serve(Arc::new(Mutex::new(moved))).await;
        let url = format!("http://{here}/");
        let url = PodUrl::new(&url, [("X-Token", "a")], Duration::from_secs(60)).unwrap();
        let (tell, mut said) = watch::channel(Said::Nothing);
        tokio::spawn(poll(url, tell));
        assert_eq!(next(&mut said).await, Said::Text("there".into()));
        assert!(asked_here.lock().unwrap()[0].contains("x-token: a"));
        assert!(!asked_there.lock().unwrap()[0].contains("x-token"));
    }

    #[test]
    fn what_is_no_address_is_refused_without_its_secrets() {
        let of = |url: &str, header: (&'static str, &'static str)| {
            PodUrl::new(url, [header], Duration::from_secs(1)).map(|url| url.shown())
        };
        let fine = ("a", "b");
        assert_eq!(of("https://[::1]:8443", fine).unwrap(), "https://[::1]:8443/");
        for (url, header, said) in [
            ("ftp://host/x?hidden", fine, "\"ftp://host/x\" is no http"),
            ("/pods", fine, "is no http"),
            ("http://u:hidden@ho st/", fine, "is no http"),
            ("http://host/", ("a b", "hidden"), "header \"a b\" cannot"),
            ("http://host/", ("a", "hidden\r\n"), "header \"a\" cannot"),
        ] {
            let error = of(url, header).unwrap_err().to_string();
            assert!(error.contains(said) && !error.contains("hidden"), "{error}");
        }
        let at = |text: &str| text.parse::<Uri>().unwrap();
        for (from, to, expected) in [
            ("http://a/x", "/y?z", Some("http://a/y?z")),
            ("http://a/x", "https://b/", Some("https://b/")),
            ("https://a/x", "http://b/", None),
            ("http://a/x", "y", None),
            ("http://a/x", "ftp://b/", None),
        ] {
            assert_eq!(redirected(&at(from), to).ok(), expected.map(at), "{from} {to}");
        }
    }
}
