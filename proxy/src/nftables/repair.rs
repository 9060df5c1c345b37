//! From what the kernel tells to the desired table: a restart, a repair, a takeover from the version
//! before.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use nft::{Data, Element, Key, Op, TableState, Transaction, Verdict};

use super::base::{Described, comment};
use super::batches::{ByMap, NOBODY, Together, adopt_orphans, batches};
use super::entries::{Collected, Entry, collect};
use super::kinds::{Kind, Led, Numbers, number_of, number_of_key};
use super::names::{Behaviour, MapId, affinity_name, id_of, is_affinity};
use super::ruleset::{Observed, Planned, Ruleset, all_chains, kind_element, push_elements};
use crate::object::NamespacedName;

impl Ruleset {
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
        let mut kinds: BTreeSet<Kind> = Kind::FIXED.into();
        let mut desired: Vec<(Entry, u32)> = Vec::new();
        let mut by_id: HashMap<u32, u32> = HashMap::new();
        for (owner, name) in names.iter().enumerate() {
            let ports = self.services.get(name).map(Vec::as_slice).unwrap_or_default();
            by_id.extend(ports.iter().filter_map(|port| Some((port.id()?, owner as u32))));
            let Collected { entries, behaviours } = collect(ports);
            used.extend(behaviours);
            kinds.extend(entries.iter().filter_map(Entry::kind));
            desired.extend(entries.into_iter().map(|entry| (entry, owner as u32)));
        }
        desired.extend(self.hairpin.keys().map(|key| {
            let key = key.clone();
            (Entry { map: MapId::Hairpin, key, key_end: None, target: None }, NOBODY)
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
        let nothing = Observed::new();
        let observed = if usable.is_some() { observed } else { &nothing };
        let before = usable.is_some_and(|state| self.structure.looks_before(state));
        self.repair_fixed(&mut planned, usable, before);
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
        let led = leading(observed);
        self.repair_kinds(&mut planned, &kinds, &led);

        let (mut deleted, mut added): (ByMap, ByMap) = (Vec::new(), Vec::new());
        let mut numbers = Numbers::new(&self.kinds);
        let mut seen: HashSet<(MapId, &Key)> = HashSet::with_capacity(desired.len());
        let mut together = Together::default();
        let element = |map, key| observed.get(&map).and_then(|elements| elements.get(key));
        for (entry, owner) in &desired {
            seen.insert((entry.map, &entry.key));
            match element(entry.map, &entry.key) {
                Some((end, data))
                    if entry.leads_to(data, |kind| numbers.of(kind))
                        && same_end(end, &entry.key_end) => {}
                found => {
                    if found.is_some() {
                        deleted.push((entry.map, old_element(&entry.key, found), *owner));
                    }
                    // What moves from a Service with affinity leads to that one's endpoints until
                    // it has moved.
                    let found = found.map(|found| (entry.map, found)).or_else(|| {
                        let map = earlier(entry.map)?;
                        Some((map, element(map, &entry.key)?))
                    });
                    if let Some((map, (_, data))) = found
                        && let Some(other) = keeper(map, data, &led, &by_id)
                        && *owner != NOBODY
                    {
                        together.join(other, *owner);
                    }
                    let wanted = entry.element(|kind| numbers.of(kind));
                    added.push((entry.map, wanted, *owner));
                }
            }
        }
        for (map, elements) in observed {
            // What the version before left is not looked at any more, or goes with its map: an element
            // of the new map is looked at first.
            let now = match map {
                MapId::Kinds | MapId::Refusals => continue,
                MapId::Before(_) if !before => continue,
                MapId::Before(dispatch) => MapId::Numbers(*dispatch),
                map => *map,
            };
            for (key, found) in elements {
                if !seen.contains(&(now, key)) {
                    // Where affinity leads to endpoints that change with a Service, it goes with that.
                    let owner = keeper(*map, &found.1, &led, &by_id).unwrap_or(NOBODY);
                    deleted.push((*map, old_element(key, Some(found)), owner));
                }
            }
        }
        for (map, number) in led.keys().filter(|(map, number)| !self.kinds.has(*map, *number)) {
            deleted.push((*map, Element::new(Key::new().number(*number)), NOBODY));
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
        if before {
            planned.push(self.plan_after());
        }
        planned
    }

    /// Puts the numbers of kinds right, and tells the kernel those that it has not.
    fn repair_kinds(&mut self, planned: &mut Planned, wanted: &BTreeSet<Kind>, led: &Led) {
        self.kinds.renew(wanted, led);
        let (mut deleted, mut added): (ByMap, ByMap) = (Vec::new(), Vec::new());
        let mut all: Vec<(Kind, u32)> = self.kinds.all().collect();
        all.sort_unstable();
        for (kind, number) in &all {
            let found = led.get(&(kind.map(), *number));
            if found == Some(&kind.verdict()) {
                continue;
            }
            if found.is_some() {
                let element = Element::new(Key::new().number(*number));
                deleted.push((kind.map(), element, NOBODY));
            }
            added.push(kind_element(*kind, *number));
        }
        push_elements(planned, deleted, added);
        planned.kinds = all;
    }

    /// The last transaction of a takeover from the version before: nothing is in its maps any more
    /// that is not in the new ones.
    fn plan_after(&self) -> Planned {
        let mut planned = self.planned(Vec::new());
        let chains = self.structure.chains(true).into_iter().zip(self.structure.chains(false));
        for ((_, _, before), (name, _, rules)) in chains {
            if before != rules {
                planned.transaction.push(Op::FlushChain(name.to_owned()));
                self.add_rules(&mut planned, name, rules);
            }
        }
        planned.owners.resize(planned.transaction.ops.len(), Vec::new());
        planned
    }

    /// As [`Ruleset::plan_repair`], for showing only.
    pub fn plan_only(&mut self, state: Option<&TableState>, observed: &Observed) -> Vec<Planned> {
        let (chains, kinds) = (self.chains.clone(), self.kinds.clone());
        let planned = self.plan_repair(state, observed, false);
        (self.chains, self.kinds) = (chains, kinds);
        planned
    }

    /// Takes note that the kernel took a transaction of [`Ruleset::plan_repair`].
    pub fn commit_repair(&mut self, planned: Planned) {
        self.chains.extend(planned.behaviours);
        self.kinds.commit(planned.kinds);
    }

    fn repair_fixed(&self, planned: &mut Planned, state: Option<&TableState>, before: bool) {
        let fixed = self.structure.chains(before);
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

    /// Whether what is there can be kept: sets of the right shape, chains at the right hooks.
    fn fits(&self, state: &TableState) -> bool {
        let shape = |set: &nft::Set| state.sets.get(&set.name).is_none_or(|found| found.is_of(set));
        let family = self.family();
        MapId::all().into_iter().chain(MapId::before()).all(|map| shape(&map.set(family)))
            && self.structure.chains(false).iter().all(|(name, base, _)| {
                state.chains.get(*name).is_none_or(|(found, _)| found == base)
            })
    }

    /// Deletes the maps of the version before, chains of behaviours that no Service has, and empty
    /// slots' sets. Each may be in use still in an old kernel, so each is its own transaction.
    pub fn plan_sweep(&mut self, state: &TableState) -> Vec<Transaction> {
        let mut used = BTreeSet::new();
        for ports in self.services.values() {
            used.extend(collect(ports).behaviours);
        }
        let used = all_chains(&used);
        let names: HashSet<String> = used.iter().map(Behaviour::to_string).collect();
        let fixed: HashSet<&str> =
            self.structure.chains(false).iter().map(|(name, _, _)| *name).collect();
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
        // They lead to chains.
        for name in MapId::before().map(|map| map.to_string()) {
            if state.sets.contains_key(&name) {
                let mut tx = Transaction::new(self.table());
                tx.push(Op::DeleteSet(name));
                all.push(tx);
            }
        }
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
}

/// Where numbers lead in the kernel.
fn leading(observed: &Observed) -> Led {
    let mut led = Led::new();
    for map in [MapId::Kinds, MapId::Refusals] {
        for (key, (_, data)) in observed.get(&map).into_iter().flatten() {
            if let (Some(number), Some(Data::Verdict(verdict))) = (number_of_key(key), data) {
                led.insert((map, number), verdict.clone());
            }
        }
    }
    led
}

/// The map that the version before had for this one.
fn earlier(map: MapId) -> Option<MapId> {
    match map {
        MapId::Numbers(dispatch) => Some(MapId::Before(dispatch)),
        _ => None,
    }
}

/// The Service with affinity, by index, to whose endpoints an element leads, at once or by a number.
fn keeper(map: MapId, data: &Option<Data>, led: &Led, by_id: &HashMap<u32, u32>) -> Option<u32> {
    let data = data.as_ref()?;
    let verdict = match data {
        Data::Verdict(verdict) => verdict,
        Data::Value(_) if earlier(map).is_some() => led.get(&(MapId::Kinds, number_of(data)?))?,
        Data::Value(_) => return None,
    };
    match verdict {
        Verdict::Goto(chain) => by_id.get(&id_of(chain)?).copied(),
        _ => None,
    }
}

fn same_rules(found: &[nft::RuleEntry], rules: &[Described]) -> bool {
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
