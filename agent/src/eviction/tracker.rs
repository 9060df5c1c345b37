//! Which thresholds are crossed, since when, and what the node says of it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

use super::{EvictionConfig, EvictionThreshold, Signal};
use crate::node::conditions::{LastSeen, Pressure};
use crate::node::machine::{FileSystem, Measured};

/// What is left of how much, by signal.
pub type Observations = BTreeMap<Signal, (u64, u64)>;

/// The signals of what was measured; `memory` is the machine's, bytes.
pub fn observe(measured: &Measured, memory: u64) -> Observations {
    let mut all = Observations::new();
    if let Some(available) = measured.memory_available {
        all.insert(Signal::Memory, (available, memory));
    }
    if let Some(pods) = measured.pods_memory {
        all.insert(Signal::PodsMemory, pods);
    }
    let mut file_system = |fs: Option<FileSystem>, bytes: Signal, inodes: Signal| {
        let Some(fs) = fs else { return };
        all.insert(bytes, (fs.available, fs.capacity));
        // Some file systems count no inodes.
        if fs.inodes > 0 {
            all.insert(inodes, (fs.inodes_free, fs.inodes));
        }
    };
    file_system(measured.nodefs, Signal::NodeFs, Signal::NodeFsInodes);
    file_system(measured.imagefs, Signal::ImageFs, Signal::ImageFsInodes);
    if let (Some(max), Some(pids)) = (measured.pid_max, measured.pids) {
        all.insert(Signal::Pids, (max.saturating_sub(pids), max));
    }
    all
}

/// What one look at the node says.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// The pressure to report.
    pub pressure: Pressure,
    /// Thresholds whose grace period is over, in the order in which they are to be reclaimed.
    pub starved: Vec<EvictionThreshold>,
}

/// Follows the thresholds from look to look.
#[derive(Clone, Debug)]
pub struct Tracker {
    config: EvictionConfig,
    /// Since when each threshold is crossed, by its place in the configuration.
    since: BTreeMap<usize, Timestamp>,
    /// Those that counted at the last look.
    met: BTreeSet<usize>,
    seen: LastSeen,
}

fn crossed(threshold: &EvictionThreshold, observed: &Observations, with_reclaim: bool) -> bool {
    observed.get(&threshold.signal).is_some_and(|(left, capacity)| {
        let reclaim = threshold.min_reclaim.filter(|_| with_reclaim);
        let reclaim = reclaim.map_or(0, |reclaim| reclaim.of(*capacity));
        *left < threshold.value.of(*capacity).saturating_add(reclaim)
    })
}

impl Tracker {
    /// With nothing seen yet.
    pub fn new(config: EvictionConfig) -> Self {
        let (since, met, seen) = (BTreeMap::new(), BTreeSet::new(), LastSeen::default());
        Self { config, since, met, seen }
    }

    /// Takes what was observed at `now`.
    pub fn look(&mut self, observed: &Observations, now: Timestamp) -> Turn {
        let all = &self.config.thresholds;
        let crossed: Vec<usize> = (0..all.len())
            .filter(|at| crossed(&all[*at], observed, self.met.contains(at)))
            .collect();
        self.since =
            crossed.iter().map(|at| (*at, self.since.get(at).copied().unwrap_or(now))).collect();
        let mut pressure = Pressure::default();
        for at in crossed {
            match all[at].signal {
                Signal::Memory | Signal::PodsMemory => pressure.memory = true,
                Signal::Pids => pressure.pid = true,
                _ => pressure.disk = true,
            }
        }
        let transition =
            SignedDuration::try_from(self.config.transition).unwrap_or(SignedDuration::MAX);
        let pressure = self.seen.note(pressure, now, transition);
        let over = |at: &usize, since: &Timestamp| {
            // A clock that was set back has not undone the time.
            let passed = std::time::Duration::try_from(now.duration_since(*since));
            passed.unwrap_or_default() >= all[*at].grace
        };
        self.met =
            self.since.iter().filter(|(at, since)| over(at, since)).map(|(at, _)| *at).collect();
        let mut starved: Vec<_> = self.met.iter().map(|at| all[*at]).collect();
        starved.sort_by_key(|threshold| threshold.signal);
        Turn { pressure, starved }
    }

