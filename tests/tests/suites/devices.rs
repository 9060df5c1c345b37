//! Devices of device plugins, with a plugin that holds the node to what it was told.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::harness::devices::{DevicePlugin, pod_resources};
use tests::harness::eventually;

use crate::support::{World, container, idle, restarts, sh, with};

const DEV: &str = "test.example/dev";

/// `base` with `count` devices.
fn using(base: Value, count: u32) -> Value {
    let count = count.to_string();
    with(base, json!({"resources": {"limits": {DEV: count}, "requests": {DEV: count}}}))
}

/// A container that tells what devices it has, and idles.
fn telling(name: &str, count: u32) -> Value {
    let script = "echo \"has $DEV\" > /dev/termination-log; trap 'exit 0' TERM; \
        while :; do sleep 1000 & wait; done";
    using(sh(name, script), count)
}

/// Waits until the Node tells of so many devices, and so many that pods may have.
async fn counted(world: &World, capacity: u32, allocatable: u32) {
    let path = format!("/api/v1/nodes/{}", world.node.name());
    eventually(&format!("{capacity} devices, {allocatable} to have"), async || {
        let node = world.cluster.admin.read(&path).await?;
        let of = |list: &str| node["status"][list][DEV].as_str().unwrap_or("none").to_owned();
        let found = (of("capacity"), of("allocatable"));
        if found == (capacity.to_string(), allocatable.to_string()) {
            Ok(())
        } else {
            anyhow::bail!("{found:?}")
        }
    })
    .await;
}

/// Deletes the pods while the plugin still runs, and checks that nothing is left.
async fn end(world: World, mut plugin: DevicePlugin, pods: &[&str]) {
    for pod in pods {
        world.cluster.delete_pod(pod).await.unwrap();
    }
    plugin.stop();
    world.end(&[]).await;
}

async fn failed(world: &World, name: &str) -> (String, String) {
    let pod = world.cluster.pod_until(name, "failed", |p| p["status"]["phase"] == "Failed").await;
    let text = |field: &str| pod["status"][field].as_str().unwrap_or_default().to_owned();
    (text("reason"), text("message"))
}

