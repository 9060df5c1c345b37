//! Which CPUs a container gets of those that are free: whole units of the machine first, from where
//! least is left, so that large units stay whole for those that need them. Pure.

use super::balance::plan_balanced;
use super::options::CpuOptions;
use super::topology::{Level, Topology};
use crate::node::cpu_set::CpuSet;

/// Why there are no CPUs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// There are not as many.
    #[error(
        "not enough cpus available to satisfy request: requested={requested}, available={available}"
    )]
    Short {
        /// So many were asked for.
        requested: usize,
        /// So many are free.
        available: usize,
    },
    /// There are, and still it cannot be done.
    #[error("failed to allocate cpus")]
    Failed,
}

/// Takes `count` of `available`.
///
/// # Errors
/// There are not as many.
pub fn take(
    topology: &Topology,
    available: &CpuSet,
    count: usize,
    options: CpuOptions,
) -> Result<CpuSet, TakeError> {
    if options.across_nodes {
        let group = if options.full_cores { topology.cpus_per(Level::Core).max(1) } else { 1 };
        if let Some(taken) = plan_balanced(topology, available, count, group, options)? {
            return Ok(taken);
        }
    }
    take_packed(topology, available, count, options)
}

/// Takes `count` of `available` from as few units as can be.
pub(super) fn take_packed(
    topology: &Topology,
    available: &CpuSet,
    count: usize,
    options: CpuOptions,
) -> Result<CpuSet, TakeError> {
    let mut taking = Taking::new(topology, available, count, options)?;
    let [first, second] = taking.large;
    taking.whole(first);
    taking.whole(second);
    if options.by_cache {
        taking.caches();
    }
    if !options.across_cores {
        taking.whole(Level::Core);
    }
    taking.single();
    if taking.needed == 0 { Ok(taking.taken) } else { Err(TakeError::Failed) }
}

/// CPUs being taken.
pub(super) struct Taking<'a> {
    topology: &'a Topology,
    /// Those that can be.
    pub(super) free: CpuSet,
    /// So many are yet to be.
    pub(super) needed: usize,
    pub(super) taken: CpuSet,
    /// The larger of node and socket, and the other one.
    large: [Level; 2],
    across_cores: bool,
}

impl<'a> Taking<'a> {
    pub(super) fn new(
        topology: &'a Topology,
        available: &CpuSet,
        count: usize,
        options: CpuOptions,
    ) -> Result<Self, TakeError> {
        let free = available.intersection(&topology.all());
        if count > free.len() {
            return Err(TakeError::Short { requested: count, available: available.len() });
        }
        let large = if topology.count(Level::Socket) >= topology.count(Level::Node) {
            [Level::Node, Level::Socket]
        } else {
            [Level::Socket, Level::Node]
        };
        let (taken, across_cores) = (CpuSet::default(), options.across_cores);
        Ok(Self { topology, free, needed: count, taken, large, across_cores })
    }

    pub(super) fn take(&mut self, cpus: &CpuSet) {
        self.free = self.free.difference(cpus);
        self.taken = self.taken.union(cpus);
        self.needed = self.needed.saturating_sub(cpus.len());
    }

    fn free_in(&self, level: Level, unit: u32) -> CpuSet {
        self.topology.within(&self.free, level, unit)
    }

    /// Units of `level` that `of` are in, those with fewest free CPUs first.
    fn fullest(&self, of: &CpuSet, level: Level) -> Vec<u32> {
        let mut units: Vec<u32> = self.topology.units(of, level).into_iter().collect();
        units.sort_by_cached_key(|unit| (self.free_in(level, *unit).len(), *unit));
        units
    }

    /// Units with free CPUs in the order in which they are looked at: the larger ones first, and in
    /// each of these the smaller ones.
    pub(super) fn sorted(&self, level: Level) -> Vec<u32> {
        let [first, second] = self.large;
        let above = match level {
            _ if level == first => return self.fullest(&self.free, level),
            _ if level == second => first,
            Level::Uncore => Level::Node,
            _ => second,
        };
        let within = |unit: &u32| self.fullest(&self.free_in(above, *unit), level);
        self.sorted(above).iter().flat_map(within).collect()
    }

    /// Takes units of which no CPU is used, as long as all of one is needed.
    fn whole(&mut self, level: Level) {
        if self.needed == 0 {
            return;
        }
        let size = |unit: u32| match level {
            // Where sockets and cores are not all alike none counts as whole but an average one.
            Level::Socket | Level::Core => self.topology.cpus_per(level),
            _ => self.topology.cpus_of(level, unit).len(),
        };
        let mut units = self.sorted(level);
        units.retain(|unit| self.free_in(level, *unit).len() == size(*unit));
        for unit in units {
            let cpus = self.free_in(level, unit);
            if !cpus.is_empty() && self.needed >= cpus.len() {
                self.take(&cpus);
            }
        }
    }

    /// Takes whole caches, and then what is left from one cache that has as much.
    fn caches(&mut self) {
        for cache in self.sorted(Level::Uncore) {
            if self.needed >= self.topology.cpus_per(Level::Uncore) {
                self.whole(Level::Uncore);
            }
            if self.needed == 0 {
                return;
            }
            self.part_of_cache(cache);
            if self.needed == 0 {
                return;
            }
        }
    }

