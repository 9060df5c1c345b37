//! Volumes that the node mounts itself, without a driver: file systems on its devices and a server's
//! folders; and those of in-tree kinds, which drivers have by now.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::harness::csi::{CsiDriver, STAGE, Volumes};
use tests::harness::eventually;
use tests::harness::leaks::loops;

use crate::csi::{DRIVER, uid, volumes};
use crate::support::{World, idle, restarts, sh, with};

const MOUNTS: &str = "/var/lib/kubelet/plugins/kubernetes.io/local-volume/mounts";

/// A pod spec whose container mounts `volume` at /data.
fn mounting(volume: Value, container: Value) -> Value {
    let mount = json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]});
    let mut volume = volume;
    volume["name"] = "data".into();
    json!({"containers": [with(container, mount)], "volumes": [volume]})
}

fn claiming(claim: &str, container: Value) -> Value {
    mounting(json!({"persistentVolumeClaim": {"claimName": claim}}), container)
}

/// A PersistentVolume on this node's `path`.
fn local(path: &str, fs_type: Option<&str>) -> Value {
    let here = json!({"required": {"nodeSelectorTerms": [{"matchExpressions":
        [{"key": "kubernetes.io/hostname", "operator": "Exists"}]}]}});
    json!({"local": {"path": path, "fsType": fs_type}, "nodeAffinity": here})
}

/// A loop device of the lab over a file of so many MiB, and the file as the test reaches it.
fn disk(world: &World, name: &str, size: usize) -> (String, PathBuf) {
    let inside = format!("/var/lib/{name}.{}.img", world.lab.id());
    let file = world.node.path(&inside);
    fs::write(&file, vec![0; size << 20]).unwrap();
    let device = world.node.run("losetup", &["--find", "--show", &inside]).unwrap();
    (device.trim().to_owned(), file)
}

fn mount_of(world: &World, name: &str) -> Option<String> {
    let table = fs::read_to_string(format!("/proc/{}/mounts", world.node.init_pid())).unwrap();
    let at = format!("{MOUNTS}/{name}");
    table.lines().find(|line| line.split(' ').nth(1) == Some(at.as_str())).map(str::to_owned)
}

