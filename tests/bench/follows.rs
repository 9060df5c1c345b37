//! What logs that are followed cost a node while nothing is written to them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use h2::client::SendRequest;
use hyper::Request;
use hyper::body::Bytes;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;
use tests::harness::lab::within;
use tests::harness::measure::anonymous_kilobytes;
use tests::harness::{Cluster, Node};
use tokio_rustls::TlsConnector;

/// As many as the project set itself a bar for.
const FOLLOWS: usize = 1000;
const ACCOUNT: &str = "follower";

/// kB of memory that `FOLLOWS` follows of the log of pod `pod` take, over HTTP/2 as the API server
/// asks for them.
pub async fn memory(cluster: &Cluster, node: &Node, pod: &str, stack: &[&str]) -> Result<f64> {
    let token = token(cluster).await?;
    let path = format!("/containerLogs/{}/{pod}/c?follow=true", cluster.namespace());
    // What the first connections and requests load once.
    drop(follow(node, &token, &path, 10).await?);
    let before = settled(node, stack).await;
    let follows = follow(node, &token, &path, FOLLOWS).await?;
    let after = settled(node, stack).await;
    drop(follows);
    Ok(after - before)
}

async fn settled(node: &Node, stack: &[&str]) -> f64 {
    tokio::time::sleep(Duration::from_secs(5)).await;
    anonymous_kilobytes(node, stack)
}

/// A token that may do what the API server may.
async fn token(cluster: &Cluster) -> Result<String> {
    const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
    let account = json!({"metadata": {"name": ACCOUNT}});
    cluster.admin.create(&cluster.path("serviceaccounts"), account).await?;
    let rule = json!({"apiGroups": [""], "resources": ["nodes/proxy"], "verbs": ["get"]});
    let role = json!({"metadata": {"name": ACCOUNT}, "rules": [rule]});
    cluster.admin.create(&format!("{RBAC}/clusterroles"), role).await?;
    let subject =
        json!({"kind": "ServiceAccount", "name": ACCOUNT, "namespace": cluster.namespace()});
    let binding = json!({"metadata": {"name": ACCOUNT}, "subjects": [subject],
        "roleRef": {"kind": "ClusterRole", "name": ACCOUNT}});
    cluster.admin.create(&format!("{RBAC}/clusterrolebindings"), binding).await?;
    let asked = json!({"spec": {"expirationSeconds": 3600}});
    let path = cluster.path(&format!("serviceaccounts/{ACCOUNT}/token"));
    let made = cluster.admin.create(&path, asked).await?;
    Ok(made["status"]["token"].as_str().context("no token")?.to_owned())
}

/// Connections and the answers' bodies, which are open while this is held.
type Follows = Vec<(SendRequest<Bytes>, Vec<h2::RecvStream>)>;

async fn follow(node: &Node, token: &str, path: &str, count: usize) -> Result<Follows> {
    let mut follows: Follows = vec![(connect(node).await?, Vec::new())];
    for _ in 0..count {
        let mut asked = None;
        while asked.is_none() {
            let Some((client, _)) = follows.last_mut() else { break };
            // A server takes only so many streams on a connection.
            let ready = client.clone().ready();
            match tokio::time::timeout(Duration::from_secs(1), ready).await {
                Ok(ready) => asked = Some(ready?),
                Err(_) => follows.push((connect(node).await?, Vec::new())),
            }
        }
        let request = Request::get(format!("https://{}:10250{path}", node.name()))
            .header("authorization", format!("Bearer {token}"))
            .body(())?;
        let answer = asked.context("no connection")?.send_request(request, true)?.0.await?;
        ensure!(answer.status() == 200, "GET {path}: {}", answer.status());
        follows.last_mut().context("no connection")?.1.push(answer.into_body());
    }
    Ok(follows)
}

async fn connect(node: &Node) -> Result<SendRequest<Bytes>> {
    let mut roots = rustls::RootCertStore::empty();
    let own = node.path("/var/lib/kubelet/pki/kubelet.crt");
    roots.add(CertificateDer::from_pem_slice(&std::fs::read(&own)?)?)?;
    let mut config = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::aws_lc_rs::default_provider().into(),
    )
    .with_safe_default_protocol_versions()?
    .with_root_certificates(roots)
    .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (netns, to) = (node.netns().path(), (node.address(), 10250));
    let stream = within(&netns, move || std::net::TcpStream::connect(to))?;
    stream.set_nonblocking(true)?;
    let stream = tokio::net::TcpStream::from_std(stream)?;
    let name = node.name().to_owned().try_into()?;
    let stream = TlsConnector::from(std::sync::Arc::new(config)).connect(name, stream).await?;
    let (client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    Ok(client)
}
