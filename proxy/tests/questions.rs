//! What a running proxy tells about itself: explanations, rulesets, differences, dry runs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use common::{Net, Running, config, name, node_state, pod_ip, service, sh, slice, slices};
use proxy::Mode;
use proxy::explain::{From, Question};
use proxy::object::{Change, TrafficPolicy};
use proxy::question::Rules;

fn block<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work)
}

fn started(mode: Mode) -> (Net, Running) {
    let net = Net::new(1);
    let mut running = Running::start(config(mode));
    running.send(Change::Node(node_state()));
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    svc.external_traffic_policy = TrafficPolicy::Local;
    svc.load_balancer_ips = vec!["198.51.100.1".parse().unwrap()];
    svc.load_balancer_source_ranges = vec!["192.168.50.0/24".parse().unwrap()];
    running.send(Change::Service(svc));
    let mut v4 = slice(1, false, &[0, 1, 2]);
    v4.endpoints[1].local = false;
    v4.endpoints[2].ready = false;
    running.send(Change::Slice(v4));
    running.send(Change::Slice(slice(1, true, &[0])));
    let mut plain = service(2);
    plain.session_affinity = Some(std::time::Duration::from_secs(60));
    running.send(Change::Service(plain));
    slices(2, &[0, 1]).into_iter().for_each(|change| running.send(change));
    running.send(Change::Synced);
    running.settle();
    (net, running)
}

#[test]
fn a_service_is_explained_from_what_is_programmed() {
    let (_net, running) = started(Mode::Nftables);
    let ask = |from: &str, to: &str| {
        let question = Question { from: from.parse().ok(), to: to.parse().ok() };
        block(running.asker.explain(name("svc1"), question)).unwrap().unwrap()
    };
    let all = ask("", "");
    assert_eq!(all.ports.len(), 4, "{all:#?}");
    let lines = &all.ports[0].endpoints;
    assert_eq!(lines.iter().filter(|line| line.used).count(), 2, "{lines:#?}");
    let third = lines.iter().find(|line| line.address.ip() == pod_ip(2, false)).unwrap();
    assert!(third.why.starts_with("not ready"), "{third:?}");
    // Outside at a NodePort: only what runs here, and the client's address is kept.
    let outside = ask("192.168.50.2", "192.168.50.1:30080");
    let [way] = &outside.ports[0].ways[..] else { panic!("{outside:#?}") };
    assert_eq!(way.from, [From::Outside]);
    assert_eq!(way.endpoints, [(pod_ip(0, false), 8080).into()]);
    assert_eq!(way.source, "kept");
    // A pod at the same address: everything.
    let pod = ask("10.88.0.9", "192.168.50.1:30080");
    assert_eq!(pod.ports[0].ways[0].endpoints.len(), 2, "{pod:#?}");
    // A client that is in no source range.
    let refused = ask("203.0.113.5", "198.51.100.1:80");
    assert!(refused.ports[0].ways[0].verdict.starts_with("dropped: 203.0.113.5"), "{refused:#?}");
    // Where NodePorts are not served there is nothing to explain.
    assert_eq!(ask("192.168.50.2", "[::1]:30080").ports.len(), 0);
    assert_eq!(ask("", "127.0.0.1:30080").ports.len(), 1);
    let elsewhere = ask("", "10.9.9.9:30080");
    assert!(elsewhere.ports[0].ways[0].to.contains("if 10.9.9.9 is"), "{elsewhere:#?}");
    let unknown = Question::default();
    assert_eq!(block(running.asker.explain(name("svc9"), unknown)), Ok(None));
    let text = proxy::explain::render(&all);
    assert!(text.contains("cluster IP 10.96.0.1:80/tcp from pods"), "{text}");
}

#[test]
fn rules_differences_and_dry_runs_are_told_and_change_nothing() {
    let (_net, running) = started(Mode::Nftables);
    let rules = |rules| block(running.asker.rules(rules)).unwrap();
    let listed = || sh("nft list ruleset");
    let before = listed();
    let desired = rules(Rules::Desired);
    for line in [
        "add table ip longshore-proxy { comment",
        "add map ip longshore-proxy endpoints { type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service; }",
        "add chain ip longshore-proxy nat-prerouting { type nat hook prerouting priority -100; }",
        "add rule ip longshore-proxy pick-2 dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints",
        "add element ip longshore-proxy service-kinds { 10.96.0.1 . tcp . 80 : 0 . 2 }",
        "add element ip longshore-proxy kinds { 2 : goto pick-2 }",
        "add element ip longshore-proxy endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.88.0.2 . 8080 }",
        "add rule ip longshore-proxy services ip daddr . meta l4proto . th dport map @service-kinds vmap @kinds",
        "add element ip longshore-proxy refusals { 0x0f000002 : drop }",
        "add rule ip longshore-proxy masquerading meta mark & 0x4000 != 0x0 meta mark set meta mark & 0xffffbfff masquerade fully-random",
        "add rule ip6 longshore-proxy filter-forward ct state new jump no-endpoints",
        "ip saddr 10.88.0.0/16 ip daddr . meta l4proto . th dport map @inside-service-kinds vmap @kinds",
        "add element ip longshore-proxy firewall-sources { 198.51.100.1 . tcp . 80 . 192.168.50.0/24 }",
        "add rule ip longshore-proxy rejecting reject",
        "update @affinity-0 { ip saddr . ip daddr . meta l4proto . th dport map @sticky-ids timeout ",
    ] {
        assert!(desired.contains(line), "{line}\n{desired}");
    }
    assert_eq!(rules(Rules::Difference), "");
    let mut changed = slice(2, false, &[0]);
    changed.key = name("svc2-v4");
    let dry = rules(Rules::Changes(vec![Change::Slice(changed)]));
    assert!(dry.contains("delete element ip longshore-proxy kept { "), "{dry}");
    assert!(!dry.contains("10.96.0.1"), "{dry}");
    assert_eq!(rules(Rules::Difference), "");
    assert_eq!(listed(), before);
}

#[test]
fn iptables_rules_are_told_as_input_for_a_restore() {
    let (_net, running) = started(Mode::Iptables);
    let rules = |rules| block(running.asker.rules(rules)).unwrap();
    let desired = rules(Rules::Desired);
    assert!(
        desired.contains("*nat") && desired.contains("-A KUBE-VIPS -d 10.96.0.1/32"),
        "{desired}"
    );
    assert_eq!(rules(Rules::Difference), "");
    let dry = rules(Rules::Changes(vec![Change::ServiceGone(name("svc2"))]));
    assert!(dry.contains("-D KUBE-VIPS -d 10.96.0.2/32") && !dry.contains("10.96.0.1"), "{dry}");
}
