//! One pod as the runtime shows it: plain data, the only input that decisions take from the world
//! of containers. Everything that must survive an agent restart (attempts, the image asked for,
//! the restart back-off) is read back from here.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use cri_shim::api;
use jiff::Timestamp;

/// A sandbox's id, as the runtime gave it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxId(pub Arc<str>);

/// A container's id, as the runtime gave it (without `<runtime>://`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(pub Arc<str>);

macro_rules! id {
    ($type:ty) => {
        impl $type {
            /// The id as the runtime writes it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl From<&str> for $type {
            fn from(id: &str) -> Self {
                Self(id.into())
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
id!(SandboxId);
id!(ContainerId);

/// Names of labels and annotations on what the runtime holds. The first ones are kubelet's, so
/// that crictl and other CRI clients show pods as they always did.
pub mod names {
    /// Label: the pod's name.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Label: the pod's namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Label: the pod's UID.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// Label: the container's name in the pod.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    /// Annotation: how often this container was restarted before this instance.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Annotation: `terminationMessagePath`.
    pub const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// Annotation: `terminationMessagePolicy`.
    pub const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Annotation: the pod's grace period when the container was made.
    pub const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
    /// Annotation: the container's ports as JSON.
    pub const PORTS: &str = "io.kubernetes.container.ports";
    /// Annotation: the preStop hook as JSON, for a container whose pod object is lost.
    pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
    /// Annotation, ours: the image as the pod named it, to see whether the pod names another now.
    pub const IMAGE: &str = "longshore.dev/image";
    /// Annotation, ours: how many seconds to wait before the restart after this instance.
    pub const BACKOFF: &str = "longshore.dev/restart-backoff-seconds";
    /// Annotation, ours: host path of the file with the termination message.
    pub const MESSAGE_FILE: &str = "longshore.dev/termination-message-file";
}

/// State of a container in the runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContainerState {
    /// Made but never started.
    Created,
    /// Running.
    Running,
    /// Ended; its exit code counts.
    Exited,
    /// The runtime has lost track of it.
    Unknown,
}

/// A pod sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// The runtime's id.
    pub id: SandboxId,
    /// How many sandboxes this pod had before this one.
    pub attempt: u32,
    /// Whether containers can be started in it.
    pub ready: bool,
    /// When it was made.
    pub created_at: Timestamp,
    /// Its addresses; empty on the host network.
    pub ips: Vec<String>,
}

/// One instance of a container.
#[derive(Clone, Debug, PartialEq)]
pub struct Container {
    /// The runtime's id.
    pub id: ContainerId,
    /// The sandbox it runs in.
    pub sandbox: SandboxId,
    /// Its name in the pod.
    pub name: Arc<str>,
    /// How often the container was restarted before this instance.
    pub attempt: u32,
    /// What the runtime says of it.
    pub state: ContainerState,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it started; `None` if it never did.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// Exit code; 0 while it has not ended.
    pub exit_code: i32,
    /// The runtime's reason (`Completed`, `Error`, `OOMKilled`, `StartError`).
    pub reason: String,
    /// The runtime's message.
    pub message: String,
    /// The image as shown to people.
    pub image: String,
    /// Digest reference of the image: `imageID` in the status.
    pub image_ref: String,
    /// The runtime's id of the image.
    pub image_id: String,
    /// Our and kubelet's annotations.
    pub annotations: HashMap<String, String>,
    /// Resources in effect.
    pub resources: Option<api::LinuxContainerResources>,
    /// First process's user.
    pub user: Option<api::LinuxContainerUser>,
    /// Log file on the host.
    pub log_path: String,
    /// What the container left as its termination message; read once it has ended.
    pub termination_message: Option<String>,
}

impl Container {
    /// The image as the pod named it when this instance was made.
    pub fn requested_image(&self) -> Option<&str> {
        self.annotations.get(names::IMAGE).map(String::as_str)
    }

    /// Seconds to wait before the next instance, as decided when this one was made.
    pub fn backoff_seconds(&self) -> u64 {
        self.annotations.get(names::BACKOFF).and_then(|s| s.parse().ok()).unwrap_or(0)
    }

    /// Ended with exit code 0.
    pub fn succeeded(&self) -> bool {
        self.state == ContainerState::Exited && self.exit_code == 0
    }
}

/// All that the runtime holds of one pod, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Sandboxes, newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Container instances, newest first.
    pub containers: Vec<Container>,
}

impl Observed {
    /// Puts the newest first: by attempt, then by time (clocks may be set back).
    pub fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| Reverse((s.attempt, s.created_at)));
        self.containers.sort_by_key(|c| Reverse((c.created_at, c.attempt)));
    }

    /// The newest instance of container `name`.
    pub fn latest(&self, name: &str) -> Option<&Container> {
        self.containers
            .iter()
            .filter(|c| &*c.name == name)
            .max_by_key(|c| (c.attempt, c.created_at))
    }

    /// Instances of container `name`, newest first.
    pub fn instances(&self, name: &str) -> Vec<&Container> {
        let mut all: Vec<_> = self.containers.iter().filter(|c| &*c.name == name).collect();
        all.sort_by_key(|c| Reverse((c.attempt, c.created_at)));
        all
    }

    /// Container `id`.
    pub fn container(&self, id: &ContainerId) -> Option<&Container> {
        self.containers.iter().find(|c| c.id == *id)
    }

    /// Whether any container may still be running.
    pub fn any_alive(&self) -> bool {
        self.containers
            .iter()
            .any(|c| matches!(c.state, ContainerState::Running | ContainerState::Unknown))
    }
}

