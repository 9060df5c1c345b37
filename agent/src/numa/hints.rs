//! Topology hints: on which NUMA nodes a container's resources can be had, by each who gives some, and
//! what all of them agree on. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::options::{Alignment, AlignmentOptions};

/// A set of NUMA nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mask(u64);

/// Nodes have numbers below this.
pub const MAX_NODE: u32 = 64;

impl Mask {
    /// Nodes in it.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `node` is in it.
    pub fn has(self, node: u32) -> bool {
        node < MAX_NODE && self.0 & (1 << node) != 0
    }

    /// Whether all of `other` are in it.
    pub fn includes(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The nodes, lowest first.
    pub fn nodes(self) -> impl Iterator<Item = u32> {
        (0..MAX_NODE).filter(move |node| self.has(*node))
    }

    /// Whether it has fewer nodes, or as many that come first.
    pub fn is_narrower(self, other: Self) -> bool {
        (self.len(), self.0) < (other.len(), other.0)
    }
}

impl FromIterator<u32> for Mask {
    fn from_iter<I: IntoIterator<Item = u32>>(nodes: I) -> Self {
        Self(nodes.into_iter().filter(|n| *n < MAX_NODE).fold(0, |mask, node| mask | (1 << node)))
    }
}

/// Every set of some of `nodes`, the smaller ones first.
pub fn masks(nodes: &BTreeSet<u32>) -> Vec<Mask> {
    let nodes: Vec<u32> = nodes.iter().copied().filter(|node| *node < MAX_NODE).collect();
    let mut all = Vec::new();
    let mut of_size = vec![(Mask::default(), 0)];
    for _ in 0..nodes.len() {
        let mut next = Vec::new();
        for (mask, from) in of_size {
            for (at, node) in nodes.iter().enumerate().skip(from) {
                next.push((Mask(mask.0 | (1 << node)), at + 1));
            }
        }
        all.extend(next.iter().map(|(mask, _)| *mask));
        of_size = next;
    }
    all
}

/// Where something can be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// On these nodes together; `None` is anywhere.
    pub nodes: Option<Mask>,
    /// Whether it cannot be had on fewer.
    pub preferred: bool,
}

/// Where each resource can be had; `None` is no preference, and no hint at all nowhere.
pub type Hints = BTreeMap<String, Option<Vec<Hint>>>;

/// Hints of these nodes; those with as few as it takes are preferred.
pub fn hints_of(masks: impl IntoIterator<Item = Mask>, fewest: usize) -> Vec<Hint> {
    let hint = |mask: Mask| Hint { nodes: Some(mask), preferred: mask.len() == fewest };
    masks.into_iter().map(hint).collect()
}

/// How hints are made one.
#[derive(Clone, Debug, Default)]
pub struct Merger {
    /// The policy.
    pub policy: Alignment,
    /// What fine-tunes it.
    pub options: AlignmentOptions,
    /// All nodes, with the distances to each of them in order.
    pub nodes: BTreeMap<u32, Vec<u64>>,
}

impl Merger {
    fn all(&self) -> Mask {
        self.nodes.keys().copied().collect()
    }

    /// What all of these agree on, and whether that is good enough.
    pub fn merge(&self, providers: &[Hints]) -> (Hint, bool) {
        if self.policy == Alignment::None {
            return (Hint::default(), true);
        }
        let mut lists = Vec::new();
        for hints in providers {
            if hints.is_empty() {
                lists.push(vec![Hint { nodes: None, preferred: true }]);
            }
            for of_resource in hints.values() {
                lists.push(match of_resource {
                    None => vec![Hint { nodes: None, preferred: true }],
                    Some(none) if none.is_empty() => vec![Hint { nodes: None, preferred: false }],
                    Some(some) => some.clone(),
                });
            }
        }
        let single = self.policy == Alignment::SingleNode;
        if single {
            for list in &mut lists {
                list.retain(|h| h.preferred && h.nodes.is_none_or(|nodes| nodes.len() == 1));
            }
        }
        let mut best = self.best(&lists);
        if single && best.nodes == Some(self.all()) {
            best.nodes = None;
        }
        (best, best.preferred || self.policy == Alignment::BestEffort)
    }

