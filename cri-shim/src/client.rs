//! The shim's end of a monitor: one connection per request, and one that listens for exits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::monitor::frame::{self, Inbox};
use crate::monitor::protocol::{Reply, Request, VERSION};

/// A sandbox's monitor, by its socket.
#[derive(Clone, Debug)]
pub struct MonitorClient {
    socket: PathBuf,
    /// The protocol it speaks; zero as long as nobody has asked.
    version: Arc<AtomicU32>,
}

/// What a monitor says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Greeting {
    /// The version of the protocol it speaks.
    pub version: u32,
    /// Its process.
    pub pid: i32,
    /// The first process of the pod's shared PID namespace.
    pub init: Option<i32>,
}

/// An open exchange.
pub struct Conversation {
    stream: UnixStream,
    inbox: Inbox,
}

impl Conversation {
    /// The next reply; `None` when the monitor is gone. Nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> io::Result<Option<Reply>> {
        loop {
            if let Some(reply) = self.inbox.take_frame()? {
                return Ok(Some(reply));
            }
            self.stream.readable().await?;
            let Conversation { stream, inbox } = self;
            match stream.try_io(Interest::READABLE, || inbox.fill(stream)) {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The descriptor that came with the replies so far, if any.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        self.inbox.fds.pop()
    }
}

impl MonitorClient {
    pub fn new(socket: PathBuf) -> Self {
        MonitorClient { socket, version: Arc::default() }
    }

    /// Asks what it is; from then on only what it knows is asked of it.
    pub async fn greet(&self) -> io::Result<Greeting> {
        match self.call(&Request::Hello { version: VERSION }).await? {
            Reply::Hello { version, pid, init } => {
                self.version.store(version, Ordering::Relaxed);
                Ok(Greeting { version, pid, init })
            }
            other => Err(io::Error::other(format!("the monitor answered hello with {other:?}"))),
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request with descriptors and leaves the connection open for its replies.
    pub async fn open(&self, request: &Request, fds: &[OwnedFd]) -> io::Result<Conversation> {
        let (needs, speaks) = (request.needs(), self.version.load(Ordering::Relaxed));
        if speaks != 0 && needs > speaks {
            let message = format!(
                "the pod's monitor was started by an older version: it speaks version {speaks} of \
                 the protocol, and this needs {needs}; make the pod anew"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        // Connecting to a listening unix socket and writing one small frame do not block.
        let stream = StdStream::connect(&self.socket)?;
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        frame::send(&stream, request, &raw)?;
        stream.set_nonblocking(true)?;
        Ok(Conversation { stream: UnixStream::from_std(stream)?, inbox: Inbox::default() })
    }

    /// A request with one reply. A refusal is an error.
    pub async fn call(&self, request: &Request) -> io::Result<Reply> {
        let mut conversation = self.open(request, &[]).await?;
        match conversation.next().await? {
            Some(Reply::Failed { message }) => Err(io::Error::other(message)),
            Some(reply) => Ok(reply),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the monitor is gone")),
        }
    }
}
