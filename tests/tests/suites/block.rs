//! Volumes that are given as devices (`volumeMode: Block`): a CSI driver's, which are loop devices, and
//! those of the node.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::harness::caller::MERGE;
use tests::harness::csi::{CsiDriver, EXPAND, STAGE};
use tests::harness::eventually;
use tests::harness::leaks::loops;

use crate::csi::{DRIVER, uid, volumes};
use crate::support::{World, idle, restarts, sh, with};

const DEVICE: &str = "/dev/xvda";
const DEVICES: &str = "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices";

/// A pod spec whose container has the claim as a device.
fn having(claim: &str, container: Value) -> Value {
    let device = json!({"volumeDevices": [{"name": "data", "devicePath": DEVICE}]});
    let source = json!({"name": "data", "persistentVolumeClaim": {"claimName": claim}});
    json!({"containers": [with(container, device)], "volumes": [source]})
}

/// The pod's link to its device, as the test reaches it.
fn link(world: &World, pod: &Value, plugin: &str, name: &str) -> PathBuf {
    let folder = format!("/var/lib/kubelet/pods/{}/volumeDevices", uid(pod));
    world.node.path(&format!("{folder}/kubernetes.io~{plugin}/{name}"))
}

/// What is left of devices on the node: loop devices, and what is in kubelet's folders of them.
fn left(world: &World) -> Vec<PathBuf> {
    let mut found = loops(world.lab.id());
    for folder in ["", "/staging", "/publish"] {
        let entries = fs::read_dir(world.node.path(&format!("{DEVICES}{folder}")));
        let paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
        found.extend(paths.filter(|path| !path.ends_with("staging") && !path.ends_with("publish")));
    }
    found
}

