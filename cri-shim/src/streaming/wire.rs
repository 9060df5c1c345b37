//! An upgraded connection's two halves, the same for both protocols: the [`Source`] that one task
//! reads, and the [`Wire`] that every stream of the connection writes to.
//!
//! Streams write their frames straight to the socket, one after the other behind a lock: there is no
//! queue that could grow, and a client that does not read holds back exactly what it asked for.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::Instant;

use super::spdy::frame as spdy;
use super::websocket::frame as websocket;
use super::websocket::frame::{Decoder, Frame};

/// How much is read from a client at once, in bytes.
const READ: usize = 64 << 10;

/// How many pieces of data wait for a stream before the client is held back.
const QUEUE: usize = 8;

/// How often a client that is held back is looked at, whether it is still there.
const PROBE: Duration = Duration::from_secs(1);

/// How long the end of a connection may take, so that the last data reaches the client.
const LINGER: Duration = Duration::from_secs(5);

/// How data of streams is put on the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// SPDY frames.
    Spdy,
    /// SPDY frames in binary WebSocket messages.
    TunnelledSpdy,
    /// WebSocket messages that begin with their channel.
    Channels { base64: bool },
}

/// What comes for a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Data(Bytes),
    /// The client gave the stream up in both directions.
    Reset,
}

/// The client's data of one stream; ends when the client has ended it or is gone.
pub type Input = mpsc::Receiver<Item>;

/// A stream's queue, both ends.
pub fn queue() -> (mpsc::Sender<Item>, Input) {
    mpsc::channel(QUEUE)
}

/// The writing half.
pub struct Wire {
    sink: Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    framing: Framing,
    gone: watch::Sender<bool>,
    begin: Instant,
    /// Milliseconds after `begin` at which something was last read or written.
    active: AtomicU64,
    /// A probe is being sent.
    probing: AtomicBool,
}

impl Wire {
    /// `sink` is the connection after its upgrade.
    pub fn new(sink: Box<dyn AsyncWrite + Send + Unpin>, framing: Framing) -> Self {
        Wire {
            sink: Mutex::new(sink),
            framing,
            gone: watch::Sender::new(false),
            begin: Instant::now(),
            active: AtomicU64::new(0),
            probing: AtomicBool::new(false),
        }
    }

    /// Sends a piece of a stream's data, `fin` with the last one.
    ///
    /// # Errors
    /// Of the connection, which is gone then.
    pub async fn data(&self, stream: u32, payload: &[u8], fin: bool) -> io::Result<()> {
        match self.framing {
            Framing::Spdy => {
                self.write(&spdy::data_head(stream, payload.len(), fin), payload).await
            }
            Framing::TunnelledSpdy => {
                let inner = spdy::data_head(stream, payload.len(), fin);
                let (outer, length) =
                    websocket::head(websocket::BINARY, inner.len() + payload.len());
                self.write(&[&outer[..length], &inner].concat(), payload).await
            }
            // Channels have no end of their own.
            Framing::Channels { .. } if fin && payload.is_empty() => Ok(()),
            Framing::Channels { base64: false } => {
                let (head, length) = websocket::head(websocket::BINARY, 1 + payload.len());
                let mut prefix = [0u8; 11];
                prefix[..length].copy_from_slice(&head[..length]);
                prefix[length] = stream as u8;
                self.write(&prefix[..=length], payload).await
            }
            Framing::Channels { base64: true } => {
                let mut text = String::from(char::from(b'0'.wrapping_add(stream as u8)));
                STANDARD.encode_string(payload, &mut text);
                let (head, length) = websocket::head(websocket::TEXT, text.len());
                self.write(&head[..length], text.as_bytes()).await
            }
        }
    }

    /// Sends a SPDY control frame.
    ///
    /// # Errors
    /// Of the connection, which is gone then.
    pub async fn control(&self, frame: &[u8]) -> io::Result<()> {
        if self.framing == Framing::TunnelledSpdy {
            let (head, length) = websocket::head(websocket::BINARY, frame.len());
            return self.write(&head[..length], frame).await;
        }
        self.write(frame, &[]).await
    }

    /// Sends a WebSocket control frame.
    ///
    /// # Errors
    /// Of the connection, which is gone then.
    pub async fn websocket_control(&self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let (head, length) = websocket::head(kind, payload.len());
        self.write(&head[..length], payload).await
    }

