//! Creating and starting one container.

use std::path::Path;
use std::sync::Arc;

use cri_shim::api;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::done::StartFailure;
use super::{Done, Message, Worker, sandbox};
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::METRICS;
use crate::numa::Placement;
use crate::objects::ObjectError;
use crate::pod::config::ConfigError;
use crate::pod::config::container::{ContainerInput, DEFAULT_MESSAGE_PATH, container_config};
use crate::pod::config::downward::Addresses;
use crate::pod::config::env::{EnvInput, Sources, environment, references};
use crate::pod::config::hosts::hosts_file;
use crate::pod::deps::Deps;
use crate::pod::facts::ReadyImage;
use crate::pod::hooks::{HookPlace, run_hook};
use crate::pod::logs::{link_log, remove_instance_logs};
use crate::pod::observed::ContainerId;
use crate::pod::plan::{Start, usable_sandbox};
use crate::pod::spec::{ContainerKind, find_container, host_network, spec_of};
use crate::pod::userns::map_mounts;
use crate::report::EventType;

/// One start, with all that it needs.
struct Job {
    deps: Arc<Deps>,
    pod: Arc<Pod>,
    container: Container,
    start: Start,
    image: ReadyImage,
    pod_ips: Vec<String>,
    sandbox_attempt: u32,
    sandbox_config: Option<Arc<api::PodSandboxConfig>>,
    target: Option<String>,
    /// Where it is to run.
    placement: Placement,
    ending: tokio::sync::watch::Receiver<bool>,
    outbox: tokio::sync::mpsc::UnboundedSender<Message>,
}

fn failure(reason: &'static str, message: impl ToString) -> StartFailure {
    StartFailure { reason, message: message.to_string() }
}

fn config_failure(error: impl ToString) -> StartFailure {
    failure("CreateContainerConfigError", error)
}

impl Worker {
    pub(super) fn start(&mut self, start: Start) {
        let spec = spec_of(&self.pod);
        let Some((container, _)) = find_container(spec, &start.name) else { return };
        let Some((_, Some(image))) = self.facts.images.get(&start.name) else { return };
        let sandbox = usable_sandbox(&self.pod, &self.observed);
        let pod_ips = if host_network(spec) {
            self.deps.node.node_ips.iter().map(ToString::to_string).collect()
        } else {
            sandbox.map(|s| s.ips.clone()).unwrap_or_default()
        };
        let target = spec
            .ephemeral_containers
            .iter()
            .flatten()
            .find(|e| e.name == start.name)
            .and_then(|e| e.target_container_name.as_deref())
            .and_then(|name| self.observed.latest(name))
            .map(|c| c.id.to_string());
        let job = Job {
            deps: self.deps.clone(),
            pod: self.pod.clone(),
            container,
            image: image.clone(),
            pod_ips,
            sandbox_attempt: sandbox.map_or(0, |s| s.attempt),
            sandbox_config: self
                .sandbox_config
                .as_ref()
                .filter(|(attempt, _)| Some(*attempt) == sandbox.map(|s| s.attempt))
                .map(|(_, config)| config.clone()),
            target,
            placement: self.place(&start.name),
            ending: self.ending.subscribe(),
            outbox: self.outbox.clone(),
            start: start.clone(),
        };
        self.resources.made(&self.pod, &job.container, &self.deps);
        self.facts.starting.insert(start.name.clone());
        self.begin_task(async move {
            let kind = match start.kind {
                ContainerKind::Init | ContainerKind::Sidecar => "init_container",
                ContainerKind::Main => "container",
                ContainerKind::Ephemeral => "ephemeral_container",
            };
            let (status, result) = job.run().await;
            METRICS.container_started(kind, result.as_ref().err().map(|error| error.reason));
            Done::Started(start, status.map(Box::new), result)
        });
    }
}

impl Job {
    fn event(&self, kind: EventType, reason: &str, message: String) {
        let whom = (self.start.kind, self.start.name.as_str());
        self.deps.container_event(&self.pod, whom, kind, reason, message);
    }

    async fn run(mut self) -> (Option<api::ContainerStatus>, Result<(), StartFailure>) {
        let id = match self.create().await {
            Ok(id) => id,
            Err(error) => {
                self.event(EventType::Warning, "Failed", format!("Error: {}", error.message));
                return (None, Err(error));
            }
        };
        self.event(EventType::Normal, "Created", "Container created".into());
        let result = self.go(&id).await;
        // Whatever became of it, the runtime knows best.
        let status = match self.deps.runtime.container_status(&id).await {
            Ok(status) => Some(status),
            Err(error) => {
                tracing::warn!(container = id, %error, "cannot look at a started container");
                None
            }
        };
        (status, result)
    }

