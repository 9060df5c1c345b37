//! The HTTP connections under a `kube::Client`: HTTP/2 where the server speaks it, so that a
//! hundred watches share one connection, with pings that notice a dead one.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::header::{AUTHORIZATION, HeaderValue, USER_AGENT};
use hyper::http::uri::{Authority, PathAndQuery, Scheme, Uri};
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::Body;
use rustls::pki_types::ServerName;

use super::connect::Connector;
use super::kubeconfig::{Endpoint, Identity};
use super::tls::{self, TlsError};
use crate::metrics::{ClientLabels, METRICS};
use crate::traces;

/// A silent HTTP/2 connection is asked whether it lives after this time (client-go: 30 s) ...
const PING_AFTER: Duration = Duration::from_secs(30);
/// ... and given up when it does not answer within this one (client-go: 15 s).
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// An idle pooled connection is closed after this time.
const IDLE: Duration = Duration::from_secs(90);

type Http = Client<Connector, Body>;

/// Connections to one API server, replaceable as a whole when credentials change.
pub struct Transport {
    current: RwLock<Arc<Current>>,
}

struct Current {
    http: Http,
    scheme: Scheme,
    authority: Authority,
    prefix: String,
    token: Option<HeaderValue>,
}

impl Transport {
    /// Prepares connections to `endpoint`; none is opened.
    pub fn new(endpoint: &Endpoint) -> Result<Self, TlsError> {
        Ok(Self { current: RwLock::new(Arc::new(Current::new(endpoint)?)) })
    }

    /// Takes new credentials; requests under way end on the old connections.
    pub fn replace(&self, endpoint: &Endpoint) -> Result<(), TlsError> {
        let new = Arc::new(Current::new(endpoint)?);
        let mut current = self.current.write().unwrap_or_else(|e| e.into_inner());
        *current = new;
        Ok(())
    }

    /// A tower service for `kube::Client`.
    pub fn service(self: &Arc<Self>) -> Requests {
        Requests(self.clone())
    }
}

impl Current {
    fn new(endpoint: &Endpoint) -> Result<Self, TlsError> {
        let wrong = |cause: String| TlsError::Server { server: endpoint.server.clone(), cause };
        let uri: Uri = endpoint.server.parse().map_err(|e| wrong(format!("{e}")))?;
        let parts = uri.into_parts();
        let scheme = parts.scheme.ok_or_else(|| wrong("it has no https://".to_owned()))?;
        let authority = parts.authority.ok_or_else(|| wrong("it has no host".to_owned()))?;
        let prefix = parts.path_and_query.map(|p| p.path().trim_end_matches('/').to_owned());
        let token = match &endpoint.identity {
            Identity::Token(token) => {
                let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                    .map_err(|_| wrong("the token has unprintable characters".to_owned()))?;
                value.set_sensitive(true);
                Some(value)
            }
            _ => None,
        };
        let name = match &endpoint.server_name {
            Some(name) => Some(
                ServerName::try_from(name.clone())
                    .map_err(|e| wrong(format!("tls-server-name: {e}")))?,
            ),
            None => None,
        };
        let connector = Connector::new(tls::client_config(endpoint)?, name, PING_AFTER);
        let http = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .http2_keep_alive_interval(PING_AFTER)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .http2_keep_alive_while_idle(true)
            .build(connector);
        Ok(Self { http, scheme, authority, prefix: prefix.unwrap_or_default(), token })
    }

    fn address(&self, request: &mut Request<Body>) -> Result<(), hyper::http::Error> {
        let path = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
        *request.uri_mut() = Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(format!("{}{path}", self.prefix))
            .build()?;
        if let Some(token) = &self.token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        request.headers_mut().insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("longshore/", env!("CARGO_PKG_VERSION"))),
        );
        Ok(())
    }
}

/// The service that a `kube::Client` calls.
#[derive(Clone)]
pub struct Requests(Arc<Transport>);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl tower::Service<Request<Body>> for Requests {
    type Response = Response<hyper::body::Incoming>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let current = self.0.current.read().unwrap_or_else(|e| e.into_inner()).clone();
        Box::pin(async move {
            current.address(&mut request)?;
            let (method, began) = (request.method().to_string(), std::time::Instant::now());
            let span = traces::span(traces::Kind::Client, || {
                let path = request.uri().path().to_owned();
                let attributes = vec![
                    traces::attribute("http.request.method", method.clone()),
                    traces::attribute("server.address", current.authority.to_string()),
                    traces::attribute("url.path", path),
                ];
                (format!("HTTP {method}").into(), attributes)
            });
            if let Some(span) = &span {
                traces::in_headers(span, request.headers_mut());
            }
            let answer = current.http.request(request).await;
            let code = match &answer {
                Ok(response) => response.status().as_str().to_owned(),
                Err(_) => "<error>".to_owned(),
            };
            if let Some(span) = &span {
                let status = traces::attribute("http.response.status_code", code.clone());
                traces::ended(span, vec![status], answer.as_ref().err().map(ToString::to_string));
            }
            let labels = ClientLabels { code, host: current.authority.to_string(), method };
            METRICS.client_request(&labels, began.elapsed());
            Ok(answer?)
        })
    }
}
