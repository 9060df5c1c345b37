//! Why a container cannot have devices, in the words that kubelet has for it.

use std::path::PathBuf;

use tonic::Status;

use crate::join::files::FileError;

/// Why devices are not there.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No plugin has told of the resource.
    #[error("cannot allocate unregistered device {0}")]
    Unregistered(String),
    /// The plugin is away, or all its devices are unhealthy.
    #[error("no healthy devices present; cannot allocate unhealthy devices {0}")]
    NoneHealthy(String),
    /// What the container had before the node started anew is not healthy now.
    #[error(
        "previously allocated devices are no longer healthy; cannot allocate unhealthy devices {0}"
    )]
    Unhealthy(String),
    /// Others have what there is.
    #[error(
        "requested number of devices unavailable for {resource}. Requested: {requested}, Available: {available}"
    )]
    Short {
        /// The resource.
        resource: String,
        /// Devices that the container lacks.
        requested: usize,
        /// Devices that are free.
        available: usize,
    },
    /// The container asks for another number than it has.
    #[error(
        "pod {pod:?} container {container:?} changed request for resource {resource:?} from {had} to {asked}"
    )]
    Changed {
        /// The pod's UID.
        pod: String,
        /// The container.
        container: String,
        /// The resource.
        resource: String,
        /// Devices that it has.
        had: usize,
        /// Devices that it asks for.
        asked: usize,
    },
    /// The plugin of the resource has been away for longer than its time of grace.
    #[error(
        "endpoint not found in cache for a registered resource: {0}; see whether its device plugin runs on this node"
    )]
    NoEndpoint(String),
    /// The plugin is away.
    #[error("endpoint {0} has been stopped; see whether its device plugin runs on this node")]
    Stopped(String),
    /// The plugin refused, or did not answer.
    #[error("{what}rpc error: code = {:?} desc = {}", status.code(), status.message())]
    Rpc {
        /// Words that go before.
        what: &'static str,
        /// Its answer.
        status: Box<Status>,
    },
    /// The plugin allocated for no container.
    #[error("no containers return in allocation response of {0}")]
    NoResponse(String),
    /// The pod ended meanwhile.
    #[error("the pod ends before it has its devices")]
    Ended,
    /// The assignment could not be put on disk.
    #[error("failed to write checkpoint file: {0}")]
    Checkpoint(#[from] FileError),
    /// The folder of plugins cannot be used.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// `create`, `read`, `listen on`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}
