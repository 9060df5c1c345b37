//! The devices that plugins tell of, by resource. Pure.
//!
//! A plugin that goes away keeps its resource, with nothing to allocate, for a time of grace: most
//! come back (an update of a DaemonSet). After that the resource counts nothing, and is still named:
//! the scheduler takes a resource that a node does not name for one of the cluster, and sends pods.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::wire;

/// How long a resource outlives its plugin.
pub const GRACE: Duration = Duration::from_secs(300);
/// What a plugin says of a device that can be used.
pub const HEALTHY: &str = "Healthy";

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The plugin's last word on it.
    pub healthy: bool,
    /// NUMA nodes that it is near to; none where the plugin does not say.
    pub numa: BTreeSet<i64>,
}

impl From<&wire::Device> for Device {
    fn from(told: &wire::Device) -> Self {
        let nodes = told.topology.iter().flat_map(|topology| &topology.nodes);
        Self { healthy: told.health == HEALTHY, numa: nodes.map(|node| node.id).collect() }
    }
}

/// What a plugin wants to be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Before each start of a container.
    pub pre_start: bool,
    /// Which of the free devices it prefers.
    pub preferred: bool,
}

/// Whether the plugin of a resource is there.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Endpoint {
    /// It answers; the number tells it from those before and after it.
    Connected(u64),
    /// It is away.
    Stopped { since: Instant },
    /// It has been away for too long.
    Removed,
}

#[derive(Clone, Debug)]
struct Resource {
    devices: BTreeMap<String, Device>,
    endpoint: Endpoint,
    options: Options,
    /// Whether the plugin that is there has told of its devices.
    current: bool,
    /// Whether any plugin ever has.
    told: bool,
}

/// How much there is of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Devices.
    pub capacity: usize,
    /// Devices that pods may have.
    pub allocatable: usize,
}

/// All resources that have one.
pub type Capacities = BTreeMap<String, Capacity>;

/// The devices of the node.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    resources: BTreeMap<String, Resource>,
}

impl Inventory {
    /// What an earlier agent knew: the plugins may come back.
    pub fn remembered(resources: impl IntoIterator<Item = String>, now: Instant) -> Self {
        let resource = Resource {
            devices: BTreeMap::new(),
            endpoint: Endpoint::Stopped { since: now },
            options: Options::default(),
            current: false,
            told: true,
        };
        Self { resources: resources.into_iter().map(|name| (name, resource.clone())).collect() }
    }

    /// A plugin is there for `resource`.
    pub fn connected(&mut self, resource: &str, generation: u64, options: Options) {
        let entry = self.resources.entry(resource.to_owned()).or_insert_with(|| Resource {
            devices: BTreeMap::new(),
            endpoint: Endpoint::Removed,
            options,
            current: false,
            told: false,
        });
        // Until it has told of its devices those known before show, and are not given out.
        (entry.endpoint, entry.options) = (Endpoint::Connected(generation), options);
        entry.current = false;
    }

    /// The plugin tells of all its devices; those whose health is news.
    pub fn told(
        &mut self,
        resource: &str,
        generation: u64,
        devices: &[wire::Device],
    ) -> BTreeSet<String> {
        let Some(entry) = self.resources.get_mut(resource) else { return BTreeSet::new() };
        if entry.endpoint != Endpoint::Connected(generation) {
            // Of one that was replaced.
            return BTreeSet::new();
        }
        let devices: BTreeMap<String, Device> =
            devices.iter().map(|device| (device.id.clone(), device.into())).collect();
        let before = std::mem::replace(&mut entry.devices, devices);
        (entry.current, entry.told) = (true, true);
        let news = entry.devices.iter().filter(|(id, device)| {
            before.get(*id).is_none_or(|before| before.healthy != device.healthy)
        });
        news.map(|(id, _)| id.clone()).collect()
    }

    /// The plugin of this number is gone; whether it was the one there is.
    pub fn stopped(&mut self, resource: &str, generation: u64, now: Instant) -> bool {
        let Some(entry) = self.resources.get_mut(resource) else { return false };
        if entry.endpoint != Endpoint::Connected(generation) {
            return false;
        }
        entry.endpoint = Endpoint::Stopped { since: now };
        entry.current = false;
        true
    }

