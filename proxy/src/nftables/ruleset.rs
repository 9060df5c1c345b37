//! The desired state of one family's table, and the transactions that lead to it: from what was
//! programmed before (a change), or from what the kernel tells (a restart, a repair).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nft::{Data, Element, Family, Key, Op, Rule, Table, TableState, Transaction};

use super::base::{Structure, comment};
use super::chains;
use super::entries::{
    Collected, Entry, Slots, SlottedPort, assign_slots, collect, hairpins, protocol_number, vip,
};
use super::names::{
    Behaviour, MapId, Origin, Policy, Pool, TABLE, affinity_name, affinity_set, id_of, is_affinity,
};
use crate::object::NamespacedName;
use crate::plan::{PortPlan, ServicePlan};

/// Elements of a map as the kernel told them, by key.
pub type Observed = HashMap<MapId, HashMap<Key, (Option<Key>, Option<Data>)>>;

/// One family's desired table.
#[derive(Debug)]
pub struct Ruleset {
    /// The fixed part.
    pub structure: Structure,
    services: HashMap<NamespacedName, Vec<SlottedPort>>,
    /// How many Services have an endpoint that may talk to itself.
    hairpin: HashMap<Key, u32>,
    /// Numbers of the ports with affinity.
    ids: HashSet<u32>,
    /// Behaviours whose chains are in the kernel.
    chains: BTreeSet<Behaviour>,
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
    owners: Vec<Vec<u32>>,
    services: Vec<(NamespacedName, Option<Vec<SlottedPort>>)>,
    /// Names by index, for a transaction of a repair.
    names: Arc<[NamespacedName]>,
    behaviours: Vec<Behaviour>,
}

impl Planned {
    /// Whose change the kernel refused, by the index of the change and the element in it.
    pub fn owner(&self, op: usize, element: Option<usize>) -> Option<&NamespacedName> {
        let owners = self.owners.get(op)?;
        let index = owners.get(element.unwrap_or(0)).copied()?;
        let named = self.services.get(index as usize).map(|(name, _)| name);
        named.or_else(|| self.names.get(index as usize))
    }

    /// Number of elements that are added or deleted.
    pub fn elements(&self) -> usize {
        self.owners.iter().map(Vec::len).sum()
    }
}

const NOBODY: u32 = u32::MAX;

/// Elements in one batch, roughly: it holds the kernel's lock for 5 to 15 ms.
pub const BATCH: usize = 4096;

/// Elements by map, each with its owner.
type ByMap = Vec<(MapId, Element, u32)>;

impl Ruleset {
    /// Nothing but the fixed part.
    pub fn new(structure: Structure) -> Self {
        Ruleset {
            structure,
            services: HashMap::new(),
            hairpin: HashMap::new(),
            ids: HashSet::new(),
            chains: BTreeSet::new(),
            hints: HashMap::new(),
            batch: BATCH,
        }
    }

    /// The table.
    pub fn table(&self) -> Table {
        Table::new(self.structure.family, TABLE)
    }

