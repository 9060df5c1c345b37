//! Services as map elements.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nft::{Data, Element, Family, Key};

use super::kinds::{Kind, first_free, hash, number_of, value};
use super::names::{Behaviour, Choice, Dispatch, MapId, Masquerade, Origin, Policy, Pool};
use crate::object::{Cidr, NamespacedName, Protocol};
use crate::plan::{PortPlan, ServicePlan};

/// Name of the chain that rejects; `reject` alone is a word of `nft`.
pub const REJECT: &str = "rejecting";

/// What an element maps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Data.
    Data(Data),
    /// A kind, by its number.
    Kind(Kind),
}

impl Target {
    fn data(self, number: impl FnOnce(Kind) -> u32) -> Data {
        match self {
            Target::Data(data) => data,
            Target::Kind(kind) => value(number(kind)),
        }
    }
}

/// An element of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The map.
    pub map: MapId,
    /// Key.
    pub key: Key,
    /// End of the range, in the set of source ranges.
    pub key_end: Option<Key>,
    /// What it maps to.
    pub target: Option<Target>,
}

impl Entry {
    /// The kind that it leads to, if it leads to one.
    pub fn kind(&self) -> Option<Kind> {
        match self.target {
            Some(Target::Kind(kind)) => Some(kind),
            _ => None,
        }
    }

    /// What it maps to in the kernel, where kinds have these numbers.
    pub fn data(&self, number: impl FnOnce(Kind) -> u32) -> Option<Data> {
        self.target.clone().map(|target| target.data(number))
    }

    /// Whether it maps to what the kernel has, where kinds have these numbers.
    pub fn leads_to(&self, found: &Option<Data>, number: impl FnOnce(Kind) -> u32) -> bool {
        match (&self.target, found) {
            (Some(Target::Kind(kind)), Some(found)) => number_of(found) == Some(number(*kind)),
            (Some(Target::Data(data)), Some(found)) => data == found,
            (target, found) => target.is_none() && found.is_none(),
        }
    }

    /// As an element, where kinds have these numbers.
    pub fn element(&self, number: impl FnOnce(Kind) -> u32) -> Element {
        self.clone().into_element(number)
    }

    /// Likewise, without a copy.
    pub fn into_element(self, number: impl FnOnce(Kind) -> u32) -> Element {
        let data = self.target.map(|target| target.data(number));
        Element { key: self.key, key_end: self.key_end, data, timeout: None }
    }
}

/// Where each endpoint has its index. Without affinity, indices are dense; with it, an endpoint
/// keeps its slot as long as it lives, and slots may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots(pub Vec<Option<SocketAddr>>);

impl Slots {
    /// Gives every endpoint a slot, moving as few as possible.
    pub fn assign(old: &Slots, endpoints: &[SocketAddr], sticky: bool) -> Slots {
        let is_there = |e: &SocketAddr| endpoints.binary_search(e).is_ok();
        let mut slots: Vec<Option<SocketAddr>> =
            old.0.iter().map(|slot| slot.filter(is_there)).collect();
        // A slot seen twice would hide an endpoint.
        for i in 0..slots.len() {
            if slots[i].is_some() && slots[..i].contains(&slots[i]) {
                slots[i] = None;
            }
        }
        let placed: std::collections::HashSet<SocketAddr> =
            slots.iter().flatten().copied().collect();
        let mut hole = 0;
        for endpoint in endpoints.iter().filter(|e| !placed.contains(*e)) {
            while hole < slots.len() && slots[hole].is_some() {
                hole += 1;
            }
            if hole == slots.len() {
                slots.push(None);
            }
            slots[hole] = Some(*endpoint);
        }
        if !sticky {
            // The last ones move into the holes.
            let mut hole = 0;
            while slots.iter().any(Option::is_none) {
                match slots.pop() {
                    Some(Some(last)) => {
                        while hole < slots.len() && slots[hole].is_some() {
                            hole += 1;
                        }
                        if hole < slots.len() {
                            slots[hole] = Some(last);
                        } else {
                            slots.push(Some(last));
                        }
                    }
                    Some(None) => {}
                    None => break,
                }
            }
        }
        while slots.last() == Some(&None) {
            slots.pop();
        }
        Slots(slots)
    }
}

