//! HTTP checks, for probes and lifecycle hooks: one GET, redirects within the host, certificates
//! not verified (they are the pod's own affair).

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, CONNECTION, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ContainerPort, HTTPGetAction};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::api::tls::AnyServer;

use super::{MAX_OUTPUT, Outcome, resolve_port};

/// Redirects followed before a check is given up.
const MAX_REDIRECTS: usize = 10;

/// The API level whose kubelet we stand in for.
const AGENT: &str = "kube-probe/1.36";

/// What came back.
struct Answer {
    status: u16,
    location: Option<String>,
    body: String,
}

/// Scheme, host and port of the check.
pub fn base_url(get: &HTTPGetAction, ports: &[ContainerPort], pod_ip: Option<IpAddr>) -> String {
    let scheme = get.scheme.as_deref().unwrap_or("HTTP").to_lowercase();
    let port = resolve_port(&get.port, ports).unwrap_or_default();
    let host = host_of(get, pod_ip).unwrap_or_default();
    format!("{scheme}://{}:{port}", bracketed(&host))
}

fn host_of(get: &HTTPGetAction, pod_ip: Option<IpAddr>) -> Option<String> {
    match get.host.as_deref().filter(|h| !h.is_empty()) {
        Some(host) => Some(host.to_owned()),
        None => pod_ip.map(|ip| ip.to_string()),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Gets the path; healthy is any status from 200 to 399.
pub async fn check_http(get: &HTTPGetAction, port: u16, pod_ip: Option<IpAddr>) -> Outcome {
    let Some(host) = host_of(get, pod_ip) else {
        return Outcome::Unknown("the pod has no address yet".into());
    };
    let scheme = get.scheme.as_deref().unwrap_or("HTTP").to_lowercase();
    let path = get.path.as_deref().unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mut url = format!("{scheme}://{}:{port}{path}", bracketed(&host));
    for hop in 0..=MAX_REDIRECTS {
        let answer = match fetch(&url, get, hop == 0).await {
            Ok(answer) => answer,
            Err(Fault::Url(error)) => return Outcome::Unknown(error),
            Err(Fault::Io(error)) => return Outcome::Failure(format!("Get \"{url}\": {error}")),
        };
        let Answer { status, location, body } = answer;
        if !(200..400).contains(&status) {
            return Outcome::Failure(format!("HTTP probe failed with statuscode: {status}"));
        }
        let Some(location) = location.filter(|_| (301..=308).contains(&status) && status != 304)
        else {
            return Outcome::Success;
        };
        match redirect(&url, &location) {
            Redirect::Same(next) => url = next,
            // Another host says nothing of this container.
            Redirect::Elsewhere => {
                return Outcome::Warning(format!(
                    "Probe terminated redirects, Response body: {body}"
                ));
            }
        }
    }
    Outcome::Failure(format!("Get \"{url}\": stopped after {MAX_REDIRECTS} redirects"))
}

enum Redirect {
    Same(String),
    Elsewhere,
}

fn redirect(from: &str, location: &str) -> Redirect {
    let Ok(base) = from.parse::<Uri>() else { return Redirect::Elsewhere };
    let scheme = base.scheme_str().unwrap_or("http");
    let authority = base.authority().map(ToString::to_string).unwrap_or_default();
    if location.starts_with('/') && !location.starts_with("//") {
        return Redirect::Same(format!("{scheme}://{authority}{location}"));
    }
    let absolute = match location.strip_prefix("//") {
        Some(rest) => format!("{scheme}://{rest}"),
        None => location.to_owned(),
    };
    match absolute.parse::<Uri>() {
        Ok(to) if to.host().is_none() => {
            let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            Redirect::Same(format!("{scheme}://{authority}{folder}/{location}"))
        }
        Ok(to) if to.host() == base.host() => Redirect::Same(absolute),
        _ => Redirect::Elsewhere,
    }
}

enum Fault {
    Url(String),
    Io(String),
}

async fn fetch(url: &str, get: &HTTPGetAction, first: bool) -> Result<Answer, Fault> {
    let io = |error: &dyn std::fmt::Display| Fault::Io(error.to_string());
    let uri: Uri = url.parse().map_err(|e| Fault::Url(format!("{url}: {e}")))?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let https = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let path = uri.path_and_query().map_or("/", |p| p.as_str());

    let mut request = Request::builder().uri(path);
    let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
    if let Some(headers) = request.headers_mut() {
        let fixed = |text: &str| HeaderValue::from_str(text);
        headers.insert(HOST, fixed(&authority).map_err(|e| Fault::Url(e.to_string()))?);
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        if first {
            add_headers(headers, get);
        }
    }
    let request =
        request.body(Empty::<Bytes>::new()).map_err(|e| Fault::Url(format!("{url}: {e}")))?;

    let tcp = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(|e| Fault::Io(format!("dial tcp {}:{port}: {e}", bracketed(&host))))?;
    let _ = tcp.set_nodelay(true);
    let response = if https {
        let name = ServerName::try_from(host.clone()).map_err(|e| io(&e))?;
        let connector = tokio_rustls::TlsConnector::from(TLS.clone());
        send(connector.connect(name, tcp).await.map_err(|e| io(&e))?, request).await
    } else {
        send(tcp, request).await
    };
    response.map_err(|e| io(&e))
}

fn add_headers(headers: &mut hyper::HeaderMap, get: &HTTPGetAction) {
    for header in get.http_headers.iter().flatten() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&header.value)) else { continue };
        // An empty Accept or User-Agent takes ours away.
        if value.is_empty() && (name == ACCEPT || name == USER_AGENT) {
            headers.remove(name);
        } else {
            headers.insert(name, value);
        }
    }
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<Answer, hyper::Error> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async {
        let response: Response<_> = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let location =
            response.headers().get(LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
        let mut body = Vec::new();
        let mut incoming = response.into_body();
        while body.len() < MAX_OUTPUT {
            match incoming.frame().await {
                Some(Ok(frame)) => body.extend(frame.data_ref().into_iter().flatten()),
                // The status was all that mattered.
                Some(Err(_)) | None => break,
            }
        }
        body.truncate(MAX_OUTPUT);
        Ok(Answer { status, location, body: String::from_utf8_lossy(&body).into_owned() })
    };
    tokio::pin!(exchange);
    tokio::pin!(connection);
    let mut open = true;
    loop {
        tokio::select! {
            answer = &mut exchange => return answer,
            ended = &mut connection, if open => {
                open = false;
                ended?
            }
        }
    }
}

