//! From what the kernel tells to the desired table: a restart, a repair, a takeover from the version
//! before.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use nft::{Data, Element, Key, Op, TableState, Transaction, Verdict};

use super::base::{Described, comment};
use super::batches::{ByMap, NOBODY, Together, adopt_orphans, batches};
use super::entries::{Collected, Entry, collect};
use super::kinds::{Kind, Led, Numbers, number_of, number_of_key};
use super::names::{Behaviour, MapId, affinity_name, affinity_set, id_of, is_affinity};
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
        let Some(state) = state.filter(|state| !scratch && self.fits(state)) else {
            let mut all = Vec::new();
            self.begin_anew();
            self.plan_anew(state.is_some(), |planned| {
                all.push(planned);
                true
            });
            return all;
        };
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
        for map in MapId::all() {
            let set = map.set(self.family());
            if !state.sets.contains_key(&set.name) {
                planned.transaction.add_set(set);
            }
        }
        let there: BTreeSet<Behaviour> = all_chains(&used)
            .into_iter()
            .filter(|chain| {
                let found = state.chains.get(&chain.to_string());
                found.is_some_and(|(_, found)| same_rules(found, &self.behaviour_rules(*chain)))
            })
            .collect();
        self.repair_fixed(&mut planned, Some(state));
        // A behaviour whose chain is there with other rules is emptied and written again.
        for chain in all_chains(&used) {
            let name = chain.to_string();
            if !there.contains(&chain) && state.chains.contains_key(&name) {
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
        let keeper = Keeper { observed, led: &led, by_id: &by_id };
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
                    if let Some((_, data)) = found
                        && let Some(other) = keeper.of(entry.map, &entry.key, data)
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
            // The small maps are put right by number; what the version before left goes with its map.
            if Kind::MAPS.contains(map) || matches!(map, MapId::PicksBefore(_)) {
                continue;
            }
            for (key, found) in elements {
                if !seen.contains(&(*map, key)) {
                    // Where affinity leads to endpoints that change with a Service, it goes with that.
                    let owner = keeper.of(*map, key, &found.1).unwrap_or(NOBODY);
                    deleted.push((*map, old_element(key, Some(found)), owner));
                }
            }
        }
        for (map, number) in led.keys().filter(|(map, number)| !self.kinds.has(*map, *number)) {
            deleted.push((*map, Element::new(Key::new().number(*number)), NOBODY));
        }
        self.chains = there;
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

    pub(super) fn repair_fixed(&self, planned: &mut Planned, state: Option<&TableState>) {
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

    /// Whether what is there can be kept: known sets of the right shape, chains at the right hooks.
    fn fits(&self, state: &TableState) -> bool {
        let family = self.family();
        let known: HashMap<String, MapId> = MapId::all()
            .into_iter()
            .chain(MapId::before())
            .map(|map| (map.to_string(), map))
            .collect();
        let set = |name: &String, found: &nft::SetEntry| match known.get(name) {
            Some(map) => found.is_of(&map.set(family)),
            None => is_affinity(name) && found.is_of(&affinity_set(0, family)),
        };
        state.sets.iter().all(|(name, found)| set(name, found))
            && self.structure.chains().iter().all(|(name, base, _)| {
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
            self.structure.chains().iter().map(|(name, _, _)| *name).collect();
        let mut gone: Vec<&String> = state
            .chains
            .keys()
            .filter(|name| !names.contains(*name) && !fixed.contains(name.as_str()))
            .collect();
        // Chains that jump come before those that are jumped to: masquerade-, inside-, then the
        // others, recall, slots last. Maps of the version before go when nothing looks into them and
        // before what they lead to.
        let inner = |name: &&String| name.contains("slot-") || name.contains("recall-");
        gone.sort_by_key(|name| {
            let outer = name.starts_with("masq") || name.starts_with("inside");
            (name.contains("slot-"), name.contains("recall-"), !outer)
        });
        let (led_to, leading): (Vec<&String>, Vec<&String>) = gone.into_iter().partition(inner);
        let chain =
            |name: &String| vec![Op::FlushChain(name.clone()), Op::DeleteChain(name.clone())];
        let before = MapId::before().map(|map| map.to_string());
        let before = before.into_iter().filter(|name| state.sets.contains_key(name));
        let mut all: Vec<Vec<Op>> = leading.into_iter().map(chain).collect();
        all.extend(before.map(|name| vec![Op::DeleteSet(name)]));
        all.extend(led_to.into_iter().map(chain));
        let sets: HashSet<String> = used
            .iter()
            .filter_map(|chain| match chain {
                Behaviour::Slot { slot, .. } => Some(affinity_name(*slot)),
                Behaviour::Recall { .. } | Behaviour::Pick { .. } => None,
            })
            .collect();
        let empty = state.sets.keys().filter(|name| is_affinity(name) && !sets.contains(*name));
        all.extend(empty.map(|name| vec![Op::DeleteSet(name.clone())]));
        self.chains = self.chains.intersection(&used).copied().collect();
        let transaction = |ops| Transaction { ops, ..Transaction::new(self.table()) };
        all.into_iter().map(transaction).collect()
    }
}

/// Where numbers lead in the kernel.
fn leading(observed: &Observed) -> Led {
    let mut led = Led::new();
    for map in Kind::MAPS {
        for (key, (_, data)) in observed.get(&map).into_iter().flatten() {
            if let (Some(number), Some(Data::Verdict(verdict))) = (number_of_key(key), data) {
                led.insert((map, number), verdict.clone());
            }
        }
    }
    led
}

/// Tells Services with affinity, by index.
struct Keeper<'a> {
    observed: &'a Observed,
    led: &'a Led,
    by_id: &'a HashMap<u32, u32>,
}

impl Keeper<'_> {
    /// The one to whose endpoints an element leads: by the number that its address has, or in the
    /// version before by the chain.
    fn of(&self, map: MapId, key: &Key, data: &Option<Data>) -> Option<u32> {
        let number = number_of(data.as_ref()?)?;
        let id = match map {
            MapId::Ids(_) => number,
            MapId::Numbers(dispatch) => {
                let Verdict::Goto(chain) = self.led.get(&(MapId::Kinds, number))? else {
                    return None;
                };
                let ids = self.observed.get(&MapId::Ids(dispatch.origin()));
                let id = ids.and_then(|ids| number_of(ids.get(key)?.1.as_ref()?));
                id_of(chain).or(id)?
            }
            _ => return None,
        };
        self.by_id.get(&id).copied()
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
