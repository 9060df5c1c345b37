//! CreateContainer: a name, the snapshot, the record. The process is made by StartContainer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::Status;

use super::store::{Container, ContainerName, ContainerStatus, Sandbox};
use super::{Shim, blocking, declared, devices, internal, mount_sources};
use crate::api::{self, ContainerEventType};
use crate::crash::point;
use crate::image::Image;
use crate::spec::{ImageDefaults, cgroup_path, mounts, stop_signal};
use crate::state::{ContainerRecord, new_id, remove_directory};

impl Shim {
    pub(super) async fn create_container(
        self: &Arc<Self>,
        request: api::CreateContainerRequest,
    ) -> Result<api::CreateContainerResponse, Status> {
        let config = request.config.ok_or_else(|| Status::invalid_argument("no config"))?;
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        if !sandbox.is_ready() {
            return Err(Status::failed_precondition(format!(
                "sandbox {} is not ready; run a new one",
                sandbox.id
            )));
        }
        // As the sandbox is now: a pod may have got a privileged container after its sandbox.
        let pod = request.sandbox_config.as_ref().unwrap_or(&sandbox.config);
        if privileged(&config) && !privileged_sandbox(pod) {
            return Err(Status::invalid_argument(
                "a privileged container needs a privileged sandbox; set it in the sandbox's config too",
            ));
        }
        let metadata = config.metadata.clone().unwrap_or_default();
        if metadata.name.is_empty() {
            return Err(Status::invalid_argument("a container needs a name"));
        }
        let id = new_id();
        let name = ContainerName {
            sandbox: sandbox.id.clone(),
            name: metadata.name.clone(),
            attempt: metadata.attempt,
        };
        if let Err(other) = self.store.reserve_container(name.clone(), &id) {
            // The same attempt again is a call whose answer was lost.
            let created = self
                .store
                .find_container(&other)
                .filter(|c| c.state() == api::ContainerState::ContainerCreated);
            return match created {
                Some(container) => {
                    Ok(api::CreateContainerResponse { container_id: container.id.clone() })
                }
                None => Err(Status::already_exists(format!(
                    "container {} attempt {} exists as {other}; remove it first",
                    metadata.name, metadata.attempt
                ))),
            };
        }
        let this = self.clone();
        let made = tokio::spawn(async move {
            let made = this.make_container(&id, config, sandbox).await;
            if made.is_err() {
                this.clear_container(&id).await;
                this.store.release_container(&name);
            }
            made.map(|()| id)
        });
        let id = made.await.map_err(|e| internal("making the container", e))??;
        Ok(api::CreateContainerResponse { container_id: id })
    }

