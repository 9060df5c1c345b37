//! ListPodSandbox and PodSandboxStatus.

use std::collections::HashMap;

use tonic::Status;

use super::store::Sandbox;
use super::{Shim, selected};
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
            let record = sandbox.record();
            let text = serde_json::json!({
                "netns": self.layout.netns(&sandbox.id),
                "monitor": sandbox.monitor.socket(),
                "cgroup": record.cgroup,
                "sharedPIDInit": sandbox.init,
            });
            info.insert("info".to_owned(), text.to_string());
        }
        let containers = self.store.containers_of(&sandbox.id);
        Ok(api::PodSandboxStatusResponse {
            status: Some(self.sandbox_status(&sandbox)),
            info,
            containers_statuses: containers.iter().map(|c| self.container_status(c)).collect(),
            timestamp: record::now(),
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
