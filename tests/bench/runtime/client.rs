//! A CRI client that does what a kubelet does for a pod of one container.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use cri_shim::api::runtime_service_client::RuntimeServiceClient;
use cri_shim::api::*;
use tests::harness::image::IMAGE;
use tonic::transport::{Channel, Endpoint, Uri};

/// A connection to a runtime.
#[derive(Clone)]
pub(crate) struct Client(RuntimeServiceClient<Channel>);

/// Where the logs of a pod are.
pub(crate) fn log_directory(name: &str) -> String {
    format!("/var/log/pods/default_{name}_uid-{name}")
}

/// A running pod.
pub(crate) struct Pod {
    pub(crate) sandbox: String,
    pub(crate) container: String,
    /// What RunPodSandbox, CreateContainer and StartContainer took.
    pub(crate) took: [Duration; 3],
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Self> {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://cri.local");
        Ok(Self(RuntimeServiceClient::new(endpoint.connect_with_connector(connector).await?)))
    }

    pub(crate) async fn version(&self) -> Result<String> {
        let answer = self.0.clone().version(VersionRequest::default()).await?.into_inner();
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// RunPodSandbox, CreateContainer and StartContainer of a pod with defaults as a kubelet gives
    /// them, in the cgroup `parent`.
    pub(crate) async fn start(&self, name: &str, parent: &str) -> Result<Pod> {
        self.start_as(name, parent, &["sleep", "100000"], NamespaceMode::Pod).await
    }

    /// The same with a program and a network of its own.
    pub(crate) async fn start_as(
        &self,
        name: &str,
        parent: &str,
        command: &[&str],
        network: NamespaceMode,
    ) -> Result<Pod> {
        let mut runtime = self.0.clone();
        let options = NamespaceOption {
            network: network as i32,
            pid: NamespaceMode::Container as i32,
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                namespace: "default".into(),
                uid: format!("uid-{name}"),
                attempt: 0,
            }),
            // As a kubelet does it: a pod in the node's network has no name of its own.
            hostname: if network == NamespaceMode::Pod { name.into() } else { String::new() },
            log_directory: log_directory(name),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: parent.into(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let begin = Instant::now();
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let sandbox = runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        let ran = begin.elapsed();
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: command.iter().map(|&argument| argument.to_owned()).collect(),
            log_path: "main/0.log".into(),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources {
                    cpu_shares: 102,
                    memory_limit_in_bytes: 64 << 20,
                    oom_score_adj: 900,
                    ..Default::default()
                }),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(options),
                    seccomp: Some(SecurityProfile::default()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        };
        let container = runtime.create_container(request).await?.into_inner().container_id;
        let created = begin.elapsed();
        let request = StartContainerRequest { container_id: container.clone() };
        runtime.start_container(request).await?;
        let took = [ran, created - ran, begin.elapsed() - created];
        Ok(Pod { sandbox, container, took })
    }

    /// Waits until the container has ended, and says well.
    pub(crate) async fn ended(&self, pod: &Pod) -> Result<()> {
        loop {
            let request = ContainerStatusRequest {
                container_id: pod.container.clone(),
                ..Default::default()
            };
            let answer = self.0.clone().container_status(request).await?.into_inner();
            let status = answer.status.unwrap_or_default();
            if status.state() == ContainerState::ContainerExited {
                anyhow::ensure!(status.exit_code == 0, "it ended with {}", status.exit_code);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// ExecSync of `true`.
    pub(crate) async fn exec(&self, pod: &Pod) -> Result<()> {
        let request = ExecSyncRequest {
            container_id: pod.container.clone(),
            cmd: vec!["true".into()],
            timeout: 10,
        };
        let answer = self.0.clone().exec_sync(request).await?.into_inner();
        anyhow::ensure!(answer.exit_code == 0, "true ended with {}", answer.exit_code);
        Ok(())
    }

    /// StopContainer without grace, RemoveContainer, StopPodSandbox, RemovePodSandbox.
    pub(crate) async fn remove(&self, pod: Pod) -> Result<()> {
        let mut runtime = self.0.clone();
        let container_id = pod.container;
        let request = StopContainerRequest { container_id: container_id.clone(), timeout: 0 };
        runtime.stop_container(request).await?;
        runtime.remove_container(RemoveContainerRequest { container_id }).await?;
        let pod_sandbox_id = pod.sandbox;
        let request = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        runtime.stop_pod_sandbox(request).await?;
        runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await?;
        Ok(())
    }
}
