//! What a sandbox has to give to plugins that ask for it. Pure.
//! Source: CNI's CONVENTIONS.md, and what containerd passes for the CRI.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::super::{NetworkError, SandboxNetwork, bandwidth};
use crate::network::bandwidth::Bandwidth;

/// Addresses with prefix lengths a pod wants, comma-separated, for plugins with capability `ips`.
const IPS: &str = "cni.longshore.io/ips";
/// The hardware address a pod wants, for plugins with capability `mac`.
const MAC: &str = "cni.longshore.io/mac";
/// Names of the pod, comma-separated, for plugins with capability `aliases`.
const ALIASES: &str = "cni.longshore.io/aliases";

/// All capabilities of a sandbox; what a plugin gets of them is for its configuration to say.
///
/// # Errors
/// [`NetworkError::BadAnnotation`].
pub(crate) fn plan_capabilities(
    sandbox: &SandboxNetwork,
) -> Result<Map<String, Value>, NetworkError> {
    let mut capabilities = Map::new();
    let mut give = |name: &str, value: Value| {
        capabilities.insert(name.to_owned(), value);
    };
    give("io.kubernetes.cri.pod-annotations", json!(sandbox.annotations));
    let ports: Vec<_> = sandbox
        .port_mappings
        .iter()
        .map(|port| {
            json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol.to_string(),
                "hostIP": port.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        })
        .collect();
    if !ports.is_empty() {
        give("portMappings", Value::Array(ports));
    }
    let limits = Bandwidth::from_annotations(&sandbox.annotations)?;
    if !limits.is_none() {
        let mut bandwidth = Map::new();
        for (rate, way) in [(limits.ingress, "ingress"), (limits.egress, "egress")] {
            if let Some(rate) = rate {
                bandwidth.insert(format!("{way}Rate"), json!(rate));
                bandwidth.insert(format!("{way}Burst"), json!(bandwidth::burst(rate)));
            }
        }
        give("bandwidth", Value::Object(bandwidth));
    }
    if let Some(dns) = &sandbox.dns {
        let mut value = Map::new();
        let lists =
            [("servers", &dns.servers), ("searches", &dns.searches), ("options", &dns.options)];
        for (name, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
            value.insert(name.to_owned(), json!(list));
        }
        give("dns", Value::Object(value));
    }
    if !sandbox.cgroup_parent.is_empty() {
        give("cgroupPath", json!(sandbox.cgroup_parent));
    }
    let wanted = |name: &str| sandbox.annotations.get(name).filter(|text| !text.is_empty());
    let list =
        |text: &str| -> Vec<String> { text.split(',').map(|t| t.trim().to_owned()).collect() };
    if let Some(text) = wanted(IPS) {
        let ips = list(text);
        if !ips.iter().all(|ip| is_address(ip)) {
            return Err(bad(IPS, text, "these are no addresses such as 10.0.0.9/24"));
        }
        give("ips", json!(ips));
    }
    if let Some(text) = wanted(MAC) {
        if !is_mac(text) {
            return Err(bad(MAC, text, "it is no hardware address such as c2:11:22:33:44:55"));
        }
        give("mac", json!(text));
    }
    if let Some(text) = wanted(ALIASES) {
        let aliases = list(text);
        let plain = |name: &String| {
            !name.is_empty()
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        };
        if !aliases.iter().all(plain) {
            return Err(bad(ALIASES, text, "these are no host names"));
        }
        give("aliases", json!(aliases));
    }
    Ok(capabilities)
}

/// What Kubernetes' runtimes tell plugins of the pod (`CNI_ARGS`).
pub(crate) fn plan_arguments(sandbox: &SandboxNetwork) -> Vec<(String, String)> {
    [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &sandbox.namespace),
        ("K8S_POD_NAME", &sandbox.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &sandbox.id),
        ("K8S_POD_UID", &sandbox.uid),
    ]
    .into_iter()
    // Semicolons and equals signs separate; Kubernetes' names have none, a CRI client's may.
    .map(|(key, value)| (key.to_owned(), value.replace([';', '=', '\0'], "_")))
    .collect()
}

fn bad(annotation: &'static str, value: &str, reason: &'static str) -> NetworkError {
    NetworkError::BadAnnotation { annotation, value: value.chars().take(64).collect(), reason }
}

fn is_address(text: &str) -> bool {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, prefix.parse::<u8>().ok()),
        None => (text, Some(0)),
    };
    match (address.parse::<IpAddr>(), prefix) {
        (Ok(address), Some(prefix)) => prefix <= if address.is_ipv4() { 32 } else { 128 },
        _ => false,
    }
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<_> = text.split(':').collect();
    parts.len() == 6 && parts.iter().all(|p| p.len() == 2 && u8::from_str_radix(p, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{Dns, PortMapping, Protocol};

    fn sandbox(annotations: &[(&str, &str)]) -> SandboxNetwork {
        SandboxNetwork {
            id: "id".to_owned(),
            namespace: "ns".to_owned(),
            name: "na;me=x".to_owned(),
            uid: "u".to_owned(),
            annotations: annotations
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..SandboxNetwork::default()
        }
    }

    #[test]
    fn capabilities_are_those_containerd_passes() {
        let mut pod = sandbox(&[
            ("kubernetes.io/ingress-bandwidth", "10M"),
            ("cni.longshore.io/ips", "10.0.0.9/24, fd00::9/64"),
            ("cni.longshore.io/mac", "c2:11:22:33:44:55"),
            ("cni.longshore.io/aliases", "web,db"),
        ]);
        pod.cgroup_parent = "/kubepods/podx".to_owned();
        pod.dns = Some(Dns { servers: vec!["10.96.0.10".to_owned()], ..Dns::default() });
        pod.port_mappings = vec![PortMapping {
            protocol: Protocol::Sctp,
            host_ip: None,
            host_port: 80,
            container_port: 8080,
        }];
        let capabilities = plan_capabilities(&pod).unwrap();
        assert_eq!(
            Value::Object(capabilities),
            json!({
                "io.kubernetes.cri.pod-annotations": pod.annotations,
                "portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "sctp", "hostIP": ""}],
                "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 10_000_000},
                "dns": {"servers": ["10.96.0.10"]},
                "cgroupPath": "/kubepods/podx",
                "ips": ["10.0.0.9/24", "fd00::9/64"],
                "mac": "c2:11:22:33:44:55",
                "aliases": ["web", "db"],
            })
        );
        assert_eq!(plan_capabilities(&sandbox(&[])).unwrap().len(), 1);
        for (name, value) in [
            ("kubernetes.io/egress-bandwidth", "1"),
            ("cni.longshore.io/ips", "10.0.0.9/33"),
            ("cni.longshore.io/ips", "10.0.0.9/24,"),
            ("cni.longshore.io/mac", "c2:11:22:33:44"),
            ("cni.longshore.io/aliases", "a b"),
        ] {
            let error = plan_capabilities(&sandbox(&[(name, value)])).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn arguments_cannot_hold_further_ones() {
        let arguments = plan_arguments(&sandbox(&[]));
        assert_eq!(arguments[2], ("K8S_POD_NAME".to_owned(), "na_me_x".to_owned()));
    }
}
