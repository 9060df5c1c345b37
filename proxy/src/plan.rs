//! Which endpoints a Service's port reaches: named ports, traffic policies, topology hints, the
//! fallback to terminating endpoints. Pure; both backends program what is planned here.
//!
//! Rules: KEP-1669 (terminating endpoints), KEP-2086 (internal traffic policy), KEP-2433 (zone hints),
//! KEP-3015 (node hints). `trafficDistribution` is the control plane's to read: it becomes hints.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::object::{
    Cidr, Endpoint, EndpointSlice, NodeHint, Protocol, Service, ServicePort, TrafficPolicy,
};

/// What is programmed for one port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    /// Name of the port, empty for a single unnamed one.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port at the Service's addresses.
    pub port: u16,
    /// Port at the node's addresses, 0 for none.
    pub node_port: u16,
    /// The cluster IP; decides the family.
    pub cluster_ip: IpAddr,
    /// External and load-balancer IPs, sorted, each once.
    pub external_ips: Vec<IpAddr>,
    /// Load-balancer IPs to which only `source_ranges` may talk; empty without ranges.
    pub firewalled_ips: Vec<IpAddr>,
    /// Who may talk to `firewalled_ips`, none within another.
    pub source_ranges: Vec<Cidr>,
    /// Seconds that a client stays with its endpoint; `None` for no affinity.
    pub affinity: Option<u32>,
    /// Cluster IP traffic uses `local` endpoints.
    pub internal_local: bool,
    /// External traffic uses `local` endpoints.
    pub external_local: bool,
    /// Endpoints by policy Cluster, sorted; empty if the port never uses them.
    pub cluster: Vec<SocketAddr>,
    /// Endpoints by policy Local, sorted; empty if the port never uses them.
    pub local: Vec<SocketAddr>,
    /// Those of either that run on this node: they may talk to themselves.
    pub hairpin: Vec<SocketAddr>,
    /// Whether there is a usable endpoint anywhere, though maybe none for this node's traffic.
    pub has_endpoints: bool,
}

impl PortPlan {
    /// Whether cluster IP traffic reaches an endpoint.
    pub fn has_internal_endpoints(&self) -> bool {
        !self.internal().is_empty()
    }

    /// Whether external traffic from elsewhere reaches an endpoint.
    pub fn has_external_endpoints(&self) -> bool {
        !self.external().is_empty()
    }

    /// The endpoints of cluster IP traffic.
    pub fn internal(&self) -> &[SocketAddr] {
        if self.internal_local { &self.local } else { &self.cluster }
    }

    /// The endpoints of external traffic.
    pub fn external(&self) -> &[SocketAddr] {
        if self.external_local { &self.local } else { &self.cluster }
    }

    /// Whether the port is of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.cluster_ip.is_ipv4()
    }
}

/// What is programmed for a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// Its ports, in the order of the Service, IPv4 and IPv6.
    pub ports: Vec<PortPlan>,
    /// `healthCheckNodePort`, 0 for none.
    pub health_check_node_port: u16,
    /// Ready endpoints on this node, for the health check: addresses of IPv4 and IPv6, each once.
    pub local_ready: [usize; 2],
}

/// What must be known of the node.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// This node's name.
    pub node_name: Arc<str>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// Why an address cannot be an endpoint or a Service's address; `None` if it can.
pub fn unusable(address: IpAddr) -> Option<&'static str> {
    let address = match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => return Some("an IPv4-mapped address"),
        other => other,
    };
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() {
        Some("the unspecified address")
    } else if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else if link_local {
        Some("a link-local address")
    } else {
        None
    }
}

/// Of two that have one address the higher counts: the pod that has taken over the address of one
/// that ends, whatever its state.
fn rank(endpoint: &Endpoint) -> (bool, bool, bool) {
    (!endpoint.terminating, endpoint.ready, endpoint.serving)
}

