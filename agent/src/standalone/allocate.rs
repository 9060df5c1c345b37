//! Addresses and NodePorts for Services that name none. Pure.
//!
//! Both follow from the Service's name, so that they are the same on every start and even without
//! the record of earlier ones; a place that is taken moves on to the next free one.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use proxy::object::Cidr;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ids::NamespacedName;

/// What was given to one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// At most one of each family.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<IpAddr>,
    /// By `protocol/port`.
    pub node_ports: BTreeMap<String, u16>,
}

/// Why a Service cannot have what it asks for, or needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// Another Service has the address.
    #[error("spec.clusterIP: {address} belongs to Service {owner}")]
    AddressTaken {
        /// The address asked for.
        address: IpAddr,
        /// Who has it.
        owner: NamespacedName,
    },
    /// Another Service has the NodePort.
    #[error("spec.ports: nodePort {port} ({protocol}) belongs to Service {owner}")]
    PortTaken {
        /// The port asked for.
        port: u16,
        /// `TCP`, ...
        protocol: String,
        /// Who has it.
        owner: NamespacedName,
    },
    /// The range is used up, or there is none of the family.
    #[error("no {what} is left; widen {flag}")]
    Exhausted {
        /// `cluster IP`, `NodePort`.
        what: &'static str,
        /// The flag that sets the range.
        flag: &'static str,
    },
}

/// All that is given out.
#[derive(Debug)]
pub struct Allocator {
    ranges: Vec<Cidr>,
    node_ports: (u16, u16),
    given: BTreeMap<NamespacedName, Allocation>,
    by_address: HashMap<IpAddr, NamespacedName>,
    by_port: HashMap<(String, u16), NamespacedName>,
}

impl Allocator {
    /// Gives from these ranges, knowing what an earlier run gave.
    pub fn new(
        ranges: Vec<Cidr>,
        node_ports: (u16, u16),
        earlier: BTreeMap<NamespacedName, Allocation>,
    ) -> Self {
        let mut allocator = Self {
            ranges,
            node_ports,
            given: BTreeMap::new(),
            by_address: HashMap::new(),
            by_port: HashMap::new(),
        };
        for (key, allocation) in earlier {
            allocator.record(&key, allocation);
        }
        allocator
    }

    /// All that is given out, to be kept for the next run.
    pub fn given(&self) -> &BTreeMap<NamespacedName, Allocation> {
        &self.given
    }

    fn record(&mut self, key: &NamespacedName, allocation: Allocation) {
        for address in &allocation.cluster_ips {
            self.by_address.insert(*address, key.clone());
        }
        for (port, number) in &allocation.node_ports {
            let protocol = port.split('/').next().unwrap_or_default().to_owned();
            self.by_port.insert((protocol, *number), key.clone());
        }
        self.given.insert(key.clone(), allocation);
    }

    /// Takes back what the Service had.
    pub fn release(&mut self, key: &NamespacedName) {
        self.given.remove(key);
        self.by_address.retain(|_, owner| owner != key);
        self.by_port.retain(|_, owner| owner != key);
    }

    /// Gives the Service what it needs, and writes it into its object.
    pub fn allocate(
        &mut self,
        key: &NamespacedName,
        service: &mut Service,
    ) -> Result<(), AllocateError> {
        let earlier = self.given.get(key).cloned().unwrap_or_default();
        self.release(key);
        let made = self.plan(key, service, &earlier)?;
        let Some(spec) = &mut service.spec else { return Ok(()) };
        if !made.cluster_ips.is_empty() {
            let texts: Vec<String> = made.cluster_ips.iter().map(ToString::to_string).collect();
            spec.cluster_ip = texts.first().cloned();
            spec.cluster_ips = Some(texts);
            let family = |ip: &IpAddr| if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned();
            spec.ip_families = Some(made.cluster_ips.iter().map(family).collect());
        }
        for port in spec.ports.iter_mut().flatten() {
            if let Some(number) = made.node_ports.get(&port_key(port)) {
                port.node_port = Some((*number).into());
            }
        }
        if !made.cluster_ips.is_empty() || !made.node_ports.is_empty() {
            self.record(key, made);
        }
        Ok(())
    }

