//! `/statusz`, `/flagz` and `/debug/flags/v`, of the node API and of the proxy's metrics port.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{Failure, Shared};

/// Longest verbosity, in bytes.
const VERBOSITY: usize = 64;

pub(super) fn plain(body: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
}

const WARNING: &str = "Warning: This endpoint is not meant to be machine parseable, has no \
                       formatting compatibility guarantees and is for debugging purposes only.\n";

/// `/statusz`.
pub(super) async fn statusz(State(shared): State<Arc<Shared>>) -> Response {
    status_of("kubelet", shared.watched.started, "/configz /healthz /metrics")
}

/// The page of `component`.
pub(super) fn status_of(component: &str, started: jiff::Timestamp, paths: &str) -> Response {
    let up = jiff::Timestamp::now().as_second() - started.as_second();
    let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
    plain(format!(
        "\n{component} statusz\n{WARNING}\nStarted: {}\nUp: {hours} hr {minutes:02} min {seconds:02} sec\n\
         Go version: none (longshore {})\nBinary version: 1.36.0\nEmulation version: 1.36\nPaths: \
         {paths}\n",
        started.strftime("%a %b %e %H:%M:%S UTC %Y"),
        env!("CARGO_PKG_VERSION"),
    ))
}

/// `/flagz`: the flags that this process was started with. None of them takes a secret.
pub(super) async fn flagz() -> Response {
    flags_of("kubelet")
}

/// The page of `component`.
pub(super) fn flags_of(component: &str) -> Response {
    let mut lines = String::new();
    let mut arguments = std::env::args().skip(2).peekable();
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.strip_prefix("--") else { continue };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => {
                let value = arguments.next_if(|next| !next.starts_with("--"));
                (flag.to_owned(), value.unwrap_or_else(|| "true".to_owned()))
            }
        };
        lines.push_str(&format!("{name}={value}\n"));
    }
    plain(format!("\n{component} flagz\n{WARNING}\n{lines}"))
}

/// `/debug/flags/v`: sets the log's verbosity while the node runs.
pub(super) async fn flags(
    State(shared): State<Arc<Shared>>,
    method: Method,
    body: Body,
) -> Result<Response, Failure> {
    if !shared.config.debug_flags_handler {
        return Err(disabled("flags endpoint is disabled.\n"));
    }
    set_verbosity(method, body).await
}

/// What is asked of `/debug/flags/v`.
pub(super) async fn set_verbosity(method: Method, body: Body) -> Result<Response, Failure> {
    if method != Method::PUT {
        return Err(Failure(StatusCode::NOT_ACCEPTABLE, "unsupported http method\n".into()));
    }
    let wrong =
        |error: String| Failure::bad_request(format!("error reading request body: {error}\n"));
    let body = to_bytes(body, VERBOSITY).await.map_err(|error| wrong(error.to_string()))?;
    let text = std::str::from_utf8(&body).map_err(|error| wrong(error.to_string()))?;
    match crate::logging::set_verbosity(text) {
        Ok(_) => Ok(plain(format!("successfully set klog.logging.verbosity to {text}\n"))),
        Err(error) => Err(Failure::bad_request(format!("{error}\n"))),
    }
}

pub(super) fn disabled(message: &str) -> Failure {
    Failure(StatusCode::METHOD_NOT_ALLOWED, message.to_owned())
}
