//! Many cycles without growth, many containers at once, and what logging costs; with figures.
//!
//! Small by default. The figures of the README, some minutes each:
//! `LONGSHORE_CYCLES=10000 LONGSHORE_CONTAINERS=500 LONGSHORE_LOG_MIB=512 cargo nextest run --release
//! -p cri-shim --test scale --no-capture`.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "figures; a test ends where it fails")]

mod node;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cri_shim::api::*;
use futures::{StreamExt, TryStreamExt};
use node::{Node, Setup};

/// How many cycles go on at once.
const AT_ONCE: usize = 4;

/// What the server and its zygote may need more after many cycles than after few, in KiB: the
/// allocator's own.
const SLACK: i64 = 3 << 10;

fn scale(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What is counted on a node, by name.
type Counts = BTreeMap<&'static str, i64>;

fn entries(path: impl AsRef<Path>) -> i64 {
    fs::read_dir(path).into_iter().flatten().count() as i64
}

fn files(path: &Path) -> i64 {
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
    below.map(|p| 1 + if p.is_dir() && !p.is_symlink() { files(&p) } else { 0 }).sum()
}

fn directories(path: &Path) -> i64 {
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
    below.filter(|p| p.is_dir()).map(|p| 1 + directories(&p)).sum()
}

fn pss(pid: i64) -> i64 {
    memory(pid, "Pss:")
}

/// A process's own memory: pages of its program come and go as the machine pleases.
fn own_memory(pid: i64) -> i64 {
    memory(pid, "Anonymous:")
}

fn memory(pid: i64, kind: &str) -> i64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(kind)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or_default()
}

/// The node's processes by name: those in its mount namespace.
fn processes(node: &Node) -> Vec<(i64, String)> {
    let holder = fs::read_link(format!("/proc/{}/ns/mnt", node.namespace.id())).unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let path = entry.path();
        if fs::read_link(path.join("ns/mnt")).is_ok_and(|ns| ns == holder)
            && let Some(Ok(pid)) = entry.file_name().to_str().map(str::parse)
        {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            found.push((pid, name.trim().to_owned()));
        }
    }
    found
}

fn count(node: &Node) -> Counts {
    let processes = processes(node);
    let server = i64::from(node.server.id());
    let zygote = processes.iter().find(|(_, name)| name == "longshore-zygot").map_or(0, |p| p.0);
    let root = node.root.path();
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", node.namespace.id()));
    let cgroups = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let name = node.cgroup();
    BTreeMap::from([
        ("server memory, KiB", own_memory(server)),
        ("server descriptors", entries(format!("/proc/{server}/fd"))),
        ("server threads", entries(format!("/proc/{server}/task"))),
        ("zygote memory, KiB", own_memory(zygote)),
        ("zygote descriptors", entries(format!("/proc/{zygote}/fd"))),
        ("processes", processes.len() as i64),
        ("mounts", mounts.unwrap_or_default().lines().count() as i64),
        ("network namespaces", entries(root.join("run/netns"))),
        (
            "cgroups",
            cgroups.map(|h| directories(&h.path().join(name.trim_start_matches('/')))).sum(),
        ),
        ("files of state", files(&root.join("state"))),
        ("files of run", files(&root.join("run"))),
    ])
}

/// One pod's life.
async fn cycle(mut node: Client, at: usize) -> anyhow::Result<()> {
    let (sandbox, config) = node.sandbox(&format!("pod{at}")).await?;
    let script = if at.is_multiple_of(2) { "echo said" } else { "exec sleep 1000" };
    let id = node.create(&(sandbox.clone(), config), "c", script).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let stop = StopContainerRequest { container_id: id.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    node.runtime.remove_container(RemoveContainerRequest { container_id: id }).await?;
    let stop = StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    node.runtime.stop_pod_sandbox(stop).await?;
    let remove = RemovePodSandboxRequest { pod_sandbox_id: sandbox };
    node.runtime.remove_pod_sandbox(remove).await?;
    Ok(())
}

/// What several tasks may share of a node.
#[derive(Clone)]
struct Client {
    runtime: cri_shim::api::runtime_service_client::RuntimeServiceClient<tonic::transport::Channel>,
    cgroup: String,
    logs: PathBuf,
}

impl Client {
    fn of(node: &Node) -> Self {
        Client {
            runtime: node.runtime.clone(),
            cgroup: node.cgroup(),
            logs: node.root.path().join("logs"),
        }
    }

    async fn sandbox(&mut self, name: &str) -> anyhow::Result<(String, PodSandboxConfig)> {
        let cgroup = format!("{}/{name}", self.cgroup);
        let config = node::networked_config(name, &self.logs.join(name), cgroup);
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let id = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        Ok((id, config))
    }

    async fn create(
        &mut self,
        pod: &(String, PodSandboxConfig),
        name: &str,
        script: &str,
    ) -> anyhow::Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: node::IMAGE.into(), ..Default::default() }),
            command: vec!["sh".into(), "-c".into(), script.into()],
            log_path: format!("{name}.log"),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.0.clone(),
            config: Some(config),
            sandbox_config: Some(pod.1.clone()),
        };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }
}