/// The endpoints of a port by address; of several slices that hold one, the best wins.
pub(crate) fn candidates<'a>(
    port: &ServicePort,
    ipv4: bool,
    slices: &[&'a EndpointSlice],
) -> BTreeMap<SocketAddr, &'a Endpoint> {
    let mut found: BTreeMap<SocketAddr, &'a Endpoint> = BTreeMap::new();
    for slice in slices {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol && p.port != 0);
        for number in numbers {
            for endpoint in &slice.endpoints {
                if endpoint.address.is_ipv4() != ipv4 || unusable(endpoint.address).is_some() {
                    continue;
                }
                let address = SocketAddr::new(endpoint.address, number.port);
                let better = found.get(&address).is_none_or(|old| rank(endpoint) > rank(old));
                if better {
                    found.insert(address, endpoint);
                }
            }
        }
    }
    found
}

/// The addresses of a port that were granted to it (another Service may hold one already).
#[derive(Clone, Debug)]
pub struct Granted {
    /// The cluster IP.
    pub cluster_ip: IpAddr,
    /// External IPs of the same family.
    pub external_ips: Vec<IpAddr>,
    /// Load-balancer IPs of the same family.
    pub load_balancer_ips: Vec<IpAddr>,
    /// NodePort, 0 for none.
    pub node_port: u16,
}

/// Plans one port in one family.
pub fn plan_port(
    service: &Service,
    port: &ServicePort,
    granted: Granted,
    slices: &[&EndpointSlice],
    topology: &Topology,
) -> PortPlan {
    let ipv4 = granted.cluster_ip.is_ipv4();
    let mut external_ips = granted.external_ips;
    external_ips.extend(&granted.load_balancer_ips);
    external_ips.sort_unstable();
    external_ips.dedup();
    let externally_accessible = granted.node_port != 0 || !external_ips.is_empty();
    let internal_local = service.internal_traffic_policy == TrafficPolicy::Local;
    let external_local =
        externally_accessible && service.external_traffic_policy == TrafficPolicy::Local;
    // Even with policy Local outside, this node's own traffic takes the endpoints of the cluster.
    let uses_cluster = !internal_local || externally_accessible;
    let uses_local = internal_local || external_local;

    let found = candidates(port, ipv4, slices);
    let of = |keep: &dyn Fn(&Endpoint) -> bool| -> Vec<SocketAddr> {
        found.iter().filter(|(_, e)| keep(e)).map(|(address, _)| *address).collect()
    };
    let fallback = |e: &Endpoint| e.serving && e.terminating;
    let has_endpoints = found.values().any(|e| e.ready || fallback(e));
    let mut cluster = Vec::new();
    if uses_cluster {
        let near = prefer(found.values().copied(), topology);
        cluster = of(&|e| e.ready && near.allows(e));
        if cluster.is_empty() {
            cluster = of(&fallback);
        }
    }
    let mut local = Vec::new();
    if uses_local {
        local = of(&|e| e.local && e.ready);
        if local.is_empty() {
            local = of(&|e| e.local && fallback(e));
        }
    }
    let mut hairpin: Vec<SocketAddr> = cluster
        .iter()
        .chain(&local)
        .filter(|address| found.get(address).is_some_and(|e| e.local))
        .copied()
        .collect();
    hairpin.sort_unstable();
    hairpin.dedup();

    let mut source_ranges: Vec<Cidr> = service
        .load_balancer_source_ranges
        .iter()
        .filter(|range| range.address.is_ipv4() == ipv4)
        .filter(|range| range.prefix_len <= if ipv4 { 32 } else { 128 })
        .map(|range| range.network())
        .collect();
    // As upstream: ranges of one family say nothing of the other, and one that is everything is none.
    let restricted =
        service.load_balancer_source_ranges.iter().any(|range| range.is_ipv4() == ipv4)
            && !source_ranges.iter().any(|range| range.prefix_len == 0);
    let mut firewalled_ips = Vec::new();
    if restricted && !granted.load_balancer_ips.is_empty() {
        // A load balancer's address is often the node's too: its own traffic then comes from it.
        let own = topology.addresses.iter().find(|address| address.is_ipv4() == ipv4);
        if own.is_some_and(|own| source_ranges.iter().any(|range| range.contains(*own))) {
            source_ranges.extend(granted.load_balancer_ips.iter().copied().map(Cidr::whole));
        }
        firewalled_ips = granted.load_balancer_ips;
        firewalled_ips.sort_unstable();
        firewalled_ips.dedup();
    }
    PortPlan {
        name: port.name.clone(),
        protocol: port.protocol,
        port: port.port,
        node_port: granted.node_port,
        cluster_ip: granted.cluster_ip,
        external_ips,
        source_ranges: if firewalled_ips.is_empty() { Vec::new() } else { disjoint(source_ranges) },
        firewalled_ips,
        affinity: service.session_affinity.map(|timeout| match timeout.as_secs() {
            0 => 10_800,
            seconds => u32::try_from(seconds.min(86_400)).unwrap_or(86_400),
        }),
        internal_local,
        external_local,
        cluster,
        local,
        hairpin,
        has_endpoints,
    }
}

