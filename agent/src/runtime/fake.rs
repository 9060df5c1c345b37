//! A runtime that keeps everything in memory, for tests. It refuses what a real one would refuse:
//! a second sandbox of the same name and attempt, a container in a sandbox that is not ready or
//! from an image that is not there, a second start.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use cri_shim::api;
use futures::StreamExt;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;

use super::{EventStream, ExecOutput, Result, Runtime, RuntimeError, RuntimeErrorKind};
use crate::pod::clock::Clock;

/// How containers of one name behave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Behaviour {
    /// Ends by itself after so long, with `exit_code`.
    pub runs_for: Option<Duration>,
    /// Exit code of its own end.
    pub exit_code: i32,
    /// Takes so long to end after SIGTERM (exit code 143, or 137 where the grace is shorter).
    pub ends_in: Duration,
}

#[derive(Clone, Debug)]
struct Container {
    config: api::ContainerConfig,
    sandbox: String,
    state: api::ContainerState,
    created: i64,
    started: i64,
    finished: i64,
    exit_code: i32,
    reason: String,
}

#[derive(Clone, Debug)]
struct Sandbox {
    config: api::PodSandboxConfig,
    ready: bool,
    created: i64,
    ip: String,
}

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, Container>,
    images: BTreeMap<String, api::Image>,
    registry: BTreeMap<String, api::Image>,
    behaviours: HashMap<String, Behaviour>,
    exec: HashMap<String, ExecOutput>,
    memory: HashMap<String, u64>,
    faults: HashMap<&'static str, VecDeque<String>>,
    delays: HashMap<&'static str, Duration>,
    calls: Vec<String>,
    next: u32,
}

struct Inner {
    state: Mutex<State>,
    events: broadcast::Sender<api::ContainerEventResponse>,
    clock: Arc<dyn Clock>,
    with_events: bool,
}

/// The fake; clones share it.
#[derive(Clone)]
pub struct FakeRuntime(Arc<Inner>);

fn refuse(verb: &'static str, kind: RuntimeErrorKind, message: impl Into<String>) -> RuntimeError {
    RuntimeError { verb, kind, message: message.into() }
}

fn failed(verb: &'static str, message: impl Into<String>) -> RuntimeError {
    refuse(verb, RuntimeErrorKind::Failed, message)
}

fn not_found(verb: &'static str, id: &str) -> RuntimeError {
    refuse(verb, RuntimeErrorKind::NotFound, format!("{id}: not found"))
}

impl FakeRuntime {
    /// An empty runtime. `with_events` is whether it has an event stream.
    pub fn new(clock: Arc<dyn Clock>, with_events: bool) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            events: broadcast::Sender::new(1024),
            clock,
            with_events,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> i64 {
        i64::try_from(self.0.clock.now().as_nanosecond()).unwrap_or(i64::MAX)
    }

    fn image(name: &str) -> api::Image {
        api::Image {
            id: format!("sha256:{name}"),
            repo_tags: vec![name.to_owned()],
            repo_digests: vec![format!("{name}@sha256:0")],
            size: 1000,
            uid: Some(api::Int64Value { value: 0 }),
            ..Default::default()
        }
    }

    /// Puts an image on the node.
    pub fn add_image(&self, name: &str) {
        self.state().images.insert(name.to_owned(), Self::image(name));
    }

    /// Puts an image where it can be pulled from.
    pub fn publish_image(&self, name: &str) {
        self.state().registry.insert(name.to_owned(), Self::image(name));
    }

    /// Sets how containers named `name` behave.
    pub fn behave(&self, name: &str, behaviour: Behaviour) {
        self.state().behaviours.insert(name.to_owned(), behaviour);
    }

    /// Sets what a command (its first word) gives.
    pub fn on_exec(&self, command: &str, output: ExecOutput) {
        self.state().exec.insert(command.to_owned(), output);
    }

    /// Sets how many bytes of memory containers named `name` use.
    pub fn use_memory(&self, name: &str, bytes: u64) {
        self.state().memory.insert(name.to_owned(), bytes);
    }

