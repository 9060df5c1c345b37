//! `/debug/pprof/`: where the node's CPU time goes, for `go tool pprof`, and what of Go's other
//! profiles has a counterpart in a program that is not written in Go.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Query, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::any;
use serde::Deserialize;

use super::zpages::{disabled, plain};
use super::{Failure, Shared};
use crate::profile::{self, ProfileError};

/// How long a CPU profile takes where the client does not say (Go's default), and at most.
const DEFAULT_SECONDS: u64 = 30;
const MOST_SECONDS: u64 = 3600;
/// Longest list of addresses to be named; pprof asks for all of a profile at once.
const MOST_ADDRESSES: usize = 1 << 20;

/// The profiles, and what each has.
const PROFILES: [(&str, &str); 10] = [
    ("allocs", "not taken: allocations are not sampled"),
    ("block", "not taken: waiting is not sampled"),
    ("cmdline", "the command line of this process"),
    ("goroutine", "tasks of the runtime and threads of the process, with debug=1 as text"),
    ("heap", "not taken: allocations are not sampled"),
    ("mutex", "not taken: waiting for locks is not sampled"),
    ("profile", "CPU profile; ?seconds= says how long"),
    ("symbol", "names of functions at addresses"),
    ("threadcreate", "threads of the process, with debug=1 as text"),
    ("trace", "not taken: there is no Go scheduler to trace"),
];

/// What a client may ask with.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Asked {
    seconds: Option<String>,
    debug: Option<String>,
}

fn open(shared: &Shared) -> Result<(), Failure> {
    match shared.config.profiling_handler {
        true => Ok(()),
        false => Err(disabled("profiling endpoint is disabled.\n")),
    }
}

/// `/debug/pprof`.
pub(super) async fn moved() -> Redirect {
    Redirect::permanent("/debug/pprof/")
}

/// `/debug/pprof/`: the list.
pub(super) async fn index(State(shared): State<Arc<Shared>>) -> Result<Html<String>, Failure> {
    open(&shared)?;
    Ok(list())
}

fn list() -> Html<String> {
    let mut page = String::from(
        "<html>\n<head>\n<title>/debug/pprof/</title>\n</head>\n<body>\n/debug/pprof/\n<table>\n",
    );
    for (name, what) in PROFILES {
        let query = if ["goroutine", "threadcreate"].contains(&name) { "?debug=1" } else { "" };
        let _ =
            writeln!(page, "<tr><td><a href='{name}{query}'>{name}</a></td><td>{what}</td></tr>");
    }
    page.push_str("</table>\n</body>\n</html>\n");
    Html(page)
}

/// `/debug/pprof/{name}`.
pub(super) async fn profile(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    Query(asked): Query<Asked>,
    method: Method,
    body: Body,
) -> Result<Response, Failure> {
    open(&shared)?;
    taken(&name, asked, method, body).await
}

/// The profiles for a port that shows nothing else to ask permission for.
pub(super) fn pages() -> Router {
    Router::new()
        .route("/debug/pprof", any(moved))
        .route("/debug/pprof/", any(async || list()))
        .route(
            "/debug/pprof/{name}",
            any(async |Path(name): Path<String>, Query(asked): Query<Asked>, method, body| {
                taken(&name, asked, method, body).await
            }),
        )
}

async fn taken(name: &str, asked: Asked, method: Method, body: Body) -> Result<Response, Failure> {
    match name {
        "profile" => cpu(seconds(asked.seconds.as_deref())?).await,
        "cmdline" => {
            let arguments: Vec<_> = std::env::args_os()
                .map(|argument| argument.to_string_lossy().into_owned())
                .collect();
            Ok(plain(arguments.join("\0")))
        }
        "symbol" => symbol(method, body).await,
        "goroutine" | "threadcreate" => {
            if asked.debug.is_none_or(|debug| debug == "0") {
                return Err(Failure(
                    StatusCode::NOT_IMPLEMENTED,
                    format!(
                        "unimplemented: {name} has no profile here; ask with ?debug=1 for text\n"
                    ),
                ));
            }
            let tasks = tokio::runtime::Handle::current().metrics();
            let mut text = String::new();
            if name == "goroutine" {
                let _ = writeln!(text, "goroutine profile: total {}", tasks.num_alive_tasks());
                let _ = writeln!(
                    text,
                    "tasks: {} alive, {} waiting for a worker; {} workers",
                    tasks.num_alive_tasks(),
                    tasks.global_queue_depth(),
                    tasks.num_workers()
                );
            }
            let threads = tokio::task::spawn_blocking(threads).await;
            text.push_str(&threads.unwrap_or_default());
            Ok(plain(text))
        }
        _ => match PROFILES.iter().find(|(known, _)| *known == name) {
            Some((_, what)) => Err(Failure(
                StatusCode::NOT_IMPLEMENTED,
                format!("unimplemented: {name} is {what}; CPU time is in /debug/pprof/profile\n"),
            )),
            None => Err(Failure::not_found("Unknown profile\n")),
        },
    }
}

