//! Measures the proxy in a network namespace of its own: programs N Services with four endpoints
//! each, then changes one endpoint again and again. Prints a table.
//!
//! `RUST_LOG=proxy=debug` tells each batch.
//!
//! ```sh
//! sudo scale [SERVICES [nftables|iptables]]    # default 5000 nftables
//! ```
#![allow(clippy::print_stdout, reason = "its output is the table")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use proxy::object::{
    Change, Endpoint, EndpointPort, EndpointSlice, NamespacedName, Protocol, Service, ServicePort,
    TrafficPolicy,
};
use proxy::{Config, Mode, Proxy, ProxyStatus};
use tokio::sync::{mpsc, watch};

fn name(number: u32) -> NamespacedName {
    NamespacedName { namespace: "default".into(), name: format!("service-{number}").into() }
}

fn service(number: u32) -> Service {
    let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 1)) + number);
    Service {
        key: name(number),
        cluster_ips: vec![IpAddr::V4(ip)],
        external_ips: vec![],
        load_balancer_ips: vec![],
        load_balancer_source_ranges: vec![],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 0,
        }],
        session_affinity: None,
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Cluster,
        health_check_node_port: 0,
    }
}

/// Four endpoints; the last one is another in each round.
fn slice(number: u32, round: u32) -> EndpointSlice {
    let base = u32::from(Ipv4Addr::new(10, 128, 0, 1)) + number * 8;
    let endpoint = |offset: u32| Endpoint {
        address: IpAddr::V4(Ipv4Addr::from(base + offset)),
        ready: true,
        serving: true,
        terminating: false,
        local: false,
        zones: vec![],
        node_hint: Default::default(),
    };
    EndpointSlice {
        key: name(number),
        service: Arc::from(format!("service-{number}")),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: vec![endpoint(0), endpoint(1), endpoint(2), endpoint(3 + round % 2)],
        triggered: None,
    }
}

fn memory(field: &str) -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text.lines().find(|line| line.starts_with(field)).context("no such field")?;
    let kilobytes: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kilobytes / 1024.0)
}

/// Waits until the kernel has all that was sent before.
async fn settle(
    changes: &mpsc::Sender<Change>,
    status: &mut watch::Receiver<ProxyStatus>,
    mark: String,
) -> Result<()> {
    changes.send(Change::SourceError(Some(mark.clone()))).await?;
    let has_all = |s: &ProxyStatus| {
        s.source_error.as_deref() == Some(mark.as_str()) && s.pending == 0 && s.last_sync.is_some()
    };
    tokio::time::timeout(Duration::from_secs(600), status.wait_for(has_all)).await??;
    Ok(())
}

fn main() -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut args = std::env::args().skip(1);
    let services: u32 = args.next().map_or(Ok(5000), |n| n.parse())?;
    let mode: Mode =
        args.next().unwrap_or_else(|| "nftables".into()).parse().map_err(anyhow::Error::msg)?;
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace: run as root")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(services, mode))
}

async fn measure(services: u32, mode: Mode) -> Result<()> {
    let config = Config {
        mode,
        node_name: "node".into(),
        healthz_bind: None,
        metrics_bind: None,
        set_sysctls: false,
        localhost_node_ports: false,
        ..Config::default()
    };
    let before = memory("Pss:")?;
    let (changes, receiver) = mpsc::channel(4096);
    let (shutdown, stop) = watch::channel(false);
    let proxy = Proxy::new(config.clone());
    let mut status = proxy.status();
    let running = tokio::spawn(proxy.run(receiver, stop));

    let begin = Instant::now();
    for number in 0..services {
        changes.send(Change::Service(service(number))).await?;
        changes.send(Change::Slice(slice(number, 0))).await?;
    }
    changes.send(Change::Synced).await?;
    settle(&changes, &mut status, "cold".into()).await?;
    let cold = begin.elapsed();
    ensure!(status.borrow().errors.is_empty(), "{:?}", status.borrow().errors);

    let rounds = 200;
    let mut latencies = Vec::new();
    for round in 1..=rounds {
        let begin = Instant::now();
        let turn = round * 7 / services + 1;
        changes.send(Change::Slice(slice(round * 7 % services, turn))).await?;
        settle(&changes, &mut status, format!("round {round}")).await?;
        latencies.push(begin.elapsed());
    }
    latencies.sort();
    let begin = Instant::now();
    changes.send(Change::Service(service(services))).await?;
    changes.send(Change::Slice(slice(services, 0))).await?;
    settle(&changes, &mut status, "new".into()).await?;
    let new = begin.elapsed();
    let (pss, rss) = (memory("Pss:")? - before, memory("Rss:")?);
    shutdown.send(true)?;
    running.await??;

    let (changes, receiver) = mpsc::channel(4096);
    let (_shutdown, stop) = watch::channel(false);
    let proxy = Proxy::new(config);
    let mut status = proxy.status();
    tokio::spawn(proxy.run(receiver, stop));
    let begin = Instant::now();
    for number in 0..=services {
        changes.send(Change::Service(service(number))).await?;
        changes.send(Change::Slice(slice(number, 0))).await?;
    }
    changes.send(Change::Synced).await?;
    settle(&changes, &mut status, "restart".into()).await?;
    let restart = begin.elapsed();

    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    let percentile = |p: usize| latencies[(latencies.len() * p / 100).min(latencies.len() - 1)];
    println!("mode                        {mode}");
    println!("services x endpoints        {services} x 4");
    println!("cold start                  {:9.1} ms", ms(cold));
    println!("change of an endpoint, p50  {:9.2} ms", ms(percentile(50)));
    println!("change of an endpoint, p99  {:9.2} ms", ms(percentile(99)));
    println!("new Service                 {:9.2} ms", ms(new));
    println!("restart with takeover       {:9.1} ms", ms(restart));
    println!("memory added (PSS)          {pss:9.1} MB, RSS of the process {rss:.1} MB");
    Ok(())
}
