//! StartContainer: the spec, then the monitor makes and starts the process.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::LinuxSeccomp;
use tonic::Status;

use super::container_create::defaults;
use super::store::{Container, Sandbox};
use super::{
    Shim, blocking, declared, edits, internal, labels, mount_sources, poststop, sandbox_files,
};
use crate::api::{self, ContainerEventType, NamespaceMode};
use crate::crash::point;
use crate::monitor::protocol::{
    Exited, ImageVolume, Overlay, Reply, Request, StartContainer, Started,
};
use crate::monitor::{protocol, record};
use crate::spec::{
    Inputs, PidNamespace, Pod, SpecError, Userns, mounts, plan_spec, seccomp, user, userns,
};

/// How long a start may take on a node that is very busy.
const START_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(120);

impl Shim {
    pub(super) async fn start_container(
        self: &Arc<Self>,
        request: api::StartContainerRequest,
    ) -> Result<api::StartContainerResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        let this = self.clone();
        tokio::spawn(async move { this.start(&container).await })
            .await
            .map_err(|e| internal("starting the container", e))??;
        Ok(api::StartContainerResponse {})
    }

    async fn start(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), Status> {
        let _changing = container.changing.lock().await;
        match container.state() {
            api::ContainerState::ContainerCreated => {}
            // The same call again, whose answer was lost.
            api::ContainerState::ContainerRunning => return Ok(()),
            state => {
                return Err(Status::failed_precondition(format!(
                    "container {} cannot be started: it is in state {}",
                    container.id,
                    state.as_str_name()
                )));
            }
        }
        // As with other runtimes, a container that did not start has exited and says why, whatever
        // it failed at: clients start one in state created again and again, without backing off
        // and against the restart policy.
        let request = match self.plan_start(container).await {
            Ok(request) => request,
            Err(status) => {
                self.start_failed(container, status.message());
                return Err(status);
            }
        };
        point("start container: bundle written");
        container.status.send_modify(|s| s.starting = true);
        let answer = self.ask_monitor(&container.sandbox, request).await;
        point("start container: answered");
        match answer {
            Ok(started) => {
                container.status.send_modify(|s| s.started = Some(started));
                self.durability.sync(self.layout.container(&container.id));
                let kind = ContainerEventType::ContainerStartedEvent;
                self.emit(kind, &container.id, &container.sandbox.id);
                // Only now may its end be told.
                container.status.send_modify(|s| s.starting = false);
                self.scope_container(container);
                Ok(())
            }
            Err(message) => {
                self.start_failed(container, &message);
                // Without its id, so that the Events of each further try count as one.
                Err(Status::internal(format!("cannot start the container: {message}")))
            }
        }
    }

    fn start_failed(&self, container: &Arc<Container>, message: &str) {
        let exit = Exited {
            code: 128,
            at: record::now(),
            reason: "StartError".to_owned(),
            message: message.to_owned(),
            ..Exited::default()
        };
        let directory = self.layout.container(&container.id);
        if let Err(error) = record::write(&directory, record::EXITED, &exit) {
            tracing::error!(container = container.id, %error, "recording a failed start");
        }
        self.exited(container, exit);
        point("start container: failure recorded");
        tracing::warn!(container = container.id, message, "cannot start a container");
    }

    async fn ask_monitor(
        &self,
        sandbox: &Sandbox,
        request: StartContainer,
    ) -> Result<Started, String> {
        let request = Request::Start(Box::new(request));
        match tokio::time::timeout(START_TIMEOUT, sandbox.monitor.call(&request)).await {
            Ok(Ok(Reply::Started(started))) => Ok(started),
            Ok(Ok(other)) => Err(format!("the monitor answered {other:?}")),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("not started within {} s", START_TIMEOUT.as_secs())),
        }
    }

    /// Decides the spec, writes the bundle, and says what the monitor needs to know.
    async fn plan_start(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<StartContainer, Status> {
        let (this, container) = (self.clone(), container.clone());
        blocking(move || this.plan_start_blocking(&container)).await?
    }

    fn plan_start_blocking(&self, container: &Container) -> Result<StartContainer, Status> {
        let config = container.config();
        let sandbox = &container.sandbox;
        let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let image_id = container.record().image_id.clone();
        let image = self
            .images
            .status(&image_id)
            .map_err(|e| internal("looking up the image", e))?
            .ok_or_else(|| Status::not_found(format!("image {image_id} is gone; pull it again")))?;
        let defaults = defaults(&image);
        let host_network = sandbox.host_network();
        let sandbox_directory = self.layout.sandbox(&sandbox.id);
        let hostname = fs::read_to_string(sandbox_directory.join("hostname"));
        let host_ipc = sandbox.namespaces().ipc() == NamespaceMode::Node;
        let users = userns::plan(Some(&sandbox.namespaces()))
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let path = self.layout.userns(&sandbox.id);
        let pod = Pod {
            userns: users.map(|map| Userns { path: path.clone(), map }),
            id: sandbox.id.clone(),
            metadata: sandbox.metadata(),
            netns: (!host_network).then(|| self.layout.netns(&sandbox.id)),
            pid: self.pid_namespace(sandbox, security)?,
            hostname: hostname.unwrap_or_default().trim().to_owned(),
            shm: if host_ipc { "/dev/shm".into() } else { self.layout.shm(&sandbox.id) },
            files: sandbox_files::bindings(&sandbox_directory),
        };
        mount_sources::prepare(&config.mounts)?;
        let labels = self.container_labels(sandbox, security);
        let targets = mounts::declared(&defaults.volumes, &config.mounts);
        let declared = declared::find(&self.layout.container(&container.id), targets);
        if let Some(labels) = &labels {
            let own = pod.files.values().chain(declared.iter().map(|volume| &volume.source));
            labels::relabel(labels, &config.mounts, own.map(PathBuf::as_path))?;
        }
        let handler = sandbox.record().runtime_handler.clone();
        let base = self.base_spec(&handler)?;
        let added = self.cdi_edits(&config)?;
        let cgroup = container.record().cgroup.clone();
        let inputs = Inputs {
            config: &config,
            image: &defaults,
            pod: &pod,
            host: &self.host,
            rootfs: self.layout.rootfs(),
            cgroup: cgroup.clone(),
            localhost_seccomp: self.localhost_seccomp(security)?,
            apparmor: self.apparmor_profile(&config, base.as_ref())?,
            labels,
            devices: edits::all_devices(&config, &added)?,
            image_volumes: self.layout.image_volumes(),
            declared,
            base: base.as_ref(),
        };
        let refused = |e: SpecError| Status::invalid_argument(e.to_string());
        let mut spec = plan_spec(&inputs).map_err(refused)?;
        added.apply(&mut spec).map_err(|e| Status::invalid_argument(e.to_string()))?;
        restrict_oom_score(&mut spec);
        let mut user = user::request(security, &defaults.user)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        user.supplemental.extend(added.groups());

        let runtime = self.config.runtime_handlers.get(&handler).cloned();
        if runtime.is_none() {
            edits::check_built_in(&spec).map_err(refused)?;
        }
        if runtime.is_none() && !handler.is_empty() && base.is_none() {
            return Err(Status::failed_precondition(format!(
                "the pod's runtime handler {handler:?} is no longer installed"
            )));
        }
        let bundle = self.layout.bundle(&container.id);
        // What an interrupted start left is not this one's.
        let _ = fs::remove_dir_all(&bundle);
        fs::create_dir_all(&bundle).map_err(|e| internal("making the bundle", e))?;
        point("start container: bundle made");
        let text = serde_json::to_vec(&spec).map_err(|e| internal("encoding the spec", e))?;
        fs::write(bundle.join("config.json"), text).map_err(|e| internal("writing the spec", e))?;
        poststop::note(&self.layout, &container.id, &spec)
            .map_err(|e| internal("noting the poststop hooks", e))?;
        let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
        if let (Some(profile), None) = (profile, &runtime) {
            self.programs
                .place(profile, &bundle)
                .map_err(|e| Status::invalid_argument(e.to_string()))?;
        }
        let rootfs = self
            .snapshots
            .get(&container.id)
            .map_err(|e| internal("finding the root file system", e))?
            .ok_or_else(|| Status::internal("the container has no root file system"))?;
        Ok(StartContainer {
            id: container.id.clone(),
            bundle,
            rootfs: Overlay {
                lower: rootfs.lowerdirs,
                upper: rootfs.upper,
                work: rootfs.work,
                target: self.layout.rootfs(),
            },
            user,
            cgroup,
            log: container.record().log_path.clone(),
            records: self.layout.container(&container.id),
            stdin: config.stdin,
            tty: config.tty,
            runtime,
            userns: users.map(|map| protocol::Userns { path, map }),
            rotation: self.config.log_rotation,
            image_volumes: self.image_volumes(container, &config)?,
        })
    }

    fn image_volumes(
        &self,
        container: &Container,
        config: &api::ContainerConfig,
    ) -> Result<Vec<ImageVolume>, Status> {
        let asked = config.mounts.iter().filter(|mount| mount.image.is_some());
        let layers = self
            .snapshots
            .volumes(&container.id)
            .map_err(|e| internal("finding the image volumes", e))?;
        let (folder, mut at) = (self.layout.image_volumes(), 0);
        Ok(asked
            .zip(layers)
            .map(|(mount, volume)| ImageVolume {
                image: volume.image,
                layers: volume.layers,
                sub_path: mount.image_sub_path.clone(),
                target: mounts::staged(&folder, &mut at),
            })
            .collect())
    }

    /// Refuses a container for the PID namespace of another that is not there.
    pub(super) fn check_target(
        &self,
        sandbox: &Sandbox,
        config: &api::ContainerConfig,
    ) -> Result<(), Status> {
        let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let options = security.and_then(|s| s.namespace_options.as_ref());
        match options.map(api::NamespaceOption::pid) {
            Some(NamespaceMode::Target) => self.pid_namespace(sandbox, security).map(drop),
            _ => Ok(()),
        }
    }

    fn pid_namespace(
        &self,
        sandbox: &Sandbox,
        security: Option<&api::LinuxContainerSecurityContext>,
    ) -> Result<PidNamespace, Status> {
        let options = security.and_then(|s| s.namespace_options.clone());
        let options = options.unwrap_or_else(|| sandbox.namespaces());
        match options.pid() {
            NamespaceMode::Container => Ok(PidNamespace::Container),
            NamespaceMode::Node => Ok(PidNamespace::Node),
            NamespaceMode::Pod => match sandbox.init {
                Some(init) => Ok(PidNamespace::Join(format!("/proc/{init}/ns/pid").into())),
                None => Err(Status::failed_precondition(
                    "the sandbox has no shared PID namespace; set it in the sandbox's config too",
                )),
            },
            NamespaceMode::Target => {
                let target = self.store.container(&options.target_id)?;
                let pid = target.status.borrow().started.as_ref().map(|s| s.pid);
                let running = target.state() == api::ContainerState::ContainerRunning;
                match pid.filter(|_| running && target.sandbox.id == sandbox.id) {
                    Some(pid) => Ok(PidNamespace::Join(format!("/proc/{pid}/ns/pid").into())),
                    None => Err(Status::failed_precondition(format!(
                        "target container {} is not running in this sandbox",
                        options.target_id
                    ))),
                }
            }
        }
    }

    pub(super) fn localhost_seccomp(
        &self,
        security: Option<&api::LinuxContainerSecurityContext>,
    ) -> Result<Option<LinuxSeccomp>, Status> {
        let seccomp::Profile::Localhost(name) = seccomp::profile(security) else { return Ok(None) };
        let path: PathBuf = self.config.seccomp_profile_root.join(name);
        let text = fs::read(&path).map_err(|e| {
            let path = path.display();
            Status::invalid_argument(format!("reading the seccomp profile {path}: {e}"))
        })?;
        serde_json::from_slice(&text).map(Some).map_err(|e| {
            let path = path.display();
            Status::invalid_argument(format!("the seccomp profile {path} is malformed: {e}"))
        })
    }
}

/// Raises an OOM score that this process may not give to what it allows: without CAP_SYS_RESOURCE
/// (a node inside a container) the kernel refuses lower scores than one's own, and a Guaranteed pod
/// would not start at all for a hint about who dies first.
fn restrict_oom_score(spec: &mut oci_spec::runtime::Spec) {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let status = read("/proc/self/status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim);
    let effective = effective.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    if effective.is_none_or(|set| set & CAP_SYS_RESOURCE != 0) {
        return;
    }
    let own = read("/proc/self/oom_score_adj").trim().parse().unwrap_or(0);
    if let Some(process) = spec.process_mut()
        && process.oom_score_adj().is_some_and(|asked| asked < own)
    {
        process.set_oom_score_adj(Some(own));
    }
}
