//! The static CPU policy: whole CPUs of Guaranteed pods are theirs alone, all others share the rest.
//! Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::accumulate::take;
use super::error::NumaError;
use super::hints::{Hint, Hints, Mask, hints_of, masks};
use super::options::CpuOptions;
use super::requests;
use super::topology::{Level, Topology};
use crate::ids::PodUid;
use crate::node::cpu_set::CpuSet;
use crate::pod::spec::{init_containers, is_sidecar, spec_of};

/// Which containers have which CPUs.
pub type Assigned = BTreeMap<PodUid, BTreeMap<String, CpuSet>>;

/// What is so now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpus {
    /// CPUs of those that have none of their own.
    pub shared: CpuSet,
    /// CPUs of those that have.
    pub assigned: Assigned,
}

impl Cpus {
    /// CPUs of the container's own.
    pub fn of(&self, uid: &PodUid, container: &str) -> Option<&CpuSet> {
        self.assigned.get(uid)?.get(container)
    }

    /// CPUs that are somebody's own.
    pub fn exclusive(&self) -> CpuSet {
        let all = self.assigned.values().flat_map(BTreeMap::values);
        all.fold(CpuSet::default(), |sum, cpus| sum.union(cpus))
    }

    /// Takes back what the pod has; whether it had any.
    pub fn release(&mut self, uid: &PodUid) -> bool {
        let had = self.assigned.remove(uid);
        for cpus in had.iter().flat_map(BTreeMap::values) {
            self.shared = self.shared.union(cpus);
        }
        had.is_some()
    }

    /// Takes back what pods have that are not among `pods`; whether there were any.
    pub fn retain(&mut self, pods: &HashSet<PodUid>) -> bool {
        let gone: Vec<PodUid> =
            self.assigned.keys().filter(|uid| !pods.contains(uid)).cloned().collect();
        for uid in &gone {
            self.release(uid);
        }
        !gone.is_empty()
    }
}

/// The policy, on its machine.
#[derive(Clone, Debug)]
pub struct CpuPolicy {
    topology: Topology,
    options: CpuOptions,
    reserved: CpuSet,
}

impl CpuPolicy {
    /// With the CPUs `reserved`, or where none are named as many as `milli` come to.
    ///
    /// # Errors
    /// Nothing is reserved, or there are not as many CPUs.
    pub fn new(
        topology: Topology,
        options: CpuOptions,
        reserved: &CpuSet,
        milli: u64,
    ) -> Result<Self, String> {
        if milli == 0 {
            return Err("[cpumanager] the static policy requires systemreserved.cpu + \
                        kubereserved.cpu to be greater than zero"
                .into());
        }
        let count = usize::try_from(milli.div_ceil(1000)).unwrap_or(usize::MAX);
        let reserved = if reserved.is_empty() {
            take(&topology, &topology.all(), count, options).unwrap_or_default()
        } else {
            reserved.clone()
        };
        if reserved.len() != count {
            return Err(format!(
                "new static policy error: [cpumanager] unable to reserve the required amount of \
                 CPUs (size of {reserved} did not equal {count})"
            ));
        }
        Ok(Self { topology, options, reserved })
    }

    /// CPUs that can be a container's own.
    pub fn allocatable(&self) -> CpuSet {
        self.topology.all().difference(&self.reserved)
    }

    /// Those that are nobody's.
    pub fn available(&self, cpus: &Cpus) -> CpuSet {
        cpus.shared.difference(&self.reserved)
    }

    /// What is so before any container has CPUs of its own.
    pub fn initial(&self) -> Cpus {
        let all = self.topology.all();
        let shared = if self.options.strict { all.difference(&self.reserved) } else { all };
        Cpus { shared, assigned: Assigned::new() }
    }