async fn unmounted(world: &World, name: &str) {
    eventually(&format!("{name} is unmounted"), async || match mount_of(world, name) {
        Some(mount) => Err(mount),
        None if world.node.path(&format!("{MOUNTS}/{name}")).exists() => Err("folder".into()),
        None => Ok(()),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_gets_a_file_system_once_and_keeps_what_it_holds() {
    let mut world = World::new("storage-disk").await;
    let v = volumes(&world);
    let (device, file) = disk(&world, "empty", 32);
    let (partitioned, table) = disk(&world, "table", 4);
    // A partition table of one partition (MBR).
    let mut sector = vec![0; 512];
    sector[446..462].copy_from_slice(&[0, 2, 3, 0, 0x83, 9, 9, 0, 1, 0, 0, 0, 100, 0, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&table, [sector, vec![7; (4 << 20) - 512]].concat()).unwrap();
    let before = fs::read(&table).unwrap();
    let mut source = local(&device, None);
    source["mountOptions"] = json!(["noatime", "errors=remount-ro"]);
    v.claim_of("empty", source).await.unwrap();
    v.claim_of("table", local(&partitioned, Some("ext4"))).await.unwrap();

    // It is read-only at first, and nothing is made on it.
    let mut spec = claiming("empty", idle("c"));
    spec["volumes"][0]["persistentVolumeClaim"]["readOnly"] = true.into();
    world.cluster.pod(&world.node, "reader", spec).await.unwrap();
    let told = world.event("reader", "FailedMount").await;
    assert!(told.contains("holds no file system, and is used read-only"), "{told}");
    world.cluster.delete_pod("reader").await.unwrap();
    assert!(fs::read(&file).unwrap().iter().all(|byte| *byte == 0));

    let script = "echo kept > /data/file && while :; do sleep 1; done";
    let mut spec = claiming("empty", sh("c", script));
    spec["securityContext"] = json!({"fsGroup": 4242});
    let one = world.ready_pod("one", spec).await;
    let mount = mount_of(&world, "empty").unwrap();
    assert!(mount.starts_with(&format!("{device} ")) && mount.contains(" ext4 "), "{mount}");
    assert!(mount.contains("noatime"), "{mount}");
    let folder = format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~local-volume", uid(&one));
    eventually("the pod writes", async || {
        fs::read_to_string(world.node.path(&format!("{folder}/empty/file")))
    })
    .await;
    // A second pod shares it over a kill of the agent, and it stays while one has it.
    world.node.end(Signal::SIGKILL).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let script = "(cat /data/file; stat -c %g /data) > /dev/termination-log";
    assert_eq!(world.run_to_end("two", claiming("empty", sh("c", script))).await, "kept\n4242\n");
    world.cluster.delete_pod("two").await.unwrap();
    assert!(mount_of(&world, "empty").is_some());
    assert_eq!(restarts(&world.cluster.read_pod("one").await.unwrap(), "c"), 0);
    world.cluster.delete_pod("one").await.unwrap();
    unmounted(&world, "empty").await;
    // It is checked and mounted as it is.
    let script = "cat /data/file > /dev/termination-log";
    assert_eq!(world.run_to_end("three", claiming("empty", sh("c", script))).await, "kept\n");

    // What holds something else is never written to.
    world.cluster.pod(&world.node, "table", claiming("table", idle("c"))).await.unwrap();
    let told = world.event("table", "FailedMount").await;
    assert!(told.contains("failed to mount device"), "{told}");
    world.cluster.delete_pod("table").await.unwrap();
    assert!(fs::read(&table).unwrap() == before, "the device has changed");

    world.cluster.delete_pod("three").await.unwrap();
    unmounted(&world, "empty").await;
    for device in [device, partitioned] {
        world.node.run("losetup", &["--detach", &device]).unwrap();
    }
    eventually("no loop device is left", async || {
        let left = loops(world.lab.id());
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    world.end(&[]).await;
}

/// In the place of mount.nfs: tells what it was asked for, and mounts a folder for it.
const HELPER: &str = r#"#!/bin/sh
echo "$@" >> /run/nfs-calls
exec mount -i -t tmpfs tmpfs "$2"
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_folder_is_mounted_by_its_helper() {
    let mut world = World::new("storage-nfs").await;
    // Helpers of the test's own, in the node's mounts alone.
    for script in [
        "mkdir -p /run/sbin/upper /run/sbin/work",
        "mount -t overlay overlay \
         -o lowerdir=/usr/sbin,upperdir=/run/sbin/upper,workdir=/run/sbin/work /usr/sbin",
        "rm -f /usr/sbin/mount.nfs",
    ] {
        world.node.run("sh", &["-c", script]).unwrap();
    }
    let v = volumes(&world);
    let nfs = json!({"nfs": {"server": "nas.test.example", "path": "/export"}});
    let mut source = nfs.clone();
    source["mountOptions"] = json!(["nfsvers=4.1", "hard"]);
    v.claim_of("share", source).await.unwrap();
    let mut inline = nfs;
    inline["nfs"]["readOnly"] = true.into();
    world.cluster.pod(&world.node, "inline", mounting(inline, idle("c"))).await.unwrap();
    let told = world.event("inline", "FailedMount").await;
    assert!(told.contains("install nfs-common"), "{told}");
    world.node.run("sh", &["-c", &format!("cat > /run/helper <<'END'\n{HELPER}END\n")]).unwrap();
    let install = "install -m 755 /run/helper /usr/sbin/mount.nfs";
    world.node.run("sh", &["-c", install]).unwrap();
    let one = world.cluster.pod_ready("inline").await;
    let calls = || fs::read_to_string(world.node.path("/run/nfs-calls")).unwrap_or_default();
    let target = |pod: &Value, name: &str| {
        format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~nfs/{name}", uid(pod))
    };
    let expected = format!("nas.test.example:/export {} -o ro", target(&one, "data"));
    assert!(calls().contains(&expected), "{}", calls());
    let two = world.ready_pod("claim", claiming("share", idle("c"))).await;
    let expected =
        format!("nas.test.example:/export {} -o rw,nfsvers=4.1,hard", target(&two, "share"));
    assert!(calls().contains(&expected), "{}", calls());
    let before = calls();
    world.node.end(Signal::SIGKILL).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let now = world.cluster.read_pod("claim").await.unwrap();
    assert_eq!(restarts(&now, "c"), 0);
    assert_eq!(fs::read_to_string(world.node.path("/run/nfs-calls")).unwrap(), before);
    world.end(&["inline", "claim"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_tree_kinds_are_their_drivers() {
    const EBS: &str = "ebs.csi.aws.com";
    assert_ne!(EBS, DRIVER);
    let world = World::new("storage-in-tree").await;
    let mut driver = CsiDriver::start(&world.node, EBS, &[STAGE]).await.unwrap();
    let (admin, namespace) = (&world.cluster.admin, world.cluster.namespace());
    let v = Volumes { admin, namespace, driver: EBS };
    let name = world.node.name().to_owned();
    v.driver_object(json!({"attachRequired": true})).await.unwrap();
    let ebs = json!({"awsElasticBlockStore": {"volumeID": "aws://zone-a/vol-1", "fsType": "ext4"}});
    v.claim_of("disk", ebs).await.unwrap();
    world.cluster.pod(&world.node, "claim", claiming("disk", idle("c"))).await.unwrap();
    v.in_use(&name, "vol-1", true).await;
    v.attach(&name, "vol-1", json!({"device": "sdz"})).await.unwrap();
    let pod = world.cluster.pod_ready("claim").await;
    let publish = driver.last("publish", "vol-1").unwrap();
    let folder = format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi", uid(&pod));
    assert_eq!(publish["path"], format!("{folder}/disk/mount"));
    let inline = json!({"awsElasticBlockStore": {"volumeID": "vol-2", "readOnly": true}});
    world.cluster.pod(&world.node, "inline", mounting(inline, idle("c"))).await.unwrap();
    v.in_use(&name, "vol-2", true).await;
    v.attach(&name, "vol-2", json!({"device": "sdy"})).await.unwrap();
    let pod = world.cluster.pod_ready("inline").await;
    let publish = driver.last("publish", "vol-2").unwrap();
    let folder = format!("/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi", uid(&pod));
    assert_eq!(publish["path"], format!("{folder}/{EBS}-vol-2/mount"));
    assert_eq!(publish["readonly"], true);
    for pod in ["claim", "inline"] {
        world.cluster.delete_pod(pod).await.unwrap();
    }
    for volume in ["vol-1", "vol-2"] {
        eventually("all is taken back", async || {
            let verbs = driver.verbs(volume);
            if verbs.last().is_some_and(|verb| verb == "unstage") {
                Ok(())
            } else {
                Err(verbs.join(" "))
            }
        })
        .await;
    }
    driver.stop(&world.node, true).unwrap();
    world.end(&[]).await;
}