/// A port with its endpoints' slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlottedPort {
    service: Arc<ServicePlan>,
    index: u32,
    /// With affinity: a number that no other port of the family has.
    id: Option<u32>,
    /// By slot, which of `plan.cluster` is in it; [`EMPTY`] for none.
    cluster: Box<[u32]>,
    /// Likewise of `plan.local`.
    local: Box<[u32]>,
}

/// No endpoint.
const EMPTY: u32 = u32::MAX;

/// Slots as indices into a sorted list.
fn indices(slots: &Slots, endpoints: &[SocketAddr]) -> Box<[u32]> {
    let index = |slot: &Option<SocketAddr>| {
        slot.and_then(|e| endpoints.binary_search(&e).ok()).map_or(EMPTY, |index| index as u32)
    };
    slots.0.iter().map(index).collect()
}

impl SlottedPort {
    /// What is planned.
    pub fn plan(&self) -> &PortPlan {
        &self.service.ports[self.index as usize]
    }

    /// Whether this is what the plan makes of the port: the very same plan.
    pub fn is_of(&self, plan: &Arc<ServicePlan>) -> bool {
        Arc::ptr_eq(&self.service, plan)
    }

    /// With affinity, the port's number.
    pub fn id(&self) -> Option<u32> {
        self.id
    }

    /// Which endpoint is in each slot, and the list that this is by.
    fn slotted(&self, policy: Policy) -> (&[u32], &[SocketAddr]) {
        match policy {
            Policy::Cluster => (&self.cluster, &self.plan().cluster),
            Policy::Local => (&self.local, &self.plan().local),
        }
    }

    fn slots(&self, policy: Policy) -> Slots {
        let (slots, endpoints) = self.slotted(policy);
        Slots(slots.iter().map(|index| endpoints.get(*index as usize).copied()).collect())
    }

    /// The number of slots, and the endpoints in them.
    fn used(&self, policy: Policy) -> (usize, impl Iterator<Item = (u32, SocketAddr)> + '_) {
        let (slots, endpoints) = self.slotted(policy);
        let used = slots
            .iter()
            .enumerate()
            .filter_map(|(slot, index)| Some((slot as u32, *endpoints.get(*index as usize)?)));
        (slots.len(), used)
    }

    /// Identity within its Service.
    fn is(&self, plan: &PortPlan) -> bool {
        let own = self.plan();
        own.is_ipv4() == plan.is_ipv4() && own.protocol == plan.protocol && own.port == plan.port
    }
}

/// A number for a port with affinity: the same after a restart, unless another port has it.
fn number(service: &NamespacedName, port: &PortPlan, taken: impl Fn(u32) -> bool) -> u32 {
    first_free(hash(&format!("{service} {} {}", port.protocol, port.port)), taken)
}

/// Two lists of slots as one: where the first has nothing, what the second has.
fn merged(one: Slots, other: Slots) -> Slots {
    let len = one.0.len().max(other.0.len());
    let at = |slots: &Slots, i: usize| slots.0.get(i).copied().flatten();
    Slots((0..len).map(|i| at(&one, i).or_else(|| at(&other, i))).collect())
}

