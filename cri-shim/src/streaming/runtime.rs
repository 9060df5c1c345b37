//! What the streaming server needs of the runtime behind it. The shim is one; tests have another.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::descriptor::Descriptor;
use crate::api;

/// The end of something, to be waited for.
pub type Ending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A process that was started for a client. Dropping [`Process::exit`] before its end kills it and
/// what it started.
pub struct Process {
    pub stdin: Option<Arc<Descriptor>>,
    pub stdout: Option<Arc<Descriptor>>,
    pub stderr: Option<Arc<Descriptor>>,
    /// Input and output are a terminal.
    pub tty: bool,
    /// Its exit code, or why there is none.
    pub exit: Ending<Result<i32, String>>,
}

/// A client's part in a container's own streams; dropping it detaches.
pub struct Attachment {
    pub stdin: Option<Arc<Descriptor>>,
    pub stdout: Option<Arc<Descriptor>>,
    pub stderr: Option<Arc<Descriptor>>,
    /// The container has a terminal.
    pub tty: bool,
    /// The container's input ends with its first client's.
    pub stdin_once: bool,
    /// Comes when the container's input has been ended by another client.
    pub stdin_ended: Ending<()>,
    /// The container's end.
    pub exit: Ending<()>,
}

/// What clients can have done in pods.
#[tonic::async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Starts a process in a container.
    ///
    /// # Errors
    /// Why it does not run, for people.
    async fn exec(&self, request: &api::ExecRequest) -> Result<Process, String>;

    /// Joins a running container's streams.
    ///
    /// # Errors
    /// Why it cannot be, for people.
    async fn attach(&self, request: &api::AttachRequest) -> Result<Attachment, String>;

    /// Ends the input of a container that was created with `stdin_once`.
    async fn close_stdin(&self, container: &str);

    /// Connects to a port on the loopback addresses of a pod.
    ///
    /// # Errors
    /// Of the connection, or [`io::ErrorKind::NotFound`] when the pod is gone.
    async fn connect(&self, sandbox: &str, port: u16) -> io::Result<TcpStream>;
}