    /// Whether nothing is short any more, the minimum reclaim of every threshold included.
    pub fn relieved(&self, observed: &Observations) -> bool {
        !self.config.thresholds.iter().any(|threshold| crossed(threshold, observed, true))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Threshold;
    use crate::pod::quantity::Notation;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn threshold(
        signal: Signal,
        value: u64,
        grace: u64,
        reclaim: Option<u64>,
    ) -> EvictionThreshold {
        EvictionThreshold {
            signal,
            value: Threshold::Absolute(value),
            grace: Duration::from_secs(grace),
            min_reclaim: reclaim.map(Threshold::Absolute),
            notation: Notation::Binary,
        }
    }

    fn tracker(thresholds: Vec<EvictionThreshold>) -> Tracker {
        let transition = Duration::from_secs(30);
        Tracker::new(EvictionConfig { thresholds, max_pod_grace: 0, transition })
    }

    fn memory(left: u64) -> Observations {
        [(Signal::Memory, (left, 1000))].into()
    }

    #[test]
    fn a_soft_threshold_counts_when_it_was_crossed_for_its_grace_period() {
        let (hard, soft) =
            (threshold(Signal::Memory, 10, 0, None), threshold(Signal::Memory, 100, 20, None));
        let mut all = tracker(vec![hard, soft]);
        let mut look = |second, left| {
            let turn = all.look(&memory(left), at(second));
            (turn.pressure.memory, turn.starved)
        };
        assert_eq!(look(0, 100), (false, vec![]));
        assert_eq!(look(1, 99), (true, vec![]), "the condition does not wait");
        assert_eq!(look(20, 99), (true, vec![]));
        assert_eq!(look(21, 99), (true, vec![soft]));
        assert_eq!(look(22, 9), (true, vec![hard, soft]));
        assert_eq!(look(23, 100), (true, vec![]), "the condition stays for its time");
        assert_eq!(look(24, 99), (true, vec![]), "the grace period begins anew");
        assert_eq!(look(44, 99), (true, vec![soft]));
        assert_eq!(look(73, 100), (true, vec![]));
        assert_eq!(look(74, 100), (false, vec![]));
    }

    #[test]
    fn what_counted_counts_until_the_minimum_is_reclaimed() {
        let hard = threshold(Signal::Memory, 10, 0, Some(5));
        let mut all = tracker(vec![hard]);
        assert_eq!(all.look(&memory(14), at(0)).starved, []);
        assert!(!all.relieved(&memory(14)) && all.relieved(&memory(15)));
        assert_eq!(all.look(&memory(9), at(1)).starved, [hard]);
        assert_eq!(all.look(&memory(14), at(2)).starved, [hard]);
        assert_eq!(all.look(&memory(15), at(3)).starved, []);
        assert_eq!(all.look(&memory(14), at(4)).starved, []);
    }

    #[test]
    fn memory_is_reclaimed_first_and_what_is_not_seen_is_not_short() {
        let disk = threshold(Signal::NodeFs, 10, 0, None);
        let short = threshold(Signal::Memory, 10, 0, None);
        let pids = threshold(Signal::Pids, 10, 0, None);
        let mut all = tracker(vec![pids, disk, short]);
        let seen = [(Signal::NodeFs, (1, 100)), (Signal::Memory, (1, 100))].into();
        let turn = all.look(&seen, at(0));
        assert_eq!(turn.starved, [short, disk]);
        assert_eq!(turn.pressure, Pressure { memory: true, disk: true, pid: false });
    }

    const MEMORY: u64 = 8 << 30;

    fn healthy() -> Measured {
        let fs = FileSystem { capacity: 1000, available: 500, inodes: 100, inodes_free: 50 };
        Measured {
            memory_available: Some(4 << 30),
            pods_memory: Some((2 << 30, 3 << 30)),
            nodefs: Some(fs),
            imagefs: Some(fs),
            pid_max: Some(1000),
            pids: Some(10),
        }
    }

    #[test]
    fn pressures_follow_the_default_thresholds() {
        let fs = healthy().nodefs.unwrap();
        let full = |available, inodes_free| Some(FileSystem { available, inodes_free, ..fs });
        let none = Pressure::default();
        let (memory, disk) = (Pressure { memory: true, ..none }, Pressure { disk: true, ..none });
        for (measured, expected) in [
            (healthy(), none),
            (Measured { memory_available: Some((100 << 20) - 1), ..healthy() }, memory),
            (Measured { memory_available: Some(100 << 20), ..healthy() }, none),
            (Measured { memory_available: None, ..healthy() }, none),
            (Measured { pods_memory: Some(((100 << 20) - 1, 3 << 30)), ..healthy() }, memory),
            (Measured { pods_memory: None, ..healthy() }, none),
            (Measured { nodefs: full(99, 50), ..healthy() }, disk),
            (Measured { nodefs: full(100, 50), ..healthy() }, none),
            (Measured { nodefs: full(500, 4), ..healthy() }, disk),
            (Measured { imagefs: full(149, 50), ..healthy() }, disk),
            (Measured { imagefs: full(151, 50), ..healthy() }, none),
            (Measured { pids: Some(999), ..healthy() }, none),
            (Measured::default(), none),
        ] {
            let mut usual = Tracker::new(EvictionConfig::default());
            let pressure = usual.look(&observe(&measured, MEMORY), at(0)).pressure;
            assert_eq!(pressure, expected, "{measured:?}");
        }
        let mut own = tracker(vec![threshold(Signal::Pids, 100, 0, None)]);
        let crowded = Measured { pids: Some(999), memory_available: Some(0), ..healthy() };
        let turn = own.look(&observe(&crowded, MEMORY), at(0));
        assert_eq!(turn.pressure, Pressure { pid: true, ..none });
    }
}
