//! Linux resources of a container to the OCI spec's cgroup settings.

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxHugepageLimitBuilder, LinuxMemoryBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use super::{Host, HostDevice, SpecError, devices};
use crate::api;

pub(super) fn plan(
    config: &api::ContainerConfig,
    host_devices: &[HostDevice],
    privileged: bool,
    host: &Host,
) -> Result<LinuxResources, SpecError> {
    let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref());
    let mut planned = match resources {
        Some(resources) => plan_limits(resources, host)?,
        None => LinuxResourcesBuilder::default().build()?,
    };
    planned.set_devices(Some(devices::cgroup_rules(host_devices, privileged)?));
    Ok(planned)
}

/// Refuses what this machine's cgroups cannot do.
pub fn check(config: &api::ContainerConfig, host: &Host) -> Result<(), SpecError> {
    let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref());
    if resources.is_some_and(|r| !r.unified.is_empty()) && !host.cgroup_v2 {
        return Err(SpecError::NeedsCgroupV2("unified cgroup settings"));
    }
    // It counts memory and swap together, and the kernel takes it only beside the other.
    if resources.is_some_and(|r| r.memory_swap_limit_in_bytes > 0 && r.memory_limit_in_bytes <= 0) {
        return Err(SpecError::SwapAlone);
    }
    Ok(())
}

/// The limits alone, for creation and for `UpdateContainerResources`. Zero means "not set" in the
/// CRI.
pub fn plan_limits(
    resources: &api::LinuxContainerResources,
    host: &Host,
) -> Result<LinuxResources, SpecError> {
    let mut cpu = LinuxCpuBuilder::default();
    if resources.cpu_shares > 0 {
        cpu = cpu.shares(resources.cpu_shares as u64);
    }
    if resources.cpu_quota != 0 {
        cpu = cpu.quota(resources.cpu_quota);
    }
    if resources.cpu_period > 0 {
        cpu = cpu.period(resources.cpu_period as u64);
    }
    if !resources.cpuset_cpus.is_empty() {
        cpu = cpu.cpus(resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        cpu = cpu.mems(resources.cpuset_mems.clone());
    }
    let mut planned = LinuxResourcesBuilder::default().cpu(cpu.build()?);
    let (limit, swap) = (resources.memory_limit_in_bytes, resources.memory_swap_limit_in_bytes);
    if limit != 0 {
        let mut memory = LinuxMemoryBuilder::default().limit(limit);
        if host.swap_accounting {
            // Without a word about swap there is none: the limit counts memory and swap together.
            memory = memory.swap(if swap == 0 { limit } else { swap });
        }
        planned = planned.memory(memory.build()?);
    }
    if host.hugetlb && !resources.hugepage_limits.is_empty() {
        let mut limits = Vec::new();
        for limit in &resources.hugepage_limits {
            limits.push(
                LinuxHugepageLimitBuilder::default()
                    .page_size(limit.page_size.clone())
                    .limit(limit.limit as i64)
                    .build()?,
            );
        }
        planned = planned.hugepage_limits(limits);
    }
    if host.cgroup_v2 && !resources.unified.is_empty() {
        planned = planned.unified(resources.unified.clone());
    }
    Ok(planned.build()?)
}
