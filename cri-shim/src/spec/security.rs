//! Masked and read-only paths, and what of a security context cannot be had.

use super::{Host, SpecError, selinux};
use crate::api;

/// Paths of `/proc` and `/sys` that leak or change host state, for callers that say nothing about
/// security at all. Whoever does says which paths: none for `procMount: Unmasked`.
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

const READONLY: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

type Security<'a> = Option<&'a api::LinuxContainerSecurityContext>;

/// Refuses what the kernel or this runtime cannot enforce, rather than run without it.
pub(super) fn check(security: Security<'_>, host: &Host) -> Result<(), SpecError> {
    let Some(security) = security else { return Ok(()) };
    if security.run_as_group.is_some()
        && security.run_as_user.is_none()
        && security.run_as_username.is_empty()
    {
        return Err(SpecError::GroupWithoutUser);
    }
    selinux::check(security.selinux_options.as_ref(), host.selinux)
}

pub(super) fn masked_paths(security: Security<'_>) -> Vec<String> {
    paths(security, &MASKED, |s| &s.masked_paths)
}

pub(super) fn readonly_paths(security: Security<'_>) -> Vec<String> {
    paths(security, &READONLY, |s| &s.readonly_paths)
}

fn paths(
    security: Security<'_>,
    default: &[&str],
    given: impl Fn(&api::LinuxContainerSecurityContext) -> &Vec<String>,
) -> Vec<String> {
    match security {
        Some(s) if s.privileged => Vec::new(),
        Some(s) => given(s).clone(),
        None => default.iter().map(|p| (*p).to_owned()).collect(),
    }
}