    async fn make_container(
        self: &Arc<Self>,
        id: &str,
        config: api::ContainerConfig,
        sandbox: Arc<Sandbox>,
    ) -> Result<(), Status> {
        let image = self.image_of(&config)?;
        let defaults = defaults(&image);
        // What cannot be run should not be created.
        crate::spec::process::arguments(&config, &defaults)
            .and_then(|_| crate::spec::check(&config, &sandbox.namespaces(), &self.host))
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let volumes = self.volume_images(&config)?;
        let mut record = ContainerRecord::new(id, &sandbox.id, &config);
        record.image_id = image.id.to_string();
        record.stop_signal = stop_signal::plan(&config, &defaults.stop_signal);
        let parent = sandbox.record().cgroup.clone();
        record.cgroup = cgroup_path::container(&parent, id, self.config.cgroup_driver);
        record.log_path = log_path(&sandbox.config.log_directory, &config.log_path);

        let declared = mounts::declared(&defaults.volumes, &config.mounts);
        self.check_target(&sandbox, &config)?;
        let handler = sandbox.record().runtime_handler.clone();
        let (this, directory, written) = (self.clone(), self.layout.container(id), record.clone());
        let (owned, given) = (id.to_owned(), config.clone());
        blocking(move || {
            // Again when it is started: both may change until then.
            this.cdi_edits(&given)?;
            devices::look_up(&given.devices, false)?;
            this.localhost_seccomp(security(&given))?;
            this.apparmor_profile(&given, this.base_spec(&handler)?.as_ref())?;
            mount_sources::prepare(&given.mounts)?;
            std::fs::create_dir_all(&directory)
                .map_err(|e| internal("making the container's directory", e))?;
            point("create container: directory made");
            let rootfs = this
                .snapshots
                .prepare_with(&owned, &image, &volumes)
                .map_err(|e| internal("preparing the container's root file system", e))?;
            declared::make(&directory, &rootfs.lowerdirs, &declared)
                .map_err(|e| internal("making the volumes that the image declares", e))?;
            point("create container: snapshot prepared");
            written.write(&directory).map_err(|e| internal("recording the container", e))
        })
        .await??;
        point("create container: recorded");
        self.durability.sync(self.layout.container(id));
        let container = Container::new(record, config, sandbox, ContainerStatus::default());
        let container = Arc::new(container);
        self.store.add_container(container.clone());
        let kind = ContainerEventType::ContainerCreatedEvent;
        self.emit(kind, &container.id, &container.sandbox.id);
        Ok(())
    }

    /// The image of a container, which must have been pulled.
    pub(super) fn image_of(&self, config: &api::ContainerConfig) -> Result<Arc<Image>, Status> {
        let spec = config.image.clone().unwrap_or_default();
        let found =
            self.images.status(&spec.image).map_err(|e| internal("looking up the image", e))?;
        found.ok_or_else(|| {
            Status::not_found(format!("image {:?} is not here; pull it first", spec.image))
        })
    }

    /// The images of a container's volumes, in the order of its mounts.
    fn volume_images(&self, config: &api::ContainerConfig) -> Result<Vec<Arc<Image>>, Status> {
        let images = config.mounts.iter().filter_map(|mount| mount.image.as_ref());
        images
            .map(|spec| {
                let found = self.images.status(&spec.image);
                found.map_err(|e| internal("looking up the volume's image", e))?.ok_or_else(|| {
                    Status::not_found(format!(
                        "image {:?} of a volume is not here; pull it first",
                        spec.image
                    ))
                })
            })
            .collect()
    }

    /// Takes away everything that may exist of a container by its id alone.
    pub(super) async fn clear_container(&self, id: &str) {
        let (snapshots, layout, id) = (self.snapshots.clone(), self.layout.clone(), id.to_owned());
        let _ = blocking(move || {
            if let Err(error) = snapshots.remove(&id) {
                tracing::warn!(container = id, %error, "removing the root file system");
            }
            let _ = std::fs::remove_dir_all(layout.bundle(&id));
            let _ = remove_directory(&layout.container(&id));
        })
        .await;
    }
}

fn security(config: &api::ContainerConfig) -> Option<&api::LinuxContainerSecurityContext> {
    config.linux.as_ref().and_then(|l| l.security_context.as_ref())
}

fn privileged(config: &api::ContainerConfig) -> bool {
    security(config).is_some_and(|s| s.privileged)
}

fn privileged_sandbox(config: &api::PodSandboxConfig) -> bool {
    let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    security.is_some_and(|s| s.privileged)
}

/// What an image says about how to run it.
pub(super) fn defaults(image: &Image) -> ImageDefaults {
    let Some(config) = image.config.config() else { return ImageDefaults::default() };
    ImageDefaults {
        user: config.user().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone().unwrap_or_default(),
        volumes: config.volumes().clone().unwrap_or_default(),
    }
}

/// The log is below the sandbox's log directory; without one there is no log.
fn log_path(directory: &str, name: &str) -> Option<PathBuf> {
    if directory.is_empty() || name.is_empty() {
        return None;
    }
    Some(Path::new(directory).join(name))
}