    /// Whether what an earlier agent knew can be so on this machine.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self, cpus: &Cpus) -> Result<(), String> {
        let Cpus { shared, assigned } = cpus;
        let reserved = &self.reserved;
        if shared.is_empty() && !assigned.is_empty() && !self.options.strict {
            return Err("default cpuset cannot be empty".into());
        }
        if self.options.strict {
            let both = reserved.intersection(shared);
            if !both.is_empty() {
                return Err(format!(
                    "some of strictly reserved cpus: \"{both}\" are present in defaultCpuSet: \
                     \"{shared}\""
                ));
            }
        } else if !reserved.is_within(shared) {
            return Err(format!(
                "not all reserved cpus: \"{reserved}\" are present in defaultCpuSet: \"{shared}\""
            ));
        }
        for (pod, containers) in assigned {
            for (container, own) in containers {
                if !own.intersection(shared).is_empty() {
                    return Err(format!(
                        "pod: {pod}, container: {container} cpuset: \"{own}\" overlaps with \
                         default cpuset \"{shared}\""
                    ));
                }
            }
        }
        let known = shared.union(&cpus.exclusive());
        let all = self.initial().shared;
        if known != all {
            return Err(format!(
                "current set of available CPUs \"{all}\" doesn't match with CPUs in state \"{known}\""
            ));
        }
        Ok(())
    }

    /// CPUs that `container` may have beside free ones: an init container's go on to those after it, but for
    /// a sidecar's, which runs as long as they do.
    fn reusable(cpus: &Cpus, pod: &Pod, container: &str) -> CpuSet {
        let (uid, spec) = (PodUid::of(pod), spec_of(pod));
        let inits = init_containers(spec).iter().map(|c| (c, !is_sidecar(c)));
        let mut free = CpuSet::default();
        for (before, ends) in inits.chain(spec.containers.iter().map(|c| (c, false))) {
            if before.name == container {
                break;
            }
            let own = cpus.of(&uid, &before.name).cloned().unwrap_or_default();
            free = if ends { free.union(&own) } else { free.difference(&own) };
        }
        free
    }

    /// Where the container's CPUs can be had, or where the pod's.
    pub fn hints(&self, cpus: &Cpus, pod: &Pod, container: Option<&Container>) -> Hints {
        let uid = PodUid::of(pod);
        let (asked, mut reusable) = match container {
            Some(c) => (requests::cpus(pod, c), Self::reusable(cpus, pod, &c.name)),
            None => (requests::pod_cpus(pod), CpuSet::default()),
        };
        if asked == 0 {
            return Hints::new();
        }
        let hints = |list| Hints::from([("cpu".to_owned(), Some(list))]);
        let mut had = CpuSet::default();
        let one =
            container.into_iter().chain(requests::containers(pod).filter(|_| container.is_none()));
        for c in one {
            let Some(own) = cpus.of(&uid, &c.name) else { continue };
            if own.len() != requests::cpus(pod, c) {
                return hints(Vec::new());
            }
            had = had.union(own);
        }
        if had.len() == asked {
            return hints(self.nodes_for(&had, &CpuSet::default(), asked));
        }
        reusable = reusable.union(&had);
        hints(self.nodes_for(&self.available(cpus), &reusable, asked))
    }

    fn nodes_for(&self, available: &CpuSet, reusable: &CpuSet, asked: usize) -> Vec<Hint> {
        let of = |set: &CpuSet, mask: Mask| {
            let node = |cpu: &u32| self.topology.cpus.get(cpu).map(|place| place.node);
            set.iter().filter(|cpu| node(cpu).is_some_and(|node| mask.has(node))).count()
        };
        let all = self.topology.all();
        let nodes: BTreeSet<u32> = self.topology.units(&all, Level::Node);
        let mut fewest = nodes.len();
        let mut found = Vec::new();
        for mask in masks(&nodes) {
            if of(&all, mask) >= asked {
                fewest = fewest.min(mask.len());
            }
            let again = of(reusable, mask);
            if again == reusable.len() && again + of(available, mask) >= asked {
                found.push(mask);
            }
        }
        let mut hints = hints_of(found, fewest);
        if self.options.by_socket {
            let sockets = self.topology.count(Level::Socket);
            let per_socket = nodes.len().checked_div(sockets).unwrap_or(0);
            for hint in hints.iter_mut().filter(|_| per_socket > 0) {
                let on = self.sockets_of(hint.nodes.unwrap_or_default()).len();
                hint.preferred |= on == fewest.div_ceil(per_socket);
            }
        }
        hints
    }

    fn sockets_of(&self, mask: Mask) -> BTreeSet<u32> {
        let places = self.topology.cpus.values();
        places.filter(|place| mask.has(place.node)).map(|place| place.socket).collect()
    }

    /// Those of `free` that are near to the nodes.
    fn near(&self, mask: Mask, free: &CpuSet) -> CpuSet {
        let sockets = if self.options.by_socket { self.sockets_of(mask) } else { BTreeSet::new() };
        let near = |cpu: &u32| {
            let place = self.topology.cpus.get(cpu);
            place.is_some_and(|p| mask.has(p.node) || sockets.contains(&p.socket))
        };
        free.iter().filter(near).collect()
    }

    fn check_cores(&self, cpus: &Cpus, asked: usize) -> Result<(), NumaError> {
        let per_core = self.topology.cpus_per(Level::Core).max(1);
        if !self.options.full_cores {
            return Ok(());
        }
        if !asked.is_multiple_of(per_core) {
            return Err(NumaError::OddCpus { requested: asked, per_core });
        }
        // A core of which one thread is reserved cannot be had whole.
        let available = cpus.shared.difference(&self.topology.whole_cores(&self.reserved)).len();
        if asked > available {
            return Err(NumaError::ShortOfCores { available, requested: asked, per_core });
        }
        Ok(())
    }

    /// Gives the container its CPUs, near to the nodes of `hint` as far as there are some; those that it
    /// is given now, if any.
    ///
    /// # Errors
    /// There are not as many.
    pub fn allocate(
        &self,
        cpus: &mut Cpus,
        pod: &Pod,
        container: &Container,
        hint: Hint,
    ) -> Result<Option<CpuSet>, NumaError> {
        let asked = requests::cpus(pod, container);
        if asked == 0 {
            return Ok(None);
        }
        self.check_cores(cpus, asked)?;
        let uid = PodUid::of(pod);
        if cpus.of(&uid, &container.name).is_some() {
            return Ok(None);
        }
        let reusable = Self::reusable(cpus, pod, &container.name);
        let free = self.available(cpus).union(&reusable);
        let pick = |from: &CpuSet, count| take(&self.topology, from, count, self.options);
        let mut taken = CpuSet::default();
        if let Some(mask) = hint.nodes {
            let near = self.near(mask, &free);
            taken = pick(&near, asked.min(near.len()))?;
        }
        let rest = pick(&free.difference(&taken), asked - taken.len())?;
        taken = taken.union(&rest);
        cpus.shared = cpus.shared.difference(&taken);
        let own = cpus.assigned.entry(uid).or_default();
        own.insert(container.name.clone(), taken.clone());
        Ok(Some(taken))
    }

    /// Whether all of `cpus` are on one last-level cache.
    pub fn on_one_cache(&self, cpus: &CpuSet) -> bool {
        self.topology.units(cpus, Level::Uncore).len() <= 1
    }

    /// Whether only whole cores are given.
    pub fn gives_whole_cores(&self) -> bool {
        self.options.full_cores
    }

    /// How many of each node's CPUs are somebody's own.
    pub fn by_node(&self, cpus: &Cpus) -> BTreeMap<u32, usize> {
        let (all, exclusive) = (self.topology.all(), cpus.exclusive());
        let nodes = self.topology.units(&all, Level::Node).into_iter();
        nodes.map(|n| (n, self.topology.within(&exclusive, Level::Node, n).len())).collect()
    }
}

#[cfg(test)]
#[path = "cpu_tests.rs"]
mod tests;
