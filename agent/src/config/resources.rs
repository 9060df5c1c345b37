//! What pods get of the machine: swap, and more to come with it. Pure.

use super::{ConfigError, KubeletConfiguration, NumaConfig, numa, pulls, volumes};
use crate::node::cpu_set::CpuSet;
use crate::pod::cgroup::node::{Enforced, Reservation};

/// How containers are slowed down and spared by the memory that they request and may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryQos {
    /// `memoryThrottlingFactor`: above 0, up to 1.
    pub throttling: f64,
    /// `memoryReservationPolicy: TieredReservation`: what is requested is not reclaimed.
    pub reserve: bool,
}

/// What pods get of the machine, as it was asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResourceConfig {
    /// `memorySwap.swapBehavior: LimitedSwap`.
    pub limited_swap: bool,
    /// `failSwapOn: true`, written down: the default is not to mind.
    pub fail_swap_on: bool,
    /// Whether the agent refuses to start on cgroup v1 (`failCgroupV1`, where it is written down).
    pub fail_cgroup_v1: bool,
    /// Per cent of requested memory that pods of lower classes may not use (`qosReserved`).
    pub qos_reserved: Option<u8>,
    /// `singleProcessOOMKill`; `None` is as the cgroups are: the whole container on v2.
    pub single_process_oom_kill: Option<bool>,
    /// `protectKernelDefaults`.
    pub protect_kernel_defaults: bool,
    /// KEP-2570, where the feature gate MemoryQoS asks for it.
    pub memory_qos: Option<MemoryQos>,
    /// `podsPerCore`; `None` is no such limit.
    pub pods_per_core: Option<u32>,
    /// `reservedSystemCPUs`.
    pub reserved_cpus: CpuSet,
    /// CPUs and memory that containers have to themselves.
    pub numa: NumaConfig,
    /// `localStorageCapacityIsolation: false`.
    pub no_storage_isolation: bool,
    /// `enforceNodeAllocatable`.
    pub enforced: Enforced,
    /// `systemReserved`: resource to quantity, as written.
    pub system_reserved: Vec<(String, String)>,
    /// `kubeReserved`.
    pub kube_reserved: Vec<(String, String)>,
}

pub(super) fn resolve(kubelet: &KubeletConfiguration) -> Result<ResourceConfig, ConfigError> {
    let behavior = kubelet.memory_swap.as_ref().and_then(|swap| swap.swap_behavior.as_deref());
    let reserved_cpus = reserved_cpus(kubelet)?;
    let pairs =
        |map: &Option<std::collections::BTreeMap<String, String>>| -> Vec<(String, String)> {
            map.clone().unwrap_or_default().into_iter().collect()
        };
    let mut system_reserved = pairs(&kubelet.system_reserved);
    let mut kube_reserved = pairs(&kubelet.kube_reserved);
    if !reserved_cpus.is_empty() {
        // They are what is reserved of the CPUs, whatever else was said of it.
        for list in [&mut system_reserved, &mut kube_reserved] {
            list.retain(|(name, _)| name != "cpu");
        }
        system_reserved.push(("cpu".to_owned(), reserved_cpus.len().to_string()));
    }
    Ok(ResourceConfig {
        memory_qos: memory_qos(kubelet)?,
        pods_per_core: kubelet.pods_per_core.filter(|pods| *pods > 0),
        reserved_cpus,
        numa: numa::resolve(kubelet)?,
        no_storage_isolation: kubelet.local_storage_capacity_isolation == Some(false),
        enforced: enforced(kubelet)?,
        system_reserved,
        kube_reserved,
        limited_swap: match behavior.unwrap_or_default() {
            "" | "NoSwap" => false,
            "LimitedSwap" => true,
            other => {
                return Err(ConfigError::invalid(
                    "KubeletConfiguration.memorySwap.swapBehavior",
                    format!("{other:?} is unknown; use NoSwap or LimitedSwap"),
                ));
            }
        },
        fail_swap_on: kubelet.fail_swap_on == Some(true),
        fail_cgroup_v1: kubelet.fail_cgroup_v1 == Some(true),
        qos_reserved: qos_reserved(kubelet)?,
        single_process_oom_kill: kubelet.single_process_oom_kill,
        protect_kernel_defaults: kubelet.protect_kernel_defaults.unwrap_or(false),
    })
}

const MEMORY_QOS: &str = "MemoryQoS";
/// What `qosReserved` is behind.
pub(super) const QOS_RESERVED: &str = "QOSReserved";

/// Whether a feature gate that is off by default is on.
pub(super) fn gate(kubelet: &KubeletConfiguration, gate: &str) -> bool {
    kubelet.feature_gates.as_ref().and_then(|gates| gates.get(gate)).copied().unwrap_or(false)
}

