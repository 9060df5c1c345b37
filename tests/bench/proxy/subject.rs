//! A proxy as a process of its own: ours or upstream's, told by the same feed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::feed::NODE;

/// Which proxy.
#[derive(Clone, Debug)]
pub enum Program {
    /// `longshore run --only proxy`.
    Longshore(PathBuf),
    /// Upstream's, in nftables mode.
    KubeProxy(PathBuf),
}

impl Program {
    /// Name of its table.
    pub fn table(&self) -> &'static str {
        match self {
            Program::Longshore(_) => "longshore-proxy",
            Program::KubeProxy(_) => "kube-proxy",
        }
    }

    /// Starts it, told by the feed at `port`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(&self, folder: &Path, port: u16) -> Result<Subject> {
        let file = |name: &str, value: serde_json::Value| -> Result<PathBuf> {
            let path = folder.join(name);
            std::fs::write(&path, value.to_string())?;
            Ok(path)
        };
        let kubeconfig = file(
            "kubeconfig",
            json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
                "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{port}")}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]}),
        )?;
        let log = std::fs::File::options().create(true).append(true).open(folder.join("log"))?;
        let mut command = match self {
            Program::Longshore(binary) => {
                let mut command = tests::harness::node::proxy_alone(binary, folder);
                command.args(["--proxy-mode", "nftables"]);
                command.args(["--hostname-override", NODE, "--cluster-cidr", "10.128.0.0/9"]);
                command.arg("--kubeconfig").arg(&kubeconfig);
                command
            }
            Program::KubeProxy(binary) => {
                let config = file(
                    "kube-proxy.json",
                    json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
                        "mode": "nftables", "hostnameOverride": NODE, "clusterCIDR": "10.128.0.0/9",
                        "clientConnection": {"kubeconfig": kubeconfig, "contentType": "application/json",
                            "acceptContentTypes": "application/json"},
                        "conntrack": {"maxPerCore": 0}}),
                )?;
                let mut command = Command::new(binary);
                command.arg("--config").arg(config);
                command
            }
        };
        let name = format!("{self:?}");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        Ok(Subject(child.with_context(|| format!("start {name}"))?))
    }
}

/// A running proxy; ended when dropped.
pub struct Subject(Child);

impl Subject {
    /// The processes: it and what it started.
    fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.0.id()];
        let mut next = 0;
        while let Some(pid) = pids.get(next).copied() {
            next += 1;
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
            for task in tasks.flatten() {
                let text = std::fs::read_to_string(task.path().join("children"));
                let text = text.unwrap_or_default();
                pids.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
        }
        pids
    }

    /// Memory, what is shared counted by share, in MiB.
    pub fn pss(&self) -> f64 {
        let of = |pid: u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
            let text = text.unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0)
        };
        self.pids().into_iter().map(of).sum::<f64>() / 1024.0
    }

    /// CPU time used so far, in seconds.
    pub fn cpu(&self) -> f64 {
        let of = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).to_owned();
            let ticks = |n: usize| {
                fields.split_whitespace().nth(n).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0)
            };
            (ticks(11) + ticks(12)) / 100.0
        };
        self.pids().into_iter().map(of).sum()
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.kill();
    }
}
