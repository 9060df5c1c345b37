//! The netlink socket: the calls that need raw pointers, and nothing else.
#![allow(
    unsafe_code,
    reason = "setsockopt, sendto and recv on a netlink socket have no safe form for these options"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const SOL_NETLINK: libc::c_int = 270;
const NETLINK_ADD_MEMBERSHIP: libc::c_int = 1;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;

/// A `NETLINK_NETFILTER` socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    port: u32,
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// Opens and binds a socket; the kernel gives it a port.
    pub(crate) fn open(nonblocking: bool) -> io::Result<Self> {
        let kind =
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | if nonblocking { libc::SOCK_NONBLOCK } else { 0 };
        // SAFETY: plain integers; the result is checked before use.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_nl is plain data, for which all zeroes is a valid value.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let mut len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: the pointer and length are those of `address`, which outlives the call.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: pointer and length are those of `address` and `len`, both writable.
        let named =
            unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut len) };
        if named < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = Socket { fd, port: address.nl_pid };
        // Old kernels lack these; errors are then told with less detail.
        let _ = socket.option(SOL_NETLINK, NETLINK_EXT_ACK, 1);
        let _ = socket.option(SOL_NETLINK, NETLINK_CAP_ACK, 1);
        Ok(socket)
    }

    /// Registers the socket with tokio's reactor, for reading.
    pub(crate) fn into_async(self) -> io::Result<AsyncFd<Socket>> {
        // SAFETY: `as_raw_fd` always tells the descriptor that the socket owns, which stays open
        // and the same until the socket is dropped.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }

    /// The socket's netlink port: the kernel marks with it what this socket changed.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    fn option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: pointer and length are those of `value`, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Joins a multicast group.
    pub(crate) fn join(&self, group: u32) -> io::Result<()> {
        self.option(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group as libc::c_int)
    }

    /// Makes the send buffer at least so big: a batch goes in one piece.
    pub(crate) fn send_buffer(&self, bytes: usize) -> io::Result<()> {
        let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX / 2);
        self.option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes)
            .or_else(|_| self.option(libc::SOL_SOCKET, libc::SO_SNDBUF, bytes))
    }

    /// Makes the receive buffer at least so big.
    pub(crate) fn receive_buffer(&self, bytes: usize) -> io::Result<()> {
        let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX / 2);
        self.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)
            .or_else(|_| self.option(libc::SOL_SOCKET, libc::SO_RCVBUF, bytes))
    }

    /// Bounds how long a receive may wait.
    pub(crate) fn receive_timeout(&self, timeout: std::time::Duration) -> io::Result<()> {
        let value = libc::timeval {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_usec: timeout.subsec_micros() as libc::suseconds_t,
        };
        // SAFETY: pointer and length are those of `value`, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const value).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Lets only those messages through whose first header was not caused by `port`.
    pub(crate) fn ignore_port(&self, port: u32) -> io::Result<()> {
        // A classic BPF program: load nlmsg_pid (bytes 12..16, big-endian load of a host-endian
        // number), drop the packet if it is ours.
        let ours = u32::from_be_bytes(port.to_ne_bytes());
        let mut program = [
            libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 12 },
            libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: ours },
            libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 },
            libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: u32::MAX },
        ];
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: pointer and length are those of `program`, whose filter outlives the call; the
        // kernel copies and checks it.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends to the kernel, in one piece.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: pointer and length are those of `bytes`; an unconnected netlink socket
            // sends to the kernel.
            let sent =
                unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Receives one datagram from the kernel; anything that is not the kernel's is skipped.
    pub(crate) fn receive(&self, buffer: &mut [u8], wait: bool) -> io::Result<usize> {
        loop {
            // SAFETY: sockaddr_nl is plain data, for which all zeroes is a valid value.
            let mut from: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
            let mut len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
            // SAFETY: buffer and address pointers come with their own lengths, both writable.
            let got = unsafe {
                libc::recvfrom(
                    self.fd.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    flags,
                    (&raw mut from).cast(),
                    &raw mut len,
                )
            };
            if got < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if from.nl_pid == 0 {
                return Ok(got as usize);
            }
        }
    }
}