/// Per cent of requested memory that is kept from lower classes (`qosReserved`), where its gate is on.
fn qos_reserved(kubelet: &KubeletConfiguration) -> Result<Option<u8>, ConfigError> {
    let mut percent = None;
    for (resource, text) in kubelet.qos_reserved.iter().flatten() {
        let invalid = |reason: String| {
            Err(ConfigError::invalid(
                format!("KubeletConfiguration.qosReserved.{resource}"),
                reason,
            ))
        };
        if resource != "memory" {
            return invalid("only memory can be reserved".to_owned());
        }
        let share = text.strip_suffix('%').and_then(|share| share.parse::<u8>().ok());
        let Some(share) = share.filter(|share| *share <= 100) else {
            return invalid(format!("{text:?} is no percentage from 0% to 100%"));
        };
        percent = Some(share);
    }
    Ok(percent.filter(|_| gate(kubelet, QOS_RESERVED)))
}

/// Whether a feature gate of Kubernetes' counts here.
pub(super) fn reads_gate(gate: &str) -> bool {
    let known = [&pulls::GATES[..], &numa::GATES[..], &volumes::GATES[..]];
    gate == MEMORY_QOS || gate == QOS_RESERVED || known.iter().any(|gates| gates.contains(&gate))
}

fn memory_qos(kubelet: &KubeletConfiguration) -> Result<Option<MemoryQos>, ConfigError> {
    let on = gate(kubelet, MEMORY_QOS);
    let throttling = kubelet.memory_throttling_factor.unwrap_or(0.9);
    if !(throttling > 0.0 && throttling <= 1.0) {
        return Err(ConfigError::invalid(
            "KubeletConfiguration.memoryThrottlingFactor",
            format!("{throttling} must be above 0 and at most 1"),
        ));
    }
    let reserve = match kubelet.memory_reservation_policy.as_deref().unwrap_or_default() {
        "" | "None" => Ok(false),
        "TieredReservation" if on => Ok(true),
        "TieredReservation" => {
            Err("TieredReservation needs featureGates: {MemoryQoS: true}".into())
        }
        other => Err(format!("{other:?} is unknown; use None or TieredReservation")),
    };
    let reserve = reserve.map_err(|reason: String| {
        ConfigError::invalid("KubeletConfiguration.memoryReservationPolicy", reason)
    })?;
    Ok(on.then_some(MemoryQos { throttling, reserve }))
}

fn reserved_cpus(kubelet: &KubeletConfiguration) -> Result<CpuSet, ConfigError> {
    let invalid =
        |reason: String| ConfigError::invalid("KubeletConfiguration.reservedSystemCPUs", reason);
    let text = kubelet.reserved_system_cpus.as_deref().unwrap_or_default();
    let cpus: CpuSet = text.parse().map_err(invalid)?;
    let cgroups = [&kubelet.system_reserved_cgroup, &kubelet.kube_reserved_cgroup];
    if !cpus.is_empty() && cgroups.into_iter().flatten().any(|cgroup| !cgroup.is_empty()) {
        let reason = "cannot be used together with systemReservedCgroup or kubeReservedCgroup";
        return Err(invalid(reason.to_owned()));
    }
    Ok(cpus)
}

