//! One proxy at one size, measured from outside: by connections, and by what the kernel tells of
//! changes to its rules.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::Figures;
use crate::feed::{Feed, vip};
use crate::pods;
use crate::subject::Program;

/// From process start until every VIP that is tried has worked, the last one among them.
pub const COLD: &str = "cold start to the last VIP working";
/// From the watch event to the kernel's commit.
pub const CHANGE_P50: &str = "endpoint event -> programmed, p50";
/// Likewise.
pub const CHANGE_P99: &str = "endpoint event -> programmed, p99";
/// From the watch events of a new Service to its first connection.
pub const NEW: &str = "new Service -> first connection, p50";
/// From the start of `nft flush ruleset` until a Service works again; upstream's proxy waits for its
/// next full sync.
pub const FLUSHED: &str = "foreign flush -> first connection, p50";
/// Idle, after the cold start and the changes.
pub const PSS: &str = "memory, PSS";
/// While a thousand endpoints a second are replaced.
pub const FLIPS: &str = "1,000 endpoint changes a second, CPU";
/// While the process is killed and started again.
pub const FAILED: &str = "connections that failed over a restart";
/// Likewise.
pub const MADE: &str = "connections made over it";
/// A connection from nothing, by way of the rules.
pub const CONNECT: &str = "new connection through a VIP, p50";
/// The same without; the rules are asked nevertheless.
pub const DIRECT: &str = "new connection to an endpoint, p50";
/// Of a connection through a VIP, over that of one to an endpoint which had the turns between: the
/// median.
pub const THROUGHPUT: &str = "throughput pod to pod through a VIP, of direct";
/// The same, from a process of the node itself to an address of the node.
pub const OWN_THROUGHPUT: &str = "throughput of the node's own, of direct";

/// A proxy that has not done it by then is given up.
const PATIENCE: Duration = Duration::from_secs(300);
const SERVER: u16 = 8080;
/// So many through VIPs, and as many without.
const CONNECTIONS: u32 = 5000;
/// Turns of throughput, each short enough that what else the machine does meets both.
const TURNS: u32 = 200;
const TURN: Duration = Duration::from_millis(30);

/// Runs a script in the calling thread's namespaces.
pub fn sh(script: &str) -> Result<()> {
    let status = Command::new("sh").args(["-ec", script]).status()?;
    ensure!(status.success(), "{script}");
    Ok(())
}

/// Tries until a connection is made.
fn until_connected(to: SocketAddr) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_millis(5)) {
            Ok(_) => return Ok(()),
            Err(error) => ensure!(Instant::now() < end, "{to}: {error}"),
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort();
    times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e3
}

