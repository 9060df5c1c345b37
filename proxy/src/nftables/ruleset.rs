//! The desired state of one family's table, and the transactions that lead to it from what was
//! programmed before. Those that lead to it from what the kernel tells are in `repair`.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nft::{Data, Element, Family, Key, Op, Rule, Table, Transaction};

use super::base::{Described, Structure, comment};
use super::batches::{ByMap, NOBODY};
use super::chains;
use super::entries::{
    Collected, Entry, Slots, SlottedPort, assign_slots, collect, hairpins, protocol_number, vip,
};
use super::kinds::{Kind, Kinds, Numbers};
use super::names::{Behaviour, MapId, Origin, Policy, Pool, TABLE, affinity_set};
use crate::object::NamespacedName;
use crate::plan::{PortPlan, ServicePlan};

/// Elements of a map as the kernel told them, by key.
pub type Observed = HashMap<MapId, HashMap<Key, (Option<Key>, Option<Data>)>>;

/// One family's desired table.
#[derive(Debug)]
pub struct Ruleset {
    /// The fixed part.
    pub structure: Structure,
    pub(super) services: HashMap<NamespacedName, Vec<SlottedPort>>,
    /// How many Services have an endpoint that may talk to itself.
    pub(super) hairpin: HashMap<Key, u32>,
    /// Numbers of the ports with affinity.
    ids: HashSet<u32>,
    /// Behaviours whose chains are in the kernel.
    pub(super) chains: BTreeSet<Behaviour>,
    /// Numbers of what packets meet.
    pub(super) kinds: Kinds,
    /// Slots that endpoints had in the kernel when it was taken over.
    hints: HashMap<(Pool, Key), Slots>,
    /// Elements in one batch of a repair, roughly: the kernel holds a lock for a few microseconds
    /// for each.
    pub batch: usize,
}

/// A transaction with what it will have changed here.
#[derive(Debug)]
pub struct Planned {
    /// For the kernel.
    pub transaction: Transaction,
    /// For each change of the transaction, whose elements it holds, by index into `services`.
    pub(super) owners: Vec<Vec<u32>>,
    pub(super) services: Vec<(NamespacedName, Option<Vec<SlottedPort>>)>,
    /// Names by index, for a transaction of a repair.
    pub(super) names: Arc<[NamespacedName]>,
    pub(super) behaviours: Vec<Behaviour>,
    pub(super) kinds: Vec<(Kind, u32)>,
}

impl Planned {
    /// Whose change the kernel refused, by the index of the change and the element in it.
    pub fn owner(&self, op: usize, element: Option<usize>) -> Option<&NamespacedName> {
        let owners = self.owners.get(op)?;
        let index = owners.get(element.unwrap_or(0)).copied()?;
        let named = self.services.get(index as usize).map(|(name, _)| name);
        named.or_else(|| self.names.get(index as usize))
    }

    /// What is to be noted of a repair's transaction that the kernel took.
    pub fn without_elements(self) -> Self {
        let transaction = Transaction::new(self.transaction.table);
        Planned { transaction, owners: Vec::new(), names: Arc::new([]), ..self }
    }

    /// Number of elements that are added or deleted.
    pub fn elements(&self) -> usize {
        self.owners.iter().map(Vec::len).sum()
    }
}

/// Elements in one batch, roughly: it holds the kernel's lock for 5 to 15 ms.
pub const BATCH: usize = 4096;

impl Ruleset {
    /// Nothing but the fixed part.
    pub fn new(structure: Structure) -> Self {
        Ruleset {
            structure,
            services: HashMap::new(),
            hairpin: HashMap::new(),
            ids: HashSet::new(),
            chains: BTreeSet::new(),
            kinds: Kinds::default(),
            hints: HashMap::new(),
            batch: BATCH,
        }
    }

    /// The table.
    pub fn table(&self) -> Table {
        Table::new(self.structure.family, TABLE)
    }

    pub(super) fn family(&self) -> Family {
        self.structure.family
    }