async fn until_ended(world: &World, name: &str) -> Value {
    world.cluster.pod_until(name, "ended", crate::support::ended).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_get_what_the_plugin_says_and_give_it_back() {
    let world = World::new("devices-use").await;
    let options = json!({"preferred": true, "preStart": true, "cdi": "test.example/cdi"});
    std::fs::create_dir_all(world.node.path("/etc/cdi")).unwrap();
    let devices: Vec<Value> = ["a", "b", "c", "d"]
        .map(|id| json!({"name": id, "containerEdits": {"env": [format!("CDI_{id}=yes")]}}))
        .into();
    let spec = json!({"cdiVersion": "0.6.0", "kind": "test.example/cdi", "devices": devices});
    std::fs::write(world.node.path("/etc/cdi/test.json"), spec.to_string()).unwrap();
    let plugin = DevicePlugin::start(&world.node, DEV, "a b c@0 d!", options).await.unwrap();
    counted(&world, 4, 3).await;

    // The init container's device goes on to the first container; the second gets another.
    let script = |name: &str| {
        let test = "set -e; cat /given/of; ! touch /given/x 2>/dev/null; ls /dev; env | grep CDI_; \
            for d in $(echo $DEV | tr , ' '); do echo x > /dev/$d; done; echo \"has $DEV\"";
        let log = format!("({test}) > /dev/termination-log 2>&1");
        using(with(sh(name, &log), json!({"env": [{"name": "OWN", "value": "1"}]})), 1)
    };
    let spec = json!({"restartPolicy": "Never", "initContainers": [script("i")],
        "containers": [script("one"), script("two")]});
    world.cluster.pod(&world.node, "pair", spec).await.unwrap();
    let pod = until_ended(&world, "pair").await;
    for (name, id, other) in [("i", "c", "b"), ("one", "c", "b"), ("two", "b", "c")] {
        let end = &container(&pod, name)["state"]["terminated"];
        let said = end["message"].as_str().unwrap_or_default();
        assert_eq!(end["exitCode"], 0, "{name}: {said}");
        assert!(said.contains("test.example/dev") && said.contains(&format!("has {id}")), "{said}");
        assert!(said.contains(&format!("CDI_{id}=yes")), "{said}");
        assert!(!said.contains(&format!("CDI_{other}")), "{said}");
    }
    assert_eq!(plugin.asked("allocate"), ["c", "c", "b"]);
    assert_eq!(plugin.asked("prestart")[0], "c");
    let preferred = plugin.calls_of("preferred");
    assert_eq!(preferred[0]["available"], json!(["a", "b", "c"]));
    let health = &container(&pod, "two")["allocatedResourcesStatus"];
    let expected = json!([{"name": DEV, "resources": [{"resourceID": "b", "health": "Healthy"}]}]);
    assert_eq!(health, &expected);

    // Nothing of it is in use any more.
    world.ready_pod("all", json!({"containers": [telling("c", 3)]})).await;
    assert_eq!(plugin.asked("allocate").last().unwrap(), "a,b,c");
    world.cluster.pod(&world.node, "more", json!({"containers": [telling("c", 1)]})).await.unwrap();
    let (reason, message) = failed(&world, "more").await;
    assert_eq!(reason, format!("OutOf{DEV}"));
    assert_eq!(
        message,
        format!(
            "Pod was rejected: Node didn't have enough resource: {DEV}, requested: 1, used: 3, capacity: 3"
        )
    );
    // What no plugin knows is the cluster's.
    let foreign = json!({"limits": {"other.example/x": "1"}, "requests": {"other.example/x": "1"}});
    let spec = json!({"containers": [with(idle("c"), json!({"resources": foreign}))]});
    world.ready_pod("foreign", spec).await;
    world.cluster.delete_pod("all").await.unwrap();
    world.ready_pod("again", json!({"containers": [telling("c", 2)]})).await;

    // One that the plugin refuses.
    plugin.fail("allocate", Some("9 it burns")).unwrap();
    world.cluster.pod(&world.node, "no", json!({"containers": [telling("c", 1)]})).await.unwrap();
    let (reason, message) = failed(&world, "no").await;
    assert_eq!(reason, "UnexpectedAdmissionError");
    assert!(
        message.contains("Allocate failed due to rpc error") && message.contains("it burns"),
        "{message}"
    );
    plugin.fail("allocate", None).unwrap();
    world.ready_pod("yes", json!({"containers": [telling("c", 1)]})).await;
    end(world, plugin, &["pair", "more", "foreign", "again", "no", "yes"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_of_node_and_plugin_leave_containers_and_devices_alone() {
    let mut world = World::new("devices-restart").await;
    let mut plugin = DevicePlugin::start(&world.node, DEV, "a b c", json!({})).await.unwrap();
    counted(&world, 3, 3).await;
    let spec = json!({"containers": [telling("one", 1), telling("two", 1)]});
    let before = world.ready_pod("steady", spec).await;
    let ids = |pod: &Value| ["one", "two"].map(|c| container(pod, c)["containerID"].clone());

    // The plugin sees that the node is another one, and comes back.
    world.node.end(Signal::SIGKILL).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    plugin.registered(2).await;
    counted(&world, 3, 3).await;
    let after = world.cluster.pod_ready("steady").await;
    assert_eq!(ids(&after), ids(&before));
    assert_eq!(plugin.asked("allocate"), ["a", "b"]);
    world.ready_pod("third", json!({"containers": [telling("c", 1)]})).await;
    assert_eq!(plugin.asked("allocate"), ["a", "b", "c"]);

    // A pod is over while nobody looks, the plugin is away when the node is back: what runs runs on,
    // and nothing is to be had.
    plugin.stop();
    counted(&world, 3, 0).await;
    world.node.end(Signal::SIGKILL).await;
    world.cluster.admin.remove(&world.cluster.path("pods/third")).await.unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    counted(&world, 0, 0).await;
    world.cluster.pod_gone("third").await;
    let after = world.cluster.pod_ready("steady").await;
    assert_eq!(ids(&after), ids(&before));
    assert_eq!(restarts(&after, "one"), 0);
    let pid = |pod: &Value| container(pod, "one")["state"]["running"]["startedAt"].clone();
    assert_eq!(pid(&after), pid(&before));
    world
        .cluster
        .pod(&world.node, "early", json!({"containers": [telling("c", 1)]}))
        .await
        .unwrap();
    assert_eq!(failed(&world, "early").await.0, format!("OutOf{DEV}"));
    plugin.spawn(&world.node).unwrap();
    plugin.registered(3).await;
    counted(&world, 3, 3).await;
    // Those in use are not given out, and the one that is free again is.
    world.ready_pod("fourth", json!({"containers": [telling("c", 1)]})).await;
    assert_eq!(plugin.asked("allocate"), ["a", "b", "c", "c"]);
    let file = world.node.path("/var/lib/kubelet/device-plugins/kubelet_internal_checkpoint");
    let known: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(known["Data"]["RegisteredDevices"][DEV], json!(["a", "b", "c"]));
    assert_eq!(known["Data"]["PodDeviceEntries"].as_array().unwrap().len(), 3);
    end(world, plugin, &["steady", "early", "fourth"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_between_allocation_and_start_gives_nothing_twice() {
    let mut world = World::new("devices-kill").await;
    let options = json!({"preStart": true});
    let plugin = DevicePlugin::start(&world.node, DEV, "a b", options).await.unwrap();
    counted(&world, 2, 2).await;
    plugin.hang("prestart", true).unwrap();
    world.cluster.pod(&world.node, "late", json!({"containers": [telling("c", 1)]})).await.unwrap();
    plugin.called("prestart", 1).await;
    world.node.end(Signal::SIGKILL).await;
    plugin.hang("prestart", false).unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    plugin.registered(2).await;
    world.cluster.pod_ready("late").await;
    assert_eq!(plugin.asked("allocate"), ["a"]);
    world.ready_pod("next", json!({"containers": [telling("c", 1)]})).await;
    assert_eq!(plugin.asked("allocate"), ["a", "b"]);
    // Whether it is asked again before the container starts depends on who is first, the plugin that
    // registers again or the container; as under kubelet.
    assert!(plugin.asked("prestart").iter().all(|id| id == "a" || id == "b"));
    end(world, plugin, &["late", "next"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_told_of_the_node_and_of_the_containers() {
    let world = World::new("devices-health").await;
    let mut plugin = DevicePlugin::start(&world.node, DEV, "a b", json!({})).await.unwrap();
    counted(&world, 2, 2).await;
    let pod = json!({"containers": [telling("c", 1), idle("plain")]});
    let before = world.ready_pod("user", pod).await;
    assert!(container(&before, "plain")["allocatedResourcesStatus"].is_null());
    plugin.devices("a! b").unwrap();
    counted(&world, 2, 1).await;
    let health = |pod: &Value| {
        container(pod, "c")["allocatedResourcesStatus"][0]["resources"][0]["health"].clone()
    };
    let sick = world.cluster.pod_until("user", "told", |p| health(p) == "Unhealthy").await;
    assert_eq!(restarts(&sick, "c"), 0);
    // As under kubelet the sick one that is in use counts among those that pods may have.
    world
        .cluster
        .pod(&world.node, "early", json!({"containers": [telling("c", 1)]}))
        .await
        .unwrap();
    assert_eq!(failed(&world, "early").await.0, format!("OutOf{DEV}"));
    plugin.devices("a b").unwrap();
    world.cluster.pod_until("user", "told", |p| health(p) == "Healthy").await;
    counted(&world, 2, 2).await;
    world.ready_pod("other", json!({"containers": [telling("c", 1)]})).await;
    assert_eq!(plugin.asked("allocate"), ["a", "b"]);
    // A plugin that is gone leaves its devices counted, and none to have.
    plugin.stop();
    counted(&world, 2, 0).await;
    plugin.spawn(&world.node).unwrap();
    counted(&world, 2, 2).await;
    plugin.devices("").unwrap();
    counted(&world, 0, 0).await;
    end(world, plugin, &["user", "early", "other"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plugin_that_hangs_holds_up_its_own_pods_only() {
    let world = World::new("devices-hang").await;
    let plugin = DevicePlugin::start(&world.node, DEV, "a b", json!({})).await.unwrap();
    counted(&world, 2, 2).await;
    plugin.hang("allocate", true).unwrap();
    world
        .cluster
        .pod(&world.node, "stuck", json!({"containers": [telling("c", 1)]}))
        .await
        .unwrap();
    plugin.called("allocate", 1).await;
    world.ready_pod("plain", json!({"containers": [idle("c")]})).await;
    // It can be deleted meanwhile, and what was reserved for it is free.
    world.cluster.delete_pod("stuck").await.unwrap();
    plugin.hang("allocate", false).unwrap();
    world.ready_pod("both", json!({"containers": [telling("c", 2)]})).await;
    assert_eq!(plugin.asked("allocate").last().unwrap(), "a,b");
    end(world, plugin, &["plain", "both"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plugins_register_by_the_registry_as_well_and_are_refused_with_a_reason() {
    let mut world = World::new("devices-registry").await;
    let socket = "/var/lib/kubelet/plugins_registry/dev-reg.sock";
    let options = json!({"registry": socket});
    let mut plugin = DevicePlugin::start(&world.node, DEV, "a b", options).await.unwrap();
    counted(&world, 2, 2).await;
    world.ready_pod("user", json!({"containers": [telling("c", 1)]})).await;
    world.node.restart().await.unwrap();
    plugin.registered(2).await;
    counted(&world, 2, 2).await;
    plugin.stop();
    std::fs::remove_file(world.node.path(socket)).unwrap();
    counted(&world, 2, 0).await;

    let options = json!({"version": "v1alpha"});
    let mut old = DevicePlugin::prepare(&world.node, "old.example/x", "x", options).unwrap();
    old.spawn(&world.node).unwrap();
    old.called("refused", 1).await;
    let why = old.calls_of("refused")[0]["error"].as_str().unwrap().to_owned();
    assert!(why.contains("v1alpha") && why.contains("v1beta1"), "{why}");
    old.stop();
    end(world, plugin, &["user"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn monitors_are_told_which_devices_pods_have() {
    use pod_resources::{
        AllocatableResourcesRequest, ContainerDevices, GetPodResourcesRequest,
        ListPodResourcesRequest, PodResources,
    };
    let world = World::new("devices-monitor").await;
    let plugin = DevicePlugin::start(&world.node, DEV, "a@0,1 b c!", json!({})).await.unwrap();
    counted(&world, 3, 2).await;
    let sidecar = with(telling("side", 1), json!({"restartPolicy": "Always"}));
    let init = sh("init", "true");
    let spec =
        json!({"initContainers": [init, sidecar], "containers": [telling("c", 1), idle("d")]});
    world.ready_pod("user", spec).await;
    let spec = json!({"restartPolicy": "Never", "containers": [sh("c", "true")]});
    world.cluster.pod(&world.node, "over", spec).await.unwrap();
    until_ended(&world, "over").await;

    let mut client = pod_resources::connect(&world.node).await.unwrap();
    let devices = |all: &[ContainerDevices]| {
        let one = |d: &ContainerDevices| {
            assert_eq!(d.resource_name, DEV);
            let nodes = d.topology.iter().flat_map(|t| &t.nodes);
            format!(
                "{}@{}",
                d.device_ids.join(","),
                nodes.map(|n| n.id.to_string()).collect::<String>()
            )
        };
        all.iter().map(one).collect::<Vec<_>>().join(" ")
    };
    let told = |pod: &PodResources| {
        let all = pod.containers.iter();
        let all = all.map(|c| format!("{}: {}", c.name, devices(&c.devices))).collect::<Vec<_>>();
        format!("{} {}", pod.name, all.join("; "))
    };
    let expected = "user side: a@0 a@1; c: b@; d: ";
    let list = client.list(ListPodResourcesRequest {}).await.unwrap().into_inner();
    let own: Vec<String> = list
        .pod_resources
        .iter()
        .filter(|p| p.namespace == world.cluster.namespace())
        .map(told)
        .collect();
    assert_eq!(own, [expected], "what is over is not told of");
    let get = |name: &str| GetPodResourcesRequest {
        pod_name: name.into(),
        pod_namespace: world.cluster.namespace().into(),
    };
    let one = client.get(get("user")).await.unwrap().into_inner().pod_resources.unwrap();
    assert_eq!(told(&one), expected);
    let error = client.get(get("nobody")).await.unwrap_err();
    let namespace = world.cluster.namespace();
    assert_eq!(error.message(), format!("pod nobody in namespace {namespace} not found"));
    let all = client.get_allocatable_resources(AllocatableResourcesRequest {}).await.unwrap();
    let all = all.into_inner();
    assert_eq!((devices(&all.devices), all.cpu_ids.len()), ("a@0 a@1 b@".to_owned(), 0));
    assert_eq!(plugin.asked("allocate"), ["a", "b"]);
    end(world, plugin, &["user", "over"]).await;
}
