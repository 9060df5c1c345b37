//! A joined node with its control plane, and the small questions that suites ask.

use serde_json::{Value, json};
use tests::harness::cluster::condition;
use tests::harness::node::Runtime;
use tests::harness::peers::Peers;
use tests::harness::{Cluster, Lab, Node, NodeOptions};

/// One node in a cluster. Fields end in this order: node, control plane, network.
pub struct World {
    _peers: Option<Peers>,
    pub node: Node,
    pub cluster: Cluster,
    pub lab: Lab,
}

impl World {
    /// A Ready node over the built-in runtime, with the example image.
    pub async fn new(name: &str) -> Self {
        Self::with(name, Runtime::Shim, &[]).await
    }

    /// A Ready node over `runtime`, run with further flags. With `LONGSHORE_TEST_PEERS` it is
    /// kubelet's, to check the suite rather than the product.
    pub async fn with(name: &str, runtime: Runtime, flags: &[&str]) -> Self {
        let lab = Lab::new(name).unwrap();
        let cluster = Cluster::new(&lab).await.unwrap();
        if let Some(folder) = std::env::var_os("LONGSHORE_TEST_PEERS") {
            let options = NodeOptions { runtime: Runtime::Containerd, ..NodeOptions::default() };
            let node = Node::new(&lab, options).await.unwrap();
            let peers = Peers::start(&cluster, &node, folder.as_ref()).await.unwrap();
            node.import_example_image().unwrap();
            return Self { _peers: Some(peers), node, cluster, lab };
        }
        let options = NodeOptions { runtime, ..NodeOptions::default() };
        let mut node = Node::new(&lab, options).await.unwrap();
        cluster.join(&mut node, flags).await.unwrap();
        Self { _peers: None, node, cluster, lab }
    }

    /// A Ready node whose /var/lib is a file system of its own of `size` (as for tmpfs).
    pub async fn with_disk(name: &str, size: &str) -> Self {
        let lab = Lab::new(name).unwrap();
        let cluster = Cluster::new(&lab).await.unwrap();
        let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
        let options = format!("size={size}");
        node.run("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", "/var/lib"]).unwrap();
        cluster.join(&mut node, &[]).await.unwrap();
        Self { _peers: None, node, cluster, lab }
    }

    /// A node that has joined already.
    pub fn of(lab: Lab, cluster: Cluster, node: Node) -> Self {
        Self { _peers: None, node, cluster, lab }
    }

    /// Creates a pod and waits until it is Ready.
    pub async fn ready_pod(&self, name: &str, spec: Value) -> Value {
        self.cluster.pod(&self.node, name, spec).await.unwrap();
        self.cluster.pod_ready(name).await
    }

    /// Runs a pod to its end and returns the termination message of its container `c`.
    pub async fn run_to_end(&self, name: &str, mut spec: Value) -> String {
        spec["restartPolicy"] = "Never".into();
        self.cluster.pod(&self.node, name, spec).await.unwrap();
        let pod = self.cluster.pod_until(name, "ended", ended).await;
        let end = &container(&pod, "c")["state"]["terminated"];
        assert_eq!(end["exitCode"], 0, "{name}: {:#}", pod["status"]);
        end["message"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits for an Event about `object` with this reason and returns its message.
    pub async fn event(&self, object: &str, reason: &str) -> String {
        tests::harness::eventually(&format!("an Event {reason} about {object}"), async || {
            let events = self.cluster.admin.read(&self.cluster.path("events")).await?;
            let all = events["items"].as_array().cloned().unwrap_or_default();
            all.iter()
                .find(|e| e["involvedObject"]["name"] == object && e["reason"] == reason)
                .map(|e| e["message"].as_str().unwrap_or_default().to_owned())
                .ok_or_else(|| {
                    let seen: Vec<String> = all
                        .iter()
                        .map(|e| {
                            format!(
                                "{} {} {}",
                                e["involvedObject"]["name"], e["reason"], e["message"]
                            )
                        })
                        .collect();
                    anyhow::anyhow!("{}", seen.join("\n"))
                })
        })
        .await
    }

    /// Deletes these pods, and checks that nothing of any pod is left.
    pub async fn end(self, pods: &[&str]) {
        for pod in pods {
            self.cluster.delete_pod(pod).await.unwrap();
        }
        self.node.nothing_of_pods_left().await;
        self.cluster.end(&[self.node.name()]).await;
    }
}

/// A container that runs a shell script.
pub fn sh(name: &str, script: &str) -> Value {
    json!({"name": name, "command": ["sh", "-c", script]})
}

/// A container that idles and ends at once on SIGTERM.
pub fn idle(name: &str) -> Value {
    sh(name, "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done")
}

/// `base` with the fields of `more`.
pub fn with(mut base: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

/// The status of a container, init container or not.
pub fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    ["containerStatuses", "initContainerStatuses"]
        .iter()
        .flat_map(|list| pod["status"][list].as_array().into_iter().flatten())
        .find(|c| c["name"] == name)
        .unwrap_or(&Value::Null)
}

/// Succeeded or Failed.
pub fn ended(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
}

/// Restarts of a container.
pub fn restarts(pod: &Value, name: &str) -> u64 {
    container(pod, name)["restartCount"].as_u64().unwrap_or(0)
}

/// Ready, or not.
pub fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready") == Some("True")
}

/// The waiting container's message once it holds `words`.
pub async fn waits_with(world: &World, pod: &str, words: &str) -> Value {
    world
        .cluster
        .pod_until(pod, words, |p| {
            let waiting = &container(p, "c")["state"]["waiting"];
            waiting["message"].as_str().is_some_and(|m| m.contains(words))
        })
        .await
}
