//! CheckpointContainer: a running container's state as an archive, for forensics (KEP-2008).
//!
//! CRIU freezes and dumps the processes, called by the OCI runtime of the pod's RuntimeClass handler
//! (`runc checkpoint`) or, for the built-in one, by the shim itself (see `criu`). The archive's layout
//! is that of containerd and CRI-O, which `checkpointctl` reads and both restore from.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use tonic::Status;

use super::container_list::running;
use super::criu::{self, DumpError};
use super::store::Container;
use super::{Shim, blocking, internal};
use crate::api;
use crate::monitor::external::last_error;
use crate::monitor::record::{now, rfc3339};
use crate::snapshot::diff;

/// How long a checkpoint may take where the caller sets no limit.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where CRIU's images are in the archive.
const IMAGES: &str = "checkpoint";

impl Shim {
    pub(super) async fn checkpoint_container(
        self: &Arc<Self>,
        request: api::CheckpointContainerRequest,
    ) -> Result<api::CheckpointContainerResponse, Status> {
        let container = self.store.container(&request.container_id)?;
        running(&container)?;
        let Some(criu) = self.config.criu.clone() else {
            return Err(Status::unimplemented(
                "checkpoints need CRIU, which is not installed on this node: install the package criu",
            ));
        };
        let handler = container.sandbox.record().runtime_handler.clone();
        let by = match self.config.runtime_handlers.get(&handler) {
            Some(program) => Dumper::Runtime(program.clone()),
            None => Dumper::Criu(criu),
        };
        let location = PathBuf::from(&request.location);
        if !location.is_absolute() {
            return Err(Status::invalid_argument(format!(
                "the checkpoint's location {location:?} must be an absolute path"
            )));
        }
        let limit = match u64::try_from(request.timeout) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => PATIENCE,
        };
        let this = self.clone();
        let made = tokio::spawn(async move {
            let _changing = container.changing.lock().await;
            let folder = this.layout.container(&container.id).join("checkpoint");
            let made = this.checkpoint(&container, &by, &folder, &location, limit).await;
            let _ = blocking(move || fs::remove_dir_all(folder)).await;
            made
        });
        made.await.map_err(|e| internal("making the checkpoint", e))??;
        Ok(api::CheckpointContainerResponse {})
    }

    async fn checkpoint(
        self: &Arc<Self>,
        container: &Arc<Container>,
        by: &Dumper,
        folder: &Path,
        location: &Path,
        limit: Duration,
    ) -> Result<(), Status> {
        let (empty, images) = (folder.to_path_buf(), folder.join(IMAGES));
        blocking(move || {
            // What an interrupted one left.
            let _ = fs::remove_dir_all(&empty);
            fs::create_dir_all(&images)?;
            private(&empty)
        })
        .await?
        .map_err(|e| internal("making a folder for the checkpoint", e))?;
        self.dump(container, by, folder, limit).await?;

        let (config, status) = self.described(container, by.name());
        let spec = self.layout.bundle(&container.id).join("config.json");
        let log = container.record().log_path.clone();
        let upper = self
            .snapshots
            .get(&container.id)
            .map_err(|e| internal("finding the root file system", e))?
            .map(|rootfs| rootfs.upper);
        let (folder, location) = (folder.to_path_buf(), location.to_path_buf());
        blocking(move || {
            fs::write(folder.join("config.dump"), config.to_string())?;
            fs::write(folder.join("status.dump"), status.to_string())?;
            fs::copy(spec, folder.join("spec.dump"))?;
            if let Some(log) = log.filter(|log| log.is_file()) {
                fs::copy(log, folder.join("container.log"))?;
            }
            if let Some(upper) = upper {
                let layer = fs::File::create(folder.join("rootfs-diff.tar"))?;
                diff::write_layer(&upper, io::BufWriter::new(layer))?;
            }
            pack(&folder, &location)
        })
        .await?
        .map_err(|e| internal("writing the checkpoint", e))
    }

    /// Has the container's processes dumped; they run on.
    async fn dump(
        &self,
        container: &Container,
        by: &Dumper,
        folder: &Path,
        limit: Duration,
    ) -> Result<(), Status> {
        let (program, failed) = match by {
            Dumper::Runtime(program) => {
                (program, self.runtime_dump(container, program, folder, limit).await)
            }
            Dumper::Criu(program) => {
                (program, self.criu_dump(container, program, folder, limit).await)
            }
        };
        let (name, seconds) = (program.display(), limit.as_secs());
        failed.map_err(|error| match error {
            DumpError::Io(error) => internal(&format!("running {name}"), error),
            DumpError::Late => {
                Status::deadline_exceeded(format!("{name} did not checkpoint within {seconds} s"))
            }
            DumpError::Failed(said) => {
                let log = fs::read_to_string(folder.join("dump.log")).unwrap_or_default();
                let causes = causes(&log);
                let criu = if causes.is_empty() { causes } else { format!(" (CRIU: {causes})") };
                Status::internal(format!("{name} could not checkpoint the container: {said}{criu}"))
            }
        })
    }

    /// By the OCI runtime's program.
    async fn runtime_dump(
        &self,
        container: &Container,
        program: &Path,
        folder: &Path,
        limit: Duration,
    ) -> Result<(), DumpError> {
        let bundle = self.layout.bundle(&container.id);
        let log = folder.join("runtime.log");
        let mut command = tokio::process::Command::new(program);
        command.arg("--root").arg(bundle.join("oci"));
        command.arg("--log").arg(&log).args(["--log-format", "json", "checkpoint"]);
        command.arg("--leave-running").arg("--work-path").arg(folder);
        command.arg("--image-path").arg(folder.join(IMAGES)).arg(&container.id);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.kill_on_drop(true).spawn()?;
        let ended =
            tokio::time::timeout(limit, child.wait()).await.map_err(|_| DumpError::Late)??;
        if ended.success() {
            let _ = fs::remove_file(log);
            return Ok(());
        }
        let said = last_error(&fs::read_to_string(&log).unwrap_or_default());
        Err(DumpError::Failed(said.unwrap_or_else(|| ended.to_string())))
    }

    /// By CRIU, for a container of the built-in runtime.
    async fn criu_dump(
        &self,
        container: &Container,
        program: &Path,
        folder: &Path,
        limit: Duration,
    ) -> Result<(), DumpError> {
        let started = container.status.borrow().started.clone();
        let pid = started.ok_or_else(|| io::Error::other("the container has not started"))?.pid;
        let spec = self.layout.bundle(&container.id).join("config.json");
        let spec = Spec::load(&spec)
            .map_err(|e| io::Error::other(format!("reading {}: {e}", spec.display())))?;
        let cgroup = container.record().cgroup.clone();
        let freezer = Some(self.cgroups.controller("freezer", &cgroup)).filter(|c| c.is_dir());
        let facts = criu::Facts::look(pid, freezer)?;
        let images = folder.join(IMAGES);
        // As runc has it, for who restores.
        fs::write(images.join("descriptors.json"), json!(facts.streams).to_string())?;
        let options = criu::plan_dump(&spec, &facts, limit);
        criu::apply_dump(program, options, &images, folder, limit).await
    }

    /// What `config.dump` and `status.dump` say, in the words of containerd and CRI-O.
    fn described(&self, container: &Arc<Container>, runtime: &str) -> (Value, Value) {
        let status = self.container_status(container);
        let image = status.image.clone().unwrap_or_default().image;
        let metadata = status.metadata.clone().unwrap_or_default();
        let pod = container.sandbox.metadata();
        let name = format!(
            "{}_{}_{}_{}_{}",
            metadata.name, pod.name, pod.namespace, pod.uid, metadata.attempt
        );
        let config = json!({
            "id": container.id,
            "name": name,
            "rootfsImage": image,
            "rootfsImageRef": status.image_ref,
            "rootfsImageName": image,
            "runtime": runtime,
            "createdTime": rfc3339(status.created_at),
            "checkpointedTime": rfc3339(now()),
            "restoredTime": "0001-01-01T00:00:00Z",
            "restored": false,
        });
        let status = json!({
            "id": status.id,
            "metadata": {"name": metadata.name, "attempt": metadata.attempt},
            "state": status.state,
            "created_at": status.created_at,
            "started_at": status.started_at,
            "image": {"image": image},
            "image_ref": status.image_ref,
            "labels": status.labels,
            "annotations": status.annotations,
            "log_path": status.log_path,
            "image_id": status.image_id,
        });
        (config, status)
    }
}