/// Which ready endpoints are near enough, of all that a port has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prefer {
    /// All are.
    Any,
    /// Those with a hint for this node (`PreferSameNode`).
    SameNode,
    /// Those with a hint for this zone (`PreferSameZone`, topology-aware routing).
    SameZone(Arc<str>),
}

impl Prefer {
    /// Whether an endpoint is near enough.
    pub fn allows(&self, endpoint: &Endpoint) -> bool {
        match self {
            Prefer::Any => true,
            Prefer::SameNode => endpoint.node_hint == NodeHint::Here,
            Prefer::SameZone(zone) => endpoint.zones.contains(zone),
        }
    }
}

/// Hints hold only if every ready endpoint has one and one of them is for us: node hints first,
/// then zone hints. Otherwise a half-updated slice could leave nodes without endpoints.
pub fn prefer<'a>(endpoints: impl Iterator<Item = &'a Endpoint>, topology: &Topology) -> Prefer {
    let (mut any, mut here, mut in_zone) = (false, false, false);
    let (mut all_nodes, mut all_zones) = (true, true);
    for endpoint in endpoints.filter(|e| e.ready) {
        any = true;
        all_nodes &= endpoint.node_hint != NodeHint::None;
        here |= endpoint.node_hint == NodeHint::Here;
        all_zones &= !endpoint.zones.is_empty();
        in_zone |= topology.zone.as_ref().is_some_and(|zone| endpoint.zones.contains(zone));
    }
    match &topology.zone {
        _ if any && all_nodes && here => Prefer::SameNode,
        Some(zone) if any && all_zones && in_zone => Prefer::SameZone(zone.clone()),
        _ => Prefer::Any,
    }
}

/// Drops ranges that lie within others: two CIDRs are disjoint or one holds the other.
fn disjoint(mut ranges: Vec<Cidr>) -> Vec<Cidr> {
    ranges.sort_unstable_by_key(|r| (r.prefix_len, r.address));
    let mut kept: Vec<Cidr> = Vec::with_capacity(ranges.len());
    for range in ranges {
        if !kept.iter().any(|k| k.prefix_len <= range.prefix_len && k.contains(range.address)) {
            kept.push(range);
        }
    }
    kept.sort_unstable();
    kept
}

/// Ready endpoints of the Service on this node, for its health check port, by family: load balancers
/// of one family ask at an address of it.
pub fn local_ready(slices: &[&EndpointSlice]) -> [usize; 2] {
    let of_family = |ipv4: bool| {
        let mut addresses: Vec<IpAddr> = slices
            .iter()
            .flat_map(|slice| &slice.endpoints)
            .filter(|e| e.local && e.ready && e.address.is_ipv4() == ipv4)
            .map(|e| e.address)
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.len()
    };
    [of_family(true), of_family(false)]
}
