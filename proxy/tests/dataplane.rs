//! Real packets through the rules of both backends: from a pod, from the node, from outside.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use common::{
    CLIENT, NODE, Net, Running, ask_datagram, ask_stream, ask_tcp, ask_udp, at, config, eventually,
    node_state, pod_ip, serve, service, sh, slice, slices, vip,
};
use proxy::object::{Change, TrafficPolicy};
use proxy::{Mode, ProxyStatus};

const PODS: [&str; 3] = ["a", "b", "c"];

fn with_pods(count: usize) -> Net {
    let net = Net::new(count);
    for (pod, name) in net.pods.iter().zip(PODS) {
        serve(pod, name, 8080);
    }
    net
}

fn start(mode: Mode) -> Running {
    let running = Running::start(config(mode));
    running.send(Change::Node(node_state()));
    running
}

/// `nft` must understand all that is there.
fn nft_lists() -> String {
    let out = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    assert!(
        out.status.success() && out.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The rules of iptables are not for `nft` to print.
fn check_listing(mode: Mode) {
    if mode == Mode::Nftables {
        nft_lists();
    }
}

fn everything_reaches(mode: Mode) {
    let net = with_pods(2);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    svc.ports[1].node_port = 30053;
    svc.external_ips = vec!["203.0.113.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    svc.load_balancer_ips = vec!["203.0.113.8".parse().unwrap()];
    running.send(Change::Service(svc.clone()));
    slices(1, &[0, 1]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    assert_eq!(running.status.borrow().mode, mode);
    for v6 in [false, true] {
        let family = usize::from(v6);
        let external = if v6 { "2001:db8::7" } else { "203.0.113.7" };
        let mut targets: Vec<(SocketAddr, SocketAddr)> = vec![
            (vip(&svc, v6, 80), vip(&svc, v6, 53)),
            (at(external, 80), at(external, 53)),
            (at(NODE[family], 30080), at(NODE[family], 30053)),
        ];
        if !v6 {
            targets.push((at("203.0.113.8", 80), at("203.0.113.8", 53)));
        }
        for (tcp, udp) in targets {
            for (from, place) in
                [("pod", &net.pods[0]), ("node", &net.node), ("client", &net.client)]
            {
                let mut seen: BTreeMap<char, usize> = BTreeMap::new();
                for _ in 0..12 {
                    let answer = place.run(|| ask_tcp(tcp));
                    let answer =
                        answer.unwrap_or_else(|e| panic!("{from} to {tcp}: {e}\n{}", nft_lists()));
                    *seen.entry(answer.chars().next().unwrap()).or_default() += 1;
                }
                assert!(seen.keys().all(|c| "ab".contains(*c)), "{from} {tcp}: {seen:?}");
                let answer = place.run(|| ask_udp(udp));
                assert!(answer.is_ok(), "{from} to {udp}: {answer:?}");
            }
        }
    }
    // The node's loopback address serves NodePorts too.
    assert!(ask_tcp(at("127.0.0.1", 30080)).is_ok());
    assert!(ask_udp(at("127.0.0.1", 30053)).is_ok());
    // What is not a NodePort is not touched, and other ports of a cluster IP are refused.
    assert_eq!(net.client.run(|| ask_tcp(at(NODE[0], 30081))), Err("connection refused".into()));
    check_listing(mode);
    running.stop();
    // Rules outlive the process.
    assert!(net.client.run(|| ask_tcp(vip(&svc, false, 80))).is_ok());
}

#[test]
fn every_address_is_reached_from_everywhere_nftables() {
    everything_reaches(Mode::Nftables);
}

fn sources(mode: Mode) {
    let net = with_pods(1);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    running.send(Change::Service(svc.clone()));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    for v6 in [false, true] {
        let family = usize::from(v6);
        let gateway = ["10.88.0.1", "fd88::1"][family];
        let own = pod_ip(0, v6).to_string();
        // A pod that talks to itself through the Service sees the node as its client.
        let answer = net.pods[0].run(|| ask_tcp(vip(&svc, v6, 80))).unwrap();
        assert_ne!(answer, format!("a {own}"));
        // Off-cluster traffic to a cluster IP and NodePorts with policy Cluster are masqueraded.
        for to in [vip(&svc, v6, 80), at(NODE[family], 30080)] {
            let answer = net.client.run(|| ask_tcp(to)).unwrap();
            assert!(!answer.contains(CLIENT[family]), "{to}: {answer}");
            assert!(answer.contains(gateway) || answer.contains(NODE[family]), "{to}: {answer}");
        }
    }
    // With policy Local the client is seen as it is.
    svc.external_traffic_policy = TrafficPolicy::Local;
    running.send(Change::Service(svc.clone()));
    running.settle();
    for v6 in [false, true] {
        let family = usize::from(v6);
        let answer = net.client.run(|| ask_tcp(at(NODE[family], 30080))).unwrap();
        assert_eq!(answer, format!("a {}", CLIENT[family]));
        assert!(ask_tcp(at(NODE[family], 30080)).is_ok(), "from the node itself");
    }
    assert!(ask_tcp(at("127.0.0.1", 30080)).is_ok());
    check_listing(mode);
}

#[test]
fn sources_are_kept_or_masqueraded_nftables() {
    sources(Mode::Nftables);
}

fn policies(mode: Mode) {
    let net = with_pods(2);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    svc.external_traffic_policy = TrafficPolicy::Local;
    let mut remote = slice(1, false, &[0, 1]);
    remote.endpoints[0].local = false;
    running.send(Change::Service(svc.clone()));
    running.send(Change::Slice(remote.clone()));
    running.send(Change::Synced);
    running.settle();
    let from = |place: &common::Namespace, to: SocketAddr| -> String {
        let mut seen: Vec<String> = (0..20)
            .map(|_| place.run(|| ask_tcp(to)).map_or_else(|e| e, |a| a[..1].to_owned()))
            .collect();
        seen.sort();
        seen.dedup();
        seen.join(",")
    };
    // Outside: the local one only. This node and its pods: all of them.
    assert_eq!(from(&net.client, at(NODE[0], 30080)), "b");
    assert_eq!(from(&net.node, at(NODE[0], 30080)), "a,b");
    assert_eq!(from(&net.pods[1], at(NODE[0], 30080)), "a,b");
    assert_eq!(from(&net.client, vip(&svc, false, 80)), "a,b");
    // No local endpoint: dropped outside, served inside.
    remote.endpoints[1].local = false;
    running.send(Change::Slice(remote.clone()));
    running.settle();
    let refused = net.client.run(|| ask_tcp(at(NODE[0], 30080)));
    assert_eq!(refused, Err("timed out".into()));
    assert_eq!(from(&net.node, at(NODE[0], 30080)), "a,b");
    // Cluster IPs with policy Local.
    svc.internal_traffic_policy = TrafficPolicy::Local;
    remote.endpoints[0].local = true;
    running.send(Change::Service(svc.clone()));
    running.send(Change::Slice(remote.clone()));
    running.settle();
    assert_eq!(from(&net.pods[1], vip(&svc, false, 80)), "a");
    // No endpoint at all: rejected at once, everywhere.
    remote.endpoints.clear();
    running.send(Change::Slice(remote));
    running.settle();
    let mut targets = vec![vip(&svc, false, 80), at(NODE[0], 30080)];
    if mode == Mode::Nftables {
        // Ports that the Service does not have; upstream's iptables mode lets them pass, too.
        targets.push(vip(&svc, false, 81));
    }
    for to in targets {
        for (from, place) in [("client", &net.client), ("node", &net.node), ("pod", &net.pods[0])] {
            let answer = place.run(|| ask_tcp(to));
            assert_eq!(answer, Err("connection refused".into()), "{from} to {to}");
        }
    }
    assert_eq!(net.client.run(|| ask_udp(vip(&svc, false, 53))), Err("connection refused".into()));
    let v6 = vip(&svc, true, 80);
    assert_eq!(net.client.run(|| ask_tcp(v6)), Err("connection refused".into()));
    check_listing(mode);
}

#[test]
fn traffic_policies_and_rejects_nftables() {
    policies(Mode::Nftables);
}

/// Whichever address of a port a client uses, it stays with the endpoint that it had at another,
/// also where policy Local leads to fewer.
fn affinity_at_every_address(mode: Mode) {
    let net = with_pods(3);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    svc.external_ips = vec![at("203.0.113.1", 0).ip(), at("2001:db8::1", 0).ip()];
    svc.load_balancer_ips = vec![at("198.51.100.1", 0).ip()];
    svc.session_affinity = Some(Duration::from_secs(600));
    running.send(Change::Service(svc.clone()));
    slices(1, &[0, 1, 2]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let ask = |to: SocketAddr| net.client.run(|| ask_tcp(to)).unwrap()[..1].to_owned();
    let all_the_same = |v6: bool| {
        let external = svc.external_ips[usize::from(v6)];
        let mut all = vec![
            vip(&svc, v6, 80),
            at(NODE[usize::from(v6)], 30080),
            SocketAddr::new(external, 80),
        ];
        if !v6 {
            all.push(SocketAddr::new(svc.load_balancer_ips[0], 80));
        }
        let mine = ask(all[0]);
        for to in all {
            assert_eq!(ask(to), mine, "{to}");
        }
        mine
    };
    for v6 in [false, true] {
        let mine = all_the_same(v6);
        // With policy Local outside, its endpoint is one of those that are here, and stays its own.
        let mut local = svc.clone();
        local.external_traffic_policy = TrafficPolicy::Local;
        running.send(Change::Service(local));
        for mut change in slices(1, &[0, 1, 2]) {
            if let Change::Slice(slice) = &mut change {
                for endpoint in &mut slice.endpoints {
                    let index = PODS.iter().position(|p| **p == mine).unwrap();
                    endpoint.local = endpoint.address == pod_ip(index, v6);
                }
            }
            running.send(change);
        }
        running.settle();
        assert_eq!(all_the_same(v6), mine);
        running.send(Change::Service(svc.clone()));
        running.settle();
        assert_eq!(all_the_same(v6), mine);
    }
    check_listing(mode);
}

#[test]
fn affinity_holds_at_every_address_nftables() {
    affinity_at_every_address(Mode::Nftables);
}

#[test]
fn affinity_holds_at_every_address_iptables() {
    affinity_at_every_address(Mode::Iptables);
}

fn affinity(mode: Mode) {
    let net = with_pods(3);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    svc.session_affinity = Some(Duration::from_secs(600));
    running.send(Change::Service(svc.clone()));
    slices(1, &[0, 1, 2]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    for v6 in [false, true] {
        for to in [vip(&svc, v6, 80), at(NODE[usize::from(v6)], 30080)] {
            let ask = || net.client.run(|| ask_tcp(to)).unwrap()[..1].to_owned();
            let mine = ask();
            assert!((0..10).all(|_| ask() == mine));
            // Another endpoint goes: the client stays with its own.
            let index = PODS.iter().position(|p| **p == mine).unwrap();
            let other = (index + 1) % 3;
            let left: Vec<usize> = (0..3).filter(|p| *p != other).collect();
            slices(1, &left).into_iter().for_each(|c| running.send(c));
            running.settle();
            assert!((0..10).all(|_| ask() == mine), "{to}");
            // A change of the Service does not matter either.
            svc.ports[1].node_port = if svc.ports[1].node_port == 0 { 30053 } else { 0 };
            running.send(Change::Service(svc.clone()));
            slices(1, &[0, 1, 2]).into_iter().for_each(|c| running.send(c));
            running.settle();
            assert!((0..10).all(|_| ask() == mine), "{to}");
            // Its own goes: it gets another, and stays there.
            let left: Vec<usize> = (0..3).filter(|p| *p != index).collect();
            slices(1, &left).into_iter().for_each(|c| running.send(c));
            running.settle();
            let next = ask();
            assert_ne!(next, mine);
            assert!((0..10).all(|_| ask() == next), "{to}");
            // The slot that it left is filled again: that is not its endpoint any more.
            slices(1, &[0, 1, 2]).into_iter().for_each(|c| running.send(c));
            running.settle();
            assert!((0..10).all(|_| ask() == next), "{to}");
        }
    }
    check_listing(mode);
}

#[test]
fn a_client_stays_with_its_endpoint_nftables() {
    affinity(Mode::Nftables);
}

fn source_ranges(mode: Mode) {
    let net = with_pods(1);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.load_balancer_ips = vec!["203.0.113.8".parse().unwrap()];
    svc.load_balancer_source_ranges =
        vec!["192.168.0.0/16".parse().unwrap(), "192.168.50.0/24".parse().unwrap()];
    running.send(Change::Service(svc.clone()));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let to = at("203.0.113.8", 80);
    assert!(net.client.run(|| ask_tcp(to)).is_ok());
    svc.load_balancer_source_ranges = vec!["10.0.0.0/8".parse().unwrap()];
    running.send(Change::Service(svc.clone()));
    running.settle();
    assert_eq!(net.client.run(|| ask_tcp(to)), Err("timed out".into()));
    assert!(net.pods[0].run(|| ask_tcp(to)).is_ok());
    check_listing(mode);
}

#[test]
fn source_ranges_keep_others_out_nftables() {
    source_ranges(Mode::Nftables);
}

fn takeover(mode: Mode) {
    let net = with_pods(2);
    let mut running = start(mode);
    let svc = service(1);
    let gone = service(2);
    running.send(Change::Service(svc.clone()));
    running.send(Change::Service(gone.clone()));
    slices(1, &[0, 1]).into_iter().for_each(|c| running.send(c));
    slices(2, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let mut kept = net.client.run(|| TcpStream::connect(vip(&svc, false, 80)).unwrap());
    ask_stream(&mut kept).unwrap();
    running.stop();

    // Connections are made all the time while the next process starts and takes over.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            net.client.run(|| {
                let mut made = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let answer = ask_tcp(vip(&svc, false, 80));
                    assert!(answer.is_ok(), "{answer:?} after {made}");
                    made += 1;
                }
                made
            })
        });
        let mut next = start(mode);
        next.send(Change::Service(svc.clone()));
        std::thread::park_timeout(Duration::from_millis(300));
        // Nothing is removed before everything is told.
        assert!(net.client.run(|| ask_tcp(vip(&gone, false, 80))).is_ok());
        slices(1, &[0, 1]).into_iter().for_each(|c| next.send(c));
        next.send(Change::Synced);
        next.settle();
        assert!(net.client.run(|| ask_tcp(vip(&gone, false, 80))).is_err());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(asking.join().unwrap() > 5);
        ask_stream(&mut kept).unwrap();
    });
}

