//! The same random Services under both backends: what becomes of packets must be the same. The fate
//! of a packet is read off real connections, by who answers and whom the answerer saw.
//!
//! `LONGSHORE_SEED` repeats one run, `LONGSHORE_ROUNDS` makes runs longer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use common::{
    NODE, Namespace, Net, Running, ask_stream, at, config, endpoint, name, node_state, pod_ip,
    serve, service, sh, slice,
};
use proxy::Mode;
use proxy::object::{Change, NodeHint, Service, TrafficPolicy};

const PODS: [&str; 3] = ["a", "b", "c"];
/// With three endpoints one is missed once in three million times.
const TRIES: usize = 40;

/// What became of packets from one place to one address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Rejected,
    Dropped,
    /// Who answered, each with the client's address that it saw.
    Answered(BTreeSet<String>),
    /// One answered all the time; which, chance decided.
    Sticky(String),
}

/// Place, protocol, destination.
type Fates = BTreeMap<(&'static str, &'static str, SocketAddr), Fate>;

/// splitmix64: the same numbers for the same seed, everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    fn policy(&mut self) -> TrafficPolicy {
        if self.one_in(3) { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
    }
}

/// A random Service `number` with its slices, or its end.
fn wish(dice: &mut Dice, number: u16) -> (Option<Service>, Vec<Change>) {
    let mut svc = service(number);
    if dice.one_in(6) {
        return (None, vec![Change::ServiceGone(svc.key)]);
    }
    let n = number as u8;
    if !dice.one_in(3) {
        svc.ports[0].node_port = 30080 + number;
        svc.ports[1].node_port = if dice.one_in(2) { 30053 + number * 100 } else { 0 };
    }
    if dice.one_in(2) {
        svc.external_ips =
            vec![at(&format!("203.0.113.{n}"), 0).ip(), at(&format!("2001:db8::{n}"), 0).ip()];
    }
    if dice.one_in(2) {
        svc.load_balancer_ips = vec![at(&format!("198.51.100.{n}"), 0).ip()];
        let ranges: &[&str] = match dice.roll(4) {
            0 => &["192.168.50.0/24"],
            1 => &["10.88.0.0/30", "192.0.2.0/24", "192.168.50.1/32"],
            2 => &["0.0.0.0/0"],
            _ => &[],
        };
        svc.load_balancer_source_ranges = ranges.iter().map(|r| r.parse().unwrap()).collect();
    }
    svc.internal_traffic_policy = dice.policy();
    svc.external_traffic_policy = dice.policy();
    svc.session_affinity = dice.one_in(4).then(|| Duration::from_secs(600));
    let mut changes = vec![Change::Service(svc.clone())];
    let (hints, ready) = (dice.one_in(3), !dice.one_in(4));
    for v6 in [false, true] {
        let mut first = slice(number, v6, &[]);
        let mut second = slice(number, v6, &[]);
        second.key = name(&format!("svc{number}-more-{v6}"));
        for pod in 0..PODS.len() {
            if dice.one_in(3) {
                continue;
            }
            let mut e = endpoint(pod_ip(pod, v6));
            e.ready = ready && !dice.one_in(3);
            e.serving = e.ready || dice.one_in(2);
            e.terminating = !e.ready && !dice.one_in(3);
            // The pod that asks is here: only what runs here may talk to itself.
            e.local = dice.one_in(2) || pod == 0;
            if hints {
                e.zones = vec![if dice.one_in(2) { "here".into() } else { "there".into() }];
                e.node_hint =
                    [NodeHint::None, NodeHint::Others, NodeHint::Here][dice.roll(3) as usize];
            }
            // Some are told twice, as while a slice is split.
            if dice.one_in(4) {
                second.endpoints.push(e.clone());
            }
            first.endpoints.push(e);
        }
        changes.push(Change::Slice(first));
        changes.push(Change::Slice(second));
    }
    (Some(svc), changes)
}

/// Every address of a Service, by protocol.
fn targets(svc: &Service) -> Vec<(&'static str, SocketAddr)> {
    let mut all = Vec::new();
    let ips = svc.cluster_ips.iter().chain(&svc.external_ips).chain(&svc.load_balancer_ips);
    for ip in ips {
        all.push(("tcp", SocketAddr::new(*ip, 80)));
        all.push(("udp", SocketAddr::new(*ip, 53)));
    }
    for (port, protocol) in svc.ports.iter().zip(["tcp", "udp"]) {
        if port.node_port != 0 {
            all.extend(NODE.iter().map(|node| (protocol, at(node, port.node_port))));
        }
    }
    all
}

/// Asks once; sooner tired than a user would be, as much of what is asked is dropped.
fn ask(protocol: &str, to: SocketAddr) -> Result<String, String> {
    // An answer that the kernel is too busy to hear comes again with the second SYN, after 1 s.
    const PATIENCE: Duration = Duration::from_millis(1500);
    if protocol == "tcp" {
        let stream = TcpStream::connect_timeout(&to, PATIENCE);
        return ask_stream(&mut stream.map_err(|e| e.kind().to_string())?);
    }
    // A port that had been used before would be a flow that goes on as it was.
    static PORT: AtomicU16 = AtomicU16::new(10_000);
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let port = PORT.fetch_add(1, Ordering::Relaxed).max(1024);
    let socket = UdpSocket::bind((any, port)).map_err(|e| format!("port {port}: {e}"))?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
    socket.connect(to).map_err(|e| e.to_string())?;
    // What is rejected on its way out fails at once; the answer to it tells it from a drop.
    let _ = socket.send(b"?");
    let mut buffer = [0; 100];
    let len = socket.recv(&mut buffer).map_err(|e| e.kind().to_string())?;
    Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
}

