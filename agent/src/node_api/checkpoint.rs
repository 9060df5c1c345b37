//! `/checkpoint/{namespace}/{pod}/{container}`: has the runtime write a container's state to a file
//! (KEP-2008).

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::logs::options::query;
use super::{Failure, Shared};
use crate::pod::spec::{find_container, spec_of};

pub(super) async fn checkpoint(
    State(shared): State<Arc<Shared>>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    RawQuery(asked): RawQuery,
) -> Result<Response, Failure> {
    let view = shared.sync.table().named(&namespace, &pod);
    let view = view.ok_or_else(|| Failure::not_found("pod does not exist"))?;
    if find_container(spec_of(&view.pod), &container).is_none() {
        return Err(Failure::not_found(format!("container {container} does not exist")));
    }
    let asked = query(asked.as_deref().unwrap_or_default());
    let timeout = asked.iter().rev().find(|(name, _)| name == "timeout");
    let timeout = timeout.map(|(_, value)| value.parse::<i64>()).transpose();
    let timeout =
        timeout.map_err(|_| Failure::not_found("cannot parse value of timeout parameter"))?;
    let failed = |cause: String| {
        Failure::internal(format!(
            "checkpointing of {namespace}/{pod}/{container} failed ({cause})"
        ))
    };
    let id = view.containers.get(&container);
    let id = id.ok_or_else(|| failed(format!("container {container} has no instance")))?;
    let dir = shared.node.root_dir.join("checkpoints");
    let make = || {
        std::fs::create_dir_all(&dir)?;
        // What a container holds in memory is nobody else's.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))
    };
    make().map_err(|error| failed(format!("create {}: {error}", dir.display())))?;
    let stamp = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
    let file = dir.join(format!("checkpoint-{pod}_{namespace}-{container}-{stamp}.tar"));
    let location = file.display().to_string();
    shared
        .runtime
        .checkpoint_container(id, &location, timeout.unwrap_or(0))
        .await
        .map_err(|error| failed(error.to_string()))?;
    let body = serde_json::json!({"items": [location]}).to_string();
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}
