//! Frames on a unix socket, with file descriptors alongside; blocking, for both ends.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::MAX_FRAME;
use super::sys;

/// Writes one frame and passes `fds` with it.
pub fn send<T: Serialize>(stream: &UnixStream, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let mut frame = vec![0u8; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = (frame.len() - 4) as u32;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    let sent = if fds.is_empty() { 0 } else { sys::send_with_fds(stream, &frame, fds)? };
    let mut stream = stream;
    stream.write_all(&frame[sent..])
}

/// Reads one frame; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<T>> {
    let mut length = [0u8; 4];
    let mut stream = stream;
    match stream.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::other("frame too long"));
    }
    let mut body = vec![0u8; length];
    stream.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

/// A stream read without blocking: bytes and descriptors until they make a frame.
#[derive(Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    /// Descriptors received and not yet taken.
    pub fds: Vec<OwnedFd>,
}

impl Inbox {
    /// Takes what the socket has. `Ok(false)` at the end of the stream.
    pub fn fill(&mut self, stream: &impl AsRawFd) -> io::Result<bool> {
        let mut buffer = [0u8; 4096];
        let read = sys::receive_with_fds(stream.as_raw_fd(), &mut buffer, &mut self.fds)?;
        self.bytes.extend_from_slice(&buffer[..read]);
        Ok(read > 0)
    }

    /// The next whole frame.
    pub fn take_frame<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some(length) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::other("frame too long"));
        }
        if self.bytes.len() < 4 + length {
            return Ok(None);
        }
        let message = serde_json::from_slice(&self.bytes[4..4 + length])?;
        self.bytes.drain(..4 + length);
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(Some(message))
    }
}
