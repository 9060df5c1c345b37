//! Which devices (of plugins, of claims), CPUs and memory the containers of this node have to themselves: the PodResources API
//! (`podresources/v1`) at `<root-dir>/pod-resources/kubelet.sock`.
//!
//! Monitors of devices (DCGM exporters), network plugins (Multus) and topology exporters ask it, often
//! all at once after a restart, so it has a limit: more than kubelet would answer is refused alike.

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::device::{ByResource, Devices};
use crate::dra::{Device, Dra, OfClaim};
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::{METRICS, PodResourcesCall};
use crate::plugins::authority;
use crate::pod::spec::{init_containers, is_sidecar, spec_of};
use crate::pod::status::is_terminal;
use crate::pod::{PodTable, PodView};
use crate::token_bucket::TokenBucket;

/// The generated messages of the API.
#[allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]
mod wire {
    tonic::include_proto!("v1");
}

use wire::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};

/// So many calls at once, and one more each time this passes, as under kubelet.
const BURST: f64 = 10.0;
const EACH: Duration = Duration::from_millis(10);

/// Memory of one kind that a container has to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// `memory`, `hugepages-2Mi`, ...
    pub kind: String,
    /// Bytes.
    pub bytes: u64,
    /// Where it is.
    pub numa: BTreeSet<i64>,
}

/// Who knows what CPUs and memory containers have to themselves.
pub trait Exclusive: Send + Sync {
    /// CPUs of the container.
    fn cpu_ids(&self, uid: &PodUid, container: &str) -> Vec<i64>;
    /// Memory of the container.
    fn memory(&self, uid: &PodUid, container: &str) -> Vec<Memory>;
    /// CPUs that containers may have to themselves.
    fn allocatable_cpu_ids(&self) -> Vec<i64>;
    /// Memory that containers may have to themselves.
    fn allocatable_memory(&self) -> Vec<Memory>;
}

/// CPUs and memory are everybody's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shared;

impl Exclusive for Shared {
    fn cpu_ids(&self, _: &PodUid, _: &str) -> Vec<i64> {
        Vec::new()
    }

    fn memory(&self, _: &PodUid, _: &str) -> Vec<Memory> {
        Vec::new()
    }

    fn allocatable_cpu_ids(&self) -> Vec<i64> {
        Vec::new()
    }

    fn allocatable_memory(&self) -> Vec<Memory> {
        Vec::new()
    }
}

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {source}", path.display())]
pub struct PodResourcesError {
    operation: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

/// Listens under `root`, in the place of whoever did before.
///
/// # Errors
/// If the socket cannot be made.
pub fn listen(root: &Path) -> Result<UnixListener, PodResourcesError> {
    let folder = root.join("pod-resources");
    let error = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| PodResourcesError { operation, path, source }
    };
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o750).create(&folder).map_err(error("create", &folder))?;
    // Made under another name: whoever looks for it finds one that answers.
    let (path, new) = (folder.join("kubelet.sock"), folder.join(".kubelet.sock.new"));
    for old in [&path, &new] {
        match std::fs::remove_file(old) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                return Err(error("remove", old)(cause));
            }
            _ => {}
        }
    }
    let listener = UnixListener::bind(&new).map_err(error("listen on", &new))?;
    std::fs::rename(&new, &path).map_err(error("put in place", &path))?;
    Ok(listener)
}

/// Answers at `listener` until `shutdown` turns true.
///
/// # Errors
/// If the socket fails.
pub async fn serve(
    listener: UnixListener,
    pods: PodTable,
    devices: Arc<Devices>,
    claims: Arc<Dra>,
    exclusive: Arc<dyn Exclusive>,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let bucket = Mutex::new(TokenBucket::new(BURST, EACH));
    let lister = Lister { pods, devices, claims, exclusive, bucket };
    let end = async move { crate::shutdown::requested(&mut shutdown).await };
    Server::builder()
        .add_service(PodResourcesListerServer::new(lister))
        .serve_with_incoming_shutdown(authority::incoming(listener), end)
        .await?;
    Ok(())
}

struct Lister {
    pods: PodTable,
    devices: Arc<Devices>,
    claims: Arc<Dra>,
    exclusive: Arc<dyn Exclusive>,
    bucket: Mutex<TokenBucket>,
}

fn topology(nodes: impl IntoIterator<Item = i64>) -> Option<wire::TopologyInfo> {
    let nodes: Vec<_> = nodes.into_iter().map(|id| wire::NumaNode { id }).collect();
    (!nodes.is_empty()).then_some(wire::TopologyInfo { nodes })
}

/// Each device by itself, once for each NUMA node that it is near to, as kubelet tells them.
fn devices(all: ByResource) -> Vec<wire::ContainerDevices> {
    let mut told = Vec::new();
    for (resource, devices) in all {
        for (id, nodes) in devices {
            let one = |topology| wire::ContainerDevices {
                resource_name: resource.clone(),
                device_ids: vec![id.clone()],
                topology,
            };
            if nodes.is_empty() {
                told.push(one(None));
            }
            told.extend(nodes.into_iter().map(|node| one(topology([node]))));
        }
    }
    told
}

