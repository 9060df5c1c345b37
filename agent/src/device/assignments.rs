//! Which container has which devices, and what its plugin said to do about them. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use k8s_openapi::api::core::v1::{Pod, ResourceHealth, ResourceStatus};

use super::inventory::Inventory;
use super::wire::ContainerAllocateResponse;
use crate::ids::PodUid;
use crate::pod::spec::{init_containers, is_sidecar, spec_of};

/// In the place of a NUMA node: a device is near to none.
pub const NO_NODE: i64 = -1;

/// What a container has of one resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assigned {
    /// Devices by NUMA node; one that is near to several is in each.
    pub devices: BTreeMap<i64, Vec<String>>,
    /// How the container is given them.
    pub response: ContainerAllocateResponse,
}

impl Assigned {
    /// The devices, near to the nodes that `inventory` says.
    pub fn new(
        inventory: &Inventory,
        resource: &str,
        ids: &BTreeSet<String>,
        response: ContainerAllocateResponse,
    ) -> Self {
        let mut devices: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for id in ids {
            let numa = inventory.numa(resource, id);
            let nodes = if numa.is_empty() { [NO_NODE].into() } else { numa };
            for node in nodes {
                devices.entry(node).or_default().push(id.clone());
            }
        }
        Self { devices, response }
    }

    /// The devices.
    pub fn ids(&self) -> BTreeSet<String> {
        self.devices.values().flatten().cloned().collect()
    }

    /// Each device, with the NUMA nodes that it is near to.
    pub fn with_nodes(&self) -> BTreeMap<String, BTreeSet<i64>> {
        let mut all: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
        for (node, ids) in &self.devices {
            for id in ids {
                all.entry(id.clone()).or_default().extend((*node != NO_NODE).then_some(node));
            }
        }
        all
    }
}

/// What one container has, by resource.
pub type OfContainer = BTreeMap<String, Assigned>;
type OfPod = BTreeMap<String, OfContainer>;

/// What all containers have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assignments(BTreeMap<PodUid, OfPod>);

impl Assignments {
    /// What the container has; nothing where it has none.
    pub fn of(&self, uid: &PodUid, container: &str) -> Option<&OfContainer> {
        self.0.get(uid)?.get(container)
    }

    /// What the container has of `resource`.
    pub fn get(&self, uid: &PodUid, container: &str, resource: &str) -> Option<&Assigned> {
        self.of(uid, container)?.get(resource)
    }

    /// Whether the pod has any.
    pub fn has(&self, uid: &PodUid) -> bool {
        self.0.contains_key(uid)
    }

    /// Gives it to the container.
    pub fn insert(&mut self, uid: &PodUid, container: &str, resource: &str, assigned: Assigned) {
        let pod = self.0.entry(uid.clone()).or_default();
        pod.entry(container.to_owned()).or_default().insert(resource.to_owned(), assigned);
    }

    /// Takes back what the pod has; whether it had any.
    pub fn release(&mut self, uid: &PodUid) -> bool {
        self.0.remove(uid).is_some()
    }

    /// Takes back what pods have that are not among `pods`; whether there were any.
    pub fn retain(&mut self, pods: &HashSet<PodUid>) -> bool {
        let before = self.0.len();
        self.0.retain(|uid, _| pods.contains(uid));
        self.0.len() != before
    }

    /// Devices of `resource` that containers have.
    pub fn in_use(&self, resource: &str) -> BTreeSet<String> {
        let containers = self.0.values().flat_map(BTreeMap::values);
        containers.filter_map(|own| own.get(resource)).flat_map(Assigned::ids).collect()
    }

    /// Whether any container has of `resource`.
    pub fn uses(&self, resource: &str) -> bool {
        self.0.values().flat_map(BTreeMap::values).any(|own| own.contains_key(resource))
    }

    /// Pods that have one of these devices.
    pub fn holders(&self, resource: &str, devices: &BTreeSet<String>) -> BTreeSet<PodUid> {
        let has = |own: &OfContainer| {
            own.get(resource).is_some_and(|own| !own.ids().is_disjoint(devices))
        };
        self.0
            .iter()
            .filter(|(_, containers)| containers.values().any(has))
            .map(|(uid, _)| uid.clone())
            .collect()
    }

    /// Every one: pod, container, resource, devices.
    pub fn all(&self) -> impl Iterator<Item = (&PodUid, &str, &str, &Assigned)> {
        self.0.iter().flat_map(|(uid, containers)| {
            containers.iter().flat_map(move |(container, resources)| {
                resources.iter().map(move |(resource, own)| (uid, &**container, &**resource, own))
            })
        })
    }

    /// Devices of `resource` that `container` may have beside free ones: an init container's go on to
    /// those after it, but for a sidecar's, which runs as long as they do.
    pub fn reusable(&self, pod: &Pod, container: &str, resource: &str) -> BTreeSet<String> {
        let (spec, uid) = (spec_of(pod), PodUid::of(pod));
        let had = |name: &str| self.get(&uid, name, resource).map(Assigned::ids);
        let mut free = BTreeSet::new();
        for before in init_containers(spec) {
            if before.name == container {
                return free;
            }
            match had(&before.name).unwrap_or_default() {
                own if is_sidecar(before) => free.retain(|id| !own.contains(id)),
                own => free.extend(own),
            }
        }
        for other in spec.containers.iter().filter(|other| other.name != container) {
            let own = had(&other.name).unwrap_or_default();
            free.retain(|id| !own.contains(id));
        }
        free
    }

