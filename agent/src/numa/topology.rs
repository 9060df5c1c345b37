//! The machine as data: which CPUs share a core, a cache, a socket and a NUMA node, and the memory of
//! each node. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::node::cpu_set::CpuSet;

/// Where a CPU (a hardware thread) is. Each number is unique on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The core: the number of its first CPU.
    pub core: u32,
    /// The last cache that is not shared by the whole node; the socket where there is none.
    pub uncore: u32,
    /// The socket.
    pub socket: u32,
    /// The NUMA node.
    pub node: u32,
}

/// What CPUs share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// A core.
    Core,
    /// A last-level cache.
    Uncore,
    /// A socket.
    Socket,
    /// A NUMA node.
    Node,
}

impl Place {
    fn at(&self, level: Level) -> u32 {
        match level {
            Level::Core => self.core,
            Level::Uncore => self.uncore,
            Level::Socket => self.socket,
            Level::Node => self.node,
        }
    }
}

/// A NUMA node's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Bytes, huge pages among them.
    pub memory: u64,
    /// Bytes of huge pages, by resource (`hugepages-2Mi`).
    pub huge_pages: BTreeMap<String, u64>,
    /// How far each node is, in the order of the nodes; empty where the kernel does not say.
    pub distances: Vec<u64>,
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// CPUs that are online.
    pub cpus: BTreeMap<u32, Place>,
    /// NUMA nodes.
    pub nodes: BTreeMap<u32, Node>,
}

impl Topology {
    /// All CPUs.
    pub fn all(&self) -> CpuSet {
        self.cpus.keys().copied().collect()
    }

    /// The units of `level` that `of` are in.
    pub fn units(&self, of: &CpuSet, level: Level) -> BTreeSet<u32> {
        of.iter().filter_map(|cpu| Some(self.cpus.get(&cpu)?.at(level))).collect()
    }

    /// Those of `of` that are in this unit.
    pub fn within(&self, of: &CpuSet, level: Level, unit: u32) -> CpuSet {
        let inside = |cpu: &u32| self.cpus.get(cpu).is_some_and(|place| place.at(level) == unit);
        of.iter().filter(inside).collect()
    }

    /// All CPUs of this unit.
    pub fn cpus_of(&self, level: Level, unit: u32) -> CpuSet {
        self.within(&self.all(), level, unit)
    }

    /// Number of units.
    pub fn count(&self, level: Level) -> usize {
        self.units(&self.all(), level).len()
    }

    /// CPUs in a unit, where all have as many.
    pub fn cpus_per(&self, level: Level) -> usize {
        self.cpus.len().checked_div(self.count(level)).unwrap_or(0)
    }

    /// All CPUs of the cores that `cpus` are on.
    pub fn whole_cores(&self, cpus: &CpuSet) -> CpuSet {
        let cores = self.units(cpus, Level::Core);
        let on = |(cpu, place): (&u32, &Place)| cores.contains(&place.core).then_some(*cpu);
        self.cpus.iter().filter_map(on).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A machine of `sockets`, each with `nodes` NUMA nodes of `cores` cores, in which first threads are
    /// numbered before second ones, and `caches` last-level caches a node.
    pub(in crate::numa) fn machine(
        [sockets, nodes, cores, threads]: [u32; 4],
        caches: u32,
    ) -> Topology {
        let all = sockets * nodes * cores;
        let mut topology = Topology::default();
        for cpu in 0..all * threads {
            let core = cpu % all;
            let node = core / cores;
            let uncore = node * caches + core % cores / (cores / caches);
            topology.cpus.insert(cpu, Place { core, uncore, socket: node / nodes, node });
        }
        for node in 0..sockets * nodes {
            let distance = |other: u32| {
                if other == node {
                    10
                } else {
                    10 + 11 * (other / nodes).abs_diff(node / nodes) as u64 + 2
                }
            };
            topology.nodes.insert(
                node,
                Node {
                    memory: 4 << 30,
                    huge_pages: [("hugepages-2Mi".to_owned(), 1 << 30)].into(),
                    distances: (0..sockets * nodes).map(distance).collect(),
                },
            );
        }
        topology
    }

    #[test]
    fn units_are_counted() {
        let topology = machine([2, 2, 4, 2], 2);
        let counts = [Level::Core, Level::Uncore, Level::Socket, Level::Node]
            .map(|level| (topology.count(level), topology.cpus_per(level)));
        assert_eq!(counts, [(16, 2), (8, 4), (2, 16), (4, 8)]);
        assert_eq!(topology.cpus_of(Level::Node, 1).to_string(), "4-7,20-23");
        assert_eq!(topology.whole_cores(&"0,20".parse().unwrap()).to_string(), "0,4,16,20");
        assert_eq!(Topology::default().cpus_per(Level::Core), 0);
    }
}
