//! Statistics: `/stats/summary`, `/metrics/resource`, `/metrics/cadvisor`.
//!
//! CPU and memory come from the cgroups, whatever the runtime; what only a runtime knows comes from
//! its CRI statistics. Nothing is gathered between requests.

mod cadvisor;
pub(super) mod gather;
pub(super) mod live;
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

/// What is shown of one pod with one container that has everything: `/metrics/cadvisor` and
/// `/metrics/resource`.
#[cfg(test)]
pub(super) fn example(machine: &crate::node::machine::Machine) -> [String; 2] {
    use self::gather::{ContainerStats, Interface, NodeStats, PodStats, Sample, Snapshot};
    use crate::pod::cgroup::usage::{DeviceIo, Usage};
    let usage = Usage {
        quota: Some(1),
        memory_limit: Some(1),
        swap_limit: Some(1),
        io: vec![DeviceIo::default()],
        ..Default::default()
    };
    let sample = Sample { usage, nano_cores: Some(1), ..Default::default() };
    let cgroup = Some(("c".to_owned(), sample.clone()));
    let started = Some(jiff::Timestamp::UNIX_EPOCH);
    let network = vec![Interface::default()];
    let container = ContainerStats {
        cgroup: cgroup.clone(),
        started,
        layer: Some((1, 1)),
        ..Default::default()
    };
    let pod = PodStats {
        cgroup,
        started,
        network: network.clone(),
        containers: vec![container],
        ..Default::default()
    };
    let node = NodeStats { sample, network, ..Default::default() };
    let snapshot = Snapshot { node, pods: vec![pod], error: false };
    [cadvisor::render(&snapshot, &[], machine), resource::render(&snapshot)]
}

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
