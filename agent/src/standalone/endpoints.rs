//! A Service's selector against this node's pods: the slices that the endpoint-slice controller
//! of a cluster would make. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proxy::object::{Endpoint, EndpointPort, EndpointSlice, NamespacedName, NodeHint, Protocol};

/// A pod of this node as its endpoints need it.
#[derive(Clone, Debug)]
pub struct NodePod {
    /// The object.
    pub pod: Arc<Pod>,
    /// As last reported; `None` while nothing was.
    pub status: Option<PodStatus>,
    /// Its manifest is gone: it is ending.
    pub terminating: bool,
}

impl NodePod {
    fn matches(&self, selector: &BTreeMap<String, String>) -> bool {
        let labels = self.pod.metadata.labels.as_ref();
        selector.iter().all(|(key, value)| labels.and_then(|l| l.get(key)) == Some(value))
    }

    fn addresses(&self) -> Vec<IpAddr> {
        let Some(status) = &self.status else { return Vec::new() };
        let many = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
        let mut all: Vec<IpAddr> = many.filter_map(|ip| ip.parse().ok()).collect();
        if all.is_empty() {
            all.extend(status.pod_ip.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()));
        }
        all
    }

    fn is_ready(&self) -> bool {
        let conditions = self.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    }

    fn has_ended(&self) -> bool {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// The number of the container port that `port` targets, if this pod has it.
    fn target(&self, port: &ServicePort) -> Option<u16> {
        match port.target_port.as_ref() {
            None => u16::try_from(port.port).ok(),
            Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
            Some(IntOrString::String(name)) => {
                let protocol = port.protocol.as_deref().unwrap_or("TCP");
                let spec = self.pod.spec.as_ref()?;
                let sidecars = spec.init_containers.iter().flatten();
                let sidecars = sidecars.filter(|c| c.restart_policy.as_deref() == Some("Always"));
                let ports = spec.containers.iter().chain(sidecars);
                let found = ports.flat_map(|c| c.ports.iter().flatten()).find(|candidate| {
                    candidate.name.as_deref() == Some(name)
                        && candidate.protocol.as_deref().unwrap_or("TCP") == protocol
                })?;
                u16::try_from(found.container_port).ok()
            }
        }
    }
}

/// Endpoints of one slice share the family (IPv4 or not) and the ports.
type Group = (bool, Vec<(String, Protocol, u16)>);

/// The slices of `service` by name; pods that resolve named ports differently, and families, have
/// slices of their own.
pub fn plan_slices(service: &Service, pods: &[NodePod]) -> BTreeMap<NamespacedName, EndpointSlice> {
    let mut slices = BTreeMap::new();
    let Some(spec) = &service.spec else { return slices };
    let Some(selector) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else {
        return slices;
    };
    if spec.type_.as_deref() == Some("ExternalName") {
        return slices;
    }
    let key = crate::source::proxy_object::key(&service.metadata);
    let publish_all = spec.publish_not_ready_addresses.unwrap_or(false);
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.matches(selector) && !pod.has_ended()) {
        let ports: Vec<(String, Protocol, u16)> = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|port| {
                let name = port.name.clone().unwrap_or_default();
                Some((name, protocol(port), pod.target(port)?))
            })
            .collect();
        let serving = pod.is_ready();
        let mut families = [false, false];
        for address in pod.addresses() {
            // Further addresses of a family are the same endpoint.
            let family = usize::from(address.is_ipv4());
            if std::mem::replace(&mut families[family], true) {
                continue;
            }
            groups.entry((address.is_ipv4(), ports.clone())).or_default().push(Endpoint {
                address,
                ready: publish_all || (serving && !pod.terminating),
                serving: publish_all || serving,
                terminating: pod.terminating,
                local: true,
                zones: Vec::new(),
                node_hint: NodeHint::None,
            });
        }
    }
    let mut numbers = [0_usize, 0];
    for ((is_v4, ports), mut endpoints) in groups {
        endpoints.sort_by_key(|endpoint| endpoint.address);
        let number = &mut numbers[usize::from(is_v4)];
        let family = if is_v4 { "ipv4" } else { "ipv6" };
        // No API object can have this name: nothing from a manifest is overwritten.
        let name = format!("{}:{family}:{number}", key.name);
        *number += 1;
        let slice_key = NamespacedName { namespace: key.namespace.clone(), name: name.into() };
        let ports = ports
            .into_iter()
            .map(|(name, protocol, port)| EndpointPort { name: name.into(), protocol, port })
            .collect();
        slices.insert(
            slice_key.clone(),
            EndpointSlice {
                key: slice_key,
                service: key.name.clone(),
                ports,
                endpoints,
                triggered: None,
            },
        );
    }
    slices
}

