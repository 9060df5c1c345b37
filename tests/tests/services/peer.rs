//! A proxy that serves a node of its own, ours or upstream's, told by the test control plane.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::control_plane::ControlPlane;
use tests::control_plane::serve::Endpoint;
use tokio::io::AsyncReadExt;

use crate::generate::NODE_NAME;
use crate::net::{Net, runtime};

/// Which proxy, in which mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    /// kube-proxy's binary; `None` is ours.
    pub kube_proxy: Option<PathBuf>,
    /// `nftables` or `iptables`.
    pub mode: &'static str,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if self.kube_proxy.is_some() { "kube-proxy" } else { "longshore" };
        write!(f, "{name} ({})", self.mode)
    }
}

/// A node that it serves.
pub struct Peer {
    /// Which.
    pub kind: Kind,
    /// Its node.
    pub net: Arc<Net>,
    child: Child,
    folder: tempfile::TempDir,
    _server: Endpoint,
}

impl Peer {
    /// Starts it with these fields of `KubeProxyConfiguration`.
    ///
    /// # Errors
    /// If the control plane cannot be served to it, or it cannot be started.
    pub fn start(kind: Kind, plane: &ControlPlane, fields: &Value) -> Result<Self> {
        let net = Arc::new(Net::new());
        let at = std::net::SocketAddr::from(([127, 0, 0, 1], 6443));
        let there = net.clone();
        let bind = move || there.node.run(|| std::net::TcpListener::bind(at));
        let server = plane.serve(&[at.ip()], Box::new(bind))?;
        let folder = tempfile::Builder::new().prefix("services-").tempdir()?;
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, plane.admin_kubeconfig(at))?;
        let mut config = json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration", "mode": kind.mode, "hostnameOverride": NODE_NAME,
            "clientConnection": {"kubeconfig": kubeconfig, "contentType": "application/json",
                "acceptContentTypes": "application/json"},
            "conntrack": {"maxPerCore": 0}});
        for (field, value) in fields.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        // Upstream's least is a second otherwise.
        if kind.kube_proxy.is_some() {
            config[kind.mode]["minSyncPeriod"] = json!("10ms");
        }
        let path = folder.path().join("config");
        std::fs::write(&path, config.to_string())?;
        let mut command = kind.command(folder.path())?;
        command.arg("--config").arg(&path);
        let log = std::fs::File::create(folder.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = net.node.run(|| command.spawn()).with_context(|| format!("start {kind}"))?;
        Ok(Peer { kind, net, child, folder, _server: server })
    }

    /// Waits until the marker is served.
    ///
    /// # Errors
    /// If it is not for a minute.
    pub fn settle(&mut self, at: &[std::net::SocketAddr], answer: &str) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        for to in at {
            let served = || {
                self.net.client.run(|| {
                    let ask = async {
                        let mut stream = tokio::net::TcpStream::connect(to).await?;
                        let mut text = String::new();
                        stream.read_to_string(&mut text).await?;
                        std::io::Result::Ok(text)
                    };
                    let ask = async { tokio::time::timeout(Duration::from_millis(300), ask).await };
                    matches!(runtime().block_on(ask), Ok(Ok(text)) if text.starts_with(answer))
                })
            };
            while !served() {
                ensure!(self.child.try_wait()?.is_none(), "{} ended:\n{}", self.kind, self.log());
                let late = Instant::now() > end;
                ensure!(!late, "{}: {to} is not served:\n{}", self.kind, self.log());
                std::thread::park_timeout(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// The end of what it has logged.
    pub fn log(&self) -> String {
        let text = std::fs::read(self.folder.path().join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Its rules, for a look at what went wrong.
    pub fn rules(&self) -> String {
        self.net.node.run(|| crate::net::sh("nft list ruleset 2>/dev/null || true"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Kind {
    fn command(&self, folder: &Path) -> Result<Command> {
        if let Some(binary) = &self.kube_proxy {
            return Ok(Command::new(binary));
        }
        let binary = tests::harness::node::longshore_binary()?;
        Ok(tests::harness::node::proxy_alone(&binary, folder))
    }
}
