//! `kill -9` of `longshore` at any moment: no container is restarted by it, nothing leaks, and in
//! the end the statuses are right.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tests::harness::eventually;

use crate::support::{World, container, idle, is_ready, restarts, sh};

/// The seed of this run: printed, and given again by `LONGSHORE_TEST_SEED`.
pub fn seed() -> u64 {
    let seed = std::env::var("LONGSHORE_TEST_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    eprintln!("LONGSHORE_TEST_SEED={seed}");
    seed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_is_invisible() {
    let mut world = World::new("restart-once").await;
    let pod = world.ready_pod("steady", json!({"containers": [idle("c")]})).await;
    let node =
        world.cluster.admin.read(&format!("/api/v1/nodes/{}", world.node.name())).await.unwrap();
    // Ends while nobody looks: its exit code is not lost.
    world
        .ready_pod(
            "ends",
            json!({"restartPolicy": "Never", "containers": [sh("c", "sleep 1.5; exit 42")]}),
        )
        .await;
    world.node.end(nix::sys::signal::Signal::SIGKILL).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let ended =
        world.cluster.pod_until("ends", "failed", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(container(&ended, "c")["state"]["terminated"]["exitCode"], 42);
    let after = world.cluster.read_pod("steady").await.unwrap();
    assert_eq!(container(&after, "c"), container(&pod, "c"), "the status did not even flicker");
    let transitions = |object: &Value| -> Vec<Value> {
        object["status"]["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| json!([c["type"], c["status"], c["lastTransitionTime"]]))
            .collect()
    };
    assert_eq!(transitions(&after), transitions(&pod));
    let node_after =
        world.cluster.admin.read(&format!("/api/v1/nodes/{}", world.node.name())).await.unwrap();
    assert_eq!(transitions(&node_after), transitions(&node));
    world.end(&["steady", "ends"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_during_a_churn_of_pods() {
    let mut world = World::new("restart-churn").await;
    let mut random = fastrand::Rng::with_seed(seed());
    let mut steady = BTreeMap::new();
    for i in 0..4 {
        let name = format!("steady-{i}");
        let pod = world.ready_pod(&name, json!({"containers": [idle("c"), idle("d")]})).await;
        steady.insert(name, pod);
    }
    let mut live: Vec<String> = Vec::new();
    let mut made = 0;
    for _ in 0..20 {
        for _ in 0..random.usize(1..3) {
            if random.bool() || live.len() < 2 {
                made += 1;
                let name = format!("churn-{made}");
                world.cluster.pod(&world.node, &name, json!({"volumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}],
                    "containers": [{"name": "c", "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"],
                        "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]})).await.unwrap();
                live.push(name);
            } else {
                let name = live.swap_remove(random.usize(..live.len()));
                world
                    .cluster
                    .admin
                    .remove(&world.cluster.path(&format!("pods/{name}")))
                    .await
                    .unwrap();
            }
        }
        tokio::time::sleep(Duration::from_millis(random.u64(0..700))).await;
        world.node.restart().await.unwrap();
    }
    for name in &live {
        let pod = world.cluster.pod_ready(name).await;
        assert_eq!(restarts(&pod, "c"), 0, "{name} was restarted: {}", pod["status"]);
    }
    for (name, before) in &steady {
        let now = world.cluster.pod_until(name, "Ready", is_ready).await;
        for c in ["c", "d"] {
            assert_eq!(
                container(&now, c)["containerID"],
                container(before, c)["containerID"],
                "{name} {c}"
            );
            assert_eq!(restarts(&now, c), 0, "{name} {c}");
        }
    }
    eventually("only the living have pods", async || {
        let list = world.cluster.admin.read(&world.cluster.path("pods")).await?;
        let count = list["items"].as_array().map_or(0, Vec::len);
        if count == live.len() + steady.len() {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{count} pods"))
        }
    })
    .await;
    let all: Vec<String> = live.into_iter().chain(steady.into_keys()).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    world.end(&all).await;
}
