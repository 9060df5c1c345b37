//! ListPodSandbox and PodSandboxStatus.

use std::collections::HashMap;

use serde_json::{Value, json};
use tonic::Status;

use super::store::Sandbox;
use super::{Shim, resources, selected};
use crate::api::{self, PodSandboxState};
use crate::monitor::record;

impl Shim {
    pub(super) fn list_sandboxes(
        &self,
        filter: Option<api::PodSandboxFilter>,
    ) -> Vec<api::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let mut found: Vec<api::PodSandbox> = self
            .store
            .sandboxes()
            .iter()
            .filter(|s| filter.id.is_empty() || s.id.starts_with(&filter.id))
            .filter(|s| filter.state.is_none_or(|state| cri_state(s) == state.state()))
            .filter(|s| selected(&s.config.labels, &filter.label_selector))
            .map(|s| {
                let record = s.record();
                api::PodSandbox {
                    id: s.id.clone(),
                    metadata: s.config.metadata.clone(),
                    state: cri_state(s) as i32,
                    created_at: record.created_at,
                    labels: s.config.labels.clone(),
                    annotations: s.config.annotations.clone(),
                    runtime_handler: record.runtime_handler.clone(),
                }
            })
            .collect();
        found.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        found
    }

    pub(super) fn pod_sandbox_status(
        &self,
        request: &api::PodSandboxStatusRequest,
    ) -> Result<api::PodSandboxStatusResponse, Status> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("info".to_owned(), self.sandbox_info(&sandbox).to_string());
        }
        let containers = self.store.containers_of(&sandbox.id);
        Ok(api::PodSandboxStatusResponse {
            status: Some(self.sandbox_status(&sandbox)),
            info,
            containers_statuses: containers.iter().map(|c| self.container_status(c)).collect(),
            timestamp: record::now(),
        })
    }

    /// What `crictl inspectp` and dashboards look for, under containerd's names, and what is ours.
    fn sandbox_info(&self, sandbox: &Sandbox) -> Value {
        let record = sandbox.record().clone();
        let netns = (!sandbox.host_network()).then(|| self.layout.netns(&sandbox.id));
        let mut namespaces = Vec::new();
        if let Some(path) = &netns {
            namespaces.push(json!({"type": "network", "path": path}));
        }
        namespaces.extend(["uts", "ipc"].map(|kind| json!({"type": kind})));
        let shared = sandbox.init.map(|init| format!("/proc/{init}/ns/pid"));
        namespaces.push(match shared {
            Some(path) => json!({"type": "pid", "path": path}),
            None => json!({"type": "pid"}),
        });
        // A process inside the pod's network, as nsenter(1) is given it; there is none by itself.
        let containers = self.store.containers_of(&sandbox.id);
        let pid = containers.iter().find_map(|container| {
            let status = container.status.borrow();
            status.started.as_ref().filter(|_| status.exited.is_none()).map(|s| s.pid)
        });
        let metadata = sandbox.metadata();
        // In-place resizes are in the record alone.
        let linux = record.config().ok().and_then(|config| config.linux).unwrap_or_default();
        json!({
            "pid": pid.unwrap_or_default(),
            "processStatus": if sandbox.is_ready() { "running" } else { "deleted" },
            "netNamespaceClosed": netns.as_ref().is_some_and(|path| !crate::network::netns::exists(path)),
            "image": "",
            "runtimeType": "longshore",
            "runtimeHandler": record.runtime_handler,
            "cniResult": record.network,
            "config": {
                "metadata": {"name": metadata.name, "namespace": metadata.namespace,
                    "uid": metadata.uid, "attempt": metadata.attempt},
                "hostname": sandbox.config.hostname,
                "log_directory": sandbox.config.log_directory,
                "labels": sandbox.config.labels,
                "annotations": sandbox.config.annotations,
                "linux": {"cgroup_parent": linux.cgroup_parent,
                    "overhead": resources::described(linux.overhead.as_ref()),
                    "resources": resources::described(linux.resources.as_ref())},
            },
            "runtimeSpec": {
                "ociVersion": "1.2.0",
                "hostname": sandbox.config.hostname,
                "linux": {"namespaces": namespaces, "cgroupsPath": record.cgroup},
                "annotations": {
                    "io.kubernetes.cri.container-type": "sandbox",
                    "io.kubernetes.cri.sandbox-id": sandbox.id,
                    "io.kubernetes.cri.sandbox-name": metadata.name,
                    "io.kubernetes.cri.sandbox-namespace": metadata.namespace,
                    "io.kubernetes.cri.sandbox-uid": metadata.uid,
                },
            },
            "netns": netns,
            "monitor": sandbox.monitor.socket(),
            "cgroup": record.cgroup,
            "sharedPIDInit": sandbox.init,
        })
    }

    /// A sandbox's status in the CRI's words.
    pub(super) fn sandbox_status(&self, sandbox: &Sandbox) -> api::PodSandboxStatus {
        let record = sandbox.record().clone();
        let mut ips = record.ips.iter();
        let network = api::PodSandboxNetworkStatus {
            ip: ips.next().cloned().unwrap_or_default(),
            additional_ips: ips.map(|ip| api::PodIp { ip: ip.clone() }).collect(),
        };
        api::PodSandboxStatus {
            id: sandbox.id.clone(),
            metadata: sandbox.config.metadata.clone(),
            state: cri_state(sandbox) as i32,
            created_at: record.created_at,
            network: Some(network),
            linux: Some(api::LinuxPodSandboxStatus {
                namespaces: Some(api::Namespace { options: Some(sandbox.namespaces()) }),
            }),
            labels: sandbox.config.labels.clone(),
            annotations: sandbox.config.annotations.clone(),
            runtime_handler: record.runtime_handler,
        }
    }
}

fn cri_state(sandbox: &Sandbox) -> PodSandboxState {
    if sandbox.is_ready() {
        PodSandboxState::SandboxReady
    } else {
        PodSandboxState::SandboxNotready
    }
}
