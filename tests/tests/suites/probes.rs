//! Probes of every kind decide about restarts and readiness.

use serde_json::{Value, json};

use crate::support::{World, container, is_ready, restarts, sh, with};

const SERVE: &str = "mkdir -p /www; echo ok > /www/ok; httpd -p 80 -h /www; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done";

fn quick(probe: Value) -> Value {
    with(probe, json!({"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 2}))
}

fn data() -> Value {
    json!({"volumes": [{"name": "data", "emptyDir": {}}]})
}

fn mounted(c: Value) -> Value {
    with(c, json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_follows_its_probe() {
    let world = World::new("probes-ready").await;
    for (name, probe) in [
        ("http", json!({"httpGet": {"port": 80, "path": "/flag"}})),
        ("exec", json!({"exec": {"command": ["cat", "/www/flag"]}})),
    ] {
        let c = with(
            sh("c", SERVE),
            json!({"readinessProbe": quick(probe),
            "volumeMounts": [{"name": "www", "mountPath": "/www"}]}),
        );
        let pod = world
            .cluster
            .pod(
                &world.node,
                name,
                json!({"containers": [c], "volumes": [{"name": "www", "emptyDir": {}}]}),
            )
            .await
            .unwrap();
        let pod_dir = format!(
            "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~empty-dir/www",
            pod["metadata"]["uid"].as_str().unwrap()
        );
        let flag = world.node.path(&pod_dir).join("flag");
        let message = world.event(name, "Unhealthy").await;
        assert!(message.starts_with("Readiness probe failed"), "{message}");
        let unready = world.cluster.read_pod(name).await.unwrap();
        assert!(container(&unready, "c")["state"]["running"].is_object() && !is_ready(&unready));
        std::fs::write(&flag, "up").unwrap();
        world.cluster.pod_ready(name).await;
        std::fs::remove_file(&flag).unwrap();
        let pod = world.cluster.pod_until(name, "unready again", |p| !is_ready(p)).await;
        assert_eq!(restarts(&pod, "c"), 0, "readiness restarts nothing");
    }
    world.end(&["http", "exec"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn liveness_restarts_what_is_dead() {
    let world = World::new("probes-live").await;
    // The first run loses its server at once, the second keeps it.
    let script = |serve: &str| {
        format!(
            "n=$(cat /data/n 2>/dev/null || echo 0); echo $((n+1)) > /data/n; [ $n = 0 ] || {{ mkdir -p /www; echo ok > /www/ok; {serve}; }}; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"
        )
    };
    for (name, probe) in [
        ("http", json!({"httpGet": {"port": 80, "path": "/ok"}})),
        ("tcp", json!({"tcpSocket": {"port": 80}})),
        ("exec", json!({"exec": {"command": ["test", "-e", "/www/ok"]}})),
    ] {
        let c = with(
            mounted(sh("c", &script("httpd -p 80 -h /www"))),
            json!({"livenessProbe": quick(probe)}),
        );
        let spec = with(json!({"terminationGracePeriodSeconds": 1, "containers": [c]}), data());
        world.cluster.pod(&world.node, name, spec).await.unwrap();
    }
    for name in ["http", "tcp", "exec"] {
        let pod = world
            .cluster
            .pod_until(name, "restarted once and well", |p| restarts(p, "c") == 1 && is_ready(p))
            .await;
        assert!(container(&pod, "c")["lastState"]["terminated"].is_object(), "{pod}");
        let message = world.event(name, "Unhealthy").await;
        assert!(message.starts_with("Liveness probe failed"), "{message}");
        world.event(name, "Killing").await;
    }
    world.end(&["http", "tcp", "exec"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn startup_holds_the_other_probes_back() {
    let world = World::new("probes-startup").await;
    // Not live for the first two seconds; without the startup probe that would be its end.
    let c = with(
        sh("c", "sleep 2; touch /tmp/up; trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"),
        json!({
            "startupProbe": with(quick(json!({"exec": {"command": ["cat", "/tmp/up"]}})), json!({"failureThreshold": 60})),
            "livenessProbe": with(quick(json!({"exec": {"command": ["cat", "/tmp/up"]}})), json!({"failureThreshold": 1})),
        }),
    );
    world.cluster.pod(&world.node, "slow", json!({"containers": [c]})).await.unwrap();
    let early = world
        .cluster
        .pod_until("slow", "running, not started", |p| {
            container(p, "c")["state"]["running"].is_object()
        })
        .await;
    assert_eq!(
        (container(&early, "c")["started"].as_bool(), is_ready(&early)),
        (Some(false), false)
    );
    let late = world.cluster.pod_ready("slow").await;
    assert_eq!((container(&late, "c")["started"].as_bool(), restarts(&late, "c")), (Some(true), 0));
    // One that never starts is restarted by its startup probe.
    let never = with(
        sh("c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"),
        json!({"startupProbe": quick(json!({"tcpSocket": {"port": 80}}))}),
    );
    world
        .cluster
        .pod(
            &world.node,
            "never",
            json!({"terminationGracePeriodSeconds": 1, "containers": [never]}),
        )
        .await
        .unwrap();
    world.cluster.pod_until("never", "restarted", |p| restarts(p, "c") >= 1).await;
    world.end(&["slow", "never"]).await;
}
