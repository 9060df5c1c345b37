//! Services and EndpointSlices -> netfilter: the work of kube-proxy.
//!
//! Floor 1 is [`object`] and the pure planning; [`Proxy::run`] is the loop; the backends are the effects.

pub mod backend;
mod choose;
mod claims;
pub mod config;
mod conntrack;
pub mod explain;
mod health;
pub mod iptables;
mod job;
mod metrics;
pub mod model;
pub mod nftables;
pub mod object;
pub mod plan;
pub mod question;
mod run;
mod server;
pub mod status;
mod sys;
mod sysctl;

pub use config::{Config, DetectLocal, Mode, NodePortAddresses};
pub use server::MetricsPort;
pub use status::{ProxyError, ProxyStatus};

use tokio::sync::{mpsc, watch};

/// Why the proxy could not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No backend works on this kernel.
    #[error(
        "start the proxy: {0}; check that it runs as root (CAP_NET_ADMIN) and that the kernel has nf_tables or iptables"
    )]
    NoBackend(String),
    /// A backend ended unexpectedly.
    #[error("the proxy's backend ended: {0}")]
    Backend(String),
    /// A port of its own is taken, and the configuration says not to wait for it.
    #[error(
        "listen at {address}: {source}; free the port, or leave bindAddressHardFail out to try again"
    )]
    Bind {
        /// Where.
        address: std::net::SocketAddr,
        /// The cause.
        source: std::io::Error,
    },
    /// Something could not be removed.
    #[error("remove the proxy's rules: {0}")]
    Cleanup(String),
}

/// The proxy before it runs.
pub struct Proxy {
    config: Config,
    status: watch::Sender<ProxyStatus>,
    asker: question::Asker,
    questions: mpsc::Receiver<question::Question>,
    port: MetricsPort,
}

impl Proxy {
    /// Prepares a proxy; nothing is touched yet.
    pub fn new(config: Config) -> Self {
        let (asker, questions) = mpsc::channel(8);
        let status = watch::Sender::new(ProxyStatus::default());
        let port = MetricsPort::default();
        Proxy { config, status, asker: question::Asker(asker), questions, port }
    }

    /// With what the program around it shows at the metrics port.
    #[must_use]
    pub fn with_port(self, port: MetricsPort) -> Self {
        Proxy { port, ..self }
    }

    /// Its status, now and as it changes.
    pub fn status(&self) -> watch::Receiver<ProxyStatus> {
        self.status.subscribe()
    }

    /// For asking it while it runs.
    pub fn asker(&self) -> question::Asker {
        self.asker.clone()
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
        run::run(self, changes, shutdown).await
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

/// Removes everything that any backend of the proxy, or upstream's proxy in its nftables or iptables
/// mode, has put into the kernel; for `longshore reset` and `longshore proxy cleanup`.
///
/// # Errors
/// Lists what could not be removed; the rest is gone nevertheless.
pub async fn cleanup() -> Result<(), Error> {
    let removed = tokio::task::spawn_blocking(|| {
        use nftables::names::{TABLE, UPSTREAM_TABLE};
        let mut errors = Vec::new();
        // A kernel without one of the two has no rules of it.
        if let Err(error) = nftables::backend::Nftables::cleanup(&[TABLE, UPSTREAM_TABLE]) {
            errors.push(error.to_string());
        }
        if let Err(error) = iptables::Iptables::cleanup(false) {
            errors.push(error.to_string());
        }
        errors
    });
    match removed.await {
        Ok(errors) if errors.is_empty() => Ok(()),
        Ok(errors) => Err(Error::Cleanup(errors.join("; "))),
        Err(error) => Err(Error::Cleanup(error.to_string())),
    }
}
