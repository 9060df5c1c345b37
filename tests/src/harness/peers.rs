//! Upstream's kubelet and kube-proxy in a node's namespaces: what benchmarks compare with, and what
//! the suites themselves are checked against (`LONGSHORE_TEST_PEERS` names the folder with both).

use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{Cluster, Node};

/// kubelet and kube-proxy in the node's namespaces.
pub struct Peers(Vec<Child>);

impl Peers {
    /// Starts them against the test control plane; `node` must run over containerd.
    ///
    /// # Errors
    /// When one cannot be started.
    pub async fn start(cluster: &Cluster, node: &Node, folder: &Path) -> Result<Self> {
        let plane = cluster.fake_plane().context("benchmarks need the test control plane")?;
        let file = |name: &str, text: &str| -> Result<String> {
            let path = node.dir().join(name);
            std::fs::write(&path, text)?;
            Ok(path.to_string_lossy().into_owned())
        };
        let user = format!("system:node:{}", node.name());
        let kubeconfig = file(
            "peer.kubeconfig",
            &plane.client_kubeconfig(cluster.server(), &user, &["system:nodes"])?,
        )?;
        let admin = file("proxy.kubeconfig", &plane.admin_kubeconfig(cluster.server()))?;
        let kubelet = file("kubelet.json", &json!({"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock", "cgroupRoot": format!("/{}", node.cgroup()),
            "cgroupDriver": "cgroupfs", "failSwapOn": false, "failCgroupV1": false, "contentType": "application/json",
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"}, "maxPods": 250, "registerNode": true,
            "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "memory.available": "1Mi"}}).to_string())?;
        let proxy = file("proxy.json", &json!({"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": "nftables", "clientConnection": {"kubeconfig": admin, "contentType": "application/json", "acceptContentTypes": "application/json"},
            "hostnameOverride": node.name(), "conntrack": {"maxPerCore": 0}}).to_string())?;
        let start = |program: &str, arguments: &[String]| -> Result<Child> {
            let log = std::fs::File::create(node.dir().join(format!("{program}.log")))?;
            node.command(folder.join(program))
                .args(arguments)
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .with_context(|| format!("start {program}"))
        };
        let children = vec![
            start(
                "kubelet",
                &[
                    format!("--config={kubelet}"),
                    format!("--kubeconfig={kubeconfig}"),
                    format!("--hostname-override={}", node.name()),
                    format!("--node-ip={}", node.address()),
                ],
            )?,
            start("kube-proxy", &[format!("--config={proxy}")])?,
        ];
        cluster.node_ready(node.name()).await;
        Ok(Self(children))
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
