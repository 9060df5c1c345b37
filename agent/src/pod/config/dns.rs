//! A pod's resolver settings from dnsPolicy, dnsConfig, the cluster's domain and the node's own.

use cri_shim::api::DnsConfig;
use k8s_openapi::api::core::v1::{Pod, PodSpec};

use crate::ids::NamespacedName;
use crate::node_context::NodeContext;
use crate::pod::spec::{host_network, spec_of};

/// Name servers, search paths and their size that a resolver takes (glibc since 2.26 takes any
/// number of search paths; these are Kubernetes' limits).
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;

/// Reads `resolv.conf`: what no line can be made of is skipped, as resolvers do.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            // The last such line counts.
            Some("search") => {
                dns.searches = words
                    .map(|w| if w == "." { w } else { w.trim_end_matches('.') }.to_owned())
                    .collect();
            }
            Some("options") => dns.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    dns
}

/// What dnsPolicy comes down to.
enum Policy {
    Cluster,
    Node,
    None,
}

fn policy(spec: &PodSpec, node: &NodeContext) -> Policy {
    let cluster = if node.cluster_dns.is_empty() { Policy::Node } else { Policy::Cluster };
    match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "None" => Policy::None,
        "ClusterFirstWithHostNet" => cluster,
        "ClusterFirst" if !host_network(spec) => cluster,
        _ => Policy::Node,
    }
}

/// The pod's resolver settings; `host` is what the node itself uses.
pub fn pod_dns(pod: &Pod, node: &NodeContext, host: &DnsConfig) -> DnsConfig {
    let spec = spec_of(pod);
    let mut dns = match policy(spec, node) {
        Policy::None => DnsConfig::default(),
        Policy::Node => host.clone(),
        Policy::Cluster => {
            let mut searches = Vec::new();
            if !node.cluster_domain.is_empty() {
                let (domain, namespace) =
                    (&node.cluster_domain, NamespacedName::of_pod(pod).namespace);
                searches.push(format!("{namespace}.svc.{domain}"));
                searches.push(format!("svc.{domain}"));
                searches.push(domain.clone());
            }
            searches.extend(host.searches.iter().cloned());
            DnsConfig {
                servers: node.cluster_dns.iter().map(ToString::to_string).collect(),
                searches,
                options: vec!["ndots:5".into()],
            }
        }
    };
    if let Some(own) = &spec.dns_config {
        dns.servers.extend(own.nameservers.iter().flatten().cloned());
        dns.searches.extend(own.searches.iter().flatten().cloned());
        for option in own.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            // A pod's option replaces one of the same name.
            dns.options.retain(|o| o.split(':').next() != Some(name));
            dns.options.push(match option.value.as_deref() {
                Some(value) if !value.is_empty() => format!("{name}:{value}"),
                _ => name.clone(),
            });
        }
    }
    dedup(&mut dns.servers);
    dedup(&mut dns.searches);
    dns.servers.truncate(MAX_NAMESERVERS);
    dns.searches.truncate(MAX_SEARCHES);
    while dns.searches.iter().map(|s| s.len() + 1).sum::<usize>() > MAX_SEARCH_CHARS + 1 {
        dns.searches.pop();
    }
    dns
}

fn dedup(list: &mut Vec<String>) {
    let mut seen = std::collections::HashSet::new();
    list.retain(|item| seen.insert(item.clone()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    fn dns(spec: &str) -> (String, String, String) {
        let node = NodeContext {
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            ..NodeContext::new("n", vec![])
        };
        let host = parse_resolv_conf(
            "# c\nnameserver 9.9.9.9\nsearch old\nsearch corp.example. lan\noptions rotate ndots:2\n",
        );
        let d = pod_dns(&pod(spec), &node, &host);
        (d.servers.join(" "), d.searches.join(" "), d.options.join(" "))
    }

    #[test]
    fn policies() {
        let cluster = "default.svc.cluster.local svc.cluster.local cluster.local corp.example lan";
        for (spec, servers, searches, options) in [
            (r#"{"containers":[]}"#, "10.96.0.10", cluster, "ndots:5"),
            (
                r#"{"containers":[],"hostNetwork":true}"#,
                "9.9.9.9",
                "corp.example lan",
                "rotate ndots:2",
            ),
            (
                r#"{"containers":[],"hostNetwork":true,"dnsPolicy":"ClusterFirstWithHostNet"}"#,
                "10.96.0.10",
                cluster,
                "ndots:5",
            ),
            (
                r#"{"containers":[],"dnsPolicy":"Default"}"#,
                "9.9.9.9",
                "corp.example lan",
                "rotate ndots:2",
            ),
            (
                r#"{"containers":[],"dnsPolicy":"None","dnsConfig":{"nameservers":["1.1.1.1"],"searches":["a.b"],"options":[{"name":"ndots","value":"1"},{"name":"edns0"}]}}"#,
                "1.1.1.1",
                "a.b",
                "ndots:1 edns0",
            ),
            (
                r#"{"containers":[],"dnsConfig":{"nameservers":["10.96.0.10","1.1.1.1"],"options":[{"name":"ndots","value":"1"}]}}"#,
                "10.96.0.10 1.1.1.1",
                cluster,
                "ndots:1",
            ),
        ] {
            let found = dns(spec);
            assert_eq!(found, (servers.into(), searches.into(), options.into()), "{spec}");
        }
    }
}
