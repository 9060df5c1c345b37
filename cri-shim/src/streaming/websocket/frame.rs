//! Frames: bytes in, pieces of messages out. Nothing is held but the pieces that have come.

use bytes::{Buf, Bytes, BytesMut};

use super::WebSocketError;

/// Kinds of frames.
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

const CONTINUATION: u8 = 0;
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// The longest payload of a control frame, in bytes (RFC 6455, section 5.5).
const MAX_CONTROL: usize = 125;

/// What the other end says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A piece of a message, text or binary alike.
    Data { first: bool, bytes: Bytes, last: bool },
    /// To be answered with the same bytes.
    Ping(Bytes),
    /// The answer to a ping.
    Pong,
    /// The end, with its status code if one was given.
    Close(Option<u16>),
}

#[derive(Clone, Copy)]
enum State {
    Head,
    Payload { left: u64, mask: [u8; 4], at: usize, first: bool, last: bool },
}

/// The reading end of a connection.
pub struct Decoder {
    state: State,
    /// Between the first and the last frame of a message.
    in_message: bool,
    /// Clients mask what they send, servers do not.
    masked: bool,
}

impl Decoder {
    /// Reads what a client sends.
    pub fn server() -> Self {
        Decoder { state: State::Head, in_message: false, masked: true }
    }

    /// Reads what a server sends.
    pub fn client() -> Self {
        Decoder { masked: false, ..Decoder::server() }
    }

    /// Takes the next frame, or piece of one, out of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`WebSocketError::Malformed`]; the connection cannot go on then.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, WebSocketError> {
        let State::Payload { left, mask, at, first, last } = self.state else {
            return self.head(input);
        };
        if input.is_empty() {
            return Ok(None);
        }
        let taken = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
        let mut bytes = input.split_to(taken);
        unmask(&mut bytes, mask, at);
        let left = left - taken as u64;
        self.state = match left {
            0 => State::Head,
            _ => State::Payload { left, mask, at: (at + taken) % 4, first: false, last },
        };
        Ok(Some(Frame::Data { first, bytes: bytes.freeze(), last: last && left == 0 }))
    }

    fn head(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, WebSocketError> {
        let malformed = |what| Err(WebSocketError::Malformed(what));
        let [flags, length, ..] = input[..] else { return Ok(None) };
        if flags & 0x70 != 0 {
            return malformed("reserved bits");
        }
        if (length & MASKED != 0) != self.masked {
            return malformed("masking");
        }
        let (extended, short) = match length & 0x7f {
            126 => (2, 0),
            127 => (8, 0),
            short => (0, short),
        };
        let masking = if self.masked { 4 } else { 0 };
        let Some(rest) = input.get(2..2 + extended + masking) else { return Ok(None) };
        let (number, mask) = rest.split_at(extended);
        let length = match extended {
            0 => u64::from(short),
            _ => number.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte)),
        };
        let least = [0, 0, 126, 0, 0, 0, 0, 0, 65_536][extended];
        if length < least || length > i64::MAX as u64 {
            return malformed("length");
        }
        let mask = mask.first_chunk::<4>().copied().unwrap_or_default();
        let (kind, fin, head) = (flags & 0x0f, flags & FIN != 0, 2 + extended + masking);
        if kind >= CLOSE {
            if !fin || length as usize > MAX_CONTROL {
                return malformed("control frame");
            }
            if input.len() < head + length as usize {
                return Ok(None);
            }
            input.advance(head);
            let mut bytes = input.split_to(length as usize);
            unmask(&mut bytes, mask, 0);
            return control(kind, bytes.freeze()).map(Some);
        }
        let first = match kind {
            CONTINUATION if self.in_message => false,
            TEXT | BINARY if !self.in_message => true,
            _ => return malformed("kind"),
        };
        self.in_message = !fin;
        input.advance(head);
        if length == 0 {
            return Ok(Some(Frame::Data { first, bytes: Bytes::new(), last: fin }));
        }
        self.state = State::Payload { left: length, mask, at: 0, first, last: fin };
        self.next(input)
    }
}

fn control(kind: u8, bytes: Bytes) -> Result<Frame, WebSocketError> {
    match kind {
        PING => Ok(Frame::Ping(bytes)),
        PONG => Ok(Frame::Pong),
        CLOSE => match bytes[..] {
            [] => Ok(Frame::Close(None)),
            [high, low, ..] => Ok(Frame::Close(Some(u16::from_be_bytes([high, low])))),
            [_] => Err(WebSocketError::Malformed("close code")),
        },
        _ => Err(WebSocketError::Malformed("kind")),
    }
}

