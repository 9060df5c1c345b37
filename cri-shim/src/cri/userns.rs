//! Whether pods can have user namespaces (`hostUsers: false`) here: what Status tells of the runtime
//! handlers, and what RunPodSandbox refuses with.
//!
//! It is tried, not guessed from a version: it depends on the kernel, on sysctls, on the file
//! system of the images, and on what this node itself runs in.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use tonic::Status;

use super::Shim;
use crate::image::layout::Layout as ImageLayout;

/// How long a failed try counts; what was missing may have been mended.
const FAILURE: Duration = Duration::from_secs(60);

/// External OCI runtimes that join a user namespace given by its path, with what is mounted here.
const CAPABLE: [&str; 2] = ["runc", "crun"];

/// The outcome of the last try.
#[derive(Debug, Default)]
pub struct UsernsSupport(tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>);

impl Shim {
    /// What is missing for pods to have user namespaces, if anything is.
    pub(super) async fn userns_support(&self) -> Result<(), String> {
        let mut last = self.userns.0.lock().await;
        match &*last {
            Some((_, Ok(()))) => return Ok(()),
            Some((at, Err(missing))) if at.elapsed() < FAILURE => return Err(missing.clone()),
            _ => {}
        }
        let layers = ImageLayout::new(&self.layout.state).layers();
        let tried = self.zygote.probe_userns(layers, self.layout.mounts()).await;
        let tried = tried.map_err(|e| e.to_string());
        if let Err(missing) = &tried {
            tracing::info!(missing, "pods with hostUsers: false cannot run on this node");
        }
        *last = Some((Instant::now(), tried.clone()));
        tried
    }

    /// What keeps a runtime handler from it, if the node can.
    pub(super) fn handler_userns(&self, handler: &str) -> Result<(), String> {
        // Our own maker needs neither.
        let Some(program) = self.config.runtime_handlers.get(handler) else { return Ok(()) };
        let name = program.file_name().unwrap_or_default();
        if !CAPABLE.iter().any(|capable| *capable == name) {
            return Err(format!("use the default one, or one of {CAPABLE:?}"));
        }
        let mounts = self.layout.mounts();
        match unreachable(&mounts) {
            None => Ok(()),
            Some(path) => Err(format!(
                "it cannot reach {} as another user: {} may not be searched by all; chmod o+x it",
                mounts.display(),
                path.display()
            )),
        }
    }

    /// Refuses a user namespace where there can be none.
    pub(super) async fn can_have_userns(&self, handler: &str) -> Result<(), Status> {
        self.handler_userns(handler).map_err(|why| {
            Status::failed_precondition(format!(
                "runtime handler {handler:?} does not support user namespaces (hostUsers: false): \
                 {why}"
            ))
        })?;
        self.userns_support().await.map_err(|missing| {
            Status::failed_precondition(format!(
                "this node does not support user namespaces (hostUsers: false): {missing}"
            ))
        })
    }
}

/// The first directory above `path` that not everybody may pass.
fn unreachable(path: &Path) -> Option<&Path> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.reverse();
    above.into_iter().find(|directory| {
        std::fs::metadata(directory).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_folder_above_is_named() {
        let open = tempfile::tempdir_in("/tmp").unwrap();
        let closed = open.path().join("closed");
        std::fs::create_dir_all(closed.join("run/mnt")).unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(open.path(), 0o755);
        mode(&closed, 0o700);
        assert_eq!(unreachable(&closed.join("run/mnt")), Some(closed.as_path()));
        mode(&closed, 0o711);
        // The place itself is covered by what everybody may look into.
        mode(&closed.join("run/mnt"), 0o700);
        assert_eq!(unreachable(&closed.join("run/mnt")), None);
    }
}
