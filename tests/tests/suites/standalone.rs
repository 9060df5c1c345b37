//! A node without a control plane: a folder of manifests is all it knows.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::Value;
use tests::harness::command::{command_line, processes_of};
use tests::harness::{Lab, Node, NodeOptions, eventually, net};

/// A standalone node in its network; the node ends first.
async fn standalone(name: &str) -> (Lab, Node) {
    let lab = Lab::new(name).unwrap();
    let mut node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    node.start(&[
        "--standalone",
        "--manifests",
        "/etc/kubernetes/manifests",
        "--pod-cidr=10.244.7.0/24",
    ])
    .unwrap();
    node.ready().await;
    node.import_example_image().unwrap();
    (lab, node)
}

fn status(node: &Node) -> anyhow::Result<Value> {
    let output = node.longshore(&["status", "-o", "json"])?;
    let text = tests::harness::command::checked("longshore status", &output)?;
    Ok(serde_json::from_str(&text)?)
}

/// The entry of `status` about an object of this name.
fn entry(status: &Value, list: &str, name: &str) -> Value {
    let items = status[list].as_array().cloned().unwrap_or_default();
    items.into_iter().find(|o| o["name"] == name).unwrap_or(Value::Null)
}

fn pod(name: &str, port: u16, extra: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: c, image: "longshore.local/demo/busybox:1", command: [workload, http, "{port}"], ports: [{{name: web, containerPort: {port}}}]}}
{extra}"#
    )
}

fn service(name: &str, app: &str, spec: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {app}}}, ports: [{{port: 80, targetPort: web}}]{spec}}}
"#
    )
}