    fn best(&self, lists: &[Vec<Hint>]) -> Hint {
        let narrowest = |list: &Vec<Hint>| list.iter().filter_map(|h| Some(h.nodes?.len())).min();
        let widest_need = lists.iter().filter_map(narrowest).max().unwrap_or(0);
        let mut best = None;
        let start = (self.all(), None, true);
        self.combine(lists, start, &mut |hint| {
            if hint.nodes.is_some_and(Mask::is_empty) {
                return;
            }
            let better = best.is_none_or(|best| self.is_better(hint, best, widest_need));
            if better {
                best = Some(hint);
            }
        });
        best.unwrap_or(Hint { nodes: Some(self.all()), preferred: false })
    }

    /// Tells `each` what every choice of one hint a list comes to: the nodes in all of them; preferred
    /// if each is, and all name the same nodes.
    fn combine(
        &self,
        lists: &[Vec<Hint>],
        (nodes, first, preferred): (Mask, Option<Mask>, bool),
        each: &mut dyn FnMut(Hint),
    ) {
        let Some((list, rest)) = lists.split_first() else {
            return each(Hint { nodes: Some(nodes), preferred });
        };
        for hint in list {
            let same = hint.nodes.is_none_or(|own| first.is_none_or(|first| first == own));
            let narrowed = hint.nodes.map_or(nodes, |own| nodes.and(own));
            let next = (narrowed, first.or(hint.nodes), preferred && hint.preferred && same);
            self.combine(rest, next, each);
        }
    }

    /// Whether `candidate` is better than `current`. Among those that are not preferred, one with as many
    /// nodes is that the resource needs which needs most: with fewer it would be torn further.
    fn is_better(&self, candidate: Hint, current: Hint, need: usize) -> bool {
        let (Some(new), Some(old)) = (candidate.nodes, current.nodes) else { return false };
        if candidate.preferred != current.preferred {
            return candidate.preferred;
        }
        if current.preferred || old.len() > need {
            return self.fits_better(new, old);
        }
        if old.len() == need {
            return new.len() == need && self.fits_better(new, old);
        }
        match new.len() {
            wide if wide > need => false,
            same if same == old.len() => self.fits_better(new, old),
            other => other > old.len(),
        }
    }

    fn fits_better(&self, new: Mask, old: Mask) -> bool {
        let closest = self.options.closest && self.policy != Alignment::SingleNode;
        if closest && new.len() == old.len() {
            let (new_far, old_far) = (self.distance(new), self.distance(old));
            if new_far != old_far {
                return new_far < old_far;
            }
        }
        new != old && new.is_narrower(old)
    }