#[test]
fn a_restart_takes_over_without_a_failed_connection_nftables() {
    takeover(Mode::Nftables);
}

#[test]
fn a_foreign_flush_is_repaired_nftables() {
    let net = with_pods(1);
    let mut running = start(Mode::Nftables);
    let svc = service(1);
    running.send(Change::Service(svc.clone()));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    for damage in [
        "nft flush ruleset",
        "nft delete table ip longshore-proxy",
        "nft flush chain ip longshore-proxy services",
        "nft flush map ip longshore-proxy service-kinds",
        "nft add rule ip longshore-proxy services counter drop",
    ] {
        sh(damage);
        let to = vip(&svc, false, 80);
        let _ = eventually(damage, || net.client.run(|| ask_tcp(to)), Result::is_ok);
        eventually(damage, nft_lists, |text| !text.contains("counter"));
    }
}

#[test]
fn a_foreign_flush_is_repaired_iptables() {
    let net = with_pods(1);
    let mut running = start(Mode::Iptables);
    let svc = service(1);
    running.send(Change::Service(svc.clone()));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let to = vip(&svc, false, 80);
    let _ = eventually("served", || net.client.run(|| ask_tcp(to)), Result::is_ok);
    for damage in [
        "iptables -t nat -F",
        "iptables -t nat -F KUBE-VIPS",
        "iptables -t nat -D PREROUTING -m comment --comment 'kubernetes service portals' -j KUBE-SERVICES",
        "nft flush ruleset",
    ] {
        sh(damage);
        // Sooner than the periodic look.
        let _ = eventually(damage, || net.client.run(|| ask_tcp(to)), Result::is_ok);
    }
    // What does not concern the proxy is left alone.
    sh("iptables -t nat -A PREROUTING -d 192.0.2.1 -j ACCEPT; iptables -t nat -N OTHERS");
    running.settle();
    assert!(sh("iptables-save -t nat").contains("192.0.2.1"));
}

