//! API objects -> what the proxy keeps of them. Pure: the same for an API server and for a folder
//! of manifests.
//!
//! One bad port or address never takes the rest of its object with it.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::{EndpointHints, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy::object::{
    Change, Cidr, Endpoint, EndpointPort, NamespacedName, NodeHint, NodeState, Protocol,
    ServicePort, TrafficPolicy,
};

/// A Service with this label is served by another proxy; upstream does not look for it on slices.
pub const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A slice with this label is of a Service without virtual IP.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// When what made a slice change happened, in RFC 3339.
pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const TOPOLOGY_ZONE: &str = "topology.kubernetes.io/zone";
/// Put on a node by the cluster autoscaler before it deletes it (KEP-3836).
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
/// Affinity timeout where the Service has none (the API's default, three hours).
const AFFINITY_SECONDS: i32 = 10_800;

/// The key of an object with `metadata`; the namespace defaults to `default`.
pub fn key(metadata: &ObjectMeta) -> NamespacedName {
    NamespacedName {
        namespace: metadata.namespace.as_deref().unwrap_or("default").into(),
        name: metadata.name.as_deref().unwrap_or_default().into(),
    }
}

/// What a new or changed Service means for the proxy: `ServiceGone` for one that has no virtual IP
/// of its own or that another proxy serves.
pub fn service_change(service: &Service) -> Change {
    let key = key(&service.metadata);
    match serviced(service, &key) {
        Some(service) => Change::Service(service),
        None => Change::ServiceGone(key),
    }
}

fn serviced(service: &Service, key: &NamespacedName) -> Option<proxy::object::Service> {
    if has_label(&service.metadata, SERVICE_PROXY_NAME) {
        return None;
    }
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") || spec.cluster_ip.as_deref() == Some("None") {
        return None;
    }
    let single = spec.cluster_ip.iter().cloned().collect::<Vec<_>>();
    let cluster_ips = spec.cluster_ips.as_ref().filter(|ips| !ips.is_empty()).unwrap_or(&single);
    let cluster_ips = addresses(cluster_ips);
    if cluster_ips.is_empty() {
        return None;
    }
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        Some(ServicePort {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: protocol(port.protocol.as_deref())?,
            port: number(port.port)?,
            node_port: port.node_port.and_then(number).unwrap_or(0),
        })
    });
    let ingress = service
        .status
        .as_ref()
        .and_then(|s| s.load_balancer.as_ref())
        .and_then(|l| l.ingress.as_deref())
        .unwrap_or_default();
    let session_affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let seconds = spec
            .session_affinity_config
            .as_ref()
            .and_then(|c| c.client_ip.as_ref())
            .and_then(|c| c.timeout_seconds)
            .filter(|s| *s > 0)
            .unwrap_or(AFFINITY_SECONDS);
        Duration::from_secs(u64::from(seconds.unsigned_abs()))
    });
    Some(proxy::object::Service {
        key: key.clone(),
        cluster_ips,
        external_ips: addresses(spec.external_ips.as_deref().unwrap_or_default()),
        load_balancer_ips: ingress
            .iter()
            .filter(|i| i.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
            .filter_map(|i| i.ip.as_deref()?.parse().ok())
            .collect(),
        load_balancer_source_ranges: cidrs(
            spec.load_balancer_source_ranges.as_deref().unwrap_or_default(),
        ),
        ports: ports.collect(),
        session_affinity,
        internal_traffic_policy: policy(spec.internal_traffic_policy.as_deref()),
        external_traffic_policy: policy(spec.external_traffic_policy.as_deref()),
        health_check_node_port: spec.health_check_node_port.and_then(number).unwrap_or(0),
    })
}

/// What a new or changed slice means for the proxy on `node_name`: `SliceGone` for one of a
/// headless Service, of no Service, or without IP addresses.
pub fn slice_change(slice: &EndpointSlice, node_name: &str) -> Change {
    let key = key(&slice.metadata);
    match sliced(slice, node_name, &key) {
        Some(slice) => Change::Slice(slice),
        None => Change::SliceGone(key),
    }
}

