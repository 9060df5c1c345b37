//! ListContainers and ContainerStatus.

use std::collections::HashMap;
use std::sync::Arc;

use tonic::Status;

use super::store::Container;
use super::{Shim, selected};
use crate::api::{self, ContainerState};

impl Shim {
    pub(super) fn list_containers(
        &self,
        filter: Option<api::ContainerFilter>,
    ) -> Vec<api::Container> {
        let filter = filter.unwrap_or_default();
        let mut found: Vec<api::Container> = self
            .store
            .containers()
            .iter()
            .filter(|c| filter.id.is_empty() || c.id.starts_with(&filter.id))
            .filter(|c| {
                let sandbox = &filter.pod_sandbox_id;
                sandbox.is_empty() || c.sandbox.id.starts_with(sandbox)
            })
            .filter(|c| filter.state.is_none_or(|s| c.state() == s.state()))
            .filter(|c| selected(&c.config().labels, &filter.label_selector))
            .map(|c| listed(c))
            .collect();
        found.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        found
    }

    pub(super) fn container_status_verb(
        &self,
        request: &api::ContainerStatusRequest,
    ) -> Result<api::ContainerStatusResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            let status = container.status.borrow().clone();
            let record = container.record().clone();
            // Names as containerd has them, where there is such a thing: scripts read them.
            let running = status.state() == ContainerState::ContainerRunning;
            let text = serde_json::json!({
                "sandboxID": container.sandbox.id,
                "pid": status.started.as_ref().filter(|_| running).map_or(0, |s| s.pid),
                "cgroup": record.cgroup,
                "imageID": record.image_id,
                "runtimeType": container.sandbox.record().runtime_handler,
                "runtimeSpec": self.runtime_spec(&container.id),
            });
            info.insert("info".to_owned(), text.to_string());
        }
        let status = Some(self.container_status(&container));
        Ok(api::ContainerStatusResponse { status, info })
    }

    /// The spec of a container that was started in this boot.
    fn runtime_spec(&self, id: &str) -> serde_json::Value {
        let text = std::fs::read(self.layout.bundle(id).join("config.json"));
        text.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// A container's status in the CRI's words.
    pub(super) fn container_status(&self, container: &Arc<Container>) -> api::ContainerStatus {
        let status = container.status.borrow().clone();
        let config = container.config();
        let record = container.record().clone();
        let (reason, message) = why(&status.exited);
        let user = status.started.as_ref().map(|s| api::ContainerUser {
            linux: Some(api::LinuxContainerUser {
                uid: i64::from(s.user.uid),
                gid: i64::from(s.user.gid),
                supplemental_groups: s.user.groups.iter().map(|g| i64::from(*g)).collect(),
            }),
        });
        let image = self.images.status(&record.image_id).ok().flatten();
        let image_ref = image
            .and_then(|i| i.repo_digests.first().cloned())
            .unwrap_or_else(|| record.image_id.clone());
        api::ContainerStatus {
            id: container.id.clone(),
            metadata: config.metadata.clone(),
            state: status.state() as i32,
            created_at: record.created_at,
            started_at: status.started.as_ref().map_or(0, |s| s.at),
            finished_at: status.exited.as_ref().map_or(0, |e| e.at),
            exit_code: status.exited.as_ref().map_or(0, |e| e.code),
            image: Some(named(&config)),
            image_ref,
            reason,
            message,
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            mounts: config.mounts.clone(),
            log_path: record.log_path.map_or(String::new(), |p| p.display().to_string()),
            resources: Some(api::ContainerResources {
                linux: config.linux.as_ref().and_then(|l| l.resources.clone()),
                windows: None,
            }),
            image_id: record.image_id,
            user,
            stop_signal: stop_signal(record.stop_signal) as i32,
        }
    }
}

fn listed(container: &Container) -> api::Container {
    let config = container.config();
    let record = container.record();
    api::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.sandbox.id.clone(),
        metadata: config.metadata.clone(),
        image: Some(named(&config)),
        image_ref: record.image_id.clone(),
        state: container.state() as i32,
        created_at: record.created_at,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        image_id: record.image_id.clone(),
    }
}

/// The image by the name the user gave it, where the caller passed that on.
fn named(config: &api::ContainerConfig) -> api::ImageSpec {
    let mut image = config.image.clone().unwrap_or_default();
    if !image.user_specified_image.is_empty() {
        image.image = image.user_specified_image.clone();
    }
    image
}

fn why(exit: &Option<crate::monitor::protocol::Exited>) -> (String, String) {
    let Some(exit) = exit else { return Default::default() };
    let reason = match exit {
        e if !e.reason.is_empty() => e.reason.as_str(),
        e if e.oom_killed => "OOMKilled",
        e if e.code == 0 => "Completed",
        _ => "Error",
    };
    (reason.to_owned(), exit.message.clone())
}

/// The CRI's name of a signal number.
fn stop_signal(number: i32) -> api::Signal {
    (1..=api::Signal::Sigrtmax as i32)
        .filter_map(|value| api::Signal::try_from(value).ok())
        .find(|signal| crate::spec::stop_signal::parse(signal.as_str_name()) == Some(number))
        .unwrap_or(api::Signal::RuntimeDefault)
}

/// Whether a container with this state takes exec and updates.
pub(super) fn running(container: &Container) -> Result<(), Status> {
    if container.state() == ContainerState::ContainerRunning {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "container {} is not running: it is in state {}",
        container.id,
        container.state().as_str_name()
    )))
}
