//! Whose credentials open which registry: programs that know them, Secrets, and who may use what they
//! brought to the node.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::harness::{Cluster, Lab, Node, NodeOptions, eventually};

use super::registry::{push, registry};
use super::support::{World, container, idle, is_ready, waits_with, with};

/// Writes down what it is asked, and answers by the image's name.
const PROGRAM: &str = r#"#!/bin/sh
asked=$(cat)
echo "$asked" >> /var/lib/providers/asked
case "$asked" in
*/hangs*) echo "$$" > /var/lib/providers/hangs.tmp; mv /var/lib/providers/hangs.tmp /var/lib/providers/hangs; exec sleep 1000 ;;
*/broken*) echo '{"password": "s3cret"'; echo "it says s3cret" >&2; exit 1 ;;
esac
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry",
  "auth":{"127.0.0.1:5001":{"username":"tester","password":"s3cret"}}}'
"#;

const CONFIG: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: test-provider
  matchImages: ["127.0.0.1:5001", "127.0.0.1:5009"]
  defaultCacheDuration: 10m
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  env: [{name: WHO, value: tests}]
  tokenAttributes:
    serviceAccountTokenAudience: https://kubernetes.default.svc.cluster.local
    cacheType: ServiceAccount
    requireServiceAccount: false
"#;

const FLAGS: [&str; 2] = [
    "--image-credential-provider-config=/var/lib/providers/config",
    "--image-credential-provider-bin-dir=/var/lib/providers/bin",
];

