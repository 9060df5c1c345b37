//! On which NUMA nodes devices can be had. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::State;
use super::assignments::Assigned;
use super::inventory::Device;
use super::plan::wanted;
use crate::ids::PodUid;
use crate::numa::hints::{Hint, Hints, Mask, hints_of, masks};
use crate::numa::requests::{containers, peak};

impl State {
    pub(super) fn hints(
        &self,
        pod: &Pod,
        container: Option<&Container>,
        nodes: &BTreeSet<u32>,
    ) -> Hints {
        let uid = PodUid::of(pod);
        let asked =
            |c: &Container, resource: &str| wanted(pod, c).get(resource).copied().unwrap_or(0);
        let of = |c: &Container, resource: &str| {
            let own = self.assignments.get(&uid, &c.name, resource);
            own.map(Assigned::ids).unwrap_or_default()
        };
        let all = || container.into_iter().chain(containers(pod).filter(|_| container.is_none()));
        let names: BTreeSet<&str> = all().flat_map(|c| wanted(pod, c).into_keys()).collect();
        let mut hints = Hints::new();
        for resource in names.into_iter().filter(|name| self.manages(name)) {
            let (asked, reusable) = match container {
                Some(c) => (asked(c, resource), self.assignments.reusable(pod, &c.name, resource)),
                None => {
                    let sum = peak(pod, |c| asked(c, resource) as u64);
                    (usize::try_from(sum).unwrap_or(usize::MAX), BTreeSet::new())
                }
            };
            let mut in_use = self.assignments.in_use(resource);
            in_use.extend(self.reserved.get(resource).into_iter().flatten().cloned());
            let told = plan_hints(Question {
                asked,
                had: &all().flat_map(|c| of(c, resource)).collect(),
                known: &self.inventory.known(resource),
                usable: &self.inventory.usable(resource),
                in_use: &in_use,
                reusable: &reusable,
                nodes,
            });
            hints.insert(resource.to_owned(), told);
        }
        hints
    }
}

/// What hints are made from.
struct Question<'a> {
    asked: usize,
    /// What is there already.
    had: &'a BTreeSet<String>,
    /// All devices.
    known: &'a BTreeMap<String, Device>,
    /// Those that can be given out.
    usable: &'a BTreeMap<String, Device>,
    /// Those that somebody has.
    in_use: &'a BTreeSet<String>,
    /// Those that the pod has and that may be had again.
    reusable: &'a BTreeSet<String>,
    /// The machine's nodes.
    nodes: &'a BTreeSet<u32>,
}

/// Hints for one resource; `None` where no device says where it is.
fn plan_hints(question: Question<'_>) -> Option<Vec<Hint>> {
    let Question { asked, had, known, usable, in_use, reusable, nodes } = question;
    let near = |device: &Device| -> BTreeSet<u32> {
        device.numa.iter().filter_map(|node| u32::try_from(*node).ok()).collect()
    };
    if known.values().all(|device| device.numa.is_empty()) {
        return None;
    }
    if !had.is_empty() && had.len() != asked {
        return Some(Vec::new());
    }
    let free: BTreeSet<String> = if had.is_empty() {
        usable.keys().filter(|id| !in_use.contains(*id)).cloned().collect()
    } else {
        had.clone()
    };
    let none = BTreeSet::new();
    let reusable = if had.is_empty() { reusable } else { &none };
    if free.union(reusable).count() < asked {
        return Some(Vec::new());
    }
    // Nodes without devices only multiply the masks.
    let with: BTreeSet<u32> = known.values().flat_map(near).collect();
    let mut bearing: BTreeSet<u32> = with.intersection(nodes).copied().collect();
    if bearing.is_empty() {
        bearing.clone_from(nodes);
    }
    let inside = |mask: Mask, id: &String| {
        known.get(id).is_some_and(|device| near(device).into_iter().any(|node| mask.has(node)))
    };
    let placed = |id: &&String| known.get(*id).is_some_and(|device| !device.numa.is_empty());
    let mut fewest = bearing.len();
    let mut found = Vec::new();
    for mask in masks(&bearing) {
        if known.keys().filter(|id| inside(mask, id)).count() >= asked {
            fewest = fewest.min(mask.len());
        }
        let again: Vec<&String> = reusable.iter().filter(placed).collect();
        if !again.iter().all(|id| inside(mask, id)) {
            continue;
        }
        let more = free.iter().filter(|id| !again.contains(id) && inside(mask, id)).count();
        if again.len() + more >= asked {
            found.push(mask);
        }
    }
    Some(hints_of(found, fewest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &str) -> BTreeSet<String> {
        ids.split_whitespace().map(String::from).collect()
    }

    /// As `01! 0` of `id@node+node` devices on two nodes.
    fn hints(all: &str, in_use: &str, had: &str, reusable: &str, asked: usize) -> String {
        let device = |text: &str| {
            let (id, nodes) = text.split_once('@').unwrap_or((text, ""));
            let numa = nodes.split('+').filter_map(|n| n.parse().ok()).collect();
            (id.to_owned(), Device { healthy: true, numa })
        };
        let known = all.split_whitespace().map(device).collect();
        let told = plan_hints(Question {
            asked,
            had: &set(had),
            known: &known,
            usable: &known,
            in_use: &set(in_use),
            reusable: &set(reusable),
            nodes: &[0, 1].into(),
        });
        let Some(told) = told else { return "any".into() };
        let one = |hint: Hint| {
            let nodes = hint.nodes.unwrap_or_default().nodes().map(|n| n.to_string());
            format!("{}{}", nodes.collect::<String>(), if hint.preferred { "!" } else { "" })
        };
        told.into_iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn devices_are_had_where_there_are_enough() {
        let all = "a@0 b@0 c@1 d@0+1 e";
        for (in_use, had, reusable, asked, expected) in [
            ("", "", "", 1, "0! 1! 01"),
            ("", "", "", 3, "0! 01"),
            ("", "", "", 4, "01!"),
            ("", "", "", 6, ""),
            ("a", "", "", 3, "01"),
            ("a b d", "", "", 1, "1! 01"),
            ("a c", "a c", "", 2, "01"),
            ("a c", "a c", "", 1, ""),
            ("c", "", "c", 2, "1! 01"),
        ] {
            let told = hints(all, in_use, had, reusable, asked);
            assert_eq!(told, expected, "{asked} but {in_use}, has {had}, again {reusable}");
        }
        assert_eq!(hints("a b", "", "", "", 1), "any");
        assert_eq!(hints("a@9", "", "", "", 1), "");
    }
}
