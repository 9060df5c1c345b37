//! The shim's end of a monitor: one connection per request, and one that listens for exits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::monitor::frame;
use crate::monitor::protocol::{MAX_FRAME, Reply, Request};

/// A sandbox's monitor, by its socket.
#[derive(Clone, Debug)]
pub struct MonitorClient {
    socket: PathBuf,
}

/// An open exchange.
pub struct Conversation(UnixStream);

impl Conversation {
    /// The next reply; `None` when the monitor is gone.
    pub async fn next(&mut self) -> io::Result<Option<Reply>> {
        receive(&mut self.0).await
    }
}

impl MonitorClient {
    pub fn new(socket: PathBuf) -> Self {
        MonitorClient { socket }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request with descriptors and leaves the connection open for its replies.
    pub async fn open(&self, request: &Request, fds: &[OwnedFd]) -> io::Result<Conversation> {
        // Connecting to a listening unix socket and writing one small frame do not block.
        let stream = StdStream::connect(&self.socket)?;
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        frame::send(&stream, request, &raw)?;
        stream.set_nonblocking(true)?;
        Ok(Conversation(UnixStream::from_std(stream)?))
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

async fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<Option<T>> {
    let length = match stream.read_u32_le().await {
        Ok(length) => length as usize,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    };
    if length > MAX_FRAME {
        return Err(io::Error::other("frame too long"));
    }
    let mut body = vec![0u8; length];
    stream.read_exact(&mut body).await?;
    Ok(Some(serde_json::from_slice(&body)?))
}