    fn family(&self) -> Family {
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
            diff(&was.entries, &entries, |map, element, add| {
                if add { &mut added } else { &mut deleted }.push((map, element, owner));
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
        push_elements(&mut planned, deleted, added);
        planned
    }

    fn planned(&self, services: Vec<(NamespacedName, Option<Vec<SlottedPort>>)>) -> Planned {
        Planned {
            transaction: Transaction::new(self.table()),
            owners: Vec::new(),
            services,
            names: Arc::new([]),
            behaviours: Vec::new(),
        }
    }

    /// Adds chains that are not there yet, those that they jump to first.
    fn add_behaviours(
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

    fn behaviour_rules(&self, behaviour: Behaviour) -> Vec<(&'static str, Vec<nft::Expr>)> {
        chains::rules(behaviour, self.family(), self.structure.environment.masquerade_bit)
            .into_iter()
            .map(|exprs| ("", exprs))
            .collect()
    }

    fn add_rules(
        &self,
        planned: &mut Planned,
        chain: &str,
        rules: Vec<(&'static str, Vec<nft::Expr>)>,
    ) {
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
    }

    /// Takes note of plans without a transaction: the next [`Ruleset::plan_repair`] programs them.
    pub fn adopt(&mut self, name: &NamespacedName, plan: Option<&Arc<ServicePlan>>) {
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

    /// The transactions that make the kernel's table what it should be, whatever it is now: chains
    /// first, then Service by Service, then what nobody wants, so that after each of them every
    /// Service is as it was or as it should be. A table of another shape (or from `scratch`) is made
    /// anew within one transaction.
    pub fn plan_repair(
        &mut self,
        state: Option<&TableState>,
        observed: &Observed,
        scratch: bool,
    ) -> Vec<Planned> {
        let names: Vec<NamespacedName> = self.services.keys().cloned().collect();
        let mut used: BTreeSet<Behaviour> = BTreeSet::new();
        let mut desired: Vec<(Entry, u32)> = Vec::new();
        let mut by_id: HashMap<u32, u32> = HashMap::new();
        for (owner, name) in names.iter().enumerate() {
            let ports = self.services.get(name).map(Vec::as_slice).unwrap_or_default();
            by_id.extend(ports.iter().filter_map(|port| Some((port.id()?, owner as u32))));
            let Collected { entries, behaviours } = collect(ports);
            used.extend(behaviours);
            desired.extend(entries.into_iter().map(|entry| (entry, owner as u32)));
        }
        desired.extend(self.hairpin.keys().map(|key| {
            let entry = Entry { map: MapId::Hairpin, key: key.clone(), key_end: None, data: None };
            (entry, NOBODY)
        }));

        let names: Arc<[NamespacedName]> = names.into();
        let mut planned = Planned { names: names.clone(), ..self.planned(Vec::new()) };
        let usable = state.filter(|state| !scratch && self.fits(state));
        if usable.is_none() && state.is_some() {
            planned.transaction.push(Op::DeleteTable);
        }
        if usable.is_none() {
            let comment = "Services of Longshore; changed while you watch".to_owned();
            planned.transaction.push(Op::AddTable(Some(comment)));
        }
        for map in MapId::all() {
            let set = map.set(self.family());
            if usable.is_none_or(|state| !state.sets.contains_key(&set.name)) {
                planned.transaction.add_set(set);
            }
        }
        let there: BTreeSet<Behaviour> = match usable {
            None => BTreeSet::new(),
            Some(state) => all_chains(&used)
                .into_iter()
                .filter(|chain| {
                    let rules = self.behaviour_rules(*chain);
                    state
                        .chains
                        .get(&chain.to_string())
                        .is_some_and(|(_, found)| same_rules(found, &rules))
                })
                .collect(),
        };
        self.repair_fixed(&mut planned, usable);
        // A behaviour whose chain is there with other rules is emptied and written again.
        for chain in all_chains(&used) {
            let name = chain.to_string();
            if !there.contains(&chain)
                && usable.is_some_and(|state| state.chains.contains_key(&name))
            {
                planned.transaction.push(Op::FlushChain(name));
            }
        }
        self.add_behaviours(&mut planned, used.iter().copied(), &there);

        let (mut deleted, mut added): (ByMap, ByMap) = (Vec::new(), Vec::new());
        let nothing = Observed::new();
        let observed = if usable.is_some() { observed } else { &nothing };
        let mut seen: HashSet<(MapId, &Key)> = HashSet::with_capacity(desired.len());
        let mut together = Together::default();
        for (entry, owner) in &desired {
            seen.insert((entry.map, &entry.key));
            match observed.get(&entry.map).and_then(|elements| elements.get(&entry.key)) {
                Some((end, data)) if *data == entry.data && same_end(end, &entry.key_end) => {}
                found => {
                    if let Some((_, data)) = found {
                        deleted.push((entry.map, old_element(&entry.key, found), *owner));
                        // What moves from a Service with affinity leads to that one's endpoints
                        // until it has moved.
                        if let Some(before) = keeper(data, &by_id)
                            && *owner != NOBODY
                        {
                            together.join(before, *owner);
                        }
                    }
                    added.push((entry.map, entry.element(), *owner));
                }
            }
        }
        for (map, elements) in observed {
            for (key, found) in elements {
                if !seen.contains(&(*map, key)) {
                    // Where affinity leads to endpoints that change with a Service, it goes with that.
                    let owner = keeper(&found.1, &by_id).unwrap_or(NOBODY);
                    deleted.push((*map, old_element(key, Some(found)), owner));
                }
            }
        }
        self.chains = there;
        if usable.is_none() && state.is_some() {
            push_elements(&mut planned, deleted, added);
            return vec![planned];
        }
        drop(seen);
        adopt_orphans(&mut deleted, &desired);
        drop(desired);
        let mut all = batches(deleted, added, &together, self.batch);
        let first = all.first_mut().map(std::mem::take).unwrap_or_default();
        push_elements(&mut planned, first.0, first.1);
        let mut planned = vec![planned];
        for (deleted, added) in all.into_iter().skip(1) {
            let mut next = Planned { names: names.clone(), ..self.planned(Vec::new()) };
            push_elements(&mut next, deleted, added);
            planned.push(next);
        }
        planned
    }

    /// As [`Ruleset::plan_repair`], for showing only.
    pub fn plan_only(&mut self, state: Option<&TableState>, observed: &Observed) -> Vec<Planned> {
        let chains = self.chains.clone();
        let planned = self.plan_repair(state, observed, false);
        self.chains = chains;
        planned
    }

    /// The shapes of all sets and maps.
    pub fn sets(&self) -> Vec<nft::Set> {
        let family = self.family();
        let mut sets: Vec<nft::Set> = MapId::all().iter().map(|map| map.set(family)).collect();
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

    /// Takes note that the kernel took a transaction of [`Ruleset::plan_repair`].
    pub fn commit_repair(&mut self, planned: Planned) {
        self.chains.extend(planned.behaviours);
    }

    /// How many elements a plan may have, roughly: for cutting changes into batches.
    pub fn weight(plan: Option<&Arc<ServicePlan>>) -> usize {
        let of_port = |p: &PortPlan| {
            let origins = 1 + p.external_ips.len() + usize::from(p.node_port != 0);
            origins * (2 + p.cluster.len() + p.local.len()) + p.source_ranges.len()
        };
        plan.map_or(1, |plan| plan.ports.iter().map(of_port).sum::<usize>() + 1)
    }

    fn repair_fixed(&self, planned: &mut Planned, state: Option<&TableState>) {
        let fixed = self.structure.chains();
        let mut wrong = Vec::new();
        for (name, base, rules) in fixed {
            match state.and_then(|state| state.chains.get(name)) {
                Some((_, found)) if same_rules(found, &rules) => {}
                found => {
                    if found.is_none() {
                        planned.transaction.add_chain(name, base);
                    } else {
                        planned.transaction.push(Op::FlushChain(name.to_owned()));
                    }
                    wrong.push((name, rules));
                }
            }
        }
        for (name, rules) in wrong {
            self.add_rules(planned, name, rules);
        }
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

    /// Whether what is there can be kept: sets of the right shape, chains at the right hooks.
    fn fits(&self, state: &TableState) -> bool {
        let shape = |set: &nft::Set| state.sets.get(&set.name).is_none_or(|found| found.is_of(set));
        let family = self.family();
        MapId::all().into_iter().all(|map| shape(&map.set(family)))
            && self.structure.chains().iter().all(|(name, base, _)| {
                state.chains.get(*name).is_none_or(|(found, _)| found == base)
            })
    }

    /// Deletes chains of behaviours that no Service has, and empty slots' sets. Each may be in use
    /// still in an old kernel, so each is its own transaction.
    pub fn plan_sweep(&mut self, state: &TableState) -> Vec<Transaction> {
        let mut used = BTreeSet::new();
        for ports in self.services.values() {
            used.extend(collect(ports).behaviours);
        }
        let used = all_chains(&used);
        let names: HashSet<String> = used.iter().map(Behaviour::to_string).collect();
        let fixed: HashSet<&str> =
            self.structure.chains().iter().map(|(name, _, _)| *name).collect();
        let mut gone: Vec<&String> = state
            .chains
            .keys()
            .filter(|name| !names.contains(*name) && !fixed.contains(name.as_str()))
            .collect();
        // Chains that jump come before those that are jumped to: masquerade-, inside-, then the
        // others, recall, slots last.
        gone.sort_by_key(|name| {
            let outer = name.starts_with("masq") || name.starts_with("inside");
            (name.contains("slot-"), name.contains("recall-"), !outer)
        });
        let mut all: Vec<Transaction> = Vec::new();
        for name in gone {
            let mut tx = Transaction::new(self.table());
            tx.push(Op::FlushChain(name.clone())).push(Op::DeleteChain(name.clone()));
            all.push(tx);
        }
        let sets: HashSet<String> = used
            .iter()
            .filter_map(|chain| match chain {
                Behaviour::Slot { slot, .. } => Some(affinity_name(*slot)),
                Behaviour::Recall { .. } | Behaviour::Pick { .. } => None,
            })
            .collect();
        for name in state.sets.keys().filter(|name| is_affinity(name) && !sets.contains(*name)) {
            let mut tx = Transaction::new(self.table());
            tx.push(Op::DeleteSet(name.clone()));
            all.push(tx);
        }
        self.chains = self.chains.intersection(&used).copied().collect();
        all
    }

    /// Number of chains in the kernel that stand for behaviours.
    pub fn behaviours(&self) -> usize {
        self.chains.len()
    }

    /// All elements that should be there, for comparing.
    pub fn entries(&self) -> Vec<Entry> {
        let mut all: Vec<Entry> =
            self.services.values().flat_map(|ports| collect(ports).entries).collect();
        all.extend(self.hairpin.keys().map(|key| Entry {
            map: MapId::Hairpin,
            key: key.clone(),
            key_end: None,
            data: None,
        }));
        all.sort_by(|a, b| (a.map, &a.key).cmp(&(b.map, &b.key)));
        all
    }
}

/// Gives what nobody wants any more to the Service that now has the address or port it was for: the
/// Service's elements change together.
fn adopt_orphans(deleted: &mut ByMap, desired: &[(Entry, u32)]) {
    let mut wanted: HashMap<(Origin, Key), u32> = HashMap::new();
    for (map, element, owner) in deleted.iter() {
        if *owner == NOBODY
            && let Some(place) = place(*map, &element.key)
        {
            wanted.insert(place, NOBODY);
        }
    }
    if wanted.is_empty() {
        return;
    }
    for (entry, owner) in desired.iter().filter(|(_, owner)| *owner != NOBODY) {
        if let Some(place) = place(entry.map, &entry.key)
            && let Some(found) = wanted.get_mut(&place)
        {
            *found = *owner;
        }
    }
    for (map, element, owner) in deleted.iter_mut().filter(|(_, _, owner)| *owner == NOBODY) {
        if let Some(found) = place(*map, &element.key).and_then(|place| wanted.get(&place)) {
            *owner = *found;
        }
    }
}

/// The address or port that an element is for.
fn place(map: MapId, key: &Key) -> Option<(Origin, Key)> {
    let bytes = key.bytes();
    let (origin, len) = match map {
        MapId::Endpoints(pool) => (pool.origin, bytes.len() - 4),
        // The number of a port with affinity, which is no address.
        MapId::Kept(_) | MapId::Picks(_) => (Origin::Vip, 4),
        MapId::Services | MapId::Firewalled => (Origin::Vip, bytes.len()),
        MapId::NodePorts => (Origin::NodePort, bytes.len()),
        MapId::Inside(origin) | MapId::NoEndpoints(origin) => (origin, bytes.len()),
        // Address, protocol and port; then the source, as long as the address.
        MapId::FirewallSources => (Origin::Vip, if bytes.len() > 24 { 24 } else { 12 }),
        MapId::ClusterIps | MapId::Hairpin => return None,
    };
    Some((origin, Key::from_bytes(bytes.get(..len)?)))
}

/// The Service with affinity, by index, to whose endpoints an element leads.
fn keeper(data: &Option<Data>, by_id: &HashMap<u32, u32>) -> Option<u32> {
    match data {
        Some(Data::Verdict(nft::Verdict::Goto(chain))) => by_id.get(&id_of(chain)?).copied(),
        _ => None,
    }
}

/// Which Services change in one batch, as something goes from one to another: to each the first one
/// of its group.
#[derive(Debug, Default)]
struct Together(HashMap<u32, u32>);

impl Together {
    fn first(&self, mut owner: u32) -> u32 {
        while let Some(before) = self.0.get(&owner) {
            owner = *before;
        }
        owner
    }

    fn join(&mut self, one: u32, other: u32) {
        let (one, other) = (self.first(one), self.first(other));
        if one != other {
            self.0.insert(one.max(other), one.min(other));
        }
    }
}

/// Cuts changes into batches that keep what is of one Service together, and of those that go together.
fn batches(deleted: ByMap, added: ByMap, together: &Together, limit: usize) -> Vec<(ByMap, ByMap)> {
    let (mut orphans, mut deleted): (ByMap, ByMap) =
        deleted.into_iter().partition(|(_, _, owner)| *owner == NOBODY);
    let (mut first, mut added): (ByMap, ByMap) =
        added.into_iter().partition(|(_, _, owner)| *owner == NOBODY);
    let mut all: Vec<(ByMap, ByMap)> = Vec::new();
    while !first.is_empty() {
        let rest = first.split_off(first.len().min(limit));
        all.push((Vec::new(), std::mem::replace(&mut first, rest)));
    }
    // Taken from the end.
    deleted.sort_by_key(|(_, _, owner)| std::cmp::Reverse(together.first(*owner)));
    added.sort_by_key(|(_, _, owner)| std::cmp::Reverse(together.first(*owner)));
    let group = |element: &(MapId, Element, u32)| together.first(element.2);
    let mut batch: (ByMap, ByMap) = Default::default();
    while let Some(next) = [deleted.last(), added.last()].into_iter().flatten().map(group).min() {
        for (from, to) in [(&mut deleted, &mut batch.0), (&mut added, &mut batch.1)] {
            while from.last().is_some_and(|element| group(element) == next) {
                to.extend(from.pop());
            }
        }
        if batch.0.len() + batch.1.len() >= limit {
            all.push(std::mem::take(&mut batch));
        }
    }
    all.push(batch);
    // Verdicts go before the endpoints that they lead to.
    orphans.sort_by_key(|(map, _, _)| std::cmp::Reverse(*map));
    while !orphans.is_empty() {
        let rest = orphans.split_off(orphans.len().min(limit));
        all.push((std::mem::replace(&mut orphans, rest), Vec::new()));
    }
    all.retain(|(deleted, added)| !deleted.is_empty() || !added.is_empty());
    all
}

/// Behaviours with all that they jump to.
fn all_chains(used: &BTreeSet<Behaviour>) -> BTreeSet<Behaviour> {
    used.iter().flat_map(|b| chains::needed(*b).into_iter().chain([*b])).collect()
}

fn same_rules(found: &[nft::RuleEntry], rules: &[(&'static str, Vec<nft::Expr>)]) -> bool {
    found.len() == rules.len()
        && found.iter().zip(rules).all(|(found, (what, exprs))| {
            found.comment.as_deref() == Some(comment(what, exprs).as_str())
        })
}

fn same_end(found: &Option<Key>, wanted: &Option<Key>) -> bool {
    wanted.is_none() || found == wanted
}

fn old_element(key: &Key, found: Option<&(Option<Key>, Option<Data>)>) -> Element {
    Element { key_end: found.and_then(|(end, _)| end.clone()), ..Element::new(key.clone()) }
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

/// Tells the elements to delete and to add between two sorted lists.
fn diff(old: &[Entry], new: &[Entry], mut tell: impl FnMut(MapId, Element, bool)) {
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
            let element =
                Element { key_end: entry.key_end.clone(), ..Element::new(entry.key.clone()) };
            tell(entry.map, element, false);
        }
        if let Some(entry) = after {
            tell(entry.map, entry.element(), true);
        }
    }
}

/// Groups elements into one change per map: what goes first, then what comes, data before the
/// verdicts that lead to it.
fn push_elements(planned: &mut Planned, mut deleted: ByMap, mut added: ByMap) {
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