    fn plan(
        &self,
        key: &NamespacedName,
        service: &Service,
        earlier: &Allocation,
    ) -> Result<Allocation, AllocateError> {
        let mut made = Allocation::default();
        let Some(spec) = &service.spec else { return Ok(made) };
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        if kind == "ExternalName" || spec.cluster_ip.as_deref() == Some("None") {
            return Ok(made);
        }
        let asked = spec.cluster_ip.iter().chain(spec.cluster_ips.iter().flatten());
        for address in asked.filter_map(|text| text.parse::<IpAddr>().ok()) {
            if made.cluster_ips.contains(&address) {
                continue;
            }
            if let Some(owner) = self.by_address.get(&address) {
                return Err(AllocateError::AddressTaken { address, owner: owner.clone() });
            }
            made.cluster_ips.push(address);
        }
        for range in self.families(spec, &made.cluster_ips) {
            let held = earlier.cluster_ips.iter().copied().find(|ip| {
                ip.is_ipv4() == range.address.is_ipv4()
                    && contains(range, *ip)
                    && !self.by_address.contains_key(ip)
            });
            let address = held.or_else(|| self.free_address(key, range));
            made.cluster_ips.push(address.ok_or(AllocateError::Exhausted {
                what: "cluster IP",
                flag: "--service-cluster-ip-range",
            })?);
        }
        if kind == "ClusterIP"
            || (kind == "LoadBalancer" && spec.allocate_load_balancer_node_ports == Some(false))
        {
            return Ok(made);
        }
        for port in spec.ports.iter().flatten() {
            let name = port_key(port);
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".into());
            let free = |number: u16| {
                !self.by_port.contains_key(&(protocol.clone(), number))
                    && !made.node_ports.iter().any(|(other, given)| {
                        *given == number && other.split('/').next() == Some(protocol.as_str())
                    })
            };
            let asked = port.node_port.and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0);
            let number = match asked {
                Some(number) => {
                    if let Some(owner) = self.by_port.get(&(protocol.clone(), number)) {
                        let owner = owner.clone();
                        return Err(AllocateError::PortTaken { port: number, protocol, owner });
                    }
                    number
                }
                None => {
                    let (first, last) = self.node_ports;
                    let size = u64::from(last - first) + 1;
                    let start = hash(&[key.to_string().as_bytes(), name.as_bytes()]);
                    let held = earlier.node_ports.get(&name).copied();
                    let held = held.filter(|port| (first..=last).contains(port));
                    let probe = (0..size).filter_map(|step| {
                        let offset = (u64::try_from(start % u128::from(size)).ok()? + step) % size;
                        Some(first + u16::try_from(offset).ok()?)
                    });
                    held.into_iter().chain(probe).find(|number| free(*number)).ok_or(
                        AllocateError::Exhausted {
                            what: "NodePort",
                            flag: "--service-node-port-range",
                        },
                    )?
                }
            };
            made.node_ports.insert(name, number);
        }
        Ok(made)
    }

    /// The ranges that the Service still needs an address from.
    fn families(
        &self,
        spec: &k8s_openapi::api::core::v1::ServiceSpec,
        have: &[IpAddr],
    ) -> Vec<Cidr> {
        let policy = spec.ip_family_policy.as_deref().unwrap_or("SingleStack");
        let named: Vec<bool> =
            spec.ip_families.iter().flatten().map(|family| family == "IPv4").collect();
        let wanted = match (policy, named.len()) {
            ("PreferDualStack" | "RequireDualStack", _) | (_, 2) => 2,
            _ => 1,
        };
        let mut ordered: Vec<Cidr> = Vec::new();
        for is_v4 in named {
            ordered.extend(self.ranges.iter().filter(|r| r.address.is_ipv4() == is_v4));
        }
        for range in &self.ranges {
            if !ordered.contains(range) {
                ordered.push(*range);
            }
        }
        ordered
            .into_iter()
            .filter(|range| !have.iter().any(|ip| ip.is_ipv4() == range.address.is_ipv4()))
            .take(usize::saturating_sub(wanted, have.len()))
            .collect()
    }

    fn free_address(&self, key: &NamespacedName, range: Cidr) -> Option<IpAddr> {
        let bits = if range.address.is_ipv4() { 32 } else { 128 };
        let host_bits = bits - u32::from(range.prefix_len);
        // Neither the first (network) nor the last (broadcast) address.
        let size = 1u128.checked_shl(host_bits.min(64)).filter(|size| *size > 2)? - 2;
        let start = hash(&[key.to_string().as_bytes(), &[u8::from(bits == 32)]]) % size;
        (0..size.min(1 << 20)).find_map(|step| {
            let offset = 1 + (start + step) % size;
            let address = match range.address {
                IpAddr::V4(base) => {
                    IpAddr::V4(u32::from(base).checked_add(u32::try_from(offset).ok()?)?.into())
                }
                IpAddr::V6(base) => IpAddr::V6(u128::from(base).checked_add(offset)?.into()),
            };
            (!self.by_address.contains_key(&address)).then_some(address)
        })
    }
}

/// A port of a Service by protocol and number, which stay when its name changes.
fn port_key(port: &k8s_openapi::api::core::v1::ServicePort) -> String {
    format!("{}/{}", port.protocol.as_deref().unwrap_or("TCP"), port.port)
}

