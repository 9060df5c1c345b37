//! SPDY/3.1 as Kubernetes clients speak it after `Upgrade: SPDY/3.1`: streams opened by the client,
//! data both ways, half-closes and resets.
//!
//! Flow control windows are left out on purpose: no Kubernetes client sends WINDOW_UPDATE, so a
//! server that kept to its window would hang after 64 KiB. TCP holds a fast sender back instead.

mod connection;
mod dictionary;
pub mod frame;
pub mod headers;

pub use connection::{NewStream, serve};

/// Why the other end's bytes are not SPDY, or more than is accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    /// A control frame of another protocol version.
    #[error("SPDY version {0} is not 3")]
    Version(u16),
    /// A control frame beyond [`frame::MAX_CONTROL`].
    #[error("a SPDY control frame of {0} bytes is too long")]
    TooLong(usize),
    /// A frame that breaks the protocol's rules.
    #[error("malformed SPDY frame: {0}")]
    Malformed(&'static str),
    /// A header block that cannot be decompressed.
    #[error("malformed SPDY header compression")]
    Compression,
    /// A header block beyond the limits of [`headers`].
    #[error("SPDY headers exceed the limit on {0}")]
    HeaderLimit(&'static str),
}
