//! Services as their users meet them: real TCP and UDP, from pods, from the node, from outside.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tests::harness::cluster::pod_ip;
use tests::harness::node::Runtime;
use tests::harness::{eventually, net};

use crate::support::{World, idle};

fn server(port: u16) -> Value {
    json!({"containers": [
        {"name": "c", "command": ["workload", "http", port.to_string()], "ports": [{"name": "web", "containerPort": port}]},
        {"name": "u", "command": ["workload", "udp", port.to_string()]}]})
}

async fn service(world: &World, name: &str, app: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec["selector"] = json!({"app": app});
    let object = json!({"metadata": {"name": name}, "spec": spec});
    world.cluster.admin.create(&world.cluster.path("services"), object).await.unwrap()
}

fn vip(service: &Value) -> IpAddr {
    service["spec"]["clusterIP"].as_str().unwrap().parse().unwrap()
}

fn node_port(service: &Value) -> u16 {
    service["spec"]["ports"][0]["nodePort"].as_u64().unwrap() as u16
}

/// Waits until `to` is served, from the namespace at `from`, and returns the answer's words: host
/// name of the pod, address that it saw.
async fn served(from: &Path, to: SocketAddr) -> (String, String) {
    eventually(&format!("{to} is served"), async || {
        let answer = net::http_get(from, to, "/")?;
        let mut words = answer.body.split_whitespace().map(str::to_owned);
        match (words.next(), words.next()) {
            (Some(host), Some(client)) => Ok((host, client)),
            _ => Err(std::io::Error::other(answer.body)),
        }
    })
    .await
}

