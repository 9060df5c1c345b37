//! CPUs that containers have to themselves, on the two CPUs that this machine has at least: the first
//! is the system's, the second is given out.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::harness::devices::pod_resources;
use tests::harness::leaks::hierarchies;
use tests::harness::node::Runtime;
use tests::harness::{Node, eventually};

use crate::support::{World, idle, restarts, with};

const STATE: &str = "/var/lib/kubelet/cpu_manager_state";

/// A container of a Guaranteed pod with this many CPUs.
fn with_cpus(cpus: &str) -> Value {
    let list = json!({"cpu": cpus, "memory": "16Mi"});
    with(idle("c"), json!({"resources": {"limits": list, "requests": list}}))
}

/// On which CPUs the kernel lets the pod's container run.
fn cpus_of(world: &World, pod: &Value) -> String {
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let class = match pod["status"]["qosClass"].as_str() {
        Some("Burstable") => "burstable/",
        Some("BestEffort") => "besteffort/",
        _ => "",
    };
    let place = format!("{}/kubepods/{class}pod{uid}", world.node.cgroup());
    let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap();
    let id = id.rsplit('/').next().unwrap();
    let files = hierarchies().into_iter().map(|h| h.join(&place).join(id).join("cpuset.cpus"));
    let said: Vec<String> = files.filter_map(|file| std::fs::read_to_string(file).ok()).collect();
    assert_eq!(said.len(), 1, "one cpuset of {place}/{id}");
    said[0].trim().to_owned()
}

async fn until_on(world: &World, pod: &Value, cpus: &str) {
    eventually(&format!("{} runs on {cpus}", pod["metadata"]["name"]), async || {
        let found = cpus_of(world, pod);
        if found == cpus { Ok(()) } else { Err(found) }
    })
    .await;
}

fn state(node: &Node) -> Value {
    serde_json::from_str(&std::fs::read_to_string(node.path(STATE)).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guaranteed_pod_has_a_cpu_alone_as_long_as_it_runs() {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let all = online.trim();
    assert!(all.starts_with("0-"), "the test needs two CPUs: {all}");
    let last: u32 = all.rsplit('-').next().unwrap().parse().unwrap();
    let rest = match last {
        1 => "0".to_owned(),
        2 => "0,2".to_owned(),
        last => format!("0,2-{last}"),
    };
    let flags = ["--cpu-manager-policy=static", "--reserved-cpus=0"];
    let mut world = World::with("numa-cpu", Runtime::Shim, &flags).await;
    let limits = json!({"requests": {"memory": "8Mi"}});
    let spec = json!({"containers": [with(idle("c"), json!({"resources": limits}))]});
    let shared = world.ready_pod("shared", spec).await;
    until_on(&world, &shared, all).await;
    let alone = world.ready_pod("alone", json!({"containers": [with_cpus("1")]})).await;
    assert_eq!(cpus_of(&world, &alone), "1");
    until_on(&world, &shared, &rest).await;
    let uid = alone["metadata"]["uid"].as_str().unwrap();
    assert_eq!(state(&world.node)["policyName"], "static");
    assert_eq!(state(&world.node)["entries"], json!({uid: {"c": "1"}}));

    // Monitors are told.
    let mut lister = pod_resources::connect(&world.node).await.unwrap();
    let told = lister.list(pod_resources::ListPodResourcesRequest {}).await.unwrap().into_inner();
    let of_alone = told.pod_resources.iter().find(|pod| pod.name == "alone").unwrap();
    assert_eq!(of_alone.containers[0].cpu_ids, [1]);
    let request = pod_resources::AllocatableResourcesRequest {};
    let told = lister.get_allocatable_resources(request).await.unwrap().into_inner();
    assert!(told.cpu_ids.contains(&1) && !told.cpu_ids.contains(&0), "{:?}", told.cpu_ids);

    // A crash changes nothing for anybody.
    world.node.end(Signal::SIGKILL).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let alone = world.cluster.pod_ready("alone").await;
    assert_eq!((restarts(&alone, "c"), cpus_of(&world, &alone)), (0, "1".to_owned()));
    assert_eq!(state(&world.node)["entries"], json!({uid: {"c": "1"}}));
    let later = world.ready_pod("later", json!({"containers": [idle("c")]})).await;
    assert_eq!(cpus_of(&world, &later), rest);

    // Given back when it is over.
    world.cluster.delete_pod("alone").await.unwrap();
    until_on(&world, &shared, all).await;
    until_on(&world, &later, all).await;
    eventually("the file says so", async || {
        let state = state(&world.node);
        if state["entries"].is_null() { Ok(()) } else { Err(state) }
    })
    .await;
    world.end(&["shared", "later"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_had_is_refused_and_another_policys_file_is_named() {
    let flags = [
        "--cpu-manager-policy=static",
        "--cpu-manager-policy-options=strict-cpu-reservation=true",
        "--reserved-cpus=0",
        "--topology-manager-policy=single-numa-node",
        "--topology-manager-scope=pod",
    ];
    let mut world = World::with("numa-refused", Runtime::Shim, &flags).await;
    // Strictly reserved is for nobody.
    let shared = world.ready_pod("shared", json!({"containers": [idle("c")]})).await;
    let on = cpus_of(&world, &shared);
    assert!(on.starts_with('1'), "{on}");
    // Init container and container want the same CPU: one after the other they can have it.
    let spec = json!({"restartPolicy": "Never",
        "initContainers": [with(with_cpus("1"), json!({"name": "i", "command": ["true"]}))],
        "containers": [with(with_cpus("1"), json!({"command": ["true"]}))]});
    world.run_to_end("steps", spec).await;

    world.node.end(Signal::SIGTERM).await;
    let output = world.node.longshore(&[
        "run",
        "--hostname-override",
        world.node.name(),
        &format!("--cgroup-root=/{}", world.node.cgroup()),
    ]);
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for words in [
        "configured policy \"none\" differs from state checkpoint policy \"static\"",
        "/var/lib/kubelet/cpu_manager_state",
    ] {
        assert!(said.contains(words), "{said}");
    }
    world.node.restart().await.unwrap();
    world.node.ready().await;
    world.end(&["shared", "steps"]).await;
}
