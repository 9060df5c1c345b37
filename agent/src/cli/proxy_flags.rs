//! kube-proxy's own flags, under its names. Each stands for a field of `KubeProxyConfiguration` and
//! wins over it; upstream ignores most of them beside a `--config`.

use std::time::Duration;

use clap::Args;

use crate::config::KubeProxyConfiguration;

/// Flags of kube-proxy that kubelet does not have.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Of kube-proxy")]
pub struct ProxyFlags {
    /// Address of this node that Services' rules go by, instead of the Node object's
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<String>,
    /// End if the proxy's health or metrics port is taken, instead of trying again
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub bind_address_hard_fail: Option<bool>,
    /// Port of the proxy's metrics, 0 for none; --proxy-metrics-bind-address says more
    #[arg(long, value_name = "PORT")]
    pub metrics_port: Option<u16>,
    /// Answer /debug/pprof at the proxy's metrics port
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub profiling: Option<bool>,
    /// Show the metrics that were hidden since this version, the last minor one
    #[arg(long, value_name = "VERSION")]
    pub show_hidden_metrics_for_version: Option<String>,
    /// Bit of the packet mark that asks for masquerading [default: 14]
    #[arg(long, value_name = "0-31")]
    pub iptables_masquerade_bit: Option<u8>,
    /// NodePorts at 127.0.0.1 too [default: true]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub iptables_localhost_nodeports: Option<bool>,
    /// How often rules are compared with the kernel's without a reason
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub iptables_sync_period: Option<Duration>,
    /// Least time between two changes of the rules; changes go at once without
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub iptables_min_sync_period: Option<Duration>,
    /// How pods' traffic is told: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix
    #[arg(long, value_name = "MODE")]
    pub detect_local_mode: Option<String>,
    /// Bridge of pods, with --detect-local-mode BridgeInterface
    #[arg(long, value_name = "NAME")]
    pub pod_bridge_interface: Option<String>,
    /// Beginning of the names of pods' interfaces, with --detect-local-mode InterfaceNamePrefix
    #[arg(long, value_name = "PREFIX")]
    pub pod_interface_name_prefix: Option<String>,
    /// oom_score_adj of a proxy that runs alone [default: -999]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub oom_score_adj: Option<i32>,
    /// Connections tracked per core, 0 to leave the kernel's limit [default: 32768]
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<u32>,
    /// Connections tracked at least [default: 131072]
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<u32>,
    /// Idle time of established TCP connections, 0 to leave the kernel's [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_tcp_timeout_established: Option<Duration>,
    /// Idle time of half-closed TCP connections, 0 to leave the kernel's [default: 1h]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,
    /// Track TCP packets outside of the window too
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub conntrack_tcp_be_liberal: Option<bool>,
    /// Idle time of unanswered UDP flows, 0 to leave the kernel's
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_udp_timeout: Option<Duration>,
    /// Idle time of answered UDP flows, 0 to leave the kernel's
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub conntrack_udp_timeout_stream: Option<Duration>,
    /// Accepted for kube-proxy's sake: there are no feature gates here
    #[arg(long, value_name = "NAME=true|false,...", value_delimiter = ',')]
    pub feature_gates: Vec<String>,
    /// Accepted for kube-proxy's sake: what the API server tells needs no refreshing here
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub config_sync_period: Option<Duration>,
    /// Accepted for kube-proxy's sake: the proxy's requests are JSON
    #[arg(long, value_name = "TYPE")]
    pub kube_api_content_type: Option<String>,
    /// Accepted for kube-proxy's sake: a list and a watch need no limit
    #[arg(long, value_name = "N")]
    pub kube_api_qps: Option<f64>,
    /// Accepted for kube-proxy's sake, as --kube-api-qps
    #[arg(long, value_name = "N")]
    pub kube_api_burst: Option<u32>,
}

/// A duration as kube-proxy's flags have it: `1h30m`, `500ms`, `0`.
fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed: kube::core::Duration =
        text.parse().map_err(|error| format!("{error}; write it as 30s, 5m or 1h30m"))?;
    if parsed.is_negative() { Err("must not be negative".to_owned()) } else { Ok(parsed.into()) }
}

impl ProxyFlags {
    /// Puts what the flags say over what the document says.
    pub fn over(&self, document: &mut KubeProxyConfiguration) {
        fn set<T: Clone>(field: &mut Option<T>, flag: &Option<T>) {
            if flag.is_some() {
                field.clone_from(flag);
            }
        }
        fn time(field: &mut Option<kube::core::Duration>, flag: Option<Duration>) {
            if let Some(flag) = flag {
                *field = Some(flag.into());
            }
        }
        set(&mut document.bind_address, &self.bind_address);
        set(&mut document.bind_address_hard_fail, &self.bind_address_hard_fail);
        set(&mut document.enable_profiling, &self.profiling);
        set(&mut document.show_hidden_metrics_for_version, &self.show_hidden_metrics_for_version);
        set(&mut document.detect_local_mode, &self.detect_local_mode);
        set(&mut document.oom_score_adj, &self.oom_score_adj);
        time(&mut document.config_sync_period, self.config_sync_period);
        let detect = document.detect_local.get_or_insert_default();
        set(&mut detect.bridge_interface, &self.pod_bridge_interface);
        set(&mut detect.interface_name_prefix, &self.pod_interface_name_prefix);
        let iptables = document.iptables.get_or_insert_default();
        set(&mut iptables.masquerade_bit, &self.iptables_masquerade_bit);
        set(&mut iptables.localhost_node_ports, &self.iptables_localhost_nodeports);
        time(&mut iptables.sync_period, self.iptables_sync_period);
        time(&mut iptables.min_sync_period, self.iptables_min_sync_period);
        let conntrack = document.conntrack.get_or_insert_default();
        set(&mut conntrack.max_per_core, &self.conntrack_max_per_core);
        set(&mut conntrack.min, &self.conntrack_min);
        set(&mut conntrack.tcp_be_liberal, &self.conntrack_tcp_be_liberal);
        time(&mut conntrack.tcp_established_timeout, self.conntrack_tcp_timeout_established);
        time(&mut conntrack.tcp_close_wait_timeout, self.conntrack_tcp_timeout_close_wait);
        time(&mut conntrack.udp_timeout, self.conntrack_udp_timeout);
        time(&mut conntrack.udp_stream_timeout, self.conntrack_udp_timeout_stream);
        let client = document.client_connection.get_or_insert_default();
        set(&mut client.content_type, &self.kube_api_content_type);
        set(&mut client.qps, &self.kube_api_qps);
        set(&mut client.burst, &self.kube_api_burst);
    }
}
