//! `/healthz` and its checks, worded as the API machinery words them.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{Failure, Shared};

/// The checks in their order.
pub(super) const CHECKS: [&str; 3] = ["ping", "log", "syncloop"];

async fn check(shared: &Shared, name: &str) -> Result<(), String> {
    match name {
        "syncloop" => {
            let stuck = shared.watched.stuck().await;
            if stuck.is_empty() { Ok(()) } else { Err(stuck.join("; ")) }
        }
        // That this is asked and answered is what they say.
        _ => Ok(()),
    }
}

fn text(status: StatusCode, body: String) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, body).into_response()
}

/// `/healthz`; `?verbose` lists the checks, `?exclude=NAME` leaves one out.
pub(super) async fn all(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let query = super::logs::options::query(query.as_deref().unwrap_or_default());
    let excluded: Vec<&str> =
        query.iter().filter(|(name, _)| name == "exclude").map(|(_, v)| v.as_str()).collect();
    let verbose = query.iter().any(|(name, _)| name == "verbose");
    let (mut lines, mut failed) = (String::new(), false);
    for name in CHECKS {
        let line = if excluded.contains(&name) {
            format!("[+]{name} excluded: ok")
        } else if let Err(why) = check(&shared, name).await {
            failed = true;
            tracing::warn!(check = name, why, "the node API is asked for health and has none");
            format!("[-]{name} failed: reason withheld")
        } else {
            format!("[+]{name} ok")
        };
        let _ = writeln!(lines, "{line}");
    }
    if failed {
        text(StatusCode::INTERNAL_SERVER_ERROR, format!("{lines}healthz check failed\n"))
    } else if verbose {
        text(StatusCode::OK, format!("{lines}healthz check passed\n"))
    } else {
        text(StatusCode::OK, "ok".into())
    }
}

/// `/healthz/NAME`.
pub(super) async fn one(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<Response, Failure> {
    if !CHECKS.contains(&name.as_str()) {
        return Err(Failure::not_found("404 page not found\n"));
    }
    match check(&shared, &name).await {
        Ok(()) => Ok(text(StatusCode::OK, "ok".into())),
        Err(why) => Err(Failure::internal(format!("internal server error: {why}\n"))),
    }
}
