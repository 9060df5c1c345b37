//! A CRI v1 client over a unix socket, for our shim and for containerd and CRI-O alike.
//!
//! The channel connects when first used and again after the runtime was restarted, so a runtime
//! that comes back is simply there. Every request carries a time limit.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use cri_shim::api;
use cri_shim::api::image_service_client::ImageServiceClient;
use cri_shim::api::runtime_service_client::RuntimeServiceClient;
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use super::{EventStream, ExecOutput, Result, Runtime, RuntimeError, RuntimeErrorKind};
use crate::metrics::METRICS;
use crate::traces;

/// Largest answer taken from a runtime: lists of everything on a crowded node fit well.
const MAX_MESSAGE: usize = 16 << 20;
/// A pull may take long on a slow line; the runtime ends one that makes no progress.
const PULL_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// What an exec gets where the caller sets no limit.
const EXEC_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why an endpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Not a unix socket address.
    #[error(
        "container runtime endpoint {0:?}: expected unix:///path/to/socket; give --container-runtime-endpoint such an address"
    )]
    Scheme(String),
}

/// The channel, with the span that a call is of.
type Traced =
    InterceptedService<Channel, fn(Request<()>) -> std::result::Result<Request<()>, Status>>;

/// A container runtime behind a unix socket.
#[derive(Clone)]
pub struct CriRuntime {
    runtime: RuntimeServiceClient<Traced>,
    image: ImageServiceClient<Traced>,
    timeout: Duration,
    socket: PathBuf,
}

impl CriRuntime {
    /// A client of the runtime at `endpoint` (`unix:///run/...` or a bare path). Does not connect
    /// yet. `timeout` bounds each request that does not itself wait for something.
    pub fn new(endpoint: &str, timeout: Duration) -> std::result::Result<Self, EndpointError> {
        let socket = endpoint_path(endpoint)?;
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(&path).await.map(TokioIo::new) }
        });
        // The address names nobody: the connector above decides where bytes go.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(Duration::from_secs(10))
            .connect_with_connector_lazy(connector);
        let channel: Traced = InterceptedService::new(channel, traces::in_metadata);
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            image: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
            timeout,
            socket,
        })
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        timeout: Duration,
        request: impl Future<Output = std::result::Result<Response<T>, Status>> + Send,
    ) -> Result<T> {
        let began = std::time::Instant::now();
        let span = traces::runtime_call(verb);
        let request = traces::within(span.as_ref(), request);
        let answer = tokio::time::timeout(timeout, request).await;
        METRICS.runtime_operation(verb, began.elapsed(), !matches!(answer, Ok(Ok(_))));
        if let Some(span) = &span {
            let error = match &answer {
                Ok(answer) => answer.as_ref().err().map(|status| status.message().to_owned()),
                Err(_) => Some("no answer in time".to_owned()),
            };
            traces::ended(span, Vec::new(), error);
        }
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(runtime_error(verb, &status)),
            Err(_) => Err(RuntimeError {
                verb,
                kind: RuntimeErrorKind::Timeout,
                message: format!(
                    "no answer from {} within {} s",
                    self.socket.display(),
                    timeout.as_secs()
                ),
            }),
        }
    }
}

fn endpoint_path(endpoint: &str) -> std::result::Result<PathBuf, EndpointError> {
    let path = match endpoint.split_once("://") {
        Some(("unix", path)) => path,
        None => endpoint.strip_prefix("unix:").unwrap_or(endpoint),
        Some(_) => return Err(EndpointError::Scheme(endpoint.to_owned())),
    };
    if path.starts_with('/') {
        Ok(path.into())
    } else {
        Err(EndpointError::Scheme(endpoint.to_owned()))
    }
}

fn runtime_error(verb: &'static str, status: &Status) -> RuntimeError {
    let kind = match status.code() {
        Code::NotFound => RuntimeErrorKind::NotFound,
        Code::Unimplemented => RuntimeErrorKind::Unimplemented,
        Code::Unavailable => RuntimeErrorKind::Unavailable,
        Code::DeadlineExceeded => RuntimeErrorKind::Timeout,
        _ => RuntimeErrorKind::Failed,
    };
    RuntimeError { verb, kind, message: status.message().to_owned() }
}