fn seconds(asked: Option<&str>) -> Result<Duration, Failure> {
    // As Go: what is not a number is the default.
    let seconds = asked.and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0);
    match seconds.unwrap_or(DEFAULT_SECONDS) {
        seconds if seconds > MOST_SECONDS => {
            Err(Failure::bad_request(format!("seconds: {seconds} is more than {MOST_SECONDS}\n")))
        }
        seconds => Ok(Duration::from_secs(seconds)),
    }
}

/// Stops a profile that nobody waits for any more.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn cpu(duration: Duration) -> Result<Response, Failure> {
    let stop = Stop(Arc::default());
    let stopped = stop.0.clone();
    let taken = tokio::task::spawn_blocking(move || profile::cpu(duration, &stopped)).await;
    let taken = taken.map_err(|error| Failure::internal(format!("take a profile: {error}\n")))?;
    match taken {
        Ok(body) => Ok((
            [
                (header::CONTENT_TYPE, "application/octet-stream"),
                (header::CONTENT_DISPOSITION, "attachment; filename=\"profile\""),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            ],
            body,
        )
            .into_response()),
        Err(error @ ProfileError::Refused(_)) => {
            Err(Failure(StatusCode::NOT_IMPLEMENTED, format!("{error}\n")))
        }
        Err(error) => Err(Failure::internal(format!("{error}\n"))),
    }
}

/// pprof asks once whether there are names (GET), then for those of `0x1+0x2` (POST).
async fn symbol(method: Method, body: Body) -> Result<Response, Failure> {
    let mut text = String::from("num_symbols: 1\n");
    if method == Method::POST {
        let body = to_bytes(body, MOST_ADDRESSES).await.map_err(|error| {
            Failure::bad_request(format!("error reading request body: {error}\n"))
        })?;
        let asked = addresses(&String::from_utf8_lossy(&body));
        let named = tokio::task::spawn_blocking(move || {
            let names = profile::symbolize(&asked);
            names.map(|names| asked.into_iter().zip(names).collect::<Vec<_>>())
        })
        .await
        .map_err(|error| error.to_string())
        .and_then(|named| named)
        .map_err(|error| Failure::internal(format!("name addresses: {error}\n")))?;
        for (address, name) in named {
            if let Some(name) = name {
                let _ = writeln!(text, "{address:#x} {name}");
            }
        }
    }
    Ok(plain(text))
}

/// Go stops at nothing that is no address either.
fn addresses(body: &str) -> Vec<u64> {
    body.trim()
        .split('+')
        .filter_map(|word| {
            let word = word.trim();
            match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
                Some(hex) => u64::from_str_radix(hex, 16).ok(),
                None => word.parse().ok(),
            }
        })
        .filter(|address| *address != 0)
        .collect()
}

/// The process's threads, a line each.
fn threads() -> String {
    let tasks = procfs::process::Process::myself().and_then(|me| me.tasks());
    let mut lines = Vec::new();
    for task in tasks.into_iter().flatten().flatten() {
        let Ok(stat) = task.stat() else { continue };
        let waits = std::fs::read_to_string(format!("/proc/self/task/{}/wchan", task.tid));
        let waits = waits.ok().filter(|at| !at.is_empty() && at != "0").unwrap_or("-".into());
        let ran = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
        lines.push(format!(
            "thread {} [{}] {} in {waits}, {ran:.2} s of CPU\n",
            task.tid, stat.comm, stat.state
        ));
    }
    format!("threadcreate profile: total {}\n{}", lines.len(), lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_lasts_as_asked_and_not_for_ever() {
        for (asked, expected) in [
            (None, Some(30)),
            (Some("5"), Some(5)),
            (Some("0"), Some(30)),
            (Some("-1"), Some(30)),
            (Some("x"), Some(30)),
            (Some("3600"), Some(3600)),
            (Some("3601"), None),
        ] {
            let seconds = seconds(asked).ok().map(|duration| duration.as_secs());
            assert_eq!(seconds, expected, "{asked:?}");
        }
    }

    #[test]
    fn addresses_are_taken_as_pprof_writes_them() {
        assert_eq!(addresses("0x10+0x20+17+zz+0x0+"), [16, 32, 17]);
        assert_eq!(addresses(""), [0_u64; 0]);
    }
}
