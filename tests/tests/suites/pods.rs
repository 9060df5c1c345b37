//! The life of pods: what runs, in which order, how it ends, and what their status says.

use serde_json::{Value, json};
use tests::harness::cluster::{condition, pod_ip};
use tests::harness::eventually;
use tests::harness::leaks::hierarchies;
use tests::harness::net;

use crate::support::{World, container, ended, idle, restarts, sh, with};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_runs_and_its_status_says_how() {
    let world = World::new("pods-run").await;
    let web = json!({"name": "web", "command": ["workload", "http", "8080"], "ports": [{"containerPort": 8080}]});
    let pod = world.ready_pod("web", json!({"containers": [web, idle("side")]})).await;
    let status = &pod["status"];
    assert_eq!(status["phase"], "Running");
    for kind in
        ["PodScheduled", "PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"]
    {
        assert_eq!(condition(&pod, kind), Some("True"), "{kind}: {}", status["conditions"]);
    }
    assert_eq!(status["hostIP"], world.node.address().to_string());
    assert_eq!(status["podIPs"][0]["ip"], status["podIP"]);
    assert!(status["startTime"].is_string());
    for name in ["web", "side"] {
        let c = container(&pod, name);
        assert!(c["state"]["running"]["startedAt"].is_string(), "{c}");
        assert_eq!(
            (c["ready"].as_bool(), c["started"].as_bool(), c["restartCount"].as_u64()),
            (Some(true), Some(true), Some(0))
        );
        assert_eq!(c["image"], tests::harness::image::IMAGE);
        assert!(c["containerID"].as_str().unwrap().contains("://"), "{c}");
        assert!(c["imageID"].as_str().is_some_and(|i| i.contains("sha256:")), "{c}");
    }
    let address = pod_ip(&pod).unwrap();
    let answer = world.node.get((address, 8080).into(), "/").unwrap();
    assert!(answer.body.starts_with("web "), "{answer:?}");
    for reason in ["Pulled", "Created", "Started"] {
        world.event("web", reason).await;
    }
    world.end(&["web"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_restart_policy_decides_what_an_end_means() {
    let world = World::new("pods-restart").await;
    let flaky = "n=$(cat /data/n 2>/dev/null || echo 0); echo $((n+1)) > /data/n; [ $n -ge 1 ]";
    let data = json!([{"name": "data", "emptyDir": {}}]);
    for (name, policy, script) in [
        ("never-0", "Never", "exit 0"),
        ("never-3", "Never", "echo why > /dev/termination-log; exit 3"),
        ("on-failure-0", "OnFailure", "exit 0"),
        ("on-failure-1", "OnFailure", flaky),
        ("always", "Always", "exit 7"),
    ] {
        let c = with(
            sh("c", script),
            json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
        );
        let spec = json!({"restartPolicy": policy, "containers": [c], "volumes": data});
        world.cluster.pod(&world.node, name, spec).await.unwrap();
    }
    for (name, phase, code, reason) in [
        ("never-0", "Succeeded", 0, "Completed"),
        ("never-3", "Failed", 3, "Error"),
        ("on-failure-0", "Succeeded", 0, "Completed"),
        ("on-failure-1", "Succeeded", 0, "Completed"),
    ] {
        let pod = world.cluster.pod_until(name, "ended", ended).await;
        assert_eq!(pod["status"]["phase"], phase, "{name}");
        let end = &container(&pod, "c")["state"]["terminated"];
        assert_eq!(
            (end["exitCode"].as_i64(), end["reason"].as_str()),
            (Some(code), Some(reason)),
            "{name} {end}"
        );
        assert!(end["startedAt"].is_string() && end["finishedAt"].is_string(), "{end}");
        assert_eq!(condition(&pod, "Ready"), Some("False"), "{name}");
    }
    let failed = world.cluster.read_pod("never-3").await.unwrap();
    assert_eq!(container(&failed, "c")["state"]["terminated"]["message"], "why\n");
    let flaky = world.cluster.read_pod("on-failure-1").await.unwrap();
    assert_eq!(restarts(&flaky, "c"), 1);
    assert_eq!(container(&flaky, "c")["lastState"]["terminated"]["exitCode"], 1);
    let looping = world
        .cluster
        .pod_until("always", "backs off", |p| {
            container(p, "c")["state"]["waiting"]["reason"] == "CrashLoopBackOff"
                && restarts(p, "c") >= 1
        })
        .await;
    assert_eq!(looping["status"]["phase"], "Running");
    assert_eq!(container(&looping, "c")["lastState"]["terminated"]["exitCode"], 7);
    world.event("always", "BackOff").await;
    world.end(&["never-0", "never-3", "on-failure-0", "on-failure-1", "always"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_containers_run_in_order_and_must_succeed() {
    let world = World::new("pods-init").await;
    let mounted =
        |c: Value| with(c, json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}));
    let volumes = json!([{"name": "data", "emptyDir": {}}]);
    let message = world
        .run_to_end("good", json!({
            "initContainers": [mounted(sh("one", "sleep 0.3; echo one >> /data/log")), mounted(sh("two", "echo two >> /data/log"))],
            "containers": [mounted(sh("c", "echo main >> /data/log; cat /data/log > /dev/termination-log"))],
            "volumes": volumes}))
        .await;
    assert_eq!(message, "one\ntwo\nmain\n");
    let good = world.cluster.read_pod("good").await.unwrap();
    assert_eq!(container(&good, "one")["state"]["terminated"]["reason"], "Completed");
    assert_eq!(condition(&good, "Initialized"), Some("True"));
    world.cluster.pod(&world.node, "bad", json!({"restartPolicy": "Never",
        "initContainers": [sh("one", "exit 5"), sh("two", "exit 0")], "containers": [sh("c", "exit 0")]})).await.unwrap();
    let bad = world.cluster.pod_until("bad", "ended", ended).await;
    assert_eq!(bad["status"]["phase"], "Failed");
    assert_eq!(container(&bad, "one")["state"]["terminated"]["exitCode"], 5);
    assert_eq!(container(&bad, "c")["state"]["waiting"]["reason"], "PodInitializing");
    assert_eq!(condition(&bad, "Initialized"), Some("False"));
    world.end(&["good", "bad"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_end_by_sigterm_and_after_their_grace_by_sigkill() {
    let world = World::new("pods-end").await;
    world
        .ready_pod(
            "polite",
            json!({"terminationGracePeriodSeconds": 60, "containers": [idle("c")]}),
        )
        .await;
    world
        .ready_pod(
            "stubborn",
            json!({"terminationGracePeriodSeconds": 1,
        "containers": [sh("c", "trap '' TERM; while :; do sleep 1; done")]}),
        )
        .await;
    for name in ["polite", "stubborn"] {
        let start = std::time::Instant::now();
        world.cluster.delete_pod(name).await.unwrap();
        // The polite one did not wait for its grace period, the stubborn one was not asked for ever.
        assert!(start.elapsed().as_secs() < 30, "{name} took {:?}", start.elapsed());
        world.event(name, "Killing").await;
    }
    // Forced deletion takes the containers along all the same.
    world.ready_pod("forced", json!({"containers": [idle("c")]})).await;
    let path = world.cluster.path("pods/forced");
    world.cluster.admin.delete(&path, json!({"gracePeriodSeconds": 0})).await;
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_see_the_environment_they_were_promised() {
    let world = World::new("pods-env").await;
    let c = &world.cluster;
    c.admin
        .create(
            &c.path("configmaps"),
            json!({"metadata": {"name": "cm"}, "data": {"key": "from-cm", "OTHER": "x"}}),
        )
        .await
        .unwrap();
    c.admin
        .create(
            &c.path("secrets"),
            json!({"metadata": {"name": "sec"}, "stringData": {"key": "from-secret"}}),
        )
        .await
        .unwrap();
    c.admin.create(&c.path("services"), json!({"metadata": {"name": "my-svc"}, "spec": {"clusterIP": "10.96.0.77", "ports": [{"port": 81}]}})).await.unwrap();
    let script = r#"printf '%s|' "$0" "$A" "$B" "$C" "$CM" "$P_OTHER" "$SEC" "$NODE" "$NAME" "$IP" "$CPU" "$MY_SVC_SERVICE_HOST" "$MY_SVC_SERVICE_PORT" "$PWD" "$IMAGE" > /dev/termination-log"#;
    let message = world
        .run_to_end("env", json!({"containers": [{"name": "c", "command": ["sh", "-c", script], "args": ["$(B)"],
            "workingDir": "/tmp", "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}},
            "envFrom": [{"prefix": "P_", "configMapRef": {"name": "cm"}}, {"configMapRef": {"name": "none", "optional": true}}],
            "env": [{"name": "A", "value": "a"}, {"name": "B", "value": "$(A)-b"}, {"name": "C", "value": "$$(A) $(NONE)"},
                {"name": "CM", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "key"}}},
                {"name": "SEC", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "key"}}},
                {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}}]}]}))
        .await;
    let ip = pod_ip(&c.read_pod("env").await.unwrap()).unwrap();
    assert_eq!(
        message,
        format!(
            "a-b|a|a-b|$(A) $(NONE)|from-cm|x|from-secret|{}|env|{ip}|500|10.96.0.77|81|/tmp|demo|",
            world.node.name()
        )
    );
    world.end(&["env"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_groups_and_limits_are_applied() {
    let world = World::new("pods-security").await;
    let message = world
        .run_to_end("id", json!({"securityContext": {"runAsUser": 1000, "runAsGroup": 3000, "fsGroup": 2000, "supplementalGroups": [4000]},
            "volumes": [{"name": "data", "emptyDir": {}}],
            "containers": [with(sh("c", "(id -u; id -g; id -G; stat -c %g:%a /data; touch /data/x && stat -c %g /data/x; grep -c . /proc/self/status | sed s/.*/ok/; grep -E 'Seccomp:|NoNewPrivs' /proc/self/status) > /dev/termination-log"),
                json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    "securityContext": {"allowPrivilegeEscalation": false, "seccompProfile": {"type": "RuntimeDefault"}}}))]}))
        .await;
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines[..2], ["1000", "3000"], "{message}");
    let groups: Vec<&str> = lines[2].split(' ').collect();
    assert!(["3000", "2000", "4000"].iter().all(|g| groups.contains(g)), "{message}");
    assert_eq!(lines[3], "2000:2777", "{message}");
    assert_eq!(lines[4], "2000", "{message}");
    assert!(message.contains("NoNewPrivs:\t1") && message.contains("Seccomp:\t2"), "{message}");

    let limits = json!({"limits": {"memory": "32Mi", "cpu": "250m"}, "requests": {"memory": "16Mi", "cpu": "100m"}});
    let pod = world
        .ready_pod(
            "limited",
            json!({"containers": [with(idle("c"), json!({"resources": limits}))]}),
        )
        .await;
    assert_eq!(pod["status"]["qosClass"], "Burstable");
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let found: Vec<_> = hierarchies()
        .iter()
        .flat_map(|h| {
            let base =
                h.join(world.node.cgroup()).join("kubepods/burstable").join(format!("pod{uid}"));
            ["memory.limit_in_bytes", "memory.max"].map(|f| base.join(f))
        })
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .collect();
    assert_eq!(
        found.iter().map(|v| v.trim()).collect::<Vec<_>>(),
        ["33554432"],
        "the pod's cgroup has its memory limit"
    );

    world.cluster.pod(&world.node, "greedy", json!({"restartPolicy": "Never",
        "containers": [with(sh("c", "tail /dev/zero"), json!({"resources": {"limits": {"memory": "16Mi"}}}))]})).await.unwrap();
    let greedy = world.cluster.pod_until("greedy", "ended", ended).await;
    let end = &container(&greedy, "c")["state"]["terminated"];
    assert_eq!(
        (end["reason"].as_str(), end["exitCode"].as_i64()),
        (Some("OOMKilled"), Some(137)),
        "{end}"
    );
    world.end(&["id", "limited", "greedy"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_says_why_and_the_rest_runs() {
    let world = World::new("pods-bad").await;
    let image = |image: &str, policy: &str| json!({"containers": [with(idle("c"), json!({"image": image, "imagePullPolicy": policy}))]});
    for (name, spec) in [
        ("never-pulled", image("longshore.local/none:1", "Never")),
        ("bad-name", image("Not A Name", "IfNotPresent")),
        ("no-registry", image("10.99.0.1:1/none:1", "IfNotPresent")),
        ("no-command", json!({"containers": [{"name": "c", "command": ["/no/such/file"]}]})),
        (
            "no-key",
            json!({"containers": [with(idle("c"), json!({"env": [{"name": "K",
            "valueFrom": {"configMapKeyRef": {"name": "later", "key": "k"}}}]}))]}),
        ),
    ] {
        world.cluster.pod(&world.node, name, spec).await.unwrap();
    }
    world.ready_pod("fine", json!({"containers": [idle("c")]})).await;
    for (name, reasons) in [
        ("never-pulled", &["ErrImageNeverPull"][..]),
        ("bad-name", &["InvalidImageName"]),
        ("no-registry", &["ErrImagePull", "ImagePullBackOff"]),
        ("no-command", &["RunContainerError", "CrashLoopBackOff", "CreateContainerError"]),
        ("no-key", &["CreateContainerConfigError"]),
    ] {
        let pod = world
            .cluster
            .pod_until(name, "says why it does not run", |p| {
                let state = &container(p, "c")["state"];
                let reason = state["waiting"]["reason"].as_str().unwrap_or_default();
                reasons.contains(&reason)
            })
            .await;
        let waiting = &container(&pod, "c")["state"]["waiting"];
        assert!(waiting["message"].as_str().is_some_and(|m| !m.is_empty()), "{name}: {waiting}");
        assert_eq!(condition(&pod, "Ready"), Some("False"));
    }
    world.event("no-registry", "Failed").await;
    let c = &world.cluster;
    c.admin
        .create(&c.path("configmaps"), json!({"metadata": {"name": "later"}, "data": {"k": "v"}}))
        .await
        .unwrap();
    c.pod_ready("no-key").await;
    world.end(&["never-pulled", "bad-name", "no-registry", "no-command", "no-key", "fine"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_network_and_host_ports() {
    let world = World::new("pods-host").await;
    let web = |port: u16, extra: Value| {
        with(json!({"name": "c", "command": ["workload", "http", port.to_string()]}), extra)
    };
    let host = world
        .ready_pod("host", json!({"hostNetwork": true, "containers": [web(8070, json!({}))]}))
        .await;
    assert_eq!(host["status"]["podIP"], world.node.address().to_string());
    world.ready_pod("port", json!({"containers": [web(8080, json!({"ports": [{"containerPort": 8080, "hostPort": 8071}]}))]})).await;
    for (port, name) in [(8070, world.node.name()), (8071, "port")] {
        // Running is not listening.
        let answer = eventually("the host's port answers", async || {
            net::http_get(&world.lab.outside().path(), (world.node.address(), port).into(), "/")
        })
        .await;
        assert_eq!(answer.body.split(' ').next(), Some(name), "{port}: {answer:?}");
    }
    world.end(&["host", "port"]).await;
}

/// The memory limit that the kernel keeps for the pod.
fn pod_memory(world: &World, pod: &serde_json::Value) -> Vec<String> {
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let files = hierarchies().into_iter().flat_map(|hierarchy| {
        let kubepods = hierarchy.join(world.node.cgroup()).join("kubepods");
        ["", "burstable"].into_iter().flat_map(move |class| {
            let pod = kubepods.join(class).join(format!("pod{uid}"));
            ["memory.limit_in_bytes", "memory.max"].map(|file| pod.join(file))
        })
    });
    files.filter_map(|file| std::fs::read_to_string(file).ok()).map(|v| v.trim().into()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_are_resized_in_place() {
    let mut world = World::new("pods-resize").await;
    let full = "dd if=/dev/zero of=/data/x bs=1M count=24 2>/dev/null; \
                while test ! -e /data/free; do sleep 0.2; done; rm /data/x; sleep 1000";
    let spec = json!({
        "terminationGracePeriodSeconds": 0,
        "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}, "requests": {"cpu": "100m", "memory": "32Mi"}},
        "volumes": [{"name": "data", "emptyDir": {"medium": "Memory"}}],
        "containers": [with(sh("c", full), json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}))]});
    let first = world.ready_pod("sized", spec).await;
    assert_eq!(first["status"]["resources"]["limits"]["memory"], "64Mi", "{:#}", first["status"]);
    assert_eq!(first["status"]["allocatedResources"]["memory"], "32Mi", "{:#}", first["status"]);
    assert_eq!(pod_memory(&world, &first), ["67108864"]);
    let path = world.cluster.path("pods/sized/resize");
    let resize = async |resources: serde_json::Value| {
        let body = json!({"spec": {"resources": resources}});
        let kind = "application/merge-patch+json";
        let (code, answer) = world.cluster.admin.patch(&path, kind, body).await;
        assert_eq!(code, 200, "{answer}");
    };
    let settled = |pod: &serde_json::Value, memory: &str| {
        pod["status"]["resources"]["limits"]["memory"] == memory
            && condition(pod, "PodResizePending").is_none()
            && condition(pod, "PodResizeInProgress").is_none()
    };

    resize(json!({"limits": {"memory": "96Mi"}})).await;
    let pod = world.cluster.pod_until("sized", "resized", |p| settled(p, "96Mi")).await;
    assert_eq!(pod_memory(&world, &pod), ["100663296"]);
    assert_eq!(container(&pod, "c")["containerID"], container(&first, "c")["containerID"]);
    assert!(world.event("sized", "ResizeStarted").await.contains("\"generation\":2"));
    world.event("sized", "ResizeCompleted").await;

    // More than there is waits, also over a restart.
    resize(json!({"requests": {"cpu": "400m", "memory": "16Ti"}, "limits": {"memory": "16Ti"}}))
        .await;
    let pending = |p: &serde_json::Value| condition(p, "PodResizePending") == Some("True");
    let waits = world.cluster.pod_until("sized", "deferred", pending).await;
    let said = |p: &serde_json::Value| {
        let all = p["status"]["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|c| c["type"] == "PodResizePending").unwrap_or_default()
    };
    assert_eq!(said(&waits)["reason"], "Deferred", "{:#}", waits["status"]);
    assert_eq!(waits["status"]["allocatedResources"]["cpu"], "100m", "{:#}", waits["status"]);
    world.event("sized", "ResizeDeferred").await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    world.ready_pod("other", json!({"containers": [idle("c")]})).await;
    let still = world.cluster.read_pod("sized").await.unwrap();
    assert_eq!(said(&still), said(&waits));
    assert_eq!(pod_memory(&world, &still), ["100663296"]);

    // Less than is in use is not set, until it is not in use any more.
    let path = world.cluster.path("pods/sized/resize");
    let body = json!({"spec": {"resources": {"requests": {"cpu": "100m", "memory": "8Mi"}, "limits": {"memory": "16Mi"}}}});
    let (code, answer) =
        world.cluster.admin.patch(&path, "application/merge-patch+json", body).await;
    assert_eq!(code, 200, "{answer}");
    let failing = world
        .cluster
        .pod_until("sized", "in use", |p| {
            condition(p, "PodResizeInProgress") == Some("True")
                && p.to_string().contains("below current usage")
        })
        .await;
    assert!(condition(&failing, "PodResizePending").is_none(), "{:#}", failing["status"]);
    assert_eq!(pod_memory(&world, &failing), ["100663296"]);
    let uid = first["metadata"]["uid"].as_str().unwrap();
    let data = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/data");
    std::fs::write(world.node.path(&data).join("free"), "").unwrap();
    let pod = world.cluster.pod_until("sized", "shrunk", |p| settled(p, "16Mi")).await;
    assert_eq!(pod_memory(&world, &pod), ["16777216"]);
    assert_eq!(container(&pod, "c")["containerID"], container(&first, "c")["containerID"]);
    world.end(&["sized", "other"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_one_container_starts_all_again() {
    let world = World::new("pods-restart-all").await;
    let mount = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [88]}}]);
    let watcher = "echo c >> /data/order; while test ! -e /data/again; do sleep 0.1; done; rm /data/again; exit 88";
    let spec = json!({
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
        "volumes": [{"name": "data", "emptyDir": {}}],
        "initContainers": [with(sh("i", "echo i >> /data/order"), mount.clone())],
        "containers": [
            with(with(sh("c", watcher), mount.clone()), json!({"restartPolicy": "Never", "restartPolicyRules": rules})),
            with(sh("d", "echo d >> /data/order; trap '' TERM; while :; do sleep 1; done"), mount)]});
    let first = world.ready_pod("again", spec).await;
    assert_eq!(condition(&first, "AllContainersRestarting"), Some("False"));
    let uid = first["metadata"]["uid"].as_str().unwrap();
    let data = world
        .node
        .path(&format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/data"));
    std::fs::write(data.join("again"), "").unwrap();
    let again = world
        .cluster
        .pod_until("again", "started again", |p| {
            ["i", "c", "d"].iter().all(|name| restarts(p, name) == 1)
                && condition(p, "Ready") == Some("True")
        })
        .await;
    assert_eq!(again["status"]["phase"], "Running");
    assert_eq!(condition(&again, "AllContainersRestarting"), Some("False"));
    assert_eq!(again["status"]["podIP"], first["status"]["podIP"], "the sandbox is the same");
    let last = &container(&again, "d")["lastState"]["terminated"];
    assert_eq!(last["reason"], "RestartingAllContainers", "{:#}", again["status"]);
    // The volume is the same, and the order is that of a pod that starts.
    let order = std::fs::read_to_string(data.join("order")).unwrap();
    let order: Vec<&str> = order.lines().collect();
    assert_eq!(order.len(), 6, "{order:?}");
    assert_eq!((order[0], order[3]), ("i", "i"), "{order:?}");
    world.end(&["again"]).await;
}
