//! What the proxy's metrics port shows of its configuration (`/configz`): upstream's fields, with what
//! is in effect here.

use serde_json::{Map, Value, json};

use super::KubeProxyConfiguration;
use super::configz::lay_over;
use super::kube_proxy::go_time;
use proxy::{Mode, NodePortAddresses};

/// Fields of `KubeProxyConfiguration` v1alpha1 in 1.36 with their defaults.
const DEFAULTS: &str = r#"{
"clientConnection": {
    "kubeconfig": "", "acceptContentTypes": "", "contentType": "application/json", "qps": 0, "burst": 0
},
"logging": {
    "format": "text",
    "flushFrequency": "5s",
    "verbosity": 0,
    "options": {"text": {"infoBufferSize": "0"}, "json": {"infoBufferSize": "0"}}
},
"showHiddenMetricsForVersion": "",
"iptables": {
    "masqueradeBit": 14, "masqueradeAll": false, "localhostNodePorts": true,
    "syncPeriod": "0s", "minSyncPeriod": "0s"
},
"ipvs": {
    "syncPeriod": "0s", "minSyncPeriod": "0s", "scheduler": "", "excludeCIDRs": null, "strictARP": false,
    "tcpTimeout": "0s", "tcpFinTimeout": "0s", "udpTimeout": "0s"
},
"nftables": {"masqueradeBit": 14, "masqueradeAll": false, "syncPeriod": "0s", "minSyncPeriod": "0s"},
"winkernel": {
    "networkName": "", "sourceVip": "", "enableDSR": false, "rootHnsEndpointName": "",
    "forwardHealthCheckVip": false
},
"detectLocalMode": "ClusterCIDR",
"detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
"oomScoreAdj": -999,
"conntrack": {
    "maxPerCore": 32768, "min": 131072,
    "tcpEstablishedTimeout": "24h0m0s", "tcpCloseWaitTimeout": "1h0m0s", "tcpBeLiberal": false,
    "udpTimeout": "0s", "udpStreamTimeout": "0s"
},
"configSyncPeriod": "15m0s",
"portRange": ""
}"#;

/// What the metrics port shows beside metrics.
#[derive(Clone, Debug, Default)]
pub struct ProxyPages {
    /// The configuration, as the document upstream has.
    pub configz: Value,
    /// Profiles and the log's verbosity may be asked for (`enableProfiling`).
    pub profiling: bool,
}

/// A document as JSON, without what it does not say.
fn said(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let said = |(name, value)| (name, said(value));
            fields.into_iter().filter(|(_, value)| !value.is_null()).map(said).collect()
        }
        other => other,
    }
}

/// The pages for `document`, with the flags laid over it, which came to `config`.
pub(super) fn pages(document: &KubeProxyConfiguration, config: &proxy::Config) -> ProxyPages {
    let mut shown: Value = serde_json::from_str(DEFAULTS).unwrap_or_default();
    let mut written = said(serde_json::to_value(document).unwrap_or_default());
    // Zero is no default there: it leaves the kernel's value.
    let conntrack = written.as_object_mut().and_then(|fields| fields.remove("conntrack"));
    lay_over(&mut shown, written, false);
    if let (Value::Object(under), Some(Value::Object(over))) = (&mut shown["conntrack"], conntrack)
    {
        under.extend(over);
    }
    for (section, mode) in [("iptables", Mode::Iptables), ("nftables", Mode::Nftables)] {
        if [mode, Mode::Auto].contains(&config.mode) {
            shown[section]["masqueradeBit"] = config.masquerade_bit.into();
            shown[section]["masqueradeAll"] = config.masquerade_all.into();
            shown[section]["syncPeriod"] = go_time(config.sync_period).into();
            shown[section]["minSyncPeriod"] = go_time(config.min_sync_period).into();
        }
    }
    let at = |address: Option<std::net::SocketAddr>| {
        address.map(|address| address.to_string()).unwrap_or_default()
    };
    let join = |cidrs: &[proxy::object::Cidr]| {
        cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    };
    let node_ports = config.node_port_addresses.iter().map(|entry| match entry {
        NodePortAddresses::Primary => "primary".to_owned(),
        NodePortAddresses::Cidr(cidr) => cidr.to_string(),
    });
    let bind = config.bind_address.map_or("0.0.0.0".to_owned(), |address| address.to_string());
    let mode = if config.mode == Mode::Auto { String::new() } else { config.mode.to_string() };
    let effective = json!({
        "kind": "KubeProxyConfiguration",
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "hostnameOverride": config.node_name,
        "bindAddress": bind,
        "healthzBindAddress": at(config.healthz_bind),
        "metricsBindAddress": at(config.metrics_bind),
        "bindAddressHardFail": config.bind_hard_fail,
        "enableProfiling": document.enable_profiling.unwrap_or(false),
        "mode": mode,
        "clusterCIDR": join(&config.cluster_cidrs),
        "nodePortAddresses": node_ports.collect::<Vec<_>>(),
    });
    if let (Value::Object(shown), Value::Object(effective)) = (&mut shown, effective) {
        shown.extend::<Map<_, _>>(effective);
    }
    ProxyPages { configz: shown, profiling: document.enable_profiling.unwrap_or(false) }
}
