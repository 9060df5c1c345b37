//! The thresholds, from `evictionHard`, `evictionSoft` and what belongs to them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Signal;
use crate::config::Threshold;
use crate::pod::quantity::Notation;

/// What `evictionHard` is where it is not written down (kubelet's on Linux).
const DEFAULT_HARD: [(&str, &str); 5] = [
    ("imagefs.available", "15%"),
    ("imagefs.inodesFree", "5%"),
    ("memory.available", "100Mi"),
    ("nodefs.available", "10%"),
    ("nodefs.inodesFree", "5%"),
];

/// How little may be left of one signal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvictionThreshold {
    /// What is measured.
    pub signal: Signal,
    /// Less than this is too little.
    pub value: Threshold,
    /// For how long that must be so; zero is a hard threshold.
    pub grace: Duration,
    /// What must be free on top before it counts as resolved.
    pub min_reclaim: Option<Threshold>,
    /// How its amount was written, which is how it is told.
    pub notation: Notation,
}

/// All that decides about evictions.
#[derive(Clone, Debug, PartialEq)]
pub struct EvictionConfig {
    /// The thresholds, hard and soft.
    pub thresholds: Vec<EvictionThreshold>,
    /// Most seconds for a pod that goes for a soft threshold; negative leaves it to the pod.
    pub max_pod_grace: i64,
    /// How long a pressure stays after it was last seen.
    pub transition: Duration,
}

impl Default for EvictionConfig {
    fn default() -> Self {
        let usual = Settings { hard: usual_hard(), pods_bounded: true, ..Settings::default() };
        Self {
            thresholds: usual.thresholds().unwrap_or_default(),
            max_pod_grace: 0,
            transition: Duration::from_secs(300),
        }
    }
}

impl EvictionConfig {
    /// How much of `capacity` the hard threshold of `signal` keeps from pods; 0 without one.
    pub fn kept(&self, signal: Signal, capacity: u64) -> u64 {
        let hard = self.thresholds.iter().find(|t| t.signal == signal && t.grace.is_zero());
        hard.map_or(0, |threshold| threshold.value.of(capacity))
    }
}

/// `evictionHard` where it is not written down.
pub fn usual_hard() -> BTreeMap<String, String> {
    DEFAULT_HARD.map(|(signal, text)| (signal.to_owned(), text.to_owned())).into()
}

fn signal(name: &str) -> Option<Signal> {
    Signal::ALL.into_iter().find(|signal| signal.name() == name)
}

type Written = BTreeMap<String, String>;

/// The fields as written.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `evictionHard`, the defaults included where they hold.
    pub hard: Written,
    /// `evictionSoft`.
    pub soft: Written,
    /// `evictionSoftGracePeriod`.
    pub grace: Written,
    /// `evictionMinimumReclaim`.
    pub reclaim: Written,
    /// Whether pods together are held to what is theirs (`pods` in `enforceNodeAllocatable`).
    pub pods_bounded: bool,
}

impl Settings {
    /// The thresholds; else the field and what is wrong with it.
    pub fn thresholds(&self) -> Result<Vec<EvictionThreshold>, (String, String)> {
        let mut graces = BTreeMap::new();
        for (name, text) in &self.grace {
            let wrong = |reason| (format!("evictionSoftGracePeriod.{name}"), reason);
            let signal = known(name).map_err(wrong)?;
            let period = text.parse::<kube::core::Duration>();
            let period = period.ok().filter(|period| !period.is_negative());
            let period =
                period.ok_or_else(|| wrong(format!("{text:?} is no period such as 1m30s")))?;
            graces.insert(signal, Duration::from(period));
        }
        let mut reclaims = BTreeMap::new();
        for (name, text) in &self.reclaim {
            let wrong = |reason| (format!("evictionMinimumReclaim.{name}"), reason);
            let signal = known(name).map_err(wrong)?;
            let amount = Threshold::parse(text).filter(|t| *t != Threshold::Share(0.0));
            let amount = amount.ok_or_else(|| {
                wrong(format!("{text:?} is neither a quantity nor a percentage above 0"))
            })?;
            reclaims.insert(signal, amount);
        }
        let mut thresholds = Vec::new();
        let kinds = [("evictionHard", &self.hard), ("evictionSoft", &self.soft)];
        for (field, (name, text)) in
            kinds.into_iter().flat_map(|(field, all)| all.iter().map(move |one| (field, one)))
        {
            let wrong = |reason| (format!("{field}.{name}"), reason);
            let soft = field == "evictionSoft";
            let signal = known(name).map_err(wrong)?;
            let grace = match graces.get(&signal) {
                _ if !soft => Duration::ZERO,
                Some(grace) => *grace,
                None => {
                    return Err(wrong(format!(
                        "a soft threshold needs its grace period; add \
                         evictionSoftGracePeriod: {{{name}: 1m30s}}"
                    )));
                }
            };
            let Some(value) = Threshold::parse(text) else {
                return Err(wrong(format!("{text:?} is neither a quantity nor a percentage")));
            };
            match value {
                // The way to say that there is none.
                Threshold::Share(share) if share <= 0.0 || share >= 1.0 => continue,
                Threshold::Absolute(0) => {
                    return Err(wrong(format!("{text:?} must be above 0; 0% is no threshold")));
                }
                _ => {}
            }
            // Layers lie with the images or with the volumes, whose thresholds count for them; upstream
            // puts those in place of what is written, too.
            if matches!(signal, Signal::ContainerFs | Signal::ContainerFsInodes) {
                continue;
            }
            let min_reclaim = reclaims.get(&signal).copied();
            let notation = Notation::of(text);
            thresholds.push(EvictionThreshold { signal, value, grace, min_reclaim, notation });
        }
        if self.pods_bounded {
            // What is bounded is ended by the kernel, whatever it is, unless a pod goes before.
            let memory = |t: &&EvictionThreshold| t.signal == Signal::Memory && t.grace.is_zero();
            let pods: Vec<_> = thresholds.iter().filter(memory).copied().collect();
            let of_pods = |t| EvictionThreshold { signal: Signal::PodsMemory, ..t };
            thresholds.extend(pods.into_iter().map(of_pods));
        }
        Ok(thresholds)
    }
}

