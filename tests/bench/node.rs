//! The figures of README, in one table: `bench --longshore FILE [--pods N] [--services N]`.
//!
//! With `LONGSHORE_BENCH_PEERS` (a folder with `kubelet` and `kube-proxy`; containerd, runc and the
//! CNI plugins from the system) the peer stack is measured in the same run, on the same control
//! plane, and ratios are printed. Nothing is asserted: figures of a shared machine are to be read.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a tool for developers: a panic is how it reports"
)]

mod follows;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tests::harness::cluster::{condition, fill_image, pod_ip};
use tests::harness::measure::{cpu_seconds, p50, pss_megabytes};
use tests::harness::node::Runtime;
use tests::harness::peers::Peers;
use tests::harness::{Cluster, Lab, Node, NodeOptions, eventually, net};

struct Options {
    longshore: PathBuf,
    pods: usize,
    services: usize,
}

/// What one stack measured, by the name of the figure.
type Figures = BTreeMap<&'static str, f64>;

/// Figures in the order of the table: name, unit, the bar that the project set itself.
const ROWS: &[(&str, &str, f64)] = &[
    ("pod create -> Ready, p50", "ms", 80.0),
    ("burst of pods, all Ready", "ms", 2500.0),
    ("whole stack, PSS", "MB", 80.0),
    ("idle CPU", "% of a core", 0.6),
    ("new Service -> first connection, p50", "ms", 50.0),
    ("pod delete -> gone, p50", "ms", 150.0),
    ("1,000 logs followed, idle", "kB", 1000.0),
];

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<()> {
    let options = arguments()?;
    let ours = {
        let lab = Lab::new("bench")?;
        let cluster = Cluster::for_benchmark(&lab).await?;
        let node_options =
            NodeOptions { binary: Some(options.longshore.clone()), ..NodeOptions::default() };
        grant_slices(&cluster).await?;
        let mut node = Node::new(&lab, node_options).await?;
        cluster.join(&mut node, &[]).await?;
        measure(&cluster, &node, &options, &["longshore"]).await?
    };
    let theirs = match std::env::var_os("LONGSHORE_BENCH_PEERS") {
        None => None,
        Some(folder) => {
            let lab = Lab::new("bench-peer")?;
            let cluster = Cluster::for_benchmark(&lab).await?;
            let node_options =
                NodeOptions { runtime: Runtime::Containerd, ..NodeOptions::default() };
            let node = Node::new(&lab, node_options).await?;
            let _peers = Peers::start(&cluster, &node, &PathBuf::from(folder)).await?;
            node.import_example_image()?;
            let stack = ["kubelet", "kube-proxy", "containerd", "containerd-shim"];
            Some(measure(&cluster, &node, &options, &stack).await?)
        }
    };
    print(&options, &ours, theirs.as_ref())
}

fn arguments() -> Result<Options> {
    let mut options = Options { longshore: PathBuf::new(), pods: 50, services: 5000 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--longshore" => options.longshore = value.into(),
            "--pods" => options.pods = value.parse()?,
            "--services" => options.services = value.parse()?,
            other => anyhow::bail!(
                "unknown argument {other}; usage: bench --longshore FILE [--pods N] [--services N]"
            ),
        }
    }
    if options.longshore.as_os_str().is_empty() {
        options.longshore = tests::harness::longshore_binary()?;
    }
    options.longshore = std::path::absolute(&options.longshore)?;
    Ok(options)
}

async fn grant_slices(cluster: &Cluster) -> Result<()> {
    const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
    let rule = json!({"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]});
    let role = json!({"metadata": {"name": "slices"}, "rules": [rule]});
    cluster.admin.create(&format!("{RBAC}/clusterroles"), role).await?;
    let binding = json!({"metadata": {"name": "slices"}, "subjects": [{"kind": "Group", "name": "system:nodes"}],
        "roleRef": {"kind": "ClusterRole", "name": "slices"}});
    cluster.admin.create(&format!("{RBAC}/clusterrolebindings"), binding).await?;
    Ok(())
}

async fn measure(
    cluster: &Cluster,
    node: &Node,
    options: &Options,
    stack: &[&str],
) -> Result<Figures> {
    let mut figures = Figures::new();
    // The first pod pays for what is loaded once.
    create(cluster, node, "warm-up").await?;
    cluster.pod_ready("warm-up").await;
    eprintln!("pods one by one");
    let mut times = Vec::new();
    for i in 0..10 {
        let name = format!("single-{i}");
        let watch = watch(cluster).await;
        let start = Instant::now();
        create(cluster, node, &name).await?;
        times.push(
            until(watch, 1, |pod| {
                condition(pod, "Ready") == Some("True") && pod["metadata"]["name"] == *name
            })
            .await
                - start,
        );
    }
    figures.insert(ROWS[0].0, p50(times));

    eprintln!("new Services, beside {} others", options.services);
    figures.insert(ROWS[4].0, new_services(cluster, node, options.services).await?);

    eprintln!("deletions one by one");
    let mut times = Vec::new();
    for i in 0..10 {
        let name = format!("single-{i}");
        let watch = watch(cluster).await;
        let start = Instant::now();
        cluster.admin.remove(&cluster.path(&format!("pods/{name}"))).await?;
        times.push(gone(watch, &name).await - start);
    }
    figures.insert(ROWS[5].0, p50(times));
    cluster.delete_pod("warm-up").await?;

    eprintln!("a burst of {}", options.pods);
    let watched = watch(cluster).await;
    let start = Instant::now();
    for i in 0..options.pods {
        create(cluster, node, &format!("burst-{i}")).await?;
    }
    let end = until(watched, options.pods, |pod| condition(pod, "Ready") == Some("True")).await;
    figures.insert(ROWS[1].0, (end - start).as_secs_f64() * 1e3);

    eprintln!("idle for 30 s");
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = cpu_seconds(node, stack);
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs(30)).await;
    let used = cpu_seconds(node, stack) - before;
    figures.insert(ROWS[3].0, used / start.elapsed().as_secs_f64() * 100.0);
    figures.insert(ROWS[2].0, pss_megabytes(node, stack));

    eprintln!("logs followed");
    figures.insert(ROWS[6].0, follows::memory(cluster, node, "burst-0", stack).await?);
    Ok(figures)
}

async fn create(cluster: &Cluster, node: &Node, name: &str) -> Result<Value> {
    let mut spec = json!({"nodeName": node.name(), "terminationGracePeriodSeconds": 30, "containers": [{"name": "c",
        "command": ["workload", "http", "8080"], "ports": [{"containerPort": 8080}]}]});
    // Ends on SIGTERM, as most servers do and PID 1 does only by a handler.
    spec["containers"][0]["command"] =
        json!(["sh", "-c", "trap 'exit 0' TERM; workload http 8080 & wait"]);
    fill_image(&mut spec);
    let pod = json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec});
    cluster.admin.create(&cluster.path("pods"), pod).await
}

