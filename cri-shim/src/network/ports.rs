//! Host ports and masquerade: which conflict, and the nf_tables table that makes them work. Pure.
//!
//! Tables of nftables(8) meet at the same hooks, so this one stands beside the proxy's: what the
//! proxy translated is not looked at again here.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use nft::{
    Address, BaseChain, ChainType, CmpOp, CtKey, DataType, Element, Expr, Family, Hook, Key,
    MetaKey, NatKind, REG, Set, Table, Transaction, Verdict,
};

use super::{
    Cidr, HostPort, NetworkError, PortMapping, Protocol,
    records::{Kind, Record},
};

/// Every address, for lookups by local port alone.
const ANY4: &str = "hostports4";
const ANY6: &str = "hostports6";
/// One address of the host.
const OWN4: &str = "hostports4-ip";
const OWN6: &str = "hostports6-ip";
/// Pods that may reach themselves through a host port.
const SELF4: &str = "self4";
const SELF6: &str = "self6";
/// Status bit of connections with a translated destination (IPS_DST_NAT).
const DNATED: u32 = 1 << 5;

/// Checks a sandbox's ports against one another and against `others`.
///
/// # Errors
/// [`NetworkError::PortTaken`] and [`NetworkError::BadPort`].
pub(crate) fn check_ports<'a>(
    ports: &[PortMapping],
    others: impl Iterator<Item = &'a Record>,
) -> Result<(), NetworkError> {
    for (n, port) in ports.iter().enumerate() {
        let bad = |reason| NetworkError::BadPort { port: HostPort(port.clone()), reason };
        if port.host_port == 0 || port.container_port == 0 {
            return Err(bad("ports are between 1 and 65535"));
        }
        if ports[..n].iter().any(|other| conflict(port, other)) {
            return Err(bad("the pod asks for it twice"));
        }
    }
    for other in others {
        for port in ports {
            if other.ports().iter().any(|taken| conflict(port, taken)) {
                return Err(NetworkError::PortTaken {
                    port: HostPort(port.clone()),
                    owner: other.id.clone(),
                    owner_pod: other.pod.clone(),
                });
            }
        }
    }
    Ok(())
}

fn conflict(a: &PortMapping, b: &PortMapping) -> bool {
    let overlap = match (a.host_ip, b.host_ip) {
        (Some(a), Some(b)) => {
            a.is_ipv4() == b.is_ipv4() && (a == b || a.is_unspecified() || b.is_unspecified())
        }
        _ => true,
    };
    a.protocol == b.protocol && a.host_port == b.host_port && overlap
}

/// The unspecified address means all, as an absent one does.
fn host_ip(port: &PortMapping) -> Option<IpAddr> {
    port.host_ip.filter(|ip| !ip.is_unspecified())
}

/// The protocols of `record`'s ports whose flows the kernel keeps translating as they began: those
/// of a client that sends from the same port again belong to the same one.
pub(crate) fn lasting(record: &Record) -> Vec<Protocol> {
    let is_used = |p: &Protocol| record.ports().iter().any(|port| port.protocol == *p);
    [Protocol::Udp, Protocol::Sctp].into_iter().filter(is_used).collect()
}

/// Whether a flow from before the ports of `record` were open stands in their way: its packets go
/// where they went when it began.
pub(crate) fn stale_before(
    record: &Record,
    protocol: Protocol,
    to: SocketAddr,
    answering: SocketAddr,
) -> bool {
    to == answering
        && record.ports().iter().any(|port| {
            port.protocol == protocol
                && port.host_port == to.port()
                && host_ip(port).is_none_or(|ip| ip == to.ip())
        })
}

/// Whether a flow leads to the pod of `record`, which is no more.
pub(crate) fn stale_after(
    record: &Record,
    _: Protocol,
    to: SocketAddr,
    answering: SocketAddr,
) -> bool {
    to != answering && record.ips.contains(&answering.ip())
}

