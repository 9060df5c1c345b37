//! What the proxy is told at start: the options of `KubeProxyConfiguration` that decide about
//! packets, as plain data, so that the crate needs no YAML and no API client.

use std::net::SocketAddr;
use std::time::Duration;

use crate::object::Cidr;

/// Which backend programs the kernel (`--proxy-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// nftables where the kernel has it, else iptables.
    #[default]
    Auto,
    /// nf_tables over netlink.
    Nftables,
    /// iptables and ip6tables.
    Iptables,
}

impl std::str::FromStr for Mode {
    type Err = String;

    /// Parses the value of `--proxy-mode`; empty is `auto`, as upstream's empty mode.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" | "auto" => Ok(Mode::Auto),
            "nftables" => Ok(Mode::Nftables),
            "iptables" => Ok(Mode::Iptables),
            other => {
                Err(format!("proxy mode {other:?} is not known: use auto, nftables or iptables"))
            }
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Auto => "auto",
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
        })
    }
}

/// One entry of `nodePortAddresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// `primary`: the node object's own addresses.
    Primary,
    /// Local addresses within this CIDR.
    Cidr(Cidr),
}

impl std::str::FromStr for NodePortAddresses {
    type Err = String;

    /// Parses `primary` or a CIDR.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "primary" { Ok(Self::Primary) } else { text.parse().map(Self::Cidr) }
    }
}

/// How the traffic of pods is told from other traffic (`detectLocalMode`).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum LocalTraffic {
    /// Not at all.
    #[default]
    Unknown,
    /// By source address.
    Cidrs(Vec<Cidr>),
    /// By the interface it comes in from (`BridgeInterface`).
    Interface(String),
    /// By the beginning of that interface's name (`InterfaceNamePrefix`).
    InterfacePrefix(String),
}

/// `detectLocalMode`: what tells pods' traffic from other traffic. Traffic to cluster IPs that is
/// not pods' is masqueraded.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum DetectLocal {
    /// [`Config::cluster_cidrs`]; nothing if there are none.
    #[default]
    ClusterCidr,
    /// The node object's pod CIDRs.
    NodeCidr,
    /// A bridge's name.
    BridgeInterface(String),
    /// The beginning of the names of pods' interfaces.
    InterfaceNamePrefix(String),
}

/// The kernel's connection tracking limits (`conntrack:` of `KubeProxyConfiguration`); `None`
/// leaves the kernel's value as it is. They are set only in the network namespace of the proxy.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Conntrack {
    /// Entries per CPU; never lowers the kernel's value. `Some(0)` leaves it too.
    pub max_per_core: Option<u32>,
    /// Lower bound of the table's size whatever the number of CPUs.
    pub min: Option<u32>,
    /// `nf_conntrack_tcp_timeout_established`.
    pub tcp_established_timeout: Option<Duration>,
    /// `nf_conntrack_tcp_timeout_close_wait`.
    pub tcp_close_wait_timeout: Option<Duration>,
    /// `nf_conntrack_tcp_be_liberal`.
    pub tcp_be_liberal: bool,
    /// `nf_conntrack_udp_timeout`.
    pub udp_timeout: Option<Duration>,
    /// `nf_conntrack_udp_timeout_stream`.
    pub udp_stream_timeout: Option<Duration>,
}

/// Configuration of the proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Backend.
    pub mode: Mode,
    /// This node's name, for logs and reports.
    pub node_name: String,
    /// Masquerade all traffic to cluster IPs (`masqueradeAll`).
    pub masquerade_all: bool,
    /// CIDRs of the cluster's pods (`clusterCIDR`).
    pub cluster_cidrs: Vec<Cidr>,
    /// How pods' traffic is told.
    pub detect_local: DetectLocal,
    /// CIDRs of cluster IPs, if known: traffic to an unallocated one is dropped (nftables).
    pub service_cidrs: Vec<Cidr>,
    /// On which local addresses NodePorts are served; empty is all of them, with 127.0.0.1.
    pub node_port_addresses: Vec<NodePortAddresses>,
    /// NodePorts at 127.0.0.1 too (`localhostNodePorts`); IPv6 has no such thing.
    pub localhost_node_ports: bool,
    /// Bit of the packet mark that asks for masquerading (`masqueradeBit`), 0 to 31.
    pub masquerade_bit: u8,
    /// Where `/healthz` and `/livez` are served; `None` serves neither.
    pub healthz_bind: Option<SocketAddr>,
    /// Where `/metrics` and `/proxyMode` are served; `None` serves neither.
    pub metrics_bind: Option<SocketAddr>,
    /// Connection tracking limits.
    pub conntrack: Conntrack,
    /// How often the kernel's rules are compared with the desired ones without a reason
    /// (`syncPeriod`): the slow safety net.
    pub sync_period: Duration,
    /// Whether to set the sysctls that forwarding needs.
    pub set_sysctls: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mode: Mode::Auto,
            node_name: String::new(),
            masquerade_all: false,
            cluster_cidrs: Vec::new(),
            detect_local: DetectLocal::default(),
            service_cidrs: Vec::new(),
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
            masquerade_bit: 14,
            healthz_bind: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics_bind: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            conntrack: Conntrack::default(),
            sync_period: Duration::from_secs(300),
            set_sysctls: true,
        }
    }
}

impl Config {
    /// How pods' traffic is told, given what is known of the node.
    pub fn local_traffic(&self, node: &crate::object::NodeState) -> LocalTraffic {
        let cidrs = |cidrs: &[Cidr]| match cidrs {
            [] => LocalTraffic::Unknown,
            some => LocalTraffic::Cidrs(some.iter().map(|cidr| cidr.network()).collect()),
        };
        match &self.detect_local {
            DetectLocal::ClusterCidr => cidrs(&self.cluster_cidrs),
            DetectLocal::NodeCidr => cidrs(&node.pod_cidrs),
            DetectLocal::BridgeInterface(name) => LocalTraffic::Interface(name.clone()),
            DetectLocal::InterfaceNamePrefix(prefix) => {
                LocalTraffic::InterfacePrefix(prefix.clone())
            }
        }
    }

    /// Where NodePorts are served: local addresses within these CIDRs; `None` is all of them.
    pub fn node_port_cidrs(&self, node: &crate::object::NodeState) -> Option<Vec<Cidr>> {
        if self.node_port_addresses.is_empty() {
            return None;
        }
        let mut all = Vec::new();
        for entry in &self.node_port_addresses {
            match entry {
                NodePortAddresses::Cidr(cidr) => all.push(cidr.network()),
                NodePortAddresses::Primary => all.extend(node.addresses.iter().map(|address| {
                    Cidr { address: *address, prefix_len: if address.is_ipv4() { 32 } else { 128 } }
                })),
            }
        }
        Some(all)
    }
}
