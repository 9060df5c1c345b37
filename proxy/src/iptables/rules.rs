//! Services as iptables rules, in the words of `iptables-save`, so that a restart can compare.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::backend::Environment;
use crate::config::LocalTraffic;
use crate::object::{Cidr, NamespacedName, Protocol};
use crate::plan::{PortPlan, ServicePlan};

/// Names of own chains, upstream's where it has one for the purpose: so that whoever comes after us
/// finds what it would have made itself.
const NAMES: [&str; 11] = [
    "KUBE-SERVICES",
    "KUBE-VIPS",
    "KUBE-NODEPORTS",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-FIREWALL",
    "KUBE-PROXY-FIREWALL",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-OFF-CLUSTER",
    // Upstream's sign that nobody has flushed the table.
    "KUBE-PROXY-CANARY",
];
/// Beginnings of the names of chains of one Service or endpoint.
const PREFIXES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-"];

/// Whether a chain is one that this proxy or upstream's makes. Others have names with `KUBE-` too:
/// kubelet, network policies, host ports.
pub fn is_own(chain: &str) -> bool {
    NAMES.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// An iptables table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Translation.
    Nat,
    /// Filtering.
    Filter,
}

impl Table {
    /// Both.
    pub const ALL: [Table; 2] = [Table::Nat, Table::Filter];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Table::Nat => "nat",
            Table::Filter => "filter",
        }
    }
}

/// A chain in a table.
pub type ChainKey = (Table, String);

/// Jumps from the kernel's chains to ours, in upstream's words: table, chain, rule. Each is put
/// before the ones above it. They are set one by one, so those that send packets to endpoints come
/// last: by then such packets are masqueraded, and filtered.
pub const ANCHORS: [(Table, &str, &str); 14] = [
    (
        Table::Nat,
        "POSTROUTING",
        "-m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING",
    ),
    (
        Table::Filter,
        "FORWARD",
        "-m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD",
    ),
    (
        Table::Filter,
        "INPUT",
        "-m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS",
    ),
    (Table::Filter, "FORWARD", PORTALS),
    (Table::Filter, "OUTPUT", PORTALS),
    (Table::Filter, "INPUT", EXTERNAL_PORTALS),
    (Table::Filter, "FORWARD", EXTERNAL_PORTALS),
    (Table::Filter, "INPUT", LB_FIREWALL),
    (Table::Filter, "OUTPUT", LB_FIREWALL),
    (Table::Filter, "FORWARD", LB_FIREWALL),
    (Table::Filter, "INPUT", "-j KUBE-FIREWALL"),
    (Table::Filter, "OUTPUT", "-j KUBE-FIREWALL"),
    (Table::Nat, "PREROUTING", PORTALS_NAT),
    (Table::Nat, "OUTPUT", PORTALS_NAT),
];
const PORTALS_NAT: &str = "-m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES";
const PORTALS: &str = "-m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES";
const EXTERNAL_PORTALS: &str = "-m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES";
const LB_FIREWALL: &str = "-m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL";

/// Rules of one Service, or of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Chains of its own, whole.
    pub chains: BTreeMap<ChainKey, Vec<String>>,
    /// Its rules in chains that all Services share.
    pub shared: BTreeSet<(Table, &'static str, String)>,
}

/// Chains that Services share, by table; their rules have no order among each other.
pub const SHARED: [(Table, &str); 6] = [
    (Table::Nat, "KUBE-VIPS"),
    (Table::Nat, "KUBE-NODEPORTS"),
    (Table::Filter, "KUBE-SERVICES"),
    (Table::Filter, "KUBE-EXTERNAL-SERVICES"),
    (Table::Filter, "KUBE-NODEPORTS"),
    (Table::Filter, "KUBE-PROXY-FIREWALL"),
];

/// A name for a chain that belongs to something: 13 letters of a 64-bit hash (FNV-1a).
fn chain(kind: &str, of: &str) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut hash = of.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut name = format!("KUBE-{kind}-");
    for _ in 0..13 {
        name.push(char::from(LETTERS[(hash & 31) as usize]));
        hash >>= 5;
    }
    name
}