/// The families a port is opened in: its address's, or all.
fn wants(port: &PortMapping, ip: IpAddr) -> bool {
    port.host_ip.is_none_or(|host| host.is_ipv4() == ip.is_ipv4())
}

pub(crate) fn table() -> Table {
    Table::new(Family::Inet, "longshore-pods")
}

/// The whole table, in one piece, replacing whatever was there.
pub(crate) fn plan_table<'a>(
    bridge: &str,
    cidrs: &[Cidr],
    records: impl Iterator<Item = &'a Record>,
) -> Transaction {
    let mut t = Transaction::new(table());
    t.ensure_no_table().add_table();
    use DataType as D;
    t.add_set(Set::map(ANY4, &[D::InetProto, D::InetService], &[D::Ipv4Addr, D::InetService]));
    t.add_set(Set::map(ANY6, &[D::InetProto, D::InetService], &[D::Ipv6Addr, D::InetService]));
    t.add_set(Set::map(
        OWN4,
        &[D::Ipv4Addr, D::InetProto, D::InetService],
        &[D::Ipv4Addr, D::InetService],
    ));
    t.add_set(Set::map(
        OWN6,
        &[D::Ipv6Addr, D::InetProto, D::InetService],
        &[D::Ipv6Addr, D::InetService],
    ));
    t.add_set(Set::plain(SELF4, &[D::Ipv4Addr, D::Ipv4Addr]));
    t.add_set(Set::plain(SELF6, &[D::Ipv6Addr, D::Ipv6Addr]));

    let base = |chain_type, hook, priority| Some(BaseChain { chain_type, hook, priority });
    // route_localnet lets translated connections from 127.0.0.0/8 leave by the bridge; without this
    // rule it would also let pods reach what listens only there.
    t.add_chain("localnet", base(ChainType::Filter, Hook::Prerouting, -300));
    let loopback4: IpAddr = [127, 0, 0, 0].into();
    t.add_rule(
        "localnet",
        join([
            Expr::is_interface(MetaKey::Iifname, bridge, false).to_vec(),
            is_family(4),
            Expr::in_network(Address::Destination, loopback4, 8, false),
            vec![Expr::Verdict(Verdict::Drop)],
        ]),
    );

    t.add_chain("hostports", None);
    let load = |family: u8| -> (Vec<Expr>, u32) {
        let (address, words) = if family == 4 {
            (Expr::ip4(Address::Destination, REG), 1)
        } else {
            (Expr::ip6(Address::Destination, REG), 4)
        };
        (vec![address], REG + words)
    };
    for (family, own, any) in [(4, OWN4, ANY4), (6, OWN6, ANY6)] {
        let (address, next) = load(family);
        let (nf_family, port) = if family == 4 { (2, REG + 1) } else { (10, REG + 4) };
        let translate = |map: &str| {
            vec![
                Expr::LookupMap { set: map.to_owned(), sreg: REG, dreg: REG },
                Expr::Nat {
                    kind: NatKind::Dnat,
                    family: nf_family,
                    address: Some(REG),
                    port: Some(port),
                },
            ]
        };
        t.add_rule(
            "hostports",
            join([
                is_family(family),
                address,
                vec![Expr::l4proto(next), Expr::dport(next + 1)],
                translate(own),
            ]),
        );
        if family == 6 {
            // ::1 can't be the source of a packet that leaves the host: let it be refused at once.
            let one: IpAddr = Ipv6Addr::LOCALHOST.into();
            t.add_rule(
                "hostports",
                join([
                    is_family(6),
                    Expr::in_network(Address::Destination, one, 128, false),
                    vec![Expr::Verdict(Verdict::Return)],
                ]),
            );
        }
        t.add_rule(
            "hostports",
            join([
                is_family(family),
                vec![Expr::l4proto(REG), Expr::dport(REG + 1)],
                translate(any),
            ]),
        );
    }
    // Just after the proxy's: a Service's port is the proxy's even where a pod has the same.
    for (chain, hook) in [("prerouting", Hook::Prerouting), ("output", Hook::Output)] {
        t.add_chain(chain, base(ChainType::Nat, hook, -95));
        t.add_rule(
            chain,
            join([
                Expr::is_local(Address::Destination, false).to_vec(),
                vec![Expr::Verdict(Verdict::Jump("hostports".to_owned()))],
            ]),
        );
    }

    t.add_chain("postrouting", base(ChainType::Nat, Hook::Postrouting, 105));
    let masquerade = || vec![Expr::Masquerade { fully_random: false }];
    for (family, set) in [(4, SELF4), (6, SELF6)] {
        let pair = if family == 4 {
            vec![Expr::ip4(Address::Source, REG), Expr::ip4(Address::Destination, REG + 1)]
        } else {
            vec![Expr::ip6(Address::Source, REG), Expr::ip6(Address::Destination, REG + 4)]
        };
        t.add_rule(
            "postrouting",
            join([
                is_family(family),
                Expr::has_ct(CtKey::Status, DNATED).to_vec(),
                pair,
                vec![Expr::Lookup { set: set.to_owned(), sreg: REG, invert: false }],
                masquerade(),
            ]),
        );
    }
    t.add_rule(
        "postrouting",
        join([
            Expr::is_interface(MetaKey::Oifname, bridge, false).to_vec(),
            is_family(4),
            Expr::in_network(Address::Source, loopback4, 8, false),
            masquerade(),
        ]),
    );
    for cidr in cidrs {
        let (family, multicast): (_, (IpAddr, u8)) = if cidr.is_ipv4() {
            (4, ([224, 0, 0, 0].into(), 4))
        } else {
            (6, (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8))
        };
        let mut exprs = join([
            Expr::is_interface(MetaKey::Oifname, bridge, true).to_vec(),
            is_family(family),
            Expr::in_network(Address::Source, cidr.base(), cidr.prefix(), false),
            Expr::in_network(Address::Destination, multicast.0, multicast.1, true),
        ]);
        for inside in cidrs.iter().filter(|c| c.is_ipv4() == cidr.is_ipv4()) {
            exprs.extend(Expr::in_network(
                Address::Destination,
                inside.base(),
                inside.prefix(),
                true,
            ));
        }
        exprs.extend(masquerade());
        t.add_rule("postrouting", exprs);
    }
    for record in records {
        add_elements(&mut t, record);
    }
    t
}

