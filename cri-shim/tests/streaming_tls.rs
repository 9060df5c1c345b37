//! The streaming server by itself, over TLS, with a runtime that runs commands on this machine.

use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use cri_shim::api;
use cri_shim::streaming::descriptor::Descriptor;
use cri_shim::streaming::runtime::{Attachment, Process};
use cri_shim::streaming::{Runtime, StreamConfig, Streaming};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

struct Local;

#[tonic::async_trait]
impl Runtime for Local {
    async fn exec(&self, request: &api::ExecRequest) -> Result<Process, String> {
        let (stdout, theirs) = Descriptor::output().map_err(|e| e.to_string())?;
        let mut child = tokio::process::Command::new(&request.cmd[0])
            .args(&request.cmd[1..])
            .stdout(Stdio::from(theirs))
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| e.to_string())?;
        Ok(Process {
            stdin: None,
            stdout: Some(Arc::new(stdout)),
            stderr: None,
            tty: false,
            exit: Box::pin(async move {
                let status = child.wait().await.map_err(|e| e.to_string())?;
                Ok(status.code().unwrap_or(-1))
            }),
        })
    }

    async fn attach(&self, _: &api::AttachRequest) -> Result<Attachment, String> {
        Err("there is nothing to attach to".to_owned())
    }

    async fn close_stdin(&self, _: &str) {}

    async fn connect(&self, _: &str, _: u16) -> io::Result<TcpStream> {
        Err(io::ErrorKind::NotFound.into())
    }
}

fn request() -> api::ExecRequest {
    api::ExecRequest {
        container_id: "c".into(),
        cmd: vec!["echo".into(), "hello over TLS".into()],
        stdout: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn streams_are_served_over_tls() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (chain, key) = (directory.path().join("chain.pem"), directory.path().join("key.pem"));
    std::fs::write(&chain, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    let config = StreamConfig { tls: Some((chain.clone(), key)), ..Default::default() };
    let streaming = Streaming::bind(config).await?;
    let urls = streaming.urls();
    tokio::spawn(streaming.serve(Arc::new(Local), std::future::pending()));
    let url = urls.exec(request())?;
    let (address, path) = url.strip_prefix("https://").unwrap().split_once('/').unwrap();

    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&chain)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let stream = TcpStream::connect(address).await?;
    let mut stream = connector.connect(ServerName::try_from("localhost")?, stream).await?;
    let upgrade = format!(
        "GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2V5\r\n\
         Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    );
    stream.write_all(upgrade.as_bytes()).await?;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer));
    let _ = read.await?;
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    assert!(answer.contains("\u{1}hello over TLS\n"), "{answer:?}");
    assert!(answer.contains(r#""status":"Success""#), "{answer:?}");
    // Without TLS there is nothing to be had.
    let mut plain = TcpStream::connect(address).await?;
    plain.write_all(upgrade.as_bytes()).await?;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(60), plain.read_to_end(&mut answer)).await?;
    assert!(!answer.starts_with(b"HTTP"));
    Ok(())
}

#[tokio::test]
async fn idle_sessions_end_and_late_streams_are_not_waited_for() -> anyhow::Result<()> {
    let config = StreamConfig {
        idle_timeout: Duration::from_millis(300),
        creation_timeout: Duration::from_millis(300),
        ..Default::default()
    };
    let streaming = Streaming::bind(config).await?;
    let urls = streaming.urls();
    tokio::spawn(streaming.serve(Arc::new(Local), std::future::pending()));
    let sleep = api::ExecRequest { cmd: vec!["sleep".into(), "1000".into()], ..request() };
    let cases = [
        "websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2V5",
        "SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io",
    ];
    for upgrade in cases {
        let url = urls.exec(sleep.clone())?;
        let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "POST /{path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(Duration::from_secs(60), read).await?;
        assert!(answer.starts_with(b"HTTP/1.1 101"));
    }
    Ok(())
}
