//! `/logs/`: files beneath `/var/log`, and the node log query (KEP-2258), which asks the journal for
//! services and `/var/log` for files.
//!
//! Paths are resolved beneath `/var/log` by the kernel: nothing that lies there leads elsewhere.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::Mode;

use super::logs::options::query;
use super::{Failure, Shared, zpages};

/// The folder.
const LOGS: &str = "/var/log";
/// Longest time that the journal is read for one request.
const JOURNAL: Duration = Duration::from_secs(30);
/// Services in one query.
const MAX_SERVICES: usize = 4;
/// Bytes sent at once.
const CHUNK: usize = 64 << 10;
/// Most lines that may be asked for.
const MAX_TAIL: u64 = 100_000;

/// What of which logs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Query {
    services: Vec<String>,
    files: Vec<String>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    tail: Option<u64>,
    pattern: Option<String>,
    boot: Option<i64>,
}

impl Query {
    /// Reads it. `Ok(None)`: the request is no query.
    fn parse(text: &str) -> Result<Option<Self>, String> {
        let pairs = query(text);
        if pairs.is_empty() {
            return Ok(None);
        }
        let mut asked = Self::default();
        for (name, value) in pairs.into_iter().filter(|(_, value)| !value.is_empty()) {
            let bad = |what: &str| format!("{name}: {value:?} is no {what}");
            match name.as_str() {
                "query" if value.contains('/') => asked.files.push(value),
                "query" => {
                    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:@\\".contains(c);
                    if !value.chars().all(plain) || value.starts_with('-') {
                        return Err(bad("service"));
                    }
                    asked.services.push(value);
                }
                "sinceTime" => asked.since = Some(value.parse().map_err(|_| bad("time"))?),
                "untilTime" => asked.until = Some(value.parse().map_err(|_| bad("time"))?),
                "tailLines" => {
                    let lines = value.parse().ok().filter(|n| *n <= MAX_TAIL);
                    asked.tail = Some(lines.ok_or_else(|| bad("number of lines"))?);
                }
                "pattern" => asked.pattern = Some(value),
                "boot" => {
                    let boot = value.parse().ok().filter(|boot| *boot <= 0);
                    asked.boot = Some(boot.ok_or_else(|| bad("boot (0 or below)"))?);
                }
                _ => {}
            }
        }
        if asked.services.is_empty() && asked.files.is_empty() {
            return Err("query: name at least one service or file".into());
        }
        if !asked.services.is_empty() && !asked.files.is_empty() {
            return Err("query: name either services or a file".into());
        }
        if asked.files.len() > 1 {
            return Err("query: name one file".into());
        }
        if asked.services.len() > MAX_SERVICES {
            return Err(format!("query: name at most {MAX_SERVICES} services"));
        }
        if asked.since.zip(asked.until).is_some_and(|(since, until)| since > until) {
            return Err("untilTime: is before sinceTime".into());
        }
        let only = asked.since.is_some() || asked.until.is_some() || asked.boot.is_some();
        if !asked.files.is_empty() && (only || asked.pattern.is_some() || asked.tail.is_some()) {
            return Err("query: a file is shown as a whole".into());
        }
        Ok(Some(asked))
    }

    /// The journal's command line.
    fn journal(&self) -> Vec<String> {
        let mut line = vec!["--utc".into(), "--no-pager".into(), "--output=short-precise".into()];
        let time = |at: Timestamp| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
        line.extend(self.since.map(|at| format!("--since={}", time(at))));
        line.extend(self.until.map(|at| format!("--until={}", time(at))));
        line.extend(self.tail.map(|lines| format!("--lines={lines}")));
        line.extend(self.pattern.as_ref().map(|pattern| format!("--grep={pattern}")));
        line.extend(self.boot.map(|boot| format!("--boot={boot}")));
        line.extend(self.services.iter().map(|service| format!("--unit={service}")));
        line
    }
}

pub(super) async fn root(s: State<Arc<Shared>>, q: RawQuery) -> Result<Response, Failure> {
    logs(s, Path(String::new()), q).await
}

pub(super) async fn logs(
    State(shared): State<Arc<Shared>>,
    Path(path): Path<String>,
    RawQuery(text): RawQuery,
) -> Result<Response, Failure> {
    if !shared.config.system_log_handler {
        return Err(zpages::disabled("logs endpoint is disabled.\n"));
    }
    if shared.config.system_log_query && path.is_empty() {
        let asked = Query::parse(text.as_deref().unwrap_or_default());
        match asked.map_err(Failure::bad_request)? {
            Some(asked) if asked.files.is_empty() => return journal(&asked).await,
            Some(mut asked) => return file(asked.files.pop().unwrap_or_default()).await,
            None => {}
        }
    }
    file(path).await
}

