//! Joining: what is written, and what is refused before anything is.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::{Value, json};
use tests::control_plane::faults::{Fault, Rule};
use tests::harness::{Cluster, Lab, Node, NodeOptions, eventually};

async fn setup(name: &str) -> (Lab, Cluster, Node) {
    let lab = Lab::new(name).unwrap();
    let cluster = Cluster::new(&lab).await.unwrap();
    let node = Node::new(&lab, NodeOptions::default()).await.unwrap();
    (lab, cluster, node)
}

/// Runs `longshore join --no-start`: exit code and standard error.
fn join(node: &Node, arguments: &[&str]) -> (Option<i32>, String) {
    let mut all = vec!["join"];
    all.extend(arguments);
    all.extend(["--no-start", "--node-name", node.name()]);
    let output = node.longshore(&all).unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn written(node: &Node) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["/etc/kubernetes", "/var/lib/kubelet"] {
        walk(&node.path(folder), &mut found);
    }
    found
}

fn walk(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), found);
        } else if entry.file_type().is_ok_and(|t| t.is_file()) {
            found.push(entry.path().to_string_lossy().into_owned());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_good_token_writes_credentials_that_only_root_reads() {
    let (_lab, cluster, node) = setup("join-good").await;
    let (server, token, pin) = (
        cluster.server().to_string(),
        cluster.token(3600).await.unwrap(),
        cluster.ca_pin().unwrap(),
    );
    let arguments = [&*server, "--token", &token, "--discovery-token-ca-cert-hash", &pin];
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(0), "{said}");
    let kubeconfig = node.path("/etc/kubernetes/kubelet.conf");
    assert!(kubeconfig.exists(), "{:?}", written(&node));
    for path in written(&node) {
        let meta = std::fs::metadata(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.contains("PRIVATE KEY") || text.contains("client-key-data") {
            assert_eq!(meta.permissions().mode() & 0o077, 0, "{path} is open to others");
        }
        assert!(!text.contains(&token), "{path} holds the bootstrap token");
        // What docs/cis-benchmark.md says of 4.1.5 to 4.1.10.
        let open = if path.ends_with(".crt") { 0o644 } else { 0o600 };
        assert_eq!(
            meta.permissions().mode() & 0o777 & !open,
            0,
            "{path} is more open than {open:o}"
        );
        assert_eq!((meta.uid(), meta.gid()), (0, 0), "{path}");
    }
    for file in ["kubelet.conf", "pki/ca.crt"] {
        assert!(node.path("/etc/kubernetes").join(file).exists(), "{:?}", written(&node));
    }
    assert!(node.path("/var/lib/kubelet/config.yaml").exists(), "{:?}", written(&node));
    // Again, and with a token that is no more: it has joined already.
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(0), "{said}");
    cluster.end(&[node.name()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_and_nothing_is_written() {
    let (_lab, cluster, node) = setup("join-bad").await;
    let server = cluster.server().to_string();
    let good = cluster.token(3600).await.unwrap();
    let expired = cluster.token(-10).await.unwrap();
    let pin = cluster.ca_pin().unwrap();
    let wrong_pin = format!("sha256:{}", "0".repeat(64));
    let wrong_secret = format!("{}.{}", good.split('.').next().unwrap(), "0".repeat(16));
    for (what, server, token, pin, code, hint) in [
        ("unknown token", &*server, "abcdef.0123456789abcdef", &*pin, 12, "token"),
        ("wrong secret", &server, &wrong_secret, &pin, 13, "signature"),
        ("expired token", &server, &expired, &pin, 12, "token"),
        ("wrong pin", &server, &good, &wrong_pin, 14, "sha256:"),
        ("malformed token", &server, "nonsense", &pin, 64, "token"),
        ("malformed pin", &server, &good, "sha256:xyz", 64, "sha256"),
        ("nobody there", "10.99.0.1:1", &good, &pin, 10, "10.99.0.1:1"),
    ] {
        let arguments = [
            server,
            "--token",
            token,
            "--discovery-token-ca-cert-hash",
            pin,
            "--timeout",
            "5",
            "--discovery-timeout",
            "2",
        ];
        let (got, said) = join(&node, &arguments);
        assert_eq!(got, Some(code), "{what}: {said}");
        assert!(said.contains(hint), "{what} does not mention {hint:?}: {said}");
        let secret = good.split('.').nth(1).unwrap();
        assert!(!said.contains(secret), "{what} shows the secret: {said}");
        assert_eq!(written(&node), Vec::<String>::new(), "{what}");
    }
    cluster.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_come_from_files_and_discovery_too() {
    let (_lab, cluster, node) = setup("join-files").await;
    let server = cluster.server().to_string();
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    let file = node.dir().join("token");
    std::fs::write(&file, format!("{token}\n")).unwrap();
    let file = file.to_string_lossy().into_owned();
    let (code, said) =
        join(&node, &[&server, "--token-file", &file, "--discovery-token-ca-cert-hash", &pin]);
    assert_eq!(code, Some(0), "{said}");
    std::fs::remove_file(node.path("/etc/kubernetes/kubelet.conf")).unwrap();
    let _ = std::fs::remove_dir_all(node.path("/var/lib/kubelet/pki"));
    let info: Value =
        cluster.admin.read("/api/v1/namespaces/kube-public/configmaps/cluster-info").await.unwrap();
    let discovery = node.dir().join("discovery.conf");
    std::fs::write(&discovery, info["data"]["kubeconfig"].as_str().unwrap()).unwrap();
    let discovery = discovery.to_string_lossy().into_owned();
    let (code, said) = join(&node, &["--discovery-file", &discovery, "--token", &token]);
    assert_eq!(code, Some(0), "{said}");
    assert!(node.path("/etc/kubernetes/kubelet.conf").exists());
    cluster.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_waits_for_approval_and_says_so_when_none_comes() {
    let (_lab, cluster, node) = setup("join-approval").await;
    let Some(plane) = cluster.fake_plane() else {
        eprintln!("not on a real control plane: it approves by itself");
        return cluster.end(&[]).await;
    };
    let server = cluster.server().to_string();
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    plane.approve_csrs(false);
    let arguments =
        [&*server, "--token", &token, "--discovery-token-ca-cert-hash", &pin, "--timeout", "3"];
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(17), "{said}");
    assert!(said.contains("approv"), "{said}");
    assert!(!node.path("/etc/kubernetes/kubelet.conf").exists());
    plane.approve_csrs(true);
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_errs_is_asked_again() {
    let (_lab, cluster, node) = setup("join-errors").await;
    let Some(plane) = cluster.fake_plane() else {
        eprintln!("not on a real control plane: it cannot be told to err");
        return cluster.end(&[]).await;
    };
    let server = cluster.server().to_string();
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    for fault in
        [Fault::Code(500), Fault::Garbage, Fault::Reset, Fault::Code(429), Fault::Truncated]
    {
        plane.faults().add(Rule::all(fault).times(1));
    }
    let (code, said) = join(
        &node,
        &[&server, "--token", &token, "--discovery-token-ca-cert-hash", &pin, "--timeout", "60"],
    );
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_differs_and_a_server_that_is_not_ready_are_told_apart() {
    let (_lab, cluster, node) = setup("join-clock").await;
    let Some(plane) = cluster.fake_plane() else {
        eprintln!("not on a real control plane: its clock cannot be set");
        return cluster.end(&[]).await;
    };
    let server = cluster.server().to_string();
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    let arguments = [
        &*server,
        "--token",
        &token,
        "--discovery-token-ca-cert-hash",
        &pin,
        "--discovery-timeout",
        "1",
    ];
    for (fault, code, hint) in [
        (Fault::Clock(3600), 15, "60 min behind"),
        (Fault::Clock(-7200), 15, "2 h ahead of"),
        (Fault::Code(503), 11, "not ready"),
    ] {
        plane.faults().add(Rule::all(fault.clone()));
        let (got, said) = join(&node, &arguments);
        assert_eq!(got, Some(code), "{fault:?}: {said}");
        assert!(said.contains(hint), "{fault:?}: {said}");
        assert_eq!(written(&node), Vec::<String>::new(), "{fault:?}");
        plane.faults().clear();
    }
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_a_live_node_has_is_not_taken() {
    let (_lab, cluster, node) = setup("join-taken").await;
    let server = cluster.server().to_string();
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    let path = format!("/api/v1/nodes/{}", node.name());
    let status = json!({"conditions": [{"type": "Ready", "status": "True"}],
        "addresses": [{"type": "InternalIP", "address": "192.0.2.9"}]});
    let object = json!({"metadata": {"name": node.name()}, "status": status});
    cluster.admin.create("/api/v1/nodes", object).await.unwrap();
    let merge = tests::harness::caller::MERGE;
    cluster.admin.patch(&format!("{path}/status"), merge, json!({"status": status})).await;
    let arguments = [&*server, "--token", &token, "--discovery-token-ca-cert-hash", &pin];
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(18), "{said}");
    assert!(said.contains("192.0.2.9") && said.contains("kubectl delete node"), "{said}");
    assert_eq!(written(&node), Vec::<String>::new());
    cluster.admin.remove(&path).await.unwrap();
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(0), "{said}");
    cluster.end(&[node.name()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_request_is_not_asked_again_with_the_same_key() {
    let (_lab, cluster, node) = setup("join-denied").await;
    let Some(plane) = cluster.fake_plane() else {
        eprintln!("not on a real control plane: it approves by itself");
        return cluster.end(&[]).await;
    };
    let server = cluster.server().to_string();
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    let arguments = [&*server, "--token", &token, "--discovery-token-ca-cert-hash", &pin];
    plane.approve_csrs(false);
    let path = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let deny = async {
        let mut request = eventually("a request is there", async || {
            let all = cluster.admin.read(path).await?;
            all["items"].as_array().and_then(|a| a.first()).cloned().ok_or(anyhow::anyhow!("none"))
        })
        .await;
        request["status"]["conditions"] =
            json!([{"type": "Denied", "status": "True", "message": "not from here"}]);
        let name = request["metadata"]["name"].as_str().unwrap().to_owned();
        let (code, answer) = cluster.admin.put(&format!("{path}/{name}/approval"), request).await;
        assert_eq!(code, 200, "{answer}");
    };
    let (code, said) = std::thread::scope(|scope| {
        let joining = scope.spawn(|| join(&node, &arguments));
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(deny));
        joining.join().unwrap()
    });
    assert_eq!(code, Some(16), "{said}");
    assert!(said.contains("not from here"), "{said}");
    assert_eq!(written(&node), Vec::<String>::new());
    plane.approve_csrs(true);
    let (code, said) = join(&node, &arguments);
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubeadms_join_configuration_is_taken() {
    let (_lab, cluster, mut node) = setup("join-config").await;
    let (token, pin) = (cluster.token(3600).await.unwrap(), cluster.ca_pin().unwrap());
    let other = format!("sha256:{}", "1".repeat(64));
    let patches = node.dir().join("patches");
    std::fs::create_dir(&patches).unwrap();
    let text = format!(
        "apiVersion: kubeadm.k8s.io/v1beta4\nkind: JoinConfiguration\ndiscovery: {{bootstrapToken: \
         {{apiServerEndpoint: \"{}\", token: {token}, caCertHashes: [\"{other}\", \"{pin}\"]}}}}\n\
         nodeRegistration: {{kubeletExtraArgs: [{{name: node-labels, value: team=blue}}]}}\npatches: {{directory: {}}}\n",
        cluster.server(),
        patches.display()
    );
    let file = node.dir().join("join.yaml");
    std::fs::write(&file, text).unwrap();
    let file = file.to_string_lossy().into_owned();
    let patch = patches.join("kubeletconfiguration+json.json");
    std::fs::write(&patch, r#"[{"op": "replace", "path": "/nothing", "value": 1}]"#).unwrap();
    let (code, said) = join(&node, &["--config", &file]);
    assert_ne!(code, Some(0), "{said}");
    assert!(said.contains("kubeletconfiguration+json.json: does not fit"), "{said}");
    assert_eq!(written(&node), Vec::<String>::new());
    std::fs::write(&patch, r#"[{"op": "add", "path": "/maxPods", "value": 42}]"#).unwrap();
    let (code, said) = join(&node, &["--config", &file]);
    assert_eq!(code, Some(0), "{said}");
    node.start(&[]).unwrap();
    cluster.node_ready(node.name()).await;
    let object = cluster.admin.read(&format!("/api/v1/nodes/{}", node.name())).await.unwrap();
    assert_eq!(object["metadata"]["labels"]["team"], "blue");
    assert_eq!(object["status"]["capacity"]["pods"], "42");
    cluster.end(&[node.name()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_looks_before_a_join_and_after() {
    let (_lab, cluster, mut node) = setup("join-doctor").await;
    let server = cluster.server().to_string();
    let examine = |node: &Node, arguments: &[&str]| -> (Option<i32>, Value) {
        let mut all = vec!["doctor", "-o", "json"];
        all.extend(arguments);
        let output = node.longshore(&all).unwrap();
        (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
    };
    let level = |report: &Value, check: &str| -> String {
        let all = report["findings"].as_array().unwrap();
        let found = all.iter().filter(|f| f["check"] == check);
        found.map(|f| f["level"].as_str().unwrap()).max().unwrap_or("none").to_owned()
    };
    let (_, before) = examine(&node, &[&server]);
    for (check, expected) in [("api", "ok"), ("certificates", "ok"), ("ports", "ok")] {
        assert_eq!(level(&before, check), expected, "{before:#}");
    }
    let (code, away) = examine(&node, &["10.99.0.1:1"]);
    assert_eq!((code, &away["ok"]), (Some(1), &json!(false)), "{away:#}");
    assert_eq!(level(&away, "api"), "error", "{away:#}");
    for finding in away["findings"].as_array().unwrap() {
        assert!(finding["level"] == "ok" || finding["remedy"].is_string(), "{finding}");
    }
    cluster.join(&mut node, &[]).await.unwrap();
    let (_, after) = examine(&node, &[]);
    for check in ["api", "certificates", "node", "ports", "processes"] {
        assert_eq!(level(&after, check), "ok", "{check}: {after:#}");
    }
    cluster.end(&[node.name()]).await;
}
