//! The sync loop as a whole over the validating fake, in paused time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, ContainerStatus, Node, ObjectReference, Pod, PodStatus, Secret, Service,
};
use tokio::sync::{broadcast, mpsc, watch};

use super::cgroup::NoCgroups;
use super::clock::TokioClock;
use super::testing::at;
use super::{SyncHandle, SyncLoop};
use crate::ids::{NamespacedName, PodUid};
use crate::node::conditions::Pressure;
use crate::node::logind::Told;
use crate::node_context::{NodeContext, ShutdownGrace};
use crate::numa::Numa;
use crate::objects::{ObjectError, ObjectRef, Objects};
use crate::report::{EventSink, EventType, StatusSink};
use crate::runtime::fake::FakeRuntime;
use crate::source::{PodChange, PodSource};
use crate::volume::{VolumeError, Volumes};

mod claims;
mod converge;
mod devices;
mod explaining;
mod lifecycle;
mod numa;
mod probing;
mod resizing;
mod restarting;
mod shutting_down;
mod status;

#[derive(Default)]
struct Recorded {
    statuses: Vec<(PodUid, PodStatus)>,
    gone: Vec<PodUid>,
    events: Vec<(String, String)>,
    mounted: Vec<PodUid>,
    shown: Vec<Arc<Pod>>,
    config_maps: BTreeMap<String, Arc<ConfigMap>>,
    mount_fails: bool,
    numa: Option<Arc<Numa>>,
    devices: devices::Given,
    claims: claims::Claimed,
}

struct World {
    recorded: Mutex<Recorded>,
    objects: broadcast::Sender<ObjectRef>,
}

impl StatusSink for World {
    fn publish(&self, pod: &Arc<Pod>, status: PodStatus) {
        self.recorded.lock().unwrap().statuses.push((PodUid::of(pod), status));
    }
    fn gone(&self, pod: &Arc<Pod>) {
        self.recorded.lock().unwrap().gone.push(PodUid::of(pod));
    }
}

impl EventSink for World {
    fn record(&self, _: ObjectReference, _: EventType, reason: &str, message: String) {
        self.recorded.lock().unwrap().events.push((reason.to_owned(), message));
    }
}