    /// Sends something that means nothing. While a client is held back its last data stands between
    /// its end and us, so that its end is not seen; but where nobody is left, what we send is
    /// answered by the kernel with a reset.
    fn probe(self: &Arc<Self>, stream: u32) {
        if self.probing.swap(true, Ordering::Relaxed) {
            return;
        }
        let wire = self.clone();
        // A task of its own: a frame that was begun must not be given up.
        tokio::spawn(async move {
            // A failure marks the connection as gone.
            let _ = match wire.framing {
                Framing::Channels { .. } => wire.websocket_control(websocket::PONG, &[]).await,
                Framing::Spdy | Framing::TunnelledSpdy => wire.data(stream, &[], false).await,
            };
            wire.probing.store(false, Ordering::Relaxed);
        });
    }

    async fn write(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut sink = self.sink.lock().await;
        if self.is_gone() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let written = write_both(&mut *sink, head, payload).await;
        match &written {
            Ok(()) => self.touch(),
            Err(_) => self.leave(),
        }
        written
    }

    /// Ends the connection in order, once everything has been sent.
    pub async fn close(&self, code: u16) {
        let ended = async {
            match self.framing {
                Framing::Spdy => self.control(&spdy::goaway(0)).await?,
                Framing::TunnelledSpdy | Framing::Channels { .. } => {
                    self.websocket_control(websocket::CLOSE, &code.to_be_bytes()).await?;
                }
            }
            self.sink.lock().await.shutdown().await
        };
        // A client that does not take the end has lost it.
        let _ = tokio::time::timeout(LINGER, ended).await;
    }

    /// Marks the connection as gone: nothing is written any more.
    pub fn leave(&self) {
        self.gone.send_replace(true);
    }

    /// Whether the client is gone.
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Waits until the client is gone.
    pub async fn gone(&self) {
        let mut gone = self.gone.subscribe();
        // The sender is `self`.
        let _ = gone.wait_for(|gone| *gone).await;
    }

    fn touch(&self) {
        self.active.store(self.begin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// When the connection has been idle for `limit`, if nothing happens.
    fn idle_at(&self, limit: Duration) -> Instant {
        self.begin + Duration::from_millis(self.active.load(Ordering::Relaxed)) + limit
    }
}

async fn write_both(
    sink: &mut (dyn AsyncWrite + Send + Unpin),
    mut head: &[u8],
    mut payload: &[u8],
) -> io::Result<()> {
    while !head.is_empty() && !payload.is_empty() {
        let written = sink.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)]).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let of_head = written.min(head.len());
        head = &head[of_head..];
        payload = &payload[written - of_head..];
    }
    sink.write_all(head).await?;
    sink.write_all(payload).await?;
    sink.flush().await
}

/// The reading half, in the hands of one task.
pub struct Source {
    io: Box<dyn AsyncRead + Send + Sync + Unpin>,
    /// What has been read and not been understood yet.
    pub buffer: BytesMut,
    /// Of a tunnel: the WebSocket frames around the bytes.
    tunnel: Option<(Decoder, BytesMut)>,
    /// The socket, to see a client leave whose data cannot be taken now.
    socket: Option<OwnedFd>,
    idle: Duration,
}

impl Source {
    /// `read` came with the upgrade already; `idle` ends a connection on which nothing happens.
    pub fn new(
        io: Box<dyn AsyncRead + Send + Sync + Unpin>,
        read: BytesMut,
        socket: Option<OwnedFd>,
        idle: Duration,
    ) -> Self {
        Source { io, buffer: read, tunnel: None, socket, idle }
    }

    /// Takes the bytes out of WebSocket messages from now on.
    pub fn tunnelled(mut self) -> Self {
        self.tunnel = Some((Decoder::server(), std::mem::take(&mut self.buffer)));
        self
    }

    /// Puts more bytes into the buffer; `false` at the end, also of the client's patience.
    pub async fn fill(&mut self, wire: &Wire) -> io::Result<bool> {
        let Some((mut decoder, mut raw)) = self.tunnel.take() else {
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = self.read(wire, &mut buffer).await;
            self.buffer = buffer;
            return read;
        };
        let before = self.buffer.len();
        loop {
            match decoder.next(&mut raw).map_err(io::Error::other)? {
                Some(Frame::Data { bytes, .. }) => self.buffer.extend_from_slice(&bytes),
                Some(Frame::Ping(bytes)) => wire.websocket_control(websocket::PONG, &bytes).await?,
                Some(Frame::Pong) => {}
                Some(Frame::Close(_)) => return Ok(false),
                None if self.buffer.len() > before => break,
                None => {
                    if !self.read(wire, &mut raw).await? {
                        return Ok(false);
                    }
                }
            }
        }
        self.tunnel = Some((decoder, raw));
        Ok(true)
    }

