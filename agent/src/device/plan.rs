//! Which devices a container gets. Pure.
//!
//! First those that an init container of its pod is done with, then free ones near to the NUMA nodes
//! that the container is bound to, in the plugin's order of preference.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::error::DeviceError;
use super::inventory::Device;
use crate::dra::is_claimed;
use crate::pod::quantity;

/// Whether `name` is an extended resource: one that Kubernetes itself knows nothing of.
pub fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.")
}

/// Whether `name` can be the name of an extended resource at all.
pub fn is_valid_extended(name: &str) -> bool {
    let Some((prefix, rest)) = name.split_once('/') else { return false };
    let label = |text: &str| {
        let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        end(text.bytes().next())
            && end(text.bytes().last())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    is_extended(name)
        // It must be the name of a quota, too.
        && prefix.len() + "requests.".len() <= 253
        && prefix.split('.').all(label)
        && rest.len() <= 63
        && end(rest.bytes().next())
        && end(rest.bytes().last())
        && rest.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Extended resources that the container is to have of device plugins and how many it asks for of each.
/// Limit and request of such are the same.
pub fn wanted<'a>(pod: &Pod, container: &'a Container) -> BTreeMap<&'a str, usize> {
    let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
    let of = |(name, amount)| {
        let count = quantity::value(amount).and_then(|n| usize::try_from(n).ok())?;
        Some((String::as_str(name), count))
    };
    let plugins = |name: &str| is_extended(name) && !is_claimed(pod, &container.name, name);
    limits.into_iter().flatten().filter(|(name, _)| plugins(name)).filter_map(of).collect()
}

/// What a choice is made from.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The pod's UID, the container, the resource.
    pub whom: (&'a str, &'a str, &'a str),
    /// How many devices it asks for.
    pub asked: usize,
    /// What it has already.
    pub had: Option<&'a BTreeSet<String>>,
    /// Whether a plugin has told of the resource.
    pub registered: bool,
    /// Devices that can be given out, used or not.
    pub usable: &'a BTreeMap<String, Device>,
    /// Devices that somebody has.
    pub in_use: &'a BTreeSet<String>,
    /// Devices that its pod has and that it may have.
    pub reusable: &'a BTreeSet<String>,
    /// NUMA nodes that the container is bound to.
    pub nodes: Option<&'a BTreeSet<i64>>,
    /// Whether the plugin may be asked what it prefers.
    pub asks: bool,
    /// What it prefers, once it was asked.
    pub preferred: Option<&'a BTreeSet<String>>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Nothing: the container has what it asks for.
    Nothing,
    /// Have these allocated.
    Take(BTreeSet<String>),
    /// Ask the plugin what it prefers, and choose again.
    Ask {
        /// What it may choose from.
        available: BTreeSet<String>,
        /// What it must choose.
        must: BTreeSet<String>,
    },
}

/// Chooses devices for one container and resource.
///
/// # Errors
/// There are not enough of them, or none at all.
pub fn plan_devices(question: Question<'_>) -> Result<Choice, DeviceError> {
    let Question { whom: (pod, container, resource), asked, had, usable, .. } = question;
    if let Some(had) = had
        && had.len() != asked
    {
        return Err(DeviceError::Changed {
            pod: pod.into(),
            container: container.into(),
            resource: resource.into(),
            had: had.len(),
            asked,
        });
    }
    if !question.registered {
        return Err(DeviceError::Unregistered(resource.into()));
    }
    if usable.is_empty() {
        return Err(DeviceError::NoneHealthy(resource.into()));
    }
    if had.is_some_and(|had| !had.iter().all(|id| usable.contains_key(id))) {
        return Err(DeviceError::Unhealthy(resource.into()));
    }
    if had.is_some() || asked == 0 {
        return Ok(Choice::Nothing);
    }
    let mut taken: BTreeSet<String> = question.reusable.iter().take(asked).cloned().collect();
    let needed = asked - taken.len();
    if needed == 0 {
        return Ok(Choice::Take(taken));
    }
    let free: BTreeMap<&String, &Device> =
        usable.iter().filter(|(id, _)| !question.in_use.contains(*id)).collect();
    if free.len() < needed {
        return Err(DeviceError::Short {
            resource: resource.into(),
            requested: needed,
            available: free.len(),
        });
    }
    let [near, far, nowhere] = by_nodes(usable, &free, question.nodes);
    // Where those that are near are more than enough the plugin may choose among them; else all of
    // them are taken, and it may choose among the others.
    let choose_near = needed < near.len();
    let order: Vec<&String> = if choose_near {
        near.clone()
    } else {
        take(&mut taken, &near, asked);
        far.into_iter().chain(nowhere).collect()
    };
    if taken.len() < asked && question.asks {
        let Some(preferred) = question.preferred else {
            let of: Vec<&String> = if choose_near { near } else { free.keys().copied().collect() };
            let available = of.into_iter().cloned().chain(taken.iter().cloned()).collect();
            return Ok(Choice::Ask { available, must: taken });
        };
        let first: Vec<&String> =
            order.iter().copied().filter(|id| preferred.contains(*id)).collect();
        take(&mut taken, &first, asked);
    }
    take(&mut taken, &order, asked);
    Ok(Choice::Take(taken))
}

