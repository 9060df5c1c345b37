//! WebSocket (RFC 6455) as far as Kubernetes' channel protocols need it: the first byte of a message
//! is its channel, a message's pieces are handed on as they come.

pub mod channels;
pub mod frame;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Why the other end's bytes are not WebSocket, or more than is accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WebSocketError {
    /// A frame that breaks the protocol's rules.
    #[error("malformed WebSocket frame: {0}")]
    Malformed(&'static str),
    /// A message that has to be held whole and is beyond [`channels::MAX_ENCODED`].
    #[error("a base64 WebSocket message exceeds {} bytes", channels::MAX_ENCODED)]
    TooLong,
}

/// What answers a client's `Sec-WebSocket-Key` (RFC 6455, section 4.2.2).
pub fn accept_key(key: &str) -> String {
    const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key.as_bytes());
    context.update(GUID);
    STANDARD.encode(context.finish())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_key_of_the_standard_is_answered_as_there() {
        let answer = super::accept_key("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(answer, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