/// Masks or unmasks, beginning at the mask's byte `at`; eight bytes at a time.
pub fn unmask(bytes: &mut [u8], mask: [u8; 4], at: usize) {
    let turned: [u8; 4] = std::array::from_fn(|i| mask[(at + i) % 4]);
    let [a, b, c, d] = turned;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (eights, rest) = bytes.as_chunks_mut::<8>();
    for eight in eights {
        *eight = (u64::from_ne_bytes(*eight) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(turned.iter().cycle()) {
        *byte ^= mask;
    }
}

/// What goes before a payload that a server sends in one frame: up to ten bytes.
pub fn head(kind: u8, length: usize) -> ([u8; 10], usize) {
    let mut head = [0u8; 10];
    head[0] = FIN | kind;
    let long = (length as u64).to_be_bytes();
    match length {
        0..=125 => {
            head[1] = length as u8;
            (head, 2)
        }
        126..=65_535 => {
            head[1] = 126;
            head[2..4].copy_from_slice(&long[6..]);
            (head, 4)
        }
        _ => {
            head[1] = 127;
            head[2..].copy_from_slice(&long);
            (head, 10)
        }
    }
}

/// A whole frame as a client sends it.
pub fn masked(kind: u8, fin: bool, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let (mut head, length) = head(kind, payload.len());
    head[0] = kind | if fin { FIN } else { 0 };
    head[1] |= MASKED;
    let mut frame = [&head[..length], &mask, payload].concat();
    unmask(&mut frame[length + 4..], mask, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decodes bytes that come in pieces, joining the pieces of each message.
    fn decode(bytes: &[u8], piece: usize) -> Result<Vec<Frame>, WebSocketError> {
        let (mut decoder, mut input, mut frames) = (Decoder::server(), BytesMut::new(), Vec::new());
        let mut message = BytesMut::new();
        for piece in bytes.chunks(piece.max(1)) {
            input.extend_from_slice(piece);
            while let Some(frame) = decoder.next(&mut input)? {
                match frame {
                    Frame::Data { first, bytes, last } => {
                        assert!(!first || message.is_empty());
                        message.extend_from_slice(&bytes);
                        if last {
                            let bytes = message.split().freeze();
                            frames.push(Frame::Data { first: true, bytes, last });
                        }
                    }
                    other => frames.push(other),
                }
            }
        }
        Ok(frames)
    }

    fn message(bytes: &[u8]) -> Frame {
        Frame::Data { first: true, bytes: Bytes::copy_from_slice(bytes), last: true }
    }

    proptest! {
        #[test]
        fn messages_come_whole_however_they_are_cut(
            messages in proptest::collection::vec(
                proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..500), 1..4),
                0..6,
            ),
            mask in any::<[u8; 4]>(),
            piece in 1usize..700,
        ) {
            let (mut bytes, mut expected) = (Vec::new(), Vec::new());
            for fragments in &messages {
                for (at, fragment) in fragments.iter().enumerate() {
                    let kind = if at == 0 { BINARY } else { 0 };
                    bytes.extend(masked(kind, at + 1 == fragments.len(), fragment, mask));
                    // Control frames may come between fragments.
                    bytes.extend(masked(PING, true, b"p", mask));
                    if at + 1 < fragments.len() {
                        expected.push(Frame::Ping(Bytes::from_static(b"p")));
                    }
                }
                expected.push(message(&fragments.concat()));
                expected.push(Frame::Ping(Bytes::from_static(b"p")));
            }
            prop_assert_eq!(decode(&bytes, piece).unwrap(), expected);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused_alike_however_they_are_cut(
            bytes in proptest::collection::vec(any::<u8>(), 0..2048),
            piece in 1usize..100,
        ) {
            prop_assert_eq!(decode(&bytes, piece), decode(&bytes, bytes.len()));
        }
    }

    #[test]
    fn lengths_of_all_sizes_are_understood() {
        for length in [0, 125, 126, 65_535, 65_536, 70_000] {
            let payload = vec![7u8; length];
            let bytes = masked(BINARY, true, &payload, [1, 2, 3, 4]);
            assert_eq!(decode(&bytes, 1000).unwrap(), [message(&payload)]);
        }
    }

    #[test]
    fn what_the_standard_forbids_is_refused() {
        let malformed = |bytes: &[u8], what| {
            assert_eq!(decode(bytes, 100), Err(WebSocketError::Malformed(what)));
        };
        malformed(&[0x82, 0x01, 0x00], "masking");
        malformed(&[0xc2, 0x80], "reserved bits");
        malformed(&[0x82, 0x80 | 126, 0, 5, 0, 0, 0, 0], "length");
        malformed(&[0x80, 0x80, 0, 0, 0, 0], "kind");
        malformed(&[0x09, 0x80, 0, 0, 0, 0], "control frame");
        malformed(&[0x89, 0x80 | 126, 0, 126, 0, 0, 0, 0], "control frame");
        let twice = [masked(BINARY, false, b"a", [0; 4]), masked(BINARY, true, b"b", [0; 4])];
        malformed(&twice.concat(), "kind");
    }

    #[test]
    fn a_claimed_length_reserves_nothing() {
        let mut input = BytesMut::from(&[0x82, 0xff, 0x7f, 255, 255, 255, 255, 255, 255, 255][..]);
        input.extend_from_slice(&[0, 0, 0, 0, 1, 2]);
        let mut decoder = Decoder::server();
        let piece = decoder.next(&mut input).unwrap();
        let bytes = Bytes::from_static(&[1, 2]);
        assert_eq!(piece, Some(Frame::Data { first: true, bytes, last: false }));
        assert_eq!(decoder.next(&mut input), Ok(None));
    }
}
