//! UpdateContainerResources and UpdatePodSandboxResources.

use tonic::Status;

use super::{Shim, blocking, internal};
use crate::api::{self, ContainerState};
use crate::cgroup::{create, limits};
use crate::spec::resources::{check, plan_limits};

impl Shim {
    pub(super) async fn update_container_resources(
        &self,
        request: api::UpdateContainerResourcesRequest,
    ) -> Result<api::UpdateContainerResourcesResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        let _changing = container.changing.lock().await;
        let asked = request.linux.unwrap_or_default();
        let state = container.state();
        let mut config = (*container.config()).clone();
        let linux = config.linux.get_or_insert_default();
        let resources = linux.resources.get_or_insert_default();
        merge(resources, &asked);
        check(&config, &self.host).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if state == ContainerState::ContainerRunning {
            let cgroups = self.cgroups.clone();
            let planned = plan_limits(&asked, &self.host)
                .map_err(|e| Status::invalid_argument(e.to_string()))?;
            let cgroup = container.record().cgroup.clone();
            self.limit_scope(&cgroup, &asked).await?;
            let applied = blocking(move || limits::change(&cgroups, &cgroup, &planned)).await?;
            match applied {
                // It ended meanwhile, and its cgroup with it.
                Err(_) if container.state() != ContainerState::ContainerRunning => {}
                applied => applied.map_err(|e| internal("updating the container's limits", e))?,
            }
        }
        {
            let mut record = container.record();
            record.set_config(&config);
            record
                .write(&self.layout.container(&container.id))
                .map_err(|e| internal("recording the new limits", e))?;
        }
        container.set_config(config);
        self.durability.sync(self.layout.container(&container.id));
        Ok(api::UpdateContainerResourcesResponse {})
    }

    /// The pod's cgroup is the kubelet's, which has changed it already; one that the shim made is
    /// changed here. What the pod has now is remembered either way.
    pub(super) async fn update_sandbox_resources(
        &self,
        request: api::UpdatePodSandboxResourcesRequest,
    ) -> Result<api::UpdatePodSandboxResourcesResponse, Status> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        let _changing = sandbox.changing.lock().await;
        let own = {
            let record = sandbox.record();
            record.own_cgroup.then(|| record.cgroup.clone())
        };
        if let (Some(cgroup), Some(asked), true) = (own, &request.resources, sandbox.is_ready()) {
            let planned = plan_limits(asked, &self.host)
                .map_err(|e| Status::invalid_argument(e.to_string()))?;
            let cgroups = self.cgroups.clone();
            blocking(move || {
                create::make(&cgroups, &cgroup)?;
                limits::apply(&cgroups, &cgroup, &planned)
            })
            .await?
            .map_err(|e| internal("updating the pod's limits", e))?;
        }
        let directory = self.layout.sandbox(&sandbox.id);
        {
            let mut record = sandbox.record();
            let mut config =
                record.config().map_err(|e| internal("reading the sandbox's config", e))?;
            let linux = config.linux.get_or_insert_default();
            if let Some(asked) = &request.resources {
                merge(linux.resources.get_or_insert_default(), asked);
            }
            if let Some(asked) = &request.overhead {
                merge(linux.overhead.get_or_insert_default(), asked);
            }
            record.set_config(&config);
            record.write(&directory).map_err(|e| internal("recording the new limits", e))?;
        }
        self.durability.sync(directory);
        Ok(api::UpdatePodSandboxResourcesResponse {})
    }
}

/// For people, and for what looks at verbose statuses.
pub(super) fn described(resources: Option<&api::LinuxContainerResources>) -> serde_json::Value {
    let Some(r) = resources else { return serde_json::Value::Null };
    let hugepages: Vec<_> = r
        .hugepage_limits
        .iter()
        .map(|h| serde_json::json!({"page_size": h.page_size, "limit": h.limit}))
        .collect();
    serde_json::json!({
        "cpu_period": r.cpu_period,
        "cpu_quota": r.cpu_quota,
        "cpu_shares": r.cpu_shares,
        "memory_limit_in_bytes": r.memory_limit_in_bytes,
        "memory_swap_limit_in_bytes": r.memory_swap_limit_in_bytes,
        "oom_score_adj": r.oom_score_adj,
        "cpuset_cpus": r.cpuset_cpus,
        "cpuset_mems": r.cpuset_mems,
        "hugepage_limits": hugepages,
        "unified": r.unified,
    })
}

/// Takes over what is set; zero and empty mean "as before".
fn merge(current: &mut api::LinuxContainerResources, asked: &api::LinuxContainerResources) {
    let number = |current: &mut i64, asked: i64| {
        if asked != 0 {
            *current = asked;
        }
    };
    number(&mut current.cpu_period, asked.cpu_period);
    number(&mut current.cpu_quota, asked.cpu_quota);
    number(&mut current.cpu_shares, asked.cpu_shares);
    number(&mut current.memory_limit_in_bytes, asked.memory_limit_in_bytes);
    number(&mut current.memory_swap_limit_in_bytes, asked.memory_swap_limit_in_bytes);
    number(&mut current.oom_score_adj, asked.oom_score_adj);
    // The limit of memory and swap together is never below that of memory, and without a number of
    // its own it is the same.
    let (memory, both) = (current.memory_limit_in_bytes, &mut current.memory_swap_limit_in_bytes);
    if asked.memory_limit_in_bytes != 0 && asked.memory_swap_limit_in_bytes == 0 && *both != 0 {
        *both = memory;
    }
    if !asked.cpuset_cpus.is_empty() {
        current.cpuset_cpus = asked.cpuset_cpus.clone();
    }
    if !asked.cpuset_mems.is_empty() {
        current.cpuset_mems = asked.cpuset_mems.clone();
    }
    if !asked.hugepage_limits.is_empty() {
        current.hugepage_limits = asked.hugepage_limits.clone();
    }
    current.unified.extend(asked.unified.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_asked_for_stays_and_swap_follows_memory() {
        let mut current = api::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 20_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            cpuset_cpus: "0-1".to_owned(),
            ..Default::default()
        };
        let asked = api::LinuxContainerResources {
            cpu_quota: 30_000,
            memory_limit_in_bytes: 80 << 20,
            ..Default::default()
        };
        merge(&mut current, &asked);
        let expected = api::LinuxContainerResources {
            cpu_quota: 30_000,
            memory_limit_in_bytes: 80 << 20,
            memory_swap_limit_in_bytes: 80 << 20,
            ..current.clone()
        };
        assert_eq!(current, expected);
        assert_eq!((current.cpu_period, current.cpu_shares), (100_000, 512));
        assert_eq!(current.cpuset_cpus, "0-1");
        let both = api::LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            memory_swap_limit_in_bytes: 96 << 20,
            ..Default::default()
        };
        merge(&mut current, &both);
        assert_eq!(current.memory_swap_limit_in_bytes, 96 << 20);
    }
}
