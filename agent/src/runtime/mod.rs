//! The container runtime as the agent sees it: the verbs of the CRI that it uses, as a small trait.
//!
//! `cri` speaks to any CRI v1 server over its unix socket (our shim, containerd, CRI-O); `fake`
//! keeps everything in memory and refuses what a runtime would refuse.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use cri_shim::api;
use futures::Stream;

pub mod cri;
pub mod fake;

/// Where the images lie, if the runtime says.
pub fn image_dir(info: &api::ImageFsInfoResponse) -> Option<PathBuf> {
    let id = info.image_filesystems.first()?.fs_id.as_ref()?;
    Some(PathBuf::from(&id.mountpoint))
}

/// Where the containers' writable layers lie, if the runtime says.
pub fn layer_dir(info: &api::ImageFsInfoResponse) -> Option<PathBuf> {
    let id = info.container_filesystems.first()?.fs_id.as_ref()?;
    Some(PathBuf::from(&id.mountpoint))
}

/// What kind of failure a runtime reported, as far as the caller acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuntimeErrorKind {
    /// The sandbox, container or image does not exist.
    NotFound,
    /// The runtime does not have this verb.
    Unimplemented,
    /// The runtime cannot be reached now; try again.
    Unavailable,
    /// No answer within the time given.
    Timeout,
    /// The runtime refused or failed.
    Failed,
}

/// A CRI request that did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{verb}: {message}")]
pub struct RuntimeError {
    /// The CRI verb.
    pub verb: &'static str,
    /// What the caller may do about it.
    pub kind: RuntimeErrorKind,
    /// What the runtime said.
    pub message: String,
}

impl RuntimeError {
    /// Whether the object asked for does not exist (any more).
    pub fn is_not_found(&self) -> bool {
        self.kind == RuntimeErrorKind::NotFound
    }
}

/// Result of a CRI request.
pub type Result<T> = std::result::Result<T, RuntimeError>;

/// Container events as the runtime sends them; ends when the connection does.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<api::ContainerEventResponse>> + Send>>;

/// What a command run in a container gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit code.
    pub exit_code: i32,
    /// Standard output, as far as the runtime keeps it.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// The CRI v1 verbs that the agent uses. Every call ends: each has a time limit.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Name and version of the runtime.
    async fn version(&self) -> Result<api::VersionResponse>;
    /// Conditions (`RuntimeReady`, `NetworkReady`) and features.
    async fn status(&self) -> Result<api::StatusResponse>;
    /// The cgroup driver the runtime is set to; `None` where it does not say.
    async fn cgroup_driver(&self) -> Result<Option<api::CgroupDriver>> {
        Ok(None)
    }
    /// Tells the runtime the node's pod CIDRs, comma separated.
    async fn update_runtime_config(&self, pod_cidr: &str) -> Result<()>;

    /// Creates and starts a sandbox; returns its id.
    async fn run_pod_sandbox(&self, config: api::PodSandboxConfig, handler: &str)
    -> Result<String>;
    /// Stops the sandbox, its containers and its network. Idempotent.
    async fn stop_pod_sandbox(&self, id: &str) -> Result<()>;
    /// Removes the sandbox and what is in it. Idempotent.
    async fn remove_pod_sandbox(&self, id: &str) -> Result<()>;
    /// The sandbox with its addresses.
    async fn pod_sandbox_status(&self, id: &str) -> Result<api::PodSandboxStatusResponse>;
    /// Sandboxes, all or those of one pod.
    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<api::PodSandbox>>;

    /// Creates a container; returns its id.
    async fn create_container(
        &self,
        sandbox_id: &str,
        config: api::ContainerConfig,
        sandbox_config: api::PodSandboxConfig,
    ) -> Result<String>;
    /// Starts a created container.
    async fn start_container(&self, id: &str) -> Result<()>;
    /// Sends the stop signal, and SIGKILL after `grace`. Returns when the container has ended.
    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()>;
    /// Removes a container. Idempotent.
    async fn remove_container(&self, id: &str) -> Result<()>;
    /// Containers, all or those of one pod.
    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<api::Container>>;
    /// One container in full.
    async fn container_status(&self, id: &str) -> Result<api::ContainerStatus>;
    /// Changes the resources of a running container.
    async fn update_container_resources(
        &self,
        id: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<()>;
    /// Tells the runtime what a pod's cgroup will have; for those that size something of their own
    /// by it, such as a virtual machine.
    async fn update_pod_sandbox_resources(
        &self,
        id: &str,
        overhead: api::LinuxContainerResources,
        resources: api::LinuxContainerResources,
    ) -> Result<()>;
    /// Makes the runtime open the container's log file anew (after a rotation).
    async fn reopen_container_log(&self, id: &str) -> Result<()>;
    /// Runs `command` in a container and waits for it, at most `timeout` (zero: no limit but the
    /// client's own).
    async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: Duration,
    ) -> Result<ExecOutput>;
    /// Writes the state of a running container to file `location`; `timeout` in seconds, 0 for the
    /// runtime's own.
    async fn checkpoint_container(&self, id: &str, location: &str, timeout: i64) -> Result<()>;
    /// Where to stream `kubectl exec`.
    async fn exec(&self, request: api::ExecRequest) -> Result<String>;
    /// Where to stream `kubectl attach`.
    async fn attach(&self, request: api::AttachRequest) -> Result<String>;
    /// Where to stream `kubectl port-forward`.
    async fn port_forward(&self, request: api::PortForwardRequest) -> Result<String>;

    /// Statistics of containers, all or those of one sandbox.
    async fn list_container_stats(&self, sandbox: Option<&str>)
    -> Result<Vec<api::ContainerStats>>;
    /// Statistics of all sandboxes.
    async fn list_pod_sandbox_stats(&self) -> Result<Vec<api::PodSandboxStats>>;

    /// The stream of container events. Its first item is an `Unimplemented` error where the runtime
    /// has none.
    async fn container_events(&self) -> Result<EventStream>;

    /// Images on the node.
    async fn list_images(&self) -> Result<Vec<api::Image>>;
    /// One image, `None` where it is not present.
    async fn image_status(&self, image: &str) -> Result<Option<api::Image>>;
    /// Pulls an image; returns the reference to create containers with. Credentials are never logged.
    async fn pull_image(
        &self,
        image: &str,
        auth: Option<api::AuthConfig>,
        sandbox_config: Option<api::PodSandboxConfig>,
    ) -> Result<String>;
    /// Removes an image. Idempotent.
    async fn remove_image(&self, image: &str) -> Result<()>;
    /// Use of the file systems that images and containers lie on.
    async fn image_fs_info(&self) -> Result<api::ImageFsInfoResponse>;
}
