//! Paths to handlers, and the guard before them.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};

use super::guard::{Guard, Refusal};
use super::listen::Peer;
use super::{
    Failure, Shared, checkpoint, health, logs, metrics, node_logs, pods, profiles, stats, stream,
    zpages,
};
use crate::traces::{self, FutureExt};

/// Everything, behind the guard.
pub(super) fn guarded(shared: Arc<Shared>, guard: Arc<Guard>) -> Router {
    let config = &shared.config;
    let mut routes = open();
    if config.debugging_handlers {
        routes = routes
            .route("/containerLogs/{namespace}/{pod}/{container}", get(logs::container_logs))
            .route("/exec/{namespace}/{pod}/{container}", any(stream::exec))
            .route("/exec/{namespace}/{pod}/{uid}/{container}", any(stream::exec_uid))
            .route("/attach/{namespace}/{pod}/{container}", any(stream::attach))
            .route("/attach/{namespace}/{pod}/{uid}/{container}", any(stream::attach_uid))
            .route("/portForward/{namespace}/{pod}", any(stream::port_forward))
            .route("/portForward/{namespace}/{pod}/{uid}", any(stream::port_forward_uid))
            .route("/run/{namespace}/{pod}/{container}", post(stream::run))
            .route("/run/{namespace}/{pod}/{uid}/{container}", post(stream::run_uid))
            .route("/runningpods", get(pods::running))
            .route("/runningpods/", get(pods::running))
            .route("/configz", get(pods::configz))
            .route("/checkpoint/{namespace}/{pod}/{container}", post(checkpoint::checkpoint))
            .route("/logs", get(node_logs::root))
            .route("/logs/", get(node_logs::root))
            .route("/logs/{*path}", get(node_logs::logs))
            .route("/statusz", get(zpages::statusz))
            .route("/flagz", get(zpages::flagz))
            .route("/debug/flags/v", any(zpages::flags))
            .route("/debug/pprof", any(profiles::moved))
            .route("/debug/pprof/", any(profiles::index))
            .route("/debug/pprof/{name}", any(profiles::profile));
    } else {
        let disabled = || async {
            Failure(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.\n".into())
        };
        for path in [
            "/run/{*rest}",
            "/exec/{*rest}",
            "/attach/{*rest}",
            "/portForward/{*rest}",
            "/containerLogs/{*rest}",
            "/runningpods/",
            "/logs/",
            "/logs/{*rest}",
            "/debug/pprof/",
            "/debug/pprof/{*rest}",
        ] {
            routes = routes.route(path, any(disabled));
        }
    }
    finish(routes, shared)
        .layer(middleware::from_fn_with_state(guard, judge))
        .layer(middleware::from_fn(traced))
        .layer(middleware::from_fn(metrics::count))
}

/// What a read-only port shows to anybody.
pub(super) fn read_only(shared: Arc<Shared>) -> Router {
    finish(open(), shared)
        .layer(middleware::from_fn(only_get))
        .layer(middleware::from_fn(metrics::count_read_only))
}

/// What both ports serve.
fn open() -> Router<Arc<Shared>> {
    Router::new()
        .route("/healthz", get(health::all))
        .route("/healthz/{check}", get(health::one))
        .route("/pods", get(pods::pods))
        .route("/pods/", get(pods::pods))
        .route("/stats/summary", get(stats::summary))
        .route("/metrics/resource", get(stats::resource))
        .route("/metrics/cadvisor", get(stats::cadvisor))
        .route("/metrics", get(metrics::all))
        .route("/metrics/probes", get(metrics::probes))
        .route("/metrics/slis", get(metrics::slis))
}

fn finish(routes: Router<Arc<Shared>>, shared: Arc<Shared>) -> Router {
    routes.fallback(|| async { Failure::not_found("404 page not found\n") }).with_state(shared)
}

async fn only_get(request: Request, next: Next) -> Response {
    if let Some(peer) = request.extensions().get::<Peer>() {
        peer.visitor.known();
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    next.run(request).await
}

/// A span of its own for each request, where traces are taken.
async fn traced(request: Request, next: Next) -> Response {
    let route = || {
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        let method = request.method().as_str();
        let attributes = vec![
            traces::attribute("http.request.method", method.to_owned()),
            traces::attribute("http.route", route.unwrap_or_default().to_owned()),
            traces::attribute("url.path", request.uri().path().to_owned()),
        ];
        (route.map_or(method.to_owned(), |route| format!("{method} {route}")).into(), attributes)
    };
    let Some(span) = traces::request(request.headers(), route) else {
        return next.run(request).await;
    };
    let response = next.run(request).with_context(span.clone()).await;
    let status = response.status();
    let error = status.is_server_error().then(|| status.to_string());
    let code = traces::attribute("http.response.status_code", i64::from(status.as_u16()));
    traces::ended(&span, vec![code], error);
    response
}

/// Lets nobody by who is not known or may not.
async fn judge(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let Some(peer) = request.extensions().get::<Peer>().cloned() else {
        return refuse(Refusal {
            status: StatusCode::UNAUTHORIZED,
            message: "Unauthorized".into(),
        });
    };
    let who = match guard.authenticate(&peer.certificates, request.headers()).await {
        Ok(who) => who,
        Err(refusal) => return refuse(refusal),
    };
    let path = decoded(request.uri().path());
    if let Err(refusal) = guard.authorize(&who, request.method().as_str(), &path).await {
        return refuse(refusal);
    }
    peer.visitor.known();
    tracing::trace!(user = who.user, address = %peer.address, path, "node API");
    next.run(request).await
}

fn refuse(refusal: Refusal) -> Response {
    let mut response = Response::new(Body::from(refusal.message));
    *response.status_mut() = refusal.status;
    response
}

/// `path` with its percent signs resolved, as upstream judges it. Routes match the path as it came,
/// so what is only the same when decoded is judged and then not found.
fn decoded(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = |byte: Option<&u8>| byte.and_then(|b| char::from(*b).to_digit(16));
        if *first == b'%'
            && let (Some(high), Some(low)) = (hex(tail.first()), hex(tail.get(1)))
        {
            bytes.push((high * 16 + low) as u8);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
