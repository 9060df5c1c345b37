//! CPUs in equal parts from as few NUMA nodes as have them (KEP-2902). Pure.

use std::collections::BTreeMap;

use super::accumulate::{TakeError, Taking, take_packed};
use super::options::CpuOptions;
use super::topology::{Level, Topology};
use crate::node::cpu_set::CpuSet;

/// Free CPUs by node.
type Left = BTreeMap<u32, usize>;

/// Every choice of `count` of `from`, in order.
fn combinations(from: &[u32], count: usize) -> Vec<Vec<u32>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for (at, first) in from.iter().enumerate() {
        for mut rest in combinations(&from[at + 1..], count - 1) {
            rest.insert(0, *first);
            all.push(rest);
        }
    }
    all
}

fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// How unlike the nodes are in what is left: the standard deviation.
fn imbalance(left: &Left) -> f64 {
    let count = left.len() as f64;
    let mean = thousandths(left.values().map(|n| *n as f64).sum::<f64>() / count);
    let sum: f64 = left.values().map(|n| (*n as f64 - mean).powi(2)).sum();
    thousandths((sum / count).sqrt())
}

/// What is left once `rest` more were taken from `nodes` in turns.
fn hand_out(left: &Left, nodes: &[u32], mut rest: usize, group: usize) -> Option<Left> {
    let mut left = left.clone();
    while rest > 0 {
        let before = rest;
        for node in nodes {
            let of = left.entry(*node).or_default();
            if rest > 0 && *of >= group {
                *of -= group;
                rest -= group;
            }
        }
        if rest == before {
            return None;
        }
    }
    Some(left)
}

/// A choice of nodes: how unlike all are afterwards, those that give the same, and those that give what
/// does not divide.
struct Choice {
    imbalance: f64,
    nodes: Vec<u32>,
    rest: Vec<u32>,
}

/// What taking `count` from `nodes` comes to; `None` where they have not as many.
fn weigh(left: &Left, nodes: &[u32], count: usize, group: usize) -> Option<Choice> {
    let share = count / nodes.len() / group * group;
    let of = |node: &u32| left.get(node).copied().unwrap_or(0);
    let groups: usize = nodes.iter().map(|node| of(node) / group).sum();
    if groups * group < count || nodes.iter().any(|node| of(node) < share) {
        return None;
    }
    let mut after = left.clone();
    for node in nodes {
        *after.entry(*node).or_default() -= share;
    }
    let rest = count - share * nodes.len();
    let choice = |imbalance, rest| Choice { imbalance, nodes: nodes.to_vec(), rest };
    if rest == 0 {
        return Some(choice(imbalance(&after), Vec::new()));
    }
    let givers: Vec<u32> =
        nodes.iter().copied().filter(|node| after.get(node).is_some_and(|n| *n >= group)).collect();
    let mut best: Option<Choice> = None;
    for size in (1..=givers.len()).rev() {
        for subset in combinations(&givers, size) {
            let Some(left) = hand_out(&after, &subset, rest, group) else { continue };
            let found = imbalance(&left);
            if best.as_ref().is_none_or(|best| found < best.imbalance) {
                best = Some(choice(found, subset));
            }
        }
    }
    best
}

/// Takes `count` of `available` in equal parts, in groups of `group`; `None` where that cannot be done.
pub(super) fn plan_balanced(
    topology: &Topology,
    available: &CpuSet,
    count: usize,
    group: usize,
    options: CpuOptions,
) -> Result<Option<CpuSet>, TakeError> {
    if count == 0 || !count.is_multiple_of(group) {
        return Ok(None);
    }
    let mut taking = Taking::new(topology, available, count, options)?;
    let nodes = taking.sorted(Level::Node);
    let free = |taking: &Taking<'_>, node| topology.within(&taking.free, Level::Node, node);
    let left: Left = nodes.iter().map(|node| (*node, free(&taking, *node).len())).collect();
    let groups = count.div_ceil(group);
    let per_node = topology.cpus.len().div_ceil(group).div_ceil(topology.count(Level::Node).max(1));
    for size in groups.div_ceil(per_node)..=groups.min(nodes.len()) {
        let mut best: Option<Choice> = None;
        for combination in combinations(&nodes, size) {
            let Some(found) = weigh(&left, &combination, count, group) else { continue };
            if best.as_ref().is_none_or(|best| found.imbalance < best.imbalance) {
                best = Some(found);
            }
        }
        let Some(Choice { nodes, rest, .. }) = best else { continue };
        let packed = CpuOptions { by_cache: false, ..options };
        let share = count / nodes.len() / group * group;
        for node in nodes {
            let cpus = take_packed(topology, &free(&taking, node), share, packed)?;
            taking.take(&cpus);
        }
        while taking.needed > 0 {
            let before = taking.needed;
            for node in &rest {
                let from = free(&taking, *node);
                if taking.needed > 0 && from.len() >= group {
                    taking.take(&take_packed(topology, &from, group, packed)?);
                }
            }
            if taking.needed == before {
                return Err(TakeError::Failed);
            }
        }
        return Ok(Some(taking.taken));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::topology::tests::machine;
    use super::*;

    #[test]
    fn the_rest_goes_where_it_leaves_nodes_alike() {
        let topology = machine([4, 1, 4, 1], 1);
        let take = |available: &str, count| {
            let available = available.parse().unwrap();
            let taken = plan_balanced(&topology, &available, count, 1, CpuOptions::default());
            taken.unwrap().map(|cpus| cpus.to_string())
        };
        assert_eq!(take("0-15", 8).as_deref(), Some("0-7"));
        assert_eq!(take("0-15", 9).as_deref(), Some("0-2,4-6,8-10"));
        // The first node has less: the odd one comes from another.
        assert_eq!(take("1-15", 5).as_deref(), Some("4-6,8-9"));
        assert_eq!(take("0,4,8,12", 4).as_deref(), Some("0,4,8,12"));
        assert_eq!(take("0-15", 16).as_deref(), Some("0-15"));
        assert_eq!(take("0-15", 0), None);
    }

    #[test]
    fn imbalance_is_that_of_what_is_left() {
        let left =
            |counts: &[usize]| counts.iter().copied().zip(0..).map(|(n, at)| (at, n)).collect();
        assert_eq!(imbalance(&left(&[4, 4])), 0.0);
        assert_eq!(imbalance(&left(&[4, 2])), 1.0);
        assert_eq!(combinations(&[1, 2, 3], 2), [[1, 2], [1, 3], [2, 3]]);
    }
}
