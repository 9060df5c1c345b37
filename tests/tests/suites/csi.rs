//! Claims and CSI volumes, with a driver that really mounts and holds the node to the protocol.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::harness::caller::MERGE;
use tests::harness::csi::{CsiDriver, EXPAND, MOUNT_GROUP, STAGE, STATS, Volumes, attachment_name};
use tests::harness::{eventually, eventually_within};

use crate::support::{World, idle, restarts, sh, with};

pub const DRIVER: &str = "csi.test.example";

pub fn volumes(world: &World) -> Volumes<'_> {
    let (admin, namespace) = (&world.cluster.admin, world.cluster.namespace());
    Volumes { admin, namespace, driver: DRIVER }
}

/// A pod spec whose container `c` mounts the claim at /data.
fn claiming(claim: &str, container: Value) -> Value {
    let source = json!({"name": "data", "persistentVolumeClaim": {"claimName": claim}});
    mounting(source, container)
}

fn mounting(volume: Value, container: Value) -> Value {
    let mount = json!({"volumeMounts": [{"name": volume["name"], "mountPath": "/data"}]});
    json!({"containers": [with(container, mount)], "volumes": [volume]})
}

pub fn uid(pod: &Value) -> &str {
    pod["metadata"]["uid"].as_str().unwrap()
}

/// The folder of a pod's CSI volume, as the test reaches it.
fn folder(world: &World, pod: &Value, volume: &str) -> PathBuf {
    let path = format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi/{volume}", uid(pod));
    world.node.path(&path)
}