/// The elements a sandbox adds; nothing for one without host ports.
pub(crate) fn plan_add(record: &Record) -> Transaction {
    let mut t = Transaction::new(table());
    add_elements(&mut t, record);
    t
}

/// Takes the elements of a sandbox away. Each stands alone, as some may be gone.
pub(crate) fn plan_remove(record: &Record) -> Vec<Transaction> {
    elements(record)
        .into_iter()
        .map(|(set, element)| {
            let mut t = Transaction::new(table());
            t.delete_element(set, element);
            t
        })
        .collect()
}

fn add_elements(t: &mut Transaction, record: &Record) {
    for (set, element) in elements(record) {
        t.add_element(set, element);
    }
}

fn elements(record: &Record) -> Vec<(&'static str, Element)> {
    let Kind::Bridge { ports, .. } = &record.kind else {
        return Vec::new();
    };
    let mut elements = Vec::new();
    for ip in &record.ips {
        let (any, own, same) = if ip.is_ipv4() { (ANY4, OWN4, SELF4) } else { (ANY6, OWN6, SELF6) };
        let mut used = false;
        for port in ports.iter().filter(|port| wants(port, *ip)) {
            used = true;
            let number = port.protocol.number();
            let to = Key::new().address(*ip).port(port.container_port);
            match host_ip(port) {
                None => {
                    let key = Key::new().protocol(number).port(port.host_port);
                    elements.push((any, Element::value(key, to)));
                }
                Some(host) => {
                    let key = Key::new().address(host).protocol(number).port(port.host_port);
                    elements.push((own, Element::value(key, to)));
                }
            }
        }
        if used {
            elements.push((same, Element::new(Key::new().address(*ip).address(*ip))));
        }
    }
    elements
}