#[async_trait]
impl Volumes for World {
    async fn mount(&self, pod: &Arc<Pod>) -> Result<(), VolumeError> {
        let mut recorded = self.recorded.lock().unwrap();
        if recorded.mount_fails {
            return Err(VolumeError::Invalid { volume: "v".into(), reason: "told to".into() });
        }
        recorded.mounted.push(PodUid::of(pod));
        Ok(())
    }
    fn pod_changed(&self, pod: &Arc<Pod>) {
        self.recorded.lock().unwrap().shown.push(pod.clone());
    }
    async fn container_mounts(
        &self,
        pod: &Pod,
        container: &Container,
        _: u32,
    ) -> Result<Vec<cri_shim::api::Mount>, VolumeError> {
        let mounted =
            |name: &str| container.volume_mounts.iter().flatten().any(|mount| mount.name == name);
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let image = |volume: &k8s_openapi::api::core::v1::Volume| cri_shim::api::Mount {
            image: volume.image.as_ref().map(|image| cri_shim::api::ImageSpec {
                user_specified_image: image.reference.clone().unwrap_or_default(),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(volumes.filter(|v| v.image.is_some() && mounted(&v.name)).map(image).collect())
    }
    fn container_devices(
        &self,
        _: &Pod,
        container: &Container,
    ) -> Result<Vec<cri_shim::api::Device>, VolumeError> {
        let device = |device: &k8s_openapi::api::core::v1::VolumeDevice| cri_shim::api::Device {
            container_path: device.device_path.clone(),
            host_path: format!("/links/{}", device.name),
            permissions: "mrw".into(),
        };
        Ok(container.volume_devices.iter().flatten().map(device).collect())
    }
    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError> {
        self.recorded.lock().unwrap().mounted.retain(|m| m != uid);
        Ok(())
    }
    async fn on_disk(&self) -> Result<Vec<PodUid>, VolumeError> {
        Ok(self.recorded.lock().unwrap().mounted.clone())
    }
}

#[async_trait]
impl Objects for World {
    async fn config_map(
        &self,
        key: &NamespacedName,
    ) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        Ok(self.recorded.lock().unwrap().config_maps.get(&*key.name).cloned())
    }
    async fn secret(&self, _: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError> {
        Ok(None)
    }
    async fn service_account_token(
        &self,
        _: &NamespacedName,
        _: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError> {
        Err(ObjectError::Standalone { what: "a token" })
    }
    async fn runtime_handler(&self, class: &str) -> Result<Option<String>, ObjectError> {
        Ok((class == "sandboxed").then(|| "kata".to_owned()))
    }
    fn services(&self, _: &str) -> Vec<Arc<Service>> {
        Vec::new()
    }
    fn node(&self) -> Option<Arc<Node>> {
        None
    }
    fn retain(&self, _: &Pod) {}
    fn release(&self, _: &PodUid) {}
    fn changes(&self) -> broadcast::Receiver<ObjectRef> {
        self.objects.subscribe()
    }
}

/// A node: the loop, the fake runtime, and what they told.
struct Rig {
    dir: tempfile::TempDir,
    runtime: FakeRuntime,
    world: Arc<World>,
    clock: TokioClock,
    changes: mpsc::Sender<PodChange>,
    shutdown: watch::Sender<bool>,
    network: watch::Sender<bool>,
    pressure: watch::Sender<Pressure>,
    shutdowns: mpsc::Sender<Told>,
    shutting_down: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    handle: SyncHandle,
}

impl Rig {
    async fn new() -> Self {
        Self::with(true).await
    }

    async fn with(events: bool) -> Self {
        let clock = TokioClock::starting_at(at(0));
        let runtime = FakeRuntime::new(Arc::new(clock), events);
        runtime.add_image("img:1");
        let world =
            Arc::new(World { recorded: Mutex::default(), objects: broadcast::Sender::new(16) });
        let dir = tempfile::tempdir().unwrap();
        let network = watch::Sender::new(true);
        let pressure = watch::Sender::new(Pressure::default());
        let (shutdowns, shutdowns_told) = mpsc::channel(1);
        let shutting_down = watch::Sender::new(false);
        let told = (network.subscribe(), pressure.subscribe());
        let of_shutdowns = (shutdowns_told, shutting_down.clone());
        let (changes, shutdown, task, handle) =
            begin(&dir, &runtime, &world, clock, told, of_shutdowns).await;
        let rig = Self {
            dir,
            runtime,
            world,
            clock,
            changes,
            shutdown,
            network,
            pressure,
            shutdowns,
            shutting_down,
            task,
            handle,
        };
        rig.send(PodChange::Synced(PodSource::File)).await;
        rig
    }

    /// Kills the agent at once and starts it anew; the runtime goes on.
    async fn restart(&mut self, pods: &[Arc<Pod>]) {
        self.task.abort();
        let _ = (&mut self.task).await;
        let told = (self.network.subscribe(), self.pressure.subscribe());
        let (shutdowns, shutdowns_told) = mpsc::channel(1);
        self.shutdowns = shutdowns;
        self.shutting_down = watch::Sender::new(false);
        let of_shutdowns = (shutdowns_told, self.shutting_down.clone());
        let (changes, shutdown, task, handle) =
            begin(&self.dir, &self.runtime, &self.world, self.clock, told, of_shutdowns).await;
        self.changes = changes;
        self.shutdown = shutdown;
        self.task = task;
        self.handle = handle;
        for pod in pods {
            self.send(PodChange::Set(PodSource::File, pod.clone())).await;
        }
        self.send(PodChange::Synced(PodSource::File)).await;
    }

    async fn send(&self, change: PodChange) {
        self.changes.send(change).await.unwrap();
    }

    async fn set(&self, pod: &Arc<Pod>) {
        self.send(PodChange::Set(PodSource::File, pod.clone())).await;
    }

    fn status(&self, uid: &str) -> Option<PodStatus> {
        let recorded = self.world.recorded.lock().unwrap();
        recorded.statuses.iter().rev().find(|(u, _)| u.as_str() == uid).map(|(_, s)| s.clone())
    }

    fn container(&self, uid: &str, name: &str) -> ContainerStatus {
        let status = self.status(uid).unwrap();
        let lists = [status.container_statuses, status.init_container_statuses];
        lists.into_iter().flatten().flatten().find(|c| c.name == name).unwrap()
    }

    fn events(&self) -> Vec<(String, String)> {
        self.world.recorded.lock().unwrap().events.clone()
    }

    fn reasons(&self) -> Vec<String> {
        self.events().into_iter().map(|(reason, _)| reason).collect()
    }

    fn gone(&self, uid: &str) -> bool {
        self.world.recorded.lock().unwrap().gone.iter().any(|u| u.as_str() == uid)
    }

    /// Waits (in paused time) until `what` holds.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..200_000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // A guard that lives on in the arguments would be in the way of the next one.
        let status = self.world.recorded.lock().unwrap().statuses.last().cloned();
        panic!(
            "never: {what}\nstatus: {status:#?}\nevents: {:#?}\ncalls: {:#?}",
            self.events(),
            self.runtime.calls()
        );
    }

    async fn until_phase(&self, uid: &str, phase: &str) {
        self.until(&format!("{uid} {phase}"), |r| {
            r.status(uid).is_some_and(|s| s.phase.as_deref() == Some(phase))
        })
        .await;
    }

    async fn until_ready(&self, uid: &str) {
        self.until(&format!("{uid} ready"), |r| r.status(uid).is_some_and(|s| is_ready(&s))).await;
    }

    async fn sleep(&self, seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}

async fn begin(
    dir: &tempfile::TempDir,
    runtime: &FakeRuntime,
    world: &Arc<World>,
    clock: TokioClock,
    (network, pressure): (watch::Receiver<bool>, watch::Receiver<Pressure>),
    (shutdowns, shutting_down): (mpsc::Receiver<Told>, watch::Sender<bool>),
) -> (mpsc::Sender<PodChange>, watch::Sender<bool>, tokio::task::JoinHandle<()>, SyncHandle) {
    let node = Arc::new(NodeContext {
        root_dir: dir.path().join("kubelet"),
        pod_logs_dir: dir.path().join("logs"),
        container_logs_dir: dir.path().join("links"),
        runtime_rotates_logs: true,
        allocatable_milli_cpu: 4000,
        shutdown_grace: vec![
            ShutdownGrace { priority: 0, seconds: 20 },
            ShutdownGrace { priority: 2_000_000_000, seconds: 10 },
        ],
        ..NodeContext::new("n", vec!["192.168.0.1".parse().unwrap()])
    });
    let sync = SyncLoop::new(
        node,
        Arc::new(runtime.clone()),
        world.clone(),
        world.clone(),
        world.clone(),
        world.clone(),
    )
    .with_devices(world.clone())
    .with_claims(world.clone())
    .with_numa(world.recorded.lock().unwrap().numa.clone())
    .with_network(network)
    .with_pressure(pressure)
    .with_shutdowns(shutdowns, shutting_down)
    .with_cgroups(Arc::new(NoCgroups))
    .with_clock(Arc::new(clock));
    let handle = sync.handle();
    let (changes, receiver) = mpsc::channel(64);
    let (shutdown, stop) = watch::channel(false);
    let task = tokio::spawn(sync.run(receiver, stop));
    (changes, shutdown, task, handle)
}

fn is_ready(status: &PodStatus) -> bool {
    condition(status, "Ready") == Some("True")
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> Option<&'a str> {
    status.conditions.as_ref()?.iter().find(|c| c.type_ == kind).map(|c| &*c.status)
}

fn named(uid: &str, spec: &str) -> Arc<Pod> {
    let mut pod = super::testing::pod(spec);
    pod.metadata.uid = Some(uid.to_owned());
    pod.metadata.name = Some(format!("pod-{uid}"));
    Arc::new(pod)
}

fn deleted(pod: &Pod, grace: i64) -> Arc<Pod> {
    let mut pod = pod.clone();
    pod.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    Arc::new(pod)
}

const ONE: &str =
    r#"{"containers":[{"name":"c","image":"img:1","imagePullPolicy":"IfNotPresent"}]}"#;
