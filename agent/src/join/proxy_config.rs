//! What the cluster's own `KubeProxyConfiguration` (ConfigMap `kube-system/kube-proxy`, key
//! `config.conf`) means to this node's proxy.
//!
//! The document was written for kube-proxy's pod: its kubeconfig, addresses and tuning are that
//! pod's affair. How pods' traffic is told from other traffic, and what is masqueraded, is the
//! cluster's, and holds for every node.

use serde_json::{Map, Value, json};

use crate::config;
use crate::standalone::yaml;

/// Fields that hold for any proxy of the cluster.
const KEPT: [&str; 8] = [
    "clusterCIDR",
    "conntrack",
    "detectLocal",
    "detectLocalMode",
    "iptables",
    "mode",
    "nftables",
    "nodePortAddresses",
];

/// The part of `text` that holds here, as a document that `--config` takes. Where it does not say
/// which addresses are pods', the cluster's `podSubnet` does. `None` if nothing is known.
///
/// # Errors
/// What is wrong with it, in words.
pub fn plan_proxy_config(
    text: Option<&str>,
    pod_subnet: Option<&str>,
) -> Result<Option<String>, String> {
    let mut fields = match text {
        Some(text) => {
            let document = yaml::documents(text.as_bytes()).into_iter().next();
            let value = document.ok_or("it is empty")?.value.map_err(|error| error.to_string())?;
            value.as_object().ok_or("it is no object")?.clone()
        }
        None => Map::new(),
    };
    let said =
        |name: &str| fields.get(name).and_then(Value::as_str).is_some_and(|text| !text.is_empty());
    if let Some(subnet) = pod_subnet
        && !said("clusterCIDR")
        && !said("detectLocalMode")
    {
        fields.insert("clusterCIDR".to_owned(), json!(subnet));
    }
    if fields.is_empty() {
        return Ok(None);
    }
    let mut kept = Map::from_iter([
        ("apiVersion".to_owned(), json!("kubeproxy.config.k8s.io/v1alpha1")),
        ("kind".to_owned(), json!("KubeProxyConfiguration")),
    ]);
    for name in KEPT {
        match fields.get(name) {
            None | Some(Value::Null) => {}
            // Modes that are not provided here (ipvs) leave the choice to the node.
            Some(mode) if name == "mode" && *mode != "nftables" && *mode != "iptables" => {}
            Some(value) => {
                kept.insert(name.to_owned(), value.clone());
            }
        }
    }
    let text = serde_json::to_string_pretty(&kept).map_err(|error| error.to_string())? + "\n";
    config::parse(text.as_bytes()).map_err(|error| error.to_string())?;
    Ok(Some(text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_clusters_part_is_kept_and_the_pods_part_is_not() {
        let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
clusterCIDR: 10.244.0.0/16,fd00:244::/56
conntrack:
  maxPerCore: null
detectLocalMode: \"\"
hostnameOverride: \"\"
ipvs:
  strictARP: true
kind: KubeProxyConfiguration
mode: ipvs
nftables:
  masqueradeAll: true
nodePortAddresses: null
";
        let plan = plan_proxy_config(Some(text), Some("10.0.0.0/8")).unwrap().unwrap();
        let read = config::parse(plan.as_bytes()).unwrap().kube_proxy;
        assert_eq!(read.cluster_cidr.as_deref(), Some("10.244.0.0/16,fd00:244::/56"));
        assert_eq!(read.mode, None);
        assert!(read.client_connection.is_none() && read.hostname_override.is_none());
        assert_eq!(read.nftables.unwrap().masquerade_all, Some(true));
        let iptables = plan_proxy_config(Some("mode: iptables"), None).unwrap().unwrap();
        assert_eq!(
            config::parse(iptables.as_bytes()).unwrap().kube_proxy.mode.as_deref(),
            Some("iptables")
        );
    }

    #[test]
    fn the_clusters_pod_subnet_stands_in() {
        let cidr = |text: Option<&str>| {
            let plan = plan_proxy_config(text, Some("10.244.0.0/16")).unwrap().unwrap();
            config::parse(plan.as_bytes()).unwrap().kube_proxy.cluster_cidr
        };
        for text in [None, Some("clusterCIDR: \"\"")] {
            assert_eq!(cidr(text).as_deref(), Some("10.244.0.0/16"), "{text:?}");
        }
        assert_eq!(cidr(Some("detectLocalMode: NodeCIDR")), None);
        assert_eq!(plan_proxy_config(None, None), Ok(None));
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for (text, why) in [
            ("", "empty"),
            ("- a", "must be an object"),
            ("mode: [", "line"),
            ("clusterCIDR: 7", "KubeProxyConfiguration.clusterCIDR"),
        ] {
            let error = plan_proxy_config(Some(text), None).unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }
}
