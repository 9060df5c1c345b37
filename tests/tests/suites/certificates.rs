//! The node's client certificate: renewed before it expires, and replaced after it has.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tests::harness::{Cluster, Lab, Node, NodeOptions, eventually};

use crate::support::idle;

fn current(node: &Node) -> PathBuf {
    let link = node.path("/var/lib/kubelet/pki/kubelet-client-current.pem");
    std::fs::read_link(link).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_renewed_before_it_expires() {
    let lab = Lab::new("cert-renew").unwrap();
    let cluster = Cluster::new(&lab).await.unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    let Some(plane) = cluster.fake_plane() else {
        eprintln!("not on a real control plane: it is not told for how long to sign");
        return cluster.end(&[]).await;
    };
    plane.sign_for(30);
    cluster.join(&mut node, &[]).await.unwrap();
    // Certificates are dated back by minutes, so the first is due at once.
    let mut seen = vec![current(&node)];
    for round in 0..2 {
        let last = seen[round].clone();
        let next = eventually("a new certificate is in use", async || match current(&node) {
            now if now != last => Ok(now),
            _ => Err(anyhow::anyhow!("still {}", last.display())),
        })
        .await;
        seen.push(next);
    }
    cluster.pod(&node, "p", json!({"containers": [idle("c")]})).await.unwrap();
    cluster.pod_ready("p").await;
    let requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let requests = cluster.admin.read(requests).await.unwrap();
    let count = requests["items"].as_array().unwrap().len();
    assert!(count < 12, "{count} requests for {} certificates", seen.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_while_the_node_was_off_it_is_replaced_and_pods_run_on() {
    let lab = Lab::new("cert-expired").unwrap();
    let cluster = Cluster::new(&lab).await.unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    let Some(plane) = cluster.fake_plane() else {
        eprintln!("not on a real control plane: it is not told for how long to sign");
        return cluster.end(&[]).await;
    };
    plane.sign_for(1);
    cluster.join_only(&node).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    plane.sign_for(3600);
    node.start(&[]).unwrap();
    // The agent is up all the same, and says what to do.
    node.ready().await;
    let node = node;
    eventually("the status says what to do", async || {
        let output = node.longshore(&["status"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match said.contains("expired at") && said.contains("kubeadm token create") {
            true => Ok(()),
            false => Err(anyhow::anyhow!("{said}")),
        }
    })
    .await;
    let (server, token) = (cluster.server(), cluster.token(3600).await.unwrap());
    let ca = STANDARD.encode(std::fs::read(node.path("/etc/kubernetes/pki/ca.crt")).unwrap());
    let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": format!("https://{server}"),
            "certificate-authority-data": ca}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}]});
    let path = node.path("/etc/kubernetes/bootstrap-kubelet.conf");
    std::fs::write(path, text.to_string()).unwrap();
    cluster.node_ready(node.name()).await;
}