    /// The health of what each container has (KEP-4680).
    pub fn statuses(&self, uid: &PodUid, inventory: &Inventory) -> Statuses {
        let containers = self.0.get(uid).into_iter().flatten();
        let status = |(resource, own): (&String, &Assigned)| ResourceStatus {
            name: resource.clone(),
            resources: Some(
                own.ids()
                    .into_iter()
                    .map(|id| {
                        let healthy = inventory.healthy(resource, &id);
                        let health = if healthy { "Healthy" } else { "Unhealthy" };
                        ResourceHealth {
                            resource_id: id,
                            health: Some(health.into()),
                            ..ResourceHealth::default()
                        }
                    })
                    .collect(),
            ),
        };
        containers.map(|(name, own)| (name.clone(), own.iter().map(status).collect())).collect()
    }
}

/// The health of devices, by container.
pub type Statuses = BTreeMap<String, Vec<ResourceStatus>>;

#[cfg(test)]
mod tests {
    use super::super::inventory::Options;
    use super::super::inventory::tests::device;
    use super::*;
    use crate::pod::testing::pod;

    const R: &str = "example.com/dev";

    fn own(ids: &[&str]) -> Assigned {
        let devices = [(NO_NODE, ids.iter().map(|id| (*id).to_owned()).collect())].into();
        Assigned { devices, ..Assigned::default() }
    }

    #[test]
    fn containers_reuse_what_init_containers_had() {
        let pod = pod(r#"{"initContainers":[{"name":"i1"},{"name":"s","restartPolicy":"Always"},
            {"name":"i2"}],"containers":[{"name":"a"},{"name":"b"}]}"#);
        let uid = PodUid::of(&pod);
        let mut all = Assignments::default();
        let reusable = |all: &Assignments, name: &str| {
            all.reusable(&pod, name, R).into_iter().collect::<Vec<_>>().join(",")
        };
        assert_eq!(reusable(&all, "i1"), "");
        all.insert(&uid, "i1", R, own(&["1", "2", "3"]));
        assert_eq!(reusable(&all, "s"), "1,2,3");
        all.insert(&uid, "s", R, own(&["1"]));
        assert_eq!(reusable(&all, "i2"), "2,3");
        all.insert(&uid, "i2", R, own(&["3", "4"]));
        assert_eq!(reusable(&all, "a"), "2,3,4");
        all.insert(&uid, "a", R, own(&["2"]));
        assert_eq!(reusable(&all, "b"), "3,4");
        all.insert(&uid, "b", R, own(&["3"]));
        assert_eq!(reusable(&all, "a"), "2,4", "as when it was started");
        assert_eq!(reusable(&all, "i1"), "");
        assert!(all.reusable(&pod, "a", "example.com/other").is_empty());
    }

    #[test]
    fn what_is_given_is_in_use_until_its_pod_is_over() {
        let (one, two) = (PodUid::from("1"), PodUid::from("2"));
        let mut all = Assignments::default();
        all.insert(&one, "c", R, own(&["a"]));
        all.insert(&two, "c", R, own(&["b", "c"]));
        assert_eq!(all.in_use(R), ["a", "b", "c"].map(String::from).into());
        assert_eq!(all.holders(R, &["c".to_owned()].into()), [two.clone()].into());
        assert!(all.release(&one) && !all.release(&one));
        assert_eq!(all.in_use(R).len(), 2);
        assert!(all.retain(&HashSet::new()) && !all.uses(R));
    }

    #[test]
    fn devices_are_told_with_their_nodes_and_their_health() {
        let mut inventory = Inventory::default();
        inventory.connected(R, 1, Options::default());
        let devices =
            [device("a", true, &[0, 1]), device("b", false, &[]), device("c", true, &[1])];
        inventory.told(R, 1, &devices);
        let ids = ["a", "b", "c"].map(String::from).into();
        let own = Assigned::new(&inventory, R, &ids, ContainerAllocateResponse::default());
        let nodes: Vec<_> = own.devices.iter().map(|(n, ids)| (*n, ids.join(","))).collect();
        assert_eq!(nodes, [(-1, "b".to_owned()), (0, "a".to_owned()), (1, "a,c".to_owned())]);
        assert_eq!(own.ids(), ids);
        assert_eq!(own.with_nodes()["a"], [0, 1].into());
        assert_eq!(own.with_nodes()["b"], [].into());
        let (uid, mut all) = (PodUid::from("1"), Assignments::default());
        all.insert(&uid, "c", R, own);
        let statuses = all.statuses(&uid, &inventory);
        let health: Vec<_> = statuses["c"][0]
            .resources
            .iter()
            .flatten()
            .map(|r| format!("{}={}", r.resource_id, r.health.as_deref().unwrap_or_default()))
            .collect();
        assert_eq!(health, ["a=Healthy", "b=Unhealthy", "c=Healthy"]);
    }
}
