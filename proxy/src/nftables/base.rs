//! The chains that every node has: hooks, dispatch, reject, firewall, masquerading.

use std::net::IpAddr;

use nft::{
    Address, BaseChain, ChainType, CmpOp, CtKey, Expr, Family, Hook, MetaKey, REG, RejectKind,
    Verdict,
};

use super::chains::{key, load, mark, words};
use super::entries::REJECT;
use super::names::{Dispatch, MapId, Origin};
use crate::backend::Environment;
use crate::config::LocalTraffic;
use crate::object::Cidr;

/// What decides about the fixed chains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structure {
    /// Family of the table.
    pub family: Family,
    /// What the node is configured with.
    pub environment: Environment,
}

/// A rule with what it is for.
pub type Described = (&'static str, Vec<Expr>);

/// A fixed chain: name, hook, rules.
pub type FixedChain = (&'static str, Option<BaseChain>, Vec<Described>);

/// The chain where traffic to Services begins.
const SERVICES: &str = "services";

fn base(chain_type: ChainType, hook: Hook, priority: i32) -> Option<BaseChain> {
    Some(BaseChain { chain_type, hook, priority })
}

fn jump(chain: &str) -> Expr {
    Expr::Verdict(Verdict::Jump(chain.to_owned()))
}

fn new_jump(chain: &str) -> Vec<Expr> {
    let mut exprs = Expr::has_ct(CtKey::State, 8).to_vec();
    exprs.push(jump(chain));
    exprs
}

impl Structure {
    fn of_family<'a>(&self, cidrs: &'a [Cidr]) -> impl Iterator<Item = &'a Cidr> {
        let ipv4 = self.family == Family::Ip;
        cidrs.iter().filter(move |cidr| cidr.address.is_ipv4() == ipv4)
    }

    /// The expressions that find what packets meet: the key's number, then the number's chain.
    fn lookups(&self, dispatch: Dispatch) -> Vec<Expr> {
        // One register is left before the key, see `kinds::value`.
        let (mut exprs, _) = key(dispatch.origin(), self.family, REG + 1);
        exprs.extend([
            Expr::LookupMap { set: MapId::Numbers(dispatch).to_string(), sreg: REG + 1, dreg: REG },
            Expr::LookupVerdict { set: dispatch.leads_by().to_string(), sreg: REG + 1 },
        ]);
        exprs
    }

    /// One list of conditions for each kind of traffic from this node or its pods.
    fn inside(&self) -> Vec<Vec<Expr>> {
        let mut all = vec![Expr::is_local(Address::Source, false).to_vec()];
        match &self.environment.local {
            LocalTraffic::Unknown => {}
            LocalTraffic::Cidrs(cidrs) => {
                all.extend(self.of_family(cidrs).map(|cidr| {
                    Expr::in_network(Address::Source, cidr.address, cidr.prefix_len, false)
                }));
            }
            LocalTraffic::Interface(name) => all.push(interface(name, CmpOp::Eq)),
            LocalTraffic::InterfacePrefix(prefix) => {
                all.push(interface_prefix(prefix, CmpOp::Eq));
            }
        }
        all
    }

    /// Conditions of traffic from elsewhere; `None` if that cannot be told.
    fn outside(&self) -> Option<Vec<Expr>> {
        match &self.environment.local {
            LocalTraffic::Unknown => None,
            LocalTraffic::Cidrs(cidrs) => {
                let exprs: Vec<Expr> = self
                    .of_family(cidrs)
                    .flat_map(|c| Expr::in_network(Address::Source, c.address, c.prefix_len, true))
                    .collect();
                (!exprs.is_empty()).then_some(exprs)
            }
            LocalTraffic::Interface(name) => Some(interface(name, CmpOp::Neq)),
            LocalTraffic::InterfacePrefix(prefix) => Some(interface_prefix(prefix, CmpOp::Neq)),
        }
    }

    /// One list of conditions for each kind of address that serves NodePorts.
    fn at_node(&self) -> Vec<Vec<Expr>> {
        let local = || Expr::is_local(Address::Destination, false).to_vec();
        let not_loopback = || {
            let (address, len): (IpAddr, u8) = match self.family {
                Family::Ip => (IpAddr::from([127, 0, 0, 0]), 8),
                _ => (IpAddr::from(std::net::Ipv6Addr::LOCALHOST), 128),
            };
            Expr::in_network(Address::Destination, address, len, true)
        };
        let loopback_served = self.environment.localhost && self.family == Family::Ip;
        let everywhere = |cidrs: &Vec<Cidr>| self.of_family(cidrs).any(|c| c.prefix_len == 0);
        match self.environment.node_ports.as_ref().filter(|cidrs| !everywhere(cidrs)) {
            None if loopback_served => vec![local()],
            None => vec![[local(), not_loopback()].concat()],
            Some(cidrs) => self
                .of_family(cidrs)
                .map(|c| {
                    let within =
                        Expr::in_network(Address::Destination, c.address, c.prefix_len, false);
                    let not = if loopback_served { Vec::new() } else { not_loopback() };
                    [local(), within, not].concat()
                })
                .collect(),
        }
    }

    fn daddr_in(&self, map: MapId) -> Vec<Expr> {
        vec![
            load(self.family, Address::Destination, REG),
            Expr::Lookup { set: map.to_string(), sreg: REG, invert: false },
        ]
    }

    /// Every fixed chain; a chain comes after those that it jumps to.
    pub fn chains(&self) -> Vec<FixedChain> {
        let family = self.family;
        let mut services = Vec::new();
        let to_cluster_ip = self.daddr_in(MapId::ClusterIps);
        let masquerade = mark(self.environment.masquerade_bit).to_vec();
        if self.environment.masquerade_all {
            services.push(("masquerade all to cluster IPs", [to_cluster_ip, masquerade].concat()));
        } else if let Some(outside) = self.outside() {
            services.push((
                "masquerade off-cluster to cluster IPs",
                [to_cluster_ip, outside, masquerade].concat(),
            ));
        }
        let mut node_ports = Vec::new();
        for inside in self.inside() {
            let within = |dispatch| [inside.clone(), self.lookups(dispatch)].concat();
            let vips = "from this node or its pods, by map @inside-service-kinds";
            let ports = "from this node or its pods, by map @inside-node-port-kinds";
            services.push((vips, within(Dispatch::Inside(Origin::Vip))));
            node_ports.push((ports, within(Dispatch::Inside(Origin::NodePort))));
        }
        services.push(("services, by map @service-kinds", self.lookups(Dispatch::Services)));
        node_ports.push(("NodePorts, by map @node-port-kinds", self.lookups(Dispatch::NodePorts)));
        let mut no_node_ports = Vec::new();
        for at_node in self.at_node() {
            services.push(("to this node", [at_node.clone(), vec![jump("node-ports")]].concat()));
            let none = "NodePorts without endpoints, by map @no-endpoint-node-port-kinds";
            let found = self.lookups(Dispatch::NoEndpoints(Origin::NodePort));
            no_node_ports.push((none, [at_node, found].concat()));
        }

        let (mut firewalled, after) = key(Origin::Vip, family, REG);
        firewalled.extend([
            Expr::Lookup { set: MapId::Firewalled.to_string(), sreg: REG, invert: false },
            load(family, Address::Source, after),
            Expr::Lookup { set: MapId::FirewallSources.to_string(), sreg: REG, invert: true },
            Expr::Verdict(Verdict::Drop),
        ]);
        let mut cluster_ips = vec![(
            "ports that no Service has",
            [self.daddr_in(MapId::ClusterIps), vec![Expr::Reject(RejectKind::PortUnreachable)]]
                .concat(),
        )];
        for cidr in self.of_family(&self.environment.service_cidrs) {
            let mut exprs =
                Expr::in_network(Address::Destination, cidr.address, cidr.prefix_len, false);
            exprs.push(Expr::Verdict(Verdict::Drop));
            cluster_ips.push(("cluster IPs that no Service has", exprs));
        }

        let none = "services without endpoints, by map @no-endpoint-kinds";
        let no_endpoints = vec![(none, self.lookups(Dispatch::NoEndpoints(Origin::Vip)))];
        let mut pre_dnat = Vec::new();
        if self.environment.localhost && family == Family::Ip {
            // The kernel lets 127.0.0.0/8 in from other interfaces once NodePorts are served
            // there (route_localnet): nobody else may use that.
            let mut exprs = Expr::is_interface(MetaKey::Iifname, "lo", true).to_vec();
            let loopback = IpAddr::from([127, 0, 0, 0]);
            exprs.extend(Expr::in_network(Address::Destination, loopback, 8, false));
            exprs.push(Expr::Verdict(Verdict::Drop));
            pre_dnat.push(("loopback from elsewhere", exprs));
        }
        pre_dnat.push(("source ranges", new_jump("firewall")));
        let filter = ChainType::Filter;
        vec![
            (REJECT, None, vec![("reject", vec![Expr::Reject(RejectKind::PortUnreachable)])]),
            ("firewall", None, vec![("source ranges", firewalled)]),
            ("no-endpoints", None, no_endpoints),
            ("no-endpoints-node-ports", None, no_node_ports),
            ("cluster-ips", None, cluster_ips),
            ("node-ports", None, node_ports),
            (SERVICES, None, services),
            ("masquerading", None, self.masquerading()),
            ("filter-prerouting-pre-dnat", base(filter, Hook::Prerouting, -110), pre_dnat),
            (
                "filter-output-pre-dnat",
                base(filter, Hook::Output, -110),
                vec![("source ranges", new_jump("firewall"))],
            ),
            (
                "filter-input",
                base(filter, Hook::Input, 0),
                vec![
                    ("NodePorts", new_jump("no-endpoints-node-ports")),
                    ("services", new_jump("no-endpoints")),
                ],
            ),
            (
                "filter-forward",
                base(filter, Hook::Forward, 0),
                vec![
                    ("services", new_jump("no-endpoints")),
                    ("other ports", new_jump("cluster-ips")),
                ],
            ),
            (
                "filter-output",
                base(filter, Hook::Output, 0),
                vec![
                    ("NodePorts", new_jump("no-endpoints-node-ports")),
                    ("services", new_jump("no-endpoints")),
                    ("other ports", new_jump("cluster-ips")),
                ],
            ),
            (
                "nat-prerouting",
                base(ChainType::Nat, Hook::Prerouting, -100),
                vec![("services", vec![jump("services")])],
            ),
            (
                "nat-output",
                base(ChainType::Nat, Hook::Output, -100),
                vec![("services", vec![jump("services")])],
            ),
            (
                "nat-postrouting",
                base(ChainType::Nat, Hook::Postrouting, 100),
                vec![("masquerade", vec![jump("masquerading")])],
            ),
        ]
    }

    fn masquerading(&self) -> Vec<(&'static str, Vec<Expr>)> {
        let bit = self.environment.masquerade_bit;
        let masked = |mask: u32, xor: u32| Expr::Bitwise {
            sreg: REG,
            dreg: REG,
            op: nft::BitwiseOp {
                mask: mask.to_ne_bytes().to_vec(),
                xor: xor.to_ne_bytes().to_vec(),
            },
        };
        let read = Expr::Meta { key: MetaKey::Mark, dreg: REG };
        let marked = vec![
            read.clone(),
            masked(bit, 0),
            Expr::cmp(REG, CmpOp::Neq, &[0; 4]),
            read,
            // The mark is taken off, lest the packet is masqueraded once more elsewhere.
            masked(!bit, 0),
            Expr::MetaSet { key: MetaKey::Mark, sreg: REG },
            Expr::Masquerade { fully_random: true },
        ];
        let mut hairpin = Expr::has_ct(CtKey::Status, 32).to_vec();
        let after = REG + words(self.family);
        hairpin.push(load(self.family, Address::Source, REG));
        hairpin.extend(key(Origin::Vip, self.family, after).0);
        hairpin.extend([
            Expr::Lookup { set: MapId::Hairpin.to_string(), sreg: REG, invert: false },
            Expr::Masquerade { fully_random: true },
        ]);
        vec![("marked", marked), ("pods that talk to themselves", hairpin)]
    }
}

fn interface(name: &str, op: CmpOp) -> Vec<Expr> {
    Expr::is_interface(MetaKey::Iifname, name, op == CmpOp::Neq).to_vec()
}

/// A comparison shorter than the register compares the first bytes only.
fn interface_prefix(prefix: &str, op: CmpOp) -> Vec<Expr> {
    vec![Expr::Meta { key: MetaKey::Iifname, dreg: REG }, Expr::cmp(REG, op, prefix.as_bytes())]
}

/// A number that stands for a rule's expressions; it is kept in the rule's comment, so that a
/// restart can tell whether the rules in the kernel are the ones it would write. FNV-1a.
fn fingerprint(exprs: &[Expr]) -> u64 {
    format!("{exprs:?}").bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The comment of a rule.
pub fn comment(what: &str, exprs: &[Expr]) -> String {
    format!("{what} #{:016x}", fingerprint(exprs))
}