type Events = futures::stream::BoxStream<'static, Value>;

async fn watch(cluster: &Cluster) -> Events {
    let list = cluster.admin.read(&cluster.path("pods")).await.unwrap();
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    cluster.admin.stream(&cluster.path(&format!("pods?watch=1&resourceVersion={version}"))).await
}

/// When the `count`th pod became `good`.
async fn until(mut events: Events, count: usize, good: impl Fn(&Value) -> bool) -> Instant {
    let mut seen = std::collections::BTreeSet::new();
    while let Some(event) = events.next().await {
        let pod = &event["object"];
        if good(pod) && seen.insert(pod["metadata"]["name"].to_string()) && seen.len() == count {
            return Instant::now();
        }
    }
    panic!("the watch ended");
}

async fn gone(mut events: Events, name: &str) -> Instant {
    while let Some(event) = events.next().await {
        if event["type"] == "DELETED" && event["object"]["metadata"]["name"] == name {
            return Instant::now();
        }
    }
    panic!("the watch ended");
}

/// Where the many Services are: every one in a pod's own namespace becomes variables of its
/// environment, which is another figure.
const OTHERS: &str = "others";

async fn new_services(cluster: &Cluster, node: &Node, others: usize) -> Result<f64> {
    let pod = cluster.read_pod("single-0").await?;
    let address = pod_ip(&pod)?;
    let make = async |name: &str| -> Result<SocketAddr> {
        let service = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80, "targetPort": 8080}]}});
        let made =
            cluster.admin.create(&format!("/api/v1/namespaces/{OTHERS}/services"), service).await?;
        let slice = json!({"metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}, "nodeName": node.name()}]});
        let slices = format!("/apis/discovery.k8s.io/v1/namespaces/{OTHERS}/endpointslices");
        cluster.admin.create(&slices, slice).await?;
        Ok((
            made["spec"]["clusterIP"]
                .as_str()
                .context("no clusterIP")?
                .parse::<std::net::IpAddr>()?,
            80,
        )
            .into())
    };
    cluster.admin.create("/api/v1/namespaces", json!({"metadata": {"name": OTHERS}})).await?;
    let mut last = None;
    for i in 0..others {
        last = Some(make(&format!("other-{i}")).await?);
    }
    let netns = node.netns().path();
    if let Some(last) = last {
        eventually("the other Services are served", async || net::http_get(&netns, last, "/"))
            .await;
    }
    let mut times = Vec::new();
    for i in 0..10 {
        let to = make(&format!("new-{i}")).await?;
        let start = Instant::now();
        let netns = netns.clone();
        tokio::task::spawn_blocking(move || {
            tests::harness::lab::within(&netns, move || {
                let end = Instant::now() + Duration::from_secs(60);
                while std::net::TcpStream::connect_timeout(&to, Duration::from_millis(20)).is_err()
                {
                    if Instant::now() > end {
                        return Err(std::io::Error::other("not within 60 s"));
                    }
                }
                Ok(())
            })
        })
        .await??;
        times.push(start.elapsed());
    }
    Ok(p50(times))
}

fn print(options: &Options, ours: &Figures, theirs: Option<&Figures>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let cores = std::thread::available_parallelism()?;
    writeln!(out, "{} pods, {} Services, {cores} cores", options.pods, options.services)?;
    writeln!(
        out,
        "{:<38} {:>12} {:>10} {:>10} {:>7}  unit",
        "", "longshore", "bar", "peer", "ratio"
    )?;
    for (name, unit, bar) in ROWS {
        let own = ours[name];
        let (peer, ratio) = match theirs {
            Some(figures) => {
                (format!("{:.1}", figures[name]), format!("{:.1}x", figures[name] / own))
            }
            None => ("-".into(), "-".into()),
        };
        writeln!(out, "{name:<38} {own:>12.1} {bar:>10.1} {peer:>10} {ratio:>7}  {unit}")?;
    }
    Ok(())
}
