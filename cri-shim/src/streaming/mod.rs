//! The streaming server: Exec, Attach and PortForward give their caller a URL on it, and the client
//! that comes there (crictl, a kubelet, an API server through one) gets its streams.
//!
//! A URL holds a token that works once and for a minute. After the upgrade a connection is two
//! protocols ([`spdy`] and [`websocket`]) over one [`wire`], and what is done over it ([`command`],
//! [`forward`]) does not know which of them it is. Data goes from a process's pipe or terminal to the
//! socket and back through one buffer; the monitors are not in the way.
//!
//! Everything that a client sends is bounded: headers and their decompression, streams, frames, what
//! waits for a slow process, connections that ask for nothing.

mod command;
pub mod descriptor;
mod forward;
#[cfg(fuzzing)]
pub mod fuzz;
mod listen;
pub mod runtime;
mod session;
pub mod spdy;
pub mod status;
mod sys;
mod tokens;
pub mod upgrade;
pub mod websocket;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tonic::Status;

pub use runtime::Runtime;

use self::tokens::{MAX_WAITING, Tokens};
use crate::api;

/// Where and how the server listens. The defaults are containerd's.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// The address to listen on, `127.0.0.1`.
    pub address: String,
    /// The port to listen on; any free one when 0.
    pub port: u16,
    /// How long a connection on which nothing happens is kept, 4 h.
    pub idle_timeout: Duration,
    /// How long a client may take to open its streams, 30 s.
    pub creation_timeout: Duration,
    /// Certificate chain and private key, both PEM files, for HTTPS.
    pub tls: Option<(PathBuf, PathBuf)>,
}

impl Default for StreamConfig {
    fn default() -> Self {
        StreamConfig {
            address: "127.0.0.1".to_owned(),
            port: 0,
            idle_timeout: Duration::from_secs(4 * 60 * 60),
            creation_timeout: Duration::from_secs(30),
            tls: None,
        }
    }
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The address cannot be listened on.
    #[error("listening for streams on {address}:{port} failed: {source}; choose another address")]
    Listen { address: String, port: u16, source: io::Error },
    /// Certificate or key cannot be used.
    #[error("reading the streaming server's TLS file {path} failed: {why}")]
    Tls { path: PathBuf, why: String },
}

/// What a token stands for.
#[derive(Clone, Debug)]
enum Waiting {
    Exec(api::ExecRequest),
    Attach(api::AttachRequest),
    PortForward(api::PortForwardRequest),
}

/// The server, listening.
pub struct Streaming {
    config: StreamConfig,
    listener: TcpListener,
    tls: Option<tokio_rustls::TlsAcceptor>,
    urls: Arc<Urls>,
}

/// The side of the server that gives out URLs.
pub struct Urls {
    base: String,
    waiting: Mutex<Tokens<Waiting>>,
}

impl Streaming {
    /// Listens; clients are served by [`Streaming::serve`].
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn bind(config: StreamConfig) -> Result<Self, StreamError> {
        let tls = config.tls.as_ref().map(|(chain, key)| listen::tls(chain, key)).transpose()?;
        let failed = |source| StreamError::Listen {
            address: config.address.clone(),
            port: config.port,
            source,
        };
        let at = (config.address.trim_matches(['[', ']']), config.port);
        let listener = TcpListener::bind(at).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{}", reachable(address));
        let urls = Arc::new(Urls { base, waiting: Mutex::default() });
        Ok(Streaming { config, listener, tls, urls })
    }

    /// Where the CRI's verbs get their URLs.
    pub fn urls(&self) -> Arc<Urls> {
        self.urls.clone()
    }

    /// Serves clients until `stop` resolves; their sessions end with it.
    pub async fn serve(self, runtime: Arc<dyn Runtime>, stop: impl Future<Output = ()>) {
        listen::serve(self, runtime, stop).await;
    }
}

/// An address that a client on this node can connect to.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl Urls {
    /// The URL of an exec.
    ///
    /// # Errors
    /// `InvalidArgument` for a request that makes no sense, `ResourceExhausted` when too many wait.
    pub fn exec(&self, request: api::ExecRequest) -> Result<String, Status> {
        if request.cmd.is_empty() {
            return Err(Status::invalid_argument("no command"));
        }
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        self.url("exec", Waiting::Exec(request))
    }

    /// The URL of an attachment.
    ///
    /// # Errors
    /// As [`Urls::exec`].
    pub fn attach(&self, request: api::AttachRequest) -> Result<String, Status> {
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        self.url("attach", Waiting::Attach(request))
    }

    /// The URL of forwarded ports.
    ///
    /// # Errors
    /// As [`Urls::exec`].
    pub fn port_forward(&self, request: api::PortForwardRequest) -> Result<String, Status> {
        if request.port.iter().any(|port| u16::try_from(*port).is_err() || *port == 0) {
            return Err(Status::invalid_argument("a port is not between 1 and 65535"));
        }
        self.url("portforward", Waiting::PortForward(request))
    }

    fn url(&self, kind: &str, waiting: Waiting) -> Result<String, Status> {
        let mut random = [0u8; 16];
        aws_lc_rs::rand::fill(&mut random)
            .map_err(|_| Status::internal("no random numbers for a streaming token"))?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let url = format!("{}/{kind}/{token}", self.base);
        let mut tokens = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.insert(token, waiting, Instant::now()) {
            return Ok(url);
        }
        Err(Status::resource_exhausted(format!(
            "{MAX_WAITING} streaming requests wait for their clients; try again later"
        )))
    }

    fn take(&self, token: &str) -> Option<Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take(token, Instant::now())
    }
}

/// A terminal has no error stream, and a session without streams no purpose.
fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), Status> {
    if tty && stderr {
        return Err(Status::invalid_argument("tty and stderr cannot both be true"));
    }
    if !(stdin || stdout || stderr) {
        return Err(Status::invalid_argument("one of stdin, stdout and stderr must be set"));
    }
    Ok(())
}
