//! The capability sets of a container: containerd's default, plus `add`, minus `drop`.

use std::collections::HashSet;
use std::str::FromStr;

use oci_spec::runtime::{Capability, LinuxCapabilities, LinuxCapabilitiesBuilder};

use super::SpecError;
use crate::api;

/// What a container may do when nothing is said.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// Every capability Linux has, in the kernel's numbering (`include/uapi/linux/capability.h`).
pub const ALL: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// The sets before they become OCI types, so that seccomp can look at them.
#[derive(Debug)]
pub struct Sets {
    bounding: HashSet<Capability>,
    ambient: HashSet<Capability>,
}

impl Sets {
    /// The bounding set, which is also the permitted and effective one.
    pub fn bounding(&self) -> &HashSet<Capability> {
        &self.bounding
    }

    pub(super) fn build(self) -> Result<LinuxCapabilities, SpecError> {
        let inheritable = self.ambient.clone();
        Ok(LinuxCapabilitiesBuilder::default()
            .effective(self.bounding.clone())
            .permitted(self.bounding.clone())
            .bounding(self.bounding)
            .inheritable(inheritable)
            .ambient(self.ambient)
            .build()?)
    }
}

/// Decides the sets. `ALL` in `add` or `drop` is applied before single names, so that
/// `drop: [ALL], add: [NET_BIND_SERVICE]` leaves exactly one.
///
/// `ALL` is all that `available` (a bit mask) has: a node may itself run without some, and a
/// capability that is asked for by name and not there fails when the container starts.
pub fn plan(
    security: Option<&api::LinuxContainerSecurityContext>,
    available: u64,
) -> Result<Sets, SpecError> {
    plan_from(None, security, available)
}

/// The same, from a base spec's bounding set instead of the default.
pub fn plan_from(
    base: Option<&LinuxCapabilities>,
    security: Option<&api::LinuxContainerSecurityContext>,
    available: u64,
) -> Result<Sets, SpecError> {
    let all = || {
        let numbered = ALL.into_iter().enumerate();
        numbered.filter(|(bit, _)| available >> bit & 1 == 1).map(|(_, capability)| capability)
    };
    let no_change = api::Capability::default();
    let change = security.and_then(|s| s.capabilities.as_ref()).unwrap_or(&no_change);
    let mut bounding: HashSet<Capability> = match base.and_then(|b| b.bounding().clone()) {
        Some(bounding) => bounding,
        None => DEFAULT.into_iter().collect(),
    };
    if security.is_some_and(|s| s.privileged) {
        bounding = all().collect();
    } else {
        if change.add_capabilities.iter().any(|c| is_all(c)) {
            bounding = all().collect();
        }
        if change.drop_capabilities.iter().any(|c| is_all(c)) {
            bounding.clear();
        }
        for name in change.add_capabilities.iter().filter(|c| !is_all(c)) {
            bounding.insert(parse(name)?);
        }
        for name in change.drop_capabilities.iter().filter(|c| !is_all(c)) {
            bounding.remove(&parse(name)?);
        }
    }
    let mut ambient = HashSet::new();
    for name in &change.add_ambient_capabilities {
        let capability = parse(name)?;
        bounding.insert(capability);
        ambient.insert(capability);
    }
    Ok(Sets { bounding, ambient })
}

fn is_all(name: &str) -> bool {
    name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL")
}

fn parse(name: &str) -> Result<Capability, SpecError> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    Capability::from_str(short).map_err(|_| SpecError::UnknownCapability(name.to_owned()))
}
