//! `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1): every field of 1.36 by name.

use kube::core::Duration;
use serde::Deserialize;

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
    pub detect_local_mode: Option<String>,
    pub detect_local: Option<DetectLocal>,
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

/// How the traffic of pods is told from other traffic.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct DetectLocal {
    pub bridge_interface: Option<String>,
    pub interface_name_prefix: Option<String>,
}

/// Conntrack sysctls.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Conntrack {
    pub max_per_core: Option<u32>,
    pub min: Option<u32>,
    pub tcp_established_timeout: Option<Duration>,
    pub tcp_close_wait_timeout: Option<Duration>,
    pub tcp_be_liberal: Option<bool>,
    pub udp_timeout: Option<Duration>,
    pub udp_stream_timeout: Option<Duration>,
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
    ("detectLocalMode", Used),
    ("detectLocal", Used),
    ("clusterCIDR", Used),
    ("nodePortAddresses", Used),
    ("oomScoreAdj", Inert),
    ("conntrack", Used),
    ("configSyncPeriod", Inert),
    ("portRange", Inert),
    ("windowsRunAsService", Inert),
];