    /// Starts the created container and runs its postStart hook.
    async fn go(&mut self, id: &str) -> Result<(), StartFailure> {
        if *self.ending.borrow() {
            return Err(failure("ContainerCreating", "the pod ends"));
        }
        if let Err(error) = self.deps.runtime.start_container(id).await {
            let message = error.message;
            self.event(EventType::Warning, "Failed", format!("Error: {message}"));
            return Err(failure("RunContainerError", message));
        }
        self.event(EventType::Normal, "Started", "Container started".into());
        link_log(&self.deps.node, &self.pod, &self.start.name, self.start.attempt, id).await;
        let hook = self.container.lifecycle.as_ref().and_then(|l| l.post_start.clone());
        let Some(hook) = hook else { return Ok(()) };
        // The hook may take its time: what runs already is shown to run.
        let _ = self.outbox.send(Message::LookAtAll);
        let place = HookPlace {
            runtime: self.deps.runtime.clone(),
            container_id: id.to_owned(),
            pod_ip: self.pod_ips.first().and_then(|ip| ip.parse().ok()),
            ports: self.container.ports.clone().unwrap_or_default(),
        };
        let result = tokio::select! {
            result = run_hook(&hook, &place) => result,
            // The end does not wait for it.
            _ = self.ending.wait_for(|ending| *ending) => return Ok(()),
        };
        let Err(error) = result else { return Ok(()) };
        tracing::warn!(pod = %NamespacedName::of_pod(&self.pod), container = self.start.name, error, "postStart hook");
        self.event(EventType::Warning, "FailedPostStartHook", "PostStartHook failed".into());
        self.event(EventType::Normal, "Killing", "FailedPostStartHook".into());
        let seconds = spec_of(&self.pod).termination_grace_period_seconds.unwrap_or(30);
        let grace = std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        if let Err(error) = self.deps.runtime.stop_container(id, grace).await {
            tracing::warn!(container = id, %error, "cannot end a container whose hook failed");
        }
        Err(failure("PostStartHookError", error))
    }

