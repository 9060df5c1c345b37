//! ListMetricDescriptors, ListPodSandboxMetrics and its stream: cAdvisor's metrics, for a kubelet
//! that asks the runtime for them instead of reading cgroups itself.

use std::sync::Arc;

use tonic::Status;

use super::store::{Container, Sandbox};
use super::{Shim, blocking};
use crate::api::{self, ContainerState};
use crate::cgroup::{detail, stats};
use crate::monitor::record;

mod families;

use families::{of_cgroup, of_limits, of_network, render, sample};

impl Shim {
    pub(super) fn metric_descriptors(&self) -> api::ListMetricDescriptorsResponse {
        api::ListMetricDescriptorsResponse { descriptors: families::descriptors() }
    }

    pub(super) async fn pod_sandbox_metrics(
        self: &Arc<Self>,
    ) -> Result<Vec<api::PodSandboxMetrics>, Status> {
        let mut sandboxes = self.store.sandboxes();
        sandboxes.retain(|s| s.is_ready());
        let this = self.clone();
        blocking(move || sandboxes.iter().map(|s| this.metrics_of_sandbox(s)).collect()).await
    }

    fn metrics_of_sandbox(&self, sandbox: &Arc<Sandbox>) -> api::PodSandboxMetrics {
        let cgroup = sandbox.record().cgroup.clone();
        let usage = stats::read(&self.cgroups, &cgroup);
        let mut samples = of_cgroup(&usage, &detail::read(&self.cgroups, &cgroup));
        if !sandbox.host_network()
            && let Ok(text) = crate::network::netns::within(&self.layout.netns(&sandbox.id), || {
                std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default()
            })
        {
            samples.extend(of_network(&text));
        }
        let pod = sandbox.metadata();
        // As cAdvisor has it, the whole pod has no container, image or name.
        let labels = [
            cgroup.display().to_string(),
            String::new(),
            String::new(),
            pod.namespace,
            pod.name,
            String::new(),
        ];
        let mut containers = self.store.containers_of(&sandbox.id);
        containers.retain(|c| c.state() == ContainerState::ContainerRunning);
        api::PodSandboxMetrics {
            pod_sandbox_id: sandbox.id.clone(),
            metrics: render(samples, &labels, record::now()),
            container_metrics: containers.iter().map(|c| self.metrics_of(c)).collect(),
        }
    }

    fn metrics_of(&self, container: &Arc<Container>) -> api::ContainerMetrics {
        let cgroup = container.record().cgroup.clone();
        let usage = stats::read(&self.cgroups, &cgroup);
        let config = container.config();
        let mut samples = of_cgroup(&usage, &detail::read(&self.cgroups, &cgroup));
        let resources = config.linux.as_ref().and_then(|l| l.resources.as_ref());
        samples.extend(resources.map(of_limits).unwrap_or_default());
        let layer = self.snapshots.usage(&container.id).unwrap_or_default();
        samples.push(sample("container_fs_usage_bytes", layer.bytes));
        samples.push(sample("container_fs_inodes_used", layer.inodes));
        if let Ok(disk) = nix::sys::statvfs::statvfs(&self.layout.state) {
            let bytes = disk.blocks() * disk.fragment_size();
            samples.extend([
                sample("container_fs_limit_bytes", bytes),
                sample("container_fs_inodes_total", disk.files()),
                sample("container_fs_inodes_free", disk.files_free()),
            ]);
        }
        if let Some(started) = &container.status.borrow().started {
            let seconds = started.at as u64 / 1_000_000_000;
            samples.push(sample("container_start_time_seconds", seconds));
        }
        let pod = container.sandbox.metadata();
        let asked = config.image.clone().unwrap_or_default();
        let image = match asked.user_specified_image.is_empty() {
            true => asked.image,
            false => asked.user_specified_image,
        };
        let labels = [
            cgroup.display().to_string(),
            container.id.clone(),
            image,
            pod.namespace,
            pod.name,
            container.metadata().name,
        ];
        api::ContainerMetrics {
            container_id: container.id.clone(),
            metrics: render(samples, &labels, usage.timestamp),
        }
    }
}
