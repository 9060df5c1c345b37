//! Limits to properties of slices and scopes: pure.
//!
//! Names and units are those of systemd's D-Bus API (org.freedesktop.systemd1(5)).

use zbus::zvariant::Value;

use super::Property;

/// Limits of a unit in the terms of cgroup v2; what is `None` is left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `cpu.weight`, 1 to 10000.
    pub cpu_weight: Option<u64>,
    /// Microseconds per period; none or less is no quota.
    pub cpu_quota: Option<i64>,
    /// Microseconds; 0 is 100 ms.
    pub cpu_period: u64,
    /// Bytes; negative is no limit.
    pub memory: Option<i64>,
    /// Bytes beside `memory`; negative is no limit.
    pub swap: Option<i64>,
    /// Bytes that are never reclaimed; negative is all.
    pub memory_min: Option<i64>,
    /// Bytes that are reclaimed last; negative is all.
    pub memory_low: Option<i64>,
    /// Bytes above which its processes are slowed down; negative is no limit.
    pub memory_high: Option<i64>,
    /// Processes and threads; negative is no limit.
    pub pids: Option<i64>,
    /// `memory.oom.group`, for scopes: one process without memory ends all of them.
    pub oom_group: bool,
}

const NONE: u64 = u64::MAX;
/// What a quota is rounded up to, in microseconds a second: systemd keeps whole percents.
const PERCENT: u64 = 10_000;

impl Limits {
    /// As properties.
    pub fn properties(&self) -> Vec<Property> {
        let mut properties = Vec::new();
        let mut set = |name, value: u64| properties.push((name, Value::U64(value)));
        let limit = |value: i64| u64::try_from(value).unwrap_or(NONE);
        if let Some(weight) = self.cpu_weight {
            set("CPUWeight", weight.clamp(1, 10_000));
        }
        if let Some(quota) = self.cpu_quota {
            let period = if self.cpu_period > 0 { self.cpu_period } else { 100_000 };
            let per_second = match u64::try_from(quota) {
                Ok(quota @ 1..) => (quota.saturating_mul(1_000_000) / period)
                    .div_ceil(PERCENT)
                    .saturating_mul(PERCENT),
                _ => NONE,
            };
            set("CPUQuotaPerSecUSec", per_second);
            set("CPUQuotaPeriodUSec", period);
        }
        if let Some(memory) = self.memory {
            set("MemoryMax", limit(memory));
        }
        let more = [
            ("MemorySwapMax", self.swap),
            ("MemoryMin", self.memory_min),
            ("MemoryLow", self.memory_low),
            ("MemoryHigh", self.memory_high),
        ];
        for (name, bytes) in more {
            if let Some(bytes) = bytes {
                set(name, limit(bytes));
            }
        }
        if let Some(pids) = self.pids {
            set("TasksMax", limit(pids));
        }
        properties
    }
}

/// Properties of a slice for a pod or a QoS class.
pub fn slice(description: String, limits: &Limits) -> Vec<Property> {
    let mut properties = unit(description);
    properties.extend(limits.properties());
    properties
}

/// Properties of a scope in `slice` around the processes `pids`, which may make cgroups in it.
pub fn scope(description: String, slice: &str, pids: &[u32], limits: &Limits) -> Vec<Property> {
    let mut properties = unit(description);
    properties.extend([
        ("Slice", Value::from(slice.to_owned())),
        ("Delegate", Value::Bool(true)),
        ("PIDs", Value::from(pids.to_vec())),
        // One that was killed is no concern of systemd's.
        ("CollectMode", Value::from("inactive-or-failed")),
    ]);
    if limits.oom_group {
        properties.push((OOM_POLICY, Value::from("kill")));
    }
    properties.extend(limits.properties());
    properties
}

/// Scopes have it since systemd 252; it is left out where it is refused.
pub(super) const OOM_POLICY: &str = "OOMPolicy";

fn unit(description: String) -> Vec<Property> {
    let mut properties = vec![
        ("Description", Value::from(description)),
        // Not stopped, in no order, by systemd's shutdown while their node agent still runs.
        ("DefaultDependencies", Value::Bool(false)),
    ];
    // What is accounted has its controller enabled in the parents.
    for name in ["CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting"] {
        properties.push((name, Value::Bool(true)));
    }
    properties
}

/// Whether a property can be changed in a unit that runs.
pub(super) fn is_lasting(name: &str) -> bool {
    !matches!(
        name,
        "Description"
            | "DefaultDependencies"
            | "Slice"
            | "Delegate"
            | "PIDs"
            | "CollectMode"
            | OOM_POLICY
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(properties: &[Property]) -> Vec<String> {
        let number = |value: &Value<'_>| u64::try_from(value).unwrap_or_default();
        properties.iter().map(|(name, value)| format!("{name}={}", number(value))).collect()
    }

    #[test]
    fn limits_are_systemds_properties() {
        for (limits, expected) in [
            (Limits::default(), vec![]),
            (
                Limits {
                    cpu_weight: Some(39),
                    cpu_quota: Some(50_000),
                    memory: Some(64 << 20),
                    swap: Some(0),
                    pids: Some(100),
                    ..Limits::default()
                },
                vec![
                    "CPUWeight=39",
                    "CPUQuotaPerSecUSec=500000",
                    "CPUQuotaPeriodUSec=100000",
                    "MemoryMax=67108864",
                    "MemorySwapMax=0",
                    "TasksMax=100",
                ],
            ),
            (
                Limits {
                    memory_min: Some(1),
                    memory_low: Some(2),
                    memory_high: Some(-1),
                    ..Limits::default()
                },
                vec!["MemoryMin=1", "MemoryLow=2", "MemoryHigh=18446744073709551615"],
            ),
            // Rounded up to whole percents, of which systemd would otherwise lose the rest.
            (
                Limits { cpu_quota: Some(2_500), cpu_period: 100_000, ..Limits::default() },
                vec!["CPUQuotaPerSecUSec=30000", "CPUQuotaPeriodUSec=100000"],
            ),
            (
                Limits {
                    cpu_quota: Some(-1),
                    memory: Some(-1),
                    pids: Some(-1),
                    ..Limits::default()
                },
                vec![
                    "CPUQuotaPerSecUSec=18446744073709551615",
                    "CPUQuotaPeriodUSec=100000",
                    "MemoryMax=18446744073709551615",
                    "TasksMax=18446744073709551615",
                ],
            ),
        ] {
            assert_eq!(text(&limits.properties()), expected, "{limits:?}");
        }
    }

    #[test]
    fn a_unit_that_runs_is_told_of_its_limits_only() {
        let limits = Limits { cpu_weight: Some(1), oom_group: true, ..Limits::default() };
        let all = scope("x".into(), "kubepods.slice", &[1], &limits);
        assert!(all.iter().any(|(name, value)| *name == "Delegate" && *value == Value::Bool(true)));
        assert!(all.contains(&(OOM_POLICY, Value::from("kill"))));
        let lasting: Vec<_> = all.iter().map(|p| p.0).filter(|name| is_lasting(name)).collect();
        assert_eq!(
            lasting,
            ["CPUAccounting", "MemoryAccounting", "TasksAccounting", "IOAccounting", "CPUWeight"]
        );
    }
}
