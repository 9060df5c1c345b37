//! An attached client as the monitor sees it: a pipe that gets a copy of one stream of output.
//!
//! A client that does not take its copy holds the container up for as long as the shim lets it (it
//! knows how the client's connection does); the monitor itself has no timers. What a client has
//! not taken yet is one piece, so a follower costs next to nothing.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The most that is kept for a client that lags at the end of its container, in bytes: what the
/// container's own pipe may hold, and room. A client that is further behind loses its copy.
const MAX_BEHIND: usize = 1 << 20;

/// One stream of one client.
pub(super) struct Follower {
    pub(super) connection: u64,
    pub(super) stream: usize,
    pipe: File,
    behind: Vec<u8>,
}

impl Follower {
    /// `pipe` has to be non-blocking.
    pub(super) fn new(connection: u64, stream: usize, pipe: OwnedFd) -> Self {
        Follower { connection, stream, pipe: pipe.into(), behind: Vec::new() }
    }

    /// Whether the last piece has not been taken yet.
    pub(super) fn is_behind(&self) -> bool {
        !self.behind.is_empty()
    }

    pub(super) fn pipe(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Copies a piece; `false` when the client is gone.
    pub(super) fn give(&mut self, piece: &[u8]) -> bool {
        if self.is_behind() {
            self.behind.extend_from_slice(piece);
            return self.behind.len() <= MAX_BEHIND;
        }
        match self.write(piece) {
            Ok(written) => {
                self.behind.extend_from_slice(&piece[written..]);
                true
            }
            Err(_) => false,
        }
    }

    /// Writes what is left, now that the pipe has room; `false` when the client is gone.
    pub(super) fn catch_up(&mut self) -> bool {
        let behind = std::mem::take(&mut self.behind);
        self.give(&behind)
    }

    /// As much as the pipe takes.
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let mut written = 0;
        while written < piece.len() {
            match self.pipe.write(&piece[written..]) {
                Ok(count) => written += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use std::io::Read;

    #[test]
    fn a_lagging_client_gets_everything_in_order_and_a_gone_one_is_seen() {
        let (mut reader, writer) = io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut follower = Follower::new(1, 0, writer);
        let piece: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        assert!(follower.give(&piece));
        assert!(follower.is_behind());
        assert!(follower.give(b"tail"));
        let mut got = vec![0u8; 60_000];
        reader.read_exact(&mut got).unwrap();
        assert!(follower.catch_up());
        assert!(!follower.is_behind());
        let mut rest = vec![0u8; 40_004];
        reader.read_exact(&mut rest).unwrap();
        got.extend(rest);
        assert_eq!(got, [piece.as_slice(), b"tail"].concat());
        drop(reader);
        assert!(!follower.give(b"x"));
    }
}
