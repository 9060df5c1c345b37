//! UpdateContainerResources and UpdatePodSandboxResources.

use tonic::Status;

use super::{Shim, blocking, internal};
use crate::api::{self, ContainerState};
use crate::cgroup::limits;
use crate::spec::resources::plan_limits;

impl Shim {
    pub(super) async fn update_container_resources(
        &self,
        request: api::UpdateContainerResourcesRequest,
    ) -> Result<api::UpdateContainerResourcesResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        let _changing = container.changing.lock().await;
        let asked = request.linux.unwrap_or_default();
        let state = container.state();
        if state == ContainerState::ContainerExited {
            return Err(Status::failed_precondition("the container has exited"));
        }
        let mut config = (*container.config()).clone();
        let linux = config.linux.get_or_insert_default();
        let resources = linux.resources.get_or_insert_default();
        merge(resources, &asked);
        if state == ContainerState::ContainerRunning {
            let cgroups = self.cgroups.clone();
            let planned = plan_limits(&asked, &self.host)
                .map_err(|e| Status::invalid_argument(e.to_string()))?;
            let cgroup = container.record().cgroup.clone();
            self.limit_scope(&cgroup, &asked).await?;
            blocking(move || limits::apply(&cgroups, &cgroup, &planned))
                .await?
                .map_err(|e| internal("updating the container's limits", e))?;
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

    pub(super) fn update_sandbox_resources(
        &self,
        request: &api::UpdatePodSandboxResourcesRequest,
    ) -> Result<api::UpdatePodSandboxResourcesResponse, Status> {
        // A notice: the pod's cgroup is the kubelet's, which has changed it already.
        self.store.sandbox(&request.pod_sandbox_id)?;
        Ok(api::UpdatePodSandboxResourcesResponse {})
    }
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
