//! One request over a socket of the running node.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;

use super::command_runtime;

/// Longest wait for the node's answer: it may have a large ruleset to compare.
const LIMIT: Duration = Duration::from_secs(60);

/// Asks; an answer that is not 2xx is an error with its words.
pub(super) fn get(socket: &Path, path: &str) -> anyhow::Result<String> {
    ask(socket, hyper::Method::GET, path, Vec::new())
}

/// Sends a body.
pub(super) fn post(socket: &Path, path: &str, body: Vec<u8>) -> anyhow::Result<String> {
    ask(socket, hyper::Method::POST, path, body)
}

fn ask(socket: &Path, method: hyper::Method, path: &str, body: Vec<u8>) -> anyhow::Result<String> {
    let asked = command_runtime()?.block_on(async {
        let asking = exchange(socket, method, path, body);
        tokio::time::timeout(LIMIT, asking).await.context("no answer in time")?
    });
    let (status, text) = asked.with_context(|| {
        format!("ask the node at {}; is `longshore run` running?", socket.display())
    })?;
    anyhow::ensure!(status.is_success(), "{text}");
    Ok(text)
}

async fn exchange(
    socket: &Path,
    method: hyper::Method,
    path: &str,
    body: Vec<u8>,
) -> anyhow::Result<(hyper::StatusCode, String)> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", "longshore")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
