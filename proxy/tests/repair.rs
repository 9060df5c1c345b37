//! What is right in the kernel is not written again: a restart costs nothing, whatever it finds.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Net, service, sh, slices};
use nft::{Expr, Key, Op, Verdict};
use proxy::backend::{Backend, Environment};
use proxy::config::LocalTraffic;
use proxy::iptables::Iptables;
use proxy::model::Model;
use proxy::nftables::backend::Nftables;
use proxy::nftables::kinds::value;
use proxy::nftables::names::{Dispatch, MapId, Policy};
use proxy::object::{Change, NamespacedName, TrafficPolicy};
use proxy::plan::ServicePlan;

fn environment() -> Environment {
    Environment {
        masquerade_bit: 0x4000,
        masquerade_all: false,
        local: LocalTraffic::Cidrs(vec![
            "10.88.0.0/16".parse().unwrap(),
            "fd88::/64".parse().unwrap(),
        ]),
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap(), "fd96::/112".parse().unwrap()],
        node_ports: None,
        localhost: true,
        drop_invalid: true,
        counters: false,
    }
}

/// Services with everything that rules can have.
fn plans(model: &mut Model) -> Vec<(NamespacedName, Arc<ServicePlan>)> {
    for number in 1..=6 {
        let mut svc = service(number);
        svc.ports[0].node_port = 30000 + number;
        svc.external_ips = vec![[203, 0, 113, number as u8].into()];
        match number {
            2 => svc.session_affinity = Some(Duration::from_secs(60)),
            3 => svc.external_traffic_policy = TrafficPolicy::Local,
            4 => svc.internal_traffic_policy = TrafficPolicy::Local,
            5 => {
                svc.load_balancer_ips = vec![[198, 51, 100, 5].into()];
                svc.load_balancer_source_ranges =
                    vec!["192.168.0.0/16".parse().unwrap(), "172.16.0.0/30".parse().unwrap()];
            }
            _ => {}
        }
        model.apply(Change::Service(svc));
        let pods: &[usize] = if number == 6 { &[] } else { &[0, 1, 2] };
        slices(number, pods).into_iter().for_each(|change| model.apply(change));
    }
    model.take_changes();
    model.plans().map(|(name, plan)| (name.clone(), plan.clone())).collect()
}

fn repairs_only_what_is_wrong(make: impl Fn() -> Box<dyn Backend>, damage: &[&str]) {
    let _net = Net::new(0);
    let mut model = Model::new("node");
    let plans = plans(&mut model);
    let mut backend = make();
    assert!(!backend.take_over().unwrap());
    let first = backend.repair(&plans).unwrap();
    assert!(first.refused.is_empty() && first.errors.is_empty(), "{first:?}");
    assert!(first.written > 20, "{first:?}");
    assert_eq!(backend.repair(&plans).unwrap().written, 0);
    // The next process.
    let mut backend = make();
    assert!(backend.take_over().unwrap());
    assert_eq!(backend.repair(&plans).unwrap().written, 0);
    for script in damage {
        sh(script);
        let outcome = backend.repair(&plans).unwrap();
        assert!(outcome.refused.is_empty() && outcome.errors.is_empty(), "{script}: {outcome:?}");
        assert_eq!(backend.repair(&plans).unwrap().written, 0, "{script}");
    }
    // One endpoint of one Service goes.
    slices(1, &[0, 2]).into_iter().for_each(|change| model.apply(change));
    let changes = model.take_changes();
    assert_eq!(changes.len(), 1);
    let outcome = backend.change(&changes).unwrap();
    assert!(!outcome.repair && outcome.written < 80, "{outcome:?}");
    let plans: Vec<_> = model.plans().map(|(n, p)| (n.clone(), p.clone())).collect();
    assert_eq!(backend.repair(&plans).unwrap().written, 0);
}

#[test]
fn nftables_repairs_only_what_is_wrong() {
    repairs_only_what_is_wrong(
        || Box::new(Nftables::new(&environment()).unwrap()),
        &[
            "nft flush ruleset",
            "nft flush table ip6 longshore-proxy",
            "nft flush map ip longshore-proxy endpoints",
            "nft add element ip longshore-proxy cluster-ips '{ 1.2.3.4 }'",
            "nft delete table ip longshore-proxy; nft add table ip longshore-proxy; nft 'add set ip longshore-proxy services { type ipv4_addr; }'",
            "nft delete table ip longshore-proxy; nft add table ip longshore-proxy; nft add set ip longshore-proxy affinity-0 '{ type ipv4_addr; }'",
            "nft flush chain ip longshore-proxy pick-3",
            "nft add chain ip longshore-proxy pick-77",
        ],
    );
}