/// A removal of what is not there has succeeded.
fn gone_is_done<T: Default>(result: Result<T>) -> Result<T> {
    match result {
        Err(error) if error.is_not_found() => Ok(T::default()),
        other => other,
    }
}

/// The wire carries whole seconds: nobody gets less time than was meant.
fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

fn uid_selector(pod_uid: &str) -> HashMap<String, String> {
    HashMap::from([("io.kubernetes.pod.uid".to_owned(), pod_uid.to_owned())])
}

fn image_spec(image: &str) -> Option<api::ImageSpec> {
    Some(api::ImageSpec { image: image.to_owned(), ..Default::default() })
}

#[async_trait]
impl Runtime for CriRuntime {
    async fn version(&self) -> Result<api::VersionResponse> {
        let mut client = self.runtime.clone();
        let request = api::VersionRequest { version: "v1".into() };
        self.call("Version", self.timeout, client.version(request)).await
    }

    async fn status(&self) -> Result<api::StatusResponse> {
        let mut client = self.runtime.clone();
        let request = api::StatusRequest { verbose: false };
        self.call("Status", self.timeout, client.status(request)).await
    }

    async fn cgroup_driver(&self) -> Result<Option<api::CgroupDriver>> {
        let mut client = self.runtime.clone();
        let request = client.runtime_config(api::RuntimeConfigRequest {});
        match self.call("RuntimeConfig", self.timeout, request).await {
            Ok(response) => Ok(response.linux.map(|linux| linux.cgroup_driver())),
            // containerd before 2.0.
            Err(error) if error.kind == RuntimeErrorKind::Unimplemented => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn update_runtime_config(&self, pod_cidr: &str) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::UpdateRuntimeConfigRequest {
            runtime_config: Some(api::RuntimeConfig {
                network_config: Some(api::NetworkConfig { pod_cidr: pod_cidr.to_owned() }),
            }),
        };
        self.call("UpdateRuntimeConfig", self.timeout, client.update_runtime_config(request))
            .await
            .map(drop)
    }

    async fn run_pod_sandbox(
        &self,
        config: api::PodSandboxConfig,
        handler: &str,
    ) -> Result<String> {
        let mut client = self.runtime.clone();
        let request =
            api::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        // A runtime may have to pull its pause image first: twice the usual time, as kubelet gives.
        let timeout = self.timeout * 2;
        let response = self.call("RunPodSandbox", timeout, client.run_pod_sandbox(request)).await?;
        Ok(response.pod_sandbox_id)
    }

    async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let done = self.call("StopPodSandbox", self.timeout, client.stop_pod_sandbox(request));
        gone_is_done(done.await).map(drop)
    }

