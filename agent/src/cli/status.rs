//! `longshore status`: node, pods, services and last errors, from the running node.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;

use super::{Output, command_runtime};
use crate::health::{STATUS_SOCKET, Status, render};

/// Arguments of `longshore status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The node's run directory
    #[arg(long, value_name = "DIR", default_value = "/run/longshore")]
    run_dir: PathBuf,
    /// Taken as all other commands take it; the node knows its own
    #[arg(long, value_name = "DIR", hide = true)]
    root_dir: Option<PathBuf>,
    /// As above
    #[arg(long, value_name = "DIR", hide = true)]
    state_dir: Option<PathBuf>,
}

/// Longest wait for the node's answer.
const LIMIT: Duration = Duration::from_secs(15);

/// Prints the status.
pub(super) fn run(args: StatusArgs, output: Output) -> anyhow::Result<()> {
    let StatusArgs { run_dir, root_dir: _, state_dir: _ } = args;
    let socket = run_dir.join(STATUS_SOCKET);
    let text = command_runtime()?.block_on(tell(&socket, "/status"))?;
    let mut out = std::io::stdout().lock();
    match output {
        Output::Json => {
            out.write_all(&text)?;
            out.write_all(b"\n")?;
        }
        Output::Text => {
            let status: Status = serde_json::from_slice(&text).context("read the answer")?;
            out.write_all(render(&status).as_bytes())?;
        }
    }
    Ok(())
}

/// The node's answer to a GET of `path`.
pub(super) async fn tell(socket: &Path, path: &str) -> anyhow::Result<Bytes> {
    let answer = tokio::time::timeout(LIMIT, ask(socket, path)).await;
    answer.context("no answer in time").flatten().with_context(|| {
        format!("ask the node at {}; is `longshore run` running?", socket.display())
    })
}

async fn ask(socket: &Path, path: &str) -> anyhow::Result<Bytes> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request =
        hyper::Request::get(path).header("host", "longshore").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    anyhow::ensure!(response.status().is_success(), "the node answered {}", response.status());
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok(body)
}
