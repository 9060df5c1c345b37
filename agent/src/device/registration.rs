//! How device plugins make themselves known: by calling `Register` at
//! `<root-dir>/device-plugins/kubelet.sock`, or by a socket in `plugins_registry`.
//!
//! A plugin that calls is called back within its call. It sees that the node has started anew by its
//! own socket being removed, or by `kubelet.sock` being another one, and calls again.

use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::plan::is_valid_extended;
use super::wire::registration_server::{Registration, RegistrationServer};
use super::wire::{Empty, RegisterRequest};
use super::{DeviceError, Devices};
use crate::metrics::METRICS;
use crate::plugins::{PluginHandler, PluginInfo, Refusal, authority};

/// The only version there is.
const VERSION: &str = "v1beta1";
const SOCKET: &str = "kubelet.sock";

fn check(name: &str, versions: &[String]) -> Result<(), String> {
    if !versions.iter().any(|version| version == VERSION) {
        return Err(format!(
            "requested API version {versions:?} is not supported by kubelet. Supported version is \
             [\"{VERSION}\"]"
        ));
    }
    if !is_valid_extended(name) {
        return Err(format!("the ResourceName {name:?} is invalid"));
    }
    Ok(())
}

/// Makes `folder`, and removes the sockets in it, but nothing else.
pub(super) fn clean(folder: &Path) -> Result<(), DeviceError> {
    let error = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| DeviceError::Io { operation, path, source }
    };
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o750).create(folder).map_err(error("create", folder))?;
    for entry in std::fs::read_dir(folder).map_err(error("read", folder))? {
        let path = entry.map_err(error("read", folder))?.path();
        // It may be gone by now.
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.file_type().is_socket() {
            std::fs::remove_file(&path).map_err(error("remove", &path))?;
        }
    }
    Ok(())
}

/// Listens in `folder`.
pub(super) fn listen(folder: &Path) -> Result<UnixListener, DeviceError> {
    let path = folder.join(SOCKET);
    UnixListener::bind(&path).map_err(|source| DeviceError::Io {
        operation: "listen on",
        path,
        source,
    })
}

/// Takes registrations at `listener` until `shutdown` turns true.
pub(super) async fn serve(
    devices: Arc<Devices>,
    listener: UnixListener,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let end = async move { crate::shutdown::requested(&mut shutdown).await };
    Server::builder()
        .add_service(RegistrationServer::new(Calls(devices)))
        .serve_with_incoming_shutdown(authority::incoming(listener), end)
        .await?;
    Ok(())
}

struct Calls(Arc<Devices>);

#[async_trait]
impl Registration for Calls {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let RegisterRequest { version, endpoint, resource_name, .. } = request.into_inner();
        METRICS.device_plugin_registered(&resource_name);
        check(&resource_name, &[version]).map_err(|reason| {
            tracing::error!(resource = resource_name, reason, "a device plugin is refused");
            Status::unknown(reason)
        })?;
        let socket: PathBuf = self.0.folder().join(&endpoint);
        self.0.connect(&resource_name, &socket, None).await.map_err(|status| {
            tracing::error!(resource = resource_name, socket = %socket.display(), error = %status,
                "cannot call a device plugin back");
            Status::unknown(format!("failed to dial device plugin: {}", status.message()))
        })?;
        Ok(Response::new(Empty {}))
    }
}

/// Takes device plugins of the registry.
pub(super) struct Registered(pub(super) Arc<Devices>);

#[async_trait]
impl PluginHandler for Registered {
    fn kind(&self) -> &'static str {
        "DevicePlugin"
    }

    async fn take(&self, socket: &Path, plugin: PluginInfo) -> Result<(), Refusal> {
        let PluginInfo { name, endpoint, supported_versions, .. } = plugin;
        check(&name, &supported_versions).map_err(Refusal::Invalid)?;
        let endpoint = if endpoint.is_empty() { socket } else { Path::new(&endpoint) };
        self.0
            .connect(&name, endpoint, Some(socket))
            .await
            .map_err(|status| Refusal::Failed(status.message().to_owned()))
    }

    fn registered(&self, _: &str) {}

    fn untold(&self, name: &str, socket: &Path) {
        self.0.disconnect(name, socket);
    }

    fn unregistered(&self, name: &str, socket: &Path) {
        self.0.disconnect(name, socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_are_removed_at_the_start() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("device-plugins");
        clean(&folder).unwrap();
        let bind = |name: &str| std::os::unix::net::UnixListener::bind(folder.join(name)).unwrap();
        let _listening = [bind("kubelet.sock"), bind("gpu.sock")];
        std::fs::create_dir(folder.join("sub")).unwrap();
        std::fs::write(folder.join("kubelet_internal_checkpoint"), "{}").unwrap();
        std::os::unix::fs::symlink("/nowhere", folder.join("link")).unwrap();
        clean(&folder).unwrap();
        let left = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name());
        let mut left: Vec<_> = left.collect();
        left.sort();
        assert_eq!(left, ["kubelet_internal_checkpoint", "link", "sub"]);
    }

    #[test]
    fn a_plugin_must_speak_the_version_and_name_a_resource() {
        let versions = |list: &[&str]| list.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
        assert_eq!(check("a.example/b", &versions(&["v1", "v1beta1"])), Ok(()));
        assert!(check("a.example/b", &versions(&["v1alpha"])).unwrap_err().contains("v1alpha"));
        assert!(check("cpu", &versions(&["v1beta1"])).unwrap_err().contains("\"cpu\""));
    }
}