fn contains(range: Cidr, ip: IpAddr) -> bool {
    let number = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (u128::from(u32::from(ip)) << 96, 32),
        IpAddr::V6(ip) => (u128::from(ip), 128),
    };
    let ((ip, bits), (base, base_bits)) = (number(ip), number(range.address));
    let mask = u128::MAX.checked_shl(128 - u32::from(range.prefix_len)).unwrap_or(0);
    bits == base_bits && ip & mask == base & mask
}

fn hash(parts: &[&[u8]]) -> u128 {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        let (address, prefix) = text.split_once('/').unwrap();
        Cidr { address: address.parse().unwrap(), prefix_len: prefix.parse().unwrap() }
    }

    fn allocator(ranges: &[&str]) -> Allocator {
        let ranges = ranges.iter().map(|range| cidr(range)).collect();
        Allocator::new(ranges, (30000, 30003), BTreeMap::new())
    }

    fn service(spec: serde_json::Value) -> Service {
        serde_json::from_value(serde_json::json!({"spec": spec})).unwrap()
    }

    fn give(
        allocator: &mut Allocator,
        name: &str,
        spec: serde_json::Value,
    ) -> Result<(Vec<String>, Vec<i32>), AllocateError> {
        let mut service = service(spec);
        allocator.allocate(&NamespacedName::new("default", name), &mut service)?;
        let spec = service.spec.unwrap();
        let ports = spec.ports.iter().flatten().filter_map(|port| port.node_port).collect();
        Ok((spec.cluster_ips.unwrap_or_default(), ports))
    }

    #[test]
    fn what_is_given_is_stable_and_never_given_twice() {
        let spec = || serde_json::json!({"type": "NodePort", "ports": [{"port": 80}]});
        let mut first = allocator(&["10.96.0.0/29"]);
        let mut seen = std::collections::BTreeSet::new();
        for name in ["a", "b", "c", "d"] {
            let (ips, ports) = give(&mut first, name, spec()).unwrap();
            assert!(seen.insert(ips[0].clone()) && seen.insert(ports[0].to_string()), "{seen:?}");
            assert_eq!(give(&mut first, name, spec()).unwrap(), (ips, ports));
        }
        assert!(!seen.contains("10.96.0.0") && !seen.contains("10.96.0.7"));
        assert!(matches!(
            give(&mut first, "e", spec()),
            Err(AllocateError::Exhausted { what: "NodePort", .. })
        ));
        let plain = || serde_json::json!({"ports": [{"port": 80}]});
        give(&mut first, "e", plain()).unwrap();
        give(&mut first, "f", plain()).unwrap();
        assert!(matches!(
            give(&mut first, "g", plain()),
            Err(AllocateError::Exhausted { what: "cluster IP", .. })
        ));
        // The next run gives the same, in any order.
        let mut second = Allocator::new(first.ranges.clone(), (30000, 30003), first.given.clone());
        for name in ["d", "a", "c", "b"] {
            let key = NamespacedName::new("default", name);
            let before = first.given[&key].clone();
            give(&mut second, name, spec()).unwrap();
            assert_eq!(second.given[&key], before);
        }
        second.release(&NamespacedName::new("default", "a"));
        give(&mut second, "g", spec()).unwrap();
    }

    #[test]
    fn what_is_asked_for_is_given_unless_taken() {
        let mut allocator = allocator(&["10.96.0.0/16", "fd00::/108"]);
        let asked = serde_json::json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]});
        assert_eq!(give(&mut allocator, "dns", asked.clone()).unwrap().0, ["10.96.0.10"]);
        assert!(matches!(
            give(&mut allocator, "other", asked),
            Err(AllocateError::AddressTaken { .. })
        ));
        let port =
            serde_json::json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 31999}]});
        assert_eq!(give(&mut allocator, "n", port.clone()).unwrap().1, [31999]);
        assert!(matches!(give(&mut allocator, "m", port), Err(AllocateError::PortTaken { .. })));
        let udp = serde_json::json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": 31999, "protocol": "UDP"}]});
        assert_eq!(give(&mut allocator, "m", udp).unwrap().1, [31999]);
        let dual = serde_json::json!({"ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 1}]});
        let (ips, _) = give(&mut allocator, "dual", dual).unwrap();
        assert!(ips.len() == 2 && ips[0].contains('.') && ips[1].starts_with("fd00::"), "{ips:?}");
        let six = serde_json::json!({"ipFamilies": ["IPv6"], "ports": [{"port": 1}]});
        let (ips, _) = give(&mut allocator, "six", six).unwrap();
        assert!(ips.len() == 1 && ips[0].starts_with("fd00::"));
        let headless = serde_json::json!({"clusterIP": "None", "ports": [{"port": 1}]});
        assert_eq!(give(&mut allocator, "headless", headless).unwrap().0, Vec::<String>::new());
    }
}
