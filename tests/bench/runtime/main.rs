//! The runtime alone, beside containerd and runc: `bench-runtime --longshore FILE [--pods N]`.
//!
//! Each stack gets a node of its own with the same CNI bridge and the same image, and is driven by
//! the CRI as a kubelet drives it; Longshore is measured once more with its built-in bridge.
//! containerd is Debian's, or the one in the folder `LONGSHORE_BENCH_PEERS`; without `--peer no`
//! ratios are printed. Nothing is asserted: figures of a shared machine are to be read.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a tool for developers: a panic is how it reports"
)]

mod client;
mod measure;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use client::Client;
use measure::{Figures, ROWS, measure};
use tests::harness::containerd::CNI_NETWORK;
use tests::harness::node::Runtime;
use tests::harness::{Lab, Node, NodeOptions, eventually};

struct Options {
    longshore: PathBuf,
    pods: usize,
    peer: bool,
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<()> {
    let options = arguments()?;
    let mut columns = vec![
        ("longshore", longshore(&options, true).await?),
        ("own bridge", longshore(&options, false).await?),
    ];
    if options.peer {
        columns.push(("containerd", containerd(&options).await?));
    }
    print(&options, &columns)
}

fn arguments() -> Result<Options> {
    let mut options = Options { longshore: PathBuf::new(), pods: 50, peer: true };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--longshore" => options.longshore = value.into(),
            "--pods" => options.pods = value.parse()?,
            "--peer" => options.peer = value != "no",
            other => anyhow::bail!(
                "unknown argument {other}; usage: bench-runtime --longshore FILE [--pods N] \
                 [--peer no]"
            ),
        }
    }
    if options.longshore.as_os_str().is_empty() {
        options.longshore = tests::harness::longshore_binary()?;
    }
    options.longshore = std::path::absolute(&options.longshore)?;
    Ok(options)
}

async fn longshore(options: &Options, cni: bool) -> Result<Figures> {
    let lab = Lab::new(if cni { "bench-cri" } else { "bench-cri-own" })?;
    let node_options =
        NodeOptions { binary: Some(options.longshore.clone()), ..NodeOptions::default() };
    let mut node = Node::new(&lab, node_options).await?;
    if cni {
        let folder = node.path("/etc/cni/net.d");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("10-test.conflist"), CNI_NETWORK)?;
    }
    node.import_example_image()?;
    node.start(&["--only", "cri"])?;
    let socket = node.path("/run/longshore/cri.sock");
    eventually("the CRI answers", async || Client::connect(&socket).await?.version().await).await;
    let client = Client::connect(&socket).await?;
    measure(&node, &client, options.pods, &["longshore"]).await
}

async fn containerd(options: &Options) -> Result<Figures> {
    let lab = Lab::new("bench-cri-peer")?;
    let node_options = NodeOptions { runtime: Runtime::Containerd, ..NodeOptions::default() };
    let node = Node::new(&lab, node_options).await?;
    node.import_example_image()?;
    let client = Client::connect(&node.path("/run/containerd/containerd.sock")).await?;
    eprintln!("beside {}", client.version().await?);
    measure(&node, &client, options.pods, &["containerd", "containerd-shim", "runc"]).await
}

fn print(options: &Options, columns: &[(&str, Figures)]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let cores = std::thread::available_parallelism()?;
    writeln!(out, "{} pods, {cores} cores; the ratio is containerd to longshore", options.pods)?;
    write!(out, "{:<40}", "")?;
    for (name, _) in columns {
        write!(out, " {name:>11}")?;
    }
    writeln!(out, " {:>7} {:>6}  unit", "ratio", "bar")?;
    for row in ROWS {
        write!(out, "{:<40}", row.name)?;
        for (_, figures) in columns {
            write!(out, " {:>11.2}", figures[row.name])?;
        }
        let (own, peer) = (columns[0].1[row.name], columns.get(2).map(|c| c.1[row.name]));
        let ratio = peer.map_or("-".to_owned(), |peer| {
            format!("{:.1}x", if row.more_is_better { own / peer } else { peer / own })
        });
        let bar = row.bar.map_or(String::new(), |bar| format!("{bar:.0}x"));
        writeln!(out, " {ratio:>7} {bar:>6}  {}", row.unit)?;
    }
    Ok(())
}