static TLS: LazyLock<Arc<rustls::ClientConfig>> = LazyLock::new(|| {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions();
    let config = match builder {
        Ok(builder) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
            .with_no_client_auth(),
        Err(error) => {
            // Only a provider without TLS 1.2 and 1.3 could cause it.
            tracing::error!(%error, "HTTPS probes: no TLS version to speak");
            rustls::ClientConfig::builder()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth()
        }
    };
    Arc::new(config)
});

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A server that answers each connection with the next of `answers`; gives the requests seen.
    async fn server(answers: Vec<String>) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let mut seen = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut text = Vec::new();
                while !text.ends_with(b"\r\n\r\n") {
                    text.push(stream.read_u8().await.unwrap());
                }
                seen.push(String::from_utf8(text).unwrap());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            seen
        });
        (port, served)
    }

    fn get(port: u16, path: &str) -> HTTPGetAction {
        HTTPGetAction {
            port: IntOrString::Int(port.into()),
            path: Some(path.into()),
            host: Some("127.0.0.1".into()),
            ..Default::default()
        }
    }

    fn answer(status: &str, headers: &str) -> String {
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: 2\r\n\r\nok")
    }

    #[tokio::test]
    async fn statuses_decide() {
        for (status, fine) in
            [("200 OK", true), ("399 x", true), ("400 x", false), ("500 x", false)]
        {
            let (port, served) = server(vec![answer(status, "")]).await;
            let outcome = check_http(&get(port, "/healthz"), port, None).await;
            assert_eq!(outcome == Outcome::Success, fine, "{status}: {outcome:?}");
            let seen = served.await.unwrap();
            assert!(seen[0].starts_with("GET /healthz HTTP/1.1\r\n"), "{seen:?}");
            assert!(seen[0].contains("user-agent: kube-probe/"), "{seen:?}");
        }
    }

    #[tokio::test]
    async fn redirects_stay_with_the_host() {
        let (port, served) =
            server(vec![answer("302 x", "Location: /next\r\n"), answer("200 OK", "")]).await;
        assert_eq!(check_http(&get(port, "/"), port, None).await, Outcome::Success);
        assert!(served.await.unwrap()[1].starts_with("GET /next "));

        let (port, _served) =
            server(vec![answer("302 x", "Location: http://elsewhere.example/\r\n")]).await;
        let outcome = check_http(&get(port, "/"), port, None).await;
        assert!(matches!(outcome, Outcome::Warning(_)), "{outcome:?}");
    }

    #[tokio::test]
    async fn nobody_there_is_a_failure() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let outcome = check_http(&get(port, "/"), port, None).await;
        assert!(matches!(outcome, Outcome::Failure(_)), "{outcome:?}");
    }
}