    /// Makes the next call of `verb` fail.
    pub fn fail_next(&self, verb: &'static str, message: &str) {
        self.state().faults.entry(verb).or_default().push_back(message.to_owned());
    }

    /// Makes every call of `verb` take so long; of ContainerStatus, its answer.
    pub fn delay(&self, verb: &'static str, time: Duration) {
        self.state().delays.insert(verb, time);
    }

    /// Verbs called so far that change something, with what they were about.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    /// Names and attempts of running containers.
    pub fn running(&self) -> Vec<(String, u32)> {
        let state = self.state();
        let running = state
            .containers
            .values()
            .filter(|c| c.state == api::ContainerState::ContainerRunning)
            .filter_map(|c| c.config.metadata.clone());
        running.map(|m| (m.name, m.attempt)).collect()
    }

    /// Numbers of sandboxes and containers held.
    pub fn held(&self) -> (usize, usize) {
        let state = self.state();
        (state.sandboxes.len(), state.containers.len())
    }

    /// Ends the running container `name`.
    pub fn exit(&self, name: &str, code: i32) {
        let id = self.state().containers.iter().find_map(|(id, c)| {
            let named = c.config.metadata.as_ref().is_some_and(|m| m.name == name);
            (named && c.state == api::ContainerState::ContainerRunning).then(|| id.clone())
        });
        if let Some(id) = id {
            self.finish(&id, code, if code == 0 { "Completed" } else { "Error" });
        }
    }

    /// Takes a sandbox and all in it away, as a reboot does.
    pub fn lose_sandboxes(&self) {
        let ids: Vec<String> = self.state().containers.keys().cloned().collect();
        for id in ids {
            self.finish(&id, 255, "Unknown");
        }
        let sandboxes: Vec<String> = self.state().sandboxes.keys().cloned().collect();
        for id in sandboxes {
            if let Some(sandbox) = self.state().sandboxes.get_mut(&id) {
                sandbox.ready = false;
            }
            self.emit(&id, api::ContainerEventType::ContainerStoppedEvent);
        }
    }

    /// The configuration that container `name` was last made from.
    pub fn config_of(&self, name: &str) -> Option<api::ContainerConfig> {
        let state = self.state();
        let named = state.containers.values().map(|c| c.config.clone());
        named
            .filter(|c| c.metadata.as_ref().is_some_and(|m| m.name == name))
            .max_by_key(|c| c.metadata.as_ref().map_or(0, |m| m.attempt))
    }

    /// Counts the call, waits and fails as told.
    async fn enter(&self, verb: &'static str, what: &str) -> Result<()> {
        let (delay, fault) = {
            let mut state = self.state();
            state.calls.push(format!("{verb} {what}"));
            let fault = state.faults.get_mut(verb).and_then(VecDeque::pop_front);
            (state.delays.get(verb).copied(), fault)
        };
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        fault.map_or(Ok(()), |message| Err(failed(verb, message)))
    }

    fn emit(&self, id: &str, kind: api::ContainerEventType) {
        let state = self.state();
        let sandbox = match state.containers.get(id) {
            Some(container) => state.sandboxes.get_key_value(&container.sandbox),
            None => state.sandboxes.get_key_value(id),
        };
        let event = api::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: self.now(),
            pod_sandbox_status: sandbox.map(|(id, s)| sandbox_status(id, s)),
            containers_statuses: Vec::new(),
        };
        drop(state);
        // Nobody may be listening.
        let _ = self.0.events.send(event);
    }

    fn finish(&self, id: &str, code: i32, reason: &str) {
        let now = self.now();
        {
            let mut state = self.state();
            let Some(container) = state.containers.get_mut(id) else { return };
            if container.state != api::ContainerState::ContainerRunning {
                return;
            }
            container.state = api::ContainerState::ContainerExited;
            container.exit_code = code;
            container.reason = reason.to_owned();
            container.finished = now;
        }
        self.emit(id, api::ContainerEventType::ContainerStoppedEvent);
    }
}