    /// Gives up plugins that have been away for too long; whether there were any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let mut any = false;
        for entry in self.resources.values_mut() {
            if let Endpoint::Stopped { since } = entry.endpoint
                && now.duration_since(since) >= GRACE
            {
                // What it last said of its devices stands: pods may have them still.
                entry.endpoint = Endpoint::Removed;
                any = true;
            }
        }
        any
    }

    /// When the next plugin is given up.
    pub fn next_expiry(&self) -> Option<Instant> {
        let stopped = self.resources.values().filter_map(|entry| match entry.endpoint {
            Endpoint::Stopped { since } => Some(since + GRACE),
            _ => None,
        });
        stopped.min()
    }

    /// How much there is of each resource. One that was given up has nothing.
    pub fn capacities(&self) -> Capacities {
        let told = self.resources.iter().filter(|(_, entry)| entry.told);
        told.map(|(name, entry)| {
            if entry.endpoint == Endpoint::Removed {
                return (name.clone(), Capacity::default());
            }
            let allocatable = if entry.current {
                entry.devices.values().filter(|device| device.healthy).count()
            } else {
                0
            };
            (name.clone(), Capacity { capacity: entry.devices.len(), allocatable })
        })
        .collect()
    }

    /// Whether `resource` is one of plugins (still).
    pub fn registered(&self, resource: &str) -> bool {
        let entry = self.resources.get(resource);
        entry.is_some_and(|entry| entry.told && entry.endpoint != Endpoint::Removed)
    }

    /// Whether its plugin is there, and what it wants to be asked; `None` of one that was given up.
    pub fn plugin(&self, resource: &str) -> Option<(bool, Options)> {
        let entry = self.resources.get(resource)?;
        match entry.endpoint {
            Endpoint::Connected(_) => Some((true, entry.options)),
            Endpoint::Stopped { .. } => Some((false, entry.options)),
            Endpoint::Removed => None,
        }
    }

    /// Devices of `resource` that can be given out.
    pub fn usable(&self, resource: &str) -> BTreeMap<String, Device> {
        let entry = self.resources.get(resource).filter(|entry| entry.current);
        let devices = entry.map(|entry| entry.devices.iter()).into_iter().flatten();
        devices.filter(|(_, d)| d.healthy).map(|(id, d)| (id.clone(), d.clone())).collect()
    }

    /// Devices of `resource` that its plugin has told of, well or not.
    pub fn known(&self, resource: &str) -> BTreeMap<String, Device> {
        let entry = self.resources.get(resource);
        entry.map(|entry| entry.devices.clone()).unwrap_or_default()
    }

    /// The plugin's last word on a device; what nobody has told of is taken for healthy.
    pub fn healthy(&self, resource: &str, device: &str) -> bool {
        let entry = self.resources.get(resource);
        entry.and_then(|entry| entry.devices.get(device)).is_none_or(|device| device.healthy)
    }

    /// NUMA nodes of a device.
    pub fn numa(&self, resource: &str, device: &str) -> BTreeSet<i64> {
        let entry = self.resources.get(resource);
        let device = entry.and_then(|entry| entry.devices.get(device));
        device.map(|device| device.numa.clone()).unwrap_or_default()
    }

    /// Resources of plugins, each with the devices that can be given out.
    pub fn all_usable(&self) -> BTreeMap<String, BTreeMap<String, Device>> {
        let names = self.resources.keys().filter(|name| self.registered(name));
        names.map(|name| (name.clone(), self.usable(name))).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::device) fn device(id: &str, healthy: bool, numa: &[i64]) -> wire::Device {
        let nodes = numa.iter().map(|id| wire::NumaNode { id: *id }).collect();
        wire::Device {
            id: id.into(),
            health: if healthy { HEALTHY } else { "Unhealthy" }.into(),
            topology: Some(wire::TopologyInfo { nodes }),
        }
    }

    const R: &str = "example.com/dev";

    fn counts(inventory: &Inventory) -> Option<(usize, usize)> {
        inventory.capacities().get(R).map(|c| (c.capacity, c.allocatable))
    }

    #[test]
    fn a_resource_lives_as_long_as_its_plugin_and_then_some() {
        let start = Instant::now();
        let mut inventory = Inventory::default();
        inventory.connected(R, 1, Options::default());
        assert_eq!(counts(&inventory), None, "nothing was told of it");
        assert!(!inventory.registered(R));
        let news = inventory.told(R, 1, &[device("a", true, &[]), device("b", false, &[1])]);
        assert_eq!(news.len(), 2);
        assert_eq!(counts(&inventory), Some((2, 1)));
        assert_eq!(inventory.usable(R).keys().collect::<Vec<_>>(), ["a"]);
        let news = inventory.told(R, 1, &[device("a", true, &[]), device("b", true, &[1])]);
        assert_eq!(news.into_iter().collect::<Vec<_>>(), ["b"]);
        assert_eq!(inventory.numa(R, "b"), [1].into());

        // Another one takes its place before the first is seen to go.
        inventory.connected(R, 2, Options { pre_start: true, preferred: false });
        assert_eq!(counts(&inventory), Some((2, 0)), "it has not told of them");
        assert!(!inventory.stopped(R, 1, start));
        assert!(inventory.told(R, 1, &[]).is_empty());
        inventory.told(R, 2, &[device("a", true, &[]), device("c", true, &[])]);
        assert_eq!(counts(&inventory), Some((2, 2)));

        assert!(inventory.stopped(R, 2, start));
        assert_eq!(counts(&inventory), Some((2, 0)));
        assert!(inventory.registered(R) && inventory.usable(R).is_empty());
        assert!(inventory.healthy(R, "a"), "its last word stands");
        assert_eq!(inventory.plugin(R).map(|p| p.0), Some(false));
        assert_eq!(inventory.next_expiry(), Some(start + GRACE));
        assert!(!inventory.expire(start + GRACE / 2));
        assert!(inventory.expire(start + GRACE));
        assert_eq!((counts(&inventory), inventory.next_expiry()), (Some((0, 0)), None));
        assert!(!inventory.registered(R) && inventory.plugin(R).is_none());
        inventory.connected(R, 3, Options::default());
        inventory.told(R, 3, &[device("a", false, &[])]);
        assert_eq!(counts(&inventory), Some((1, 0)));
        inventory.stopped(R, 3, start);
        inventory.expire(start + GRACE);
        assert!(!inventory.healthy(R, "a") && inventory.healthy(R, "b"));
    }

    #[test]
    fn what_was_known_before_a_restart_counts_nothing_until_its_plugin_is_back() {
        let start = Instant::now();
        let mut inventory = Inventory::remembered([R.to_owned()], start);
        assert_eq!(counts(&inventory), Some((0, 0)));
        assert!(inventory.registered(R));
        inventory.connected(R, 1, Options::default());
        inventory.told(R, 1, &[device("a", true, &[])]);
        assert_eq!(counts(&inventory), Some((1, 1)));
        assert!(!inventory.expire(start + GRACE * 2));
    }
}
