//! What a CRI client is told about sandboxes and containers: lists, verbose statuses, statistics,
//! limits; with real containers.

mod node;

use std::fs;
use std::time::Duration;

use anyhow::Context;
use cri_shim::api::*;
use node::Node;
use tokio_stream::StreamExt;

fn labels(pairs: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

async fn listed(node: &mut Node, filter: ContainerFilter) -> anyhow::Result<Vec<String>> {
    let request = ListContainersRequest { filter: Some(filter.clone()) };
    let containers = node.runtime.list_containers(request).await?.into_inner().containers;
    let request = StreamContainersRequest { filter: Some(filter) };
    let mut stream = node.runtime.stream_containers(request).await?.into_inner();
    let mut streamed = Vec::new();
    while let Some(part) = stream.next().await {
        streamed.extend(part?.containers);
    }
    assert_eq!(streamed, containers, "the stream tells something else");
    let mut names: Vec<_> =
        containers.into_iter().filter_map(|c| c.metadata).map(|m| m.name).collect();
    names.sort();
    Ok(names)
}

#[tokio::test]
async fn containers_are_listed_by_id_sandbox_state_and_labels_together() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let labelled = |name: &'static str| {
        move |config: &mut ContainerConfig| {
            config.labels = labels(&[("name", name), ("all", "yes")]);
        }
    };
    let a = node.create_with(&pod, "a", "sleep 1000", labelled("a")).await?;
    let b = node.create_with(&pod, "b", "exit 0", labelled("b")).await?;
    for id in [&a, &b] {
        let request = StartContainerRequest { container_id: id.clone() };
        node.runtime.start_container(request).await?;
    }
    node.exited(&b).await?;
    node.create_with(&pod, "c", "exit 0", labelled("c")).await?;
    let all = ContainerFilter::default;
    let state = |state: ContainerState| Some(ContainerStateValue { state: state as i32 });
    let cases: Vec<(ContainerFilter, &[&str])> = vec![
        (all(), &["a", "b", "c"]),
        (ContainerFilter { id: a.clone(), ..all() }, &["a"]),
        (ContainerFilter { id: a[..12].to_owned(), ..all() }, &["a"]),
        (ContainerFilter { id: "none".into(), ..all() }, &[]),
        (ContainerFilter { pod_sandbox_id: pod.0.clone(), ..all() }, &["a", "b", "c"]),
        (ContainerFilter { pod_sandbox_id: pod.0[..12].to_owned(), ..all() }, &["a", "b", "c"]),
        (ContainerFilter { id: a.clone(), pod_sandbox_id: "none".into(), ..all() }, &[]),
        (ContainerFilter { state: state(ContainerState::ContainerRunning), ..all() }, &["a"]),
        (ContainerFilter { state: state(ContainerState::ContainerExited), ..all() }, &["b"]),
        (ContainerFilter { state: state(ContainerState::ContainerCreated), ..all() }, &["c"]),
        (ContainerFilter { label_selector: labels(&[("all", "yes")]), ..all() }, &["a", "b", "c"]),
        (
            ContainerFilter { label_selector: labels(&[("all", "yes"), ("name", "b")]), ..all() },
            &["b"],
        ),
        (ContainerFilter { label_selector: labels(&[("all", "no")]), ..all() }, &[]),
    ];
    for (filter, expected) in cases {
        assert_eq!(listed(&mut node, filter.clone()).await?, expected, "{filter:?}");
    }
    let by_label = |value: &str| PodSandboxFilter {
        label_selector: labels(&[("app", value)]),
        ..Default::default()
    };
    for (filter, count) in [(by_label("test"), 1), (by_label("other"), 0)] {
        let request = StreamPodSandboxesRequest { filter: Some(filter.clone()) };
        let mut stream = node.runtime.stream_pod_sandboxes(request).await?.into_inner();
        let mut found = 0;
        while let Some(part) = stream.next().await {
            found += part?.pod_sandboxes.len();
        }
        assert_eq!(found, count, "{filter:?}");
    }
    Ok(())
}

#[tokio::test]
async fn verbose_statuses_show_process_spec_and_namespaces() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Pod).await?;
    let id = node.run(&pod, "a", "sleep 1000").await?;
    let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = node.runtime.container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"])?;
    let pid = info["pid"].as_u64().context("no pid")?;
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    // The shell, or what it has become.
    assert!(command.contains("sleep"), "{command:?}");
    assert_eq!(info["sandboxID"], pod.0.as_str());
    assert_eq!(info["runtimeSpec"]["process"]["args"][2], "sleep 1000");

    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.0.clone(), verbose: true };
    let info = node.runtime.pod_sandbox_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"])?;
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().context("none")?;
    let of = |kind: &str| namespaces.iter().find(|namespace| namespace["type"] == kind);
    assert_eq!(of("network"), None, "the pod is in the node's network");
    let shared = of("pid").and_then(|n| n["path"].as_str()).context("no shared PID namespace")?;
    assert_eq!(fs::read_link(shared)?, fs::read_link(format!("/proc/{pid}/ns/pid"))?);

    let stop = StopContainerRequest { container_id: id.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    let request = ContainerStatusRequest { container_id: id, verbose: true };
    let info = node.runtime.container_status(request).await?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"])?;
    assert_eq!(info["pid"], 0, "the process is gone, its number may be another's");
    Ok(())
}

