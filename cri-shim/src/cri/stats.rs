//! ContainerStats, ListContainerStats, PodSandboxStats, ListPodSandboxStats.

use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

use super::store::{Container, Sandbox};
use super::{Shim, blocking, selected};
use crate::api::{self, ContainerState};
use crate::cgroup::pressure::{Pressure, Stall};
use crate::cgroup::rate::Rate;
use crate::cgroup::stats::{self, Usage};
use crate::monitor::record;

impl Shim {
    pub(super) async fn container_stats(
        self: &Arc<Self>,
        request: api::ContainerStatsRequest,
    ) -> Result<api::ContainerStatsResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        let this = self.clone();
        let stats = blocking(move || this.stats_of(&container)).await?;
        Ok(api::ContainerStatsResponse { stats: Some(stats) })
    }

    pub(super) async fn list_container_stats(
        self: &Arc<Self>,
        filter: Option<api::ContainerStatsFilter>,
    ) -> Result<Vec<api::ContainerStats>, Status> {
        let filter = filter.unwrap_or_default();
        let mut containers = self.store.containers();
        containers.retain(|c| {
            c.state() == ContainerState::ContainerRunning
                && c.id.starts_with(&filter.id)
                && c.sandbox.id.starts_with(&filter.pod_sandbox_id)
                && selected(&c.config().labels, &filter.label_selector)
        });
        let this = self.clone();
        blocking(move || containers.iter().map(|c| this.stats_of(c)).collect()).await
    }

    pub(super) async fn pod_sandbox_stats(
        self: &Arc<Self>,
        request: api::PodSandboxStatsRequest,
    ) -> Result<api::PodSandboxStatsResponse, Status> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        let this = self.clone();
        let stats = blocking(move || this.stats_of_sandbox(&sandbox)).await?;
        Ok(api::PodSandboxStatsResponse { stats: Some(stats) })
    }

    pub(super) async fn list_pod_sandbox_stats(
        self: &Arc<Self>,
        filter: Option<api::PodSandboxStatsFilter>,
    ) -> Result<Vec<api::PodSandboxStats>, Status> {
        let filter = filter.unwrap_or_default();
        let mut sandboxes = self.store.sandboxes();
        sandboxes.retain(|s| {
            s.is_ready()
                && s.id.starts_with(&filter.id)
                && selected(&s.config.labels, &filter.label_selector)
        });
        let this = self.clone();
        blocking(move || sandboxes.iter().map(|s| this.stats_of_sandbox(s)).collect()).await
    }

    fn stats_of(&self, container: &Arc<Container>) -> api::ContainerStats {
        let cgroup = container.record().cgroup.clone();
        let usage = stats::read(&self.cgroups, &cgroup);
        let config = container.config();
        let layer = self.snapshots.usage(&container.id).unwrap_or_default();
        api::ContainerStats {
            attributes: Some(api::ContainerAttributes {
                id: container.id.clone(),
                metadata: config.metadata.clone(),
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
            }),
            cpu: Some(cpu(&usage, &container.cpu)),
            memory: Some(memory(&usage)),
            writable_layer: Some(api::FilesystemUsage {
                timestamp: usage.timestamp,
                fs_id: Some(api::FilesystemIdentifier {
                    mountpoint: self.layout.state.display().to_string(),
                }),
                used_bytes: value(layer.bytes),
                inodes_used: value(layer.inodes),
            }),
            swap: usage.swap.map(|swap| api::SwapUsage {
                timestamp: usage.timestamp,
                swap_available_bytes: usage
                    .swap_limit
                    .map(|limit| limit.saturating_sub(swap))
                    .and_then(value),
                swap_usage_bytes: value(swap),
            }),
            io: io(&usage),
        }
    }

    fn stats_of_sandbox(&self, sandbox: &Arc<Sandbox>) -> api::PodSandboxStats {
        let cgroup = sandbox.record().cgroup.clone();
        let usage = stats::read(&self.cgroups, &cgroup);
        let containers = self.store.containers_of(&sandbox.id);
        let running = containers.iter().filter(|c| c.state() == ContainerState::ContainerRunning);
        let mut interfaces = Vec::new();
        if !sandbox.host_network()
            && let Ok(text) = crate::network::netns::within(&self.layout.netns(&sandbox.id), || {
                std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default()
            })
        {
            interfaces = stats::interfaces(&text);
        }
        let timestamp = record::now();
        api::PodSandboxStats {
            attributes: Some(api::PodSandboxAttributes {
                id: sandbox.id.clone(),
                metadata: sandbox.config.metadata.clone(),
                labels: sandbox.config.labels.clone(),
                annotations: sandbox.config.annotations.clone(),
            }),
            linux: Some(api::LinuxPodSandboxStats {
                cpu: Some(cpu(&usage, &sandbox.cpu)),
                memory: Some(memory(&usage)),
                network: network(timestamp, interfaces),
                process: Some(api::ProcessUsage {
                    timestamp,
                    process_count: value(self.cgroups.processes(&cgroup).len() as u64),
                }),
                containers: running.map(|c| self.stats_of(c)).collect(),
                io: io(&usage),
            }),
            windows: None,
        }
    }
}

/// A pod's own network. None in the node's: a kubelet takes it that a network has an interface, and
/// crashes where it does not.
fn network(
    timestamp: i64,
    interfaces: Vec<api::NetworkInterfaceUsage>,
) -> Option<api::NetworkUsage> {
    let mut rest = interfaces.into_iter();
    let default_interface = Some(rest.next()?);
    // The API wants the default told once.
    Some(api::NetworkUsage { timestamp, default_interface, interfaces: rest.collect() })
}

fn value(value: u64) -> Option<api::UInt64Value> {
    Some(api::UInt64Value { value })
}

fn cpu(usage: &Usage, rate: &Mutex<Rate>) -> api::CpuUsage {
    let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
    api::CpuUsage {
        timestamp: usage.timestamp,
        usage_core_nano_seconds: value(usage.cpu_nanoseconds),
        usage_nano_cores: rate.at(usage.timestamp, usage.cpu_nanoseconds).and_then(value),
        psi: usage.cpu_pressure.as_ref().map(psi),
    }
}

fn memory(usage: &Usage) -> api::MemoryUsage {
    api::MemoryUsage {
        timestamp: usage.timestamp,
        working_set_bytes: value(usage.working_set()),
        available_bytes: usage
            .memory_limit
            .map(|limit| limit.saturating_sub(usage.working_set()))
            .and_then(value),
        usage_bytes: value(usage.memory),
        rss_bytes: value(usage.rss),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: usage.memory_pressure.as_ref().map(psi),
    }
}

fn io(usage: &Usage) -> Option<api::IoUsage> {
    let pressure = usage.io_pressure.as_ref()?;
    Some(api::IoUsage { timestamp: usage.timestamp, psi: Some(psi(pressure)) })
}

/// The kernel counts microseconds, the CRI nanoseconds.
fn psi(pressure: &Pressure) -> api::PsiStats {
    let data = |stall: &Stall| api::PsiData {
        total: stall.total.saturating_mul(1000),
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    };
    api::PsiStats { full: Some(data(&pressure.full)), some: Some(data(&pressure.some)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_interface_is_told_once() {
        let named =
            |name: &str| api::NetworkInterfaceUsage { name: name.to_owned(), ..Default::default() };
        let told = network(1, vec![named("eth0"), named("net1")]).unwrap();
        assert_eq!(told.default_interface, Some(named("eth0")));
        assert_eq!(told.interfaces, [named("net1")]);
        assert_eq!(network(1, Vec::new()), None);
    }
}
