//! `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1): every field of 1.36 by name.

use kube::core::Duration;
use serde::Deserialize;
use serde_json::Value;

use super::documents::{Fields, Treatment};

/// The fields that this node reads.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct KubeProxyConfiguration {
    pub hostname_override: Option<String>,
    pub client_connection: Option<ClientConnection>,
    pub healthz_bind_address: Option<String>,
    pub metrics_bind_address: Option<String>,
    pub mode: Option<String>,
    pub iptables: Option<IpTables>,
    pub nftables: Option<NfTables>,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: Option<String>,
    pub node_port_addresses: Option<Vec<String>>,
    pub conntrack: Option<Conntrack>,
}

/// Only the kubeconfig of it matters.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct ClientConnection {
    pub kubeconfig: Option<String>,
    pub accept_content_types: Option<String>,
    pub content_type: Option<String>,
    pub qps: Option<f64>,
    pub burst: Option<u32>,
}

/// Fields of the iptables mode.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct IpTables {
    pub masquerade_bit: Option<u8>,
    pub masquerade_all: Option<bool>,
    pub localhost_node_ports: Option<bool>,
    pub sync_period: Option<Duration>,
    pub min_sync_period: Option<Duration>,
}

/// Fields of the nftables mode.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct NfTables {
    pub masquerade_bit: Option<u8>,
    pub masquerade_all: Option<bool>,
    pub sync_period: Option<Duration>,
    pub min_sync_period: Option<Duration>,
}

/// Conntrack sysctls. They are the host's: named, checked, and left as they are.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Conntrack {
    pub max_per_core: Option<i64>,
    pub min: Option<i64>,
    pub tcp_established_timeout: Option<Value>,
    pub tcp_close_wait_timeout: Option<Value>,
    pub tcp_be_liberal: Option<bool>,
    pub udp_timeout: Option<Value>,
    pub udp_stream_timeout: Option<Value>,
}

use Treatment::{Inert, NotBuilt, Used};

/// All fields of the kind.
pub(super) const FIELDS: Fields = &[
    ("featureGates", NotBuilt(&[])),
    ("clientConnection", Used),
    ("logging", Inert),
    ("hostnameOverride", Used),
    ("bindAddress", Inert), // decides only which family is named primary upstream
    ("healthzBindAddress", Used),
    ("metricsBindAddress", Used),
    ("bindAddressHardFail", Inert),
    ("enableProfiling", Inert),
    ("showHiddenMetricsForVersion", Inert),
    ("mode", Used),
    ("iptables", Used),
    ("ipvs", Inert), // `mode: ipvs` itself is refused
    ("nftables", Used),
    ("winkernel", Inert),
    ("detectLocalMode", NotBuilt(&["\"ClusterCIDR\"", "\"NodeCIDR\""])),
    ("detectLocal", NotBuilt(&["{\"bridgeInterface\":\"\",\"interfaceNamePrefix\":\"\"}"])),
    ("clusterCIDR", Used),
    ("nodePortAddresses", Used),
    ("oomScoreAdj", Inert),
    ("conntrack", Used),
    ("configSyncPeriod", Inert),
    ("portRange", Inert),
    ("windowsRunAsService", Inert),
];
