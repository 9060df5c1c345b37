//! The same random Services under several proxies: what becomes of packets must be the same. Ours in
//! both modes is compared with kube-proxy in the same mode if `LONGSHORE_TEST_KUBE_PROXY` names its
//! binary, else the modes with each other.
//!
//! `LONGSHORE_SEED` repeats one run, `LONGSHORE_SEEDS` tries so many from it on (from 1 without),
//! `LONGSHORE_ROUNDS` makes runs longer.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests fail by panicking"
)]

mod generate;
mod net;
mod peer;
mod probe;
mod sctp;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use generate::{Dice, UNKNOWN_PORT};
use net::{NODE, Place};
use peer::{Kind, Peer};
use probe::{Fate, Seen, Target, Transport};
use serde_json::Value;
use tests::control_plane::ControlPlane;

/// Services at a time.
const SERVICES: u8 = 2;
/// What differs is looked at so often before it counts: chance and a busy machine differ too.
const LOOKS: usize = 4;

/// Differences that are meant; ARCHITECTURE.md names them.
fn meant(
    (one, other): (&Kind, &Kind),
    config: &Value,
    target: &Target,
    fates: (&Fate, &Fate),
) -> bool {
    let with_upstream = other.kube_proxy.is_some();
    let loopback = target.to.ip().is_loopback();
    let load_balancer = match target.to.ip() {
        IpAddr::V4(ip) => ip.octets()[..3] == [198, 51, 100],
        IpAddr::V6(ip) => ip.segments()[..3] == [0x2001, 0xdb8, 1],
    };
    if with_upstream {
        // NodePorts at 127.0.0.1, which upstream's nftables mode does not have.
        return one.mode == "nftables" && loopback && target.to.is_ipv4();
    }
    // Upstream's modes differ among each other where nothing answers: at firewalled addresses, in
    // what the node itself sends to external ones, at NodePorts on addresses without any, and at ports
    // of a cluster IP that the Service does not have.
    let unanswered = |fate: &Fate| [Fate::Rejected, Fate::Dropped].contains(fate);
    let node_port = target.to.port() >= 30_000 && target.to.port() < 33_000;
    if unanswered(fates.0) && unanswered(fates.1) {
        let unknown = target.to.port() == UNKNOWN_PORT;
        return load_balancer || node_port || unknown || target.place == Place::Node;
    }
    // So do they in what a NodePort's address is by default.
    let primary = NODE[..2].iter().any(|node| node.parse() == Ok(target.to.ip()));
    let anywhere = config["nodePortAddresses"].as_array().is_some_and(Vec::is_empty);
    node_port && anywhere && !primary
}

struct Run {
    plane: ControlPlane,
    peers: Vec<Peer>,
    dice: Dice,
    services: BTreeMap<u8, Value>,
}

impl Run {
    fn start(seed: u64, kinds: &[Kind]) -> (Run, Value) {
        let mut dice = Dice(seed);
        let config = generate::configuration(&mut dice);
        let plane = ControlPlane::new().unwrap();
        plane.store("nodes", generate::node()).unwrap();
        if !seed.is_multiple_of(4) {
            plane.store("servicecidrs", generate::service_cidrs()).unwrap();
        }
        if seed.is_multiple_of(3) {
            for (plural, object) in generate::hostile() {
                plane.store(plural, object).unwrap();
            }
        }
        let start = |kind: &Kind| Peer::start(kind.clone(), &plane, &config).unwrap();
        let peers = kinds.iter().map(start).collect();
        (Run { plane, peers, dice, services: BTreeMap::new() }, config)
    }

    /// Changes Services, and waits until all have programmed that; tells what they are now.
    fn change(&mut self, round: u16) -> Value {
        let mut slices = Vec::new();
        for number in 1..=SERVICES {
            let name = format!("svc{number}");
            if round > 0 && self.dice.roll_out() {
                self.services.remove(&number);
                self.plane.remove("services", "default", &name);
                continue;
            }
            let service = generate::service(&mut self.dice, number);
            let own = generate::slices(&mut self.dice, number, &service);
            self.plane.store("services", service.clone()).unwrap();
            self.services.insert(number, service);
            for slice in own {
                self.plane.store("endpointslices", slice.clone()).unwrap();
                slices.push(slice);
            }
        }
        let (objects, at, answer) = generate::marker(round);
        for (plural, object) in objects {
            self.plane.store(plural, object).unwrap();
        }
        for peer in &mut self.peers {
            peer.settle(&at, &answer).unwrap();
        }
        let services: Vec<&Value> = self.services.values().collect();
        serde_json::json!({"services": services, "slices": slices})
    }