/// Takes from `order` until there are `asked`.
fn take(taken: &mut BTreeSet<String>, order: &[&String], asked: usize) {
    for id in order {
        if taken.len() >= asked {
            return;
        }
        taken.insert((*id).clone());
    }
}

/// Free devices near to `nodes`, near to others, and near to none; each with those first whose node has
/// fewest, so that what is left is in as few places as can be. Without a binding, or where no device
/// says where it is, all are of the last kind.
fn by_nodes<'a>(
    usable: &BTreeMap<String, Device>,
    free: &BTreeMap<&'a String, &Device>,
    nodes: Option<&BTreeSet<i64>>,
) -> [Vec<&'a String>; 3] {
    let all = || free.keys().copied().collect();
    let Some(nodes) = nodes.filter(|_| usable.values().any(|d| !d.numa.is_empty())) else {
        return [Vec::new(), Vec::new(), all()];
    };
    let mut counts: BTreeMap<i64, usize> = BTreeMap::new();
    for node in free.values().flat_map(|device| &device.numa) {
        *counts.entry(*node).or_default() += 1;
    }
    // A device that is near to several counts for the best of them.
    let place = |device: &Device| {
        let of =
            |node: &i64| (!nodes.contains(node), counts.get(node).copied().unwrap_or(0), *node);
        device.numa.iter().map(of).min()
    };
    let mut placed: Vec<_> = free.iter().map(|(id, device)| (place(device), *id)).collect();
    placed.sort();
    let mut kinds = [Vec::new(), Vec::new(), Vec::new()];
    for (place, id) in placed {
        let kind = match place {
            Some((false, ..)) => 0,
            Some((true, ..)) => 1,
            None => 2,
        };
        kinds[kind].push(id);
    }
    kinds
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: &str = "example.com/dev";

    fn set(ids: &str) -> BTreeSet<String> {
        ids.split_whitespace().map(String::from).collect()
    }

    /// `id` or `id@node+node`.
    fn devices(ids: &str) -> BTreeMap<String, Device> {
        let parse = |text: &str| {
            let (id, nodes) = text.split_once('@').unwrap_or((text, ""));
            let nodes = nodes.split('+').filter_map(|n| n.parse().ok());
            (id.to_owned(), Device { healthy: true, numa: nodes.collect() })
        };
        ids.split_whitespace().map(parse).collect()
    }

    #[derive(Default)]
    struct Case<'a> {
        asked: usize,
        had: Option<&'a str>,
        usable: &'a str,
        in_use: &'a str,
        reusable: &'a str,
        nodes: Option<&'a [i64]>,
        preferred: Option<&'a str>,
        asks: bool,
        unregistered: bool,
    }

    fn choose(case: &Case<'_>) -> Result<Choice, String> {
        let nodes = case.nodes.map(|n| n.iter().copied().collect());
        plan_devices(Question {
            whom: ("uid", "c", R),
            asked: case.asked,
            had: case.had.map(set).as_ref(),
            registered: !case.unregistered,
            usable: &devices(case.usable),
            in_use: &set(case.in_use),
            reusable: &set(case.reusable),
            nodes: nodes.as_ref(),
            asks: case.asks,
            preferred: case.preferred.map(set).as_ref(),
        })
        .map_err(|error| error.to_string())
    }

    fn taken(case: &Case<'_>) -> String {
        match choose(case) {
            Ok(Choice::Take(ids)) => ids.into_iter().collect::<Vec<_>>().join(" "),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn free_devices_are_taken_after_those_of_init_containers() {
        let base = || Case { usable: "a b c d", in_use: "a b", ..Case::default() };
        assert_eq!(taken(&Case { asked: 1, ..base() }), "c");
        assert_eq!(taken(&Case { asked: 2, ..base() }), "c d");
        assert_eq!(taken(&Case { asked: 1, reusable: "b", ..base() }), "b");
        assert_eq!(taken(&Case { asked: 3, reusable: "b", ..base() }), "b c d");
        assert_eq!(choose(&Case { asked: 0, ..base() }), Ok(Choice::Nothing));
        assert_eq!(choose(&Case { asked: 1, had: Some("a"), ..base() }), Ok(Choice::Nothing));
    }

    #[test]
    fn a_plugin_chooses_among_what_is_free_and_no_more() {
        let base = || Case { usable: "a b c d", in_use: "a", asks: true, ..Case::default() };
        let ask = choose(&Case { asked: 2, reusable: "a", ..base() });
        assert_eq!(ask, Ok(Choice::Ask { available: set("a b c d"), must: set("a") }));
        for (asked, reusable, preferred, expected) in [
            (2, "a", "a d", "a d"),
            (2, "", "d c", "c d"),
            (2, "", "a x d", "b d"),
            (1, "", "b c d", "b"),
            (2, "", "", "b c"),
        ] {
            let case = Case { asked, reusable, preferred: Some(preferred), ..base() };
            assert_eq!(taken(&case), expected, "{asked} of {preferred:?}");
        }
        assert_eq!(taken(&Case { asked: 1, reusable: "a", ..base() }), "a", "there is no choice");
    }

    #[test]
    fn nodes_that_a_container_is_bound_to_come_first() {
        let usable = "a@0 b@0 c@1 d@1 e@0+1 f";
        let base = || Case { usable, nodes: Some(&[1]), ..Case::default() };
        assert_eq!(taken(&Case { asked: 2, ..base() }), "c d");
        assert_eq!(taken(&Case { asked: 3, ..base() }), "c d e");
        assert_eq!(taken(&Case { asked: 4, ..base() }), "a c d e");
        assert_eq!(taken(&Case { asked: 6, ..base() }), "a b c d e f");
        assert_eq!(taken(&Case { asked: 2, in_use: "c d", ..base() }), "a e");
        let ask = choose(&Case { asked: 2, asks: true, ..base() });
        assert_eq!(ask, Ok(Choice::Ask { available: set("c d e"), must: set("") }));
        let ask = choose(&Case { asked: 4, asks: true, ..base() });
        assert_eq!(ask, Ok(Choice::Ask { available: set("a b c d e f"), must: set("c d e") }));
        let case = Case { asked: 4, asks: true, preferred: Some("b c d e"), ..base() };
        assert_eq!(taken(&case), "b c d e");
        assert_eq!(taken(&Case { asked: 2, usable: "x y z", ..base() }), "x y", "they do not say");
    }

    #[test]
    fn what_is_not_there_is_said_in_kubelets_words() {
        let base = || Case { usable: "a b", asked: 1, ..Case::default() };
        for (case, expected) in [
            (
                Case { unregistered: true, usable: "", ..base() },
                "cannot allocate unregistered device example.com/dev",
            ),
            (
                Case { usable: "", ..base() },
                "no healthy devices present; cannot allocate unhealthy devices example.com/dev",
            ),
            (
                Case { had: Some("x"), ..base() },
                "previously allocated devices are no longer healthy; cannot allocate unhealthy \
                 devices example.com/dev",
            ),
            (
                Case { asked: 3, reusable: "r", in_use: "a", ..base() },
                "requested number of devices unavailable for example.com/dev. Requested: 2, \
                 Available: 1",
            ),
            (
                Case { asked: 2, had: Some("a"), ..base() },
                "pod \"uid\" container \"c\" changed request for resource \"example.com/dev\" from \
                 1 to 2",
            ),
        ] {
            assert_eq!(choose(&case), Err(expected.to_owned()));
        }
    }

    #[test]
    fn names_of_extended_resources_are_known() {
        for (name, extended, valid) in [
            ("nvidia.com/gpu", true, true),
            ("intel.com/sriov_net-A.1", true, true),
            ("cpu", false, false),
            ("hugepages-2Mi", false, false),
            ("kubernetes.io/x", false, false),
            ("sub.kubernetes.io/x", false, false),
            ("requests.example.com/x", false, false),
            ("Example.com/x", true, false),
            ("example.com/", true, false),
            ("/x", true, false),
            ("example.com/a/b", true, false),
            ("example.com/-a", true, false),
        ] {
            assert_eq!((is_extended(name), is_valid_extended(name)), (extended, valid), "{name}");
        }
    }
}
