//! The pod's host name and its `/etc/hosts`.

use k8s_openapi::api::core::v1::Pod;

use super::ConfigError;
use crate::ids::NamespacedName;
use crate::node_context::NodeContext;
use crate::pod::spec::{host_network, spec_of};

/// Longest host name that the kernel takes.
const MAX_HOSTNAME: usize = 64;
/// Longest host name that DNS takes as one label.
const MAX_LABEL: usize = 63;

/// The pod's host name, and its domain where it has a subdomain.
pub fn host_and_domain(pod: &Pod, node: &NodeContext) -> (String, String) {
    let spec = spec_of(pod);
    if let Some(name) = spec.hostname_override.as_deref().filter(|n| !n.is_empty()) {
        return (name.to_owned(), String::new());
    }
    let name = match spec.hostname.as_deref().filter(|n| !n.is_empty()) {
        Some(own) => own.to_owned(),
        None => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let cut: String = name.chars().take(MAX_LABEL).collect();
            cut.trim_end_matches(['-', '.']).to_owned()
        }
    };
    let domain = match spec.subdomain.as_deref().filter(|n| !n.is_empty()) {
        Some(sub) => {
            let namespace = NamespacedName::of_pod(pod).namespace;
            format!("{sub}.{namespace}.svc.{}", node.cluster_domain)
        }
        None => String::new(),
    };
    (name, domain)
}

/// What `uname -n` gives in a pod with a network of its own.
pub fn kernel_hostname(pod: &Pod, node: &NodeContext) -> Result<String, ConfigError> {
    let spec = spec_of(pod);
    let (name, domain) = host_and_domain(pod, node);
    if spec.set_hostname_as_fqdn.unwrap_or(false) && !domain.is_empty() {
        let full = format!("{name}.{domain}");
        if full.len() > MAX_HOSTNAME {
            return Err(ConfigError::Invalid(format!(
                "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long ({MAX_HOSTNAME} is the max characters allowed)"
            )));
        }
        return Ok(full);
    }
    Ok(name)
}

/// The text of the pod's `/etc/hosts`. `node_hosts` is the node's own file, for pods on its network.
pub fn hosts_file(pod: &Pod, node: &NodeContext, pod_ips: &[String], node_hosts: &str) -> String {
    use std::fmt::Write as _;
    let spec = spec_of(pod);
    let mut text = String::new();
    if host_network(spec) {
        text.push_str("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(node_hosts);
    } else {
        text.push_str(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        let (name, domain) = host_and_domain(pod, node);
        for ip in pod_ips {
            let _ = if domain.is_empty() {
                writeln!(text, "{ip}\t{name}")
            } else {
                writeln!(text, "{ip}\t{name}.{domain}\t{name}")
            };
        }
    }
    let aliases = spec.host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
            let _ = writeln!(text, "{}\t{names}", alias.ip);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    fn node() -> NodeContext {
        NodeContext { cluster_domain: "cluster.local".into(), ..NodeContext::new("n1", vec![]) }
    }

    #[test]
    fn host_names() {
        for (spec, name) in [
            (r#"{"containers":[]}"#, "p"),
            (r#"{"containers":[],"hostname":"h"}"#, "h"),
            (r#"{"containers":[],"hostname":"h","subdomain":"s"}"#, "h"),
            (
                r#"{"containers":[],"hostname":"h","subdomain":"s","setHostnameAsFQDN":true}"#,
                "h.s.default.svc.cluster.local",
            ),
        ] {
            assert_eq!(kernel_hostname(&pod(spec), &node()).unwrap(), name, "{spec}");
        }
        let mut long = pod(r#"{"containers":[]}"#);
        long.metadata.name = Some(format!("{}-x", "a".repeat(62)));
        assert_eq!(kernel_hostname(&long, &node()).unwrap(), "a".repeat(62));
    }

    #[test]
    fn hosts_name_the_pod_and_its_aliases() {
        let pod = pod(
            r#"{"containers":[],"subdomain":"s","hostAliases":[{"ip":"1.2.3.4","hostnames":["a","b"]}]}"#,
        );
        let text = hosts_file(&pod, &node(), &["10.0.0.2".into()], "");
        assert!(text.contains("\n10.0.0.2\tp.s.default.svc.cluster.local\tp\n"), "{text}");
        assert!(text.ends_with("\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"), "{text}");
    }
}