/// What upstream's proxy leaves, as far as it matters: in both modes.
fn upstream_rules(vip: &str, endpoint: &str) {
    sh(&format!(
        "iptables-restore --noflush <<'END'
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-SVC-ABCDEFGHIJKLMNOP - [0:0]
:KUBE-SEP-ABCDEFGHIJKLMNOP - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-SERVICES -d {vip} -p tcp --dport 80 -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SVC-ABCDEFGHIJKLMNOP -j KUBE-SEP-ABCDEFGHIJKLMNOP
-A KUBE-SEP-ABCDEFGHIJKLMNOP -p tcp -j DNAT --to-destination {endpoint}
COMMIT
END
nft -f - <<'END'
table ip kube-proxy {{
  chain services {{ ip daddr {vip} tcp dport 80 dnat to {endpoint}; }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
}}
END"
    ));
}

fn upstream_is_taken_over(mode: Mode) {
    let net = with_pods(2);
    let svc = service(1);
    upstream_rules("10.96.0.1", "10.88.0.2:8080");
    let ask = || net.client.run(|| ask_tcp(vip(&svc, false, 80)));
    assert!(ask().unwrap().starts_with('a'));
    let mut running = start(mode);
    // Nothing is taken away before everything has been told.
    running.settle_unsynced();
    assert!(ask().unwrap().starts_with('a'));
    running.send(Change::Service(svc.clone()));
    slices(1, &[1]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let _ = eventually("the new endpoint", ask, |a| a.as_ref().is_ok_and(|a| a.starts_with('b')));
    let left = || sh("iptables-save; nft list tables");
    let left = eventually("upstream's is gone", left, |text| {
        !text.contains("ABCDEFGHIJKLMNOP") && !text.contains("kube-proxy")
    });
    assert!(left.contains("KUBE-KUBELET-CANARY"), "somebody else's: {left}");
    assert_eq!(left.contains("KUBE-SERVICES"), mode == Mode::Iptables, "{left}");
    assert!(ask().unwrap().starts_with('b'));
}

#[test]
fn upstreams_rules_are_taken_over_nftables() {
    upstream_is_taken_over(Mode::Nftables);
}

#[test]
fn upstreams_rules_are_taken_over_iptables() {
    upstream_is_taken_over(Mode::Iptables);
}

#[test]
fn what_the_kernel_refuses_is_left_out_alone() {
    let net = with_pods(2);
    // Somebody has made a map of the right shape that is too small for one Service of the three.
    sh("nft add table ip longshore-proxy");
    sh(
        "nft 'add map ip longshore-proxy endpoints { type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service; size 8; }'",
    );
    let mut running = start(Mode::Nftables);
    let services: Vec<_> = (1..=3).map(service).collect();
    for (number, svc) in (1..).zip(&services) {
        running.send(Change::Service(svc.clone()));
        slices(number, &[0, 1]).into_iter().for_each(|c| running.send(c));
    }
    running.send(Change::Synced);
    running.settle();
    let status = running.status.clone();
    let bad = || -> Vec<String> {
        let errors = status.borrow().errors.clone();
        errors.into_iter().map(|e| e.object).filter(|o| o.starts_with("Service ")).collect()
    };
    let bad = eventually("one is refused", bad, |bad| bad.len() == 1).remove(0);
    for svc in &services {
        let refused = bad == format!("Service {}", svc.key);
        for v6 in [false, true] {
            let answer = net.client.run(|| ask_tcp(vip(svc, v6, 80)));
            assert_eq!(answer.is_ok(), v6 || !refused, "{} {v6}: {answer:?}; {bad}", svc.key);
        }
    }
    // What another changes is programmed meanwhile.
    let other = services.iter().position(|s| bad != format!("Service {}", s.key)).unwrap();
    slices(other as u16 + 1, &[1]).into_iter().for_each(|c| running.send(c));
    let _ = eventually(
        "the change",
        || net.client.run(|| ask_tcp(vip(&services[other], false, 80))),
        |a| a.as_ref().is_ok_and(|a| a.starts_with('b')),
    );
    // With the obstacle gone all are served.
    sh("nft delete table ip longshore-proxy");
    for svc in &services {
        let ask = || net.client.run(|| ask_tcp(vip(svc, false, 80)));
        let _ = eventually("served", ask, Result::is_ok);
    }
    eventually("no error", || status.borrow().errors.len(), |n| *n == 0);
}

fn udp_flows(mode: Mode) {
    let net = with_pods(2);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[1].node_port = 30053;
    running.send(Change::Service(svc.clone()));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    for (v6, to) in
        [(false, vip(&svc, false, 53)), (true, vip(&svc, true, 53)), (false, at(NODE[0], 30053))]
    {
        slices(1, &[0]).into_iter().for_each(|c| running.send(c));
        running.settle();
        let any = if v6 { "[::]:0" } else { "0.0.0.0:0" };
        let socket = net.client.run(|| UdpSocket::bind(any).unwrap());
        assert!(ask_datagram(&socket, to).unwrap().starts_with('a'));
        slices(1, &[1]).into_iter().for_each(|c| running.send(c));
        running.settle();
        // The same socket, hence the same flow.
        let answer = ask_datagram(&socket, to);
        assert!(answer.as_ref().is_ok_and(|a| a.starts_with('b')), "{to}: {answer:?}");
    }
}

#[test]
fn stale_udp_flows_are_deleted_nftables() {
    udp_flows(Mode::Nftables);
}

fn bad_services(mode: Mode) -> ProxyStatus {
    let net = with_pods(1);
    let mut running = start(mode);
    let good = service(1);
    let mut zero = service(2);
    zero.ports[0].port = 0;
    let mut twin = service(3);
    twin.cluster_ips = good.cluster_ips.clone();
    let mut clash = service(4);
    clash.ports[0].node_port = 30080;
    let mut owner = service(5);
    owner.ports[0].node_port = 30080;
    let mut mapped = service(6);
    mapped.external_ips = vec!["::ffff:10.0.0.1".parse().unwrap(), "127.0.0.1".parse().unwrap()];
    for svc in [&good, &zero, &twin, &owner, &clash, &mapped] {
        running.send(Change::Service(svc.clone()));
    }
    for number in 1..=6 {
        slices(number, &[0]).into_iter().for_each(|c| running.send(c));
    }
    running.send(Change::Synced);
    running.settle();
    assert!(net.client.run(|| ask_tcp(vip(&good, false, 80))).is_ok());
    assert!(net.client.run(|| ask_udp(vip(&zero, false, 53))).is_ok(), "its other port");
    assert!(net.client.run(|| ask_tcp(vip(&clash, false, 80))).is_ok(), "its cluster IP");
    assert!(net.client.run(|| ask_tcp(vip(&mapped, true, 80))).is_ok(), "its cluster IP");
    assert!(net.client.run(|| ask_tcp(at(NODE[0], 30080))).is_ok());
    let status = running.status.borrow().clone();
    let has = |object: &str, part: &str| {
        status.errors.iter().any(|e| e.object == object && e.message.contains(part))
    };
    assert!(has("Service default/svc2", "its number is 0"), "{:?}", status.errors);
    assert!(has("Service default/svc3", "default/svc1 has it"), "{:?}", status.errors);
    assert!(has("Service default/svc4", "NodePort 30080"), "{:?}", status.errors);
    assert!(has("Service default/svc6", "IPv4-mapped"), "{:?}", status.errors);
    // The twin gets the addresses when the first owner goes.
    running.send(Change::ServiceGone(good.key.clone()));
    running.settle();
    assert!(net.client.run(|| ask_tcp(vip(&twin, false, 80))).is_ok());
    let status = running.status.borrow().clone();
    assert!(!status.errors.iter().any(|e| e.object.ends_with("svc3")), "{:?}", status.errors);
    status
}

#[test]
fn a_bad_service_is_reported_and_stops_nobody_nftables() {
    bad_services(Mode::Nftables);
}

#[test]
fn changing_the_mode_drops_nothing_and_leaves_nothing_of_the_other() {
    let net = with_pods(1);
    let svc = service(1);
    let mut running: Option<Running> = None;
    for mode in [Mode::Nftables, Mode::Iptables, Mode::Auto] {
        if let Some(before) = running.take() {
            before.stop();
        }
        assert!(mode == Mode::Nftables || net.client.run(|| ask_tcp(vip(&svc, false, 80))).is_ok());
        let mut next = start(mode);
        next.send(Change::Service(svc.clone()));
        slices(1, &[0]).into_iter().for_each(|c| next.send(c));
        next.send(Change::Synced);
        next.settle();
        assert!(net.client.run(|| ask_tcp(vip(&svc, false, 80))).is_ok());
        let iptables = mode == Mode::Iptables;
        let has = || {
            (
                sh("iptables-save; ip6tables-save").contains("KUBE-"),
                sh("nft list tables").contains("longshore"),
            )
        };
        eventually("only this mode's rules", has, |has| *has == (iptables, !iptables));
        running = Some(next);
    }
}

#[test]
fn cleanup_leaves_nothing_iptables() {
    let _net = with_pods(1);
    let mut running = start(Mode::Iptables);
    running.send(Change::Service(service(1)));
    running.send(Change::Synced);
    running.settle();
    running.stop();
    assert!(sh("iptables-save").contains("KUBE-"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(proxy::cleanup()).unwrap();
    assert!(!sh("iptables-save; ip6tables-save").contains("KUBE-"));
}

#[test]
fn cleanup_leaves_nothing() {
    let _net = with_pods(1);
    let before = nft_lists();
    let mut running = start(Mode::Nftables);
    running.send(Change::Service(service(1)));
    running.send(Change::Synced);
    running.settle();
    running.stop();
    assert!(nft_lists().contains("longshore"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(proxy::cleanup()).unwrap();
    assert_eq!(nft_lists(), before);
}

#[test]
fn every_address_is_reached_from_everywhere_iptables() {
    everything_reaches(Mode::Iptables);
}

#[test]
fn sources_are_kept_or_masqueraded_iptables() {
    sources(Mode::Iptables);
}

#[test]
fn traffic_policies_and_rejects_iptables() {
    policies(Mode::Iptables);
}

#[test]
fn a_client_stays_with_its_endpoint_iptables() {
    affinity(Mode::Iptables);
}

#[test]
fn source_ranges_keep_others_out_iptables() {
    source_ranges(Mode::Iptables);
}

#[test]
fn a_restart_takes_over_without_a_failed_connection_iptables() {
    takeover(Mode::Iptables);
}

#[test]
fn stale_udp_flows_are_deleted_iptables() {
    udp_flows(Mode::Iptables);
}

#[test]
fn a_bad_service_is_reported_and_stops_nobody_iptables() {
    bad_services(Mode::Iptables);
}

/// Every endpoint is as likely as another: Pearson's chi-square over many connections stays under
/// what chance exceeds once in a million times (2 degrees of freedom).
fn spread(mode: Mode) {
    const CONNECTIONS: usize = 2000;
    const LIMIT: f64 = 27.6;
    let net = with_pods(3);
    let mut running = start(mode);
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    running.send(Change::Service(svc.clone()));
    slices(1, &[0, 1, 2]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    for to in [vip(&svc, false, 80), vip(&svc, true, 80), at(NODE[0], 30080)] {
        let mut counts = std::collections::BTreeMap::<String, usize>::new();
        net.client.run(|| {
            for _ in 0..CONNECTIONS {
                let answer = ask_tcp(to).unwrap();
                let (pod, _) = answer.split_once(' ').unwrap();
                *counts.entry(pod.to_owned()).or_default() += 1;
            }
        });
        let expected = CONNECTIONS as f64 / 3.0;
        let chi_square: f64 =
            counts.values().map(|n| (*n as f64 - expected).powi(2) / expected).sum();
        assert!(counts.len() == 3 && chi_square < LIMIT, "{to}: {chi_square} of {counts:?}");
    }
}

#[test]
fn connections_are_spread_evenly() {
    spread(Mode::Nftables);
}

#[test]
fn connections_are_spread_evenly_iptables() {
    spread(Mode::Iptables);
}
