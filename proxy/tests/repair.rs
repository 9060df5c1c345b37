//! What is right in the kernel is not written again: a restart costs nothing, whatever it finds.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Net, service, sh, slices};
use proxy::backend::{Backend, Environment};
use proxy::config::LocalTraffic;
use proxy::iptables::Iptables;
use proxy::model::Model;
use proxy::nftables::backend::Nftables;
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
