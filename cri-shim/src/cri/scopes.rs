//! The cgroup driver `systemd`: a scope around each monitor and each container.
//!
//! A scope needs a process, so it is made around one that is there already: systemd finds the
//! cgroup where it would have put it, with its limits set, and takes it over. Nothing waits for
//! that; a container whose scope is missing (the shim was killed in between) gets it at recovery.

use std::path::Path;
use std::sync::Arc;

use tonic::Status;

use super::store::Container;
use super::{Shim, blocking, internal};
use crate::api::LinuxContainerResources;
use crate::cgroup::limits;
use crate::config::CgroupDriver;
use crate::spec::Host;
use crate::spec::cgroup_path::{Scope, monitor, scope_of};
use crate::spec::resources::plan_limits;
use crate::systemd::{self, Limits};

impl Shim {
    /// The scope that `cgroup` should be, where systemd makes the cgroups. v1 hierarchies stay as
    /// they are: there systemd keeps only a tree of its own in step.
    fn scope(&self, cgroup: &Path) -> Option<Scope> {
        let by_systemd = self.config.cgroup_driver == CgroupDriver::Systemd && self.cgroups.v2;
        by_systemd.then(|| scope_of(cgroup)).flatten()
    }

    /// Makes the scope of a sandbox's monitor. Awaited: with this delegated neighbour systemd
    /// leaves the pod's controllers enabled for its containers.
    pub(super) async fn scope_monitor(&self, id: &str, parent: &Path) -> Result<(), Status> {
        let cgroup = monitor(parent, id);
        let Some(scope) = self.scope(&cgroup) else { return Ok(()) };
        let pids = self.pids(&cgroup);
        let description = format!("longshore monitor of sandbox {id}");
        // systemd gives a scope a share of the machine's processes by default.
        let limits = Limits { pids: Some(-1), ..Limits::default() };
        let properties = systemd::scope(description, &scope.slice, &pids, &limits);
        self.systemd
            .start(&scope.unit, &properties)
            .await
            .map_err(|e| internal("putting the pod's monitor under systemd", e))
    }

    /// Makes the scope of a running container, in its own time.
    pub(super) fn scope_container(self: &Arc<Self>, container: &Arc<Container>) {
        let cgroup = container.record().cgroup.clone();
        let Some(scope) = self.scope(&cgroup) else { return };
        let (this, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            // No new limits meanwhile, which would be overwritten with the old ones.
            let _changing = container.changing.lock().await;
            let made = this.make_scope(&container, &cgroup, &scope).await;
            if let Err(error) = made
                && container.status.borrow().exited.is_none()
            {
                tracing::warn!(
                    container = container.id, %error,
                    "a container is not under systemd, which may reset its limits"
                );
            }
        });
    }

    async fn make_scope(
        &self,
        container: &Container,
        cgroup: &Path,
        scope: &Scope,
    ) -> Result<(), Status> {
        // Only the first process: others may end while systemd looks, and are in the cgroup anyway.
        let started = container.status.borrow().started.as_ref().map(|started| started.pid);
        let Some(pid) = started.and_then(|pid| u32::try_from(pid).ok()) else { return Ok(()) };
        let resources = resources(container);
        let description = format!("longshore container {}", container.id);
        let limits = scope_limits(&resources, &self.host);
        let properties = systemd::scope(description, &scope.slice, &[pid], &limits);
        self.systemd
            .start(&scope.unit, &properties)
            .await
            .map_err(|e| internal("putting the container under systemd", e))?;
        self.write_limits(cgroup, resources).await
    }

    /// Tells systemd the new limits of a container before they are written.
    pub(super) async fn limit_scope(
        &self,
        cgroup: &Path,
        asked: &LinuxContainerResources,
    ) -> Result<(), Status> {
        let Some(scope) = self.scope(cgroup) else { return Ok(()) };
        self.systemd
            .set(&scope.unit, &scope_limits(asked, &self.host).properties())
            .await
            .map_err(|e| internal("telling systemd the container's limits", e))
    }

    /// Makes the scopes that are missing.
    pub(super) async fn recover_scopes(self: &Arc<Self>) {
        if self.config.cgroup_driver != CgroupDriver::Systemd || !self.cgroups.v2 {
            return;
        }
        let active = match self.systemd.active(&["*longshore-*.scope"]).await {
            Ok(active) => active,
            Err(error) => {
                tracing::warn!(%error, "cannot tell which containers are under systemd");
                return;
            }
        };
        let missing = |cgroup: &Path| self.scope(cgroup).is_some_and(|s| !active.contains(&s.unit));
        for sandbox in self.store.sandboxes().into_iter().filter(|s| s.is_ready()) {
            let cgroup = sandbox.record().cgroup.clone();
            if missing(&monitor(&cgroup, &sandbox.id))
                && let Err(error) = self.scope_monitor(&sandbox.id, &cgroup).await
            {
                tracing::warn!(sandbox = sandbox.id, %error, "a monitor is not under systemd");
            }
        }
        for container in self.store.containers() {
            let (started, exited) = {
                let status = container.status.borrow();
                (status.started.is_some(), status.exited.is_some())
            };
            if started && !exited && missing(&container.record().cgroup) {
                self.scope_container(&container);
            }
        }
    }

    fn pids(&self, cgroup: &Path) -> Vec<u32> {
        let processes = self.cgroups.processes(cgroup);
        processes.into_iter().filter_map(|pid| u32::try_from(pid.as_raw()).ok()).collect()
    }

    async fn write_limits(
        &self,
        cgroup: &Path,
        resources: LinuxContainerResources,
    ) -> Result<(), Status> {
        let (cgroups, cgroup) = (self.cgroups.clone(), cgroup.to_owned());
        let planned = plan_limits(&resources, &self.host)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        blocking(move || limits::apply(&cgroups, &cgroup, &planned))
            .await?
            .map_err(|e| internal("writing the container's limits", e))
    }
}

