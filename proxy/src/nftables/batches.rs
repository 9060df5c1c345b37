//! What changes together, and in which order: a Service's elements are never in two batches.

use std::collections::HashMap;

use nft::{Element, Key};

use super::entries::Entry;
use super::names::{MapId, Origin};

/// Owner of what is of no Service.
pub const NOBODY: u32 = u32::MAX;

/// Elements by map, each with its owner.
pub type ByMap = Vec<(MapId, Element, u32)>;

/// Gives what nobody wants any more to the Service that now has the address or port it was for: the
/// Service's elements change together.
pub fn adopt_orphans(deleted: &mut ByMap, desired: &[(Entry, u32)]) {
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
        MapId::Kept(_) | MapId::Picks(_) | MapId::PicksBefore(_) => (Origin::Vip, 4),
        MapId::Ids(origin) => (origin, bytes.len()),
        MapId::Firewalled => (Origin::Vip, bytes.len()),
        MapId::Numbers(dispatch) => (dispatch.origin(), bytes.len()),
        // Address, protocol and port; then the source, as long as the address.
        MapId::FirewallSources => (Origin::Vip, if bytes.len() > 24 { 24 } else { 12 }),
        MapId::Kinds | MapId::SlotKinds | MapId::Refusals | MapId::ClusterIps | MapId::Hairpin => {
            return None;
        }
    };
    Some((origin, Key::from_bytes(bytes.get(..len)?)))
}

/// Which Services change in one batch, as something goes from one to another: to each the first one
/// of its group.
#[derive(Debug, Default)]
pub struct Together(HashMap<u32, u32>);

impl Together {
    /// The first of a Service's group.
    fn first(&self, mut owner: u32) -> u32 {
        while let Some(before) = self.0.get(&owner) {
            owner = *before;
        }
        owner
    }

    /// Makes two Services change in one batch.
    pub fn join(&mut self, one: u32, other: u32) {
        let (one, other) = (self.first(one), self.first(other));
        if one != other {
            self.0.insert(one.max(other), one.min(other));
        }
    }
}

/// Cuts changes into batches that keep what is of one Service together, and of those that go together.
pub fn batches(
    deleted: ByMap,
    added: ByMap,
    together: &Together,
    limit: usize,
) -> Vec<(ByMap, ByMap)> {
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
