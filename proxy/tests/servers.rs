//! The proxy's HTTP servers, asked over real sockets in a network namespace of the test's own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use common::{Net, Running, at, config, eventually, node_state, service, slice, slices};
use proxy::object::{Change, NodeState, TrafficPolicy};
use proxy::{Config, Mode};

/// Status code, head and body.
fn get(to: SocketAddr, path: &str) -> (u16, String, String) {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(to)?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    // Nobody there, or nobody who answers.
    let text = ask().unwrap_or_default();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Default::default() };
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, head.to_lowercase(), body.to_owned())
}

fn loopback(port: u16) -> SocketAddr {
    at("127.0.0.1", port)
}

#[test]
fn health_metrics_and_health_check_ports_answer() {
    let _net = Net::new(1);
    let mut running = Running::start(config(Mode::Nftables));
    // Traffic comes once it is known that the node is not being deleted.
    eventually("alive", || get(loopback(10256), "/livez").0, |code| *code == 200);
    assert_eq!(get(loopback(10256), "/healthz").0, 503);
    running.send(Change::Node(node_state()));
    let mut svc = service(1);
    svc.load_balancer_ips = vec![[198, 51, 100, 1].into()];
    svc.external_traffic_policy = TrafficPolicy::Local;
    svc.health_check_node_port = 32000;
    running.send(Change::Service(svc.clone()));
    for v6 in [false, true] {
        let mut slice = slice(1, v6, &[0]);
        // After the proxy's start, whenever that is.
        let soon = jiff::Timestamp::now().as_millisecond() + 60_000;
        slice.triggered = v6.then_some(soon);
        running.send(Change::Slice(slice));
    }
    running.send(Change::Synced);
    running.settle();

    let ask = || get(loopback(10256), "/healthz");
    let (code, head, body) = eventually("healthz", ask, |(code, _, _)| *code == 200);
    assert!(head.contains("application/json") && head.contains("nosniff"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &body["nodeEligible"], &body["healthy"]), (200, &true.into(), &true.into()));
    for field in ["lastUpdated", "currentTime"] {
        let time: Result<jiff::Timestamp, _> = body[field].as_str().unwrap().parse();
        assert!(time.is_ok(), "{field}: {body}");
    }
    // The node goes: no new traffic, but the proxy is alive.
    running.send(Change::Node(NodeState { being_deleted: true, ..node_state() }));
    eventually("not eligible", || get(loopback(10256), "/healthz").0, |code| *code == 503);
    assert_eq!(get(loopback(10256), "/livez").0, 200);

    let (code, _, text) = get(loopback(10249), "/metrics");
    assert_eq!(code, 200);
    for metric in [
        "kubeproxy_sync_proxy_rules_duration_seconds_bucket",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 2",
        "kubeproxy_proxy_healthz_total{code=\"200\"}",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "kubeproxy_iptables_ct_state_invalid_dropped_packets_total 0",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv6\"} 0",
        "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family=\"IPv4\"} 0",
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total{ip_family=\"IPv4\"} 0",
        "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total{ip_family=\"IPv4\"} 0",
        "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 0",
        "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 1",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}",
    ] {
        assert!(text.contains(metric), "{metric} is not in\n{text}");
    }
    assert_eq!(get(loopback(10249), "/proxyMode").2, "nftables");
    assert_eq!(get(loopback(10249), "/healthz").2, "ok");
    assert_eq!(get(loopback(10249), "/healthz/ping").2, "ok");
    let (_, _, text) = get(loopback(10249), "/metrics/slis");
    let count =
        "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 2\n";
    assert!(text.contains(count), "{text}");
    let (code, _, text) = get(loopback(10249), "/");
    assert_eq!((code, text.as_str()), (404, "404 page not found\n"));

    // Load balancers ask whether this node has endpoints of the Service.
    let ask = || get(loopback(32000), "/");
    let (_, head, body) = eventually("health check", ask, |(code, _, _)| *code == 200);
    assert!(head.contains("x-load-balancing-endpoint-weight: 1"), "{head}");
    assert!(body.contains("\"localEndpoints\":1"), "{body}");
    let mut none = slice(1, false, &[0]);
    none.endpoints[0].local = false;
    let mut none6 = slice(1, true, &[0]);
    none6.endpoints[0].local = false;
    running.send(Change::Slice(none));
    eventually("no endpoint", || ask().0, |code| *code == 503);
    // Each family has its own count.
    assert_eq!(get(at("::1", 32000), "/").0, 200);
    running.send(Change::Slice(none6));
    eventually("no endpoint of IPv6", || get(at("::1", 32000), "/").0, |code| *code == 503);
    svc.health_check_node_port = 0;
    running.send(Change::Service(svc));
    eventually("closed", || TcpStream::connect(loopback(32000)).is_err(), |closed| *closed);
}