fn sliced(
    slice: &EndpointSlice,
    node_name: &str,
    key: &NamespacedName,
) -> Option<proxy::object::EndpointSlice> {
    let metadata = &slice.metadata;
    if has_label(metadata, HEADLESS) {
        return None;
    }
    let service = metadata.labels.as_ref()?.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
    let v6 = match slice.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        _ => return None,
    };
    let ports = slice.ports.iter().flatten().filter_map(|port| {
        Some(EndpointPort {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: protocol(port.protocol.as_deref())?,
            port: number(port.port?)?,
        })
    });
    let endpoints = slice.endpoints.iter().flatten().filter_map(|endpoint| {
        let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        if address.is_ipv6() != v6 {
            return None;
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        Some(Endpoint {
            address,
            ready,
            // Upstream takes what is not said for true, also of one that is not ready.
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            local: endpoint.node_name.as_deref() == Some(node_name),
            zones: endpoint
                .hints
                .iter()
                .flat_map(|h| h.for_zones.iter().flatten())
                .map(|z| z.name.as_str().into())
                .collect(),
            node_hint: node_hint(endpoint.hints.as_ref(), node_name),
        })
    });
    Some(proxy::object::EndpointSlice {
        key: key.clone(),
        service: service.as_str().into(),
        ports: ports.collect(),
        endpoints: endpoints.collect(),
        triggered: metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(TRIGGER_TIME))
            .and_then(|time| time.parse::<jiff::Timestamp>().ok())
            .map(jiff::Timestamp::as_millisecond),
    })
}

fn node_hint(hints: Option<&EndpointHints>, node_name: &str) -> NodeHint {
    match hints.and_then(|hints| hints.for_nodes.as_deref()) {
        None | Some([]) => NodeHint::None,
        Some(nodes) if nodes.iter().any(|node| node.name == node_name) => NodeHint::Here,
        Some(_) => NodeHint::Others,
    }
}

/// What the proxy must know of its node.
pub fn node_state(node: &Node) -> NodeState {
    let spec = node.spec.as_ref();
    let single: Vec<String> = spec.and_then(|s| s.pod_cidr.clone()).into_iter().collect();
    let pod_cidrs = spec.and_then(|s| s.pod_cidrs.as_ref()).filter(|c| !c.is_empty());
    NodeState {
        known: true,
        addresses: match node_addresses(node, "InternalIP") {
            none if none.is_empty() => node_addresses(node, "ExternalIP"),
            some => some,
        },
        pod_cidrs: cidrs(pod_cidrs.unwrap_or(&single)),
        zone: node
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(TOPOLOGY_ZONE))
            .map(|zone| zone.as_str().into()),
        being_deleted: node.metadata.deletion_timestamp.is_some()
            || spec
                .iter()
                .flat_map(|s| s.taints.iter().flatten())
                .any(|taint| taint.key == TO_BE_DELETED_TAINT),
    }
}

fn node_addresses(node: &Node, kind: &str) -> Vec<IpAddr> {
    let all = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    all.filter(|a| a.type_ == kind).filter_map(|a| a.address.parse().ok()).collect()
}

fn has_label(metadata: &ObjectMeta, label: &str) -> bool {
    metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(label))
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

