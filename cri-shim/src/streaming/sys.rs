//! Waiting for descriptors with the runtime.
#![allow(unsafe_code, reason = "the runtime cannot check that a descriptor stays open")]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime wait for a descriptor, in both directions.
pub(super) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, and AsyncFd takes
    // it off the runtime before it drops it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::WRITABLE) }
        .map_err(Into::into)
}