#[test]
fn a_port_that_is_taken_is_reported_and_tried_again() {
    let _net = Net::new(0);
    let other = TcpListener::bind("0.0.0.0:10256").unwrap();
    let mut running = Running::start(config(Mode::Nftables));
    running.send(Change::Synced);
    running.settle();
    let status = running.status.clone();
    let reported = || status.borrow().errors.iter().any(|e| e.object == "listener 0.0.0.0:10256");
    eventually("reported", reported, |r| *r);
    drop(other);
    eventually("served", || get(loopback(10256), "/livez").0, |code| *code == 200);
    eventually("not reported any more", reported, |r| !*r);
}

/// Connections to NodePorts at loopback are counted where upstream counts them.
#[test]
fn node_ports_at_loopback_are_counted_with_iptables() {
    let net = Net::new(1);
    common::serve(&net.pods[0], "a", 8080);
    let mut running = Running::start(config(Mode::Iptables));
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    running.send(Change::Service(svc));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let counted = || {
        let text = get(loopback(10249), "/metrics").2;
        let name = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total ";
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|number| number.parse::<u64>().ok()).unwrap()
    };
    let before = counted();
    for _ in 0..3 {
        common::ask_tcp(common::at("127.0.0.1", 30080)).unwrap();
    }
    common::ask_tcp(common::at(common::NODE[0], 30080)).unwrap();
    assert_eq!(counted() - before, 3);
}

/// healthCheckNodePorts are where NodePorts are, and follow the node's addresses.
#[test]
fn health_check_ports_honour_node_port_addresses() {
    let _net = Net::new(1);
    let node_port_addresses = vec!["192.168.50.0/24".parse().unwrap()];
    let config = Config { node_port_addresses, ..config(Mode::Nftables) };
    let mut running = Running::start(config);
    let mut svc = service(1);
    svc.load_balancer_ips = vec![[198, 51, 100, 1].into()];
    svc.external_traffic_policy = TrafficPolicy::Local;
    svc.health_check_node_port = 32000;
    running.send(Change::Service(svc));
    slices(1, &[0]).into_iter().for_each(|c| running.send(c));
    running.send(Change::Synced);
    running.settle();
    let ask = |address: &str| get(at(address, 32000), "/").0;
    eventually("at the address", || ask(common::NODE[0]), |code| *code == 200);
    assert!(TcpStream::connect(loopback(32000)).is_err());
    // IPv6, which nothing is said of, is served everywhere.
    assert_eq!(ask("::1"), 200);
    common::sh("ip addr add 192.168.50.9/24 dev outside");
    eventually("at a new address", || ask("192.168.50.9"), |code| *code == 200);
}

#[test]
fn a_port_that_is_taken_ends_the_proxy_where_that_is_asked_for() {
    let _net = Net::new(0);
    let _other = TcpListener::bind("0.0.0.0:10256").unwrap();
    let running = Running::start(Config { bind_hard_fail: true, ..config(Mode::Nftables) });
    let error = running.end().unwrap_err().to_string();
    assert!(error.contains("0.0.0.0:10256") && error.contains("in use"), "{error}");
}

/// Changes wait for `minSyncPeriod` and then go together.
#[test]
fn changes_wait_for_the_least_time_between_two() {
    let _net = Net::new(1);
    let min_sync_period = std::time::Duration::from_secs(3);
    let mut running = Running::start(Config { min_sync_period, ..config(Mode::Nftables) });
    running.send(Change::Service(service(1)));
    running.send(Change::Synced);
    running.settle();
    let partial = || {
        let text = get(loopback(10249), "/metrics").2;
        let name = "kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ";
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |number| number.parse::<u64>().unwrap())
    };
    let begin = std::time::Instant::now();
    for round in 0..20 {
        running.send(Change::Slice(slice(1, false, if round % 2 == 0 { &[0] } else { &[] })));
        std::thread::park_timeout(std::time::Duration::from_millis(20));
    }
    running.send(Change::Slice(slice(1, false, &[0])));
    running.settle();
    // One batch for each period that has begun, however long all took.
    let most = begin.elapsed().as_secs() / 3 + 1;
    assert!((1..=most).contains(&partial()), "{} in {:?}", partial(), begin.elapsed());
    assert!(common::sh("nft list map ip longshore-proxy endpoints").contains("10.88.0.2"));
}