/// What is staged for the driver.
fn staged(world: &World) -> Vec<PathBuf> {
    let path = world.node.path(&format!("/var/lib/kubelet/plugins/kubernetes.io/csi/{DRIVER}"));
    fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Deletes the pods while the driver still runs, and checks that nothing is left.
async fn end(world: World, mut driver: CsiDriver, pods: &[&str]) {
    for pod in pods {
        world.cluster.delete_pod(pod).await.unwrap();
    }
    eventually("nothing is staged", async || {
        let left = staged(&world);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    driver.stop(&world.node, true).unwrap();
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_attached_staged_once_and_taken_back_after_its_last_pod() {
    let mut world = World::new("csi-claim").await;
    world.node.configure(|config| config["readOnlyPort"] = 10255.into()).unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE, STATS]).await.unwrap();
    let (v, node) = (volumes(&world), world.node.name());
    let secret =
        |name: &str, key: &str| json!({"metadata": {"name": name}, "stringData": {key: "s3"}});
    let secrets = world.cluster.path("secrets");
    for (name, key) in [("stage", "one"), ("publish", "two")] {
        world.cluster.admin.create(&secrets, secret(name, key)).await.unwrap();
    }
    let reference = |name: &str| json!({"name": name, "namespace": world.cluster.namespace()});
    v.driver_object(json!({"attachRequired": true})).await.unwrap();
    v.claim(
        "vol",
        json!({"nodeStageSecretRef": reference("stage"),
        "nodePublishSecretRef": reference("publish"),
        "volumeAttributes": {"stageSecret": "one", "publishSecret": "two"}}),
    )
    .await
    .unwrap();

    // Nothing is asked of the driver before the volume is attached.
    world.cluster.pod(&world.node, "one", claiming("vol", idle("c"))).await.unwrap();
    v.in_use(node, "vol", true).await;
    assert_eq!(driver.verbs("vol"), Vec::<String>::new());
    v.attach(node, "vol", json!({"device": "sdz"})).await.unwrap();
    let one = world.cluster.pod_ready("one").await;
    let staging = staged(&world);
    assert_eq!(staging.len(), 1);
    let stage = driver.last("stage", "vol").unwrap();
    assert_eq!(stage["publishContext"], json!({"device": "sdz"}));
    assert_eq!(stage["secrets"], json!({"one": "s3"}));
    let publish = driver.last("publish", "vol").unwrap();
    assert_eq!(publish["publishContext"], json!({"device": "sdz"}));
    assert_eq!(publish["secrets"], json!({"two": "s3"}));
    assert_eq!(publish["staging"], stage["path"]);
    assert_eq!(publish["capability"]["mode"], 1);
    assert_eq!(publish["capability"]["fsType"], "ext4");
    let record = |path: PathBuf| -> Value {
        serde_json::from_slice(&fs::read(path.join("vol_data.json")).unwrap()).unwrap()
    };
    let of_pod = record(folder(&world, &one, "vol"));
    assert_eq!(of_pod["driverName"], DRIVER);
    assert_eq!(of_pod["volumeHandle"], "vol");
    assert_eq!(of_pod["specVolID"], "vol");
    assert_eq!(of_pod["volumeLifecycleMode"], "Persistent");
    assert_eq!(of_pod["attachmentID"], attachment_name("vol", DRIVER, node));
    assert_eq!(record(staging[0].clone())["volumeHandle"], "vol");

    // How full it is shows where dashboards look.
    let ask = |path: &str| world.node.get(([127, 0, 0, 1], 10255).into(), path).unwrap().body;
    let summary: Value = serde_json::from_str(&ask("/stats/summary")).unwrap();
    let pods = summary["pods"].as_array().unwrap();
    let told = pods.iter().find(|p| p["podRef"]["name"] == "one").unwrap();
    let [volume] = &told["volume"].as_array().unwrap()[..] else { panic!("{told}") };
    assert_eq!(volume["usedBytes"], 40);
    assert_eq!(volume["inodesFree"], 60);
    let namespace = world.cluster.namespace();
    assert_eq!(volume["pvcRef"], json!({"name": "vol", "namespace": namespace}));
    let sample = format!(
        "kubelet_volume_stats_capacity_bytes{{namespace=\"{namespace}\",persistentvolumeclaim=\"vol\"}} 100"
    );
    let metrics = ask("/metrics");
    assert!(metrics.contains(&sample), "{metrics}");
    let staged = metrics.lines().find(|line| {
        line.starts_with("csi_operations_seconds_count{")
            && line.contains("/csi.v1.Node/NodeStageVolume")
    });
    let staged = staged.unwrap_or_else(|| panic!("{metrics}"));
    for label in [format!("driver_name=\"{DRIVER}\""), "grpc_status_code=\"OK\"".to_owned()] {
        assert!(staged.contains(&label), "{staged}");
    }

    // A second pod shares what is staged, and only reads.
    let mut spec = claiming("vol", sh("c", "cat /data/file; touch /data/no && exit 9; sleep 1000"));
    spec["volumes"][0]["persistentVolumeClaim"]["readOnly"] = true.into();
    fs::write(driver.volume("vol").join("file"), "hello").unwrap();
    let two = world.ready_pod("two", spec).await;
    assert_eq!(driver.verbs("vol"), ["stage", "publish", "publish"]);
    assert_eq!(driver.last("publish", "vol").unwrap()["readonly"], true);
    let inside = folder(&world, &two, "vol").join("mount/file");
    assert_eq!(fs::read_to_string(inside).unwrap(), "hello");

    world.cluster.delete_pod("one").await.unwrap();
    assert_eq!(driver.verbs("vol").last().unwrap(), "unpublish");
    v.in_use(node, "vol", true).await;
    world.cluster.delete_pod("two").await.unwrap();
    assert_eq!(driver.verbs("vol")[3..], ["unpublish", "unpublish", "unstage"]);
    v.in_use(node, "vol", false).await;
    assert_eq!(fs::read_to_string(driver.volume("vol").join("file")).unwrap(), "hello");
    end(world, driver, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_knows_which_drivers_a_node_has() {
    let mut world = World::new("csi-node").await;
    let name = world.node.name().to_owned();
    let admin = &world.cluster.admin;
    let (node, csi_node) =
        (format!("/api/v1/nodes/{name}"), format!("/apis/storage.k8s.io/v1/csinodes/{name}"));
    let uid = admin.read(&node).await.unwrap()["metadata"]["uid"].clone();
    // It is there without any driver.
    let made = eventually("the CSINode", async || admin.read(&csi_node).await).await;
    assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], uid);
    let migrated = &made["metadata"]["annotations"]["storage.alpha.kubernetes.io/migrated-plugins"];
    assert!(migrated.as_str().unwrap().contains("kubernetes.io/aws-ebs,"), "{migrated}");

    let mut driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    let id = format!("id-of-{name}");
    let entry = json!([{"name": DRIVER, "nodeID": id, "topologyKeys": ["topology.test.example/rack"],
        "allocatable": {"count": 7}}]);
    assert_eq!(admin.read(&csi_node).await.unwrap()["spec"]["drivers"], entry);
    let note = "csi.volume.kubernetes.io/nodeid";
    let noted = format!("{{\"{DRIVER}\":\"{id}\"}}");
    let seen = admin.read(&node).await.unwrap();
    assert_eq!(seen["metadata"]["annotations"][note], noted);
    assert_eq!(seen["metadata"]["labels"]["topology.test.example/rack"], "r1");

    // Known again after a restart of either.
    world.node.restart().await.unwrap();
    driver.registered(2).await;
    driver.stop(&world.node, false).unwrap();
    driver.spawn(&world.node).unwrap();
    driver.registered(3).await;
    let admin = &world.cluster.admin;
    assert_eq!(admin.read(&csi_node).await.unwrap()["spec"]["drivers"], entry);

    // One that this node does not understand is told so.
    let old = json!({"capabilities": [], "nodeId": "x", "versions": ["0.3.0"]});
    let mut other = CsiDriver::prepare(&world.node, "old.test.example", old);
    other.spawn(&world.node).unwrap();
    eventually("the old driver is refused", async || {
        let calls = other.calls();
        let told = calls.iter().find(|c| c["verb"] == "notify").ok_or("not told")?;
        let why = told["error"].as_str().unwrap_or_default();
        if told["registered"] == false && why.contains("0.3.0") {
            Ok(())
        } else {
            Err("registered")
        }
    })
    .await;
    other.stop(&world.node, true).unwrap();

    driver.stop(&world.node, true).unwrap();
    eventually("the API forgets the driver", async || {
        let drivers = admin.read(&csi_node).await?["spec"]["drivers"].clone();
        let annotations = admin.read(&node).await?["metadata"]["annotations"].clone();
        if drivers.as_array().is_none_or(Vec::is_empty) && annotations[note].is_null() {
            Ok(())
        } else {
            anyhow::bail!("{drivers} {annotations}")
        }
    })
    .await;
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_cannot_be_used_says_why_and_is_used_once_it_can() {
    let world = World::new("csi-waits").await;
    let v = volumes(&world);
    let namespace = world.cluster.namespace();
    v.driver_object(json!({"attachRequired": false})).await.unwrap();
    v.claim("vol", json!({})).await.unwrap();
    v.phase("vol", "Pending").await.unwrap();
    world.cluster.pod(&world.node, "pod", claiming("vol", idle("c"))).await.unwrap();
    assert_eq!(
        world.event("pod", "FailedMount").await,
        format!(
            "Unable to attach or mount volumes: unmounted volumes=[data], unattached volumes=[], \
             failed to process volumes=[data]: error processing PVC {namespace}/vol: PVC is not bound"
        )
    );
    v.phase("vol", "Bound").await.unwrap();
    let words = format!("driver name {DRIVER} not found in the list of registered CSI drivers");
    eventually("the pod waits for the driver", async || {
        let events = world.cluster.admin.read(&world.cluster.path("events")).await?;
        let all = events["items"].as_array().cloned().unwrap_or_default();
        let told = |e: &Value| e["message"].as_str().is_some_and(|m| m.contains(&words));
        if all.iter().any(told) { Ok(()) } else { anyhow::bail!("{all:?}") }
    })
    .await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[]).await.unwrap();
    world.cluster.pod_ready("pod").await;
    // Without STAGE_UNSTAGE_VOLUME nothing is staged.
    assert_eq!(driver.verbs("vol"), ["publish"]);
    assert_eq!(driver.last("publish", "vol").unwrap()["staging"], "");

    let iscsi = json!({"iscsi": {"targetPortal": "10.0.0.9:3260", "iqn": "iqn.2001-04.com.example:s", "lun": 0}});
    v.claim_of("iscsi", iscsi).await.unwrap();
    world.cluster.pod(&world.node, "iscsi", claiming("iscsi", idle("c"))).await.unwrap();
    let said = world.event("iscsi", "FailedMount").await;
    assert!(said.contains("is of kind iscsi"), "{said}");
    // A pod that waits for its volumes is deleted without them.
    end(world, driver, &["iscsi", "pod"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_for_one_pod_is_mounted_for_another_once_that_has_gone() {
    let world = World::new("csi-one-pod").await;
    let v = volumes(&world);
    v.driver_object(json!({"attachRequired": false})).await.unwrap();
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    for (name, modes) in [
        ("one", json!(["ReadWriteOncePod"])),
        ("any", json!(["ReadWriteOnce", "ReadWriteOncePod"])),
    ] {
        let csi = json!({"driver": DRIVER, "volumeHandle": name});
        v.claim_of(name, json!({"accessModes": modes, "csi": csi})).await.unwrap();
    }
    for pod in ["any-1", "any-2"] {
        world.ready_pod(pod, claiming("any", idle("c"))).await;
    }
    world.ready_pod("first", claiming("one", idle("c"))).await;
    world.cluster.pod(&world.node, "second", claiming("one", idle("c"))).await.unwrap();
    let said = world.event("second", "FailedMount").await;
    let words = "MountVolume.SetUp failed for volume \"one\" : volume uses the ReadWriteOncePod access \
                 mode and is already in use by another pod";
    assert!(said.starts_with(words), "{said}");
    assert_eq!(driver.verbs("one"), ["stage", "publish"]);
    world.cluster.delete_pod("first").await.unwrap();
    world.cluster.pod_ready("second").await;
    end(world, driver, &["second", "any-1", "any-2"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inline_volumes_know_their_pod_and_are_brought_up_to_date() {
    let world = World::new("csi-inline").await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE, MOUNT_GROUP]).await.unwrap();
    let v = volumes(&world);
    v.driver_object(json!({"attachRequired": true, "podInfoOnMount": true,
        "volumeLifecycleModes": ["Ephemeral"], "requiresRepublish": true,
        "tokenRequests": [{"audience": "vault", "expirationSeconds": 3600}, {"audience": ""}]}))
        .await
        .unwrap();
    let volume = json!({"name": "data", "csi": {"driver": DRIVER, "volumeAttributes": {"a": "b"}}});
    let mut spec = mounting(volume, idle("c"));
    spec["securityContext"] = json!({"fsGroup": 4242});
    let pod = world.ready_pod("inline", spec).await;
    let target = folder(&world, &pod, "data").join("mount");
    let told: Value =
        serde_json::from_slice(&fs::read(target.join("context.json")).unwrap()).unwrap();
    assert_eq!(told["a"], "b");
    assert_eq!(told["csi.storage.k8s.io/pod.name"], "inline");
    assert_eq!(told["csi.storage.k8s.io/pod.namespace"], world.cluster.namespace());
    assert_eq!(told["csi.storage.k8s.io/pod.uid"], uid(&pod));
    assert_eq!(told["csi.storage.k8s.io/serviceAccount.name"], "default");
    assert_eq!(told["csi.storage.k8s.io/ephemeral"], "true");
    let tokens: Value =
        serde_json::from_str(told["csi.storage.k8s.io/serviceAccount.tokens"].as_str().unwrap())
            .unwrap();
    for audience in ["vault", ""] {
        let token = tokens[audience]["token"].as_str().unwrap();
        assert_eq!(token.split('.').count(), 3);
        assert!(tokens[audience]["expirationTimestamp"].is_string());
    }
    let publishes = || -> Vec<Value> {
        let calls = driver.calls();
        calls.into_iter().filter(|c| c["verb"] == "publish").collect()
    };
    let [first] = &publishes()[..] else { panic!("{:?}", publishes()) };
    assert_eq!(first["capability"]["group"], "4242");
    assert_eq!(first["staging"], "");
    // Of a pod's own there is one, attached to nothing.
    let handle = first["volume"].as_str().unwrap().to_owned();
    v.in_use(world.node.name(), &handle, false).await;
    eventually_within(Duration::from_secs(150), "the driver is asked again", async || {
        let n = publishes().len();
        if n > 1 { Ok(()) } else { Err(format!("{n} times")) }
    })
    .await;
    assert_eq!(publishes()[1]["path"], first["path"]);
    world.cluster.delete_pod("inline").await.unwrap();
    assert_eq!(driver.verbs(&handle).last().unwrap(), "unpublish");
    assert!(!driver.verbs(&handle).iter().any(|verb| verb.contains("stage")));
    end(world, driver, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_step_is_made_up_for() {
    let mut world = World::new("csi-kill").await;
    let mut driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    volumes(&world).driver_object(json!({"attachRequired": false})).await.unwrap();
    let called = async |driver: &CsiDriver, verb: &str, volume: &str| {
        eventually(&format!("{verb} of {volume}"), async || driver.last(verb, volume)).await
    };
    // The agent dies while the driver works; what the driver does then comes about all the same.
    for verb in ["stage", "publish"] {
        let name = format!("while-{verb}");
        volumes(&world).claim(&name, json!({})).await.unwrap();
        driver.hang(verb, true).unwrap();
        world.cluster.pod(&world.node, &name, claiming(&name, idle("c"))).await.unwrap();
        called(&driver, verb, &name).await;
        world.node.end(Signal::SIGKILL).await;
        driver.hang(verb, false).unwrap();
        world.node.restart().await.unwrap();
        world.cluster.pod_ready(&name).await;
    }
    // A pod that is in place is left alone by a restart.
    let calls = driver.calls().len();
    world.node.restart().await.unwrap();
    driver.registered(4).await;
    world.node.ready().await;
    let asked = driver.calls()[calls..].to_vec();
    let asked = asked.iter().filter(|c| c["volume"].is_string()).count();
    assert_eq!(asked, 0, "{:?}", &driver.calls()[calls..]);

    for verb in ["unpublish", "unstage"] {
        let name = if verb == "unpublish" { "while-stage" } else { "while-publish" };
        driver.hang(verb, true).unwrap();
        world.cluster.admin.remove(&world.cluster.path(&format!("pods/{name}"))).await.unwrap();
        called(&driver, verb, name).await;
        world.node.end(Signal::SIGKILL).await;
        driver.hang(verb, false).unwrap();
        world.node.restart().await.unwrap();
        world.cluster.pod_gone(name).await;
    }
    assert!(staged(&world).is_empty(), "{:?}", staged(&world));

    // Pods that went while the agent was away are cleaned up by what stands beside their volumes, once
    // the driver is there, too.
    volumes(&world).claim("gone", json!({})).await.unwrap();
    let pod = world.ready_pod("gone", claiming("gone", idle("c"))).await;
    fs::write(driver.volume("gone").join("file"), "kept").unwrap();
    world.node.end(Signal::SIGKILL).await;
    let now = json!({"gracePeriodSeconds": 0});
    let path = world.cluster.path("pods/gone");
    assert_eq!(world.cluster.admin.delete(&path, now).await.0, 200);
    driver.stop(&world.node, true).unwrap();
    // First the runtime still knows the pod, then nothing but its folder is left of it.
    let signs = ["cannot clean up after a pod", "cannot take away yet what an earlier pod left"];
    for sign in signs {
        world.node.restart().await.unwrap();
        eventually(sign, async || {
            let log = world.node.log_tail(100);
            if log.contains(sign) { Ok(()) } else { Err(log) }
        })
        .await;
    }
    driver.spawn(&world.node).unwrap();
    eventually("the vanished pod's volume is taken back", async || {
        let left = (staged(&world), folder(&world, &pod, "gone").exists());
        if left.0.is_empty() && !left.1 { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    assert_eq!(driver.verbs("gone"), ["stage", "publish", "unpublish", "unstage"]);
    assert_eq!(fs::read_to_string(driver.volume("gone").join("file")).unwrap(), "kept");
    end(world, driver, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_grows_where_the_controller_leaves_it_to_the_node() {
    let mut world = World::new("csi-grows").await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE, EXPAND]).await.unwrap();
    volumes(&world).driver_object(json!({"attachRequired": false})).await.unwrap();
    volumes(&world).claim("vol", json!({})).await.unwrap();
    let path = world.cluster.path("persistentvolumeclaims/vol");
    // What the resizer does before it leaves the rest to the node.
    let enlarge = async |world: &World, size: &str| {
        let admin = &world.cluster.admin;
        let capacity = json!({"spec": {"capacity": {"storage": size}}});
        assert_eq!(admin.patch("/api/v1/persistentvolumes/vol", MERGE, capacity).await.0, 200);
        let asked = json!({"status": {"allocatedResourceStatuses": {"storage": "NodeResizePending"},
            "conditions": [{"type": "FileSystemResizePending", "status": "True"}]}});
        let path = world.cluster.path("persistentvolumeclaims/vol");
        assert_eq!(admin.patch(&format!("{path}/status"), MERGE, asked).await.0, 200);
    };
    let status = async |world: &World, what: &str, good: &dyn Fn(&Value) -> bool| {
        eventually(what, async || {
            let status = world.cluster.admin.read(&path).await?["status"].clone();
            if good(&status) { Ok(status) } else { anyhow::bail!("{status}") }
        })
        .await
    };
    enlarge(&world, "2Gi").await;
    world.ready_pod("grows", claiming("vol", idle("c"))).await;
    let grown = status(&world, "the claim says 2Gi", &|s| s["capacity"]["storage"] == "2Gi").await;
    assert!(grown["allocatedResourceStatuses"]["storage"].is_null(), "{grown}");
    assert!(grown["conditions"].as_array().is_none_or(Vec::is_empty), "{grown}");
    let expand = driver.last("expand", "vol").unwrap();
    assert_eq!(expand["bytes"], 2_i64 << 30);
    assert_eq!(expand["path"], driver.last("publish", "vol").unwrap()["path"]);
    assert_eq!(expand["staging"], driver.last("stage", "vol").unwrap()["path"]);

    // While the pod runs; a size that the driver cannot give is the controller's matter again.
    driver.fail("expand", Some("11 the disk has no more")).unwrap();
    enlarge(&world, "3Gi").await;
    world.node.restart().await.unwrap();
    let refused = status(&world, "the claim says that it cannot", &|s| {
        s["allocatedResourceStatuses"]["storage"] == "NodeResizeInfeasible"
    })
    .await;
    assert!(refused["conditions"].to_string().contains("the disk has no more"), "{refused}");
    driver.fail("expand", None).unwrap();
    enlarge(&world, "3Gi").await;
    world.node.restart().await.unwrap();
    status(&world, "the claim says 3Gi", &|s| s["capacity"]["storage"] == "3Gi").await;
    assert_eq!(driver.verbs("vol"), ["stage", "publish", "expand", "expand", "expand"]);
    end(world, driver, &["grows"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_a_claim_starts_again_while_the_control_plane_is_away() {
    let mut world = World::new("csi-away").await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    volumes(&world).driver_object(json!({"attachRequired": false})).await.unwrap();
    volumes(&world).claim("vol", json!({})).await.unwrap();
    let script =
        "echo start >> /data/starts; while [ ! -e /data/end ]; do sleep 0.1; done; rm /data/end";
    world.ready_pod("away", claiming("vol", sh("c", script))).await;
    // What was learnt is on disk before long.
    let kept = world.node.path("/var/lib/kubelet/longshore/storage.jsonl");
    eventually("what is behind the claim is kept", async || {
        let text = fs::read_to_string(&kept).map_err(|e| e.to_string())?;
        let all = ["PersistentVolumeClaim", "PersistentVolume vol", "CSIDriver"];
        if all.iter().all(|kind| text.contains(kind)) { Ok(()) } else { Err(text) }
    })
    .await;
    world.cluster.cut().await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    fs::write(driver.volume("vol").join("end"), "").unwrap();
    eventually("the container starts again", async || {
        let starts = fs::read_to_string(driver.volume("vol").join("starts")).unwrap_or_default();
        if starts.lines().count() == 2 { Ok(()) } else { Err(starts) }
    })
    .await;
    assert_eq!(driver.verbs("vol"), ["stage", "publish"]);
    world.cluster.restore().unwrap();
    end(world, driver, &["away"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_during_a_churn_of_pods_with_claims() {
    let mut world = World::new("csi-churn").await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    volumes(&world).driver_object(json!({"attachRequired": false})).await.unwrap();
    let claims = ["red", "green", "blue"];
    for claim in claims {
        volumes(&world).claim(claim, json!({})).await.unwrap();
        fs::create_dir_all(driver.volume(claim)).unwrap();
        fs::write(driver.volume(claim).join("file"), claim).unwrap();
    }
    let mut random = fastrand::Rng::with_seed(crate::restart::seed());
    let (mut live, mut made) = (Vec::<String>::new(), 0);
    for _ in 0..12 {
        for _ in 0..random.usize(1..4) {
            if random.bool() || live.len() < 2 {
                made += 1;
                let name = format!("churn-{made}");
                let spec = claiming(claims[random.usize(..3)], idle("c"));
                world.cluster.pod(&world.node, &name, spec).await.unwrap();
                live.push(name);
            } else {
                let name = live.swap_remove(random.usize(..live.len()));
                let path = world.cluster.path(&format!("pods/{name}"));
                world.cluster.admin.remove(&path).await.unwrap();
            }
        }
        tokio::time::sleep(Duration::from_millis(random.u64(0..500))).await;
        world.node.restart().await.unwrap();
    }
    for name in &live {
        let pod = world.cluster.pod_ready(name).await;
        assert_eq!(restarts(&pod, "c"), 0, "{name} was restarted: {}", pod["status"]);
        let claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"].as_str();
        let claim = claim.unwrap();
        let file = folder(&world, &pod, claim).join("mount/file");
        assert_eq!(fs::read_to_string(file).unwrap(), claim);
    }
    let live: Vec<&str> = live.iter().map(String::as_str).collect();
    for claim in claims {
        assert_eq!(fs::read_to_string(driver.volume(claim).join("file")).unwrap(), claim);
    }
    end(world, driver, &live).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_driver_does_not_take_back_is_kept_with_all_it_holds() {
    let mut world = World::new("csi-stuck").await;
    let mut driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    volumes(&world).driver_object(json!({"attachRequired": false})).await.unwrap();
    volumes(&world).claim("vol", json!({})).await.unwrap();
    let mut spec = claiming("vol", idle("c"));
    // Also what is mounted of a part of it.
    spec["containers"][0]["volumeMounts"][0]["subPath"] = "part".into();
    let pod = world.ready_pod("stuck", spec).await;
    assert!(driver.volume("vol").join("part").is_dir());
    fs::write(driver.volume("vol").join("part/file"), "precious").unwrap();
    let target = folder(&world, &pod, "vol").join("mount");
    let intact = || {
        assert_eq!(fs::read_to_string(target.join("part/file")).unwrap(), "precious");
        assert!(target.with_file_name("vol_data.json").exists());
    };
    driver.fail("unpublish", Some("13 the disk is stuck")).unwrap();
    world.cluster.admin.remove(&world.cluster.path("pods/stuck")).await.unwrap();
    eventually("the driver refuses", async || driver.last("unpublish", "vol")).await;
    intact();
    // Nor without the driver, nor by a new agent.
    driver.stop(&world.node, true).unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    intact();
    assert!(world.cluster.read_pod("stuck").await.is_ok(), "the pod is gone, its volume is not");
    driver.fail("unpublish", None).unwrap();
    driver.spawn(&world.node).unwrap();
    world.cluster.pod_gone("stuck").await;
    assert_eq!(fs::read_to_string(driver.volume("vol").join("part/file")).unwrap(), "precious");
    end(world, driver, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_belong_to_the_pods_group_and_local_ones_need_no_driver() {
    use std::os::unix::fs::MetadataExt as _;
    let world = World::new("csi-group").await;
    let driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    let v = volumes(&world);
    v.driver_object(json!({"attachRequired": false, "fsGroupPolicy": "File"})).await.unwrap();
    v.claim("vol", json!({})).await.unwrap();
    let local = world.node.path("/var/lib/local");
    fs::create_dir_all(local.join("deep")).unwrap();
    fs::write(local.join("deep/file"), "local").unwrap();
    fs::create_dir_all(driver.volume("vol")).unwrap();
    fs::write(driver.volume("vol").join("file"), "csi").unwrap();
    let local_volume = json!({"local": {"path": "/var/lib/local"}, "mountOptions": ["noexec"]});
    v.claim_of("local", local_volume).await.unwrap();
    v.claim_of("host", json!({"hostPath": {"path": "/var/lib/local/deep", "type": "Directory"}}))
        .await
        .unwrap();
    let claim = |name: &str, read_only: bool| json!({"name": name, "persistentVolumeClaim": {"claimName": name, "readOnly": read_only}});
    let mount = |name: &str| json!({"name": name, "mountPath": format!("/{name}")});
    let script = "stat -c %g /vol/file /local/deep/file; cat /vol/file /local/deep/file /host/file; \
        id -G | grep -c 4242; touch /host/x 2>/dev/null || echo read-only; touch /local/y; \
        grep -c ' /local [^ ]* [^ ]*noexec' /proc/mounts";
    let container = with(
        sh("c", &format!("({script}) > /dev/termination-log")),
        json!({"volumeMounts": [mount("vol"), mount("local"), mount("host")]}),
    );
    let message = world
        .run_to_end(
            "group",
            json!({"containers": [container], "securityContext": {"fsGroup": 4242},
            "volumes": [claim("vol", false), claim("local", false), claim("host", true)]}),
        )
        .await;
    assert_eq!(message, "4242\n4242\ncsilocallocal1\nread-only\n1\n");
    assert_eq!(fs::metadata(local.join("y")).unwrap().gid(), 4242, "setgid");
    world.cluster.delete_pod("group").await.unwrap();
    assert_eq!(fs::read_to_string(local.join("deep/file")).unwrap(), "local");
    end(world, driver, &[]).await;
}