    fn part_of_cache(&mut self, cache: u32) {
        let threads = self.topology.cpus_per(Level::Core).max(1);
        let free = self.free_in(Level::Uncore, cache);
        let cores: Vec<u32> = self.topology.units(&free, Level::Core).into_iter().collect();
        let of_cores = |cpu: &u32| {
            let core = self.topology.cpus.get(cpu).map(|place| place.core);
            core.is_some_and(|core| {
                cores[..cores.len().min(self.needed.div_ceil(threads))].contains(&core)
            })
        };
        let mut cpus: Vec<u32> = self.free.iter().filter(of_cores).collect();
        if !self.needed.is_multiple_of(2) && threads > 1 && cpus.len() > self.needed {
            cpus.pop();
        }
        if cpus.len() == self.needed {
            self.take(&cpus.into_iter().collect());
        }
    }

    /// Takes one by one: of cores that are used in part already, or, where they are to be spread, in
    /// the order of their numbers.
    fn single(&mut self) {
        let level = if self.across_cores { Level::Socket } else { Level::Core };
        let order: Vec<u32> = self
            .sorted(level)
            .iter()
            .flat_map(|unit| self.free_in(level, *unit).iter().collect::<Vec<_>>())
            .collect();
        for cpu in order {
            if self.needed == 0 {
                return;
            }
            if self.free.contains(cpu) {
                self.take(&[cpu].into_iter().collect());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::topology::tests::machine;
    use super::*;

    fn taken(topology: &Topology, available: &str, count: usize, options: CpuOptions) -> String {
        match take(topology, &available.parse().unwrap(), count, options) {
            Ok(cpus) => cpus.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn whole_units_come_first_and_then_what_is_broken_already() {
        let none = CpuOptions::default();
        // One socket, four cores of two threads.
        let small = machine([1, 1, 4, 2], 1);
        for (available, count, expected) in [
            ("0-7", 1, "0"),
            ("0-7", 2, "0,4"),
            ("1-3,5-7", 1, "1"),
            ("1-3,4-7", 1, "4"),
            ("1-7", 3, "1,4-5"),
            ("0-7", 8, "0-7"),
            ("0,1,2", 3, "0-2"),
            ("0-2", 0, ""),
        ] {
            assert_eq!(taken(&small, available, count, none), expected, "{count} of {available}");
        }
        let said = "not enough cpus available to satisfy request: requested=3, available=2";
        assert_eq!(taken(&small, "0-1", 3, none), said);
        // Two sockets of three cores with two threads.
        let two = machine([2, 1, 3, 2], 1);
        for (available, count, expected) in [
            ("0-11", 6, "0-2,6-8"),
            ("1-11", 6, "3-5,9-11"),
            ("1-11", 2, "1,7"),
            ("0-11", 8, "0-3,6-9"),
            ("2-11", 3, "2,6,8"),
        ] {
            assert_eq!(taken(&two, available, count, none), expected, "{count} of {available}");
        }
        // Sockets of two nodes.
        let four = machine([2, 2, 2, 1], 1);
        assert_eq!(taken(&four, "0-7", 4, none), "0-3");
        assert_eq!(taken(&four, "1-7", 4, none), "4-7");
        assert_eq!(taken(&four, "0-1,3-7", 2, none), "0-1");
    }

    #[test]
    fn options_change_what_is_near() {
        let small = machine([1, 1, 4, 2], 1);
        let spread = CpuOptions { across_cores: true, ..CpuOptions::default() };
        assert_eq!(taken(&small, "0-7", 3, spread), "0-2");
        let caches = machine([1, 1, 8, 2], 4);
        let by_cache = CpuOptions { by_cache: true, ..CpuOptions::default() };
        assert_eq!(taken(&caches, "1-15", 4, by_cache), "2-3,10-11");
        assert_eq!(taken(&caches, "1-15", 4, CpuOptions::default()), "1-2,9-10");
        assert_eq!(taken(&caches, "0-15", 3, by_cache), "0-1,8");
        assert_eq!(taken(&caches, "0-15", 6, by_cache), "0-2,8-10");
        let across = CpuOptions { across_nodes: true, ..CpuOptions::default() };
        let two = machine([2, 1, 4, 1], 1);
        assert_eq!(taken(&two, "0-7", 4, across), "0-3");
        assert_eq!(taken(&two, "0-7", 6, across), "0-2,4-6");
        assert_eq!(taken(&two, "0-7", 5, across), "0-2,4-5");
        let whole = CpuOptions { across_nodes: true, full_cores: true, ..CpuOptions::default() };
        let threads = machine([2, 1, 4, 2], 1);
        assert_eq!(taken(&threads, "0-15", 12, whole), "0-2,4-6,8-10,12-14");
    }

    proptest! {
        #[test]
        fn what_is_taken_was_free_and_is_as_much_as_asked(
            shape in prop::sample::select(vec![[1, 1, 4, 1], [1, 1, 4, 2], [2, 1, 4, 2], [2, 2, 2, 2], [1, 4, 2, 1]]),
            free in prop::collection::btree_set(0u32..20, 0..20),
            count in 0usize..20,
            (full_cores, across_nodes, across_cores, by_cache) in any::<(bool, bool, bool, bool)>(),
        ) {
            let topology = machine(shape, 2);
            let free: CpuSet = free.into_iter().filter(|cpu| topology.cpus.contains_key(cpu)).collect();
            let options = CpuOptions { full_cores, across_nodes, across_cores, by_cache, ..CpuOptions::default() };
            match take(&topology, &free, count, options) {
                Ok(cpus) => prop_assert!(cpus.len() == count && cpus.is_within(&free)),
                Err(error) => {
                    prop_assert_eq!(error, TakeError::Short { requested: count, available: free.len() });
                    prop_assert!(count > free.len());
                }
            }
        }
    }
}
