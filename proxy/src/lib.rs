//! Services and EndpointSlices -> netfilter: the work of kube-proxy.
//!
//! Floor 1 is [`object`] and the pure planning; [`Proxy::run`] is the loop; the backends are the effects.

pub mod config;
pub mod object;
pub mod status;

pub use config::{Config, Mode, NodePortAddresses};
pub use status::{ProxyError, ProxyStatus};

use tokio::sync::{mpsc, watch};

/// Why the proxy could not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that is not built yet.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// No backend works on this kernel.
    #[error("start the proxy: {0}")]
    NoBackend(String),
}

/// The proxy before it runs.
pub struct Proxy {
    config: Config,
    status: watch::Sender<ProxyStatus>,
}

impl Proxy {
    /// Prepares a proxy; nothing is touched yet.
    pub fn new(config: Config) -> Self {
        Proxy { config, status: watch::Sender::new(ProxyStatus::default()) }
    }

    /// Its status, now and as it changes.
    pub fn status(&self) -> watch::Receiver<ProxyStatus> {
        self.status.subscribe()
    }

    /// Serves until `shutdown` becomes true or its sender is gone; rules stay in the kernel.
    ///
    /// # Errors
    /// Only if no backend works at all; everything else is reported in the status.
    pub async fn run(
        self,
        changes: mpsc::Receiver<object::Change>,
        shutdown: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let _ = (self.config, changes, shutdown);
        Err(Error::Unimplemented("the proxy's loop"))
    }
}

/// Runs a proxy whose status nobody reads.
///
/// # Errors
/// As [`Proxy::run`].
pub async fn run(
    config: Config,
    changes: mpsc::Receiver<object::Change>,
    shutdown: watch::Receiver<bool>,
) -> Result<(), Error> {
    Proxy::new(config).run(changes, shutdown).await
}

/// Removes everything that any backend of the proxy has put into the kernel; for `longshore reset`.
///
/// # Errors
/// Lists what could not be removed; the rest is gone nevertheless.
pub async fn cleanup() -> Result<(), Error> {
    Err(Error::Unimplemented("the proxy's cleanup"))
}
