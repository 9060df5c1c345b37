//! The CRI configuration of a pod's sandbox.

use std::collections::HashMap;

use cri_shim::api;
use k8s_openapi::api::core::v1::Pod;

use super::hosts::kernel_hostname;
use super::resources::{PodLimits, pod_requests};
use super::security::sandbox_security;
use super::{ConfigError, dns};
use crate::ids::NamespacedName;
use crate::node_context::NodeContext;
use crate::pod::observed::names;
use crate::pod::quantity::{amount, cpu_milli};
use crate::pod::spec::{host_network, init_containers, spec_of};

/// Labels that say whose a sandbox or container is.
pub fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    let key = NamespacedName::of_pod(pod);
    HashMap::from([
        (names::POD_NAME.to_owned(), key.name.to_string()),
        (names::POD_NAMESPACE.to_owned(), key.namespace.to_string()),
        (names::POD_UID.to_owned(), pod.metadata.uid.clone().unwrap_or_default()),
    ])
}

/// The configuration of sandbox number `attempt`. `host_dns` is what the node resolves with,
/// `cgroup_parent` the pod's cgroup (empty: the runtime's own choice) with its limits, `userns` whose ids it
/// uses.
pub fn sandbox_config(
    pod: &Pod,
    attempt: u32,
    node: &NodeContext,
    host_dns: &api::DnsConfig,
    (cgroup_parent, limits): (&str, PodLimits),
    userns: &api::UserNamespace,
) -> Result<api::PodSandboxConfig, ConfigError> {
    let spec = spec_of(pod);
    let key = NamespacedName::of_pod(pod);
    let mut labels: HashMap<String, String> =
        pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.extend(pod_labels(pod));
    let sysctls = spec.security_context.as_ref().and_then(|c| c.sysctls.as_deref());
    Ok(api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: key.name.to_string(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            namespace: key.namespace.to_string(),
            attempt,
        }),
        // On the node's network a pod shares the node's UTS namespace, and its name.
        hostname: if host_network(spec) { String::new() } else { kernel_hostname(pod, node)? },
        log_directory: node.pod_log_dir(pod).display().to_string(),
        dns_config: Some(dns::pod_dns(pod, node, host_dns)),
        port_mappings: port_mappings(pod),
        labels,
        annotations: pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(api::LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent.to_owned(),
            security_context: Some(sandbox_security(pod, node, userns)),
            sysctls: sysctls
                .unwrap_or_default()
                .iter()
                .map(|s| (s.name.replace('/', "."), s.value.clone()))
                .collect(),
            overhead: Some(overhead(pod)),
            resources: Some(resources(pod, limits, node)),
        }),
        windows: None,
    })
}

/// Ports of the pod that the node forwards.
fn port_mappings(pod: &Pod) -> Vec<api::PortMapping> {
    let spec = spec_of(pod);
    if host_network(spec) {
        return Vec::new();
    }
    let all = init_containers(spec).iter().chain(&spec.containers);
    all.flat_map(|c| c.ports.iter().flatten())
        .filter_map(|port| {
            let host_port = port.host_port.filter(|p| *p > 0)?;
            let protocol = match port.protocol.as_deref() {
                Some("UDP") => api::Protocol::Udp,
                Some("SCTP") => api::Protocol::Sctp,
                _ => api::Protocol::Tcp,
            };
            Some(api::PortMapping {
                protocol: protocol.into(),
                container_port: port.container_port,
                host_port,
                host_ip: port.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}

/// What the pod needs besides its containers.
pub fn overhead(pod: &Pod) -> api::LinuxContainerResources {
    let over = spec_of(pod).overhead.as_ref();
    let milli = cpu_milli(over).unwrap_or(0);
    api::LinuxContainerResources {
        cpu_shares: if milli > 0 { super::resources::cpu_shares(milli) } else { 0 },
        memory_limit_in_bytes: amount(over, "memory").unwrap_or(0),
        ..Default::default()
    }
}

/// What the pod's cgroup has.
pub fn resources(pod: &Pod, limits: PodLimits, node: &NodeContext) -> api::LinuxContainerResources {
    let requests = pod_requests(pod);
    api::LinuxContainerResources {
        cpu_shares: super::resources::cpu_shares(requests.cpu),
        cpu_quota: limits.cpu_quota.unwrap_or(0),
        cpu_period: i64::try_from(node.cpu_cfs_period_us).unwrap_or(100_000),
        memory_limit_in_bytes: limits.memory.unwrap_or(0),
        ..Default::default()
    }
}
