//! The test control plane by hand: `test-control-plane --listen 127.0.0.1:6443` prints where its
//! kubeconfig is and how to join, and serves until Ctrl-C.

#![allow(clippy::print_stderr, reason = "a tool for people")]

use std::io::Write as _;
use std::net::SocketAddr;

use anyhow::{Context as _, Result};

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut listen: SocketAddr = "127.0.0.1:6443".parse()?;
    let mut kubeconfig = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--listen" => listen = value()?.parse().context("--listen takes ADDRESS:PORT")?,
            "--kubeconfig" => kubeconfig = Some(value()?),
            other => anyhow::bail!(
                "unknown argument {other}; usage: test-control-plane [--listen ADDRESS:PORT] [--kubeconfig FILE]"
            ),
        }
    }
    let plane = tests::control_plane::ControlPlane::new()?;
    let endpoint =
        plane.serve(&[listen.ip()], Box::new(move || std::net::TcpListener::bind(listen)))?;
    plane.publish(endpoint.address())?;
    let text = plane.admin_kubeconfig(endpoint.address());
    let mut out = std::io::stdout().lock();
    match kubeconfig {
        Some(path) => {
            std::fs::write(&path, &text).with_context(|| format!("write {path}"))?;
            writeln!(out, "export KUBECONFIG={path}")?;
        }
        None => writeln!(out, "{text}")?,
    }
    writeln!(
        out,
        "longshore join {} --token {} --discovery-token-ca-cert-hash {}",
        endpoint.address(),
        plane.bootstrap_token(24 * 3600)?,
        plane.ca_pin()?
    )?;
    drop(out);
    tokio::signal::ctrl_c().await?;
    Ok(())
}