async fn nothing_left(world: &World) {
    eventually("nothing of devices is left", async || {
        let found = left(world);
        if found.is_empty() { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_share_a_device_that_is_staged_once() {
    let mut world = World::new("block-claim").await;
    let mut driver = CsiDriver::start(&world.node, DRIVER, &[STAGE, EXPAND]).await.unwrap();
    let (v, name) = (volumes(&world), world.node.name().to_owned());
    v.driver_object(json!({"attachRequired": true, "fsGroupPolicy": "File"})).await.unwrap();
    v.device("disk").await.unwrap();
    // It shall grow, too.
    let admin = &world.cluster.admin;
    let capacity = json!({"spec": {"capacity": {"storage": "2Gi"}}});
    assert_eq!(admin.patch("/api/v1/persistentvolumes/disk", MERGE, capacity).await.0, 200);
    let claim = world.cluster.path("persistentvolumeclaims/disk");
    let asked = json!({"status": {"allocatedResourceStatuses": {"storage": "NodeResizePending"}}});
    assert_eq!(admin.patch(&format!("{claim}/status"), MERGE, asked).await.0, 200);

    let script = format!(
        "test -b {DEVICE} && echo written | dd of={DEVICE} conv=sync,fsync && \
         while :; do sleep 1; done"
    );
    let mut spec = having("disk", sh("c", &script));
    spec["securityContext"] = json!({"fsGroup": 4242});
    // Init containers have it as well.
    let init = sh("init", &format!("test -b {DEVICE}"));
    spec["initContainers"] =
        json!([with(init, json!({"volumeDevices": [{"name": "data", "devicePath": DEVICE}]}))]);
    world.cluster.pod(&world.node, "one", spec).await.unwrap();
    v.in_use(&name, "disk", true).await;
    assert_eq!(driver.verbs("disk"), Vec::<String>::new());
    v.attach(&name, "disk", json!({"device": "sdz"})).await.unwrap();
    let one = world.cluster.pod_ready("one").await;
    eventually("the pod writes to its device", async || {
        let disk = fs::read(driver.disk("disk")).map_err(|error| error.to_string())?;
        if disk.starts_with(b"written\n") { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;

    let published = format!("{DEVICES}/publish/disk/{}", uid(&one));
    let stage = driver.last("stage", "disk").unwrap();
    assert_eq!(stage["path"], format!("{DEVICES}/staging/disk"));
    let publish = driver.last("publish", "disk").unwrap();
    assert_eq!(publish["path"], published);
    assert_eq!(publish["staging"], stage["path"]);
    assert_eq!(publish["capability"], json!({"mode": 1, "block": true}));
    assert_eq!(publish["publishContext"], json!({"device": "sdz"}));
    let expand = driver.last("expand", "disk").unwrap();
    assert_eq!((&expand["path"], &expand["bytes"]), (&publish["path"], &json!(2_i64 << 30)));
    let of_pod = link(&world, &one, "csi", "disk");
    assert_eq!(fs::read_link(&of_pod).unwrap().to_str(), Some(published.as_str()));
    let record = world.node.path(&format!("{DEVICES}/disk/data/vol_data.json"));
    let record: Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
    let told = ["driverName", "volumeHandle", "specVolID", "nodeName"].map(|key| &record[key]);
    assert_eq!(told, [DRIVER, "disk", "disk", name.as_str()]);

    // A restart asks nothing of the driver, and leaves the pod alone.
    world.node.restart().await.unwrap();
    driver.registered(2).await;
    world.node.ready().await;
    // Another pod reads what is there, and its cgroup lets it do no more.
    let script = format!(
        "(dd if={DEVICE} bs=8 count=1 2>/dev/null; \
         (echo x > {DEVICE}) 2>/dev/null || echo read-only) > /dev/termination-log"
    );
    let mut spec = having("disk", sh("c", &script));
    spec["volumes"][0]["persistentVolumeClaim"]["readOnly"] = true.into();
    assert_eq!(world.run_to_end("two", spec).await, "written\nread-only\n");
    assert_eq!(driver.last("publish", "disk").unwrap()["readonly"], true);
    world.cluster.delete_pod("two").await.unwrap();
    // A pod that has ended is gone from the API at once.
    eventually("the second pod's device is taken back", async || {
        let asked = driver.verbs("disk");
        let two = ["stage", "publish", "expand", "publish", "unpublish"];
        if asked == two { Ok(()) } else { Err(format!("{asked:?}")) }
    })
    .await;
    assert_eq!(loops(world.lab.id()).len(), 1, "the other pod has it");
    assert_eq!(restarts(&world.cluster.read_pod("one").await.unwrap(), "c"), 0);

    // What the driver does not take back stays, and so does the pod.
    driver.fail("unpublish", Some("13 the disk is stuck")).unwrap();
    world.cluster.admin.remove(&world.cluster.path("pods/one")).await.unwrap();
    eventually("the driver refuses", async || {
        let n = driver.verbs("disk").iter().filter(|verb| *verb == "unpublish").count();
        if n > 1 { Ok(()) } else { Err(n) }
    })
    .await;
    assert_eq!(loops(world.lab.id()).len(), 1);
    driver.fail("unpublish", None).unwrap();
    world.cluster.pod_gone("one").await;
    assert_eq!(driver.verbs("disk").last().unwrap(), "unstage");
    assert!(fs::read(driver.disk("disk")).unwrap().starts_with(b"written\n"));
    volumes(&world).in_use(&name, "disk", false).await;
    nothing_left(&world).await;
    driver.stop(&world.node, true).unwrap();
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_step_leaves_no_device() {
    let mut world = World::new("block-kill").await;
    let mut driver = CsiDriver::start(&world.node, DRIVER, &[STAGE]).await.unwrap();
    volumes(&world).driver_object(json!({"attachRequired": false})).await.unwrap();
    volumes(&world).device("disk").await.unwrap();
    let called = async |driver: &CsiDriver, verb: &str| {
        eventually(&format!("{verb} of disk"), async || driver.last(verb, "disk")).await
    };
    for verb in ["stage", "publish"] {
        driver.hang(verb, true).unwrap();
        world.cluster.pod(&world.node, verb, having("disk", idle("c"))).await.unwrap();
        // A device is staged once, so that the second pod comes straight to its publishing.
        eventually(&format!("{verb} is asked for"), async || {
            let wanted = if verb == "stage" { 1 } else { 2 };
            let n = driver.verbs("disk").iter().filter(|v| *v == verb).count();
            if n >= wanted { Ok(()) } else { Err(n) }
        })
        .await;
        world.node.end(Signal::SIGKILL).await;
        driver.hang(verb, false).unwrap();
        world.node.restart().await.unwrap();
        world.cluster.pod_ready(verb).await;
    }
    assert_eq!(loops(world.lab.id()).len(), 1);
    for (verb, pod) in [("unpublish", "stage"), ("unstage", "publish")] {
        driver.hang(verb, true).unwrap();
        world.cluster.admin.remove(&world.cluster.path(&format!("pods/{pod}"))).await.unwrap();
        called(&driver, verb).await;
        world.node.end(Signal::SIGKILL).await;
        driver.hang(verb, false).unwrap();
        world.node.restart().await.unwrap();
        world.cluster.pod_gone(pod).await;
    }
    nothing_left(&world).await;

    // A pod that went while the agent was away is cleaned up by what stands beside its device.
    let pod = world.ready_pod("gone", having("disk", idle("c"))).await;
    world.node.end(Signal::SIGKILL).await;
    let now = json!({"gracePeriodSeconds": 0});
    assert_eq!(world.cluster.admin.delete(&world.cluster.path("pods/gone"), now).await.0, 200);
    world.node.restart().await.unwrap();
    nothing_left(&world).await;
    eventually("the pod's folder is gone", async || {
        let folder = world.node.path(&format!("/var/lib/kubelet/pods/{}", uid(&pod)));
        if folder.exists() { Err("still there") } else { Ok(()) }
    })
    .await;
    driver.stop(&world.node, true).unwrap();
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_of_the_node_needs_no_driver_and_modes_must_fit() {
    let world = World::new("block-local").await;
    let v = volumes(&world);
    let disk = world.node.path(&format!("/var/lib/disk.{}.img", world.lab.id()));
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let file = format!("/var/lib/disk.{}.img", world.lab.id());
    let device = world.node.run("losetup", &["--find", "--show", &file]).unwrap();
    let device = device.trim();
    // As udev names disks.
    world.node.run("ln", &["-s", device, "/var/lib/by-id"]).unwrap();
    let here = json!({"required": {"nodeSelectorTerms": [{"matchExpressions":
        [{"key": "kubernetes.io/hostname", "operator": "Exists"}]}]}});
    let local =
        |path: &str| json!({"volumeMode": "Block", "local": {"path": path}, "nodeAffinity": here});
    v.claim_of("raw", local("/var/lib/by-id")).await.unwrap();
    v.claim_of("folder", local("/var/lib/kubelet")).await.unwrap();
    let files = json!({"local": {"path": "/var/lib/kubelet/plugins"}, "nodeAffinity": here});
    v.claim_of("files", files).await.unwrap();

    let script = format!(
        "test -b {DEVICE} && echo local | dd of={DEVICE} conv=sync,fsync && \
         while :; do sleep 1; done"
    );
    let pod = world.ready_pod("raw", having("raw", sh("c", &script))).await;
    eventually("the pod writes to its device", async || {
        let text = fs::read(&disk).map_err(|error| error.to_string())?;
        if text.starts_with(b"local\n") { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    let of_pod = link(&world, &pod, "local-volume", "raw");
    assert_eq!(fs::read_link(&of_pod).unwrap().to_str(), Some(device));

    let wrong = "volume data has volumeMode";
    world.cluster.pod(&world.node, "as-files", having("files", idle("c"))).await.unwrap();
    let told = world.event("as-files", "FailedMount").await;
    let words = format!("{wrong} Filesystem, but is specified in volumeDevices");
    assert!(told.contains(&words), "{told}");
    let mount = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "volumeDevices": []});
    let mut spec = having("raw", idle("c"));
    spec["containers"][0] = with(spec["containers"][0].clone(), mount);
    world.cluster.pod(&world.node, "as-device", spec).await.unwrap();
    let told = world.event("as-device", "FailedMount").await;
    let words = format!("{wrong} Block, but is specified in volumeMounts");
    assert!(told.contains(&words), "{told}");
    world.cluster.pod(&world.node, "no-device", having("folder", idle("c"))).await.unwrap();
    let told = world.event("no-device", "FailedMapVolume").await;
    assert!(told.contains("is no block device"), "{told}");

    for pod in ["raw", "as-files", "as-device", "no-device"] {
        world.cluster.delete_pod(pod).await.unwrap();
    }
    assert!(fs::read(&disk).unwrap().starts_with(b"local\n"));
    world.node.run("losetup", &["--detach", device]).unwrap();
    nothing_left(&world).await;
    world.end(&[]).await;
}