async fn journal(asked: &Query) -> Result<Response, Failure> {
    let mut command = tokio::process::Command::new("journalctl");
    command.args(asked.journal()).stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = match tokio::time::timeout(JOURNAL, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            return Err(Failure::internal(format!("cannot ask the journal: journalctl: {error}")));
        }
        Err(_) => {
            return Err(Failure::internal(format!(
                "the journal was not read within {} s; ask for less",
                JOURNAL.as_secs()
            )));
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Failure::internal(format!("journalctl: {said}")));
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], output.stdout).into_response())
}

fn open(path: &str) -> io::Result<File> {
    let dir = File::open(LOGS)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let how = OpenHow::new()
        .flags(flags)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = path.trim_start_matches('/').trim_start_matches("var/log/");
    let path = if path.is_empty() { "." } else { path };
    let fd: OwnedFd = cri_shim::scoped::open(&dir, path, how)?;
    Ok(fd.into())
}

async fn file(path: String) -> Result<Response, Failure> {
    let opened = path.clone();
    let work = tokio::task::spawn_blocking(move || {
        let file = open(&opened)?;
        let meta = file.metadata()?;
        if meta.is_dir() {
            return Ok((file, Some(list(&opened)?), 0));
        }
        if !meta.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        Ok((file, None, meta.size()))
    });
    let (file, listing, size) = match work.await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Failure::not_found("404 page not found\n"));
        }
        Ok(Err(error)) => return Err(Failure::internal(format!("{path}: {error}"))),
        Err(error) => return Err(Failure::internal(error.to_string())),
    };
    if let Some(listing) = listing {
        return Ok(([(header::CONTENT_TYPE, "text/html; charset=utf-8")], listing).into_response());
    }
    let chunks = futures::stream::unfold((file, 0_u64), move |(mut file, at)| async move {
        let left = size.saturating_sub(at);
        if left == 0 {
            return None;
        }
        let work = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
            let read =
                file.seek(SeekFrom::Start(at)).and_then(|_| file.read(&mut chunk)).map(|read| {
                    chunk.truncate(read);
                    chunk
                });
            (read, file)
        });
        match work.await {
            Ok((Ok(chunk), _)) if chunk.is_empty() => None,
            Ok((Ok(chunk), file)) => {
                let at = at + chunk.len() as u64;
                Some((Ok(hyper::body::Bytes::from(chunk)), (file, at)))
            }
            Ok((Err(error), file)) => Some((Err(error), (file, u64::MAX))),
            Err(_) => None,
        }
    });
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((StatusCode::OK, headers, Body::from_stream(chunks)).into_response())
}

/// A folder as a web page, which is how upstream shows one.
fn list(path: &str) -> io::Result<String> {
    let mut names = Vec::new();
    let folder = open(path)?;
    let dir = nix::dir::Dir::from_fd(folder.into())?;
    for entry in dir {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            let folder = entry.file_type() == Some(nix::dir::Type::Directory);
            names.push(if folder { name + "/" } else { name });
        }
    }
    names.sort();
    let escape = |text: &str| {
        text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;")
    };
    let lines: String = names
        .iter()
        .map(|name| {
            let link = escape(&name.replace('%', "%25").replace('?', "%3F").replace('#', "%23"));
            format!("<a href=\"{link}\">{}</a>\n", escape(name))
        })
        .collect();
    Ok(format!(
        "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n{lines}</pre>\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_become_the_journals_options() {
        assert_eq!(Query::parse("").unwrap(), None);
        let asked = Query::parse(
            "query=kubelet&query=crio&sinceTime=2026-01-02T03:04:05Z&tailLines=5&pattern=x+y&boot=-1",
        )
        .unwrap()
        .unwrap();
        assert_eq!(
            asked.journal()[3..],
            [
                "--since=2026-01-02 03:04:05 UTC",
                "--lines=5",
                "--grep=x y",
                "--boot=-1",
                "--unit=kubelet",
                "--unit=crio"
            ]
        );
        for bad in [
            "tailLines=5",
            "query=a&query=/b",
            "query=--help",
            "query=a;b",
            "query=a&boot=1",
            "query=a&sinceTime=soon",
            "query=a&sinceTime=2026-01-02T00:00:00Z&untilTime=2026-01-01T00:00:00Z",
            "query=a&query=b&query=c&query=d&query=e",
        ] {
            assert!(Query::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn nothing_leads_out_of_the_folder() {
        for path in ["../../etc/passwd", "/etc/passwd", "../etc/shadow"] {
            assert!(open(path).is_err(), "{path}");
        }
        assert!(list("").unwrap().contains("<pre>"));
    }
}