    async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let done = self.call("RemovePodSandbox", self.timeout, client.remove_pod_sandbox(request));
        gone_is_done(done.await).map(drop)
    }

    async fn pod_sandbox_status(&self, id: &str) -> Result<api::PodSandboxStatusResponse> {
        let mut client = self.runtime.clone();
        let request =
            api::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        self.call("PodSandboxStatus", self.timeout, client.pod_sandbox_status(request)).await
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<api::PodSandbox>> {
        let mut client = self.runtime.clone();
        let filter = pod_uid.map(|uid| api::PodSandboxFilter {
            label_selector: uid_selector(uid),
            ..Default::default()
        });
        let request = api::ListPodSandboxRequest { filter };
        let response =
            self.call("ListPodSandbox", self.timeout, client.list_pod_sandbox(request)).await?;
        Ok(response.items)
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: api::ContainerConfig,
        sandbox_config: api::PodSandboxConfig,
    ) -> Result<String> {
        let mut client = self.runtime.clone();
        let request = api::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let response =
            self.call("CreateContainer", self.timeout, client.create_container(request)).await?;
        Ok(response.container_id)
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::StartContainerRequest { container_id: id.to_owned() };
        self.call("StartContainer", self.timeout, client.start_container(request)).await.map(drop)
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: i64::try_from(whole_seconds(grace)).unwrap_or(i64::MAX),
        };
        let timeout = self.timeout + grace;
        let done = self.call("StopContainer", timeout, client.stop_container(request));
        gone_is_done(done.await).map(drop)
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::RemoveContainerRequest { container_id: id.to_owned() };
        let done = self.call("RemoveContainer", self.timeout, client.remove_container(request));
        gone_is_done(done.await).map(drop)
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<api::Container>> {
        let mut client = self.runtime.clone();
        let filter = pod_uid.map(|uid| api::ContainerFilter {
            label_selector: uid_selector(uid),
            ..Default::default()
        });
        let request = api::ListContainersRequest { filter };
        let response =
            self.call("ListContainers", self.timeout, client.list_containers(request)).await?;
        Ok(response.containers)
    }

    async fn container_status(&self, id: &str) -> Result<api::ContainerStatus> {
        let mut client = self.runtime.clone();
        let request = api::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let response =
            self.call("ContainerStatus", self.timeout, client.container_status(request)).await?;
        response.status.ok_or_else(|| RuntimeError {
            verb: "ContainerStatus",
            kind: RuntimeErrorKind::Failed,
            message: format!("the runtime sent no status of container {id}"),
        })
    }

    async fn update_container_resources(
        &self,
        id: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        let done = client.update_container_resources(request);
        self.call("UpdateContainerResources", self.timeout, done).await.map(drop)
    }

    async fn update_pod_sandbox_resources(
        &self,
        id: &str,
        overhead: api::LinuxContainerResources,
        resources: api::LinuxContainerResources,
    ) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.to_owned(),
            overhead: Some(overhead),
            resources: Some(resources),
        };
        let done = client.update_pod_sandbox_resources(request);
        self.call("UpdatePodSandboxResources", self.timeout, done).await.map(drop)
    }

    async fn reopen_container_log(&self, id: &str) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::ReopenContainerLogRequest { container_id: id.to_owned() };
        let done = client.reopen_container_log(request);
        self.call("ReopenContainerLog", self.timeout, done).await.map(drop)
    }

    async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: Duration,
    ) -> Result<ExecOutput> {
        let mut client = self.runtime.clone();
        let request = api::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.to_vec(),
            timeout: i64::try_from(whole_seconds(timeout)).unwrap_or(i64::MAX),
        };
        // The runtime keeps the time itself; ours is only for a runtime that hangs.
        let limit = if timeout.is_zero() { EXEC_TIMEOUT } else { self.timeout + timeout };
        let response = self.call("ExecSync", limit, client.exec_sync(request)).await?;
        Ok(ExecOutput {
            exit_code: response.exit_code,
            stdout: response.stdout,
            stderr: response.stderr,
        })
    }

    async fn checkpoint_container(&self, id: &str, location: &str, timeout: i64) -> Result<()> {
        let mut client = self.runtime.clone();
        let request = api::CheckpointContainerRequest {
            container_id: id.to_owned(),
            location: location.to_owned(),
            timeout,
        };
        let limit = self.timeout + Duration::from_secs(timeout.max(0).unsigned_abs());
        let done = client.checkpoint_container(request);
        self.call("CheckpointContainer", limit, done).await.map(drop)
    }

    async fn exec(&self, request: api::ExecRequest) -> Result<String> {
        let mut client = self.runtime.clone();
        Ok(self.call("Exec", self.timeout, client.exec(request)).await?.url)
    }

    async fn attach(&self, request: api::AttachRequest) -> Result<String> {
        let mut client = self.runtime.clone();
        Ok(self.call("Attach", self.timeout, client.attach(request)).await?.url)
    }

    async fn port_forward(&self, request: api::PortForwardRequest) -> Result<String> {
        let mut client = self.runtime.clone();
        Ok(self.call("PortForward", self.timeout, client.port_forward(request)).await?.url)
    }

    async fn list_container_stats(
        &self,
        sandbox: Option<&str>,
    ) -> Result<Vec<api::ContainerStats>> {
        let mut client = self.runtime.clone();
        let filter = sandbox.map(|id| api::ContainerStatsFilter {
            pod_sandbox_id: id.to_owned(),
            ..Default::default()
        });
        let request = api::ListContainerStatsRequest { filter };
        let done = client.list_container_stats(request);
        Ok(self.call("ListContainerStats", self.timeout, done).await?.stats)
    }

    async fn list_pod_sandbox_stats(&self) -> Result<Vec<api::PodSandboxStats>> {
        let mut client = self.runtime.clone();
        let done = client.list_pod_sandbox_stats(api::ListPodSandboxStatsRequest::default());
        Ok(self.call("ListPodSandboxStats", self.timeout, done).await?.stats)
    }

    async fn container_events(&self) -> Result<EventStream> {
        let mut client = self.runtime.clone();
        // A server may send its headers only with the first event, so opening is part of the
        // stream, and takes as long as it takes.
        let open = async move { client.get_container_events(api::GetEventsRequest {}).await };
        let stream = futures::stream::once(open)
            .flat_map(|opened| match opened {
                Ok(response) => response.into_inner().boxed(),
                Err(status) => futures::stream::once(async { Err(status) }).boxed(),
            })
            .map(|event| event.map_err(|status| runtime_error("GetContainerEvents", &status)));
        Ok(stream.boxed())
    }

    async fn list_images(&self) -> Result<Vec<api::Image>> {
        let mut client = self.image.clone();
        let request = api::ListImagesRequest { filter: None };
        Ok(self.call("ListImages", self.timeout, client.list_images(request)).await?.images)
    }

    async fn image_status(&self, image: &str) -> Result<Option<api::Image>> {
        let mut client = self.image.clone();
        let request = api::ImageStatusRequest { image: image_spec(image), verbose: false };
        match self.call("ImageStatus", self.timeout, client.image_status(request)).await {
            Ok(response) => Ok(response.image),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn pull_image(
        &self,
        image: &str,
        auth: Option<api::AuthConfig>,
        sandbox_config: Option<api::PodSandboxConfig>,
    ) -> Result<String> {
        let mut client = self.image.clone();
        let request = api::PullImageRequest { image: image_spec(image), auth, sandbox_config };
        Ok(self.call("PullImage", PULL_TIMEOUT, client.pull_image(request)).await?.image_ref)
    }

    async fn remove_image(&self, image: &str) -> Result<()> {
        let mut client = self.image.clone();
        let request = api::RemoveImageRequest { image: image_spec(image) };
        let done = self.call("RemoveImage", self.timeout, client.remove_image(request));
        gone_is_done(done.await).map(drop)
    }

    async fn image_fs_info(&self) -> Result<api::ImageFsInfoResponse> {
        let mut client = self.image.clone();
        let done = client.image_fs_info(api::ImageFsInfoRequest {});
        self.call("ImageFsInfo", self.timeout, done).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_unix_sockets() {
        for (endpoint, path) in [
            ("unix:///run/longshore/cri.sock", "/run/longshore/cri.sock"),
            ("unix:/run/x.sock", "/run/x.sock"),
            ("/run/x.sock", "/run/x.sock"),
        ] {
            assert_eq!(endpoint_path(endpoint).unwrap(), Path::new(path), "{endpoint}");
        }
        for endpoint in ["tcp://127.0.0.1:1", "run/x.sock", "npipe:////./pipe/x", ""] {
            assert!(endpoint_path(endpoint).is_err(), "{endpoint}");
        }
    }

    #[tokio::test]
    async fn a_runtime_that_is_away_is_unavailable() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = format!("unix://{}/none.sock", dir.path().display());
        let runtime = CriRuntime::new(&endpoint, Duration::from_secs(5)).unwrap();
        let error = runtime.version().await.unwrap_err();
        assert_eq!(error.kind, RuntimeErrorKind::Unavailable, "{error}");
    }
}
