//! Statistics: `/stats/summary`, `/metrics/resource`, `/metrics/cadvisor`.
//!
//! CPU and memory come from the cgroups, whatever the runtime; what only a runtime knows comes from
//! its CRI statistics. Nothing is gathered between requests.

mod cadvisor;
mod cgroup;
pub(super) mod gather;
mod resource;
mod summary;
pub(super) mod text;

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};

use self::gather::Depth;
use super::Shared;
use super::logs::options::query;

fn metrics(text: String) -> Response {
    ([(header::CONTENT_TYPE, text::CONTENT_TYPE)], text).into_response()
}

/// `/stats/summary`; `?only_cpu_and_memory=true` leaves out the rest.
pub(super) async fn summary(
    State(shared): State<Arc<Shared>>,
    RawQuery(asked): RawQuery,
) -> Json<serde_json::Value> {
    let asked = query(asked.as_deref().unwrap_or_default());
    let little = asked.iter().any(|(name, value)| name == "only_cpu_and_memory" && value == "true");
    let depth = if little { Depth::Usage } else { Depth::All };
    let snapshot = shared.gatherer.gather(depth).await;
    Json(summary::render(&shared.node.node_name, &snapshot, depth))
}

/// `/metrics/resource`.
pub(super) async fn resource(State(shared): State<Arc<Shared>>) -> Response {
    metrics(resource::render(&shared.gatherer.gather(Depth::Usage).await))
}

/// `/metrics/cadvisor`.
pub(super) async fn cadvisor(State(shared): State<Arc<Shared>>) -> Response {
    let snapshot = shared.gatherer.gather(Depth::All).await;
    let gatherer = shared.gatherer.clone();
    let classes = tokio::task::spawn_blocking(move || gatherer.classes()).await.unwrap_or_default();
    metrics(cadvisor::render(&snapshot, &classes, &shared.gatherer.machine))
}
