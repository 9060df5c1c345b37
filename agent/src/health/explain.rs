//! Answers `longshore explain pod`: passes the question to the pod's worker.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::Watched;
use crate::ids::{NamespacedName, PodUid};
use crate::pod::{ExplainError, PodQuery};

/// Where it is asked.
pub const PATH: &str = "/explain/pod";
/// A worker that looks at the runtime has so long to come back.
const LIMIT: Duration = Duration::from_secs(10);

/// Which pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodQuestion {
    /// Its namespace.
    pub namespace: String,
    /// Its name; or its UID, where there is no pod of that name.
    pub name: String,
    /// It was given without a namespace, so it may be a UID.
    pub maybe_uid: bool,
}

pub(super) async fn answer(State(watched): State<Arc<Watched>>, body: Bytes) -> Response {
    let failed = |code: StatusCode, text: String| (code, text).into_response();
    let question: PodQuestion = match serde_json::from_slice(&body) {
        Ok(question) => question,
        Err(error) => return failed(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let Some(sync) = &watched.sync else {
        let text = "this process runs no pods (`--only`): ask the one that runs the agent";
        return failed(StatusCode::SERVICE_UNAVAILABLE, text.to_owned());
    };
    let named =
        |name: &str| PodQuery { key: NamespacedName::new(&question.namespace, name), uid: None };
    let mut found = sync.explain(named(&question.name), LIMIT).await;
    // The first error is kept: it names what was asked for.
    let others = [
        // Static pods go by the name in their manifest and the node's.
        Some(named(&format!("{}-{}", question.name, watched.node_name))),
        question.maybe_uid.then(|| PodQuery {
            uid: Some(PodUid::from(&*question.name)),
            ..named(&question.name)
        }),
    ];
    for query in others.into_iter().flatten() {
        if !found.as_ref().is_err_and(absent) {
            break;
        }
        let other = sync.explain(query, LIMIT).await;
        if !other.as_ref().is_err_and(absent) {
            found = other;
        }
    }
    match found {
        Ok(explanation) => axum::Json(explanation).into_response(),
        Err(error @ ExplainError::Silent { .. }) => {
            failed(StatusCode::GATEWAY_TIMEOUT, error.to_string())
        }
        Err(error) => {
            let mut text = error.to_string();
            // What could not be read may have been meant to be this pod.
            let problems = watched.manifests.as_ref().map(|m| m.borrow().clone());
            for problem in problems.into_iter().flatten() {
                text.push_str(&format!("\nmanifest {problem}"));
            }
            failed(StatusCode::NOT_FOUND, text)
        }
    }
}

fn absent(error: &ExplainError) -> bool {
    !matches!(error, ExplainError::Silent { .. })
}
