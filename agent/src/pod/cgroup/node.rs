//! What the node's own groups may use: all pods together, and what is reserved for the system and for
//! Kubernetes (`enforceNodeAllocatable`). Pure.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::pod::config::resources::cpu_shares;
use crate::pod::quantity::{amount, cpu_milli};

/// Which group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// `kubepods`, which all pods are in.
    Pods,
    /// A cgroup that is there, by its path below the root; a slice's name is enough.
    Reserved {
        /// What it is for, in an Event: `system` or `kube`.
        whose: &'static str,
        /// The cgroup.
        cgroup: String,
    },
}

/// What a group may use; `None` is left as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupLimits {
    /// CPU shares.
    pub cpu_shares: Option<i64>,
    /// Bytes.
    pub memory: Option<i64>,
    /// Processes and threads.
    pub pids: Option<i64>,
}

/// A cgroup that what is reserved is enforced on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The cgroup (`systemReservedCgroup`, `kubeReservedCgroup`).
    pub cgroup: String,
    /// Only CPU, of which a group that needs more gets less, not memory, which it would die of.
    pub compressible: bool,
}

/// What is enforced (`enforceNodeAllocatable`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enforced {
    /// Pods together may not use what is reserved.
    pub pods: bool,
    /// `system-reserved` or `system-reserved-compressible`.
    pub system: Option<Reservation>,
    /// `kube-reserved` or `kube-reserved-compressible`.
    pub kube: Option<Reservation>,
}

impl Default for Enforced {
    fn default() -> Self {
        Self { pods: true, system: None, kube: None }
    }
}

/// What the machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Milli-CPUs.
    pub cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Processes and threads, if that is known.
    pub pids: Option<i64>,
}

/// The limits of each group, from what is reserved for the system and for Kubernetes. Eviction
/// thresholds are not taken off the pods' share: it is they that keep it free.
pub fn plan_node_limits(
    enforced: &Enforced,
    capacity: Capacity,
    system: &[(String, String)],
    kube: &[(String, String)],
) -> Vec<(Group, GroupLimits)> {
    let list = |pairs: &[(String, String)]| -> BTreeMap<String, Quantity> {
        pairs.iter().map(|(name, text)| (name.clone(), Quantity(text.clone()))).collect()
    };
    let (system, kube) = (list(system), list(kube));
    let cpu = |list: &BTreeMap<String, Quantity>| cpu_milli(Some(list));
    let less = |total: i64, of: &dyn Fn(&BTreeMap<String, Quantity>) -> Option<i64>| {
        let reserved = [&system, &kube].into_iter().filter_map(of).sum::<i64>();
        let reserved = if enforced.pods { reserved } else { 0 };
        total.saturating_sub(reserved).max(0)
    };
    let memory = |list: &BTreeMap<String, Quantity>| amount(Some(list), "memory");
    let pids = |list: &BTreeMap<String, Quantity>| amount(Some(list), "pid");
    let pods = GroupLimits {
        cpu_shares: Some(cpu_shares(less(capacity.cpu, &cpu))),
        // Nothing at all would end every pod; what cannot be meant is left to eviction.
        memory: Some(less(capacity.memory, &memory)).filter(|left| *left > 0),
        pids: capacity.pids.map(|total| less(total, &pids)),
    };
    let mut groups = vec![(Group::Pods, pods)];
    for (whose, reservation, list) in
        [("system", &enforced.system, &system), ("kube", &enforced.kube, &kube)]
    {
        let Some(Reservation { cgroup, compressible }) = reservation else { continue };
        let whole = |value: Option<i64>| value.filter(|_| !compressible);
        let limits = GroupLimits {
            cpu_shares: cpu(list).map(cpu_shares),
            memory: whole(memory(list)),
            pids: whole(pids(list)),
        };
        groups.push((Group::Reserved { whose, cgroup: cgroup.clone() }, limits));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_have_what_is_not_reserved() {
        let capacity = Capacity { cpu: 4000, memory: 8 << 30, pids: Some(1000) };
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect()
        };
        let system = pairs(&[("cpu", "500m"), ("memory", "1Gi"), ("pid", "100")]);
        let kube = pairs(&[("cpu", "500m"), ("memory", "1Gi"), ("ephemeral-storage", "1Gi")]);
        let limits = |cpu_shares, memory, pids| GroupLimits { cpu_shares, memory, pids };
        let none = Enforced { pods: false, ..Enforced::default() };
        assert_eq!(
            plan_node_limits(&none, capacity, &system, &kube),
            [(Group::Pods, limits(Some(4096), Some(8 << 30), Some(1000)))]
        );
        let all = Enforced {
            pods: true,
            system: Some(Reservation { cgroup: "/system.slice".into(), compressible: false }),
            kube: Some(Reservation { cgroup: "/kube.slice".into(), compressible: true }),
        };
        let group = |whose, cgroup: &str| Group::Reserved { whose, cgroup: cgroup.into() };
        assert_eq!(
            plan_node_limits(&all, capacity, &system, &kube),
            [
                (Group::Pods, limits(Some(3072), Some(6 << 30), Some(900))),
                (group("system", "/system.slice"), limits(Some(512), Some(1 << 30), Some(100))),
                (group("kube", "/kube.slice"), limits(Some(512), None, None)),
            ]
        );
        let much = pairs(&[("memory", "100Gi")]);
        let pods = plan_node_limits(&Enforced::default(), capacity, &much, &[]);
        assert_eq!(pods[0].1.memory, None);
    }
}