/// A Service's ports of one family with slots: those of before are kept. Numbers for affinity are
/// ones that are neither `taken` nor `new`, and are told in `new`.
pub fn assign_slots(
    service: &NamespacedName,
    old: &[SlottedPort],
    plan: &Arc<ServicePlan>,
    family: Family,
    taken: &HashSet<u32>,
    new: &mut HashSet<u32>,
    hint: impl Fn(&PortPlan, Option<u32>, Policy) -> Option<Slots>,
) -> Vec<SlottedPort> {
    plan.ports
        .iter()
        .enumerate()
        .filter(|(_, port)| port.is_ipv4() == (family == Family::Ip))
        .map(|(index, port)| {
            let before = old.iter().find(|slotted| slotted.is(port));
            let id = port.affinity.map(|_| {
                let id = before.and_then(|before| before.id);
                id.unwrap_or_else(|| {
                    number(service, port, |id| taken.contains(&id) || new.contains(&id))
                })
            });
            new.extend(id);
            let known = |policy: Policy| match before {
                Some(before) => before.slots(policy),
                None => hint(port, id, policy).unwrap_or_default(),
            };
            let (cluster, local) = if id.is_some() {
                // An endpoint has the same slot whichever policy led to it: who was given it at
                // one address keeps it at another.
                let mut all = [port.cluster.as_slice(), port.local.as_slice()].concat();
                all.sort_unstable();
                all.dedup();
                let known = merged(known(Policy::Cluster), known(Policy::Local));
                let slots = Slots::assign(&known, &all, true);
                (indices(&slots, &port.cluster), indices(&slots, &port.local))
            } else {
                let assign = |policy: Policy, endpoints: &[SocketAddr]| {
                    indices(&Slots::assign(&known(policy), endpoints, false), endpoints)
                };
                (assign(Policy::Cluster, &port.cluster), assign(Policy::Local, &port.local))
            };
            SlottedPort { cluster, local, id, service: plan.clone(), index: index as u32 }
        })
        .collect()
}

/// Protocol number.
pub fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// Key of an address and port.
pub fn vip(address: IpAddr, protocol: Protocol, port: u16) -> Key {
    Key::new().address(address).protocol(protocol_number(protocol)).port(port)
}

fn node_port(protocol: Protocol, port: u16) -> Key {
    Key::new().protocol(protocol_number(protocol)).port(port)
}

fn target(endpoint: SocketAddr) -> Data {
    Data::Value(Key::new().address(endpoint.ip()).port(endpoint.port()))
}

fn last_of(range: Cidr) -> IpAddr {
    match range.address {
        IpAddr::V4(a) => {
            let host = u32::MAX.checked_shr(u32::from(range.prefix_len)).unwrap_or(0);
            IpAddr::V4((a.to_bits() | host).into())
        }
        IpAddr::V6(a) => {
            let host = u128::MAX.checked_shr(u32::from(range.prefix_len)).unwrap_or(0);
            IpAddr::V6((a.to_bits() | host).into())
        }
    }
}

/// Collects a Service's elements and the behaviours that they use.
#[derive(Debug, Default)]
pub struct Collected {
    /// Elements; each map and key once.
    pub entries: Vec<Entry>,
    /// Chains that they go to.
    pub behaviours: Vec<Behaviour>,
}

impl Collected {
    fn set(&mut self, map: MapId, key: Key) {
        self.entries.push(Entry { map, key, key_end: None, target: None });
    }

    fn data(&mut self, map: MapId, key: Key, data: Data) {
        self.entries.push(Entry { map, key, key_end: None, target: Some(Target::Data(data)) });
    }

    fn kind(&mut self, dispatch: Dispatch, key: Key, kind: Kind) {
        let (map, target) = (MapId::Numbers(dispatch), Some(Target::Kind(kind)));
        self.entries.push(Entry { map, key, key_end: None, target });
    }

    /// The endpoints of a key in a pool; tells the behaviour that picks one.
    fn endpoints(
        &mut self,
        port: &SlottedPort,
        pool: Pool,
        key: &Key,
        masquerade: Masquerade,
    ) -> Kind {
        let (slots, used) = port.used(pool.policy);
        let choice = match port.id.zip(port.plan().affinity) {
            None => {
                let mut count = 0;
                for (slot, endpoint) in used {
                    let key = key.clone().number(slot);
                    self.data(MapId::Endpoints(pool), key, target(endpoint));
                    count += 1;
                }
                Choice::Random { count }
            }
            Some((id, timeout)) => {
                self.data(MapId::Ids(pool.origin), key.clone(), value(id));
                let mut count = 0;
                for (slot, endpoint) in used {
                    let key = |n| Key::new().number(id).number(n);
                    self.data(MapId::Kept(pool.policy), key(slot), target(endpoint));
                    let kind = Kind::Chain(Behaviour::Slot { pool, timeout, slot });
                    let (map, target) = (MapId::Picks(pool), Some(Target::Kind(kind)));
                    self.entries.push(Entry { map, key: key(count), key_end: None, target });
                    count += 1;
                }
                let slots = (slots as u32).next_power_of_two();
                Choice::Sticky { timeout, count, slots }
            }
        };
        let behaviour = Behaviour::Pick { pool, choice, masquerade };
        self.behaviours.push(behaviour);
        Kind::Chain(behaviour)
    }

