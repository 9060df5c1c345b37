//! Whether the node works, told to whom it concerns: `/healthz` on a port, the watchdog of systemd,
//! and `longshore status` over a socket.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::{get, post};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

mod check;
mod explain;
pub mod notify;
mod recent;
mod status;

pub use check::Watched;
pub use explain::{PATH as EXPLAIN_PATH, PodQuestion};
pub use recent::RecentEvents;
pub use status::{
    EventLine, NodeLine, PodLine, ProxyLine, ServiceLine, Status, UsageLine, age, dash, render,
    table,
};

/// Name of the status socket in the run directory.
pub const STATUS_SOCKET: &str = "status.sock";

async fn until(mut shutdown: watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Serves kubelet's `/healthz` until `shutdown`.
pub async fn serve_healthz(
    listener: TcpListener,
    watched: Arc<Watched>,
    shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let routes = Router::new()
        .route("/healthz", get(healthz))
        .route("/healthz/syncloop", get(healthz))
        .route("/healthz/ping", get(|| async { "ok" }))
        .with_state(watched);
    Ok(axum::serve(listener, routes).with_graceful_shutdown(until(shutdown)).await?)
}

async fn healthz(State(watched): State<Arc<Watched>>) -> (StatusCode, String) {
    match watched.check().await {
        Ok(()) => (StatusCode::OK, "ok".into()),
        Err(failures) => (StatusCode::INTERNAL_SERVER_ERROR, failures.join("\n") + "\n"),
    }
}

/// Makes a socket in the run directory, for root only.
pub fn bind_socket(run_dir: &Path, name: &str) -> anyhow::Result<UnixListener> {
    let path = run_dir.join(name);
    // What an earlier run left; the lock says that it is gone.
    let _ = fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Services that `longshore top` is told of at most, unless it asks for fewer.
const MOST_SERVICES: usize = 5000;

/// What `longshore top` asks.
#[derive(Debug, serde::Deserialize)]
struct TopQuery {
    /// So many Services at most.
    services: Option<usize>,
}

/// Answers `longshore status`, `longshore top` and `longshore explain pod` until `shutdown`.
pub async fn serve_status(
    listener: UnixListener,
    watched: Arc<Watched>,
    shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let tell =
        |State(watched): State<Arc<Watched>>| async move { Json(status::of(&watched).await) };
    let top = |State(watched): State<Arc<Watched>>, Query(query): Query<TopQuery>| async move {
        let most = query.services.unwrap_or(MOST_SERVICES).min(MOST_SERVICES);
        Json(status::with_usage(&watched, most).await)
    };
    let routes = Router::new()
        .route("/status", get(tell))
        .route("/top", get(top))
        .route(explain::PATH, post(explain::answer))
        .with_state(watched);
    Ok(axum::serve(listener, routes).with_graceful_shutdown(until(shutdown)).await?)
}