fn whole(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

/// `-p tcp -m tcp --dport 80`.
fn to_port(protocol: Protocol, port: u16) -> String {
    format!("-p {protocol} -m {protocol} --dport {port}")
}

/// The share of a rule that takes one of `left`, as the kernel rounds it.
fn probability(left: usize) -> String {
    let scale = f64::from(1u32 << 31);
    format!("{:.11}", (scale / left as f64).round() / scale)
}

fn reject(ipv4: bool) -> String {
    let kind = if ipv4 { "icmp-port-unreachable" } else { "icmp6-port-unreachable" };
    format!("-j REJECT --reject-with {kind}")
}

/// Counts packets that are dropped as invalid; upstream's name.
pub const INVALID_COUNTER: &str = "ct_state_invalid_dropped_pkts";
/// Counts connections to NodePorts at 127.0.0.1; upstream's name.
pub const LOCALHOST_COUNTER: &str = "localhost_nps_accepted_pkts";

/// The part of a rule that counts, where the kernel can.
fn counter(environment: &Environment, name: &str) -> String {
    if environment.counters { format!(" -m nfacct --nfacct-name {name}") } else { String::new() }
}

/// Conditions of pods' traffic, one for each source.
fn from_pods(environment: &Environment, ipv4: bool) -> Vec<String> {
    match &environment.local {
        LocalTraffic::Unknown => Vec::new(),
        LocalTraffic::Cidrs(cidrs) => cidrs
            .iter()
            .filter(|cidr| cidr.address.is_ipv4() == ipv4)
            .map(|cidr| format!("-s {cidr}"))
            .collect(),
        LocalTraffic::Interface(name) => vec![format!("-i {name}")],
        LocalTraffic::InterfacePrefix(prefix) => vec![format!("-i {prefix}+")],
    }
}

/// The chains that do not depend on Services; a shared one has no rules here.
pub fn fixed(environment: &Environment, ipv4: bool) -> BTreeMap<ChainKey, Vec<String>> {
    let bit = environment.masquerade_bit;
    let mut chains: BTreeMap<ChainKey, Vec<String>> = BTreeMap::new();
    let mut put = |table, name: &str, rules: Vec<String>| {
        chains.insert((table, name.to_owned()), rules);
    };
    let mut services = vec!["-j KUBE-VIPS".to_owned()];
    let loopback = if ipv4 { "127.0.0.0/8" } else { "::1/128" };
    let local = "-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS";
    let of_family = |cidr: &&Cidr| cidr.is_ipv4() == ipv4;
    let everywhere = |cidrs: &Vec<Cidr>| cidrs.iter().filter(of_family).any(|c| c.prefix_len == 0);
    match environment.node_ports.as_ref().filter(|cidrs| !everywhere(cidrs)) {
        None if ipv4 && environment.localhost => services.push(local.to_owned()),
        None => services.push(format!("! -d {loopback} {local}")),
        Some(cidrs) => {
            if !(ipv4 && environment.localhost) {
                services.push(format!("-d {loopback} -j RETURN"));
            }
            services
                .extend(cidrs.iter().filter(of_family).map(|cidr| format!("-d {cidr} {local}")));
        }
    }
    put(Table::Nat, "KUBE-SERVICES", services);
    put(Table::Nat, "KUBE-MARK-MASQ", vec![format!("-j MARK --set-xmark {bit:#x}/{bit:#x}")]);
    let mut off_cluster: Vec<String> = from_pods(environment, ipv4)
        .into_iter()
        .map(|source| format!("{source} -j RETURN"))
        .collect();
    if environment.masquerade_all {
        off_cluster = vec!["-j KUBE-MARK-MASQ".to_owned()];
    } else if !off_cluster.is_empty() {
        off_cluster.push("-j KUBE-MARK-MASQ".to_owned());
    }
    put(Table::Nat, "KUBE-OFF-CLUSTER", off_cluster);
    put(
        Table::Nat,
        "KUBE-POSTROUTING",
        vec![
            format!("-m mark ! --mark {bit:#x}/{bit:#x} -j RETURN"),
            format!("-j MARK --set-xmark {bit:#x}/0x0"),
            "-j MASQUERADE --random-fully".to_owned(),
        ],
    );
    let mut guard = Vec::new();
    if ipv4 && environment.localhost {
        // The kernel lets 127.0.0.0/8 in from elsewhere (route_localnet): nobody may use that.
        guard.push(
            "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
                .to_owned(),
        );
    }
    put(Table::Filter, "KUBE-FIREWALL", guard);
    let mut forward = Vec::new();
    if environment.drop_invalid {
        let counter = counter(environment, INVALID_COUNTER);
        forward.push(format!("-m conntrack --ctstate INVALID{counter} -j DROP"));
    }
    forward.extend([
        format!("-m mark --mark {bit:#x}/{bit:#x} -j ACCEPT"),
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned(),
    ]);
    put(Table::Filter, "KUBE-FORWARD", forward);
    chains
}

struct Builder<'a> {
    rules: Rules,
    environment: &'a Environment,
    ipv4: bool,
    service: &'a NamespacedName,
}