/// Puts the program and its configuration onto the node.
fn provide(node: &Node) {
    let dir = node.path("/var/lib/providers");
    for folder in ["config", "bin"] {
        std::fs::create_dir_all(dir.join(folder)).unwrap();
    }
    std::fs::write(dir.join("config/10-test.yaml"), CONFIG).unwrap();
    let program = dir.join("bin/test-provider");
    std::fs::write(&program, PROGRAM).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn asked(node: &Node) -> Vec<Value> {
    let text = std::fs::read_to_string(node.path("/var/lib/providers/asked")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn spec(image: &str, policy: &str) -> Value {
    let of = json!({"image": image, "imagePullPolicy": policy});
    json!({"containers": [with(idle("c"), of)], "terminationGracePeriodSeconds": 1})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credential_providers_open_registries() {
    let lab = Lab::new("pulls-providers").unwrap();
    let cluster = Cluster::new(&lab).await.unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    provide(&node);
    cluster.join(&mut node, &FLAGS).await.unwrap();
    node.configure(|config| config["serializeImagePulls"] = json!(false)).unwrap();
    node.restart().await.unwrap();
    node.ready().await;
    let mut world = World::of(lab, cluster, node);
    let closed = registry(&world.node, 5001, Some(("tester", "s3cret")));
    push(&world.node, "127.0.0.1:5001/demo/private:1", false, Some("tester:s3cret")).await;

    let image = "127.0.0.1:5001/demo/private:1";
    world.ready_pod("one", spec(image, "Always")).await;
    let first = asked(&world.node);
    assert_eq!(first.len(), 1, "{first:?}");
    assert_eq!(first[0]["image"], "127.0.0.1:5001/demo/private");
    let token = first[0]["serviceAccountToken"].as_str().unwrap().to_owned();
    assert_eq!(token.split('.').count(), 3, "no token of the pod's account");
    world.ready_pod("two", spec(image, "Always")).await;
    assert_eq!(asked(&world.node).len(), 1, "the answer is good for ten minutes");

    // A static pod has no account, and is given no token.
    let metadata = json!({"name": "still", "namespace": world.cluster.namespace()});
    let mut manifest = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata});
    manifest["spec"] = spec(image, "Always");
    world.node.put_manifest("still.json", &manifest.to_string()).unwrap();
    let mirror = format!("still-{}", world.node.name());
    world.cluster.pod_ready(&mirror).await;
    let all = asked(&world.node);
    assert_eq!(all.len(), 2);
    assert!(all[1].get("serviceAccountToken").is_none());

    // One that hangs, and one that fails, hold up nobody else.
    let c = &world.cluster;
    c.pod(&world.node, "hangs", spec("127.0.0.1:5009/demo/hangs:1", "Always")).await.unwrap();
    c.pod(&world.node, "broken", spec("127.0.0.1:5001/demo/broken:1", "Always")).await.unwrap();
    let hanging = world.node.path("/var/lib/providers/hangs");
    eventually("the program hangs", async || std::fs::metadata(&hanging)).await;
    let begun = Instant::now();
    world.ready_pod("three", spec(image, "Always")).await;
    assert!(begun.elapsed() < Duration::from_secs(50), "it waited for the one that hangs");
    waits_with(&world, "broken", "broken:1").await;

    // The agent is killed: what runs runs on, and the next one asks anew.
    let before = asked(&world.node).len();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    world.ready_pod("four", spec(image, "Always")).await;
    assert!(asked(&world.node).len() > before);
    assert!(is_ready(&world.cluster.read_pod("one").await.unwrap()));

    let log = world.node.log_tail(100_000);
    assert!(log.contains("ended with exit code 1: it says [hidden]"), "{log}");
    for secret in ["s3cret", token.as_str()] {
        assert!(!log.contains(secret), "the log holds a credential");
    }
    let events = world.cluster.admin.read(&world.cluster.path("events")).await.unwrap();
    assert!(!events.to_string().contains("s3cret"), "an Event holds a credential");
    drop(closed);
    world.node.remove_manifest("still.json").unwrap();
    world.end(&["one", "two", "three", "four", "hangs", "broken"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn providers_that_are_not_there_are_told_at_the_start() {
    let lab = Lab::new("pulls-nowhere").unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    provide(&node);
    std::fs::remove_file(node.path("/var/lib/providers/bin/test-provider")).unwrap();
    let flags = [&FLAGS[..], &["--standalone"]].concat();
    node.start(&flags).unwrap();
    eventually("longshore ends by itself", async || match node.check_alive() {
        Err(_) => Ok(()),
        Ok(()) => Err(anyhow::anyhow!("it runs")),
    })
    .await;
    let log = node.log_tail(20);
    assert!(log.contains("\"test-provider\": /var/lib/providers/bin/test-provider"), "{log}");
    assert!(log.contains("--image-credential-provider-bin-dir"), "{log}");
}

/// A Secret that logs in as `user`.
async fn login(world: &World, name: &str, password: &str) {
    use base64::Engine as _;
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("tester:{password}"));
    let config = json!({"auths": {"127.0.0.1:5001": {"auth": auth}}}).to_string();
    let secret = json!({"metadata": {"name": name}, "type": "kubernetes.io/dockerconfigjson",
        "stringData": {".dockerconfigjson": config}});
    world.cluster.admin.create(&world.cluster.path("secrets"), secret).await.unwrap();
}

fn with_secret(mut spec: Value, name: &str) -> Value {
    spec["imagePullSecrets"] = json!([{"name": name}]);
    spec
}

/// The files in one of the folders of records.
fn records(node: &Node, folder: &str) -> Vec<Value> {
    let dir = node.path("/var/lib/kubelet/image_manager").join(folder);
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("sha256-"))
        .map(|entry| serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_on_the_node_is_for_those_who_may_pull_it() {
    let mut world = World::new("pulls-verified").await;
    let closed = registry(&world.node, 5001, Some(("tester", "s3cret")));
    push(&world.node, "127.0.0.1:5001/demo/private:1", false, Some("tester:s3cret")).await;
    login(&world, "login", "s3cret").await;
    login(&world, "copy", "s3cret").await;
    login(&world, "wrong", "guessed").await;
    let image = "127.0.0.1:5001/demo/private:1";
    let present = spec(image, "IfNotPresent");
    world.ready_pod("puller", with_secret(present.clone(), "login")).await;
    assert!(records(&world.node, "pulling").is_empty());
    let pulled = records(&world.node, "pulled");
    let of = |record: &Value| record["credentialMapping"]["127.0.0.1:5001/demo/private"].clone();
    let record = pulled.iter().find(|record| !of(record).is_null()).unwrap();
    assert_eq!(record["apiVersion"], "kubelet.config.k8s.io/v1beta1");
    let secret = of(record)["kubernetesSecrets"][0].clone();
    assert_eq!(secret["name"], "login");
    assert_eq!(secret["credentialHash"].as_str().unwrap().len(), 64);
    assert!(!record.to_string().contains("s3cret"));

    // Others are told what they would be if it were not here.
    let c = &world.cluster;
    c.pod(&world.node, "nobody", present.clone()).await.unwrap();
    c.pod(&world.node, "guesser", with_secret(present.clone(), "wrong")).await.unwrap();
    c.pod(&world.node, "never", spec(image, "Never")).await.unwrap();
    for pod in ["nobody", "guesser"] {
        waits_with(&world, pod, "private:1").await;
    }
    let told = world.event("never", "ErrImageNeverPull").await;
    assert!(told.ends_with("is not present with pull policy of Never"), "{told}");
    // What was imported is everybody's.
    let example = tests::harness::image::IMAGE;
    world.ready_pod("example", spec(example, "Never")).await;

    // Who has the login needs no registry, also by another Secret and after the agent was killed.
    drop(closed);
    world.node.restart().await.unwrap();
    world.node.ready().await;
    world.ready_pod("same", with_secret(present.clone(), "login")).await;
    world.ready_pod("copied", with_secret(present.clone(), "copy")).await;
    world.ready_pod("never-own", with_secret(spec(image, "Never"), "login")).await;
    for pod in ["nobody", "guesser"] {
        let pod = world.cluster.read_pod(pod).await.unwrap();
        assert!(container(&pod, "c")["state"]["running"].is_null(), "{:#}", pod["status"]);
    }
    let pods = ["puller", "nobody", "guesser", "never", "example", "same", "copied", "never-own"];

    // A policy that trusts all lets them in.
    world
        .node
        .configure(|config| config["imagePullCredentialsVerificationPolicy"] = "NeverVerify".into())
        .unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    for pod in ["nobody", "guesser", "never"] {
        world.cluster.pod_ready(pod).await;
    }
    world.end(&pods).await;
}