fn resources(container: &Container) -> LinuxContainerResources {
    let config = container.config();
    config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default()
}

/// Limits in systemd's terms; zero means "not set" in the CRI.
fn scope_limits(resources: &LinuxContainerResources, host: &Host) -> Limits {
    let set = |value: i64| Some(value).filter(|v| *v != 0);
    let memory = set(resources.memory_limit_in_bytes);
    // What is asked for by the kernel's own names: systemd would undo what it does not know of.
    let named = |file: &str| {
        let value = resources.unified.get(file)?;
        if value == "max" { Some(-1) } else { value.parse::<i64>().ok() }
    };
    let together = memory
        .filter(|_| host.swap_accounting)
        .map(|memory| limits::swap_bytes(memory, resources.memory_swap_limit_in_bytes));
    Limits {
        cpu_weight: u64::try_from(resources.cpu_shares)
            .ok()
            .filter(|shares| *shares > 0)
            .map(limits::weight),
        cpu_quota: set(resources.cpu_quota),
        cpu_period: u64::try_from(resources.cpu_period).unwrap_or(0),
        memory,
        swap: named("memory.swap.max").or(together),
        memory_min: named("memory.min"),
        memory_low: named("memory.low"),
        memory_high: named("memory.high"),
        // The pod's slice has the limit; systemd would give each scope one of its own.
        pids: Some(-1),
        oom_group: resources.unified.get("memory.oom.group").is_some_and(|v| v == "1"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_cri_leaves_out_is_left_out_but_for_the_number_of_processes() {
        let host = Host { swap_accounting: true, ..Host::default() };
        let nothing = scope_limits(&LinuxContainerResources::default(), &host);
        assert_eq!(nothing, Limits { pids: Some(-1), ..Limits::default() });
        let asked = LinuxContainerResources {
            cpu_shares: 51,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let expected = Limits {
            cpu_weight: Some(11),
            cpu_quota: Some(50_000),
            cpu_period: 100_000,
            memory: Some(64 << 20),
            swap: Some(0),
            pids: Some(-1),
            oom_group: true,
            ..Limits::default()
        };
        assert_eq!(scope_limits(&asked, &host), expected);
        let unified = [
            ("memory.swap.max", "4096"),
            ("memory.min", "1"),
            ("memory.low", "2"),
            ("memory.high", "max"),
        ];
        let unified = unified.map(|(file, value)| (file.to_owned(), value.to_owned())).into();
        let by_name = scope_limits(&LinuxContainerResources { unified, ..asked }, &host);
        let (min, low, high) = (by_name.memory_min, by_name.memory_low, by_name.memory_high);
        assert_eq!((by_name.swap, min, low, high), (Some(4096), Some(1), Some(2), Some(-1)));
    }
}