    fn slotted(
        &self,
        name: &NamespacedName,
        plan: Option<&Arc<ServicePlan>>,
        new_ids: &mut HashSet<u32>,
    ) -> Option<Vec<SlottedPort>> {
        let old = self.services.get(name).map(Vec::as_slice).unwrap_or_default();
        let hint = |port: &PortPlan, id: Option<u32>, policy: Policy| {
            if self.hints.is_empty() {
                return None;
            }
            if let Some(id) = id {
                return self.hints.get(&(Pool::kept(policy), Key::new().number(id))).cloned();
            }
            let key = |ip| vip(ip, port.protocol, port.port);
            let pool = |origin| Pool { origin, policy };
            let ips = std::iter::once(port.cluster_ip).chain(port.external_ips.iter().copied());
            let node_port =
                Key::new().protocol(protocol_number(port.protocol)).port(port.node_port);
            ips.map(|ip| (pool(Origin::Vip), key(ip)))
                .chain([(pool(Origin::NodePort), node_port)])
                .find_map(|key| self.hints.get(&key).cloned())
        };
        let mut ports = assign_slots(name, old, plan?, self.family(), &self.ids, new_ids, hint);
        ports.shrink_to_fit();
        (!ports.is_empty()).then_some(ports)
    }

    /// The transaction for changed plans of Services: its size is the size of the change.
    pub fn plan_changes<'a>(
        &self,
        changes: impl IntoIterator<Item = (&'a NamespacedName, Option<&'a Arc<ServicePlan>>)>,
    ) -> Planned {
        let mut services = Vec::new();
        let (mut deleted, mut added): (ByMap, ByMap) = (Vec::new(), Vec::new());
        let mut behaviours = BTreeSet::new();
        let mut numbers = Numbers::new(&self.kinds);
        let mut kinds: BTreeSet<Kind> = BTreeSet::new();
        let mut turns: HashMap<Key, i64> = HashMap::new();
        let mut new_ids = HashSet::new();
        for (name, plan) in changes {
            let owner = services.len() as u32;
            let new = self.slotted(name, plan, &mut new_ids);
            let old = self.services.get(name).map(Vec::as_slice).unwrap_or_default();
            let now = new.as_deref().unwrap_or_default();
            if old == now {
                continue;
            }
            for key in hairpins(old) {
                *turns.entry(key).or_default() -= 1;
            }
            for key in hairpins(now) {
                *turns.entry(key).or_default() += 1;
            }
            let was = collect(old);
            let Collected { entries, behaviours: used } = collect(now);
            behaviours.extend(used);
            kinds.extend(entries.iter().filter_map(Entry::kind));
            diff(&was.entries, &entries, |entry, add| {
                if add {
                    let element = entry.element(|kind| numbers.of(kind));
                    added.push((entry.map, element, owner));
                } else {
                    deleted.push((entry.map, gone(entry), owner));
                }
            });
            services.push((name.clone(), new));
        }
        for (key, turn) in turns {
            let before = i64::from(self.hairpin.get(&key).copied().unwrap_or_default());
            match (before > 0, before + turn > 0) {
                (false, true) => added.push((MapId::Hairpin, Element::new(key), NOBODY)),
                (true, false) => deleted.push((MapId::Hairpin, Element::new(key), NOBODY)),
                _ => {}
            }
        }
        let mut planned = self.planned(services);
        self.add_behaviours(&mut planned, behaviours.iter().copied(), &self.chains);
        kinds.retain(|kind| !numbers.is_there(*kind));
        planned.kinds = kinds.into_iter().map(|kind| (kind, numbers.of(kind))).collect();
        let new = planned.kinds.iter().map(|(kind, number)| kind_element(*kind, *number));
        added.extend(new);
        push_elements(&mut planned, deleted, added);
        planned
    }

    pub(super) fn planned(
        &self,
        services: Vec<(NamespacedName, Option<Vec<SlottedPort>>)>,
    ) -> Planned {
        Planned {
            transaction: Transaction::new(self.table()),
            owners: Vec::new(),
            services,
            names: Arc::new([]),
            behaviours: Vec::new(),
            kinds: Vec::new(),
        }
    }

    /// Adds chains that are not there yet, those that they jump to first.
    pub(super) fn add_behaviours(
        &self,
        planned: &mut Planned,
        used: impl Iterator<Item = Behaviour>,
        there: &BTreeSet<Behaviour>,
    ) {
        let mut made: BTreeSet<Behaviour> = BTreeSet::new();
        for behaviour in used {
            for chain in chains::needed(behaviour).into_iter().chain([behaviour]) {
                if there.contains(&chain) || !made.insert(chain) {
                    continue;
                }
                if let Behaviour::Slot { slot, .. } = chain {
                    planned.transaction.add_set(affinity_set(slot, self.family()));
                }
                let name = chain.to_string();
                planned.transaction.add_chain(&name, None);
                self.add_rules(planned, &name, self.behaviour_rules(chain));
                planned.behaviours.push(chain);
            }
        }
        planned.owners.resize(planned.transaction.ops.len(), Vec::new());
    }

    pub(super) fn behaviour_rules(&self, behaviour: Behaviour) -> Vec<Described> {
        chains::rules(behaviour, self.family(), self.structure.environment.masquerade_bit)
            .into_iter()
            .map(|exprs| ("", exprs))
            .collect()
    }

    pub(super) fn add_rules(&self, planned: &mut Planned, chain: &str, rules: Vec<Described>) {
        for (what, exprs) in rules {
            let comment = Some(comment(what, &exprs));
            planned.transaction.push(Op::AddRule(Rule { chain: chain.to_owned(), exprs, comment }));
        }
    }

    /// Takes note that the kernel took a transaction of [`Ruleset::plan_changes`].
    pub fn commit(&mut self, planned: Planned) {
        for (name, ports) in planned.services {
            for id in self.services.get(&name).into_iter().flatten().filter_map(SlottedPort::id) {
                self.ids.remove(&id);
            }
            self.ids.extend(ports.iter().flatten().filter_map(SlottedPort::id));
            let old = match ports {
                Some(ports) => {
                    for key in hairpins(&ports) {
                        *self.hairpin.entry(key).or_default() += 1;
                    }
                    self.services.insert(name, ports)
                }
                None => self.services.remove(&name),
            };
            for key in hairpins(old.as_deref().unwrap_or_default()) {
                if let Some(count) = self.hairpin.get_mut(&key) {
                    *count -= 1;
                    if *count == 0 {
                        self.hairpin.remove(&key);
                    }
                }
            }
        }
        self.chains.extend(planned.behaviours);
        self.kinds.commit(planned.kinds);
    }

    /// Takes note of plans without a transaction: the next [`Ruleset::plan_repair`] programs them.
    pub fn adopt(&mut self, name: &NamespacedName, plan: Option<&Arc<ServicePlan>>) {
        let known = self.services.get(name);
        if plan.is_some_and(|plan| known.is_some_and(|ports| ports.iter().all(|p| p.is_of(plan)))) {
            return;
        }
        let ports = self.slotted(name, plan, &mut HashSet::new());
        let mut planned = self.planned(Vec::new());
        planned.services.push((name.clone(), ports));
        self.commit(planned);
    }

    /// Forgets a Service whose elements the kernel refuses.
    pub fn forget(&mut self, name: &NamespacedName) {
        self.adopt(name, None);
    }

    /// Forgets all Services but these.
    pub fn retain(&mut self, known: &HashSet<&NamespacedName>) {
        let gone: Vec<NamespacedName> =
            self.services.keys().filter(|name| !known.contains(name)).cloned().collect();
        gone.iter().for_each(|name| self.forget(name));
    }

    /// Remembers which slots endpoints have in the kernel, for Services that are told later.
    pub fn take_hints(&mut self, observed: &Observed) {
        self.hints.clear();
        let address_len = chains::words(self.family()) as usize * 4;
        let with_indices = Pool::ALL.map(|pool| (pool, MapId::Endpoints(pool)));
        let kept = Policy::ALL.map(|policy| (Pool::kept(policy), MapId::Kept(policy)));
        for (pool, map) in with_indices.into_iter().chain(kept) {
            for (key, (_, data)) in observed.get(&map).into_iter().flatten() {
                let (Some(Data::Value(value)), Some((service, slot))) =
                    (data, key.bytes().split_last_chunk::<4>())
                else {
                    continue;
                };
                let slot = u32::from_ne_bytes(*slot) as usize;
                let Some(endpoint) = endpoint_of(value.bytes(), address_len) else { continue };
                // A foreign element must not make the list huge.
                if slot >= 65_536 {
                    continue;
                }
                let slots = self.hints.entry((pool, Key::from_bytes(service))).or_default();
                if slots.0.len() <= slot {
                    slots.0.resize(slot + 1, None);
                }
                slots.0[slot] = Some(endpoint);
            }
        }
    }

    /// Forgets the hints: all Services have been told.
    pub fn drop_hints(&mut self) {
        self.hints = HashMap::new();
    }

    /// The shapes of all sets and maps.
    pub fn sets(&self) -> Vec<nft::Set> {
        let family = self.family();
        let maps = MapId::all().into_iter().chain(MapId::before());
        let mut sets: Vec<nft::Set> = maps.map(|map| map.set(family)).collect();
        for ports in self.services.values() {
            for chain in all_chains(&collect(ports).behaviours.into_iter().collect()) {
                if let Behaviour::Slot { slot, .. } = chain {
                    sets.push(affinity_set(slot, family));
                }
            }
        }
        sets.sort_by(|a, b| a.name.cmp(&b.name));
        sets.dedup_by(|a, b| a.name == b.name);
        sets
    }

    /// How many elements a plan may have, roughly: for cutting changes into batches.
    pub fn weight(plan: Option<&Arc<ServicePlan>>) -> usize {
        let of_port = |p: &PortPlan| {
            let origins = 1 + p.external_ips.len() + usize::from(p.node_port != 0);
            origins * (2 + p.cluster.len() + p.local.len()) + p.source_ranges.len()
        };
        plan.map_or(1, |plan| plan.ports.iter().map(of_port).sum::<usize>() + 1)
    }

    /// The transaction for another fixed part (the node's addresses changed).
    pub fn plan_structure(&mut self, structure: Structure) -> Transaction {
        let old = self.structure.chains();
        self.structure = structure;
        let mut planned = self.planned(Vec::new());
        for ((_, _, before), (name, _, rules)) in old.into_iter().zip(self.structure.chains()) {
            if before != rules {
                planned.transaction.push(Op::FlushChain(name.to_owned()));
                self.add_rules(&mut planned, name, rules);
            }
        }
        planned.transaction
    }

    /// Number of chains in the kernel that stand for behaviours.
    pub fn behaviours(&self) -> usize {
        self.chains.len()
    }

    /// All elements that should be there for Services, for comparing.
    pub fn entries(&self) -> Vec<Entry> {
        let mut all: Vec<Entry> =
            self.services.values().flat_map(|ports| collect(ports).entries).collect();
        all.extend(self.hairpin.keys().map(|key| Entry {
            map: MapId::Hairpin,
            key: key.clone(),
            key_end: None,
            target: None,
        }));
        all.sort_by(|a, b| (a.map, &a.key).cmp(&(b.map, &b.key)));
        all
    }

    /// Kinds whose numbers are in the kernel, for comparing.
    pub fn kinds(&self) -> Vec<(Kind, u32)> {
        self.kinds.there().collect()
    }
}

