//! CPUs and memory that containers have to themselves, and on which NUMA nodes: the CPU, memory and
//! topology managers. Pure.

use std::time::Duration;

use super::fields::period;
use super::{ConfigError, KubeletConfiguration};
use crate::numa::Reserved;
use crate::numa::options::{Alignment, AlignmentOptions, CpuOptions, Maturity};
use crate::pod::quantity;

/// What is brought onto the same nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// What each container has.
    #[default]
    Container,
    /// All that a pod has.
    Pod,
}

/// The policies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NumaConfig {
    /// `cpuManagerPolicy: static`, with its options.
    pub cpu: Option<CpuOptions>,
    /// Whether containers with CPUs of their own are held to their quota all the same (feature gate
    /// `DisableCPUQuotaWithExclusiveCPUs`, turned off).
    pub keeps_quota: bool,
    /// `cpuManagerReconcilePeriod`.
    pub reconcile_period: Duration,
    /// `memoryManagerPolicy: Static`, with `reservedMemory` in bytes.
    pub memory: Option<Reserved>,
    /// `topologyManagerPolicy`.
    pub alignment: Alignment,
    /// Its options.
    pub alignment_options: AlignmentOptions,
    /// `topologyManagerScope`.
    pub scope: Scope,
}

impl NumaConfig {
    /// Whether there is nothing to do.
    pub fn is_off(&self) -> bool {
        self.cpu.is_none() && self.memory.is_none() && !self.aligns()
    }

    /// Whether what a container has is brought onto the same nodes.
    pub fn aligns(&self) -> bool {
        self.alignment != Alignment::None
    }

    /// The CPU manager's policy by name.
    pub fn cpu_policy(&self) -> &'static str {
        if self.cpu.is_some() { "static" } else { "none" }
    }

    /// The memory manager's policy by name.
    pub fn memory_policy(&self) -> &'static str {
        if self.memory.is_some() { "Static" } else { "None" }
    }
}

const ALPHA: &str = "CPUManagerPolicyAlphaOptions";
const BETA: &str = "CPUManagerPolicyBetaOptions";
const NO_QUOTA: &str = "DisableCPUQuotaWithExclusiveCPUs";
/// Kubernetes' feature gates that are read here.
pub(super) const GATES: [&str; 3] = [ALPHA, BETA, NO_QUOTA];

fn invalid(field: &str, reason: impl ToString) -> ConfigError {
    ConfigError::invalid(format!("KubeletConfiguration.{field}"), reason)
}

pub(super) fn resolve(kubelet: &KubeletConfiguration) -> Result<NumaConfig, ConfigError> {
    let gates = kubelet.feature_gates.as_ref();
    let gate = |name: &str, default| gates.and_then(|g| g.get(name)).copied().unwrap_or(default);
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let none = Default::default();
    let options = kubelet.cpu_manager_policy_options.as_ref();
    let cpu = match &*text(&kubelet.cpu_manager_policy) {
        "" | "none" => {
            if options.is_some_and(|options| !options.is_empty()) {
                let reason = "the none policy has no options; leave them out, or set \
                              cpuManagerPolicy: static";
                return Err(invalid("cpuManagerPolicyOptions", reason));
            }
            None
        }
        "static" => {
            let allowed = Maturity { alpha: gate(ALPHA, false), beta: gate(BETA, true) };
            let read = CpuOptions::read(options.unwrap_or(&none), allowed);
            Some(read.map_err(|reason| invalid("cpuManagerPolicyOptions", reason))?)
        }
        other => {
            let reason = format!("unknown policy: {other:?}; use none or static");
            return Err(invalid("cpuManagerPolicy", reason));
        }
    };
    let reserved = reserved_memory(kubelet)?;
    let memory = match &*text(&kubelet.memory_manager_policy) {
        "" | "None" => None,
        "Static" => Some(reserved),
        other => {
            let reason = format!("unknown policy: {other:?}; use None or Static");
            return Err(invalid("memoryManagerPolicy", reason));
        }
    };
    let alignment = match &*text(&kubelet.topology_manager_policy) {
        "" | "none" => Alignment::None,
        "best-effort" => Alignment::BestEffort,
        "restricted" => Alignment::Restricted,
        "single-numa-node" => Alignment::SingleNode,
        other => {
            let reason =
                format!("{other:?} must be one of none, best-effort, restricted, single-numa-node");
            return Err(invalid("topologyManagerPolicy", reason));
        }
    };
    let scope = match &*text(&kubelet.topology_manager_scope) {
        "" | "container" => Scope::Container,
        "pod" => Scope::Pod,
        other => {
            let reason = format!("{other:?} must be one of container, or pod");
            return Err(invalid("topologyManagerScope", reason));
        }
    };
    let options = kubelet.topology_manager_policy_options.as_ref();
    let alignment_options = AlignmentOptions::read(options.unwrap_or(&none))
        .map_err(|reason| invalid("topologyManagerPolicyOptions", reason))?;
    Ok(NumaConfig {
        cpu,
        keeps_quota: !gate(NO_QUOTA, true),
        reconcile_period: period(kubelet.cpu_manager_reconcile_period, 10),
        memory,
        alignment,
        alignment_options,
        scope,
    })
}

