//! Masked and read-only paths, and the security modules a pod may ask for.

use super::{Host, SpecError};
use crate::api::{self, security_profile::ProfileType};

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
    if let Some(selinux) = &security.selinux_options
        && [&selinux.user, &selinux.role, &selinux.r#type, &selinux.level]
            .iter()
            .any(|field| !field.is_empty())
    {
        return Err(if host.selinux {
            SpecError::Unsupported("seLinuxOptions")
        } else {
            SpecError::NotInKernel("seLinuxOptions")
        });
    }
    if apparmor_profile(Some(security)).is_some() && !host.apparmor {
        return Err(SpecError::NotInKernel("an AppArmor Localhost profile"));
    }
    Ok(())
}

/// The loaded AppArmor profile to enter; none for the default and for `Unconfined`.
pub(super) fn apparmor_profile(security: Security<'_>) -> Option<String> {
    let security = security?;
    if security.privileged {
        return None;
    }
    match &security.apparmor {
        Some(profile) if profile.profile_type() == ProfileType::Localhost => {
            Some(profile.localhost_ref.trim_start_matches("localhost/").to_owned())
        }
        Some(_) => None,
        #[allow(deprecated, reason = "kubelets before 1.30 and other CRI clients still send it")]
        None => security.apparmor_profile.strip_prefix("localhost/").map(str::to_owned),
    }
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
