//! Sockets, TLS and HTTP in front of the API. A listener can be stopped and started again at the
//! same address, and its connections broken, while the state stays.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{DATE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use super::api::{Api, Reply};
use super::auth::{self, User};
use super::error::ApiError;
use super::faults::Fault;
use super::request::RequestInfo;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Makes the listening socket anew at every start; it may do so in another network namespace.
pub type Bind = Box<dyn Fn() -> io::Result<TcpListener> + Send + Sync>;

/// One address that the control plane is reached at.
pub struct Endpoint {
    api: Arc<Api>,
    tls: TlsAcceptor,
    bind: Bind,
    address: SocketAddr,
    running: Mutex<Option<Running>>,
}

struct Running {
    accept: tokio::task::JoinHandle<()>,
    breaker: watch::Sender<u64>,
}

impl Endpoint {
    /// Binds and starts to serve.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub fn start(api: Arc<Api>, tls: Arc<rustls::ServerConfig>, bind: Bind) -> Result<Self> {
        let listener = bind().context("bind the control plane's socket")?;
        let address = listener.local_addr()?;
        let endpoint =
            Self { api, tls: TlsAcceptor::from(tls), bind, address, running: Mutex::new(None) };
        endpoint.serve(listener)?;
        Ok(endpoint)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn serve(&self, listener: TcpListener) -> Result<()> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (breaker, broken) = watch::channel(0);
        let (api, tls) = (self.api.clone(), self.tls.clone());
        let accept = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let (api, tls, mut broken) = (api.clone(), tls.clone(), broken.clone());
                broken.mark_unchanged();
                tokio::spawn(async move {
                    tokio::select! {
                        () = connection(api, tls, stream) => {}
                        _ = broken.changed() => {}
                    }
                });
            }
        });
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Running { accept, breaker });
        Ok(())
    }

    /// Breaks every connection; new ones are accepted.
    pub fn drop_connections(&self) {
        if let Some(running) = &*self.running.lock().unwrap_or_else(PoisonError::into_inner) {
            running.breaker.send_modify(|n| *n += 1);
        }
    }

    /// Stops to listen and breaks every connection; clients are refused from now on.
    pub async fn stop(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = running {
            running.accept.abort();
            let _ = running.accept.await;
            running.breaker.send_modify(|n| *n += 1);
        }
    }

    /// Listens again, at the same address.
    ///
    /// # Errors
    /// When the socket cannot be bound again.
    pub fn resume(&self) -> Result<()> {
        self.serve((self.bind)()?)
    }
}

async fn connection(api: Arc<Api>, tls: TlsAcceptor, stream: tokio::net::TcpStream) {
    let _ = stream.set_nodelay(true);
    let Ok(stream) = tls.accept(stream).await else { return };
    let certificate: Option<Arc<User>> = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| auth::user_of_certificate(chain.first()?))
        .map(Arc::new);
    let service = service_fn(move |request| {
        let (api, certificate) = (api.clone(), certificate.clone());
        async move { respond(&api, certificate.as_deref(), request).await }
    });
    // Errors here are clients that went away.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// A broken connection on purpose.
#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("connection broken on demand of the test")
    }
}

impl std::error::Error for Broken {}

async fn respond(
    api: &Api,
    certificate: Option<&User>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Broken> {
    let (head, body) = request.into_parts();
    let info = RequestInfo::parse(
        head.method.as_str(),
        head.uri.path(),
        head.uri.query().unwrap_or_default(),
    );
    let header = |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok());
    let user = match api.authenticate(header("authorization"), certificate) {
        Ok(user) => user,
        Err(error) => {
            api.record(&User::default(), &info, error.code);
            return Ok(object(error.code, &error.to_status()));
        }
    };
    let admin = user.in_group("system:masters");
    let mut clock = None;
    match if admin { None } else { api.faults.hit(&info) } {
        None => {}
        Some(Fault::Clock(seconds)) => clock = Some(seconds),
        Some(Fault::Slow(delay)) => tokio::time::sleep(delay).await,
        Some(fault) => {
            api.record(&user, &info, 0);
            return misbehave(fault).await;
        }
    }
    let content_type = header("content-type").unwrap_or("application/json");
    let content_type = content_type.split(';').next().unwrap_or_default().trim().to_owned();
    let accept = header("accept").unwrap_or("*/*").to_owned();
    if !["application/json", "*/*", "application/*"].iter().any(|a| accept.contains(a)) {
        let error = ApiError::not_acceptable();
        return Ok(object(error.code, &error.to_status()));
    }
    let partial = accept.split(',').next().is_some_and(|a| a.contains("as=PartialObjectMetadata"));
    let Ok(body) = body.collect().await else { return Err(Broken) };
    let reply = api.answer_or_error(&user, &info, &content_type, &body.to_bytes());
    let mut answer = match reply {
        Reply::Object(code, value) => {
            api.record(&user, &info, code);
            object(code, &if partial { metadata_only(value) } else { value })
        }
        Reply::Text(text) => response(200, "text/plain", full(text.as_bytes())),
        Reply::Events(events) => {
            api.record(&user, &info, 200);
            let lines = events.map(move |mut event| {
                if partial && event["type"] != "ERROR" {
                    event["object"] = metadata_only(event["object"].take());
                }
                Ok(Frame::data(Bytes::from(format!("{event}\n"))))
            });
            response(200, "application/json", StreamBody::new(lines).boxed_unsync())
        }
    };
    if let Some(seconds) = clock {
        let now = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        let text = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let date = HeaderValue::from_str(&text).expect("a date is printable");
        answer.headers_mut().insert(DATE, date);
    }
    Ok(answer)
}

async fn misbehave(fault: Fault) -> Result<Response<Body>, Broken> {
    Ok(match fault {
        Fault::Code(code) => {
            let reason = match code {
                401 => "Unauthorized",
                403 => "Forbidden",
                429 => "TooManyRequests",
                503 => "ServiceUnavailable",
                _ => "InternalError",
            };
            let error = ApiError {
                code,
                reason,
                message: format!("injected: the test asked for {code}"),
                details: Value::Null,
            };
            object(code, &error.to_status())
        }
        Fault::Garbage => response(200, "application/json", full(b"\x00\xff<html>not json")),
        Fault::Truncated => {
            response(200, "application/json", full(b"{\"kind\":\"PodList\",\"items\":[{"))
        }
        Fault::Silent => std::future::pending().await,
        Fault::Slow(_) | Fault::Clock(_) | Fault::Reset => return Err(Broken),
    })
}

fn metadata_only(value: Value) -> Value {
    let strip = |v: &Value| {
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": v["metadata"]})
    };
    if value["kind"] == "Status" {
        return value;
    }
    match value["items"].as_array() {
        Some(items) => json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "metadata": value["metadata"], "items": items.iter().map(strip).collect::<Vec<_>>()}),
        None => strip(&value),
    }
}

fn full(bytes: &[u8]) -> Body {
    Full::new(Bytes::copy_from_slice(bytes))
        .map_err(|never: Infallible| match never {})
        .boxed_unsync()
}

fn object(code: u16, value: &Value) -> Response<Body> {
    response(code, "application/json", full(value.to_string().as_bytes()))
}

fn response(code: u16, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() =
        hyper::StatusCode::from_u16(code).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    response
        .headers_mut()
        .insert("content-type", hyper::header::HeaderValue::from_static(content_type));
    response
}