    /// Looks from everywhere at once.
    fn look(&self, targets: &[Target]) -> Vec<BTreeMap<Target, Seen>> {
        std::thread::scope(|scope| {
            let look = |peer: &Peer| {
                let net = peer.net.clone();
                let targets = targets.to_vec();
                scope.spawn(move || probe::look(&net, &targets).into_iter().collect())
            };
            let all: Vec<_> = self.peers.iter().map(look).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        })
    }
}

/// Who is compared with whom.
fn pairs(kinds: &[Kind]) -> Vec<(usize, usize)> {
    if kinds.len() == 2 { vec![(0, 1)] } else { vec![(0, 2), (1, 3)] }
}

/// Runs a seed; tells the differences, and how often each fate was seen: rejected, dropped, answered,
/// and of the last how often by SCTP.
fn compare(seed: u64, rounds: u16, kinds: &[Kind]) -> (Vec<String>, [usize; 4]) {
    let (mut run, config) = Run::start(seed, kinds);
    let mut differences = Vec::new();
    let mut fates = [0; 4];
    for round in 0..rounds {
        let objects = run.change(round);
        let targets: Vec<Target> = run.services.values().flat_map(generate::targets).collect();
        let mut seen = run.look(&targets);
        for seen in &seen {
            for (target, seen) in seen {
                match seen.fate(target) {
                    Fate::Rejected => fates[0] += 1,
                    Fate::Dropped => fates[1] += 1,
                    Fate::Answered(_) | Fate::Sticky(_) => {
                        fates[2] += 1;
                        fates[3] += usize::from(target.by == Transport::Sctp);
                    }
                }
            }
        }
        for look in 1..=LOOKS {
            let mut differ: Vec<Target> = Vec::new();
            for (one, other) in pairs(kinds) {
                for (target, seen_by_one) in &seen[one] {
                    let pair = (&seen_by_one.fate(target), &seen[other][target].fate(target));
                    if pair.0 == pair.1
                        || meant((&kinds[one], &kinds[other]), &config, target, pair)
                    {
                        continue;
                    }
                    differ.push(*target);
                    if look == LOOKS {
                        differences.push(format!(
                            "seed {seed}, round {round}: {target:?}\n  {}: {:?}\n  {}: {:?}",
                            kinds[one], pair.0, kinds[other], pair.1
                        ));
                    }
                }
            }
            if differ.is_empty() {
                break;
            }
            if look < LOOKS {
                for (before, again) in seen.iter_mut().zip(run.look(&differ)) {
                    for (target, again) in again {
                        let merged = before[&target].clone().and(&again);
                        before.insert(target, merged);
                    }
                }
            }
        }
        if !differences.is_empty() {
            let objects = serde_json::to_string_pretty(&objects).unwrap();
            differences.push(format!("configuration {config}\nobjects {objects}"));
            if std::env::var_os("LONGSHORE_RULES").is_some() {
                differences.extend(
                    run.peers.iter().map(|p| format!("{}\n{}\n{}", p.kind, p.rules(), p.log())),
                );
            }
            break;
        }
    }
    (differences, fates)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_fare_the_same_under_every_proxy() {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|v| v.parse::<u64>().ok());
    let first = number("LONGSHORE_SEED").unwrap_or(1);
    let seeds = number("LONGSHORE_SEEDS").unwrap_or(1);
    let rounds = number("LONGSHORE_ROUNDS").unwrap_or(3) as u16;
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(files).unwrap();
    nix::sys::resource::setrlimit(files, hard.min(65_536), hard).unwrap();
    let own = ["nftables", "iptables"].map(|mode| Kind { kube_proxy: None, mode });
    let mut kinds = own.to_vec();
    if let Some(binary) = std::env::var_os("LONGSHORE_TEST_KUBE_PROXY").map(PathBuf::from) {
        kinds.extend(own.map(|kind| Kind { kube_proxy: Some(binary.clone()), ..kind }));
    }
    let (mut failed, mut total) = (0, [0; 3]);
    for seed in first..first + seeds {
        let kinds = kinds.clone();
        let compared = tokio::task::spawn_blocking(move || compare(seed, rounds, &kinds)).await;
        let (differences, [rejected, dropped, answered, sctp]) = compared.unwrap();
        eprintln!(
            "seed {seed}: {answered} answered ({sctp} by SCTP), {rejected} rejected, {dropped} dropped, \
             {} differ",
            differences.len().saturating_sub(1)
        );
        failed += usize::from(!differences.is_empty());
        let many = differences.len().saturating_sub(12);
        let shown = differences.iter().enumerate().filter(|(i, _)| *i < 6 || *i >= many + 6);
        shown.for_each(|(_, difference)| eprintln!("{difference}"));
        total = [total[0] + rejected, total[1] + dropped, total[2] + answered];
    }
    assert!(total[0] > 0 && total[1] > 0 && total[2] > 0, "too few fates: {total:?}");
    assert_eq!(failed, 0, "of {seeds} seeds so many have differences; they are listed above");
}
