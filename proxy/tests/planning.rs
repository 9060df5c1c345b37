//! What is planned for Services, by cases.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use common::{endpoint, pod_ip, service, slice};
use proxy::model::Model;
use proxy::object::{Change, EndpointPort, NodeHint, NodeState, Protocol, TrafficPolicy};
use proxy::plan::PortPlan;

/// The plan of the first port of Service 1 in IPv4.
fn plan(model: &mut Model) -> PortPlan {
    model.take_changes();
    let (_, plan) = model.plans().find(|(name, _)| &*name.name == "svc1").expect("planned");
    plan.ports[0].clone()
}

fn pods(pods: &[usize]) -> Vec<SocketAddr> {
    pods.iter().map(|pod| (pod_ip(*pod, false), 8080).into()).collect()
}

#[test]
fn ready_endpoints_are_used_and_terminating_ones_only_if_there_is_no_other() {
    let mut model = Model::new("node");
    model.apply(Change::Service(service(1)));
    let mut s = slice(1, false, &[0, 1, 2]);
    s.endpoints[1].ready = false;
    s.endpoints[1].terminating = true;
    s.endpoints[2].ready = false;
    s.endpoints[2].serving = false;
    model.apply(Change::Slice(s.clone()));
    assert_eq!(plan(&mut model).cluster, pods(&[0]));
    s.endpoints[0].ready = false;
    model.apply(Change::Slice(s.clone()));
    let fallen_back = plan(&mut model);
    assert_eq!(fallen_back.cluster, pods(&[1]));
    assert!(fallen_back.has_endpoints);
    s.endpoints[1].serving = false;
    model.apply(Change::Slice(s));
    assert!(!plan(&mut model).has_endpoints);
}

#[test]
fn slices_are_joined_and_an_endpoint_in_two_counts_once_the_readier_one() {
    let mut model = Model::new("node");
    model.apply(Change::Service(service(1)));
    let mut one = slice(1, false, &[0, 1]);
    one.endpoints[1].ready = false;
    one.endpoints[1].serving = false;
    let mut other = slice(1, false, &[1, 2]);
    other.key.name = "svc1-other".into();
    model.apply(Change::Slice(one));
    model.apply(Change::Slice(other.clone()));
    assert_eq!(plan(&mut model).cluster, pods(&[0, 1, 2]));
    model.apply(Change::SliceGone(other.key));
    assert_eq!(plan(&mut model).cluster, pods(&[0]));
}

#[test]
fn named_ports_join_by_name_and_protocol() {
    let mut model = Model::new("node");
    model.apply(Change::Service(service(1)));
    let mut s = slice(1, false, &[0]);
    s.ports = vec![
        EndpointPort { name: "http".into(), protocol: Protocol::Udp, port: 1 },
        EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 2 },
        EndpointPort { name: "other".into(), protocol: Protocol::Tcp, port: 3 },
    ];
    model.apply(Change::Slice(s));
    assert_eq!(plan(&mut model).cluster, vec![SocketAddr::from((pod_ip(0, false), 2))]);
}

#[test]
fn traffic_policies_choose_endpoints() {
    let mut model = Model::new("node");
    let mut svc = service(1);
    svc.ports[0].node_port = 30080;
    svc.external_traffic_policy = TrafficPolicy::Local;
    let mut s = slice(1, false, &[0, 1]);
    s.endpoints[0].local = false;
    model.apply(Change::Service(svc.clone()));
    model.apply(Change::Slice(s));
    let external = plan(&mut model);
    assert_eq!(external.internal(), pods(&[0, 1]));
    assert_eq!(external.external(), pods(&[1]));
    assert_eq!(external.hairpin, pods(&[1]));
    svc.external_traffic_policy = TrafficPolicy::Cluster;
    svc.internal_traffic_policy = TrafficPolicy::Local;
    model.apply(Change::Service(svc));
    let internal = plan(&mut model);
    assert_eq!((internal.internal(), internal.external()), (&pods(&[1])[..], &pods(&[0, 1])[..]));
}

