//! The way to the API server: one client for the agent's own work, made from a kubeconfig.
//!
//! Three connection pools to the same server: `main` for lists, watches and writes, `objects` for
//! the many small watches of ConfigMaps and Secrets, `heartbeat` for the Lease and the node status,
//! so that no amount of other traffic keeps a node from saying that it lives.

pub mod backoff;
pub mod connect;
pub mod kubeconfig;
pub mod tls;
pub mod transport;
pub mod watch;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;

pub use kubeconfig::Endpoint;
use transport::Transport;

/// Longest wait for the answer to one request that is not a watch.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest wait for the answer to a heartbeat: two fit into one Lease renewal period.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the API server could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The kubeconfig cannot be used.
    #[error(transparent)]
    Kubeconfig(#[from] kubeconfig::KubeconfigError),
    /// Certificates or keys cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// No answer in time.
    #[error("{what}: no answer from the API server within {} s", timeout.as_secs())]
    Timeout {
        /// The request.
        what: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// The server refused, or the connection failed.
    #[error("{what}: {}", explain(cause))]
    Request {
        /// The request.
        what: String,
        /// What the client says.
        cause: Box<kube::Error>,
    },
}

impl ApiError {
    /// HTTP status of the server's answer, if it answered with a `Status`.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Request { cause, .. } => status_code(cause),
            _ => None,
        }
    }

    /// Whether trying the same again later can help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Timeout { .. } => true,
            Self::Request { cause, .. } => match status_code(cause) {
                Some(code) => code >= 500 || code == 429 || code == 408 || code == 401,
                None => true,
            },
            _ => false,
        }
    }
}

/// HTTP status in `error`, if the server answered with a `Status` object.
pub fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// One line that says what went wrong, with the whole chain of causes and without repeating itself.
pub fn explain(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("{} ({} {})", status.message, status.code, status.reason);
    }
    chain(error).trim_start_matches("ServiceError: ").to_owned()
}

/// The messages of `error` and its sources, each said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// Clients to one API server.
#[derive(Clone)]
pub struct Api {
    /// Lists, watches and writes.
    pub main: Client,
    /// Watches of single objects.
    pub objects: Client,
    /// Lease and node status.
    pub heartbeat: Client,
    /// URL of the server.
    pub server: String,
    transports: Arc<[Arc<Transport>; 3]>,
    source: Arc<PathBuf>,
}

impl Api {
    /// Clients from the kubeconfig at `path`. Nothing is connected yet.
    pub fn from_kubeconfig(path: &std::path::Path) -> Result<Self, ApiError> {
        let endpoint = Endpoint::load(path)?;
        let transports = [
            Arc::new(Transport::new(&endpoint)?),
            Arc::new(Transport::new(&endpoint)?),
            Arc::new(Transport::new(&endpoint)?),
        ];
        let client = |t: &Arc<Transport>| Client::new(t.service(), "default");
        Ok(Self {
            main: client(&transports[0]),
            objects: client(&transports[1]),
            heartbeat: client(&transports[2]),
            server: endpoint.server.to_string(),
            transports: Arc::new(transports),
            source: Arc::new(path.to_owned()),
        })
    }

    /// Reads the kubeconfig and the certificates it names again, and drops the connections made
    /// with the old ones: a renewed certificate takes effect at once.
    pub fn reload(&self) -> Result<(), ApiError> {
        let endpoint = Endpoint::load(&self.source)?;
        for transport in self.transports.iter() {
            transport.replace(&endpoint)?;
        }
        Ok(())
    }
}

/// One client for `endpoint`, for a few requests (join).
pub fn client(endpoint: &Endpoint) -> Result<Client, ApiError> {
    Ok(Client::new(Arc::new(Transport::new(endpoint)?).service(), "default"))
}

/// Runs `request` with a time limit; `what` names it in errors.
pub async fn timed<T>(
    what: impl Into<String>,
    timeout: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(timeout, request).await {
        Err(_) => Err(ApiError::Timeout { what: what.into(), timeout }),
        Ok(Err(cause)) => Err(ApiError::Request { what: what.into(), cause: Box::new(cause) }),
        Ok(Ok(value)) => Ok(value),
    }
}