async fn refused(from: &Path, to: SocketAddr) {
    eventually(&format!("{to} is refused"), async || match net::http_get(from, to, "/") {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

/// Routes to pods and VIPs for the outside client, as a cluster's network would have.
async fn whole_dataplane(world: World) {
    world.cluster.pod(&world.node, "a", server(8080)).await.unwrap();
    world.cluster.pod(&world.node, "client", json!({"containers": [idle("c")]})).await.unwrap();
    let a = world.cluster.pod_ready("a").await;
    let client = world.cluster.pod_ready("client").await;
    let s = service(&world, "s", "a", json!({"type": "NodePort", "externalIPs": ["10.99.0.77"],
        "ports": [{"name": "http", "port": 80, "targetPort": "web"}, {"name": "udp", "port": 53, "targetPort": 8080, "protocol": "UDP"}]})).await;
    let (node, outside) = (world.node.netns().path(), world.lab.outside().path());
    let pod: PathBuf = world.node.pod_netns(pod_ip(&client).unwrap()).unwrap();
    let own: PathBuf = world.node.pod_netns(pod_ip(&a).unwrap()).unwrap();
    let address = (vip(&s), 80).into();
    assert_eq!(served(&node, address).await.0, "a");
    eventually("top shows the Service and what happened", async || {
        let output = world.node.longshore(&["top", "-o", "json"])?;
        let text = tests::harness::command::checked("longshore top", &output)?;
        let top: Value = serde_json::from_str(&text)?;
        let services = top["services"].as_array().into_iter().flatten();
        let shown = services.clone().find(|service| service["name"] == "s");
        let shown = shown.ok_or_else(|| anyhow::anyhow!("{top:#}"))?;
        let good = shown["readyEndpoints"] == 1 && shown["endpoints"] == 1;
        let started = top["events"].to_string().contains("Container started");
        anyhow::ensure!(good && started, "{top:#}");
        Ok(())
    })
    .await;
    // From another pod the server sees the pod itself.
    assert_eq!(served(&pod, address).await, ("a".into(), pod_ip(&client).unwrap().to_string()));
    // Hairpin: a pod that reaches itself through its Service.
    assert_eq!(served(&own, address).await.0, "a");
    let port: SocketAddr = (world.node.address(), node_port(&s)).into();
    for from in [&node, &pod, &outside] {
        assert_eq!(served(from, port).await.0, "a", "NodePort from {}", from.display());
    }
    let udp: SocketAddr = (vip(&s), 53).into();
    for from in [&node, &pod] {
        let answer =
            eventually("UDP is answered", async || net::udp_exchange(from, udp, "hi")).await;
        assert!(answer.starts_with("a ") && answer.ends_with(" hi"), "{answer}");
    }
    // The external address is routed to the node by whoever announces it.
    tests::harness::command::run(&format!(
        "ip -n {} route add 10.99.0.77/32 via {}",
        world.lab.outside().name(),
        world.node.address()
    ))
    .unwrap();
    assert_eq!(served(&outside, ([10, 99, 0, 77], 80).into()).await.0, "a");
    // Without endpoints it refuses at once, and serves the next pod that is ready.
    world.cluster.delete_pod("a").await.unwrap();
    for from in [&node, &pod] {
        refused(from, address).await;
    }
    refused(&outside, port).await;
    world.ready_pod("a", server(8080)).await;
    assert_eq!(served(&pod, address).await.0, "a");
    assert_eq!(served(&outside, port).await.0, "a");
    let answer =
        eventually("UDP finds the new pod", async || net::udp_exchange(&pod, udp, "again")).await;
    assert!(answer.starts_with("a "), "{answer}");
    world.cluster.admin.remove(&world.cluster.path("services/s")).await.unwrap();
    eventually("a Service that is gone is served no more", async || {
        match net::http_get(&pod, address, "/") {
            Err(_) => Ok(()),
            Ok(answer) => Err(answer.body),
        }
    })
    .await;
    world.end(&["a", "client"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nftables_dataplane() {
    let world = World::with("proxy-nft", Runtime::Shim, &["--proxy-mode=nftables"]).await;
    whole_dataplane(world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn iptables_dataplane() {
    let world = World::with("proxy-ipt", Runtime::Shim, &["--proxy-mode=iptables"]).await;
    whole_dataplane(world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dataplane_over_containerd() {
    // What its CNI configuration gives to pods, whatever the cluster's proxies are told.
    let flags = ["--cluster-cidr=10.245.0.0/24"];
    let world = World::with("proxy-ctrd", Runtime::Containerd, &flags).await;
    whole_dataplane(world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_spread_and_affinity_keeps_them() {
    let world = World::new("proxy-spread").await;
    for name in ["x", "y", "z"] {
        let mut spec = server(8080);
        spec["nodeName"] = world.node.name().into();
        tests::harness::cluster::fill_image(&mut spec);
        let pod = json!({"metadata": {"name": name, "labels": {"app": "many"}}, "spec": spec});
        world.cluster.admin.create(&world.cluster.path("pods"), pod).await.unwrap();
    }
    for name in ["x", "y", "z"] {
        world.cluster.pod_ready(name).await;
    }
    let spread =
        service(&world, "spread", "many", json!({"ports": [{"port": 80, "targetPort": 8080}]}))
            .await;
    let sticky = service(
        &world,
        "sticky",
        "many",
        json!({"sessionAffinity": "ClientIP", "ports": [{"port": 80, "targetPort": 8080}]}),
    )
    .await;
    let node = world.node.netns().path();
    eventually("connections reach every endpoint", async || {
        let mut hosts = BTreeSet::new();
        for _ in 0..30 {
            hosts.insert(served(&node, (vip(&spread), 80).into()).await.0);
        }
        if hosts.len() == 3 { Ok(()) } else { Err(format!("{hosts:?}")) }
    })
    .await;
    let first = served(&node, (vip(&sticky), 80).into()).await.0;
    for _ in 0..20 {
        assert_eq!(served(&node, (vip(&sticky), 80).into()).await.0, first);
    }
    // Its endpoint goes: the client finds another.
    world.cluster.delete_pod(&first).await.unwrap();
    eventually("the client is moved", async || {
        let host = net::http_get(&node, (vip(&sticky), 80).into(), "/")?.body;
        if host.starts_with(&first) { Err(std::io::Error::other(host)) } else { Ok(()) }
    })
    .await;
    let rest: Vec<&str> = ["x", "y", "z"].into_iter().filter(|n| *n != first).collect();
    world.end(&rest).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mode_can_change_and_leaves_no_rule_behind() {
    let mut world = World::with("proxy-mode", Runtime::Shim, &["--proxy-mode=iptables"]).await;
    world.ready_pod("a", server(8080)).await;
    let s = service(&world, "s", "a", json!({"ports": [{"port": 80, "targetPort": 8080}]})).await;
    let node = world.node.netns().path();
    served(&node, (vip(&s), 80).into()).await;
    let rules = |world: &World| world.node.run("iptables-save", &[]).unwrap_or_default();
    assert!(rules(&world).contains(&vip(&s).to_string()), "{}", rules(&world));
    world.node.end(nix::sys::signal::Signal::SIGTERM).await;
    world.node.start(&["--proxy-mode=nftables"]).unwrap();
    eventually("no rule of the other mode is left", async || {
        let left = rules(&world);
        if left.contains(&vip(&s).to_string()) { Err(left) } else { Ok(()) }
    })
    .await;
    served(&node, (vip(&s), 80).into()).await;
    world.end(&["a"]).await;
}
