//! A runtime handler's base spec: an OCI spec of the node's administrator that containers of the
//! handler start from (containerd's `base_runtime_spec`), for hooks, limits and mounts that no pod
//! asks for.
//!
//! What the pod, its image or the CRI decides is decided as without it; the base fills in the rest.

use oci_spec::runtime::{Hook, Hooks, Linux, LinuxResources, Mount, Process, Spec};

use super::mounts;

/// Fills in what `planned` leaves open. `privileged` containers keep their writable `/sys`.
pub(super) fn fill_in(planned: &mut Spec, base: &Spec, privileged: bool) {
    if let Some(base) = base.hooks() {
        let mut hooks = base.clone();
        append_hooks(&mut hooks, planned.hooks().clone().unwrap_or_default());
        planned.set_hooks(Some(hooks));
    }
    if let Some(base) = base.annotations() {
        let mut annotations = base.clone();
        annotations.extend(planned.annotations().clone().unwrap_or_default());
        planned.set_annotations(Some(annotations));
    }
    if let Some(base) = base.mounts() {
        let mounts = fill_in_mounts(planned.mounts().as_deref(), base, privileged);
        planned.set_mounts(Some(mounts));
    }
    if let (Some(planned), Some(base)) = (planned.process_mut(), base.process()) {
        fill_in_process(planned, base);
    }
    if let (Some(planned), Some(base)) = (planned.linux_mut(), base.linux()) {
        fill_in_linux(planned, base, privileged);
    }
}

/// The base's version of a kernel file system is taken; what is bound (volumes, the sandbox's
/// files) stays.
fn fill_in_mounts(planned: Option<&[Mount]>, base: &[Mount], privileged: bool) -> Vec<Mount> {
    let mut all = planned.unwrap_or_default().to_vec();
    for mount in base {
        let same = |other: &&Mount| other.destination() == mount.destination();
        let taken = all.iter().find(same);
        let bound = taken.is_some_and(|other| other.typ().as_deref() == Some("bind"));
        let writable = privileged && mount.destination().starts_with("/sys");
        if !(bound || writable && taken.is_some()) {
            mounts::place(&mut all, mount.clone());
        }
    }
    all
}

fn fill_in_process(planned: &mut Process, base: &Process) {
    if let Some(rlimits) = base.rlimits() {
        let mut all = rlimits.clone();
        let ours = planned.rlimits().iter().flatten();
        all.extend(ours.filter(|own| rlimits.iter().all(|r| r.typ() != own.typ())).cloned());
        planned.set_rlimits(Some(all));
    }
    if let Some(base) = base.env() {
        let mut all = base.clone();
        for entry in planned.env().iter().flatten() {
            super::process::set(&mut all, entry.clone());
        }
        planned.set_env(Some(all));
    }
    planned.set_scheduler(base.scheduler().clone());
    planned.set_io_priority(*base.io_priority());
}

fn fill_in_linux(planned: &mut Linux, base: &Linux, privileged: bool) {
    if planned.seccomp().is_none() && !privileged {
        planned.set_seccomp(base.seccomp().clone());
    }
    if planned.rootfs_propagation().is_none() {
        planned.set_rootfs_propagation(base.rootfs_propagation().clone());
    }
    planned.set_sysctl(base.sysctl().clone());
    planned.set_intel_rdt(base.intel_rdt().clone());
    planned.set_personality(base.personality().clone());
    planned.set_memory_policy(base.memory_policy().clone());
    if let Some(devices) = base.devices() {
        let mut all = devices.clone();
        let ours = planned.devices().clone().unwrap_or_default();
        all.retain(|device| ours.iter().all(|own| own.path() != device.path()));
        all.extend(ours);
        planned.set_devices(Some(all));
    }
    if let Some(base) = base.resources() {
        let mut resources = planned.resources().clone().unwrap_or_default();
        fill_in_resources(&mut resources, base, privileged);
        planned.set_resources(Some(resources));
    }
}

fn fill_in_resources(planned: &mut LinuxResources, base: &LinuxResources, privileged: bool) {
    // A base's own list begins with "deny everything", which ours does too.
    if let (Some(allowed), false) = (base.devices(), privileged) {
        let mut all = planned.devices().clone().unwrap_or_default();
        all.extend(allowed.iter().filter(|rule| rule.allow()).cloned());
        planned.set_devices(Some(all));
    }
    if planned.pids().is_none() {
        planned.set_pids(*base.pids());
    }
    if planned.block_io().is_none() {
        planned.set_block_io(base.block_io().clone());
    }
    if planned.rdma().is_none() {
        planned.set_rdma(base.rdma().clone());
    }
}

#[allow(deprecated, reason = "prestart is, and vendors' specs still have it")]
fn append_hooks(hooks: &mut Hooks, more: Hooks) {
    let join = |list: &mut Option<Vec<Hook>>, more: &Option<Vec<Hook>>| {
        if let Some(more) = more {
            list.get_or_insert_default().extend(more.iter().cloned());
        }
    };
    join(hooks.prestart_mut(), more.prestart());
    join(hooks.create_runtime_mut(), more.create_runtime());
    join(hooks.create_container_mut(), more.create_container());
    join(hooks.start_container_mut(), more.start_container());
    join(hooks.poststart_mut(), more.poststart());
    join(hooks.poststop_mut(), more.poststop());
}
