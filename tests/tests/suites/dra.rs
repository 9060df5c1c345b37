//! Devices of claims, with a driver that holds the node to what it was told.

use anyhow::bail;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tests::harness::devices::pod_resources;
use tests::harness::dra::{DraDriver, claim};
use tests::harness::eventually;

use crate::support::{World, container, ended, idle, restarts, sh, with};

const DRIVER: &str = "dra.test.example";

/// `base` with these claims of its pod, each with the request that it wants of it.
fn using(base: Value, claims: &[(&str, &str)]) -> Value {
    let asked = |(name, request): &(&str, &str)| match *request {
        "" => json!({"name": name}),
        request => json!({"name": name, "request": request}),
    };
    let claims: Value = claims.iter().map(asked).collect();
    with(base, json!({"resources": {"claims": claims}}))
}

/// A container that tells which devices it has, and ends badly once there is a file `end` in its volume.
fn telling(name: &str, claims: &[(&str, &str)]) -> Value {
    let script = "echo \"has: $(env | grep ^DRA_ | sort | tr '\\n' ' ')\"; trap 'exit 0' TERM; \
        while :; do [ -e /v/end ] && rm /v/end && exit 1; sleep 0.2; done";
    let mounts = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
    with(using(sh(name, script), claims), mounts)
}

/// A pod of such containers.
fn spec(containers: &[Value]) -> Value {
    json!({"containers": containers, "volumes": [{"name": "v", "emptyDir": {}}]})
}

/// The devices that the last instance of a running container has.
async fn has(world: &World, pod: &Value, name: &str) -> String {
    let (metadata, last) = (&pod["metadata"], restarts(pod, name));
    let text = |field: &str| metadata[field].as_str().unwrap_or_default();
    let folder = format!("{}_{}_{}", text("namespace"), text("name"), text("uid"));
    let path = world.node.path(&format!("/var/log/pods/{folder}/{name}/{last}.log"));
    eventually("what it has", async || {
        let log = std::fs::read_to_string(&path)?;
        match log.split_once("has: ") {
            Some((_, told)) => Ok(told.trim().to_owned()),
            None => bail!("{log:?}"),
        }
    })
    .await
}

async fn claimed(world: &World, name: &str, spec: Value, claims: &[(&str, &str)]) -> Value {
    world.cluster.pod_with_claims(&world.node, name, spec, claims).await.unwrap();
    world.cluster.pod_ready(name).await
}

/// What the node wrote down of claims: name and number of pods of each.
fn known(world: &World) -> Vec<(String, usize)> {
    let file = world.node.path("/var/lib/kubelet/dra_manager_state");
    let whole: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let data: Value = serde_json::from_str(whole["Data"].as_str().unwrap()).unwrap();
    let all = data["ClaimInfoStateList"].as_array().cloned().unwrap_or_default();
    let pods = |claim: &Value| claim["PodUIDs"].as_object().map_or(0, |pods| pods.len());
    all.iter().map(|c| (c["ClaimName"].as_str().unwrap().to_owned(), pods(c))).collect()
}

