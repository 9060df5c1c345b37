//! A node in a cluster: what it tells of itself, static pods beside the API's, and a control plane
//! that goes away, errs or forgets.

use std::time::Duration;

use serde_json::json;
use tests::control_plane::faults::{Fault, Rule};
use tests::harness::cluster::condition;
use tests::harness::eventually;

use crate::support::{World, container, idle, is_ready, restarts, sh};

const IDLE_MANIFEST: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: static
  labels: {app: static}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: longshore.local/demo/busybox:1
    command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"]
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_tells_what_it_is() {
    let world = World::new("cluster-node").await;
    let name = world.node.name();
    let node = world.cluster.admin.read(&format!("/api/v1/nodes/{name}")).await.unwrap();
    let labels = &node["metadata"]["labels"];
    assert_eq!(labels["kubernetes.io/hostname"], name);
    assert_eq!(labels["kubernetes.io/os"], "linux");
    assert!(["amd64", "arm64"].contains(&labels["kubernetes.io/arch"].as_str().unwrap()));
    let status = &node["status"];
    for (kind, value) in [("Ready", "True"), ("MemoryPressure", "False"), ("PIDPressure", "False")]
    {
        assert_eq!(condition(&node, kind), Some(value), "{kind}");
    }
    // Measured for real: the machine that runs the tests may be short of disk.
    assert!(condition(&node, "DiskPressure").is_some());
    for resource in ["cpu", "memory", "pods", "ephemeral-storage"] {
        assert!(status["capacity"][resource].is_string(), "{resource}: {}", status["capacity"]);
        assert!(status["allocatable"][resource].is_string(), "{resource}");
    }
    let addresses = status["addresses"].as_array().unwrap();
    let address =
        |kind: &str| addresses.iter().find(|a| a["type"] == kind).map(|a| a["address"].clone());
    assert_eq!(address("InternalIP"), Some(world.node.address().to_string().into()));
    assert_eq!(address("Hostname"), Some(name.into()));
    let info = &status["nodeInfo"];
    for field in [
        "kernelVersion",
        "osImage",
        "containerRuntimeVersion",
        "kubeletVersion",
        "architecture",
        "machineID",
        "bootID",
    ] {
        assert!(info[field].is_string(), "{field}: {info}");
    }
    assert!(info["kubeletVersion"].as_str().unwrap().starts_with("v1.36."), "{info}");
    let lease = &format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}");
    let first = world.cluster.admin.read(lease).await.unwrap();
    assert_eq!(first["spec"]["holderIdentity"], name);
    assert_eq!(first["spec"]["leaseDurationSeconds"], 40);
    eventually("the lease is renewed", async || {
        let now = world.cluster.admin.read(lease).await?;
        if now["spec"]["renewTime"] != first["spec"]["renewTime"] {
            Ok(())
        } else {
            Err(anyhow::anyhow!("{now}"))
        }
    })
    .await;
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn static_pods_have_mirrors() {
    let world = World::new("cluster-mirror").await;
    let path = &format!("/api/v1/namespaces/default/pods/static-{}", world.node.name());
    world.node.put_manifest("static.yaml", IDLE_MANIFEST).unwrap();
    let mirror = eventually("the mirror pod is Ready", async || {
        let pod = world.cluster.admin.read(path).await?;
        if is_ready(&pod) { Ok(pod) } else { Err(anyhow::anyhow!("{:#}", pod["status"])) }
    })
    .await;
    let notes = &mirror["metadata"]["annotations"];
    assert!(notes["kubernetes.io/config.mirror"].is_string(), "{notes}");
    assert_eq!(notes["kubernetes.io/config.source"], "file");
    assert_eq!(mirror["metadata"]["ownerReferences"][0]["kind"], "Node");
    let id = container(&mirror, "c")["containerID"].clone();
    // Deleting the mirror does not touch the pod; it comes back.
    world.cluster.admin.delete(path, json!({"gracePeriodSeconds": 0})).await;
    let again = eventually("the mirror comes back", async || {
        let pod = world.cluster.admin.read(path).await?;
        if is_ready(&pod) && pod["metadata"]["uid"] != mirror["metadata"]["uid"] {
            Ok(pod)
        } else {
            Err(anyhow::anyhow!("{:#}", pod["status"]))
        }
    })
    .await;
    assert_eq!(container(&again, "c")["containerID"], id, "the container was not touched");
    world.node.remove_manifest("static.yaml").unwrap();
    eventually("the mirror goes with its manifest", async || {
        match world.cluster.admin.get(path).await {
            (404, _) => Ok(()),
            (_, pod) => Err(pod["status"].clone()),
        }
    })
    .await;
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_away_stops_nothing() {
    let world = World::new("cluster-away").await;
    let flag = "test -e /data/die && rm /data/die && exit 1; sleep 0.1";
    let spec = json!({"volumes": [{"name": "data", "emptyDir": {}}], "containers": [
        {"name": "c", "command": ["sh", "-c", format!("while :; do {flag}; done")], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}]});
    let pod = world.ready_pod("stays", spec).await;
    world.ready_pod("goes", json!({"containers": [idle("c")]})).await;
    world.cluster.cut().await;
    // A container that ends meanwhile is restarted meanwhile.
    let data = world.node.path(&format!(
        "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~empty-dir/data",
        pod["metadata"]["uid"].as_str().unwrap()
    ));
    std::fs::write(data.join("die"), "").unwrap();
    let logs = format!(
        "/var/log/pods/{}_stays_{}/c",
        world.cluster.namespace(),
        pod["metadata"]["uid"].as_str().unwrap()
    );
    eventually("the container is restarted without a control plane", async || {
        if world.node.path(&logs).join("1.log").exists() { Ok(()) } else { Err("no second log") }
    })
    .await;
    // What was asked for meanwhile happens afterwards, without a gap.
    let path = world.cluster.path("pods/goes");
    world.cluster.admin.remove(&path).await.unwrap();
    world.cluster.pod(&world.node, "comes", json!({"containers": [idle("c")]})).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.cluster.restore().unwrap();
    world.cluster.pod_ready("comes").await;
    world.cluster.pod_gone("goes").await;
    let pod = world
        .cluster
        .pod_until("stays", "restarted once, Ready", |p| restarts(p, "c") == 1 && is_ready(p))
        .await;
    assert_eq!(container(&pod, "c")["lastState"]["terminated"]["exitCode"], 1);
    world.end(&["stays", "comes"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_forgets_or_lies_is_survived() {
    let world = World::new("cluster-lies").await;
    let Some(plane) = world.cluster.fake_plane() else {
        eprintln!("not on a real control plane: it cannot be told to lie");
        return world.end(&[]).await;
    };
    let first = world.ready_pod("first", json!({"containers": [idle("c")]})).await;
    for (i, lie) in [
        None,
        Some(Fault::Code(500)),
        Some(Fault::Garbage),
        Some(Fault::Truncated),
        Some(Fault::Code(401)),
        Some(Fault::Code(403)),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("after-{i}");
        if let Some(fault) = lie {
            plane.faults().add(Rule::all(fault.clone()).resource("pods").times(3));
            plane.faults().add(Rule::all(fault).resource("services").times(3));
        }
        plane.compact();
        world.cluster.pod(&world.node, &name, json!({"containers": [idle("c")]})).await.unwrap();
        world.cluster.pod_ready(&name).await;
        plane.faults().clear();
        world.cluster.delete_pod(&name).await.unwrap();
    }
    let now = world.cluster.read_pod("first").await.unwrap();
    assert_eq!(container(&now, "c")["containerID"], container(&first, "c")["containerID"]);
    assert_eq!(restarts(&now, "c"), 0);
    world.end(&["first"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_errs_is_not_hammered() {
    let world = World::new("cluster-backoff").await;
    let Some(plane) = world.cluster.fake_plane() else {
        eprintln!("not on a real control plane: it cannot be told to err");
        return world.end(&[]).await;
    };
    plane.faults().add(Rule::all(Fault::Code(500)));
    plane.compact();
    let before = plane.records().len();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let asked = plane.records().len() - before;
    plane.faults().clear();
    // Four watches, a lease, a node: each a handful of times with growing pauses.
    assert!(asked < 120, "{asked} requests in 5 s");
    world.ready_pod("after", json!({"containers": [idle("c")]})).await;
    world.end(&["after"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_pods_come_and_go_completely() {
    let world = World::new("cluster-fifty").await;
    let names: Vec<String> = (0..50).map(|i| format!("p{i}")).collect();
    for name in &names {
        world.cluster.pod(&world.node, name, json!({"containers": [idle("c")]})).await.unwrap();
    }
    let mut addresses = std::collections::BTreeSet::new();
    for name in &names {
        let pod = world.cluster.pod_ready(name).await;
        assert!(
            addresses.insert(pod["status"]["podIP"].to_string()),
            "{name} has another pod's address"
        );
    }
    for name in &names {
        world.cluster.admin.remove(&world.cluster.path(&format!("pods/{name}"))).await.unwrap();
    }
    for name in &names {
        world.cluster.pod_gone(name).await;
    }
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_the_same_name_is_another_pod() {
    let world = World::new("cluster-same-name").await;
    let spec = |script: &str| json!({"containers": [sh("c", script)]});
    let first = world.ready_pod("twin", spec("sleep 1000")).await;
    world
        .cluster
        .admin
        .delete(&world.cluster.path("pods/twin"), json!({"gracePeriodSeconds": 0}))
        .await;
    world.cluster.pod(&world.node, "twin", spec("sleep 1001")).await.unwrap();
    let second = world.cluster.pod_ready("twin").await;
    assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
    assert_ne!(container(&first, "c")["containerID"], container(&second, "c")["containerID"]);
    world.end(&["twin"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reset_takes_everything_away() {
    let mut world = World::new("cluster-reset").await;
    world.ready_pod("web", json!({"volumes": [{"name": "m", "emptyDir": {"medium": "Memory"}}],
        "containers": [{"name": "c", "command": ["sleep", "1000"], "volumeMounts": [{"name": "m", "mountPath": "/m"}]}]})).await;
    world
        .cluster
        .admin
        .create(
            &world.cluster.path("services"),
            json!({"metadata": {"name": "s"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        )
        .await
        .unwrap();
    world.node.end(nix::sys::signal::Signal::SIGTERM).await;
    let cgroup = format!("/{}", world.node.cgroup());
    let output = world.node.longshore(&["reset", "--yes", "--cgroup-root", &cgroup]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<String> = world.node.left_behind();
    assert_eq!(left, Vec::<String>::new());
    for path in ["/etc/kubernetes/kubelet.conf", "/var/lib/kubelet/pki", "/var/lib/longshore"] {
        assert!(!world.node.path(path).exists(), "{path}");
    }
    let again = world.node.longshore(&["reset", "--yes", "--cgroup-root", &cgroup]).unwrap();
    assert!(
        again.status.success(),
        "a second reset has nothing to do: {}",
        String::from_utf8_lossy(&again.stderr)
    );
    world.cluster.end(&[world.node.name()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_object_that_is_deleted_or_replaced_is_made_right() {
    let world = World::new("cluster-node-gone").await;
    let name = world.node.name().to_owned();
    let path = format!("/api/v1/nodes/{name}");
    let lease = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}");
    let mut old = world.cluster.admin.read(&path).await.unwrap()["metadata"]["uid"].clone();
    for replaced in [false, true] {
        world.cluster.admin.remove(&path).await.unwrap();
        if replaced {
            // By somebody who knows nothing of it; the agent may have been quicker.
            let bare = json!({"metadata": {"name": name}});
            world.cluster.admin.post("/api/v1/nodes", bare).await;
        }
        old = eventually("the node is back, Ready, with its labels and its Lease", async || {
            let node = world.cluster.admin.read(&path).await?;
            let lease = world.cluster.admin.read(&lease).await?;
            let uid = &node["metadata"]["uid"];
            let good = *uid != old
                && condition(&node, "Ready") == Some("True")
                && node["metadata"]["labels"]["kubernetes.io/os"] == "linux"
                && lease["metadata"]["ownerReferences"][0]["uid"] == *uid;
            if good { Ok(uid.clone()) } else { Err(anyhow::anyhow!("{node:#} {lease:#}")) }
        })
        .await;
    }
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_agent_of_the_same_name_is_noticed() {
    let world = World::new("cluster-rival").await;
    let name = world.node.name().to_owned();
    let lease = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}");
    let told = eventually("the conflict is told", async || {
        let mut object = world.cluster.admin.read(&lease).await?;
        object["spec"]["renewTime"] = jiff::Timestamp::now().to_string().into();
        world.cluster.admin.put(&lease, object).await;
        let output = world.node.longshore(&["status"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if said.contains("another agent renews") {
            Ok(said)
        } else {
            Err(anyhow::anyhow!("{said}"))
        }
    })
    .await;
    assert!(told.contains("--node-name"), "{told}");
    world.end(&[]).await;
}
