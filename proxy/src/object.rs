//! Services and EndpointSlices as the proxy keeps them: only what decides about packets.
//!
//! The composition root turns API objects into these, so that the proxy needs no API client and
//! stays small at 50,000 Services.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedName {
    /// Namespace; never empty.
    pub namespace: Arc<str>,
    /// Object name.
    pub name: Arc<str>,
}

/// Transport protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, the default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Which endpoints a kind of traffic may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TrafficPolicy {
    /// All of the cluster's.
    #[default]
    Cluster,
    /// Only those on this node.
    Local,
}

/// A CIDR, `address/prefix_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    /// Network address.
    pub address: IpAddr,
    /// Prefix length, at most 32 or 128.
    pub prefix_len: u8,
}

impl std::fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

impl std::str::FromStr for Cidr {
    type Err = String;

    /// Parses `address/prefix`; host bits are cleared.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a CIDR such as 10.0.0.0/8 or fd00::/64");
        let (address, prefix_len) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix_len: u8 = prefix_len.parse().map_err(|_| wrong())?;
        if prefix_len > if address.is_ipv4() { 32 } else { 128 } {
            return Err(wrong());
        }
        Ok(Cidr { address, prefix_len }.network())
    }
}

impl Cidr {
    /// One address.
    pub fn whole(address: IpAddr) -> Self {
        Cidr { address, prefix_len: if address.is_ipv4() { 32 } else { 128 } }
    }

    /// Whether it is of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// The same network with the host bits cleared.
    pub fn network(self) -> Self {
        let address = match self.address {
            IpAddr::V4(a) => {
                let shift = 32 - u32::from(self.prefix_len.min(32));
                IpAddr::V4(
                    (a.to_bits().checked_shr(shift).unwrap_or(0).checked_shl(shift).unwrap_or(0))
                        .into(),
                )
            }
            IpAddr::V6(a) => {
                let shift = 128 - u32::from(self.prefix_len.min(128));
                IpAddr::V6(
                    (a.to_bits().checked_shr(shift).unwrap_or(0).checked_shl(shift).unwrap_or(0))
                        .into(),
                )
            }
        };
        Cidr { address, ..self }
    }

    /// Whether `address` lies within.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && Cidr { address, prefix_len: self.prefix_len }.network().address
                == self.network().address
    }
}

/// A Service that the proxy must serve. ExternalName and headless Services are left out by `Change`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Which Service.
    pub key: NamespacedName,
    /// `spec.clusterIPs`, at most one of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with ipMode VIP (or unset); ipMode Proxy is left out.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; empty allows everybody.
    pub load_balancer_source_ranges: Vec<Cidr>,
    /// The ports.
    pub ports: Vec<ServicePort>,
    /// ClientIP affinity with its timeout; `None` is no affinity.
    pub session_affinity: Option<Duration>,
    /// `spec.internalTrafficPolicy`.
    pub internal_traffic_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_traffic_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`, 0 for none.
    pub health_check_node_port: u16,
}

impl Service {
    /// Gives back the room that lists have to spare; there are tens of thousands of Services.
    pub(crate) fn shrink(&mut self) {
        for ips in [&mut self.cluster_ips, &mut self.external_ips, &mut self.load_balancer_ips] {
            ips.shrink_to_fit();
        }
        self.load_balancer_source_ranges.shrink_to_fit();
        self.ports.shrink_to_fit();
    }
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Port name; empty if the Service has a single unnamed port. Joins to a slice's port name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The port that clients use.
    pub port: u16,
    /// NodePort, 0 for none.
    pub node_port: u16,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Which slice.
    pub key: NamespacedName,
    /// Name of its Service (label `kubernetes.io/service-name`), same namespace.
    pub service: Arc<str>,
    /// Ports of every endpoint in it: name, protocol, number.
    pub ports: Vec<EndpointPort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// When what made the slice change happened (annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`), in milliseconds since the epoch.
    pub triggered: Option<i64>,
}

/// A port of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointPort {
    /// Joins to `ServicePort::name`.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the endpoint.
    pub port: u16,
}

/// One endpoint (its first address; further ones mean the same endpoint, KEP-752).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Address of the slice's family.
    pub address: IpAddr,
    /// `conditions.ready`, unset means true.
    pub ready: bool,
    /// `conditions.serving`, unset means true.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// Whether `nodeName` is this node.
    pub local: bool,
    /// Zone hints.
    pub zones: Vec<Arc<str>>,
    /// Node hints, as far as they concern this node.
    pub node_hint: NodeHint,
}

/// What an endpoint's node hints (`hints.forNodes`) say to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum NodeHint {
    /// There are none.
    #[default]
    None,
    /// Other nodes are to use it.
    Others,
    /// This node is to use it.
    Here,
}

/// One change in what the proxy must serve.
#[derive(Clone, Debug)]
pub enum Change {
    /// A Service is new or changed.
    Service(Service),
    /// A Service is gone, or is none that the proxy serves.
    ServiceGone(NamespacedName),
    /// A slice is new or changed.
    Slice(EndpointSlice),
    /// A slice is gone.
    SliceGone(NamespacedName),
    /// Services and slices have both been told completely once. Nothing of an earlier process's
    /// rules is taken away before this.
    Synced,
    /// Ranges of cluster IPs (ServiceCIDR objects): in nftables mode what goes to one that no Service
    /// has is dropped.
    ServiceCidrs(Vec<Cidr>),
    /// The node's own object: addresses for NodePorts, zone, whether it is being deleted.
    Node(NodeState),
    /// Why Services or slices cannot be had ("forbidden: ... run longshore cluster-setup"); shown
    /// in status. `None` clears it.
    SourceError(Option<String>),
}

/// What the proxy must know of its node.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NodeState {
    /// The node's object has been read: what it has no addresses of it will not have soon.
    pub known: bool,
    /// Addresses of type InternalIP, or where it has none of type ExternalIP.
    pub addresses: Vec<IpAddr>,
    /// Pod CIDRs of this node, for telling local from off-cluster traffic.
    pub pod_cidrs: Vec<Cidr>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// The node is being deleted (or carries ToBeDeletedByClusterAutoscaler): `/healthz` is 503.
    pub being_deleted: bool,
}

impl NodeState {
    /// The first address of each family: what upstream takes for the node's own.
    pub fn primary_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let first = |ipv4: bool| self.addresses.iter().find(move |a| a.is_ipv4() == ipv4).copied();
        [first(true), first(false)].into_iter().flatten()
    }
}
