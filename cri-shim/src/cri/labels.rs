//! SELinux labels of pods and containers, and of the files they are given.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

use super::Shim;
use super::store::Sandbox;
use crate::api;
use crate::selinux;
use crate::spec::selinux::{Label, Labels, plan, plan_pod};

/// Levels of sandboxes that are being made: nobody else may get them, and no record has them yet.
#[derive(Clone, Debug, Default)]
pub struct Levels(Arc<Mutex<HashSet<String>>>);

/// Keeps a level from others until the sandbox is in the store, or is given up.
#[derive(Debug)]
pub(super) struct Reserved {
    levels: Levels,
    level: Option<String>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(level) = &self.level {
            self.levels.0.lock().unwrap_or_else(PoisonError::into_inner).remove(level);
        }
    }
}

impl Shim {
    /// The labels of a new sandbox.
    pub(super) fn sandbox_labels(
        &self,
        options: Option<&api::SeLinuxOption>,
    ) -> Result<(Option<Labels>, Reserved), Status> {
        crate::spec::selinux::check(options, self.selinux.enabled)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        if !self.selinux.enabled {
            return Ok((None, Reserved { levels: self.levels.clone(), level: None }));
        }
        let mut making = self.levels.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = making.clone();
        taken.extend(self.store.sandboxes().iter().filter_map(|sandbox| {
            let label = Label::parse(sandbox.record().selinux_label.as_deref()?)?;
            label.level().map(str::to_owned)
        }));
        let defaults = self.selinux.defaults.as_ref();
        let labels = plan_pod(defaults, options, self.selinux.levels, &taken, |below| {
            fastrand::u32(..below)
        });
        // A level that a pod asks for may be another's too.
        let level = labels.as_ref().and_then(|l| l.process.level()).map(str::to_owned);
        let level = level.filter(|level| making.insert(level.clone()));
        Ok((labels, Reserved { levels: self.levels.clone(), level }))
    }

    /// The labels of a container.
    pub(super) fn container_labels(
        &self,
        sandbox: &Sandbox,
        security: Option<&api::LinuxContainerSecurityContext>,
    ) -> Option<Labels> {
        if !self.selinux.enabled {
            return None;
        }
        let pod = sandbox.record().selinux_label.as_deref().and_then(Label::parse);
        let pod = pod.map(|label| Labels::of_process(label, self.selinux.defaults.as_ref()));
        plan(pod.as_ref(), security.and_then(|s| s.selinux_options.as_ref()))
    }
}

/// Gives the container's label to the volumes that are to have it, and to the sandbox's files.
pub(super) fn relabel<'a>(
    labels: &Labels,
    mounts: &'a [api::Mount],
    files: impl IntoIterator<Item = &'a Path>,
) -> Result<(), Status> {
    let volumes = mounts.iter().filter(|mount| mount.selinux_relabel && mount.image.is_none());
    let label = labels.file.to_string();
    for path in volumes.map(|mount| Path::new(&mount.host_path)).chain(files) {
        selinux::relabel(path, &label).map_err(|e| Status::failed_precondition(e.to_string()))?;
    }
    Ok(())
}
