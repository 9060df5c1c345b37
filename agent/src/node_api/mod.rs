//! The node API (kubelet's port 10250): what the control plane and operators ask of a node.
//!
//! Every request on the TLS port passes `guard` first; `listen` bounds what strangers can do before
//! that. Logs are read from the files, statistics from the runtime; exec, attach and port-forward
//! are connections to the runtime's streaming server, with the bytes passed on as they are.

mod checkpoint;
mod door;
mod guard;
mod health;
mod http2;
mod identity;
mod listen;
mod logs;
mod metrics;
#[cfg(test)]
mod names;
mod node_logs;
mod pods;
mod profiles;
mod proxy_port;
mod reload;
mod reviews;
mod routes;
mod stats;
mod stream;
#[cfg(test)]
mod tests;
mod tls;
mod zpages;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use self::door::Hurry;
use self::guard::Guard;
use self::logs::follow::Followers;
use self::stats::gather::Gatherer;
use self::tls::Certificate;
use crate::config::NodeApiConfig;
use crate::health::Watched;
use crate::node_context::NodeContext;
use crate::pod::SyncHandle;
use crate::runtime::Runtime;
use crate::volume::NodeVolumes;

pub use identity::Identity;
pub use proxy_port::proxy_port;
pub use reviews::{Access, ClusterReviews, Reviews};
pub use stats::live::LiveUsage;

/// Link to the serving certificate that the cluster issued, in the certificate folder.
pub const SERVING_CERTIFICATE: &str = "kubelet-server-current.pem";

/// Why the node API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum NodeApiError {
    /// The port is taken, or not to be had.
    #[error("cannot listen on {address} for the node API (--port): {cause}")]
    Listen {
        /// Address and port.
        address: std::net::SocketAddr,
        /// Why.
        cause: std::io::Error,
    },
    /// Certificate or TLS settings.
    #[error("TLS of the node API: {0}")]
    Tls(String),
}

/// What the node API works with.
pub struct NodeApi {
    /// The node.
    pub node: Arc<NodeContext>,
    /// Names and addresses for a self-signed certificate; the host name first.
    pub names: Vec<String>,
    /// What it is told.
    pub config: NodeApiConfig,
    /// `<root-dir>/pki`.
    pub cert_dir: std::path::PathBuf,
    /// The pods.
    pub sync: SyncHandle,
    /// The runtime.
    pub runtime: Arc<dyn Runtime>,
    /// The volumes of the pods.
    pub volumes: Option<Arc<NodeVolumes>>,
    /// What health is made of.
    pub watched: Arc<Watched>,
}

/// What handlers share.
struct Shared {
    config: NodeApiConfig,
    sync: SyncHandle,
    runtime: Arc<dyn Runtime>,
    watched: Arc<Watched>,
    followers: Arc<Followers>,
    gatherer: Arc<Gatherer>,
    node: Arc<NodeContext>,
    cert_dir: std::path::PathBuf,
    /// How often each check of health was good and bad.
    checks: Mutex<BTreeMap<&'static str, (u64, u64)>>,
}

impl Shared {
    /// Counts a check of health, and gives how often it was good and bad.
    fn checked(&self, name: &'static str, good: bool) -> (u64, u64) {
        let mut checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = checks.entry(name).or_default();
        *if good { &mut counts.0 } else { &mut counts.1 } += 1;
        *counts
    }
}

/// An answer that is not what was asked for, in words.
#[derive(Debug)]
struct Failure(StatusCode, String);

impl Failure {
    fn not_found(message: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, message.into())
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, message.into())
    }

    fn internal(message: impl Into<String>) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, message.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, [("x-content-type-options", "nosniff")], self.1).into_response()
    }
}

/// A node API that listens.
pub struct Listening {
    listener: TcpListener,
    read_only: Option<TcpListener>,
    tls: TlsAcceptor,
    routes: axum::Router,
    read_only_routes: axum::Router,
    hurry: Hurry,
}

impl NodeApi {
    /// Listens and makes the certificate ready. Without `reviews` there is no cluster to ask.
    pub async fn listen(
        self,
        reviews: Option<Box<dyn Reviews>>,
    ) -> Result<Listening, NodeApiError> {
        let config = self.config;
        let guard =
            Guard::new(&self.node.node_name, &config.authentication, config.authorization, reviews);
        let certificate = certificate(&config, &self.cert_dir, &self.names)?;
        let tls =
            tls::server_config(&config.tls, Arc::new(certificate), guard.asks_for_certificates())?;
        let listener = bind(config.address).await?;
        let read_only = match config.read_only {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let shared = Arc::new(Shared {
            followers: Followers::new(self.sync.table().clone()),
            gatherer: Arc::new(Gatherer::new(
                self.node.clone(),
                self.sync.table().clone(),
                self.runtime.clone(),
                self.volumes,
            )),
            node: self.node,
            cert_dir: self.cert_dir,
            checks: Mutex::default(),
            sync: self.sync,
            runtime: self.runtime,
            watched: self.watched,
            config,
        });
        Ok(Listening {
            listener,
            read_only,
            tls: TlsAcceptor::from(Arc::new(tls)),
            routes: routes::guarded(shared.clone(), Arc::new(guard)),
            read_only_routes: routes::read_only(shared),
            hurry: Hurry::default(),
        })
    }
}

impl Listening {
    /// Serves until `shutdown`.
    pub async fn serve(self, shutdown: watch::Receiver<bool>) {
        let (tls, hurry) = (Some(self.tls), self.hurry);
        let main = listen::serve(self.listener, tls, self.routes, hurry, shutdown.clone());
        let read_only = async {
            if let Some(listener) = self.read_only {
                listen::serve(listener, None, self.read_only_routes, hurry, shutdown).await;
            }
        };
        tokio::join!(main, read_only);
    }
}

async fn bind(address: std::net::SocketAddr) -> Result<TcpListener, NodeApiError> {
    // Go's `0.0.0.0` and `::` alike take both families.
    let both = std::net::SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), address.port());
    if address.ip().is_unspecified()
        && let Ok(listener) = TcpListener::bind(both).await
    {
        return Ok(listener);
    }
    TcpListener::bind(address).await.map_err(|cause| NodeApiError::Listen { address, cause })
}

fn certificate(
    config: &NodeApiConfig,
    dir: &Path,
    names: &[String],
) -> Result<Certificate, NodeApiError> {
    if let Some((chain, key)) = &config.tls.files {
        let certificate = Certificate::of(chain, key);
        if !certificate.is_there() {
            return Err(NodeApiError::Tls(format!(
                "tlsCertFile {} and tlsPrivateKeyFile {} cannot be used; the log says why",
                chain.display(),
                key.display()
            )));
        }
        return Ok(certificate);
    }
    if config.tls.bootstrap {
        let issued = dir.join(SERVING_CERTIFICATE);
        return Ok(Certificate::of(&issued, &issued));
    }
    tls::ensure_self_signed(dir, names, jiff::Timestamp::now().as_second())
}