    async fn read(&mut self, wire: &Wire, into: &mut BytesMut) -> io::Result<bool> {
        if into.capacity() - into.len() < READ / 4 {
            into.reserve(READ);
        }
        loop {
            let limit = wire.idle_at(self.idle);
            tokio::select! {
                read = self.io.read_buf(into) => {
                    wire.touch();
                    return read.map(|count| count > 0);
                }
                () = wire.gone() => return Ok(false),
                () = tokio::time::sleep_until(limit) => {
                    if wire.idle_at(self.idle) <= Instant::now() {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "idle for too long"));
                    }
                }
            }
        }
    }

    /// Hands an item to a stream and waits for room; what nobody takes any more is dropped.
    ///
    /// # Errors
    /// When the client leaves meanwhile.
    pub async fn deliver(
        &self,
        wire: &Arc<Wire>,
        stream: u32,
        queue: &mpsc::Sender<Item>,
        item: Item,
    ) -> io::Result<()> {
        let item = match queue.try_send(item) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => return Ok(()),
            Err(mpsc::error::TrySendError::Full(item)) => item,
        };
        loop {
            tokio::select! {
                room = queue.reserve() => {
                    if let Ok(room) = room {
                        room.send(item);
                    }
                    return Ok(());
                }
                () = wire.gone() => return Err(io::ErrorKind::BrokenPipe.into()),
                () = tokio::time::sleep(PROBE) => {
                    if self.socket.as_ref().is_some_and(|s| hung_up(s.as_fd())) {
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                    wire.probe(stream);
                }
            }
        }
    }

    /// After the connection's end: takes what still comes, so that the kernel does not reset the
    /// connection before the client has read the last data.
    pub async fn linger(&mut self) {
        self.buffer.clear();
        let rest = async {
            let mut buffer = [0u8; 4096];
            while let Ok(1..) = self.io.read(&mut buffer).await {}
        };
        let _ = tokio::time::timeout(LINGER, rest).await;
    }
}

/// Whether the other end has closed the connection, data on the way notwithstanding.
fn hung_up(socket: BorrowedFd<'_>) -> bool {
    let closed = PollFlags::POLLHUP | PollFlags::POLLERR;
    let mut polled = [PollFd::new(socket, PollFlags::from_bits_retain(libc::POLLRDHUP))];
    // POLLRDHUP has no name here, so a set of events that holds it is given as none.
    poll(&mut polled, PollTimeout::ZERO).is_ok()
        && polled[0].revents().is_none_or(|events| events.intersects(closed))
}

/// The server's data of one stream.
#[derive(Clone)]
pub struct Output {
    wire: Arc<Wire>,
    stream: u32,
    patience: Option<Duration>,
}

impl Output {
    pub fn new(wire: Arc<Wire>, stream: u32) -> Self {
        Output { wire, stream, patience: None }
    }

    /// From now on gives the client up when it takes nothing for as long as that.
    pub fn patient(self, patience: Duration) -> Self {
        Output { patience: Some(patience), ..self }
    }

    /// Sends data; waits while the client does not read.
    ///
    /// # Errors
    /// When the client is gone.
    pub async fn send(&self, data: &[u8]) -> io::Result<()> {
        let send = self.wire.data(self.stream, data, false);
        let Some(patience) = self.patience else { return send.await };
        match tokio::time::timeout(patience, send).await {
            Ok(sent) => sent,
            // A frame that was sent in part is the end of the connection.
            Err(_) => {
                self.wire.leave();
                Err(io::ErrorKind::TimedOut.into())
            }
        }
    }

    /// Ends the stream in this direction.
    ///
    /// # Errors
    /// When the client is gone.
    pub async fn finish(&self) -> io::Result<()> {
        self.wire.data(self.stream, &[], true).await
    }

    /// Gives the stream up in both directions; nothing to do for a channel.
    pub async fn reset(&self) {
        if !matches!(self.wire.framing, Framing::Channels { .. }) {
            let frame = spdy::rst_stream(self.stream, spdy::CANCEL);
            // A client that is gone needs no reset.
            let _ = self.wire.control(&frame).await;
        }
    }
}
