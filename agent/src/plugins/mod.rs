//! Plugins of the node: how they make themselves known, whatever they are for.
//!
//! Each puts a socket into `<root-dir>/plugins_registry` and is asked over it who it is
//! (`pluginregistration/v1`). What it is for says who takes it: CSI drivers, device plugins,
//! DRA drivers.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use tonic::{Code, Status};

pub(crate) mod authority;
mod connection;
mod registry;

pub(crate) use connection::{connect, connect_watched};
pub use registry::Registry;
pub use wire::PluginInfo;

/// The generated messages of plugin registration.
#[allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]
pub(crate) mod wire {
    tonic::include_proto!("pluginregistration");
}

/// Why a plugin is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// What it says of itself cannot be.
    #[error("plugin validation failed with err: {0}")]
    Invalid(String),
    /// It could not be taken into use (yet).
    #[error("plugin registration failed with err: {0}")]
    Failed(String),
}

/// Who takes the plugins of one type.
#[async_trait]
pub trait PluginHandler: Send + Sync {
    /// The type, as plugins name it.
    fn kind(&self) -> &'static str;

    /// Takes the plugin into use that made itself known by `socket`.
    async fn take(&self, socket: &Path, plugin: PluginInfo) -> Result<(), Refusal>;

    /// The plugin has been told that it is taken.
    fn registered(&self, name: &str);

    /// The plugin could not be told that it is taken: it is not.
    fn untold(&self, name: &str, socket: &Path);

    /// The socket by which it was registered is gone.
    fn unregistered(&self, name: &str, socket: &Path);
}

/// The names of codes in Go's gRPC, where they differ.
pub(crate) fn code_name(code: Code) -> String {
    match code {
        Code::Ok => "OK".into(),
        Code::Cancelled => "Canceled".into(),
        other => format!("{other:?}"),
    }
}

/// What `work` comes to, or that it took longer than `limit`.
pub(crate) async fn in_time<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", limit.as_secs()))),
    }
}