impl Builder<'_> {
    fn shared(&mut self, table: Table, chain: &'static str, rule: String) {
        self.rules.shared.insert((table, chain, rule));
    }

    fn port(&mut self, plan: &PortPlan) {
        let id = format!("{}:{}:{}", self.service, plan.name, plan.protocol);
        let label = format!("{}:{}", self.service, plan.name);
        let comment = format!("-m comment --comment \"{label}\"");
        let (svc, svl, ext) = (chain("SVC", &id), chain("SVL", &id), chain("EXT", &id));
        let endpoint_chain = |e: &SocketAddr| chain("SEP", &format!("{id}:{e}"));
        let protocol = plan.protocol;
        let at = |ip: IpAddr| {
            format!("-d {} -p {protocol} {comment} -m {protocol} --dport {}", whole(ip), plan.port)
        };
        let bare = |ip: IpAddr| format!("-d {} {}", whole(ip), to_port(protocol, plan.port));
        let external = plan.node_port != 0 || !plan.external_ips.is_empty();

        for (name, endpoints, internal) in
            [(&svc, &plan.cluster, !plan.internal_local), (&svl, &plan.local, plan.internal_local)]
        {
            if endpoints.is_empty() {
                continue;
            }
            let mut rules = Vec::new();
            if internal {
                rules.push(format!("{} -j KUBE-OFF-CLUSTER", bare(plan.cluster_ip)));
            }
            if let Some(timeout) = plan.affinity {
                let mask = if self.ipv4 {
                    "255.255.255.255"
                } else {
                    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
                };
                rules.extend(endpoints.iter().map(|e| {
                    let sep = endpoint_chain(e);
                    format!(
                        "-m recent --rcheck --seconds {timeout} --reap --name {sep} --mask {mask} --rsource -j {sep}"
                    )
                }));
            }
            for (index, endpoint) in endpoints.iter().enumerate() {
                let sep = endpoint_chain(endpoint);
                let left = endpoints.len() - index;
                rules.push(if left == 1 {
                    format!("-j {sep}")
                } else {
                    let share = probability(left);
                    format!("-m statistic --mode random --probability {share} -j {sep}")
                });
                self.endpoint(plan, *endpoint, sep);
            }
            self.rules.chains.insert((Table::Nat, name.clone()), rules);
        }

        let nothing = |any: bool| if any { "-j DROP".to_owned() } else { reject(self.ipv4) };
        let verdict = nothing(plan.has_endpoints);
        if plan.has_internal_endpoints() {
            let to = if plan.internal_local { &svl } else { &svc };
            let rule = format!("{} -j {to}", at(plan.cluster_ip));
            self.shared(Table::Nat, "KUBE-VIPS", rule);
        } else {
            let rule = format!("{} {verdict}", at(plan.cluster_ip));
            self.shared(Table::Filter, "KUBE-SERVICES", rule);
        }
        if !external {
            return;
        }
        let usable = !plan.cluster.is_empty() || plan.has_external_endpoints();
        if usable {
            let rules = self.external(plan, &svc, &svl);
            self.rules.chains.insert((Table::Nat, ext.clone()), rules);
        }
        for ip in plan.external_ips.iter().filter(|ip| **ip != plan.cluster_ip) {
            let firewalled = plan.firewalled_ips.contains(ip);
            if usable {
                let to = if firewalled { chain("FW", &id) } else { ext.clone() };
                self.shared(Table::Nat, "KUBE-VIPS", format!("{} -j {to}", at(*ip)));
            }
            if firewalled && usable {
                // What the firewall chain lets through is translated, and so does not match.
                self.shared(Table::Filter, "KUBE-PROXY-FIREWALL", format!("{} -j DROP", at(*ip)));
            }
            if !plan.has_external_endpoints() {
                // As upstream, what this node itself sends there goes its way.
                let rule = format!("{} {verdict}", at(*ip));
                self.shared(Table::Filter, "KUBE-EXTERNAL-SERVICES", rule);
            }
        }
        if usable && !plan.firewalled_ips.is_empty() {
            let rules =
                plan.source_ranges.iter().map(|range| format!("-s {range} -j {ext}")).collect();
            self.rules.chains.insert((Table::Nat, chain("FW", &id)), rules);
        }
        if plan.node_port != 0 {
            let port = format!("-p {protocol} {comment} -m {protocol} --dport {}", plan.node_port);
            if usable {
                self.shared(Table::Nat, "KUBE-NODEPORTS", format!("{port} -j {ext}"));
            }
            if !plan.has_external_endpoints() {
                let rule = format!(
                    "-p {protocol} {comment} -m addrtype --dst-type LOCAL -m {protocol} --dport {} {verdict}",
                    plan.node_port
                );
                self.shared(Table::Filter, "KUBE-EXTERNAL-SERVICES", rule);
            }
        }
    }

    /// The chain for external traffic.
    fn external(&self, plan: &PortPlan, svc: &str, svl: &str) -> Vec<String> {
        let mut rules = Vec::new();
        if plan.node_port != 0 && self.ipv4 && self.environment.localhost {
            let counter = counter(self.environment, LOCALHOST_COUNTER);
            // It has no target: what it counts goes on.
            rules.extend((!counter.is_empty()).then(|| format!("-d 127.0.0.0/8{counter}")));
        }
        if !plan.external_local {
            rules.extend(["-j KUBE-MARK-MASQ".to_owned(), format!("-j {svc}")]);
            return rules;
        }
        if !plan.cluster.is_empty() {
            rules.extend(
                from_pods(self.environment, self.ipv4)
                    .into_iter()
                    .map(|source| format!("{source} -j {svc}")),
            );
            rules.push("-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ".to_owned());
            rules.push(format!("-m addrtype --src-type LOCAL -j {svc}"));
        }
        if !plan.local.is_empty() {
            rules.push(format!("-j {svl}"));
        }
        rules
    }

    /// The chain of an endpoint: masquerade what it sends to itself, then translate.
    fn endpoint(&mut self, plan: &PortPlan, endpoint: SocketAddr, name: String) {
        let protocol = plan.protocol;
        let mut translate = format!("-p {protocol}");
        if plan.affinity.is_some() {
            let mask = if self.ipv4 {
                "255.255.255.255"
            } else {
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
            };
            translate.push_str(&format!(" -m recent --set --name {name} --mask {mask} --rsource"));
        }
        translate.push_str(&format!(" -m {protocol} -j DNAT --to-destination {endpoint}"));
        let rules = vec![format!("-s {} -j KUBE-MARK-MASQ", whole(endpoint.ip())), translate];
        self.rules.chains.insert((Table::Nat, name), rules);
    }
}

/// The rules of a Service in one family.
pub fn of_service(
    service: &NamespacedName,
    plan: &ServicePlan,
    environment: &Environment,
    ipv4: bool,
) -> Rules {
    let mut builder = Builder { rules: Rules::default(), environment, ipv4, service };
    for port in plan.ports.iter().filter(|port| port.is_ipv4() == ipv4) {
        builder.port(port);
    }
    let number = plan.health_check_node_port;
    if number != 0 && plan.ports.iter().any(|port| port.is_ipv4() == ipv4) {
        // Load balancers ask there, whatever else is not let in.
        let rule = format!(
            "-p tcp -m comment --comment \"{service} health check node port\" -m tcp --dport {number} -j ACCEPT"
        );
        builder.shared(Table::Filter, "KUBE-NODEPORTS", rule);
    }
    builder.rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_an_endpoint_before_it_is_masqueraded_and_filtered() {
        let sends = |(table, chain, _): &(Table, &str, &str)| {
            *table == Table::Nat && *chain != "POSTROUTING"
        };
        let first = ANCHORS.iter().position(sends).unwrap_or(0);
        assert!(first > 0 && ANCHORS[first..].iter().all(sends), "{ANCHORS:?}");
    }
}