/// Measures everything.
///
/// # Errors
/// If the namespace or the process cannot be made, or the proxy never does its work.
pub fn measure(program: &Program, services: u32, seconds: u64) -> Result<Figures> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace: run as root")?;
    // Every endpoint is this namespace's own; VIPs have a route, so that packets get as far as NAT.
    sh("ip link set lo up; ip route add local 10.128.0.0/9 dev lo
        ip link add out mtu 65535 type veth peer name away mtu 65535; ip link set away up
        ip addr add 192.168.99.1/24 dev out; ip link set out up
        ip route add default dev out")?;
    let server = TcpListener::bind(("0.0.0.0", SERVER))?;
    let bulk = Arc::new(AtomicBool::new(false));
    let drains = bulk.clone();
    std::thread::spawn(move || {
        for mut stream in server.incoming().flatten() {
            if drains.load(Ordering::Relaxed) {
                std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
            }
        }
    });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
    let feed = Feed::new(services);
    let port = runtime.block_on(feed.serve())?;
    let folder = tempfile::tempdir()?;
    let mut figures = Figures::new();

    let begin = Instant::now();
    let mut subject = program.start(folder.path(), port)?;
    let step = (services / 200).max(1) as usize;
    for number in (0..services).rev().step_by(step) {
        until_connected(vip(number))?;
    }
    figures.insert(COLD.into(), begin.elapsed().as_secs_f64() * 1e3);
    std::thread::sleep(Duration::from_secs(3));

    eprintln!("  connections and bytes");
    data_plane(services, &bulk, &mut figures)?;
    let number = services + 5000;
    pods::serve(SERVER)?;
    feed.add_with(number, &[pods::SERVER]);
    until_connected(vip(number))?;
    let streams = pods::connect([vip(number), (pods::SERVER, SERVER).into()])?;
    figures.insert(THROUGHPUT.into(), throughput("pod to pod", streams)?);

    eprintln!("  changes");
    let ours = matches!(program, Program::Longshore(_));
    let rounds = if ours { 300 } else { 12 };
    let mut times = runtime.block_on(changes(program, &feed, services, rounds))?;
    figures.insert(CHANGE_P50.into(), percentile(&mut times, 50));
    figures.insert(CHANGE_P99.into(), percentile(&mut times, 99));
    let mut times = Vec::new();
    for number in services..services + if ours { 50 } else { 8 } {
        let begin = Instant::now();
        feed.add(number);
        until_connected(vip(number))?;
        times.push(begin.elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
    figures.insert(NEW.into(), percentile(&mut times, 50));
    if ours {
        let mut times = Vec::new();
        for number in 0..5 {
            let begin = Instant::now();
            sh("nft flush ruleset")?;
            let flushed = begin.elapsed();
            until_connected(vip(services / 5 * number))?;
            times.push(begin.elapsed());
            eprintln!(
                "  flushed in {flushed:.1?}, repaired {:.1?} later",
                begin.elapsed() - flushed
            );
            std::thread::sleep(Duration::from_secs(1));
        }
        figures.insert(FLUSHED.into(), percentile(&mut times, 50));
    }
    std::thread::sleep(Duration::from_secs(8));
    figures.insert(PSS.into(), subject.pss());

    eprintln!("  a thousand changes a second");
    let (before, begin) = (subject.cpu(), Instant::now());
    for turn in 0..seconds * 100 {
        for number in 0..10 {
            let number = (turn as u32 * 10 + number) % services;
            feed.flip(number);
        }
        let next = begin + Duration::from_millis(10 * (turn + 1));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let used = subject.cpu() - before;
    figures.insert(FLIPS.into(), used / begin.elapsed().as_secs_f64() * 100.0);

    eprintln!("  a restart");
    let stop = Arc::new(AtomicBool::new(false));
    let (made, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let client = {
        let (stop, made, failed) = (stop.clone(), made.clone(), failed.clone());
        std::thread::spawn(move || {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                number = (number + 7919) % services;
                match TcpStream::connect_timeout(&vip(number), Duration::from_secs(1)) {
                    Ok(_) => made.fetch_add(1, Ordering::Relaxed),
                    Err(_) => failed.fetch_add(1, Ordering::Relaxed),
                };
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    };
    std::thread::sleep(Duration::from_secs(1));
    subject.kill();
    std::thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    let _again = program.start(folder.path(), port)?;
    // A Service that it can only have been told now.
    let last = services + 1000;
    for number in services + if ours { 50 } else { 8 }..=last {
        feed.add(number);
    }
    until_connected(vip(last))?;
    eprintln!("  told everything after {:.1} s", begin.elapsed().as_secs_f64());
    std::thread::sleep(Duration::from_secs(2));
    stop.store(true, Ordering::Relaxed);
    let _ = client.join();
    figures.insert(FAILED.into(), failed.load(Ordering::Relaxed) as f64);
    figures.insert(MADE.into(), made.load(Ordering::Relaxed) as f64);
    Ok(figures)
}

/// Connections and bytes through VIPs and straight to an endpoint, by turns: whatever else the machine
/// does meets both.
fn data_plane(services: u32, bulk: &AtomicBool, figures: &mut Figures) -> Result<()> {
    let endpoint = SocketAddr::from(([10, 128, 0, 1], SERVER));
    let (mut through, mut direct) = (Vec::new(), Vec::new());
    for number in 0..CONNECTIONS {
        for (to, times) in [(vip(number * 7919 % services), &mut through), (endpoint, &mut direct)]
        {
            let begin = Instant::now();
            TcpStream::connect_timeout(&to, Duration::from_secs(5))
                .with_context(|| format!("{to}"))?;
            times.push(begin.elapsed());
        }
    }
    figures.insert(CONNECT.into(), percentile(&mut through, 50) * 1e3);
    figures.insert(DIRECT.into(), percentile(&mut direct, 50) * 1e3);
    bulk.store(true, Ordering::Relaxed);
    let streams = [TcpStream::connect(vip(services / 2))?, TcpStream::connect(endpoint)?];
    figures.insert(OWN_THROUGHPUT.into(), throughput("the node's own", streams)?);
    bulk.store(false, Ordering::Relaxed);
    Ok(())
}

/// What a connection through a VIP carries, in percent of one straight to its endpoint: the median of
/// many short turns.
fn throughput(who: &str, [mut through, mut direct]: [TcpStream; 2]) -> Result<f64> {
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        // Who goes first goes second the next time.
        let (one, other) = if turn % 2 == 0 {
            let one = rate(&mut through)?;
            (one, rate(&mut direct)?)
        } else {
            let other = rate(&mut direct)?;
            (rate(&mut through)?, other)
        };
        ratios.push(one / other);
        rates.push(one);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    eprintln!("  {who}: {:.1} GB/s through a VIP", median(&mut rates) / 1e9);
    Ok(median(&mut ratios) * 100.0)
}

/// Bytes a second of a connection, in a turn.
fn rate(stream: &mut TcpStream) -> Result<f64> {
    let block = vec![0; 1 << 18];
    let (begin, mut sent) = (Instant::now(), 0.0);
    while begin.elapsed() < TURN {
        stream.write_all(&block)?;
        sent += block.len() as f64;
    }
    Ok(sent / begin.elapsed().as_secs_f64())
}

/// From the event to the commit of it, one after the other.
async fn changes(
    program: &Program,
    feed: &Feed,
    services: u32,
    rounds: u32,
) -> Result<Vec<Duration>> {
    let mut monitor = nft::Monitor::new(None)?;
    let mut times = Vec::new();
    for round in 1..=rounds {
        // Whatever was still being done is done.
        tokio::time::sleep(Duration::from_millis(20)).await;
        monitor.told();
        let begin = Instant::now();
        feed.flip(round * 17 % services);
        let committed = async {
            loop {
                match monitor.changed().await? {
                    nft::Notification::Commit { changes, .. }
                        if !changes.iter().any(|change| change.table == program.table()) => {}
                    _ => return Ok::<(), nft::Error>(()),
                }
            }
        };
        tokio::time::timeout(PATIENCE, committed).await??;
        times.push(begin.elapsed());
    }
    Ok(times)
}