    /// Sum of the distances between the nodes; of as many nodes the mean says no more.
    fn distance(&self, mask: Mask) -> u64 {
        let at: BTreeMap<u32, usize> = self.nodes.keys().copied().zip(0..).collect();
        let of = |from: u32| -> u64 {
            let row = self.nodes.get(&from);
            let to = |node: u32| Some(*row?.get(*at.get(&node)?)?);
            mask.nodes().filter_map(to).sum()
        };
        mask.nodes().map(of).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn merger(policy: Alignment, nodes: u32) -> Merger {
        let row =
            |node: u32| (0..nodes).map(|other| 10 + 5 * u64::from(node.abs_diff(other))).collect();
        let nodes = (0..nodes).map(|node| (node, row(node))).collect();
        Merger { policy, nodes, ..Merger::default() }
    }

    /// `01!` is a preferred hint of the nodes 0 and 1, `*` one of any.
    fn hints(text: &str) -> Hints {
        let hint = |text: &str| {
            let digits = || text.chars().filter_map(|c| c.to_digit(10));
            let nodes = (!text.starts_with('*')).then(|| digits().collect());
            Hint { nodes, preferred: text.ends_with('!') }
        };
        let lists = text.split(';').map(|list| list.split_whitespace().map(hint).collect());
        lists.zip(0..).map(|(list, at)| (format!("r{at}"), Some(list))).collect()
    }

    fn told((hint, admit): (Hint, bool)) -> String {
        let nodes = hint.nodes.map(|mask| mask.nodes().map(|n| n.to_string()).collect::<String>());
        let preferred = if hint.preferred { "!" } else { "" };
        format!("{}{preferred} {admit}", nodes.unwrap_or("*".into()))
    }

    #[test]
    fn masks_are_all_subsets_by_size() {
        let all: Vec<String> = masks(&[0, 2, 3].into())
            .into_iter()
            .map(|mask| mask.nodes().map(|n| n.to_string()).collect())
            .collect();
        assert_eq!(all, ["0", "2", "3", "02", "03", "23", "023"]);
        assert!(masks(&BTreeSet::new()).is_empty());
    }

    #[test]
    fn policies_differ_in_what_is_good_enough() {
        use Alignment::{BestEffort, Restricted, SingleNode};
        for (providers, best, restricted, single) in [
            (vec![], "01! true", "01! true", "*! true"),
            (vec![""], "01 true", "01 false", "* false"),
            (vec!["0! 1! 01", "1!"], "1! true", "1! true", "1! true"),
            (vec!["0!", "1!"], "01 true", "01 false", "* false"),
            (vec!["01!"], "01! true", "01! true", "* false"),
            (vec!["01!", "0! 1! 01"], "01 true", "01 false", "* false"),
            (vec!["0! 01", "01"], "01 true", "01 false", "* false"),
            (vec!["0! 1! 01;*!", "01 1"], "0 true", "0 false", "* false"),
        ] {
            let all: Vec<Hints> = providers.iter().map(|text| hints(text)).collect();
            let all = if providers == [""] {
                vec![Hints::from([("r".into(), Some(vec![]))])]
            } else {
                all
            };
            let merged = [BestEffort, Restricted, SingleNode]
                .map(|policy| told(merger(policy, 2).merge(&all)));
            assert_eq!(merged, [best, restricted, single], "{providers:?}");
        }
        let anywhere = Hints::from([("r".into(), None)]);
        assert_eq!(told(merger(Restricted, 2).merge(&[anywhere, Hints::new()])), "01! true");
        assert_eq!(told(Merger::default().merge(&[hints("0")])), "* true");
    }

    #[test]
    fn the_closest_nodes_are_preferred_where_that_is_asked_for() {
        let mut merger = merger(Alignment::BestEffort, 4);
        let far = [hints("03! 12!")];
        assert_eq!(told(merger.merge(&far)), "12! true");
        let far = [hints("03! 23!")];
        assert_eq!(told(merger.merge(&far)), "03! true");
        merger.options.closest = true;
        assert_eq!(told(merger.merge(&far)), "23! true");
    }

    proptest! {
        #[test]
        fn a_merged_hint_is_within_every_list_and_preferred_only_if_one_of_each_is(
            lists in prop::collection::vec(prop::collection::vec((1u64..16, any::<bool>()), 1..6), 1..4)
        ) {
            let list = |list: &Vec<(u64, bool)>| {
                list.iter().map(|(mask, preferred)| Hint { nodes: Some(Mask(*mask)), preferred: *preferred }).collect()
            };
            let all: Vec<Hints> =
                lists.iter().map(|l| Hints::from([("r".to_owned(), Some(list(l)))])).collect();
            for policy in [Alignment::BestEffort, Alignment::Restricted, Alignment::SingleNode] {
                let (best, admit) = merger(policy, 4).merge(&all);
                prop_assert!(admit == best.preferred || policy == Alignment::BestEffort);
                if best.preferred && let Some(nodes) = best.nodes {
                    for list in &lists {
                        prop_assert!(list.contains(&(nodes.0, true)));
                    }
                    prop_assert!(policy != Alignment::SingleNode || nodes.len() == 1);
                }
            }
        }
    }
}
