//! `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1): every field of 1.36 by name. What
//! each comes to is decided in `super::proxy`.

use std::collections::BTreeMap;

use kube::core::Duration;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::documents::{Fields, Treatment};
use crate::pod::backoff::go_duration;

/// All fields.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct KubeProxyConfiguration {
    pub feature_gates: Option<BTreeMap<String, bool>>,
    pub client_connection: Option<ClientConnection>,
    pub logging: Option<Logging>,
    pub hostname_override: Option<String>,
    pub bind_address: Option<String>,
    pub healthz_bind_address: Option<String>,
    pub metrics_bind_address: Option<String>,
    pub bind_address_hard_fail: Option<bool>,
    pub enable_profiling: Option<bool>,
    pub show_hidden_metrics_for_version: Option<String>,
    pub mode: Option<String>,
    pub iptables: Option<IpTables>,
    pub nftables: Option<NfTables>,
    pub ipvs: Option<Ipvs>,
    pub winkernel: Option<Winkernel>,
    pub detect_local_mode: Option<String>,
    pub detect_local: Option<DetectLocal>,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: Option<String>,
    pub node_port_addresses: Option<Vec<String>>,
    pub oom_score_adj: Option<i32>,
    pub conntrack: Option<Conntrack>,
    #[serde(serialize_with = "as_go", default)]
    pub config_sync_period: Option<Duration>,
    pub port_range: Option<String>,
    pub windows_run_as_service: Option<bool>,
}

/// How log lines look, and how many there are.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Logging {
    pub format: Option<String>,
    pub verbosity: Option<u8>,
    /// Seconds or a duration; lines are written at once here.
    pub flush_frequency: Option<Value>,
    pub vmodule: Option<Vec<Value>>,
    pub options: Option<Value>,
}

/// How the API server is spoken to.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
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
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct IpTables {
    pub masquerade_bit: Option<u8>,
    pub masquerade_all: Option<bool>,
    pub localhost_node_ports: Option<bool>,
    #[serde(serialize_with = "as_go", default)]
    pub sync_period: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub min_sync_period: Option<Duration>,
}

/// Fields of the nftables mode.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct NfTables {
    pub masquerade_bit: Option<u8>,
    pub masquerade_all: Option<bool>,
    #[serde(serialize_with = "as_go", default)]
    pub sync_period: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub min_sync_period: Option<Duration>,
}

/// Fields of the ipvs mode, which is not provided.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Ipvs {
    #[serde(serialize_with = "as_go", default)]
    pub sync_period: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub min_sync_period: Option<Duration>,
    pub scheduler: Option<String>,
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    #[serde(rename = "strictARP")]
    pub strict_arp: Option<bool>,
    #[serde(serialize_with = "as_go", default)]
    pub tcp_timeout: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub tcp_fin_timeout: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub udp_timeout: Option<Duration>,
}

/// Fields of Windows.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Winkernel {
    pub network_name: Option<String>,
    pub source_vip: Option<String>,
    #[serde(rename = "enableDSR")]
    pub enable_dsr: Option<bool>,
    pub root_hns_endpoint_name: Option<String>,
    pub forward_health_check_vip: Option<bool>,
}

/// How the traffic of pods is told from other traffic.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct DetectLocal {
    pub bridge_interface: Option<String>,
    pub interface_name_prefix: Option<String>,
}

/// Conntrack sysctls.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Conntrack {
    pub max_per_core: Option<u32>,
    pub min: Option<u32>,
    #[serde(serialize_with = "as_go", default)]
    pub tcp_established_timeout: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub tcp_close_wait_timeout: Option<Duration>,
    pub tcp_be_liberal: Option<bool>,
    #[serde(serialize_with = "as_go", default)]
    pub udp_timeout: Option<Duration>,
    #[serde(serialize_with = "as_go", default)]
    pub udp_stream_timeout: Option<Duration>,
}

/// A time as Go writes it, which is how upstream shows it.
pub(super) fn go_time(time: std::time::Duration) -> String {
    match time.subsec_nanos() {
        0 => go_duration(time.as_secs()),
        _ => format!("{time:?}"),
    }
}

fn as_go<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.serialize_str(&go_time((*time).into())),
        None => serializer.serialize_none(),
    }
}

/// All fields of the kind.
pub(super) const FIELDS: Fields = &[
    ("featureGates", Treatment::Used),
    ("clientConnection", Treatment::Used),
    ("logging", Treatment::Used),
    ("hostnameOverride", Treatment::Used),
    ("bindAddress", Treatment::Used),
    ("healthzBindAddress", Treatment::Used),
    ("metricsBindAddress", Treatment::Used),
    ("bindAddressHardFail", Treatment::Used),
    ("enableProfiling", Treatment::Used),
    ("showHiddenMetricsForVersion", Treatment::Used),
    ("mode", Treatment::Used),
    ("iptables", Treatment::Used),
    ("ipvs", Treatment::Used),
    ("nftables", Treatment::Used),
    ("winkernel", Treatment::Used),
    ("detectLocalMode", Treatment::Used),
    ("detectLocal", Treatment::Used),
    ("clusterCIDR", Treatment::Used),
    ("nodePortAddresses", Treatment::Used),
    ("oomScoreAdj", Treatment::Used),
    ("conntrack", Treatment::Used),
    ("configSyncPeriod", Treatment::Used),
    ("portRange", Treatment::Used),
    ("windowsRunAsService", Treatment::Used),
];