#[test]
fn zone_hints_hold_if_all_endpoints_have_them_and_one_is_for_this_zone() {
    let mut model = Model::new("node");
    model.apply(Change::Service(service(1)));
    let zone = |z: &str| Some(Arc::from(z));
    model.apply(Change::Node(NodeState { zone: zone("a"), ..NodeState::default() }));
    let mut s = slice(1, false, &[0, 1]);
    s.endpoints[0].zones = vec!["a".into()];
    model.apply(Change::Slice(s.clone()));
    assert_eq!(plan(&mut model).cluster, pods(&[0, 1]), "one has no hint");
    s.endpoints[1].zones = vec!["b".into()];
    model.apply(Change::Slice(s));
    assert_eq!(plan(&mut model).cluster, pods(&[0]));
    model.apply(Change::Node(NodeState { zone: zone("c"), ..NodeState::default() }));
    assert_eq!(plan(&mut model).cluster, pods(&[0, 1]), "none for this zone");
}

#[test]
fn node_hints_go_before_zone_hints_and_hold_if_all_endpoints_have_them() {
    let mut model = Model::new("node");
    model.apply(Change::Service(service(1)));
    let zone = Some(Arc::from("a"));
    model.apply(Change::Node(NodeState { zone, ..NodeState::default() }));
    let mut s = slice(1, false, &[0, 1, 2]);
    s.endpoints[0].zones = vec!["a".into()];
    s.endpoints[1].zones = vec!["a".into()];
    s.endpoints[2].zones = vec!["b".into()];
    s.endpoints[0].node_hint = NodeHint::Here;
    s.endpoints[1].node_hint = NodeHint::Others;
    model.apply(Change::Slice(s.clone()));
    assert_eq!(plan(&mut model).cluster, pods(&[0, 1]), "one has no node hint: the zone counts");
    s.endpoints[2].node_hint = NodeHint::Others;
    model.apply(Change::Slice(s.clone()));
    assert_eq!(plan(&mut model).cluster, pods(&[0]));
    s.endpoints[0].node_hint = NodeHint::Others;
    model.apply(Change::Slice(s.clone()));
    assert_eq!(plan(&mut model).cluster, pods(&[0, 1]), "none for this node: the zone counts");
    // One that is not ready needs no hint.
    s.endpoints[0].node_hint = NodeHint::Here;
    s.endpoints[2].node_hint = NodeHint::None;
    s.endpoints[2].ready = false;
    model.apply(Change::Slice(s));
    assert_eq!(plan(&mut model).cluster, pods(&[0]));
}

#[test]
fn bad_endpoints_are_left_out_and_told() {
    let mut model = Model::new("node");
    model.apply(Change::Service(service(1)));
    let mut s = slice(1, false, &[0]);
    for bad in ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0"] {
        s.endpoints.push(endpoint(bad.parse().unwrap()));
    }
    model.apply(Change::Slice(s));
    assert_eq!(plan(&mut model).cluster, pods(&[0]));
    let errors = model.errors().values().next().unwrap();
    assert_eq!(errors.len(), 4, "{errors:?}");
}

#[test]
fn source_ranges_that_cannot_be_used_open_nothing() {
    let mut model = Model::new("node");
    let mut svc = service(1);
    svc.load_balancer_ips = vec![[198, 51, 100, 1].into()];
    svc.load_balancer_source_ranges =
        vec![proxy::object::Cidr { address: [10, 0, 0, 0].into(), prefix_len: 77 }];
    model.apply(Change::Service(svc));
    let planned = plan(&mut model);
    assert_eq!((planned.firewalled_ips.len(), planned.source_ranges.len()), (1, 0));
    assert!(model.errors().values().flatten().any(|e| e.contains("prefix is too long")));
}