async fn says(from: &Path, to: &str, expected: &str) -> String {
    let to: SocketAddr = to.parse().unwrap();
    eventually(&format!("{to} answers {expected:?}"), async || {
        let answer = net::http_get(from, to, "/")?;
        if answer.body.contains(expected) {
            Ok(answer.body)
        } else {
            Err(std::io::Error::other(answer.body))
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_of_the_readme_runs() {
    let (lab, node) = standalone("standalone-demo").await;
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    for file in ["web.yaml", "worker.yaml"] {
        node.put_manifest(file, &std::fs::read_to_string(examples.join(file)).unwrap()).unwrap();
    }
    let inside = node.netns().path();
    says(&inside, "10.96.0.80:80", "Hello from web").await;
    says(&inside, "10.99.0.2:30080", "Hello from web").await;
    says(&lab.outside().path(), "10.99.0.2:30080", "Hello from web").await;
    eventually("status shows pods and services", async || {
        let status = status(&node)?;
        let (web, service) = (
            entry(&status, "pods", &format!("web-{}", node.name())),
            entry(&status, "services", "web"),
        );
        if web.is_object() && service["clusterIP"] == "10.96.0.80" {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{status:#}"))
        }
    })
    .await;
    let top = |arguments: &[&str]| -> anyhow::Result<String> {
        let output = node.longshore(arguments)?;
        tests::harness::command::checked("longshore top", &output)
    };
    eventually("top shows what pods use", async || {
        let shown: Value = serde_json::from_str(&top(&["top", "-o", "json"])?)?;
        let web = entry(&shown, "pods", &format!("web-{}", node.name()));
        let usage = &web["usage"];
        anyhow::ensure!(usage["memoryBytes"].as_u64() > Some(0), "{shown:#}");
        anyhow::ensure!(usage["cpuNanoCores"].is_u64(), "{shown:#}");
        anyhow::ensure!(entry(&shown, "services", "web")["readyEndpoints"] == 1, "{shown:#}");
        Ok(())
    })
    .await;
    // Not a terminal: one snapshot, without escapes.
    let plain = top(&["top"]).unwrap();
    for word in ["NODE  ", "POD", "SERVICE", "LAST EVENTS", "10.96.0.80", "1/1 ready"] {
        assert!(plain.contains(word), "{word} in:\n{plain}");
    }
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    for file in ["web.yaml", "worker.yaml"] {
        node.remove_manifest(file).unwrap();
    }
    node.nothing_of_pods_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manifests_are_followed() {
    let (_lab, node) = standalone("standalone-follow").await;
    let inside = node.netns().path();
    node.put_manifest(
        "one.yaml",
        &(pod("one", 8080, "") + "---" + &service("svc", "one", ", clusterIP: 10.96.0.50")),
    )
    .unwrap();
    says(&inside, "10.96.0.50:80", "one-node").await;
    // Changed: another pod behind the same Service.
    node.put_manifest(
        "one.yaml",
        &(pod("two", 8081, "") + "---" + &service("svc", "two", ", clusterIP: 10.96.0.50")),
    )
    .unwrap();
    says(&inside, "10.96.0.50:80", "two-node").await;
    // JSON is YAML, and a second file stands for itself.
    let json = serde_json::json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "three", "labels": {"app": "two"}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": tests::harness::image::IMAGE,
            "command": ["workload", "http", "8081"], "ports": [{"name": "web", "containerPort": 8081}]}]}});
    node.put_manifest("three.json", &json.to_string()).unwrap();
    says(&inside, "10.96.0.50:80", "three-node").await;
    node.remove_manifest("one.yaml").unwrap();
    eventually("the Service is gone", async || {
        match net::http_get(&inside, ([10, 96, 0, 50], 80).into(), "/") {
            Err(_) => Ok(()),
            Ok(a) => Err(a.body),
        }
    })
    .await;
    node.remove_manifest("three.json").unwrap();
    node.nothing_of_pods_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_manifests_stop_nobody_else() {
    let (_lab, mut node) = standalone("standalone-bad").await;
    let inside = node.netns().path();
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\ni: [*h,*h,*h,*h,*h,*h,*h,*h,*h]\n";
    for (name, text) in [
        ("truncated.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: x\nspec:".to_owned()),
        ("binary.yaml", "\u{0}\u{1}\u{2}not yaml".to_owned()),
        ("bomb.yaml", bomb.to_owned()),
        ("deep.yaml", "[".repeat(100_000)),
        ("unknown-kind.yaml", "apiVersion: v9\nkind: Nonsense\nmetadata: {name: x}\n".to_owned()),
        ("unknown-field.yaml", pod("typo", 1, "  conTainers: []\n")),
        ("no-image.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: noimage}\nspec: {containers: [{name: c}]}\n".to_owned()),
        ("climber.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: ../../etc}\nspec: {containers: [{name: c, image: x}]}\n".to_owned()),
        ("bad-port.yaml", service("bad", "fine", ", clusterIP: 10.96.0.51").replace("port: 80", "port: 99999")),
        ("empty.yaml", String::new()),
        // One document of a file is bad, the others are served.
        ("mixed.yaml", pod("fine", 8080, "") + "---\nkind: Pod\n---" + &service("svc", "fine", ", clusterIP: 10.96.0.52")),
    ] {
        node.put_manifest(name, &text).unwrap();
    }
    says(&inside, "10.96.0.52:80", "fine-node").await;
    node.check_alive().unwrap();
    let log = node.log_tail(10_000);
    for name in
        ["truncated.yaml", "unknown-kind.yaml", "no-image.yaml", "climber.yaml", "bad-port.yaml"]
    {
        assert!(log.contains(name), "the log does not name {name}");
    }
    // Mended, it is taken.
    node.put_manifest(
        "truncated.yaml",
        &(pod("mended", 8080, "")
            + "---"
            + &service("mended", "mended", ", clusterIP: 10.96.0.53")),
    )
    .unwrap();
    says(&inside, "10.96.0.53:80", "mended-node").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_are_stable_and_containers_outlive_a_kill() {
    let (lab, mut node) = standalone("standalone-kill").await;
    node.put_manifest(
        "web.yaml",
        &(pod("web", 8080, "") + "---" + &service("svc", "web", ", type: NodePort")),
    )
    .unwrap();
    let addresses = |node: &Node| -> anyhow::Result<(String, u64)> {
        let status = status(node)?;
        let service = entry(&status, "services", "svc");
        match (service["clusterIP"].as_str(), service["nodePort"].as_u64()) {
            (Some(ip), Some(port)) => Ok((ip.to_owned(), port)),
            _ => Err(anyhow::anyhow!("{status:#}")),
        }
    };
    let (ip, port) = eventually("the Service has addresses", async || addresses(&node)).await;
    let inside = node.netns().path();
    says(&inside, &format!("{ip}:80"), &format!("web-{} ", node.name())).await;
    let servers = |node: &Node| -> Vec<u32> {
        processes_of(node.init_pid())
            .into_iter()
            .filter(|pid| command_line(*pid).starts_with("workload http"))
            .collect()
    };
    let before = servers(&node);
    assert_eq!(before.len(), 1);
    for _ in 0..3 {
        node.end(nix::sys::signal::Signal::SIGKILL).await;
        // Served on without longshore.
        says(&lab.outside().path(), &format!("10.99.0.2:{port}"), &format!("web-{} ", node.name()))
            .await;
        node.restart().await.unwrap();
        node.ready().await;
        assert_eq!(
            eventually("addresses are known again", async || addresses(&node)).await,
            (ip.clone(), port)
        );
        says(&inside, &format!("{ip}:80"), &format!("web-{} ", node.name())).await;
        assert_eq!(servers(&node), before, "the container was restarted");
    }
    // Its process killed, it comes back.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(before[0] as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    eventually("the container comes back", async || {
        let now = servers(&node);
        if now.len() == 1 && now != before { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    says(&inside, &format!("{ip}:80"), &format!("web-{} ", node.name())).await;
    node.remove_manifest("web.yaml").unwrap();
    node.nothing_of_pods_left().await;
}

/// A pod with `hostUsers: false` that copies a ConfigMap's file into its emptyDir.
fn userns_pod(name: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  securityContext: {{fsGroup: 3000}}
  volumes:
  - {{name: data, emptyDir: {{}}}}
  - {{name: config, configMap: {{name: greeting}}}}
  containers:
  - name: c
    image: "longshore.local/demo/busybox:1"
    command: [sh, -c, "cat /config/text > /data/copied && exec workload http 80"]
    volumeMounts: [{{name: data, mountPath: /data}}, {{name: config, mountPath: /config}}]
    ports: [{{hostPort: {port}, containerPort: 80}}]
"#,
        port = if name == "one" { 8881 } else { 8882 }
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_with_users_of_their_own_are_nobody_on_the_node() {
    use std::os::unix::fs::MetadataExt as _;
    let (lab, mut node) = standalone("standalone-userns").await;
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: greeting}\ndata: {text: hello}\n";
    node.put_manifest("map.yaml", map).unwrap();
    for name in ["one", "two"] {
        node.put_manifest(&format!("{name}.yaml"), &userns_pod(name)).unwrap();
    }
    let outside = lab.outside().path();
    // Root of the namespace binds port 80, and the node forwards to it.
    says(&outside, "10.99.0.2:8881", "one-node").await;
    says(&outside, "10.99.0.2:8882", "two-node").await;
    // By the pod's name: its process's owner on the node.
    let servers = |node: &Node| -> Vec<(u32, u32)> {
        let mut found: Vec<_> = processes_of(node.init_pid())
            .into_iter()
            .filter(|pid| command_line(*pid).starts_with("workload http"))
            .filter_map(|pid| Some((std::fs::metadata(format!("/proc/{pid}")).ok()?.uid(), pid)))
            .collect();
        found.sort_unstable();
        found
    };
    let before = servers(&node);
    let owners: Vec<u32> = before.iter().map(|(uid, _)| *uid).collect();
    assert_eq!(owners, [65_536, 131_072]);
    // What it wrote to its volume belongs to who it is inside.
    let pods = node.path("/var/lib/kubelet/pods");
    let mut copies = 0;
    for pod in std::fs::read_dir(&pods).unwrap().flatten() {
        let data = pod.path().join("volumes/kubernetes.io~empty-dir/data");
        let copied = data.join("copied");
        assert_eq!(std::fs::read_to_string(&copied).unwrap(), "hello");
        let (meta, folder) = (copied.metadata().unwrap(), data.metadata().unwrap());
        assert_eq!((meta.uid(), meta.gid(), folder.gid()), (0, 3000, 3000));
        assert!(pod.path().join("userns").exists());
        copies += 1;
    }
    assert_eq!(copies, 2);
    node.end(nix::sys::signal::Signal::SIGKILL).await;
    node.restart().await.unwrap();
    node.ready().await;
    assert_eq!(servers(&node), before, "the containers were restarted");
    // One of them comes back with the same users, made by another process than the first.
    let one = i32::try_from(before[0].1).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(one), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    eventually("the container comes back", async || {
        let now = servers(&node);
        let same = now.iter().map(|(uid, _)| *uid).eq(owners.iter().copied());
        if same && now != before { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    says(&outside, "10.99.0.2:8881", "one-node").await;
    for name in ["one", "two"] {
        node.remove_manifest(&format!("{name}.yaml")).unwrap();
    }
    node.nothing_of_pods_left().await;
    assert_eq!(std::fs::read_dir(&pods).unwrap().count(), 0);
}