async fn cycles(node: &Node, range: std::ops::Range<usize>) -> anyhow::Result<()> {
    let client = Client::of(node);
    futures::stream::iter(range.map(Ok))
        .try_for_each_concurrent(AT_ONCE, |at| cycle(client.clone(), at))
        .await
}

/// Removes the pods' cgroups, as the agent does, which made them.
fn remove_pod_cgroups(node: &Node) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        let own = hierarchy.path().join(node.cgroup().trim_start_matches('/'));
        for pod in fs::read_dir(own).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(pod.path());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_cycles_leave_nothing_and_need_no_more() -> anyhow::Result<()> {
    let cycles_asked = scale("LONGSHORE_CYCLES", 200);
    let node = Node::start_with(Setup { own_network: true, ..Setup::default() }).await?;
    let warm = 100.min(cycles_asked / 2);
    cycles(&node, 0..warm).await?;
    let settled = || async {
        remove_pod_cgroups(&node);
        let _ = fs::remove_dir_all(node.root.path().join("logs"));
        // Idle threads of the runtime end after ten seconds.
        tokio::time::sleep(Duration::from_secs(12)).await;
        count(&node)
    };
    let before = settled().await;
    let begin = Instant::now();
    cycles(&node, warm..cycles_asked).await?;
    let took = begin.elapsed();
    let after = settled().await;
    println!("{} cycles in {took:?}", cycles_asked - warm);
    let mut grown = Vec::new();
    for (name, before) in &before {
        let after = after[name];
        println!("  {name:20} {before:8} -> {after:8}");
        let allowed = if name.ends_with("KiB") { SLACK } else { 0 };
        // Threads come and go with how much is done at once.
        if after - before > allowed && *name != "server threads" {
            grown.push(*name);
        }
    }
    ensure!(grown.is_empty(), "grown: {grown:?}");
    ensure!(after["processes"] == 3, "only the holder, the server and its zygote are to be there");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_containers_at_once_are_listed_found_again_and_removed() -> anyhow::Result<()> {
    let containers = scale("LONGSHORE_CONTAINERS", 60);
    let mut node = Node::start_with(Setup { own_network: true, ..Setup::default() }).await?;
    let client = Client::of(&node);
    let empty = pss(i64::from(node.server.id()));
    // One pod has a fifth of them, the others five each.
    let sizes: Vec<usize> = std::iter::once(containers / 5)
        .chain(std::iter::repeat_n(5, (containers - containers / 5) / 5))
        .collect();
    let total: usize = sizes.iter().sum();
    let begin = Instant::now();
    let pods: Vec<String> = futures::stream::iter(sizes.iter().enumerate())
        .map(|(at, size)| {
            let mut client = client.clone();
            async move {
                let pod = client.sandbox(&format!("pod{at}")).await?;
                for n in 0..*size {
                    let id = client.create(&pod, &format!("c{n}"), "exec sleep 100000").await?;
                    let start = StartContainerRequest { container_id: id };
                    client.runtime.start_container(start).await?;
                }
                Ok::<_, anyhow::Error>(pod.0)
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    println!("{total} containers in {} pods started in {:?}", pods.len(), begin.elapsed());
    let list = |mut runtime: runtime_service_client::RuntimeServiceClient<_>| async move {
        let begin = Instant::now();
        let listed = runtime.list_containers(ListContainersRequest::default()).await?;
        let running = listed.into_inner().containers;
        let running = running.iter().filter(|c| c.state() == ContainerState::ContainerRunning);
        Ok::<_, anyhow::Error>((running.count(), begin.elapsed()))
    };
    let (running, took) = list(node.runtime.clone()).await?;
    ensure!(running == total, "{running} of {total} run");
    println!("listed in {took:?}");
    let monitors = || -> Vec<i64> {
        let found = processes(&node).into_iter().filter(|(_, name)| name == "longshore-pod");
        found.map(|(pid, _)| pss(pid)).collect()
    };
    // What made a container is a child of its monitor for a moment more.
    let deadline = Instant::now() + Duration::from_secs(30);
    while monitors().len() > pods.len() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let monitors = monitors();
    ensure!(monitors.len() == pods.len(), "{} monitors", monitors.len());
    println!(
        "PSS: server {} KiB, empty {empty} KiB; monitors {} KiB each",
        pss(i64::from(node.server.id())),
        monitors.iter().sum::<i64>() / monitors.len() as i64
    );
    let begin = Instant::now();
    node.restart().await?;
    println!("restarted and recovered in {:?}", begin.elapsed());
    let (running, _) = list(node.runtime.clone()).await?;
    ensure!(running == total, "{running} of {total} run after a restart");
    let client = Client::of(&node);
    let begin = Instant::now();
    futures::stream::iter(pods.into_iter().map(Ok::<_, anyhow::Error>))
        .try_for_each_concurrent(AT_ONCE, |pod_sandbox_id| {
            let mut client = client.clone();
            async move {
                let remove = RemovePodSandboxRequest { pod_sandbox_id };
                client.runtime.remove_pod_sandbox(remove).await?;
                Ok(())
            }
        })
        .await?;
    println!("removed in {:?}", begin.elapsed());
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

/// A container that writes a file to its standard output, beside `cat` into a file.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_at_full_speed_is_whole_and_its_cost_is_bounded() -> anyhow::Result<()> {
    let mebibytes = scale("LONGSHORE_LOG_MIB", 16);
    let mut node = Node::start().await?;
    let data = node.root.path().join("data");
    fs::create_dir(&data)?;
    for width in [20usize, 100, 1000] {
        let mut file = std::io::BufWriter::new(fs::File::create(data.join("lines"))?);
        let lines = (mebibytes << 20) / width;
        for n in 0..lines {
            writeln!(file, "{n:0>width$}", width = width - 1)?;
        }
        file.into_inner()?.sync_all()?;
        let begin = Instant::now();
        let mut source =
            Command::new("cat").arg(data.join("lines")).stdout(Stdio::piped()).spawn()?;
        let sink = fs::File::create(data.join("copy"))?;
        let input = Stdio::from(source.stdout.take().context("no pipe")?);
        ensure!(Command::new("cat").stdin(input).stdout(sink).status()?.success());
        source.wait()?;
        let floor = begin.elapsed();
        let pod = node.sandbox(NamespaceMode::Container).await?;
        let mounted = |config: &mut ContainerConfig| {
            config.mounts.push(Mount {
                host_path: data.display().to_string(),
                container_path: "/data".into(),
                readonly: true,
                ..Default::default()
            });
        };
        let name = format!("width{width}");
        let id = node.create_with(&pod, &name, "exec cat /data/lines", mounted).await?;
        node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
        let status = node.exited(&id).await?;
        let took = Duration::from_nanos(u64::try_from(status.finished_at - status.started_at)?);
        println!(
            "{mebibytes} MiB in lines of {width}: {took:?}, cat {floor:?}, factor {:.1}",
            took.as_secs_f64() / floor.as_secs_f64()
        );
        let log = node.log(&name);
        let mut expected = 0;
        for line in log.lines() {
            let number = line.split_once(" stdout F ").map(|(_, text)| text.parse::<usize>());
            ensure!(matches!(number, Some(Ok(n)) if n == expected), "line {expected} is {line:?}");
            expected += 1;
        }
        ensure!(expected == lines, "{expected} of {lines} lines");
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.remove_pod_sandbox(remove).await?;
    }
    Ok(())
}