/// Deletes the pods while the driver still runs, and checks that nothing is left.
async fn end(world: World, mut driver: DraDriver, pods: &[&str]) {
    for pod in pods {
        world.cluster.delete_pod(pod).await.unwrap();
    }
    assert_eq!(known(&world), []);
    driver.stop();
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_get_the_devices_of_their_claims_and_pods_share_them() {
    let world = World::new("dra-use").await;
    let driver = DraDriver::start(&world.node, DRIVER, json!({})).await.unwrap();
    let devices = [("a", "gpu-1"), ("b/big", "gpu-2")];
    driver.has("one", &devices).unwrap();
    world.cluster.resource_claim(&claim("one", DRIVER, &devices)).await.unwrap();
    let containers = [telling("all", &[("c", "")]), telling("some", &[("c", "b")]), idle("none")];
    let user = claimed(&world, "user", spec(&containers), &[("c", "one")]).await;
    assert_eq!(has(&world, &user, "all").await, "DRA_gpu_1=one DRA_gpu_2=one");
    assert_eq!(has(&world, &user, "some").await, "DRA_gpu_2=one");
    assert_eq!(driver.asked("prepare"), ["one"]);
    let call = driver.calls().into_iter().find(|call| call["verb"] == "prepare").unwrap();
    assert_eq!(call["service"], "v1");

    // Another pod that shares it, and one whose claim is its own.
    let second =
        claimed(&world, "second", spec(&[telling("c", &[("x", "a")])]), &[("x", "one")]).await;
    assert_eq!(has(&world, &second, "c").await, "DRA_gpu_1=one");
    driver.has("own", &[("r", "gpu-3")]).unwrap();
    let mut third = spec(&[telling("c", &[("t", "")])]);
    third["resourceClaims"] = json!([{"name": "t", "resourceClaimTemplateName": "template"}]);
    let third = world.cluster.unbound_pod("third", third).await.unwrap();
    let mut own = claim("own", DRIVER, &[("r", "gpu-3")]);
    own["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "Pod", "name": "third",
        "uid": third["metadata"]["uid"], "controller": true}]);
    world.cluster.resource_claim(&own).await.unwrap();
    world.cluster.reserve("own", &third).await.unwrap();
    let told = json!({"resourceClaimStatuses": [{"name": "t", "resourceClaimName": "own"}]});
    world.cluster.tell_pod("third", told).await.unwrap();
    world.cluster.bind(&world.node, "third").await.unwrap();
    let third = world.cluster.pod_ready("third").await;
    assert_eq!(has(&world, &third, "c").await, "DRA_gpu_3=own");
    assert_eq!(driver.asked("prepare"), ["one", "own"]);
    assert_eq!(known(&world), [("one".into(), 2), ("own".into(), 1)]);

    // An extended resource that the scheduler had claimed.
    let (resource, mapped) = ("test.example/gpu", "container-0-request-0");
    driver.has("ext", &[(mapped, "gpu-4")]).unwrap();
    let asked = json!({"resources": {"limits": {resource: "1"}, "requests": {resource: "1"}}});
    let extended = spec(&[with(telling("c", &[]), asked)]);
    let fourth = world.cluster.unbound_pod("fourth", extended).await.unwrap();
    world.cluster.resource_claim(&claim("ext", DRIVER, &[(mapped, "gpu-4")])).await.unwrap();
    world.cluster.reserve("ext", &fourth).await.unwrap();
    let mapping = json!({"containerName": "c", "resourceName": resource, "requestName": mapped});
    let told = json!({"extendedResourceClaimStatus":
        {"resourceClaimName": "ext", "requestMappings": [mapping]}});
    world.cluster.tell_pod("fourth", told).await.unwrap();
    world.cluster.bind(&world.node, "fourth").await.unwrap();
    let fourth = world.cluster.pod_ready("fourth").await;
    assert_eq!(has(&world, &fourth, "c").await, "DRA_gpu_4=ext");

    // Monitors are told.
    let mut client = pod_resources::connect(&world.node).await.unwrap();
    let request = pod_resources::GetPodResourcesRequest {
        pod_name: "user".into(),
        pod_namespace: world.cluster.namespace().into(),
    };
    let told = client.get(request).await.unwrap().into_inner().pod_resources.unwrap();
    let of: Vec<_> = told
        .containers
        .iter()
        .flat_map(|c| c.dynamic_resources.iter().map(move |d| (c.name.clone(), d)))
        .flat_map(|(name, d)| d.claim_resources.iter().map(move |r| (name.clone(), d, r)))
        .map(|(name, d, r)| format!("{name} {} {}/{}", d.claim_name, r.pool_name, r.device_name))
        .collect();
    let both = |name: &str| [1, 2].map(|n| format!("{name} one pool/gpu-{n}"));
    assert_eq!(of, [both("all"), both("some")].concat());

    // The first that goes takes nothing from the other.
    world.cluster.delete_pod("user").await.unwrap();
    assert_eq!(driver.asked("unprepare"), Vec::<String>::new());
    world.cluster.delete_pod("second").await.unwrap();
    assert_eq!(driver.asked("unprepare"), ["one"]);
    end(world, driver, &["third", "fourth"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_fails_or_hangs_is_told_of_and_holds_up_its_own_pods_only() {
    let world = World::new("dra-fail").await;
    let driver = DraDriver::start(&world.node, DRIVER, json!({})).await.unwrap();
    for name in ["c1", "c2", "c3"] {
        driver.has(name, &[("r", "gpu")]).unwrap();
        world.cluster.resource_claim(&claim(name, DRIVER, &[("r", "gpu")])).await.unwrap();
    }
    let using = |name: &str| spec(&[telling("c", &[(name, "")])]);
    driver.fail("prepare", Some("13 it burns")).unwrap();
    let made = world.cluster.pod_with_claims(&world.node, "sick", using("x"), &[("x", "c1")]).await;
    made.unwrap();
    let told = world.event("sick", "FailedPrepareDynamicResources").await;
    assert_eq!(
        told,
        "Failed to prepare dynamic resources: prepare dynamic resources: NodePrepareResources: rpc \
         error: code = Internal desc = it burns"
    );
    let name = format!("{}/sick", world.cluster.namespace());
    eventually("explain", async || {
        let output = world.node.longshore(&["explain", "pod", &name])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let good = text.contains("resource claims") && text.contains("it burns");
        if good { Ok(()) } else { bail!("{text}") }
    })
    .await;
    driver.fail("prepare", None).unwrap();
    world.cluster.pod_ready("sick").await;

    // What the node finds itself.
    world.cluster.resource_claim(&claim("foreign", "no.example", &[("r", "x")])).await.unwrap();
    let pod = world.cluster.pod_with_claims(&world.node, "far", using("x"), &[("x", "foreign")]);
    pod.await.unwrap();
    let told = world.event("far", "FailedPrepareDynamicResources").await;
    assert!(told.contains("DRA driver no.example is not registered"), "{told}");
    let mut unreserved = using("x");
    unreserved["resourceClaims"] = json!([{"name": "x", "resourceClaimName": "c3"}]);
    world.cluster.pod(&world.node, "thief", unreserved).await.unwrap();
    let told = world.event("thief", "FailedPrepareDynamicResources").await;
    assert!(told.contains("is not allowed to use ResourceClaim c3"), "{told}");
    world.cluster.delete_pod("far").await.unwrap();
    world.cluster.delete_pod("thief").await.unwrap();

    // One that hangs: others start, and the pod can be deleted.
    driver.hang("prepare", true).unwrap();
    let made =
        world.cluster.pod_with_claims(&world.node, "stuck", using("x"), &[("x", "c2")]).await;
    made.unwrap();
    eventually("a driver that is asked", async || {
        let asked = driver.asked("prepare");
        if asked.contains(&"c2".to_owned()) { Ok(()) } else { bail!("{asked:?}") }
    })
    .await;
    world.ready_pod("plain", json!({"containers": [idle("c")]})).await;
    world.cluster.delete_pod("stuck").await.unwrap();
    assert_eq!(driver.asked("unprepare"), ["c2"]);
    driver.hang("prepare", false).unwrap();

    // A pod is not over before its claims are given back.
    driver.fail("unprepare", Some("14 not now")).unwrap();
    world.cluster.admin.remove(&world.cluster.path("pods/sick")).await.unwrap();
    let told = world.event("sick", "FailedKillPod").await;
    assert!(told.contains("not now"), "{told}");
    assert!(!ended(&world.cluster.read_pod("sick").await.unwrap()));
    driver.fail("unprepare", None).unwrap();
    world.cluster.pod_gone("sick").await;
    end(world, driver, &["plain"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_of_the_node_neither_lose_nor_repeat_what_is_prepared() {
    let mut world = World::new("dra-restart").await;
    let driver = DraDriver::start(&world.node, DRIVER, json!({})).await.unwrap();
    for name in ["c1", "c2", "c3"] {
        driver.has(name, &[("r", "gpu")]).unwrap();
        world.cluster.resource_claim(&claim(name, DRIVER, &[("r", "gpu")])).await.unwrap();
    }
    let using = || spec(&[telling("c", &[("x", "")])]);
    claimed(&world, "steady", using(), &[("x", "c1")]).await;
    let gone = claimed(&world, "gone", using(), &[("x", "c3")]).await;

    // Killed while a driver prepares.
    driver.hang("prepare", true).unwrap();
    let made = world.cluster.pod_with_claims(&world.node, "late", using(), &[("x", "c2")]).await;
    made.unwrap();
    driver.called("prepare", 3).await;
    world.node.end(Signal::SIGKILL).await;
    assert_eq!(known(&world), [("c1".into(), 1), ("c2".into(), 1), ("c3".into(), 1)]);
    driver.hang("prepare", false).unwrap();
    // A pod goes while nobody looks.
    let now = json!({"gracePeriodSeconds": 0});
    world.cluster.admin.delete(&world.cluster.path("pods/gone"), now).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let late = world.cluster.pod_ready("late").await;
    assert_eq!(has(&world, &late, "c").await, "DRA_gpu=c2");
    driver.called("unprepare", 1).await;
    assert_eq!(driver.asked("unprepare"), ["c3"], "{gone:#}");

    // A container that starts again has the same device, and no driver is asked for it.
    let steady = world.cluster.read_pod("steady").await.unwrap();
    let uid = steady["metadata"]["uid"].as_str().unwrap();
    let volume = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/v/end");
    std::fs::write(world.node.path(&volume), "").unwrap();
    let again = |pod: &Value| {
        restarts(pod, "c") == 1 && container(pod, "c")["state"]["running"].is_object()
    };
    let steady = world.cluster.pod_until("steady", "started again", again).await;
    assert_eq!(has(&world, &steady, "c").await, "DRA_gpu=c1");
    let asked = driver.asked("prepare");
    assert_eq!(asked.iter().filter(|claim| *claim == "c1").count(), 1, "{asked:?}");
    end(world, driver, &["steady", "late"]).await;
}

/// ResourceSlices of the node, by name.
async fn slices(world: &World, expected: &[&str]) {
    eventually(&format!("ResourceSlices {expected:?}"), async || {
        let list = world.cluster.admin.read("/apis/resource.k8s.io/v1/resourceslices").await?;
        let all = list["items"].as_array().cloned().unwrap_or_default();
        let names: Vec<_> = all.iter().filter_map(|s| s["metadata"]["name"].as_str()).collect();
        if names == expected { Ok(()) } else { bail!("{names:?}") }
    })
    .await;
}

async fn slice(world: &World, name: &str, driver: &str, node: &str) {
    let object = json!({"metadata": {"name": name}, "spec": {"driver": driver, "nodeName": node,
        "pool": {"name": "pool", "generation": 1, "resourceSliceCount": 1}, "devices": []}});
    world.cluster.admin.create("/apis/resource.k8s.io/v1/resourceslices", object).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drivers_are_replaced_and_those_that_stay_away_lose_their_slices() {
    let mut world = World::new("dra-driver").await;
    let old = json!({"instance": "-a", "versions": ["v1beta1.DRAPlugin"]});
    let mut first = DraDriver::start(&world.node, DRIVER, old).await.unwrap();
    let name = world.node.name().to_owned();
    for claim_name in ["c1", "c2"] {
        first.has(claim_name, &[("r", "gpu")]).unwrap();
        world.cluster.resource_claim(&claim(claim_name, DRIVER, &[("r", "gpu")])).await.unwrap();
    }
    let using = || spec(&[telling("c", &[("x", "")])]);
    claimed(&world, "one", using(), &[("x", "c1")]).await;
    assert_eq!(
        first.calls().into_iter().find(|c| c["verb"] == "prepare").unwrap()["service"],
        "v1beta1"
    );

    // A rolling update: the new one is asked, and takes back what the old one prepared.
    let new = json!({"instance": "-b"});
    let second = DraDriver::start(&world.node, DRIVER, new).await.unwrap();
    second.has("c2", &[("r", "gpu")]).unwrap();
    claimed(&world, "two", using(), &[("x", "c2")]).await;
    assert_eq!(
        (first.asked("prepare"), second.asked("prepare")),
        (vec!["c1".into()], vec!["c2".into()])
    );
    first.stop();
    let socket = format!("/var/lib/kubelet/plugins_registry/{DRIVER}-a-reg.sock");
    std::fs::remove_file(world.node.path(&socket)).unwrap();
    world.cluster.delete_pod("one").await.unwrap();
    assert_eq!(second.asked("unprepare"), ["c1"]);

    // At the start nobody is known to be here; what is here is published again.
    slice(&world, "mine", DRIVER, &name).await;
    slice(&world, "other-node", DRIVER, "elsewhere").await;
    world.node.restart().await.unwrap();
    slices(&world, &["other-node"]).await;
    second.called("notify", 2).await;
    slice(&world, "mine", DRIVER, &name).await;
    slice(&world, "other-driver", "other.example", &name).await;
    let mut second = second;
    second.stop();
    second.spawn(&world.node).unwrap();
    second.called("notify", 3).await;
    let began = std::time::Instant::now();
    second.stop();
    slices(&world, &["other-driver", "other-node"]).await;
    assert!(began.elapsed() > std::time::Duration::from_secs(25), "{:?}", began.elapsed());
    second.spawn(&world.node).unwrap();
    second.called("notify", 4).await;
    end(world, second, &["two"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_told_of_the_containers() {
    let world = World::new("dra-health").await;
    let driver = DraDriver::start(&world.node, DRIVER, json!({"health": true})).await.unwrap();
    let devices = [("a", "gpu-1"), ("b", "gpu-2")];
    driver.has("one", &devices).unwrap();
    driver.health("gpu-1 HEALTHY 600\ngpu-2 UNHEALTHY 600 too hot\n").unwrap();
    world.cluster.resource_claim(&claim("one", DRIVER, &devices)).await.unwrap();
    let containers = [telling("all", &[("c", "")]), telling("some", &[("c", "b")]), idle("none")];
    claimed(&world, "user", spec(&containers), &[("c", "one")]).await;
    let told = |pod: &Value, name: &str| {
        let own = container(pod, name)["allocatedResourcesStatus"][0].clone();
        let all = own["resources"].as_array().cloned().unwrap_or_default();
        let one =
            |r: &Value| format!("{} {}", r["health"].as_str().unwrap_or_default(), r["message"]);
        let all: Vec<_> = all.iter().map(one).collect();
        format!("{} {}", own["name"].as_str().unwrap_or_default(), all.join(", "))
    };
    let until = async |expected: [&str; 2]| {
        let good = |pod: &Value| [told(pod, "all"), told(pod, "some")] == expected;
        world.cluster.pod_until("user", expected[0], good).await
    };
    let pod =
        until(["claim:c Healthy null, Unhealthy \"too hot\"", "claim:c/b Unhealthy \"too hot\""])
            .await;
    assert!(container(&pod, "none")["allocatedResourcesStatus"].is_null());
    driver.health("gpu-1 HEALTHY 600\ngpu-2 HEALTHY 600\n").unwrap();
    until(["claim:c Healthy null, Healthy null", "claim:c/b Healthy null"]).await;
    // A word counts for its time.
    driver.health("gpu-1 HEALTHY 1\ngpu-2 HEALTHY 600\n").unwrap();
    until(["claim:c Unknown null, Healthy null", "claim:c/b Healthy null"]).await;
    end(world, driver, &["user"]).await;
}
