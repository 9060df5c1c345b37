//! A table made from nothing: at the first start, and after somebody flushed all rules. There is
//! nothing to compare with, so that the transactions are told as they are planned, and one is in the
//! kernel while the next one is made.

use std::collections::BTreeSet;

use nft::{Element, Op};

use super::batches::{ByMap, NOBODY};
use super::entries::{Collected, Entry, collect};
use super::kinds::{Kind, Kinds, Numbers};
use super::names::{Behaviour, MapId};
use super::ruleset::{Planned, Ruleset, kind_element, push_elements};
use crate::object::NamespacedName;

impl Ruleset {
    /// Takes note that the kernel has nothing of the table, before [`Ruleset::plan_anew`].
    pub fn begin_anew(&mut self) {
        self.chains.clear();
        self.kinds = Kinds::default();
    }

    /// Tells the transactions that make the table, each as soon as it is planned and until told to
    /// stop: the fixed part first, then Service by Service. If there is a table to `replace` they
    /// are one. Each that the kernel takes is to be given to [`Ruleset::commit_repair`].
    pub fn plan_anew(&self, replace: bool, mut tell: impl FnMut(Planned) -> bool) {
        let limit = if replace { usize::MAX } else { self.batch };
        let mut making = Making {
            ruleset: self,
            numbers: Numbers::new(&self.kinds),
            chains: BTreeSet::new(),
            kinds: BTreeSet::new(),
            planned: self.planned(Vec::new()),
            next: Next { kinds: Kind::FIXED.into(), ..Next::default() },
        };
        making.begin(replace);
        for key in self.hairpin.keys() {
            making.next.added.push((MapId::Hairpin, Element::new(key.clone()), NOBODY));
            if making.next.added.len() >= limit && !tell(making.finish()) {
                return;
            }
        }
        for (name, ports) in &self.services {
            making.add(name, collect(ports));
            if making.next.added.len() >= limit && !tell(making.finish()) {
                return;
            }
        }
        if !making.planned.transaction.is_empty() || !making.next.added.is_empty() {
            tell(making.finish());
        }
    }
}

/// A table in the making.
struct Making<'a> {
    ruleset: &'a Ruleset,
    numbers: Numbers<'a>,
    /// What the transactions so far have made.
    chains: BTreeSet<Behaviour>,
    kinds: BTreeSet<Kind>,
    /// The next transaction, without what hangs on Services.
    planned: Planned,
    next: Next,
}

/// What Services add to a transaction.
#[derive(Default)]
struct Next {
    names: Vec<NamespacedName>,
    added: ByMap,
    behaviours: BTreeSet<Behaviour>,
    kinds: BTreeSet<Kind>,
}

impl Making<'_> {
    fn begin(&mut self, replace: bool) {
        let ruleset = self.ruleset;
        let transaction = &mut self.planned.transaction;
        if replace {
            transaction.push(Op::DeleteTable);
        }
        let comment = "Services of Longshore; changed while you watch".to_owned();
        transaction.push(Op::AddTable(Some(comment)));
        for map in MapId::all() {
            transaction.add_set(map.set(ruleset.family()));
        }
        ruleset.repair_fixed(&mut self.planned, None);
    }

    fn add(&mut self, name: &NamespacedName, Collected { entries, behaviours }: Collected) {
        let owner = self.next.names.len() as u32;
        self.next.names.push(name.clone());
        self.next.behaviours.extend(behaviours);
        self.next.kinds.extend(entries.iter().filter_map(Entry::kind));
        let numbers = &mut self.numbers;
        let elements = entries
            .into_iter()
            .map(|entry| (entry.map, entry.into_element(|kind| numbers.of(kind)), owner));
        self.next.added.extend(elements);
    }

    /// The transaction with what it has so far; the next one has nothing yet.
    fn finish(&mut self) -> Planned {
        let nothing = self.ruleset.planned(Vec::new());
        let mut planned = std::mem::replace(&mut self.planned, nothing);
        let Next { names, mut added, behaviours, kinds } = std::mem::take(&mut self.next);
        self.ruleset.add_behaviours(&mut planned, behaviours.into_iter(), &self.chains);
        self.chains.extend(planned.behaviours.iter().copied());
        let new = kinds.difference(&self.kinds);
        planned.kinds = new.map(|kind| (*kind, self.numbers.of(*kind))).collect();
        self.kinds.extend(kinds);
        added.extend(planned.kinds.iter().map(|(kind, number)| kind_element(*kind, *number)));
        push_elements(&mut planned, Vec::new(), added);
        planned.names = names.into();
        planned
    }
}
