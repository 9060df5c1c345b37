//! Resources of running containers changed in place (KEP-1287): what the spec says now is put into
//! effect, or the container restarted where its `resizePolicy` asks for that.

use cri_shim::api::LinuxContainerResources;
use k8s_openapi::api::core::v1::Container as SpecContainer;

use super::{Done, Worker};
use crate::pod::config::resources::{container_resources, pod_limits};
use crate::pod::observed::{ContainerId, ContainerState};
use crate::pod::plan::KillCause;
use crate::pod::qos::qos_class;
use crate::pod::spec::{init_containers, spec_of};
use crate::report::EventType;

/// Whether a change from `old` to `new` restarts the container.
fn restarts(
    container: &SpecContainer,
    old: &LinuxContainerResources,
    new: &LinuxContainerResources,
) -> bool {
    let asks = |resource: &str| {
        let policies = container.resize_policy.iter().flatten();
        policies
            .into_iter()
            .any(|p| p.resource_name == resource && p.restart_policy == "RestartContainer")
    };
    let cpu = (old.cpu_shares, old.cpu_quota) != (new.cpu_shares, new.cpu_quota);
    let memory = old.memory_limit_in_bytes != new.memory_limit_in_bytes;
    (cpu && asks("cpu")) || (memory && asks("memory"))
}

impl Worker {
    /// Begins what changed resources ask for.
    pub(super) fn reconcile_resources(&mut self) {
        let pod = self.pod.clone();
        let spec = spec_of(&pod);
        for container in spec.containers.iter().chain(init_containers(spec)) {
            let latest = self.observed.latest(&container.name);
            let Some(instance) = latest.filter(|i| i.state == ContainerState::Running) else {
                continue;
            };
            let id = instance.id.clone();
            let unified = self.deps.cgroups.unified();
            let wanted = container_resources(&pod, container, &self.deps.node, unified);
            // What a container was made with it has.
            let Some(has) = self.resources.get(&id) else {
                self.resources.insert(id, wanted);
                continue;
            };
            if *has == wanted {
                continue;
            }
            if restarts(container, has, &wanted) {
                if !self.facts.killing.contains(&id) {
                    self.kill(id, &container.name, KillCause::Changed);
                }
                continue;
            }
            self.resources.insert(id.clone(), wanted.clone());
            self.resize(id, wanted);
        }
        let observed = &self.observed;
        self.resources.retain(|id, _| observed.container(id).is_some());
    }

    fn resize(&mut self, id: ContainerId, wanted: LinuxContainerResources) {
        let (deps, pod, uid) = (self.deps.clone(), self.pod.clone(), self.uid.clone());
        self.begin_task(async move {
            let limits = pod_limits(&pod, &deps.node);
            // Room in the pod's cgroup first; what shrinks below the containers' shrinks after them.
            let before = deps.cgroups.ensure(&uid, qos_class(&pod), limits).await;
            let updated = deps.runtime.update_container_resources(id.as_str(), wanted).await;
            let after = match before {
                Ok(_) => Ok(()),
                Err(_) => deps.cgroups.ensure(&uid, qos_class(&pod), limits).await.map(drop),
            };
            let failures: Vec<String> =
                [updated.err().map(|e| e.to_string()), after.err().map(|e| e.to_string())]
                    .into_iter()
                    .flatten()
                    .collect();
            if !failures.is_empty() {
                let message = format!("cannot resize container {id}: {}", failures.join("; "));
                deps.pod_event(&pod, EventType::Warning, "ResizeError", message);
            }
            Done::Nothing
        });
    }
}