/// Who has the processes dumped.
enum Dumper {
    /// An OCI runtime's program, for the pods that it runs.
    Runtime(PathBuf),
    /// CRIU's own.
    Criu(PathBuf),
}

impl Dumper {
    /// The runtime's name in the archive.
    fn name(&self) -> &str {
        match self {
            Dumper::Runtime(program) => {
                program.file_name().and_then(|name| name.to_str()).unwrap_or_default()
            }
            Dumper::Criu(_) => "longshore",
        }
    }
}

/// Why CRIU failed, by its log: the last error only says that it did, and the first ones may be of
/// what it can do without.
fn causes(log: &str) -> String {
    let errors = log.lines().filter(|line| line.contains("Error"));
    let mut errors: Vec<&str> = errors.map(str::trim).collect();
    if errors.len() > 1 {
        errors.pop();
    }
    errors[errors.len().saturating_sub(2)..].join("; ")
}

/// The memory of a container may hold anything.
fn private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

/// Writes the archive whole or not at all.
fn pack(folder: &Path, location: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut temporary = location.as_os_str().to_owned();
    temporary.push(".part");
    let temporary = PathBuf::from(temporary);
    let _ = fs::remove_file(&temporary);
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|file| {
            let mut tar = tar::Builder::new(io::BufWriter::new(file));
            tar.follow_symlinks(false);
            tar.append_dir_all("", folder)?;
            let file = tar.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, location));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", location.display())))
}
