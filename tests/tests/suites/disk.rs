//! A full disk: clear errors, what runs goes on, nothing is lost, and all is well when there is room.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use tests::harness::cluster::condition;
use tests::harness::eventually;

use crate::support::{World, container, ended, idle, restarts, sh};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_loses_nothing_and_heals() {
    let mut world = World::with_disk("disk-full", "256m").await;
    // Of what the node may end for room nothing would be left.
    let critical = json!({"priorityClassName": "system-node-critical", "priority": 2_000_001_000,
        "containers": [idle("c")]});
    let steady = world.ready_pod("steady", critical.clone()).await;
    let ends = json!({"restartPolicy": "Never", "containers": [sh("c", "sleep 3; exit 42")]});
    world.ready_pod("ends", ends).await;

    let fill = world.node.path("/var/lib/fill");
    let filled = std::io::copy(&mut std::io::repeat(0), &mut std::fs::File::create(&fill).unwrap());
    assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);

    // The container ends while nobody but its monitor looks, and there is no room for its exit.
    world.node.end(Signal::SIGKILL).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let ended =
        world.cluster.pod_until("ends", "failed", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(container(&ended, "c")["state"]["terminated"]["exitCode"], 42);
    let after = world.cluster.read_pod("steady").await.unwrap();
    assert_eq!(container(&after, "c"), container(&steady, "c"), "what runs is left alone");

    let pressure = async |world: &World| -> anyhow::Result<String> {
        let node =
            world.cluster.admin.read(&format!("/api/v1/nodes/{}", world.node.name())).await?;
        Ok(condition(&node, "DiskPressure").unwrap_or_default().to_owned())
    };
    eventually("DiskPressure", async || {
        let status = pressure(&world).await?;
        anyhow::ensure!(status == "True", "{status}");
        Ok(())
    })
    .await;
    world.cluster.pod(&world.node, "refused", json!({"containers": [idle("c")]})).await.unwrap();
    let refused =
        world.cluster.pod_until("refused", "refused", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(refused["status"]["reason"], "Evicted");
    let said = "The node had condition: [DiskPressure]. ";
    assert_eq!(refused["status"]["message"], format!("Pod was rejected: {said}"));
    assert_eq!(world.event("refused", "Evicted").await, said);

    // One that the system needs is let in, and waits for room.
    world.cluster.pod(&world.node, "late", critical).await.unwrap();
    eventually("an Event that says why", async || {
        let events = world.cluster.admin.read(&world.cluster.path("events")).await?;
        let all = events["items"].as_array().cloned().unwrap_or_default();
        let of_late = all.iter().filter(|e| e["involvedObject"]["name"] == "late");
        let messages: Vec<_> = of_late.filter_map(|e| e["message"].as_str()).collect();
        anyhow::ensure!(messages.iter().any(|m| m.contains("No space left")), "{messages:#?}");
        Ok(())
    })
    .await;
    std::fs::remove_file(&fill).unwrap();
    let late = world.cluster.pod_ready("late").await;
    assert_eq!(restarts(&late, "c"), 0);
    let before = world.cluster.read_pod("steady").await.unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    world.ready_pod("after", json!({"containers": [idle("c")]})).await;
    let after = world.cluster.read_pod("steady").await.unwrap();
    assert_eq!(container(&after, "c"), container(&before, "c"), "what runs is left alone");
    world.end(&["steady", "ends", "late", "refused", "after"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_soft_threshold_ends_the_largest_pod_once_its_grace_period_is_over() {
    let mut world = World::with_disk("disk-soft", "256m").await;
    let config = world.node.path("/var/lib/kubelet/config.yaml");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut fields: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
    fields["evictionSoft"] = json!({"nodefs.available": "100Mi"});
    fields["evictionSoftGracePeriod"] = json!({"nodefs.available": "5s"});
    fields["evictionMaxPodGracePeriod"] = json!(3);
    std::fs::write(&config, fields.to_string()).unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;

    let volume = json!([{"name": "v", "emptyDir": {}}]);
    let mut small = idle("c");
    small["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    let steady = json!({"volumes": volume, "containers": [small]});
    let steady = world.ready_pod("steady", steady).await;
    let mut fills = sh("c", "dd if=/dev/zero of=/v/fill bs=1M count=170; sleep 1000");
    fills["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    let greedy = json!({"volumes": volume, "containers": [fills]});
    world.cluster.pod(&world.node, "greedy", greedy).await.unwrap();
    let gone =
        world.cluster.pod_until("greedy", "evicted", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(gone["status"]["reason"], "Evicted");
    let said = gone["status"]["message"].as_str().unwrap();
    let words = "The node was low on resource: ephemeral-storage. Threshold quantity: 100Mi, ";
    assert!(said.starts_with(words), "{said}");
    let conditions = gone["status"]["conditions"].as_array().unwrap();
    let disrupted = conditions.iter().find(|c| c["type"] == "DisruptionTarget").unwrap();
    assert_eq!(disrupted["reason"], "TerminationByKubelet");
    assert_eq!(disrupted["message"], said);
    assert_eq!(world.event("greedy", "Evicted").await, said);
    let after = world.cluster.read_pod("steady").await.unwrap();
    assert_eq!(container(&after, "c"), container(&steady, "c"), "one was enough");
    world.end(&["steady", "greedy"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ended_pods_left_goes_before_any_pod_that_runs() {
    let mut world = World::with_disk("disk-dead", "256m").await;
    let change = |c: &mut serde_json::Value| {
        c["evictionHard"] = json!({"nodefs.available": "100Mi"});
        c["imageMinimumGCAge"] = "1s".into();
    };
    world.node.configure(change).unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let steady = world.ready_pod("steady", json!({"containers": [idle("c")]})).await;
    let fills = sh("c", "dd if=/dev/zero of=/fill bs=1M count=110; exit 3");
    let spent = json!({"restartPolicy": "Never", "containers": [fills]});
    world.cluster.pod(&world.node, "spent", spent).await.unwrap();
    let spent = world.cluster.pod_until("spent", "failed", ended).await;
    assert_eq!(container(&spent, "c")["state"]["terminated"]["exitCode"], 3);

    let file = world.node.path("/var/lib/fill");
    let fill = |mib: u64| {
        let zeros = &mut std::io::Read::take(std::io::repeat(0), mib << 20);
        std::io::copy(zeros, &mut std::fs::File::create(&file).unwrap()).unwrap();
    };
    fill(70);
    // Events about nodes are in the namespace `default`.
    eventually("an Event about the node", async || {
        let events = world.cluster.admin.read("/api/v1/namespaces/default/events").await?;
        let all = events["items"].as_array().cloned().unwrap_or_default();
        let met = all.iter().find(|e| e["reason"] == "EvictionThresholdMet");
        let said = met.and_then(|e| e["message"].as_str());
        anyhow::ensure!(said == Some("Attempting to reclaim ephemeral-storage"), "{said:?}");
        Ok(())
    })
    .await;
    eventually("room", async || {
        let stat = nix::sys::statvfs::statvfs(&world.node.path("/var/lib"))?;
        let free = stat.blocks_available() * stat.fragment_size();
        anyhow::ensure!(free > 100 << 20, "{free} bytes are free");
        Ok(())
    })
    .await;
    // Its end is told as before, by this agent and by the next one.
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let after = world.cluster.read_pod("spent").await.unwrap();
        assert_eq!(after["status"], spent["status"]);
        let after = world.cluster.read_pod("steady").await.unwrap();
        assert_eq!(container(&after, "c"), container(&steady, "c"), "what runs is left alone");
        world.node.restart().await.unwrap();
        world.node.ready().await;
    }
    std::fs::remove_file(&file).unwrap();
    for pod in ["steady", "spent"] {
        world.cluster.delete_pod(pod).await.unwrap();
    }
    // Nobody uses the image now.
    let images = || {
        let output = world.node.longshore(&["image", "ls"]).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(images().contains("busybox"), "{}", images());
    fill(180);
    eventually("no image", async || {
        anyhow::ensure!(!images().contains("busybox"), "{}", images());
        Ok(())
    })
    .await;
    std::fs::remove_file(&file).unwrap();
    world.end(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_use_up_what_is_the_pods_lose_the_largest_before_the_kernel_ends_any() {
    let mut world = World::new("pods-memory").await;
    let machine = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib: u64 = machine.split_whitespace().nth(1).unwrap().parse().unwrap();
    // Leaves pods together 400 MiB, of which 100 must stay free.
    let reserved = format!("{}Ki", kib - (400 << 10));
    let change = |c: &mut serde_json::Value| {
        c["kubeReserved"] = json!({"memory": reserved});
        c["evictionHard"] = json!({"memory.available": "100Mi"});
    };
    world.node.configure(change).unwrap();
    world.node.restart().await.unwrap();
    world.node.ready().await;
    let memory = json!([{"name": "v", "emptyDir": {"medium": "Memory"}}]);
    let mut fills = sh("c", "dd if=/dev/zero of=/v/fill bs=1M count=320; sleep 1000");
    fills["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    world.ready_pod("steady", json!({"containers": [idle("c")]})).await;
    let greedy = json!({"volumes": memory, "containers": [fills]});
    world.cluster.pod(&world.node, "greedy", greedy).await.unwrap();
    let gone =
        world.cluster.pod_until("greedy", "evicted", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(gone["status"]["reason"], "Evicted");
    let said = gone["status"]["message"].as_str().unwrap();
    let words = "The node was low on resource: memory. Threshold quantity: 100Mi, available: ";
    assert!(said.starts_with(words), "{said}");
    assert!(said.contains("Container c was using "), "{said}");
    assert_eq!(world.event("greedy", "Evicted").await, said);
    let events = world.cluster.admin.read(&world.cluster.path("events")).await.unwrap();
    let events = events["items"].as_array().unwrap();
    let evicted = events.iter().find(|e| e["reason"] == "Evicted").unwrap();
    let annotations = &evicted["metadata"]["annotations"];
    assert_eq!(annotations["offending_containers"], "c");
    assert_eq!(annotations["starved_resource"], "memory");
    let steady = world.cluster.read_pod("steady").await.unwrap();
    assert_eq!((steady["status"]["phase"].as_str(), restarts(&steady, "c")), (Some("Running"), 0));
    world.end(&["steady", "greedy"]).await;
}