fn known(name: &str) -> Result<Signal, String> {
    let names = || Signal::ALL.map(Signal::name).join(", ");
    signal(name).ok_or_else(|| format!("no such signal; there are {}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(all: &[(&str, &str)]) -> Written {
        all.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn soft_thresholds_have_a_grace_and_both_kinds_the_reclaim() {
        let settings = Settings {
            hard: written(&[("memory.available", "100Mi"), ("nodefs.available", "0%")]),
            soft: written(&[("memory.available", "20%"), ("pid.available", "100%")]),
            grace: written(&[("memory.available", "1m30s"), ("pid.available", "1s")]),
            reclaim: written(&[("memory.available", "10Mi")]),
            pods_bounded: false,
        };
        let hard = EvictionThreshold {
            signal: Signal::Memory,
            value: Threshold::Absolute(100 << 20),
            grace: Duration::ZERO,
            min_reclaim: Some(Threshold::Absolute(10 << 20)),
            notation: Notation::Binary,
        };
        let soft = EvictionThreshold {
            value: Threshold::Share(0.2),
            grace: Duration::from_secs(90),
            ..hard
        };
        assert_eq!(settings.thresholds(), Ok(vec![hard, soft]));
        let bounded = Settings { pods_bounded: true, ..settings };
        let pods = EvictionThreshold { signal: Signal::PodsMemory, ..hard };
        assert_eq!(bounded.thresholds(), Ok(vec![hard, soft, pods]));
    }

    #[test]
    fn signals_of_containers_layers_are_checked_and_left_to_those_beside_them() {
        let settings = Settings {
            hard: written(&[("containerfs.available", "5%")]),
            soft: written(&[("containerfs.inodesFree", "10%")]),
            grace: written(&[("containerfs.inodesFree", "1m")]),
            reclaim: written(&[("containerfs.available", "1Gi")]),
            pods_bounded: true,
        };
        assert_eq!(settings.thresholds(), Ok(vec![]));
        let without_grace = Settings { grace: Written::new(), ..settings };
        let (field, _) = without_grace.thresholds().unwrap_err();
        assert_eq!(field, "evictionSoft.containerfs.inodesFree");
    }

    #[test]
    fn what_upstream_refuses_is_refused_by_name() {
        let one = |name: &str, text: &str| written(&[(name, text)]);
        let none = Settings::default;
        for (settings, field, reason) in [
            (
                Settings { soft: one("memory.available", "1Gi"), ..none() },
                "evictionSoft.memory.available",
                "grace period",
            ),
            (
                Settings { hard: one("memory", "1Gi"), ..none() },
                "evictionHard.memory",
                "no such signal",
            ),
            (
                Settings { hard: one("memory.available", "0"), ..none() },
                "evictionHard.memory.available",
                "above 0",
            ),
            (
                Settings { hard: one("memory.available", "101%"), ..none() },
                "evictionHard.memory.available",
                "percentage",
            ),
            (
                Settings { grace: one("memory.available", "-1s"), ..none() },
                "evictionSoftGracePeriod.memory.available",
                "no period",
            ),
            (
                Settings { grace: one("x", "1s"), ..none() },
                "evictionSoftGracePeriod.x",
                "no such signal",
            ),
            (
                Settings { reclaim: one("memory.available", "0%"), ..none() },
                "evictionMinimumReclaim.memory.available",
                "above 0",
            ),
        ] {
            let (at, said) = settings.thresholds().unwrap_err();
            assert_eq!(at, field);
            assert!(said.contains(reason), "{at}: {said}");
        }
    }
}
