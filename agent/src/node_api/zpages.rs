//! `/statusz`, `/flagz`, `/debug/flags/v` and `/debug/pprof/`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{Failure, Shared};

fn plain(body: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
}

const WARNING: &str = "Warning: This endpoint is not meant to be machine parseable, has no \
                       formatting compatibility guarantees and is for debugging purposes only.\n";

/// `/statusz`.
pub(super) async fn statusz(State(shared): State<Arc<Shared>>) -> Response {
    let started = shared.watched.started;
    let up = jiff::Timestamp::now().as_second() - started.as_second();
    let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
    plain(format!(
        "\nkubelet statusz\n{WARNING}\nStarted: {}\nUp: {hours} hr {minutes:02} min {seconds:02} sec\n\
         Go version: none (longshore {})\nBinary version: 1.36.0\nEmulation version: 1.36\nPaths: \
         /configz /healthz /metrics\n",
        started.strftime("%a %b %e %H:%M:%S UTC %Y"),
        env!("CARGO_PKG_VERSION"),
    ))
}

/// `/flagz`: the flags that this process was started with. None of them takes a secret.
pub(super) async fn flagz() -> Response {
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
    plain(format!("\nkubelet flagz\n{WARNING}\n{lines}"))
}

/// `/debug/pprof/`: profiles of a Go program, which this is not.
pub(super) async fn pprof(State(shared): State<Arc<Shared>>) -> Failure {
    if !shared.config.profiling_handler {
        return disabled("profiling endpoint is disabled.\n");
    }
    Failure(
        StatusCode::NOT_IMPLEMENTED,
        "unimplemented: profiles are not taken over the node API; use perf record -p <pid>\n"
            .into(),
    )
}

/// `/debug/flags/v`: sets the verbosity of a Go program's log.
pub(super) async fn flags(State(shared): State<Arc<Shared>>) -> Failure {
    if !shared.config.debug_flags_handler {
        return disabled("flags endpoint is disabled.\n");
    }
    Failure(
        StatusCode::NOT_IMPLEMENTED,
        "unimplemented: the log's verbosity is set when the node starts (-v, --log-level)\n".into(),
    )
}

pub(super) fn disabled(message: &str) -> Failure {
    Failure(StatusCode::METHOD_NOT_ALLOWED, message.to_owned())
}