fn reserved_memory(kubelet: &KubeletConfiguration) -> Result<Reserved, ConfigError> {
    let mut reserved = Reserved::new();
    for of in kubelet.reserved_memory.iter().flatten() {
        let node = of.numa_node;
        for (name, amount) in &of.limits {
            let no = |reason: String| Err(invalid("reservedMemory", reason));
            if name != "memory" && !name.starts_with("hugepages-") {
                return no(format!(
                    "the limit type {name:?} for NUMA node {node} is not supported, only memory and \
                     hugepages-<HugePageSize> are accepted"
                ));
            }
            let bytes = quantity::value(amount).and_then(|bytes| u64::try_from(bytes).ok());
            let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
                return no(format!(
                    "{:?} for NUMA node {node} and resource {name:?} must be an amount above zero",
                    amount.0
                ));
            };
            if reserved.entry(node).or_default().insert(name.clone(), bytes).is_some() {
                return no(format!(
                    "the reserved memory has a duplicate value for NUMA node {node} and resource \
                     {name:?}"
                ));
            }
        }
    }
    Ok(reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<NumaConfig, String> {
        resolve(&serde_json::from_str(text).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_done_unless_asked_for() {
        let config = of(
            r#"{"topologyManagerScope":"pod","reservedMemory":[{"numaNode":0,"limits":{"memory":"1Gi"}}]}"#,
        );
        let config = config.unwrap();
        assert!(config.is_off() && config.scope == Scope::Pod);
        assert_eq!((config.cpu_policy(), config.memory_policy()), ("none", "None"));
        assert_eq!(config.reconcile_period, Duration::from_secs(10));
    }

    #[test]
    fn policies_are_read_and_refused_by_name() {
        let config = of(
            r#"{"cpuManagerPolicy":"static","cpuManagerPolicyOptions":{"full-pcpus-only":"true"},
            "cpuManagerReconcilePeriod":"3s","memoryManagerPolicy":"Static","topologyManagerPolicy":"restricted",
            "reservedMemory":[{"numaNode":0,"limits":{"memory":"1Gi","hugepages-2Mi":"2Mi"}},{"numaNode":1,"limits":{"memory":"1"}}],
            "featureGates":{"DisableCPUQuotaWithExclusiveCPUs":false}}"#,
        )
        .unwrap();
        assert!(config.cpu.unwrap().full_cores && config.keeps_quota && config.aligns());
        assert_eq!(config.reconcile_period, Duration::from_secs(3));
        assert_eq!(config.memory.unwrap()[&0]["memory"], 1 << 30);
        for (text, said) in [
            (r#"{"cpuManagerPolicy":"dynamic"}"#, "cpuManagerPolicy: unknown policy: \"dynamic\""),
            (r#"{"cpuManagerPolicyOptions":{"full-pcpus-only":"true"}}"#, "has no options"),
            (
                r#"{"cpuManagerPolicy":"static","cpuManagerPolicyOptions":{"align-by-socket":"true"}}"#,
                "CPUManagerPolicyAlphaOptions: true",
            ),
            (r#"{"memoryManagerPolicy":"static"}"#, "memoryManagerPolicy: unknown policy"),
            (r#"{"topologyManagerPolicy":"strict"}"#, "must be one of none, best-effort"),
            (r#"{"topologyManagerScope":"node"}"#, "must be one of container, or pod"),
            (r#"{"topologyManagerPolicyOptions":{"x":"y"}}"#, "unknown Topology Manager"),
            (
                r#"{"reservedMemory":[{"numaNode":0,"limits":{"cpu":"1"}}]}"#,
                "\"cpu\" for NUMA node 0",
            ),
            (r#"{"reservedMemory":[{"numaNode":0,"limits":{"memory":"0"}}]}"#, "above zero"),
            (
                r#"{"reservedMemory":[{"numaNode":1,"limits":{"memory":"1"}},{"numaNode":1,"limits":{"memory":"2"}}]}"#,
                "duplicate value for NUMA node 1",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