fn is_family(family: u8) -> Vec<Expr> {
    let nfproto = if family == 4 { 2 } else { 10 };
    vec![Expr::Meta { key: MetaKey::Nfproto, dreg: REG }, Expr::cmp(REG, CmpOp::Eq, &[nfproto])]
}

fn join<const N: usize>(parts: [Vec<Expr>; N]) -> Vec<Expr> {
    parts.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::network::SandboxNetwork;

    pub(crate) fn record(id: &str, ip: &str, ports: Vec<PortMapping>) -> Record {
        let sandbox = SandboxNetwork {
            id: id.to_owned(),
            netns: PathBuf::from("/x"),
            namespace: "ns".to_owned(),
            name: format!("pod-{id}"),
            uid: "u".to_owned(),
            port_mappings: ports.clone(),
            ..SandboxNetwork::default()
        };
        let ips = vec![ip.parse().unwrap()];
        Record::new(
            &sandbox,
            ips,
            Kind::Bridge { veth: "v".to_owned(), ports, bandwidth: Default::default() },
        )
    }

    fn port(protocol: Protocol, host_ip: Option<&str>, host_port: u16) -> PortMapping {
        PortMapping {
            protocol,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port: 80,
        }
    }

    #[test]
    fn conflicts_name_the_owner() {
        use Protocol::{Sctp, Tcp, Udp};
        let other =
            record("a", "10.0.0.2", vec![port(Tcp, None, 80), port(Tcp, Some("1.1.1.1"), 81)]);
        for (asked, ok) in [
            (port(Udp, None, 80), true),
            (port(Tcp, None, 82), true),
            (port(Tcp, Some("1.1.1.2"), 81), true),
            (port(Tcp, None, 80), false),
            (port(Tcp, Some("1.1.1.2"), 80), false),
            (port(Tcp, Some("0.0.0.0"), 81), false),
            (port(Tcp, Some("::"), 81), true),
            (port(Tcp, Some("::"), 80), false),
            (port(Tcp, Some("1.1.1.1"), 81), false),
            (port(Sctp, None, 80), true),
            (port(Tcp, None, 0), false),
        ] {
            let result = check_ports(std::slice::from_ref(&asked), [&other].into_iter());
            assert_eq!(result.is_ok(), ok, "{asked:?}: {result:?}");
        }
        let error = check_ports(&[port(Tcp, None, 80)], [&other].into_iter()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("80/tcp") && text.contains("sandbox a") && text.contains("ns/pod-a"));
        assert!(check_ports(&[port(Tcp, None, 5), port(Tcp, None, 5)], [].into_iter()).is_err());
    }

    #[test]
    fn the_table_is_taken_by_the_validating_fake_and_changes_undo_each_other() {
        let mut fake = nft::Fake::new();
        let cidrs = ["10.88.0.0/16".parse().unwrap(), "fd00:10:88::/64".parse().unwrap()];
        fake.apply(&plan_table("longshore0", &cidrs, [].into_iter())).unwrap();
        let before = fake.dump();
        use Protocol::{Tcp, Udp};
        let four =
            record("a", "10.88.0.2", vec![port(Tcp, None, 80), port(Udp, Some("1.1.1.1"), 53)]);
        let six = record("b", "fd00:10:88::2", vec![port(Tcp, None, 80)]);
        for record in [&four, &six] {
            fake.apply(&plan_add(record)).unwrap();
        }
        let with = fake.dump();
        assert_ne!(before, with);
        for record in [&four, &six] {
            for transaction in plan_remove(record) {
                fake.apply(&transaction).unwrap();
            }
        }
        assert_eq!(before, fake.dump());
        fake.apply(&plan_table("longshore0", &cidrs, [&four, &six].into_iter())).unwrap();
        assert_eq!(with, fake.dump());
    }
}