    /// What a port programs.
    pub fn port(&mut self, port: &SlottedPort) {
        let plan = port.plan();
        self.set(MapId::ClusterIps, Key::new().address(plan.cluster_ip));
        let key = vip(plan.cluster_ip, plan.protocol, plan.port);
        let nothing = if plan.has_endpoints { Kind::Drop } else { Kind::Reject };
        if plan.has_internal_endpoints() {
            let policy = if plan.internal_local { Policy::Local } else { Policy::Cluster };
            let pool = Pool { origin: Origin::Vip, policy };
            let kind = self.endpoints(port, pool, &key, Masquerade::Never);
            self.kind(Dispatch::Services, key, kind);
        } else {
            self.kind(Dispatch::NoEndpoints(Origin::Vip), key, nothing);
        }
        for address in &plan.external_ips {
            // The cluster IP as an external IP: the cluster IP's rules are there already.
            if *address != plan.cluster_ip {
                self.external(port, Origin::Vip, vip(*address, plan.protocol, plan.port));
            }
        }
        if plan.node_port != 0 {
            self.external(port, Origin::NodePort, node_port(plan.protocol, plan.node_port));
        }
        for address in &plan.firewalled_ips {
            let key = vip(*address, plan.protocol, plan.port);
            self.set(MapId::Firewalled, key.clone());
            for range in &plan.source_ranges {
                self.entries.push(Entry {
                    map: MapId::FirewallSources,
                    key: key.clone().address(range.address),
                    key_end: Some(key.clone().address(last_of(*range))),
                    target: None,
                });
            }
        }
    }

    /// External traffic at an address or NodePort.
    fn external(&mut self, port: &SlottedPort, origin: Origin, key: Key) {
        let plan = port.plan();
        let services = match origin {
            Origin::Vip => Dispatch::Services,
            Origin::NodePort => Dispatch::NodePorts,
        };
        if !plan.has_external_endpoints() {
            let kind = if plan.has_endpoints { Kind::Drop } else { Kind::Reject };
            self.kind(Dispatch::NoEndpoints(origin), key.clone(), kind);
        }
        if !plan.cluster.is_empty() {
            let pool = Pool { origin, policy: Policy::Cluster };
            if plan.external_local {
                let kind = self.endpoints(port, pool, &key, Masquerade::IfNode);
                self.kind(Dispatch::Inside(origin), key.clone(), kind);
            } else {
                let kind = self.endpoints(port, pool, &key, Masquerade::Always);
                self.kind(services, key.clone(), kind);
            }
        }
        if plan.external_local && !plan.local.is_empty() {
            let pool = Pool { origin, policy: Policy::Local };
            let kind = self.endpoints(port, pool, &key, Masquerade::Never);
            self.kind(services, key, kind);
        }
    }

    /// Sorted, each map and key once.
    pub fn finish(mut self) -> Self {
        self.entries.sort_by(|a, b| (a.map, &a.key).cmp(&(b.map, &b.key)));
        self.entries.dedup_by(|a, b| a.map == b.map && a.key == b.key);
        self.behaviours.sort_unstable();
        self.behaviours.dedup();
        self
    }
}

/// Elements and behaviours of a Service's ports. Pods that talk to themselves are counted by the
/// ruleset, as several Services may have the same endpoint.
pub fn collect(ports: &[SlottedPort]) -> Collected {
    let mut collected = Collected::default();
    for port in ports {
        collected.port(port);
    }
    collected.finish()
}

/// Keys of the endpoints that may talk to themselves.
pub fn hairpins(ports: &[SlottedPort]) -> Vec<Key> {
    let mut keys: Vec<Key> = ports
        .iter()
        .flat_map(|port| port.plan().hairpin.iter().map(|e| (port.plan().protocol, *e)))
        .map(|(protocol, endpoint)| {
            Key::new()
                .address(endpoint.ip())
                .address(endpoint.ip())
                .protocol(protocol_number(protocol))
                .port(endpoint.port())
        })
        .collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}
