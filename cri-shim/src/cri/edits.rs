//! What goes into a container's spec besides its config: the devices that CDI files describe, the
//! base spec of its pod's runtime handler, the AppArmor profile that the node has for it.

use std::fs;

use oci_spec::runtime::Spec;
use tonic::Status;

use super::{Shim, devices};
use crate::api;
use crate::apparmor::AppArmorError;
use crate::cdi::{self, Edits, Owner};
use crate::spec::apparmor::{self, Asked};
use crate::spec::{HostDevice, SpecError};

impl Shim {
    /// What the CDI devices change that a container asks for.
    pub(super) fn cdi_edits(&self, config: &api::ContainerConfig) -> Result<Edits, Status> {
        let refused = |e: cdi::CdiError| Status::invalid_argument(e.to_string());
        let names = cdi::requested(config).map_err(refused)?;
        if names.is_empty() {
            return Ok(Edits::default());
        }
        cdi::load(&self.config.cdi_dirs).resolve(&names).map_err(refused)
    }

    /// The base spec of a runtime handler, if it has one.
    pub(super) fn base_spec(&self, handler: &str) -> Result<Option<Spec>, Status> {
        let Some(path) = self.config.base_specs.get(handler) else { return Ok(None) };
        let failed = |e: &dyn std::fmt::Display| {
            let path = path.display();
            Status::failed_precondition(format!(
                "reading the base spec {path} of runtime handler {handler:?}: {e}; mend it, or take \
                 it out of the configuration"
            ))
        };
        let text = fs::read(path).map_err(|e| failed(&e))?;
        serde_json::from_slice(&text).map(Some).map_err(|e| failed(&e))
    }

    /// The AppArmor profile that a container enters, loaded. A handler's base spec names the default
    /// of its containers.
    pub(super) fn apparmor_profile(
        &self,
        config: &api::ContainerConfig,
        base: Option<&Spec>,
    ) -> Result<Option<String>, Status> {
        let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let asked =
            apparmor::asked(security).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let process = base.and_then(|b| b.process().as_ref());
        let of_base = process.and_then(|p| p.apparmor_profile().clone());
        let asked = match (asked, of_base) {
            (Asked::Nothing, Some(profile)) => Asked::Localhost(profile),
            (asked, _) => asked,
        };
        self.apparmor.profile(&asked).map_err(|e| match e {
            AppArmorError::Refused(_) => Status::invalid_argument(e.to_string()),
            _ => Status::internal(e.to_string()),
        })
    }
}

/// The device nodes of a container: those of its config and those of CDI files, which win.
pub(super) fn all_devices(
    config: &api::ContainerConfig,
    edits: &Edits,
) -> Result<Vec<HostDevice>, Status> {
    let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    let mut all = devices::look_up(&config.devices, security.is_some_and(|s| s.privileged))?;
    let id = |value: &Option<api::Int64Value>| {
        value.as_ref().and_then(|v| u32::try_from(v.value).ok()).filter(|id| *id != 0)
    };
    let owner = Owner {
        uid: security.and_then(|s| id(&s.run_as_user)),
        gid: security.and_then(|s| id(&s.run_as_group)),
    };
    let added = edits
        .devices(owner, devices::inspect)
        .map_err(|e| Status::invalid_argument(e.to_string()))?;
    all.retain(|device| added.iter().all(|new| new.path != device.path));
    all.extend(added);
    Ok(all)
}

/// Refuses what only an OCI runtime's program can do.
pub(super) fn check_built_in(spec: &Spec) -> Result<(), SpecError> {
    let linux = spec.linux().as_ref();
    if linux.is_some_and(|l| l.intel_rdt().is_some()) {
        return Err(SpecError::Unsupported(
            "intelRdt (of a CDI device or a base spec; a RuntimeClass with handler runc has it)",
        ));
    }
    Ok(())
}
