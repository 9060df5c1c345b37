//! Volumes: what containers of a pod share, what the API's objects become on disk, and that
//! nothing of it outlives the pod.

use serde_json::{Value, json};
use tests::harness::eventually;

use crate::support::{World, container, idle, sh, with};

fn mount(name: &str, path: &str) -> Value {
    json!({"name": name, "mountPath": path})
}

fn mounting(container: Value, mounts: &[Value]) -> Value {
    with(container, json!({"volumeMounts": mounts}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_share_empty_dirs() {
    let world = World::new("volumes-shared").await;
    let volumes = json!([{"name": "disk", "emptyDir": {}}, {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "4Mi"}}]);
    let both = [mount("disk", "/disk"), mount("mem", "/mem")];
    let writer = mounting(
        sh(
            "w",
            "echo hello > /disk/x; echo there > /mem/x; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done",
        ),
        &both,
    );
    let reader = mounting(
        json!({"name": "r", "command": ["httpd", "-f", "-p", "80", "-h", "/disk"]}),
        &both,
    );
    let pod = world
        .ready_pod("shared", json!({"containers": [writer, reader], "volumes": volumes}))
        .await;
    let ip = tests::harness::cluster::pod_ip(&pod).unwrap();
    let answer = eventually("the page is served", async || {
        let answer = world.node.get((ip, 80).into(), "/x")?;
        if answer.code == 200 { Ok(answer) } else { Err(std::io::Error::other(answer.body)) }
    })
    .await;
    assert_eq!(answer.body, "hello\n");
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let on_disk =
        world.node.path(&format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir"));
    assert_eq!(std::fs::read_to_string(on_disk.join("disk/x")).unwrap(), "hello\n");
    let message = world
        .run_to_end("limits", json!({"volumes": volumes, "containers": [mounting(
            sh("c", "(grep ' /mem ' /proc/mounts | cut -d' ' -f3; dd if=/dev/zero of=/mem/big bs=1M count=8 2>&1 | grep -c 'No space'; stat -c %a /disk /mem | sed s/^1//) > /dev/termination-log; true"), &both)]}))
        .await;
    assert_eq!(message, "tmpfs\n1\n777\n777\n");
    world.end(&["shared", "limits"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_become_files_and_follow_their_changes() {
    let world = World::new("volumes-objects").await;
    let c = &world.cluster;
    c.admin.create(&c.path("configmaps"), json!({"metadata": {"name": "cm"}, "data": {"a": "1", "b": "2"}, "binaryData": {"bin": "AAEC"}})).await.unwrap();
    c.admin
        .create(
            &c.path("secrets"),
            json!({"metadata": {"name": "sec"}, "stringData": {"password": "hunter2"}}),
        )
        .await
        .unwrap();
    let volumes = json!([
        {"name": "cm", "configMap": {"name": "cm"}},
        {"name": "items", "configMap": {"name": "cm", "items": [{"key": "a", "path": "deep/er/file", "mode": 256}]}},
        {"name": "none", "configMap": {"name": "none", "optional": true}},
        {"name": "sec", "secret": {"secretName": "sec", "defaultMode": 288}},
        {"name": "down", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "limit", "resourceFieldRef": {"containerName": "c", "resource": "limits.memory", "divisor": "1Mi"}}]}},
        {"name": "all", "projected": {"sources": [{"configMap": {"name": "cm", "items": [{"key": "b", "path": "bee"}]}},
            {"secret": {"name": "sec"}}, {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600, "audience": "aud"}}]}}]);
    let mounts: Vec<Value> = ["cm", "items", "none", "sec", "down", "all"]
        .iter()
        .map(|n| mount(n, &format!("/{n}")))
        .collect();
    let web = mounting(
        json!({"name": "c", "command": ["httpd", "-f", "-p", "80", "-h", "/"], "resources": {"limits": {"memory": "64Mi"}}}),
        &mounts,
    );
    let pod = world.ready_pod("files", json!({"containers": [web], "volumes": volumes})).await;
    let ip = tests::harness::cluster::pod_ip(&pod).unwrap();
    eventually("the server listens", async || world.node.get((ip, 80).into(), "/cm/a")).await;
    let read = |path: &str| -> String {
        let answer = world.node.get((ip, 80).into(), path).unwrap();
        format!("{} {}", answer.code, answer.body)
    };
    assert_eq!(read("/cm/a"), "200 1");
    assert_eq!(read("/items/deep/er/file"), "200 1");
    assert_eq!(read("/sec/password"), "200 hunter2");
    assert_eq!(read("/down/limit"), "200 64");
    assert!(read("/down/labels").contains("app=\"files\""), "{}", read("/down/labels"));
    assert_eq!(read("/all/bee"), "200 2");
    assert_eq!(read("/all/token").split('.').count(), 3);
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let base = world.node.path(&format!("/var/lib/kubelet/pods/{uid}/volumes"));
    let map = base.join("kubernetes.io~configmap/cm");
    let version = std::fs::read_link(map.join("..data")).unwrap();
    assert_eq!(std::fs::read_link(map.join("a")).unwrap().to_str(), Some("..data/a"));
    use std::os::unix::fs::PermissionsExt as _;
    let mode =
        |path: &str| std::fs::metadata(base.join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("kubernetes.io~configmap/items/..data/deep/er/file"), 0o400);
    assert_eq!(mode("kubernetes.io~secret/sec/..data/password"), 0o440);

    // Only the value changes, in place, at once.
    c.admin
        .patch(
            &c.path("configmaps/cm"),
            tests::harness::caller::MERGE,
            json!({"data": {"a": "one", "b": null, "c": "3"}}),
        )
        .await;
    eventually("the volume follows the ConfigMap", async || {
        let seen = [read("/cm/a"), read("/cm/c"), read("/cm/b")[..3].to_owned()];
        if seen == ["200 one", "200 3", "404"] { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    assert_ne!(std::fs::read_link(map.join("..data")).unwrap(), version);
    let after = c.read_pod("files").await.unwrap();
    assert_eq!(container(&after, "c")["restartCount"], 0);
    world.end(&["files"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_that_are_not_watched_are_asked_for() {
    let mut world = World::new("volumes-asked").await;
    let node = format!("/api/v1/nodes/{}", world.node.name());
    let ttl = json!({"metadata": {"annotations": {"node.alpha.kubernetes.io/ttl": "1"}}});
    for strategy in ["Cache", "Get"] {
        let change = |config: &mut Value| {
            config["configMapAndSecretChangeDetectionStrategy"] = strategy.into();
            config["syncFrequency"] = "1s".into();
        };
        world.node.configure(change).unwrap();
        world.node.restart().await.unwrap();
        world.node.ready().await;
        let c = &world.cluster;
        c.admin.patch(&node, tests::harness::caller::MERGE, ttl.clone()).await;
        let name = strategy.to_lowercase();
        let object = json!({"metadata": {"name": &name}, "data": {"a": "1"}});
        c.admin.create(&c.path("configmaps"), object).await.unwrap();
        let volumes = json!([{"name": "cm", "configMap": {"name": &name}}]);
        let mounts = mounting(idle("c"), &[mount("cm", "/cm")]);
        let pod = world.ready_pod(&name, json!({"containers": [mounts], "volumes": volumes})).await;
        let uid = pod["metadata"]["uid"].as_str().unwrap();
        let file = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~configmap/cm/a");
        let file = world.node.path(&file);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "1");
        let (path, two) = (c.path(&format!("configmaps/{name}")), json!({"data": {"a": "2"}}));
        c.admin.patch(&path, tests::harness::caller::MERGE, two).await;
        eventually("the volume follows the ConfigMap", async || {
            let seen = std::fs::read_to_string(&file)?;
            anyhow::ensure!(seen == "2", "{strategy}: {seen}");
            Ok(())
        })
        .await;
        if let Some(plane) = c.fake_plane() {
            let records = plane.records();
            let asked: Vec<_> = records.iter().filter(|r| r.resource == "configmaps").collect();
            let by_node = |verb: &str| {
                asked.iter().any(|r| r.user.starts_with("system:node:") && r.verb == verb)
            };
            assert!(by_node("get") && !by_node("watch"), "{strategy}");
        }
    }
    world.end(&["cache", "get"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_token_is_good_and_only_for_its_pod() {
    let world = World::new("volumes-token").await;
    let c = &world.cluster;
    let script = "cat /var/run/secrets/kubernetes.io/serviceaccount/token > /dev/termination-log";
    let token = world.run_to_end("token", json!({"containers": [sh("c", script)]})).await;
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let (code, review) = c.admin.post("/apis/authentication.k8s.io/v1/tokenreviews", review).await;
    assert_eq!(code, 201);
    assert_eq!(
        review["status"]["user"]["username"],
        format!("system:serviceaccount:{}:default", c.namespace()),
        "{review}"
    );
    let ca = world.run_to_end("ca", json!({"containers": [sh("c",
        "cd /var/run/secrets/kubernetes.io/serviceaccount; (cat namespace; echo; head -1 ca.crt) > /dev/termination-log")]})).await;
    assert_eq!(ca, format!("{}\n-----BEGIN CERTIFICATE-----\n", c.namespace()));
    world.end(&["token", "ca"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_paths_are_what_their_type_says() {
    let world = World::new("volumes-host").await;
    let base = world.node.path("/var/lib/host-test");
    std::fs::create_dir_all(base.join("dir")).unwrap();
    std::fs::write(base.join("file"), "content").unwrap();
    let volume = |path: &str, kind: &str| json!([{"name": "v", "hostPath": {"path": format!("/var/lib/host-test/{path}"), "type": kind}}]);
    for (name, path, kind, script, expected) in [
        ("any", "file", "", "cat /v", "content"),
        ("dir", "dir", "Directory", "echo x > /v/made; ls /v", "made\n"),
        ("made-dir", "new", "DirectoryOrCreate", "stat -c %a /v", "755\n"),
        ("file", "file", "File", "cat /v", "content"),
        ("made-file", "new-file", "FileOrCreate", "stat -c %a:%s /v", "644:0\n"),
    ] {
        let c =
            mounting(sh("c", &format!("({script}) > /dev/termination-log")), &[mount("v", "/v")]);
        let message =
            world.run_to_end(name, json!({"containers": [c], "volumes": volume(path, kind)})).await;
        assert_eq!(message, expected, "{name}");
    }
    assert!(base.join("dir/made").exists());
    for (name, path, kind) in [
        ("no-dir", "file", "Directory"),
        ("no-file", "nothing", "File"),
        ("no-socket", "file", "Socket"),
    ] {
        let c = mounting(idle("c"), &[mount("v", "/v")]);
        world
            .cluster
            .pod(&world.node, name, json!({"containers": [c], "volumes": volume(path, kind)}))
            .await
            .unwrap();
        let message = world.event(name, "FailedMount").await;
        assert!(message.contains("host-test"), "{message}");
    }
    world
        .end(&["any", "dir", "made-dir", "file", "made-file", "no-dir", "no-file", "no-socket"])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sub_paths_stay_inside_their_volume() {
    let world = World::new("volumes-subpath").await;
    std::fs::create_dir_all(world.node.path("/var/lib/secret-of-the-host")).unwrap();
    std::fs::write(world.node.path("/var/lib/secret-of-the-host/x"), "leaked").unwrap();
    let volumes = json!([{"name": "v", "emptyDir": {}}]);
    let script = "(cat /sub/f /file; touch /sub/new 2>&1 | grep -c Read-only; ls /env) > /dev/termination-log; true";
    let reader = with(
        mounting(
            sh("c", script),
            &[
                json!({"name": "v", "mountPath": "/sub", "subPath": "a/b", "readOnly": true}),
                json!({"name": "v", "mountPath": "/file", "subPath": "a/b/f"}),
                json!({"name": "v", "mountPath": "/env", "subPathExpr": "made-$(POD)"}),
            ],
        ),
        json!({"env": [{"name": "POD", "value": "x"}]}),
    );
    let message = world
        .run_to_end("good", json!({"volumes": volumes,
            "initContainers": [mounting(sh("i", "mkdir -p /v/a/b; echo inside > /v/a/b/f"), &[mount("v", "/v")])],
            "containers": [reader]}))
        .await;
    assert_eq!(message, "inside\ninside\n1\n");
    for (name, target) in [
        ("absolute", "/var/lib/secret-of-the-host"),
        ("climbing", "../../../../../../../../../../var/lib/secret-of-the-host"),
    ] {
        let plant = mounting(sh("i", &format!("ln -s {target} /v/link")), &[mount("v", "/v")]);
        let victim = mounting(
            sh("c", "cat /sub/x > /dev/termination-log 2>&1; sleep 1000"),
            &[json!({"name": "v", "mountPath": "/sub", "subPath": "link"})],
        );
        world.cluster.pod(&world.node, name, json!({"restartPolicy": "Never", "volumes": volumes, "initContainers": [plant], "containers": [victim]})).await.unwrap();
        let pod = world
            .cluster
            .pod_until(name, "is refused or sees nothing of the host", |p| {
                let c = container(p, "c");
                ["CreateContainerConfigError", "CreateContainerError"]
                    .contains(&c["state"]["waiting"]["reason"].as_str().unwrap_or_default())
                    || c["state"]["running"].is_object()
                    || c["state"]["terminated"].is_object()
            })
            .await;
        assert!(!container(&pod, "c").to_string().contains("leaked"), "{pod}");
        assert!(
            container(&pod, "c")["state"]["waiting"].is_object(),
            "{name}: {:#}",
            pod["status"]
        );
    }
    world.end(&["good", "absolute", "climbing"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_object_holds_its_pod_until_it_comes() {
    let world = World::new("volumes-missing").await;
    let c = &world.cluster;
    let volumes = json!([{"name": "v", "secret": {"secretName": "later"}}]);
    c.pod(
        &world.node,
        "waits",
        json!({"containers": [mounting(idle("c"), &[mount("v", "/v")])], "volumes": volumes}),
    )
    .await
    .unwrap();
    world.ready_pod("fine", json!({"containers": [idle("c")]})).await;
    let message = world.event("waits", "FailedMount").await;
    assert!(message.contains("later"), "{message}");
    c.admin
        .create(
            &c.path("secrets"),
            json!({"metadata": {"name": "later"}, "stringData": {"k": "v"}}),
        )
        .await
        .unwrap();
    c.pod_ready("waits").await;
    world.end(&["waits", "fine"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fills_the_disk_beyond_its_limit_is_evicted() {
    let world = World::new("volumes-limit").await;
    let volumes = json!([{"name": "disk", "emptyDir": {"sizeLimit": "1Mi"}}]);
    let greedy = mounting(
        sh("c", "trap '' TERM; head -c 3000000 /dev/zero > /disk/x; while :; do sleep 1; done"),
        &[mount("disk", "/disk")],
    );
    let modest = mounting(
        sh("c", "trap 'exit 0' TERM; echo small > /disk/x; while :; do sleep 1000 & wait; done"),
        &[mount("disk", "/disk")],
    );
    for (name, container) in [("greedy", greedy), ("modest", modest)] {
        let spec = json!({"terminationGracePeriodSeconds": 600, "volumes": volumes.clone(),
            "containers": [container]});
        world.cluster.pod(&world.node, name, spec).await.unwrap();
    }
    let gone =
        world.cluster.pod_until("greedy", "evicted", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(gone["status"]["reason"], "Evicted");
    let told = world.event("greedy", "Evicted").await;
    assert!(told.contains("\"disk\" exceeds the limit \"1Mi\""), "{told}");
    assert_eq!(world.cluster.pod_ready("modest").await["status"]["phase"], "Running");
    world.end(&["greedy", "modest"]).await;
}