    async fn create(&self) -> Result<String, StartFailure> {
        for leftover in &self.start.leftovers {
            // A start that was given up may have begun a log, which would count as a restart once
            // the container is gone. After the removal again, as it may have been under way.
            self.remove_logs_of(leftover).await;
            self.deps
                .runtime
                .remove_container(leftover.as_str())
                .await
                .map_err(|e| failure("CreateContainerError", e))?;
            self.remove_logs_of(leftover).await;
        }
        let mut devices = self
            .deps
            .devices
            .run_options(&self.pod, &self.container)
            .await
            .map_err(config_failure)?;
        let of_claims = self.deps.claims.cdi_devices(&self.pod, &self.container);
        for name in of_claims.map_err(config_failure)? {
            if devices.cdi_devices.iter().all(|known| known.name != name) {
                devices.cdi_devices.push(api::CdiDevice { name });
            }
        }
        let mut env = self.environment().await?;
        // What the pod says goes over what its devices bring.
        let of_devices =
            devices.envs.iter().filter(|(name, _)| !env.iter().any(|(n, _)| n == name));
        env.splice(0..0, of_devices.cloned().collect::<Vec<_>>());
        let mut mounts = self
            .deps
            .volumes
            .container_mounts(&self.pod, &self.container, self.start.attempt)
            .await
            .map_err(config_failure)?;
        let raw = self.deps.volumes.container_devices(&self.pod, &self.container);
        devices.devices.extend(raw.map_err(config_failure)?);
        self.name_volume_images(&mut mounts)?;
        mounts.extend(self.hosts_mount(&mounts).await?);
        let message_file = self.message_file().await?;
        mounts.extend(self.message_mount(message_file.as_deref()));
        let logs = self.deps.node.pod_log_dir(&self.pod).join(&self.container.name);
        tokio::fs::create_dir_all(&logs)
            .await
            .map_err(|e| config_failure(format!("create log directory {}: {e}", logs.display())))?;
        let sandbox_config = match &self.sandbox_config {
            Some(config) => (**config).clone(),
            None => {
                let handler =
                    sandbox::handler(&self.deps, &self.pod).await.map_err(config_failure)?;
                sandbox::config(&self.deps, &self.pod, self.sandbox_attempt, &handler)
                    .await
                    .map_err(config_failure)?
            }
        };
        let userns = sandbox_config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref()?.namespace_options.as_ref())
            .and_then(|options| options.userns_options.clone())
            .unwrap_or_default();
        map_mounts(&mut mounts, &userns);
        mounts.splice(0..0, devices.mounts.iter().cloned());
        let mut resources = self.deps.container_resources(&self.pod, &self.container);
        resources.cpuset_cpus.clone_from(&self.placement.cpus);
        resources.cpuset_mems.clone_from(&self.placement.mems);
        let config = container_config(ContainerInput {
            pod: &self.pod,
            container: &self.container,
            attempt: self.start.attempt,
            backoff: self.start.backoff,
            image: &self.image,
            env: &env,
            mounts,
            message_file: message_file.as_deref(),
            target: self.target.as_deref(),
            userns: &userns,
            devices: &devices,
            node: &self.deps.node,
            resources,
        })
        .map_err(config_failure)?;
        if *self.ending.borrow() {
            return Err(failure("ContainerCreating", "the pod ends"));
        }
        let images = config.mounts.iter().filter(|mount| mount.image.is_some()).count();
        let sandbox = self.start.sandbox.as_str();
        let made = self.deps.runtime.create_container(sandbox, config, sandbox_config).await;
        METRICS.image_volumes_mounted(images, made.is_err());
        made.map_err(|e| failure("CreateContainerError", e.message))
    }

    async fn remove_logs_of(&self, leftover: &ContainerId) {
        let Start { name, attempt, .. } = &self.start;
        remove_instance_logs(&self.deps.node, &self.pod, name, *attempt, leftover).await;
    }

    /// Says which image on the node each image volume is.
    fn name_volume_images(&self, mounts: &mut [api::Mount]) -> Result<(), StartFailure> {
        for image in mounts.iter_mut().filter_map(|mount| mount.image.as_mut()) {
            let asked = &image.user_specified_image;
            let found = self.image.volumes.get(asked).ok_or_else(|| {
                config_failure(format!("the image {asked:?} of a volume is not on the node"))
            })?;
            image.image = found.clone();
        }
        Ok(())
    }

    async fn environment(&self) -> Result<Vec<(String, String)>, StartFailure> {
        let namespace = NamespacedName::of_pod(&self.pod).namespace;
        let (maps, secrets) = references(&self.container);
        let unreadable = |e: ObjectError| config_failure(ConfigError::Unreadable(e.to_string()));
        let mut sources = Sources::default();
        for name in maps {
            let key = NamespacedName::new(&namespace, &name);
            let found = self.deps.objects.config_map(&key).await.map_err(unreadable)?;
            sources.config_maps.insert(name, found);
        }
        for name in secrets {
            let key = NamespacedName::new(&namespace, &name);
            let found = self.deps.objects.secret(&key).await.map_err(unreadable)?;
            sources.secrets.insert(name, found);
        }
        let node_ips: Vec<String> =
            self.deps.node.node_ips.iter().map(ToString::to_string).collect();
        environment(EnvInput {
            pod: &self.pod,
            container: &self.container,
            sources: &sources,
            services: &self.deps.objects.services(&namespace),
            addresses: Addresses { pod: &self.pod_ips, node: &node_ips },
            node: &self.deps.node,
        })
        .map_err(config_failure)
    }

    /// The pod's own `/etc/hosts`, unless the container mounts one there.
    async fn hosts_mount(&self, mounts: &[api::Mount]) -> Result<Option<api::Mount>, StartFailure> {
        const PATH: &str = "/etc/hosts";
        if mounts.iter().any(|m| m.container_path == PATH) || self.pod_ips.is_empty() {
            return Ok(None);
        }
        let node_hosts = if host_network(spec_of(&self.pod)) {
            tokio::fs::read_to_string(PATH).await.unwrap_or_default()
        } else {
            String::new()
        };
        let text = hosts_file(&self.pod, &self.deps.node, &self.pod_ips, &node_hosts);
        let dir = self.deps.node.pod_dir(&PodUid::of(&self.pod));
        let file = dir.join("etc-hosts");
        // Written in place: running containers hold this very file.
        write_if_other(&file, &text)
            .await
            .map_err(|e| config_failure(format!("write {}: {e}", file.display())))?;
        let read_only = self
            .container
            .security_context
            .as_ref()
            .and_then(|s| s.read_only_root_filesystem)
            .unwrap_or(false);
        Ok(Some(api::Mount {
            container_path: PATH.into(),
            host_path: file.display().to_string(),
            readonly: read_only,
            selinux_relabel: true,
            ..Default::default()
        }))
    }

    /// An empty file for this instance's last words.
    async fn message_file(&self) -> Result<Option<String>, StartFailure> {
        if self.message_path().is_empty() {
            return Ok(None);
        }
        let dir = self
            .deps
            .node
            .pod_dir(&PodUid::of(&self.pod))
            .join("containers")
            .join(&self.container.name);
        let file = dir.join(format!("{:08x}", fastrand::u32(..)));
        let path = file.clone();
        let made = tokio::task::spawn_blocking(move || {
            use std::os::unix::fs::PermissionsExt;
            std::fs::create_dir_all(&dir)?;
            std::fs::File::create(&path)?;
            // Whoever the container runs as may write it.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))
        });
        match made.await {
            Ok(Ok(())) => Ok(Some(file.display().to_string())),
            Ok(Err(error)) => Err(config_failure(format!("create {}: {error}", file.display()))),
            Err(error) => Err(config_failure(error)),
        }
    }

    fn message_path(&self) -> &str {
        self.container.termination_message_path.as_deref().unwrap_or(DEFAULT_MESSAGE_PATH)
    }

    fn message_mount(&self, file: Option<&str>) -> Option<api::Mount> {
        Some(api::Mount {
            container_path: self.message_path().to_owned(),
            host_path: file?.to_owned(),
            selinux_relabel: true,
            ..Default::default()
        })
    }
}

async fn write_if_other(path: &Path, text: &str) -> std::io::Result<()> {
    if tokio::fs::read_to_string(path).await.is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        tokio::fs::create_dir_all(dir).await?;
    }
    tokio::fs::write(path, text).await?;
    use std::os::unix::fs::PermissionsExt;
    tokio::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).await
}
