//! What is measured of one runtime.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use cri_shim::api::NamespaceMode;
use tests::harness::Node;
use tests::harness::measure::{p50, pss_megabytes};

use crate::client::{Client, log_directory};

/// What one stack measured, by the name of the figure.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// A line of the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) more_is_better: bool,
    /// How many times better than containerd it is to be.
    pub(crate) bar: Option<f64>,
}

const fn row(name: &'static str, unit: &'static str, bar: f64) -> Row {
    Row { name, unit, more_is_better: false, bar: Some(bar) }
}

const fn part(name: &'static str) -> Row {
    Row { name, unit: "ms", more_is_better: false, bar: None }
}

/// Figures in the order of the table.
pub(crate) const ROWS: &[Row] = &[
    row("run + create + start, p50", "ms", 4.0),
    part("  of it RunPodSandbox"),
    part("  of it CreateContainer"),
    part("  of it StartContainer"),
    Row { name: "all at once", unit: "pods/s", more_is_better: true, bar: Some(4.0) },
    row("ExecSync, p50", "ms", 5.0),
    row("stop + remove, p50", "ms", 4.0),
    row("the same, network of one plugin, p50", "ms", 4.0),
    row("the same, of hostNetwork pods, p50", "ms", 4.0),
    row("daemon, shims and pause, PSS", "MB", 10.0),
    Row { name: "200 MB of log, to cat > file", unit: "times", more_is_better: false, bar: None },
];

/// A CNI network as those that bring their own agent have it: one plugin that makes a veth pair, and
/// none that asks for rules of iptables.
const ONE_PLUGIN: &str = r#"{"cniVersion": "0.4.0", "name": "one", "plugins": [
    {"type": "ptp", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.246.0.0/24"}]],
                             "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;

/// What a container writes at full speed, in lines of 100 bytes; also without a container.
const WRITE: &str = "busybox yes 012345678901234567890123456789012345678901234567890123456789\
    01234567890123456789012345678901234567 | busybox head -c 200000000";

/// Drives `client`, a runtime in `node` whose processes have names that start with one of `stack`.
pub(crate) async fn measure(
    node: &Node,
    client: &Client,
    pods: usize,
    stack: &[&str],
) -> Result<Figures> {
    let parent = format!("/{}", node.cgroup());
    let mut figures = Figures::new();
    // The first pods pay for what is loaded once.
    for i in 0..3 {
        client.remove(client.start(&format!("warm-{i}"), &parent).await?).await?;
    }
    let (mut starts, mut execs, mut removals) = (Vec::new(), Vec::new(), Vec::new());
    let mut parts = [const { Vec::new() }; 3];
    for i in 0..30 {
        let begin = Instant::now();
        let pod = client.start(&format!("single-{i}"), &parent).await?;
        starts.push(begin.elapsed());
        parts.iter_mut().zip(pod.took).for_each(|(all, took)| all.push(took));
        for _ in 0..3 {
            let begin = Instant::now();
            client.exec(&pod).await?;
            execs.push(begin.elapsed());
        }
        let begin = Instant::now();
        client.remove(pod).await?;
        removals.push(begin.elapsed());
    }
    figures.insert(ROWS[0].name, p50(starts));
    for (row, took) in ROWS[1..].iter().zip(parts) {
        figures.insert(row.name, p50(took));
    }
    figures.insert(ROWS[5].name, p50(execs));
    figures.insert(ROWS[6].name, p50(removals));

    // Without what the CNI plugins take, which is the same for all.
    figures.insert(ROWS[8].name, removal(client, &parent, "host", NamespaceMode::Node).await?);
    let folder = node.path("/etc/cni/net.d");
    let mut one_plugin = f64::NAN;
    if folder.exists() {
        let file = folder.join("05-one.conflist");
        std::fs::write(&file, ONE_PLUGIN)?;
        // The runtime sees it by itself.
        tokio::time::sleep(Duration::from_secs(1)).await;
        one_plugin = removal(client, &parent, "one", NamespaceMode::Pod).await?;
        std::fs::remove_file(&file)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    figures.insert(ROWS[7].name, one_plugin);

    let begin = Instant::now();
    let started = (0..pods).map(|i| {
        let (client, parent) = (client.clone(), parent.clone());
        tokio::spawn(async move { client.start(&format!("burst-{i}"), &parent).await })
    });
    let mut running = Vec::new();
    for pod in started.collect::<Vec<_>>() {
        running.push(pod.await??);
    }
    figures.insert(ROWS[4].name, pods as f64 / begin.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(5)).await;
    figures.insert(ROWS[9].name, pss_megabytes(node, stack));
    for pod in running {
        client.remove(pod).await?;
    }
    figures.insert(ROWS[10].name, log_factor(node, client, &parent).await?);
    Ok(figures)
}

/// The median time to stop and remove a pod, in milliseconds.
async fn removal(client: &Client, parent: &str, name: &str, network: NamespaceMode) -> Result<f64> {
    let mut removals = Vec::new();
    for i in 0..30 {
        let command = ["sleep", "100000"];
        let pod = client.start_as(&format!("{name}-{i}"), parent, &command, network).await?;
        let begin = Instant::now();
        client.remove(pod).await?;
        removals.push(begin.elapsed());
    }
    Ok(p50(removals))
}

/// How many times as long as into a file by `cat` a container's output takes into its log, the least
/// of three tries of each in turns.
async fn log_factor(node: &Node, client: &Client, parent: &str) -> Result<f64> {
    let file = node.path("/var/log/baseline");
    let baseline = format!("{WRITE} | cat > {}", file.display());
    let (mut logged, mut plain) = (Duration::MAX, Duration::MAX);
    for i in 0..3 {
        let begin = Instant::now();
        let written = std::process::Command::new("sh").args(["-c", &baseline]).status()?;
        anyhow::ensure!(written.success(), "the baseline ended with {written}");
        plain = plain.min(begin.elapsed());
        std::fs::remove_file(&file)?;
        let begin = Instant::now();
        let name = format!("writer-{i}");
        let pod = client.start_as(&name, parent, &["sh", "-c", WRITE], NamespaceMode::Pod).await?;
        client.ended(&pod).await?;
        logged = logged.min(begin.elapsed());
        client.remove(pod).await?;
        // Whoever named it removes it.
        std::fs::remove_dir_all(node.path(&log_directory(&name)))?;
    }
    Ok(logged.as_secs_f64() / plain.as_secs_f64())
}
