//! CheckpointContainer: a running container's state as an archive, for forensics (KEP-2008).
//!
//! CRIU freezes and dumps the processes; an OCI runtime that knows how to call it does (`runc
//! checkpoint`), so only pods of such a RuntimeClass handler have it. The archive's layout is that of
//! containerd and CRI-O, which `checkpointctl` reads and both restore from.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tonic::Status;

use super::container_list::running;
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
        if self.config.criu.is_none() {
            return Err(Status::unimplemented(
                "checkpoints need CRIU, which is not installed on this node",
            ));
        }
        let handler = container.sandbox.record().runtime_handler.clone();
        let Some(runtime) = self.config.runtime_handlers.get(&handler).cloned() else {
            return Err(Status::unimplemented(
                "the built-in runtime cannot checkpoint; run the pod with a RuntimeClass whose \
                 handler is runc",
            ));
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
            let made = this.checkpoint(&container, &runtime, &folder, &location, limit).await;
            let _ = blocking(move || fs::remove_dir_all(folder)).await;
            made
        });
        made.await.map_err(|e| internal("making the checkpoint", e))??;
        Ok(api::CheckpointContainerResponse {})
    }

    async fn checkpoint(
        self: &Arc<Self>,
        container: &Arc<Container>,
        runtime: &Path,
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
        self.dump(container, runtime, folder, limit).await?;

        let (config, status) = self.described(container, runtime);
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

    /// Has the OCI runtime dump the container's processes, which run on.
    async fn dump(
        &self,
        container: &Container,
        runtime: &Path,
        folder: &Path,
        limit: Duration,
    ) -> Result<(), Status> {
        let bundle = self.layout.bundle(&container.id);
        let log = folder.join("runtime.log");
        let mut command = tokio::process::Command::new(runtime);
        command.arg("--root").arg(bundle.join("oci"));
        command.arg("--log").arg(&log).args(["--log-format", "json", "checkpoint"]);
        command.arg("--leave-running").arg("--work-path").arg(folder);
        command.arg("--image-path").arg(folder.join(IMAGES)).arg(&container.id);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let name = runtime.display();
        let mut child = command
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| internal(&format!("running {name}"), e))?;
        let ended = tokio::time::timeout(limit, child.wait()).await.map_err(|_| {
            Status::deadline_exceeded(format!(
                "{name} did not checkpoint within {} s",
                limit.as_secs()
            ))
        })?;
        let ended = ended.map_err(|e| internal(&format!("waiting for {name}"), e))?;
        if ended.success() {
            let _ = fs::remove_file(log);
            return Ok(());
        }
        let said = last_error(&fs::read_to_string(&log).unwrap_or_default());
        let dump = fs::read_to_string(folder.join("dump.log")).unwrap_or_default();
        let criu = dump.lines().rev().find(|line| line.contains("Error")).map(str::trim);
        Err(Status::internal(format!(
            "{name} could not checkpoint the container: {}{}",
            said.unwrap_or_else(|| ended.to_string()),
            criu.map(|line| format!(" (CRIU: {line})")).unwrap_or_default()
        )))
    }

    /// What `config.dump` and `status.dump` say, in the words of containerd and CRI-O.
    fn described(&self, container: &Arc<Container>, runtime: &Path) -> (Value, Value) {
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
            "runtime": runtime.file_name().unwrap_or_default().to_string_lossy(),
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