/// A listing whatever its order.
fn sorted(text: String) -> Vec<String> {
    let words = text.split([',', '\n', '{', '}']).map(|line| line.trim().to_owned());
    let mut lines: Vec<String> = words.filter(|line| !line.is_empty()).collect();
    lines.sort();
    lines
}

/// What the version before had for affinity is changed into what this one wants, and nothing is done
/// twice.
#[test]
fn nftables_takes_over_from_the_version_before() {
    let _net = Net::new(0);
    let mut model = Model::new("node");
    let plans = plans(&mut model);
    let mut backend = Nftables::new(&environment()).unwrap();
    backend.repair(&plans).unwrap();
    let whole = sh("nft list ruleset");
    assert!(whole.contains("map sticky-ids {"), "{whole}");

    // It had chains for each port, found by verdicts; another Service's are left over here.
    let mut tx = nft::Transaction::new(nft::Table::new(nft::Family::Ip, "longshore-proxy"));
    let picks = MapId::PicksBefore(Policy::Cluster);
    tx.add_set(picks.set(nft::Family::Ip));
    tx.add_chain("slot-60s-0-for-0000002a", None);
    tx.push(Op::AddElements {
        set: picks.to_string(),
        elements: vec![nft::Element::verdict(
            Key::new().number(42).number(0),
            Verdict::Goto("slot-60s-0-for-0000002a".into()),
        )],
    });
    tx.add_chain("sticky-60s-1-of-1-for-0000002a", None);
    tx.add_rule(
        "sticky-60s-1-of-1-for-0000002a",
        vec![
            Expr::NumgenRandom { modulus: 1, offset: 42, dreg: nft::REG },
            Expr::NumgenRandom { modulus: 1, offset: 0, dreg: nft::REG + 1 },
            Expr::LookupVerdict { set: picks.to_string(), sreg: nft::REG },
        ],
    );
    let (kinds, numbers) = (MapId::Kinds, MapId::Numbers(Dispatch::Services));
    tx.push(Op::AddElements {
        set: kinds.to_string(),
        elements: vec![nft::Element::verdict(
            Key::new().number(0x8000_0777),
            Verdict::Goto("sticky-60s-1-of-1-for-0000002a".into()),
        )],
    });
    let key = Key::new().address([10, 96, 9, 9].into()).protocol(6).port(80);
    let data = Some(value(0x8000_0777));
    let element = nft::Element { data, ..nft::Element::new(key) };
    tx.push(Op::AddElements { set: numbers.to_string(), elements: vec![element] });
    nft::Client::new().unwrap().apply(&tx).unwrap();

    let mut next = Nftables::new(&environment()).unwrap();
    assert!(next.take_over().unwrap());
    let outcome = next.repair(&plans).unwrap();
    assert!(outcome.refused.is_empty() && outcome.errors.is_empty(), "{outcome:?}");
    assert_eq!((outcome.cleanup_failures, outcome.written), ([0, 0], 2), "{outcome:?}");
    assert_eq!(next.repair(&plans).unwrap().written, 0);
    assert_eq!(sorted(sh("nft list ruleset")), sorted(whole));
}

/// A number that leads elsewhere is led back at once.
#[test]
fn a_number_that_leads_elsewhere_is_put_right() {
    let _net = Net::new(0);
    let mut model = Model::new("node");
    let plans = plans(&mut model);
    let mut backend = Nftables::new(&environment()).unwrap();
    backend.repair(&plans).unwrap();
    let whole = sh("nft list map ip longshore-proxy kinds");
    sh("nft delete element ip longshore-proxy kinds '{ 0x00000003 }'
        nft add element ip longshore-proxy kinds '{ 0x00000003 : drop }'
        nft add element ip longshore-proxy kinds '{ 0x00000777 : drop }'");
    let outcome = backend.repair(&plans).unwrap();
    assert!(outcome.refused.is_empty() && outcome.errors.is_empty(), "{outcome:?}");
    assert_eq!(outcome.written, 3);
    assert_eq!(sorted(sh("nft list map ip longshore-proxy kinds")), sorted(whole));
}

#[test]
fn iptables_repairs_only_what_is_wrong() {
    repairs_only_what_is_wrong(
        || Box::new(Iptables::new(&environment()).unwrap()),
        &[
            "iptables -t nat -F",
            "iptables -t nat -F KUBE-VIPS",
            "ip6tables -t filter -F",
            "iptables -t nat -A KUBE-VIPS -j RETURN; iptables -t nat -N KUBE-SEP-OLD",
        ],
    );
}