fn enforced(kubelet: &KubeletConfiguration) -> Result<Enforced, ConfigError> {
    let Some(asked) = &kubelet.enforce_node_allocatable else { return Ok(Enforced::default()) };
    let invalid = |reason: String| {
        Err(ConfigError::invalid("KubeletConfiguration.enforceNodeAllocatable", reason))
    };
    let mut enforced = Enforced { pods: false, system: None, kube: None };
    for (at, name) in asked.iter().enumerate() {
        if asked[..at].contains(name) {
            return invalid(format!("{name:?} stands twice"));
        }
        let (place, field, cgroup) = match name.as_str() {
            "none" if asked.len() == 1 => continue,
            "none" => return invalid("\"none\" stands alone or not at all".to_owned()),
            "pods" => {
                enforced.pods = true;
                continue;
            }
            "system-reserved" | "system-reserved-compressible" => {
                let cgroup = &kubelet.system_reserved_cgroup;
                (&mut enforced.system, "systemReservedCgroup", cgroup)
            }
            "kube-reserved" | "kube-reserved-compressible" => {
                let cgroup = &kubelet.kube_reserved_cgroup;
                (&mut enforced.kube, "kubeReservedCgroup", cgroup)
            }
            other => {
                return invalid(format!(
                    "{other:?} is unknown; use none, pods, system-reserved, kube-reserved, \
                     system-reserved-compressible or kube-reserved-compressible"
                ));
            }
        };
        let Some(cgroup) = cgroup.clone().filter(|cgroup| !cgroup.is_empty()) else {
            return invalid(format!("{name:?} needs {field}, the cgroup that it is enforced on"));
        };
        let compressible = name.ends_with("-compressible");
        if place.replace(Reservation { cgroup, compressible }).is_some() {
            return invalid(format!("{name:?} stands beside the other of its kind; keep one"));
        }
    }
    let some = enforced.pods || enforced.system.is_some() || enforced.kube.is_some();
    if some && kubelet.cgroups_per_qos == Some(false) {
        return invalid("needs cgroupsPerQOS: true".to_owned());
    }
    Ok(enforced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<ResourceConfig, String> {
        resolve(&serde_json::from_str(text).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn memory_qos_is_behind_its_gate() {
        let gate = r#""featureGates":{"MemoryQoS":true}"#;
        let qos = |throttling, reserve| Some(MemoryQos { throttling, reserve });
        for (text, expected) in [
            ("{}".to_owned(), None),
            (r#"{"memoryThrottlingFactor":0.5,"memoryReservationPolicy":"None"}"#.into(), None),
            (format!("{{{gate}}}"), qos(0.9, false)),
            (
                format!(
                    r#"{{{gate},"memoryThrottlingFactor":1,"memoryReservationPolicy":"TieredReservation"}}"#
                ),
                qos(1.0, true),
            ),
        ] {
            assert_eq!(of(&text).unwrap().memory_qos, expected, "{text}");
        }
        for (text, said) in [
            (r#"{"memoryThrottlingFactor":0}"#, "must be above 0"),
            (r#"{"memoryThrottlingFactor":1.1}"#, "must be above 0"),
            (r#"{"memoryReservationPolicy":"TieredReservation"}"#, "needs featureGates"),
            (r#"{"memoryReservationPolicy":"Hard"}"#, "\"Hard\" is unknown"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn memory_is_kept_from_lower_classes_behind_its_gate() {
        let gate = r#""featureGates":{"QOSReserved":true}"#;
        let with = |reserved: &str| of(&format!(r#"{{{gate},"qosReserved":{reserved}}}"#));
        assert_eq!(with(r#"{"memory":"50%"}"#).unwrap().qos_reserved, Some(50));
        assert_eq!(of(r#"{"qosReserved":{"memory":"50%"}}"#).unwrap().qos_reserved, None);
        for (reserved, said) in [
            (r#"{"cpu":"50%"}"#, "qosReserved.cpu: only memory"),
            (r#"{"memory":"101%"}"#, "no percentage"),
            (r#"{"memory":"50"}"#, "no percentage"),
        ] {
            let error = with(reserved).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn reserved_cpus_take_the_place_of_reserved_cpu() {
        let config =
            of(r#"{"reservedSystemCPUs":"0,2-3","systemReserved":{"cpu":"100m","memory":"1Gi"},
                "kubeReserved":{"cpu":"1"}}"#)
            .unwrap();
        let pair = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        assert_eq!(config.system_reserved, [pair("memory", "1Gi"), pair("cpu", "3")]);
        assert_eq!(config.kube_reserved, []);
        for (text, said) in [
            (r#"{"reservedSystemCPUs":"x"}"#, "reservedSystemCPUs: \"x\""),
            (r#"{"reservedSystemCPUs":"0","kubeReservedCgroup":"/k"}"#, "cannot be used together"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn what_is_enforced_names_its_cgroup() {
        let group = |cgroup: &str, compressible| {
            Some(Reservation { cgroup: cgroup.to_owned(), compressible })
        };
        for (text, pods, system, kube) in [
            ("{}", true, None, None),
            (r#"{"enforceNodeAllocatable":["none"]}"#, false, None, None),
            (r#"{"enforceNodeAllocatable":[]}"#, false, None, None),
            (
                r#"{"enforceNodeAllocatable":["pods","system-reserved","kube-reserved-compressible"],
                    "systemReservedCgroup":"/system.slice","kubeReservedCgroup":"/kube"}"#,
                true,
                group("/system.slice", false),
                group("/kube", true),
            ),
        ] {
            assert_eq!(of(text).unwrap().enforced, Enforced { pods, system, kube }, "{text}");
        }
        for (text, said) in [
            (r#"{"enforceNodeAllocatable":["kube-reserved"]}"#, "needs kubeReservedCgroup"),
            (r#"{"enforceNodeAllocatable":["none","pods"]}"#, "stands alone"),
            (r#"{"enforceNodeAllocatable":["pods","pods"]}"#, "stands twice"),
            (r#"{"enforceNodeAllocatable":["pod"]}"#, "\"pod\" is unknown"),
            (r#"{"enforceNodeAllocatable":["pods"],"cgroupsPerQOS":false}"#, "cgroupsPerQOS"),
            (
                r#"{"enforceNodeAllocatable":["system-reserved","system-reserved-compressible"],
                    "systemReservedCgroup":"/s"}"#,
                "beside the other",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn swap_is_for_those_that_ask_for_it() {
        for (text, limited, fails) in [
            ("{}", false, false),
            (r#"{"memorySwap":{}}"#, false, false),
            (r#"{"memorySwap":{"swapBehavior":"NoSwap"},"failSwapOn":false}"#, false, false),
            (r#"{"memorySwap":{"swapBehavior":"LimitedSwap"}}"#, true, false),
            (r#"{"failSwapOn":true}"#, false, true),
        ] {
            let config = of(text).unwrap();
            assert_eq!((config.limited_swap, config.fail_swap_on), (limited, fails), "{text}");
        }
        let error = of(r#"{"memorySwap":{"swapBehavior":"UnlimitedSwap"}}"#).unwrap_err();
        assert!(error.contains("memorySwap.swapBehavior: \"UnlimitedSwap\" is unknown"), "{error}");
    }
}