#[tokio::test]
async fn statistics_tell_use_as_counters_and_as_a_rate() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let busy = "dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; echo made; while :; do :; done";
    let id = node.run(&pod, "busy", busy).await?;
    while !node.log("busy").contains("made") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let request = ContainerStatsRequest { container_id: id.clone() };
    let first = node.runtime.container_stats(request.clone()).await?.into_inner().stats;
    let first = first.and_then(|s| s.cpu).context("no CPU use")?;
    assert_eq!(first.usage_nano_cores, None, "nothing to compare with");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let stats = node.runtime.container_stats(request).await?.into_inner().stats.context("none")?;
    let cpu = stats.cpu.context("no CPU use")?;
    let rate = cpu.usage_nano_cores.context("no rate")?.value;
    let used = |usage: &CpuUsage| usage.usage_core_nano_seconds.as_ref().map_or(0, |v| v.value);
    let expected =
        (used(&cpu) - used(&first)) as f64 * 1e9 / (cpu.timestamp - first.timestamp) as f64;
    assert!((rate as f64 - expected).abs() <= 1.0, "{rate} is not {expected}");
    assert!(rate > 0);
    let layer = stats.writable_layer.and_then(|l| l.used_bytes).map_or(0, |v| v.value);
    assert!((3 << 20..4 << 20).contains(&layer), "{layer} bytes in the writable layer");
    let memory = stats.memory.context("no memory use")?;
    let value = |v: &Option<UInt64Value>| v.as_ref().map_or(0, |v| v.value);
    assert!(value(&memory.usage_bytes) >= value(&memory.working_set_bytes));
    assert!(value(&memory.rss_bytes) > 0 && value(&memory.page_faults) > 0);

    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.0.clone() };
    let stats = node.runtime.pod_sandbox_stats(request).await?.into_inner().stats;
    let linux = stats.and_then(|s| s.linux).context("no statistics of the sandbox")?;
    assert_eq!(linux.containers.len(), 1);
    assert_eq!(linux.network, None, "the pod is in the node's network");
    assert!(value(&linux.process.context("no processes")?.process_count) > 0);
    assert!(used(&linux.cpu.context("no CPU use")?) >= used(&cpu));
    Ok(())
}

#[tokio::test]
async fn limits_change_all_or_not_at_all_and_not_of_what_has_ended() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let limits = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        memory_swap_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    let limited = |config: &mut ContainerConfig| {
        if let Some(linux) = &mut config.linux {
            linux.resources = Some(limits.clone());
        }
    };
    let id = node.create_with(&pod, "a", "sleep 1000", limited).await?;
    let start = StartContainerRequest { container_id: id.clone() };
    node.runtime.start_container(start).await?;
    let update = |resources| UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    // Beyond what the old limit of memory and swap together allows.
    let more = LinuxContainerResources {
        cpu_quota: 80_000,
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    node.runtime.update_container_resources(update(more)).await?;
    let now = node.status(&id).await?.resources.and_then(|r| r.linux).context("no limits")?;
    let expected = LinuxContainerResources {
        cpu_quota: 80_000,
        memory_limit_in_bytes: 96 << 20,
        memory_swap_limit_in_bytes: 96 << 20,
        ..limits.clone()
    };
    assert_eq!(now, expected);
    let shares = node
        .exec(&id, &["cat", "/sys/fs/cgroup/cpu/cpu.shares", "/sys/fs/cgroup/cpu.weight"], 0)
        .await?
        .stdout;
    // No machine has CPUs numbered so; what came before it is taken back.
    let impossible = LinuxContainerResources {
        cpu_shares: 1024,
        cpuset_cpus: "99999".to_owned(),
        ..Default::default()
    };
    node.runtime.update_container_resources(update(impossible)).await.unwrap_err();
    let again = node
        .exec(&id, &["cat", "/sys/fs/cgroup/cpu/cpu.shares", "/sys/fs/cgroup/cpu.weight"], 0)
        .await?
        .stdout;
    assert!(!shares.is_empty());
    assert_eq!(again, shares);
    let now = node.status(&id).await?.resources.and_then(|r| r.linux);
    assert_eq!(now, Some(expected));

    let stop = StopContainerRequest { container_id: id.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    let late = LinuxContainerResources { cpu_shares: 100, ..Default::default() };
    node.runtime.update_container_resources(update(late)).await?;
    Ok(())
}
