//! What the proxy is told at start: the options of `KubeProxyConfiguration` that decide about
//! packets, as plain data, so that the crate needs no YAML and no API client.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::object::{Cidr, NodeState};

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
    /// The node's address of that family, whatever the Node object says (`bindAddress`).
    pub bind_address: Option<IpAddr>,
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
    /// End if one of these two is taken, instead of trying again (`bindAddressHardFail`).
    pub bind_hard_fail: bool,
    /// `oom_score_adj` of this process, where it has nothing else to do.
    pub oom_score_adj: Option<i32>,
    /// Connection tracking limits.
    pub conntrack: Conntrack,
    /// How often the kernel's rules are compared with the desired ones without a reason
    /// (`syncPeriod`): the slow safety net.
    pub sync_period: Duration,
    /// Least time from the end of one change of the rules to the next (`minSyncPeriod`); zero lets
    /// every change go at once. Repairs of what others changed do not wait.
    pub min_sync_period: Duration,
    /// A change may wait so long before the proxy is unhealthy.
    pub health_timeout: Duration,
    /// Whether to set the sysctls that forwarding needs.
    pub set_sysctls: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mode: Mode::Auto,
            node_name: String::new(),
            bind_address: None,
            masquerade_all: false,
            cluster_cidrs: Vec::new(),
            detect_local: DetectLocal::default(),
            service_cidrs: Vec::new(),
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
            masquerade_bit: 14,
            healthz_bind: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics_bind: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            bind_hard_fail: false,
            oom_score_adj: None,
            conntrack: Conntrack::default(),
            sync_period: Duration::from_secs(300),
            min_sync_period: Duration::ZERO,
            health_timeout: Duration::from_secs(60),
            set_sysctls: true,
        }
    }
}

impl Config {
    /// How pods' traffic is told, given what is known of the node.
    pub fn local_traffic(&self, node: &NodeState) -> LocalTraffic {
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

    /// The node as it is told, with the address that the configuration gives it.
    pub fn own_node(&self, mut node: NodeState) -> NodeState {
        if let Some(own) = self.bind_address {
            node.addresses.retain(|address| address.is_ipv4() != own.is_ipv4());
            node.addresses.insert(0, own);
        }
        node
    }

    /// Where NodePorts are served: local addresses within these CIDRs; `None` is all of them. As
    /// with upstream, a family that no entry speaks of is served everywhere.
    pub fn node_port_cidrs(&self, node: &NodeState) -> Option<Vec<Cidr>> {
        if self.node_port_addresses.is_empty() {
            return None;
        }
        let mut all = Vec::new();
        let mut unknown = false;
        for entry in &self.node_port_addresses {
            match entry {
                NodePortAddresses::Cidr(cidr) => all.push(cidr.network()),
                NodePortAddresses::Primary => {
                    // Until the node's addresses are known there is nothing to serve at.
                    unknown = node.addresses.is_empty() && !node.known;
                    all.extend(node.primary_addresses().map(Cidr::whole));
                }
            }
        }
        for everything in [[0; 4].into(), [0; 16].into()] {
            let everything = Cidr { address: everything, prefix_len: 0 };
            if !unknown && !all.iter().any(|cidr| cidr.is_ipv4() == everything.is_ipv4()) {
                all.push(everything);
            }
        }
        Some(all)
    }

    /// Whether NodePorts are served at 127.0.0.1, which needs a sysctl and a guard.
    pub fn serves_loopback(&self) -> bool {
        let loopback = Cidr { address: [127, 0, 0, 0].into(), prefix_len: 8 };
        let mut ipv4 = self.node_port_addresses.iter().filter_map(|entry| match entry {
            NodePortAddresses::Primary => Some(None),
            NodePortAddresses::Cidr(cidr) => cidr.is_ipv4().then_some(Some(cidr)),
        });
        let Some(first) = ipv4.next() else { return self.localhost_node_ports };
        let within =
            |cidr: &Cidr| cidr.contains(loopback.address) || loopback.contains(cidr.address);
        self.localhost_node_ports && std::iter::once(first).chain(ipv4).flatten().any(within)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn at(entries: &[&str], node: &[&str]) -> (Option<Vec<String>>, bool) {
        let config = Config {
            node_port_addresses: entries.iter().map(|text| text.parse().unwrap()).collect(),
            ..Config::default()
        };
        let addresses = node.iter().map(|text| text.parse().unwrap()).collect();
        let node = NodeState { addresses, ..NodeState::default() };
        let cidrs = config.node_port_cidrs(&node);
        let cidrs = cidrs.map(|all| all.iter().map(ToString::to_string).collect());
        (cidrs, config.serves_loopback())
    }

    #[test]
    fn a_family_that_no_entry_speaks_of_has_node_ports_everywhere() {
        let some = |cidrs: &[&str]| Some(cidrs.iter().map(|text| (*text).to_owned()).collect());
        assert_eq!(at(&[], &[]), (None, true));
        assert_eq!(at(&["10.0.0.0/8"], &[]), (some(&["10.0.0.0/8", "::/0"]), false));
        assert_eq!(at(&["fd00::/8"], &[]), (some(&["fd00::/8", "0.0.0.0/0"]), true));
        assert!(at(&["127.0.0.0/8"], &[]).1);
        assert!(at(&["127.0.0.1/32", "10.0.0.0/8"], &[]).1);
        assert!(at(&["0.0.0.0/0"], &[]).1);
        assert_eq!(
            at(&["primary"], &["10.0.0.1", "fd00::1", "10.0.0.2"]),
            (some(&["10.0.0.1/32", "fd00::1/128"]), false)
        );
        assert_eq!(at(&["primary"], &["10.0.0.1"]).0, some(&["10.0.0.1/32", "::/0"]));
        assert_eq!(at(&["primary"], &[]).0, Some(vec![]));
        assert_eq!(at(&["primary", "127.0.0.0/8"], &[]), (some(&["127.0.0.0/8"]), true));
        // A node without addresses is served everywhere.
        let config =
            Config { node_port_addresses: vec![NodePortAddresses::Primary], ..Config::default() };
        let cidrs = config.node_port_cidrs(&NodeState { known: true, ..NodeState::default() });
        assert_eq!(cidrs.unwrap().len(), 2);
    }

    #[test]
    fn the_configured_address_takes_the_place_of_the_nodes_own() {
        let config = Config { bind_address: "10.9.9.9".parse().ok(), ..Config::default() };
        let addresses = ["10.0.0.1", "fd00::1"].iter().map(|a| a.parse().unwrap()).collect();
        let node = config.own_node(NodeState { addresses, ..NodeState::default() });
        let told: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["10.9.9.9", "fd00::1"]);
    }
}
