//! The reading task of a WebSocket connection with channels.

use std::io;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::WebSocketError;
use super::frame::{CLOSE, Decoder, Frame, PONG};
use crate::streaming::wire::{Item, Source, Wire};

/// The longest base64 message, in bytes: it can only be decoded whole.
pub const MAX_ENCODED: usize = 1 << 20;

/// The pseudo-channel on which a client of protocol v5 ends another one.
const CLOSE_CHANNEL: u8 = 255;

/// How the channels are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Messages are base64, channels are digits.
    pub base64: bool,
    /// Single channels can be ended (v5).
    pub close: bool,
}

/// What the current message is for.
enum Current {
    /// Its first byte has not come.
    Nothing,
    /// Data of a channel.
    Channel(u8),
    /// The end of a channel, whose number comes.
    Close,
    /// A message to be held until it is whole.
    Encoded(u8, BytesMut),
}

/// Reads until the client is gone or breaks the protocol. `channels` are those the client may write
/// to, by their numbers; data of others is dropped.
///
/// # Errors
/// Of the connection or its frames.
pub async fn serve(
    source: &mut Source,
    wire: &Arc<Wire>,
    channels: Vec<Option<mpsc::Sender<Item>>>,
    protocol: Protocol,
) -> io::Result<()> {
    let mut demultiplexer = Demultiplexer { channels, protocol, current: Current::Nothing };
    let mut decoder = Decoder::server();
    loop {
        while let Some(frame) = decoder.next(&mut source.buffer).map_err(io::Error::other)? {
            match frame {
                Frame::Data { bytes, last, .. } => {
                    let piece = demultiplexer.take(bytes, last).map_err(io::Error::other)?;
                    if let Some((channel, bytes)) = piece
                        && let Some(Some(sender)) = demultiplexer.channels.get(usize::from(channel))
                    {
                        source.deliver(wire, channel.into(), sender, Item::Data(bytes)).await?;
                    }
                }
                Frame::Ping(bytes) => wire.websocket_control(PONG, &bytes).await?,
                Frame::Pong => {}
                Frame::Close(code) => {
                    let code = code.map(u16::to_be_bytes);
                    let payload = code.as_ref().map_or(&[][..], |code| &code[..]);
                    return wire.websocket_control(CLOSE, payload).await;
                }
            }
        }
        if !source.fill(wire).await? {
            return Ok(());
        }
    }
}

struct Demultiplexer {
    channels: Vec<Option<mpsc::Sender<Item>>>,
    protocol: Protocol,
    current: Current,
}

impl Demultiplexer {
    /// The channel and data of a piece of a message, if it has any.
    fn take(
        &mut self,
        mut bytes: Bytes,
        last: bool,
    ) -> Result<Option<(u8, Bytes)>, WebSocketError> {
        if matches!(self.current, Current::Nothing) && !bytes.is_empty() {
            let first = bytes.split_to(1)[0];
            self.current = match first {
                CLOSE_CHANNEL if self.protocol.close => Current::Close,
                first if self.protocol.base64 => {
                    Current::Encoded(first.wrapping_sub(b'0'), BytesMut::new())
                }
                first => Current::Channel(first),
            };
        }
        let piece = match &mut self.current {
            Current::Nothing => None,
            Current::Channel(channel) => (!bytes.is_empty()).then_some((*channel, bytes)),
            Current::Close => {
                for channel in bytes {
                    if let Some(sender) = self.channels.get_mut(usize::from(channel)) {
                        *sender = None;
                    }
                }
                None
            }
            Current::Encoded(channel, held) => {
                if held.len() + bytes.len() > MAX_ENCODED {
                    return Err(WebSocketError::TooLong);
                }
                held.extend_from_slice(&bytes);
                let decoded = last.then(|| STANDARD.decode(&held[..]));
                match decoded {
                    Some(Ok(data)) if !data.is_empty() => Some((*channel, data.into())),
                    Some(Err(_)) => return Err(WebSocketError::Malformed("base64")),
                    _ => None,
                }
            }
        };
        if last {
            self.current = Current::Nothing;
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn demultiplexer(base64: bool) -> Demultiplexer {
        let (sender, _) = mpsc::channel(1);
        Demultiplexer {
            channels: vec![Some(sender.clone()), Some(sender)],
            protocol: Protocol { base64, close: true },
            current: Current::Nothing,
        }
    }

    #[test]
    fn a_channel_is_ended_by_its_number() {
        let mut demultiplexer = demultiplexer(false);
        let end = |d: &mut Demultiplexer, n| d.take(Bytes::from(vec![255, n]), true).unwrap();
        assert_eq!(end(&mut demultiplexer, 0), None);
        assert!(demultiplexer.channels[0].is_none() && demultiplexer.channels[1].is_some());
        // One that does not exist is of no concern.
        assert_eq!(end(&mut demultiplexer, 99), None);
    }

    #[test]
    fn base64_is_decoded_and_bounded() {
        let mut d = demultiplexer(true);
        assert_eq!(d.take(Bytes::from_static(b"0Zm"), false), Ok(None));
        let whole = d.take(Bytes::from_static(b"9vCgo="), true);
        assert_eq!(whole, Ok(Some((0, Bytes::from_static(b"foo\n\n")))));
        let bad = d.take(Bytes::from_static(b"0!!!"), true);
        assert_eq!(bad, Err(WebSocketError::Malformed("base64")));
        let mut d = demultiplexer(true);
        assert_eq!(d.take(Bytes::from_static(b"0"), false), Ok(None));
        let long = d.take(vec![b'A'; MAX_ENCODED + 1].into(), false);
        assert_eq!(long, Err(WebSocketError::TooLong));
    }

    proptest! {
        #[test]
        fn pieces_of_any_kind_never_panic(
            pieces in proptest::collection::vec(
                (proptest::collection::vec(any::<u8>(), 0..40), any::<bool>()), 0..40),
            base64 in any::<bool>(),
        ) {
            let mut d = demultiplexer(base64);
            for (bytes, last) in pieces {
                let _ = d.take(bytes.into(), last);
            }
        }
    }
}