fn protocol(port: &ServicePort) -> Protocol {
    match port.protocol.as_deref() {
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        _ => Protocol::Tcp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, port: u16, ips: &[&str], ready: bool) -> NodePod {
        let pod = serde_json::json!({
            "metadata": {"name": name, "namespace": "ns", "labels": {"app": "web", "pod": name}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
        });
        let ips: Vec<_> = ips.iter().map(|ip| serde_json::json!({"ip": ip})).collect();
        let status = serde_json::json!({
            "phase": "Running",
            "podIPs": ips,
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
        });
        NodePod {
            pod: Arc::new(serde_json::from_value(pod).unwrap()),
            status: Some(serde_json::from_value(status).unwrap()),
            terminating: false,
        }
    }

    fn service(spec: serde_json::Value) -> Service {
        let service =
            serde_json::json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": spec});
        serde_json::from_value(service).unwrap()
    }

    fn shown(service: &Service, pods: &[NodePod]) -> Vec<String> {
        let line = |slice: &EndpointSlice| {
            let ports: Vec<_> = slice.ports.iter().map(|p| p.port.to_string()).collect();
            let endpoints: Vec<_> = slice
                .endpoints
                .iter()
                .map(|e| {
                    let flag = |set: bool, c: char| if set { c } else { '-' };
                    format!(
                        "{}{}{}{}",
                        e.address,
                        flag(e.ready, 'r'),
                        flag(e.serving, 's'),
                        flag(e.terminating, 't')
                    )
                })
                .collect();
            format!("{} {} {}", slice.key.name, ports.join(","), endpoints.join(" "))
        };
        plan_slices(service, pods).values().map(line).collect()
    }

    #[test]
    fn selectors_choose_ports_resolve_and_conditions_show() {
        let web = service(
            serde_json::json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}),
        );
        let pods =
            [pod("a", 8080, &["10.0.0.2", "fd00::2"], true), pod("b", 8080, &["10.0.0.1"], false)];
        assert_eq!(
            shown(&web, &pods),
            ["s:ipv4:0 8080 10.0.0.1--- 10.0.0.2rs-", "s:ipv6:0 8080 fd00::2rs-"]
        );
        let mixed = [pods[0].clone(), pod("c", 9090, &["10.0.0.3"], true)];
        assert_eq!(
            shown(&web, &mixed),
            ["s:ipv4:0 8080 10.0.0.2rs-", "s:ipv4:1 9090 10.0.0.3rs-", "s:ipv6:0 8080 fd00::2rs-"]
        );
        let one = service(serde_json::json!({"selector": {"pod": "a"}, "ports": [{"port": 80}]}));
        assert_eq!(shown(&one, &mixed).len(), 2);
        let ending = NodePod { terminating: true, ..pods[0].clone() };
        assert_eq!(shown(&web, &[ending])[0], "s:ipv4:0 8080 10.0.0.2-st");
        let mut ended = pods[0].clone();
        ended.status.as_mut().unwrap().phase = Some("Failed".into());
        assert!(shown(&web, &[ended]).is_empty());
        let all = service(
            serde_json::json!({"selector": {"app": "web"}, "publishNotReadyAddresses": true, "ports": [{"port": 80}]}),
        );
        assert_eq!(shown(&all, &pods[1..]), ["s:ipv4:0 80 10.0.0.1rs-"]);
        let none = service(serde_json::json!({"ports": [{"port": 80}]}));
        assert!(shown(&none, &pods).is_empty(), "no selector selects nothing");
    }
}
