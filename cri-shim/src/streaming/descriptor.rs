//! Pipes and terminals as asynchronous streams: the descriptors that a container's process and the
//! shim share directly, with nobody copying between them.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::monitor::sys::set_window_size;

/// How much a pipe may hold, in bytes: more than the default, so that a fast process and a busy
/// network wait for each other less often.
const PIPE_SIZE: i32 = 256 << 10;

/// A pipe's end or a terminal.
pub struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// Makes a descriptor non-blocking and waits for it with the runtime from now on.
    ///
    /// # Errors
    /// Of the descriptor or the runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Descriptor(super::sys::register(fd)?))
    }

    /// A pipe to read a process's output from: our end, and the process's.
    ///
    /// # Errors
    /// Of making it.
    pub fn output() -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        // A user's pipes may be limited; then it is a smaller one.
        let _ = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        Ok((Descriptor::new(reader.into())?, writer.into()))
    }

    /// A pipe to write a process's input to: our end, and the process's.
    ///
    /// # Errors
    /// Of making it.
    pub fn input() -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        Ok((Descriptor::new(writer.into())?, reader.into()))
    }

    /// Reads what there is; 0 at the end, which a terminal tells with an error of its own.
    ///
    /// # Errors
    /// Of the descriptor.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.async_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, buffer)?));
        match read.await {
            Err(e) if e.raw_os_error() == Some(Errno::EIO as i32) => Ok(0),
            other => other,
        }
    }

    /// Writes everything.
    ///
    /// # Errors
    /// Of the descriptor: nobody reads it any more.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |fd: &OwnedFd| Ok(nix::unistd::write(fd, bytes)?);
            let written = self.0.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Tells a terminal its size; a pipe has none.
    pub fn resize(&self, columns: u16, rows: u16) {
        let _ = set_window_size(self.0.get_ref(), columns, rows);
    }
}
