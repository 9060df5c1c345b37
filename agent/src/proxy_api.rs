//! The proxy's socket in the run directory: what `longshore explain service` and `longshore proxy
//! ruleset` ask. For root only; nothing is changed through it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use proxy::explain;
use proxy::object::{Change, NamespacedName};
use proxy::question::{Asker, Rules};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::source::proxy_object::{service_change, slice_change};
use crate::standalone::decode::{Object, decode};
use crate::standalone::yaml;

/// Name of the socket in the run directory.
pub const PROXY_SOCKET: &str = "proxy.sock";
/// Manifests for a dry run may be so large.
const BODY_LIMIT: usize = 64 << 20;

struct Api {
    asker: Asker,
    node_name: String,
}

/// The question of `explain service`.
#[derive(Debug, Deserialize, Serialize)]
pub struct ExplainQuery {
    /// Namespace of the Service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The client.
    pub from: Option<std::net::IpAddr>,
    /// Where it connects to.
    pub to: Option<std::net::SocketAddr>,
    /// JSON instead of text.
    #[serde(default)]
    pub json: bool,
}

/// The question of `proxy ruleset`.
#[derive(Debug, Deserialize, Serialize)]
pub struct RulesetQuery {
    /// Only what differs from the kernel.
    #[serde(default)]
    pub diff: bool,
}

/// Path of the socket.
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join(PROXY_SOCKET)
}

/// Answers until `shutdown`.
pub async fn serve(
    listener: UnixListener,
    asker: Asker,
    node_name: String,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let routes = Router::new()
        .route("/explain", post(explain))
        .route("/ruleset", get(ruleset))
        .route("/dry-run", post(dry_run))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(Arc::new(Api { asker, node_name }));
    let end = async move {
        let _ = shutdown.wait_for(|stop| *stop).await;
    };
    Ok(axum::serve(listener, routes).with_graceful_shutdown(end).await?)
}

fn failed(code: StatusCode, message: impl Into<String>) -> Response {
    (code, message.into()).into_response()
}

async fn explain(State(api): State<Arc<Api>>, body: Bytes) -> Response {
    let query: ExplainQuery = match serde_json::from_slice(&body) {
        Ok(query) => query,
        Err(error) => return failed(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let service = NamespacedName {
        namespace: query.namespace.as_str().into(),
        name: query.name.as_str().into(),
    };
    let question = explain::Question { from: query.from, to: query.to };
    match api.asker.explain(service.clone(), question).await {
        Ok(Some(explanation)) if query.json => axum::Json(explanation).into_response(),
        Ok(Some(explanation)) => explain::render(&explanation).into_response(),
        Ok(None) => failed(
            StatusCode::NOT_FOUND,
            format!(
                "the proxy serves no Service {service}: there is none of that name, or it has no \
                 cluster IP (headless, ExternalName), or the label {} gives it to another proxy",
                crate::source::proxy_object::SERVICE_PROXY_NAME
            ),
        ),
        Err(error) => failed(StatusCode::SERVICE_UNAVAILABLE, error),
    }
}

async fn rules(api: &Api, rules: Rules) -> Response {
    match api.asker.rules(rules).await {
        Ok(text) => text.into_response(),
        Err(error) => failed(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

async fn ruleset(State(api): State<Arc<Api>>, Query(query): Query<RulesetQuery>) -> Response {
    rules(&api, if query.diff { Rules::Difference } else { Rules::Desired }).await
}

async fn dry_run(State(api): State<Arc<Api>>, body: Bytes) -> Response {
    match changes(&body, &api.node_name) {
        Ok(changes) => rules(&api, Rules::Changes(changes)).await,
        Err(error) => failed(StatusCode::BAD_REQUEST, error),
    }
}

/// Services and slices of manifests as changes; other kinds do not concern the proxy.
fn changes(text: &[u8], node_name: &str) -> Result<Vec<Change>, String> {
    let mut changes = Vec::new();
    for document in yaml::documents(text) {
        let at = |error: String| format!("document {}: {error}", document.number);
        let value = document.value.map_err(|error| at(error.to_string()))?;
        for object in decode(value) {
            match object.map_err(|error| at(error.to_string()))? {
                Object::Service(service) => changes.push(service_change(&service)),
                Object::EndpointSlice(slice) => changes.push(slice_change(&slice, node_name)),
                _ => {}
            }
        }
    }
    if changes.is_empty() {
        return Err("there is neither a Service nor an EndpointSlice in it".to_owned());
    }
    Ok(changes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn manifests_become_changes_and_mistakes_are_told_with_their_place() {
        let text = b"apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}\n---\n\
            apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n";
        let changes = changes(text, "node").unwrap();
        assert!(matches!(&changes[..], [Change::Service(s)] if &*s.key.name == "a"), "{changes:?}");
        let error = super::changes(b"apiVersion: v1\nkind: Nonsense\n", "node").unwrap_err();
        assert!(error.starts_with("document 1: "), "{error}");
        assert!(super::changes(b"", "node").unwrap_err().contains("neither"));
    }
}