fn policy(text: Option<&str>) -> TrafficPolicy {
    if text == Some("Local") { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

fn addresses(texts: &[String]) -> Vec<IpAddr> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

/// CIDRs that can be read; others are left out.
pub fn cidrs(texts: &[String]) -> Vec<Cidr> {
    texts
        .iter()
        .filter_map(|text| {
            let (address, prefix_len) = text.trim().split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            let prefix_len: u8 = prefix_len.parse().ok()?;
            let limit = if address.is_ipv4() { 32 } else { 128 };
            (prefix_len <= limit).then_some(Cidr { address, prefix_len })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(spec: Value, labels: Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "s", "namespace": "n", "labels": labels}, "spec": spec,
            "status": {"loadBalancer": {"ingress": [
                {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}, {"hostname": "h"},
                {"ip": "192.0.2.3", "ipMode": "VIP"}]}}
        }))
        .unwrap()
    }

    #[test]
    fn services_without_a_virtual_ip_of_ours_are_gone() {
        for (spec, labels) in [
            (json!({"clusterIP": "None", "clusterIPs": ["None"]}), json!({})),
            (json!({"type": "ExternalName", "externalName": "example.org"}), json!({})),
            (json!({"clusterIP": "10.0.0.1"}), json!({SERVICE_PROXY_NAME: "other"})),
            (json!({"clusterIP": ""}), json!({})),
            (json!({"clusterIP": "nonsense"}), json!({})),
        ] {
            let change = service_change(&service(spec.clone(), labels));
            assert!(matches!(change, Change::ServiceGone(_)), "{spec}: {change:?}");
        }
    }

    #[test]
    fn a_service_keeps_what_decides_about_packets() {
        let change = service_change(&service(
            json!({
                "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"],
                "externalIPs": ["198.51.100.1", "bad"], "sessionAffinity": "ClientIP",
                "loadBalancerSourceRanges": ["10.0.0.0/8", "10.0.0.0/33", "fd00::/8 "],
                "externalTrafficPolicy": "Local", "healthCheckNodePort": 30999,
                "ports": [
                    {"name": "a", "port": 80, "nodePort": 30080}, {"port": 0, "name": "zero"},
                    {"name": "b", "port": 53, "protocol": "UDP"}, {"name": "c", "port": 70000},
                    {"name": "d", "port": 1, "protocol": "QUIC"}]
            }),
            json!({}),
        ));
        let Change::Service(s) = change else { panic!("{change:?}") };
        assert_eq!(s.cluster_ips.len(), 2);
        assert_eq!(s.external_ips, ["198.51.100.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(s.load_balancer_ips.len(), 2);
        assert_eq!(s.load_balancer_source_ranges.len(), 2);
        assert_eq!(s.session_affinity, Some(Duration::from_secs(10_800)));
        assert_eq!(s.external_traffic_policy, TrafficPolicy::Local);
        assert_eq!(s.internal_traffic_policy, TrafficPolicy::Cluster);
        assert_eq!(s.health_check_node_port, 30_999);
        let ports: Vec<_> = s.ports.iter().map(|p| (&*p.name, p.port, p.node_port)).collect();
        assert_eq!(ports, [("a", 80, 30_080), ("b", 53, 0)]);
    }

    fn slice(labels: Value, family: &str) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": "s-1", "namespace": "n", "labels": labels}, "addressType": family,
            "ports": [{"name": "a", "port": 8080}, {"name": "nothing"}],
            "endpoints": [
                {"addresses": ["10.1.0.1"], "nodeName": "me"},
                {"addresses": ["10.1.0.2"], "nodeName": "other", "conditions":
                    {"ready": false, "serving": true, "terminating": true},
                 "hints": {"forZones": [{"name": "z1"}]}},
                {"addresses": ["10.1.0.3"], "conditions": {"ready": false}},
                {"addresses": ["fd00::3"]}, {"addresses": ["junk"]}]
        }))
        .unwrap()
    }

    #[test]
    fn hints_and_the_trigger_time_are_kept_as_far_as_they_concern_this_node() {
        let mut api = slice(json!({SERVICE_NAME: "s"}), "IPv4");
        api.metadata.annotations =
            Some([(TRIGGER_TIME.to_owned(), "2026-01-02T03:04:05.678Z".to_owned())].into());
        for (nodes, hint) in [
            (json!(null), NodeHint::None),
            (json!([]), NodeHint::None),
            (json!([{"name": "other"}]), NodeHint::Others),
            (json!([{"name": "other"}, {"name": "me"}]), NodeHint::Here),
        ] {
            let hints = json!({"forNodes": nodes, "forZones": [{"name": "z"}]});
            api.endpoints.as_mut().unwrap()[0].hints = serde_json::from_value(hints).unwrap();
            let Change::Slice(slice) = slice_change(&api, "me") else { panic!("no slice") };
            assert_eq!(slice.endpoints[0].node_hint, hint);
            assert_eq!(slice.endpoints[0].zones.len(), 1);
            assert_eq!(slice.triggered, Some(1_767_323_045_678));
        }
    }

    #[test]
    fn conditions_of_endpoints_default_as_the_api_says() {
        let change = slice_change(&slice(json!({SERVICE_NAME: "s"}), "IPv4"), "me");
        let Change::Slice(slice) = change else { panic!("{change:?}") };
        assert_eq!(&*slice.service, "s");
        assert_eq!(slice.ports.len(), 1);
        let seen: Vec<_> = slice
            .endpoints
            .iter()
            .map(|e| (e.ready, e.serving, e.terminating, e.local, e.zones.len()))
            .collect();
        assert_eq!(
            seen,
            [
                (true, true, false, true, 0),
                (false, true, true, false, 1),
                (false, true, false, false, 0)
            ]
        );
    }

    #[test]
    fn slices_that_are_not_ours_are_gone() {
        for (labels, family) in [
            (json!({SERVICE_NAME: "s", HEADLESS: ""}), "IPv4"),
            (json!({}), "IPv4"),
            (json!({SERVICE_NAME: "s"}), "FQDN"),
        ] {
            let change = slice_change(&slice(labels.clone(), family), "me");
            assert!(matches!(change, Change::SliceGone(_)), "{labels}: {change:?}");
        }
    }

    #[test]
    fn a_node_being_deleted_is_seen_by_its_taint_or_timestamp() {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "me", "labels": {TOPOLOGY_ZONE: "z"}},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"],
                     "taints": [{"key": TO_BE_DELETED_TAINT, "effect": "NoSchedule"}]},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.2"},
                                     {"type": "Hostname", "address": "me"}]}
        }))
        .unwrap();
        let state = node_state(&node);
        assert!(state.being_deleted);
        assert_eq!(state.pod_cidrs.len(), 2);
        assert_eq!(state.addresses.len(), 1);
        assert_eq!(state.zone.as_deref(), Some("z"));
        assert!(!node_state(&Node::default()).being_deleted);
    }
}