fn claimed(all: Vec<OfClaim>) -> Vec<wire::DynamicResource> {
    let device = |(driver, device): (String, Device)| wire::ClaimResource {
        cdi_devices: device.cdi.into_iter().map(|name| wire::CdiDevice { name }).collect(),
        driver_name: driver,
        pool_name: device.pool,
        device_name: device.device,
        share_id: device.share,
    };
    let claim = |OfClaim { claim, devices }: OfClaim| wire::DynamicResource {
        claim_name: claim.name.to_string(),
        claim_namespace: claim.namespace.to_string(),
        claim_resources: devices.into_iter().map(device).collect(),
    };
    all.into_iter().map(claim).collect()
}

fn memory(all: Vec<Memory>) -> Vec<wire::ContainerMemory> {
    let told = |Memory { kind, bytes, numa }| wire::ContainerMemory {
        memory_type: kind,
        size: bytes,
        topology: Some(topology(numa).unwrap_or_default()),
    };
    all.into_iter().map(told).collect()
}

/// Whether the pod may still use the node.
fn is_active(view: &PodView) -> bool {
    view.source.is_some() && !view.finished && !is_terminal(view.status.phase.as_deref())
}

impl Lister {
    fn admit(&self) -> Result<(), Status> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if bucket.take(Instant::now()) {
            Ok(())
        } else {
            Err(Status::resource_exhausted("rejected by rate limit"))
        }
    }

    fn of_pod(&self, pod: &Pod) -> wire::PodResources {
        let (key, uid, spec) = (NamespacedName::of_pod(pod), PodUid::of(pod), spec_of(pod));
        let sidecars = init_containers(spec).iter().filter(|c| is_sidecar(c));
        let containers = sidecars.chain(&spec.containers).map(|c| wire::ContainerResources {
            name: c.name.clone(),
            devices: devices(self.devices.of_container(&uid, &c.name)),
            cpu_ids: self.exclusive.cpu_ids(&uid, &c.name),
            memory: memory(self.exclusive.memory(&uid, &c.name)),
            dynamic_resources: claimed(self.claims.of_container(pod, c)),
        });
        wire::PodResources {
            name: key.name.to_string(),
            namespace: key.namespace.to_string(),
            containers: containers.collect(),
        }
    }
}

#[async_trait::async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<wire::ListPodResourcesRequest>,
    ) -> Result<Response<wire::ListPodResourcesResponse>, Status> {
        self.admit()?;
        METRICS.pod_resources_asked(PodResourcesCall::List, false);
        let pods = self.pods.pods();
        let active = pods.iter().filter(|view| is_active(view));
        let pod_resources = active.map(|view| self.of_pod(&view.pod)).collect();
        Ok(Response::new(wire::ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<wire::AllocatableResourcesRequest>,
    ) -> Result<Response<wire::AllocatableResourcesResponse>, Status> {
        self.admit()?;
        METRICS.pod_resources_asked(PodResourcesCall::Allocatable, false);
        Ok(Response::new(wire::AllocatableResourcesResponse {
            devices: devices(self.devices.usable()),
            cpu_ids: self.exclusive.allocatable_cpu_ids(),
            memory: memory(self.exclusive.allocatable_memory()),
        }))
    }

    async fn get(
        &self,
        request: Request<wire::GetPodResourcesRequest>,
    ) -> Result<Response<wire::GetPodResourcesResponse>, Status> {
        self.admit()?;
        let wire::GetPodResourcesRequest { pod_name, pod_namespace } = request.into_inner();
        let found = self.pods.named(&pod_namespace, &pod_name);
        METRICS.pod_resources_asked(PodResourcesCall::Get, found.is_none());
        let view = found.ok_or_else(|| {
            Status::unknown(format!("pod {pod_name} in namespace {pod_namespace} not found"))
        })?;
        let pod_resources = Some(self.of_pod(&view.pod));
        Ok(Response::new(wire::GetPodResourcesResponse { pod_resources }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_one_by_one_and_node_by_node() {
        let all = ByResource::from([(
            "example.com/dev".into(),
            [("a".into(), [0, 1].into()), ("b".into(), [].into())].into(),
        )]);
        let told: Vec<_> = devices(all)
            .into_iter()
            .map(|d| {
                let nodes = d.topology.map(|t| t.nodes.iter().map(|n| n.id).collect::<Vec<_>>());
                (d.device_ids.join(","), nodes)
            })
            .collect();
        let id = |id: &str| id.to_owned();
        assert_eq!(told, [(id("a"), Some(vec![0])), (id("a"), Some(vec![1])), (id("b"), None)]);
    }

    #[tokio::test]
    async fn the_socket_takes_the_place_of_an_old_one() {
        let root = tempfile::tempdir().unwrap();
        drop(listen(root.path()).unwrap());
        let _listening = listen(root.path()).unwrap();
        let folder = root.path().join("pod-resources");
        let names: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["kubelet.sock"]);
        assert!(tokio::net::UnixStream::connect(folder.join("kubelet.sock")).await.is_ok());
    }
}
