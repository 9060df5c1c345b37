//! What Services cost, in one table: `bench-proxy --longshore FILE [--services N,N,...] [--seconds N]`.
//!
//! Each size is measured in a network namespace of its own, with the proxy as a process that watches
//! a [`feed`] of nothing but Services, slices and a node. With `LONGSHORE_BENCH_PEERS` (a folder with
//! `kube-proxy`) upstream's nftables mode is measured with 5,000 Services in the same run, and ratios
//! are printed; `LONGSHORE_BENCH_AFFINITY` gives every Service session affinity. Nothing is asserted: figures of a shared machine are to be read.

#![allow(clippy::print_stderr, reason = "a tool for developers tells what it is at")]
#![allow(clippy::disallowed_methods, reason = "it waits on threads of its own")]

mod feed;
mod measure;
mod pods;
mod subject;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use subject::Program;

/// Figures by name.
type Figures = BTreeMap<String, f64>;

/// Figures in the order of the table: name, unit, the bars that the project set itself for few,
/// 5,000 and 50,000 Services.
const ROWS: &[(&str, &str, [f64; 3])] = &[
    (measure::COLD, "ms", [1500.0, 1500.0, 20_000.0]),
    (measure::CHANGE_P50, "ms", [2.0; 3]),
    (measure::CHANGE_P99, "ms", [20.0; 3]),
    (measure::NEW, "ms", [10.0; 3]),
    (measure::FLUSHED, "ms", [100.0; 3]),
    (measure::PSS, "MB", [30.0, 30.0, 150.0]),
    (measure::FLIPS, "% of a core", [30.0; 3]),
    (measure::CONNECT, "us", [f64::NAN; 3]),
    (measure::DIRECT, "us", [f64::NAN; 3]),
    (measure::THROUGHPUT, "%", [98.0; 3]),
    (measure::OWN_THROUGHPUT, "%", [f64::NAN; 3]),
    (measure::FAILED, "connections", [0.0; 3]),
    (measure::MADE, "connections", [f64::NAN; 3]),
];
/// The size at which the peer is measured.
const PEER: u32 = 5000;

struct Options {
    longshore: PathBuf,
    services: Vec<u32>,
    seconds: u64,
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--one") {
        let [_, what, binary, services, seconds] = &arguments[..] else {
            bail!("--one has 4 values")
        };
        let program = match what.as_str() {
            "longshore" => Program::Longshore(binary.into()),
            _ => Program::KubeProxy(binary.into()),
        };
        let figures = measure::measure(&program, services.parse()?, seconds.parse()?)?;
        serde_json::to_writer(std::io::stdout().lock(), &figures)?;
        return Ok(());
    }
    let options = options(&mut arguments)?;
    let mut ours = Vec::new();
    for services in &options.services {
        eprintln!("{services} Services");
        ours.push(one("longshore", &options.longshore, *services, options.seconds)?);
    }
    let theirs = match std::env::var_os("LONGSHORE_BENCH_PEERS") {
        Some(folder) => {
            eprintln!("kube-proxy, {PEER} Services");
            let binary = PathBuf::from(folder).join("kube-proxy");
            Some(one("kube-proxy", &binary, PEER, options.seconds)?)
        }
        None => None,
    };
    print(&options, &ours, theirs.as_ref())
}

fn options(arguments: &mut Vec<String>) -> Result<Options> {
    let mut options =
        Options { longshore: PathBuf::new(), services: vec![100, 5000, 50_000], seconds: 60 };
    let mut rest = arguments.drain(..);
    while let Some(argument) = rest.next() {
        let value = rest.next().with_context(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--longshore" => options.longshore = std::path::absolute(value)?,
            "--seconds" => options.seconds = value.parse()?,
            "--services" => {
                options.services = value.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            other => bail!(
                "unknown argument {other}; usage: bench-proxy --longshore FILE [--services N,N,...] [--seconds N]"
            ),
        }
    }
    drop(rest);
    if options.longshore.as_os_str().is_empty() {
        options.longshore = tests::harness::longshore_binary()?;
    }
    Ok(options)
}

/// Measures in a process, and so in a network namespace, of its own.
fn one(what: &str, binary: &std::path::Path, services: u32, seconds: u64) -> Result<Figures> {
    let out = Command::new(std::env::current_exe()?)
        .args(["--one", what])
        .arg(binary)
        .args([services.to_string(), seconds.to_string()])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !out.status.success() {
        bail!("{what} with {services} Services could not be measured");
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

fn print(options: &Options, ours: &[Figures], theirs: Option<&Figures>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let cores = std::thread::available_parallelism()?;
    writeln!(out, "{} endpoints a Service, {cores} cores; value (bar)", feed::ENDPOINTS)?;
    write!(out, "{:<40}", "Services")?;
    for services in &options.services {
        write!(out, "{services:>20}")?;
    }
    writeln!(out, "{:>16} {:>8}", format!("peer, {PEER}"), "ratio")?;
    let at_peer = options.services.iter().position(|services| *services == PEER);
    for (name, unit, bars) in ROWS {
        write!(out, "{name:<40}")?;
        for (figures, services) in ours.iter().zip(&options.services) {
            let bar = bars[usize::from(*services > 1000) + usize::from(*services > 10_000)];
            let bar = if bar.is_nan() { String::new() } else { format!(" ({bar:.0})") };
            let value = figures.get(*name).copied().unwrap_or(f64::NAN);
            write!(out, "{:>20}", format!("{value:.1}{bar}"))?;
        }
        let peer = theirs.and_then(|figures| figures.get(*name));
        let ratio = at_peer.and_then(|at| Some(peer? / ours[at].get(*name)?));
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        write!(out, "{:>16}", text(peer.map(|peer| format!("{peer:.1}"))))?;
        let ratio = ratio.filter(|ratio| ratio.is_finite()).map(|ratio| format!("{ratio:.1}x"));
        writeln!(out, " {:>8}  {unit}", text(ratio))?;
    }
    Ok(())
}