fn fate(place: &Namespace, itself: bool, protocol: &str, to: SocketAddr, sticky: bool) -> Fate {
    let ask = || ask(protocol, to);
    place.run(|| {
        let mut seen = BTreeSet::new();
        let mut silent = 0;
        for _ in 0..TRIES {
            match ask() {
                Ok(answer) => drop(seen.insert(answer)),
                Err(error) if error.contains("refused") => {
                    assert!(seen.is_empty(), "{protocol} {to}: {error} after {seen:?}");
                    return Fate::Rejected;
                }
                Err(error) => {
                    // A busy machine loses one now and then.
                    silent += 1;
                    assert!(
                        seen.is_empty() || silent < 5,
                        "{protocol} {to}: {error} after {seen:?}"
                    );
                    if silent == 2 && seen.is_empty() {
                        return Fate::Dropped;
                    }
                }
            }
        }
        match seen.len() {
            1 if sticky => {
                let answer = seen.pop_first().unwrap();
                let (_, client) = answer.split_once(' ').unwrap();
                // A pod that chance leads to itself is masqueraded.
                Fate::Sticky(if itself { String::new() } else { client.to_owned() })
            }
            _ => Fate::Answered(seen),
        }
    })
}

/// Runs the seed's rounds under one backend: the fates after each.
fn run(mode: Mode, seed: u64, rounds: usize) -> Vec<Fates> {
    let net = Net::new(PODS.len());
    // Rejects are asked for more often than the kernel answers by default.
    sh("sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0");
    for (pod, name) in net.pods.iter().zip(PODS) {
        serve(pod, name, 8080);
    }
    let mut running = Running::start(config(mode));
    let mut node = node_state();
    node.zone = Some("here".into());
    running.send(Change::Node(node));
    running.send(Change::Synced);
    let mut dice = Dice(seed);
    let mut services: BTreeMap<u16, Service> = BTreeMap::new();
    let mut all = Vec::new();
    for _ in 0..rounds {
        for number in [1, 2] {
            let (svc, changes) = wish(&mut dice, number);
            changes.into_iter().for_each(|change| running.send(change));
            match svc {
                Some(svc) => drop(services.insert(number, svc)),
                None => drop(services.remove(&number)),
            }
        }
        running.settle();
        let mut fates = Fates::new();
        for svc in services.values() {
            let (sticky, targets) = (svc.session_affinity.is_some(), targets(svc));
            let targets = &targets;
            let of_place = |place: &'static str, namespace: &Namespace| {
                let seen = |(protocol, to): &(&'static str, SocketAddr)| {
                    (
                        (place, *protocol, *to),
                        fate(namespace, place == "pod", protocol, *to, sticky),
                    )
                };
                targets.iter().map(seen).collect::<Vec<_>>()
            };
            std::thread::scope(|scope| {
                let places = [("pod", &net.pods[0]), ("node", &net.node), ("client", &net.client)];
                let asking =
                    places.map(|(place, there)| scope.spawn(move || of_place(place, there)));
                asking.into_iter().for_each(|one| fates.extend(one.join().unwrap()));
            });
        }
        all.push(fates);
    }
    all
}

fn compare(seed: u64, rounds: usize) {
    // Each in a thread, as each has a node of its own.
    let one = std::thread::spawn(move || run(Mode::Nftables, seed, rounds));
    let other = std::thread::spawn(move || run(Mode::Iptables, seed, rounds));
    let (one, other) = (one.join().unwrap(), other.join().unwrap());
    for (round, (nftables, iptables)) in one.iter().zip(&other).enumerate() {
        for (way, fate) in nftables {
            let other = iptables.get(way);
            // A firewalled address without endpoints: iptables drops what its firewall chain could
            // not translate, as upstream's two modes differ too.
            let firewalled = matches!(way.2.ip(), IpAddr::V4(ip) if ip.octets()[0] == 198);
            if firewalled && (fate, other) == (&Fate::Rejected, Some(&Fate::Dropped)) {
                continue;
            }
            assert_eq!(
                Some(fate),
                other,
                "seed {seed}, round {round}: {way:?} (left nftables, right iptables)"
            );
        }
    }
    let fates: Vec<&Fate> = one.iter().flat_map(BTreeMap::values).collect();
    let some = |is: fn(&Fate) -> bool| fates.iter().any(|fate| is(fate));
    assert!(some(|f| matches!(f, Fate::Answered(_))), "seed {seed}: nothing is answered");
    assert!(
        some(|f| *f == Fate::Rejected || *f == Fate::Dropped),
        "seed {seed}: nothing is refused"
    );
}

#[test]
fn both_backends_do_the_same_with_packets() {
    let number = |variable: &str| std::env::var(variable).ok().and_then(|v| v.parse().ok());
    let rounds = number("LONGSHORE_ROUNDS").unwrap_or(2) as usize;
    match number("LONGSHORE_SEED") {
        Some(seed) => compare(seed, rounds),
        None => compare(1, rounds),
    }
}