/// A CRI time (nanoseconds since 1970, 0 for never).
pub fn timestamp(nanos: i64) -> Option<Timestamp> {
    (nanos > 0).then(|| Timestamp::from_nanosecond(i128::from(nanos)).ok()).flatten()
}

impl Sandbox {
    /// From the runtime's status.
    pub fn from_cri(status: &api::PodSandboxStatus) -> Self {
        let network = status.network.clone().unwrap_or_default();
        let mut ips = Vec::new();
        if !network.ip.is_empty() {
            ips.push(network.ip);
        }
        ips.extend(network.additional_ips.into_iter().map(|ip| ip.ip).filter(|ip| !ip.is_empty()));
        Self {
            id: SandboxId::from(status.id.as_str()),
            attempt: status.metadata.as_ref().map_or(0, |m| m.attempt),
            ready: status.state() == api::PodSandboxState::SandboxReady,
            created_at: timestamp(status.created_at).unwrap_or_default(),
            ips,
        }
    }
}

impl Container {
    /// From the runtime's status and the sandbox that its listing named.
    pub fn from_cri(status: api::ContainerStatus, sandbox: SandboxId) -> Self {
        let state = match status.state() {
            api::ContainerState::ContainerCreated => ContainerState::Created,
            api::ContainerState::ContainerRunning => ContainerState::Running,
            api::ContainerState::ContainerExited => ContainerState::Exited,
            api::ContainerState::ContainerUnknown => ContainerState::Unknown,
        };
        let metadata = status.metadata.unwrap_or_default();
        let name = status.labels.get(names::CONTAINER_NAME).cloned().unwrap_or(metadata.name);
        let attempt = status
            .annotations
            .get(names::RESTART_COUNT)
            .and_then(|n| n.parse().ok())
            .unwrap_or(metadata.attempt);
        let image = status.image.unwrap_or_default();
        let shown = if image.user_specified_image.is_empty() {
            image.image
        } else {
            image.user_specified_image
        };
        Self {
            id: ContainerId::from(status.id.as_str()),
            sandbox,
            name: name.into(),
            attempt,
            state,
            created_at: timestamp(status.created_at).unwrap_or_default(),
            started_at: timestamp(status.started_at),
            finished_at: timestamp(status.finished_at),
            exit_code: status.exit_code,
            reason: status.reason,
            message: status.message,
            image: shown,
            image_ref: status.image_ref,
            image_id: status.image_id,
            annotations: status.annotations,
            resources: status.resources.and_then(|r| r.linux),
            user: status.user.and_then(|u| u.linux),
            log_path: status.log_path,
            termination_message: None,
        }
    }
}