fn container_status(id: &str, c: &Container) -> api::ContainerStatus {
    let image = c.config.image.clone().unwrap_or_default();
    api::ContainerStatus {
        id: id.to_owned(),
        metadata: c.config.metadata.clone(),
        state: c.state.into(),
        created_at: c.created,
        started_at: c.started,
        finished_at: c.finished,
        exit_code: c.exit_code,
        image_ref: image.image.clone(),
        image_id: image.image.clone(),
        image: Some(image),
        reason: c.reason.clone(),
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        ..Default::default()
    }
}

fn sandbox_status(id: &str, sandbox: &Sandbox) -> api::PodSandboxStatus {
    let state = if sandbox.ready {
        api::PodSandboxState::SandboxReady
    } else {
        api::PodSandboxState::SandboxNotready
    };
    api::PodSandboxStatus {
        id: id.to_owned(),
        metadata: sandbox.config.metadata.clone(),
        state: state.into(),
        created_at: sandbox.created,
        network: Some(api::PodSandboxNetworkStatus {
            ip: sandbox.ip.clone(),
            additional_ips: Vec::new(),
        }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        ..Default::default()
    }
}

fn of_pod(labels: &HashMap<String, String>, uid: Option<&str>) -> bool {
    uid.is_none_or(|uid| labels.get("io.kubernetes.pod.uid").is_some_and(|l| l == uid))
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn version(&self) -> Result<api::VersionResponse> {
        Ok(api::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "fake".into(),
            runtime_version: "1".into(),
            runtime_api_version: "v1".into(),
        })
    }

    async fn status(&self) -> Result<api::StatusResponse> {
        let condition = |kind: &str| api::RuntimeCondition {
            r#type: kind.into(),
            status: true,
            ..Default::default()
        };
        let conditions = vec![condition("RuntimeReady"), condition("NetworkReady")];
        Ok(api::StatusResponse {
            status: Some(api::RuntimeStatus { conditions }),
            runtime_handlers: ["", "kata"]
                .map(|name| api::RuntimeHandler {
                    name: name.to_owned(),
                    features: Some(api::RuntimeHandlerFeatures {
                        user_namespaces: name.is_empty(),
                        recursive_read_only_mounts: true,
                    }),
                })
                .into(),
            ..Default::default()
        })
    }

    async fn update_runtime_config(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn run_pod_sandbox(
        &self,
        config: api::PodSandboxConfig,
        handler: &str,
    ) -> Result<String> {
        const VERB: &str = "RunPodSandbox";
        let metadata = config.metadata.clone().unwrap_or_default();
        let with = if handler.is_empty() { String::new() } else { format!(" {handler}") };
        self.enter(VERB, &format!("{} {}{with}", metadata.name, metadata.attempt)).await?;
        if metadata.name.is_empty() || metadata.uid.is_empty() || metadata.namespace.is_empty() {
            return Err(failed(VERB, "sandbox metadata is incomplete"));
        }
        let id = {
            let mut state = self.state();
            if state.sandboxes.values().any(|s| s.config.metadata.as_ref() == Some(&metadata)) {
                return Err(failed(VERB, format!("name {metadata:?} is reserved")));
            }
            state.next += 1;
            let number = state.next;
            let id = format!("sandbox{number:04}");
            let host = config
                .linux
                .as_ref()
                .and_then(|l| l.security_context.as_ref())
                .and_then(|s| s.namespace_options.as_ref())
                .is_some_and(|n| n.network() == api::NamespaceMode::Node);
            let ip = if host { String::new() } else { format!("10.88.0.{number}") };
            let created = self.now();
            state.sandboxes.insert(id.clone(), Sandbox { config, ready: true, created, ip });
            id
        };
        self.emit(&id, api::ContainerEventType::ContainerStartedEvent);
        Ok(id)
    }

    async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        self.enter("StopPodSandbox", id).await?;
        let inside: Vec<String> = {
            let state = self.state();
            let inside = state.containers.iter().filter(|(_, c)| c.sandbox == id);
            inside.map(|(id, _)| id.clone()).collect()
        };
        for container in inside {
            self.finish(&container, 137, "Error");
        }
        let stopped = {
            let mut state = self.state();
            let sandbox = state.sandboxes.get_mut(id);
            sandbox.is_some_and(|s| std::mem::replace(&mut s.ready, false))
        };
        if stopped {
            self.emit(id, api::ContainerEventType::ContainerStoppedEvent);
        }
        Ok(())
    }

    async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        const VERB: &str = "RemovePodSandbox";
        self.enter(VERB, id).await?;
        let mut state = self.state();
        if state.sandboxes.get(id).is_some_and(|s| s.ready) {
            return Err(failed(VERB, format!("sandbox {id} is not stopped")));
        }
        state.sandboxes.remove(id);
        state.containers.retain(|_, c| c.sandbox != id);
        Ok(())
    }

    async fn pod_sandbox_status(&self, id: &str) -> Result<api::PodSandboxStatusResponse> {
        let state = self.state();
        let sandbox = state.sandboxes.get(id).ok_or_else(|| not_found("PodSandboxStatus", id))?;
        Ok(api::PodSandboxStatusResponse {
            status: Some(sandbox_status(id, sandbox)),
            ..Default::default()
        })
    }

    async fn list_pod_sandboxes(&self, pod_uid: Option<&str>) -> Result<Vec<api::PodSandbox>> {
        let state = self.state();
        let all = state.sandboxes.iter().filter(|(_, s)| of_pod(&s.config.labels, pod_uid));
        Ok(all
            .map(|(id, s)| api::PodSandbox {
                id: id.clone(),
                metadata: s.config.metadata.clone(),
                state: sandbox_status(id, s).state,
                created_at: s.created,
                labels: s.config.labels.clone(),
                ..Default::default()
            })
            .collect())
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: api::ContainerConfig,
        _: api::PodSandboxConfig,
    ) -> Result<String> {
        const VERB: &str = "CreateContainer";
        let metadata = config.metadata.clone().unwrap_or_default();
        self.enter(VERB, &format!("{} {}", metadata.name, metadata.attempt)).await?;
        let id = {
            let mut state = self.state();
            let sandbox =
                state.sandboxes.get(sandbox_id).ok_or_else(|| not_found(VERB, sandbox_id))?;
            if !sandbox.ready {
                return Err(failed(VERB, format!("sandbox {sandbox_id} is not ready")));
            }
            let options = config
                .linux
                .as_ref()
                .and_then(|l| l.security_context.as_ref()?.namespace_options.as_ref());
            let of_sandbox = sandbox
                .config
                .linux
                .as_ref()
                .and_then(|l| l.security_context.as_ref()?.namespace_options.as_ref());
            if options.map(|o| &o.userns_options) != of_sandbox.map(|o| &o.userns_options) {
                return Err(failed(VERB, "the user namespace is not the sandbox's"));
            }
            let image = config.image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
            if !state.images.values().any(|i| i.id == image) {
                return Err(not_found(VERB, &image));
            }
            for volume in config.mounts.iter().filter_map(|mount| mount.image.as_ref()) {
                if !state.images.values().any(|i| i.id == volume.image) {
                    return Err(not_found(VERB, &volume.image));
                }
            }
            let twin = state
                .containers
                .values()
                .any(|c| c.sandbox == sandbox_id && c.config.metadata.as_ref() == Some(&metadata));
            if twin || metadata.name.is_empty() {
                return Err(failed(VERB, format!("name {metadata:?} is reserved")));
            }
            state.next += 1;
            let id = format!("container{:04}", state.next);
            let container = Container {
                config,
                sandbox: sandbox_id.to_owned(),
                state: api::ContainerState::ContainerCreated,
                created: self.now(),
                started: 0,
                finished: 0,
                exit_code: 0,
                reason: String::new(),
            };
            state.containers.insert(id.clone(), container);
            id
        };
        self.emit(&id, api::ContainerEventType::ContainerCreatedEvent);
        Ok(id)
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        const VERB: &str = "StartContainer";
        self.enter(VERB, id).await?;
        let behaviour = {
            let now = self.now();
            let mut state = self.state();
            let container = state.containers.get_mut(id).ok_or_else(|| not_found(VERB, id))?;
            if container.state != api::ContainerState::ContainerCreated {
                return Err(failed(VERB, format!("container {id} is not in created state")));
            }
            container.state = api::ContainerState::ContainerRunning;
            container.started = now;
            let name = container.config.metadata.clone().unwrap_or_default().name;
            state.behaviours.get(&name).copied().unwrap_or_default()
        };
        self.emit(id, api::ContainerEventType::ContainerStartedEvent);
        if let Some(time) = behaviour.runs_for {
            let (fake, id) = (self.clone(), id.to_owned());
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                let reason = if behaviour.exit_code == 0 { "Completed" } else { "Error" };
                fake.finish(&id, behaviour.exit_code, reason);
            });
        }
        Ok(())
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        self.enter("StopContainer", &format!("{id} {}", grace.as_secs())).await?;
        let behaviour = {
            let state = self.state();
            let Some(container) = state.containers.get(id) else { return Ok(()) };
            let name = container.config.metadata.clone().unwrap_or_default().name;
            state.behaviours.get(&name).copied().unwrap_or_default()
        };
        let (time, code) =
            if behaviour.ends_in <= grace { (behaviour.ends_in, 143) } else { (grace, 137) };
        let mut events = self.0.events.subscribe();
        let ended = async {
            while let Ok(event) = events.recv().await {
                if event.container_id == id
                    && event.container_event_type()
                        == api::ContainerEventType::ContainerStoppedEvent
                {
                    return;
                }
            }
        };
        tokio::select! {
            // Ended by another call with less time.
            () = ended => {}
            () = tokio::time::sleep(time) => self.finish(id, code, "Error"),
        }
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        const VERB: &str = "RemoveContainer";
        self.enter(VERB, id).await?;
        let mut state = self.state();
        let running = state
            .containers
            .get(id)
            .is_some_and(|c| c.state == api::ContainerState::ContainerRunning);
        if running {
            return Err(failed(VERB, format!("container {id} is running")));
        }
        state.containers.remove(id);
        Ok(())
    }

    async fn list_containers(&self, pod_uid: Option<&str>) -> Result<Vec<api::Container>> {
        let state = self.state();
        let all = state.containers.iter().filter(|(_, c)| of_pod(&c.config.labels, pod_uid));
        Ok(all
            .map(|(id, c)| api::Container {
                id: id.clone(),
                pod_sandbox_id: c.sandbox.clone(),
                metadata: c.config.metadata.clone(),
                image: c.config.image.clone(),
                state: c.state.into(),
                created_at: c.created,
                labels: c.config.labels.clone(),
                ..Default::default()
            })
            .collect())
    }

    async fn container_status(&self, id: &str) -> Result<api::ContainerStatus> {
        let (status, delay) = {
            let state = self.state();
            let found = state.containers.get(id).map(|c| container_status(id, c));
            (found, state.delays.get("ContainerStatus").copied())
        };
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        status.ok_or_else(|| not_found("ContainerStatus", id))
    }

    async fn update_container_resources(
        &self,
        id: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<()> {
        let what = match &*resources.cpuset_cpus {
            "" => id.to_owned(),
            cpus => format!("{id} on {cpus}"),
        };
        self.enter("UpdateContainerResources", &what).await
    }

    async fn update_pod_sandbox_resources(
        &self,
        id: &str,
        _: api::LinuxContainerResources,
        resources: api::LinuxContainerResources,
    ) -> Result<()> {
        let what = format!("{id} {}", resources.memory_limit_in_bytes);
        self.enter("UpdatePodSandboxResources", &what).await
    }

    async fn reopen_container_log(&self, id: &str) -> Result<()> {
        self.enter("ReopenContainerLog", id).await
    }

    async fn exec_sync(&self, id: &str, command: &[String], _: Duration) -> Result<ExecOutput> {
        const VERB: &str = "ExecSync";
        let state = self.state();
        let container = state.containers.get(id).ok_or_else(|| not_found(VERB, id))?;
        if container.state != api::ContainerState::ContainerRunning {
            return Err(failed(VERB, format!("container {id} is not running")));
        }
        let word = command.first().cloned().unwrap_or_default();
        state
            .exec
            .get(&word)
            .cloned()
            .ok_or_else(|| failed(VERB, format!("exec {word:?}: executable file not found")))
    }

    async fn exec(&self, _: api::ExecRequest) -> Result<String> {
        Err(refuse("Exec", RuntimeErrorKind::Unimplemented, "the fake streams nothing"))
    }

    async fn attach(&self, _: api::AttachRequest) -> Result<String> {
        Err(refuse("Attach", RuntimeErrorKind::Unimplemented, "the fake streams nothing"))
    }

    async fn checkpoint_container(&self, _: &str, _: &str, _: i64) -> Result<()> {
        Err(refuse("CheckpointContainer", RuntimeErrorKind::Unimplemented, "not faked"))
    }
    async fn port_forward(&self, _: api::PortForwardRequest) -> Result<String> {
        Err(refuse("PortForward", RuntimeErrorKind::Unimplemented, "the fake streams nothing"))
    }

    async fn list_container_stats(
        &self,
        sandbox: Option<&str>,
    ) -> Result<Vec<api::ContainerStats>> {
        let state = self.state();
        let of = |(id, c): (&String, &Container)| {
            let name = c.config.metadata.as_ref()?.name.clone();
            let value = *state.memory.get(&name)?;
            let asked = sandbox.is_none_or(|sandbox| c.sandbox == sandbox);
            asked.then(|| api::ContainerStats {
                attributes: Some(api::ContainerAttributes { id: id.clone(), ..Default::default() }),
                memory: Some(api::MemoryUsage {
                    usage_bytes: Some(api::UInt64Value { value }),
                    ..Default::default()
                }),
                ..Default::default()
            })
        };
        Ok(state.containers.iter().filter_map(of).collect())
    }

    async fn list_pod_sandbox_stats(&self) -> Result<Vec<api::PodSandboxStats>> {
        Ok(Vec::new())
    }

    async fn container_events(&self) -> Result<EventStream> {
        if !self.0.with_events {
            return Err(refuse(
                "GetContainerEvents",
                RuntimeErrorKind::Unimplemented,
                "unknown method",
            ));
        }
        let stream = BroadcastStream::new(self.0.events.subscribe());
        Ok(stream
            .map(|event| event.map_err(|e| failed("GetContainerEvents", e.to_string())))
            .boxed())
    }

    async fn list_images(&self) -> Result<Vec<api::Image>> {
        Ok(self.state().images.values().cloned().collect())
    }

    async fn image_status(&self, image: &str) -> Result<Option<api::Image>> {
        let state = self.state();
        Ok(state
            .images
            .iter()
            .find(|(name, i)| *name == image || i.id == image)
            .map(|f| f.1.clone()))
    }

    async fn pull_image(
        &self,
        image: &str,
        _: Option<api::AuthConfig>,
        _: Option<api::PodSandboxConfig>,
    ) -> Result<String> {
        const VERB: &str = "PullImage";
        self.enter(VERB, image).await?;
        let mut state = self.state();
        let found = state.registry.get(image).cloned().ok_or_else(|| not_found(VERB, image))?;
        let reference = found.id.clone();
        state.images.insert(image.to_owned(), found);
        Ok(reference)
    }

    async fn remove_image(&self, image: &str) -> Result<()> {
        self.enter("RemoveImage", image).await?;
        self.state().images.retain(|name, i| name != image && i.id != image);
        Ok(())
    }

    async fn image_fs_info(&self) -> Result<api::ImageFsInfoResponse> {
        Ok(api::ImageFsInfoResponse::default())
    }
}
