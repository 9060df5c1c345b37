//! Neighbours that fail: each failure is told where a user looks, and nobody else notices.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use base64::Engine as _;
use serde_json::json;

use super::registry::{push, registry};
use super::support::{World, idle, is_ready, waits_with, with};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cni_plugin_that_fails_is_quoted_and_got_over() {
    let flags = ["--cni-bin-dir=/var/lib/broken-cni"];
    let world = World::with("faults-cni", tests::harness::node::Runtime::Shim, &flags).await;
    world.ready_pod("before", json!({"containers": [idle("c")]})).await;
    let bin = world.node.path("/var/lib/broken-cni");
    std::fs::create_dir_all(&bin).unwrap();
    let plugin = bin.join("broken");
    let script = "#!/bin/sh\necho 'said on stderr' >&2\n\
        echo '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"no address is left\"}'\nexit 1\n";
    std::fs::write(&plugin, script).unwrap();
    std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
    let conf = world.node.path("/etc/cni/net.d/10-broken.conflist");
    std::fs::create_dir_all(conf.parent().unwrap()).unwrap();
    let list = json!({"cniVersion": "1.0.0", "name": "broken", "plugins": [{"type": "broken"}]});
    std::fs::write(&conf, list.to_string()).unwrap();

    world.cluster.pod(&world.node, "held", json!({"containers": [idle("c")]})).await.unwrap();
    let told = world.event("held", "FailedCreatePodSandBox").await;
    assert!(told.contains("no address is left"), "{told}");
    let host = json!({"hostNetwork": true, "containers": [idle("c")]});
    world.ready_pod("host", host).await;
    assert!(is_ready(&world.cluster.read_pod("before").await.unwrap()));
    std::fs::remove_file(&conf).unwrap();
    world.cluster.pod_ready("held").await;
    world.end(&["before", "held", "host"]).await;
}

/// Flips a byte in the middle of the largest blob under `dir`.
fn damage(dir: &Path) {
    let mut largest = (0, dir.to_owned());
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let meta = entry.metadata().unwrap();
            if meta.is_dir() {
                folders.push(entry.path());
            } else if meta.len() > largest.0 {
                largest = (meta.len(), entry.path());
            }
        }
    }
    let mut bytes = std::fs::read(&largest.1).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest.1, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_registry_does_wrong_is_said_and_credentials_open_it() {
    let world = World::new("faults-registry").await;
    let open = registry(&world.node, 5000, None);
    push(&world.node, "127.0.0.1:5000/demo/bad:1", true, None).await;
    damage(&world.node.dir().join("registry-5000/data"));
    push(&world.node, "127.0.0.1:5000/demo/good:1", false, None).await;
    let closed = registry(&world.node, 5001, Some(("tester", "s3cret")));
    push(&world.node, "127.0.0.1:5001/demo/private:1", false, Some("tester:s3cret")).await;

    let spec = |image: &str| json!({"containers": [with(idle("c"), json!({"image": image, "imagePullPolicy": "Always"}))]});
    let c = &world.cluster;
    c.pod(&world.node, "bad", spec("127.0.0.1:5000/demo/bad:1")).await.unwrap();
    c.pod(&world.node, "closed", spec("127.0.0.1:5001/demo/private:1")).await.unwrap();
    world.ready_pod("good", spec("127.0.0.1:5000/demo/good:1")).await;
    waits_with(&world, "bad", "sha256:").await;
    let told = world.event("bad", "Failed").await;
    assert!(told.contains("bad:1"), "{told}");
    waits_with(&world, "closed", "private:1").await;

    let token = base64::engine::general_purpose::STANDARD.encode("tester:s3cret");
    let login = json!({"auths": {"127.0.0.1:5001": {"auth": token}}}).to_string();
    let secret = json!({"metadata": {"name": "login"}, "type": "kubernetes.io/dockerconfigjson",
        "stringData": {".dockerconfigjson": login}});
    c.admin.create(&c.path("secrets"), secret).await.unwrap();
    let mut opened = spec("127.0.0.1:5001/demo/private:1");
    opened["imagePullSecrets"] = json!([{"name": "login"}]);
    world.ready_pod("opened", opened).await;
    let log = world.node.log_tail(100_000);
    assert!(!log.contains("s3cret") && !log.contains(&token), "the log holds a credential");
    drop((open, closed));
    world.end(&["bad", "closed", "good", "opened"]).await;
}