/// The element by which a number leads to a kind's chain.
pub(super) fn kind_element(kind: Kind, number: u32) -> (MapId, Element, u32) {
    (kind.map(), Element::verdict(Key::new().number(number), kind.verdict()), NOBODY)
}

/// An element to delete.
fn gone(entry: &Entry) -> Element {
    Element { key_end: entry.key_end.clone(), ..Element::new(entry.key.clone()) }
}

/// Behaviours with all that they jump to.
pub(super) fn all_chains(used: &BTreeSet<Behaviour>) -> BTreeSet<Behaviour> {
    used.iter().flat_map(|b| chains::needed(*b).into_iter().chain([*b])).collect()
}

fn endpoint_of(value: &[u8], address_len: usize) -> Option<SocketAddr> {
    let address = value.get(..address_len)?;
    let port = value.get(address_len..address_len + 2)?;
    let ip: IpAddr = match address_len {
        4 => <[u8; 4]>::try_from(address).ok()?.into(),
        _ => <[u8; 16]>::try_from(address).ok()?.into(),
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes([port[0], port[1]])))
}

/// Tells what to delete and, where true, to add between two sorted lists.
fn diff<'a>(old: &'a [Entry], new: &'a [Entry], mut tell: impl FnMut(&'a Entry, bool)) {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(a), Some(b)) => (a.map, &a.key).cmp(&(b.map, &b.key)),
        };
        let before = if order.is_le() { old.next() } else { None };
        let after = if order.is_ge() { new.next() } else { None };
        if before == after {
            continue;
        }
        if let Some(entry) = before {
            tell(entry, false);
        }
        if let Some(entry) = after {
            tell(entry, true);
        }
    }
}

/// Groups elements into one change per map: what goes first, then what comes, data before the
/// verdicts that lead to it.
pub(super) fn push_elements(planned: &mut Planned, mut deleted: ByMap, mut added: ByMap) {
    planned.owners.resize(planned.transaction.ops.len(), Vec::new());
    for (list, add) in [(&mut deleted, false), (&mut added, true)] {
        list.sort_by_key(|(map, _, _)| *map);
        let mut at: Option<MapId> = None;
        for (map, element, owner) in list.drain(..) {
            if at != Some(map) {
                at = Some(map);
                let (set, elements) = (map.to_string(), Vec::new());
                planned.transaction.push(if add {
                    Op::AddElements { set, elements }
                } else {
                    Op::DeleteElements { set, elements }
                });
                planned.owners.push(Vec::new());
            }
            if let Some(Op::AddElements { elements, .. } | Op::DeleteElements { elements, .. }) =
                planned.transaction.ops.last_mut()
            {
                elements.push(element);
            }
            if let Some(owners) = planned.owners.last_mut() {
                owners.push(owner);
            }
        }
    }
}
