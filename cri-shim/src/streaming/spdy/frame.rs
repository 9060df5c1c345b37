//! Frames: bytes in, frames out, and back. No input makes the decoder hold more than one control
//! frame of [`MAX_CONTROL`] bytes; data is handed on as it comes.

use bytes::{Buf, Bytes, BytesMut};

use super::SpdyError;
use super::headers::{Deflater, Headers, Inflater};

/// The longest control frame that is accepted, in bytes.
pub const MAX_CONTROL: usize = 16 << 10;

const VERSION: u16 = 3;
const FIN: u8 = 0x01;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// RST_STREAM's reasons.
pub const PROTOCOL_ERROR: u32 = 1;
pub const REFUSED_STREAM: u32 = 3;
pub const CANCEL: u32 = 5;

/// What the other end says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A new stream; `fin` when nothing will be sent on it.
    SynStream { stream: u32, headers: Headers, fin: bool },
    /// The answer to one.
    SynReply { stream: u32, headers: Headers, fin: bool },
    /// The end of a stream in both directions.
    RstStream { stream: u32, status: u32 },
    /// To be sent back as it is.
    Ping { id: u32 },
    /// No more streams will be opened.
    GoAway,
    /// A piece of data; `fin` on the last one of the stream.
    Data { stream: u32, bytes: Bytes, fin: bool },
    /// SETTINGS, HEADERS, WINDOW_UPDATE and what SPDY/3 does not know: of no concern here.
    Other,
}

enum State {
    Head,
    Data { stream: u32, left: usize, fin: bool },
    Skip { left: usize },
}

/// The reading end of a connection.
pub struct Decoder {
    state: State,
    inflater: Inflater,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder { state: State::Head, inflater: Inflater::default() }
    }
}

impl Decoder {
    /// Takes the next frame out of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`SpdyError`]; the connection cannot go on then.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        loop {
            match self.state {
                State::Head => {
                    let Some(head) = input.first_chunk::<8>() else { return Ok(None) };
                    let [a, b, c, d, flags, x, y, z] = *head;
                    let length = u32::from_be_bytes([0, x, y, z]) as usize;
                    if a & 0x80 == 0 {
                        input.advance(8);
                        let stream = u32::from_be_bytes([a, b, c, d]);
                        if stream == 0 {
                            return Err(SpdyError::Malformed("data of stream 0"));
                        }
                        self.state = State::Data { stream, left: length, fin: flags & FIN != 0 };
                        if length == 0 {
                            return Ok(Some(self.data(input)));
                        }
                        continue;
                    }
                    let version = u16::from_be_bytes([a & 0x7f, b]);
                    if version != VERSION {
                        return Err(SpdyError::Version(version));
                    }
                    let kind = u16::from_be_bytes([c, d]);
                    if !matches!(kind, SYN_STREAM | SYN_REPLY | RST_STREAM | PING | GOAWAY | 8) {
                        input.advance(8);
                        self.state = State::Skip { left: length };
                        continue;
                    }
                    if length > MAX_CONTROL {
                        return Err(SpdyError::TooLong(length));
                    }
                    if input.len() < 8 + length {
                        return Ok(None);
                    }
                    input.advance(8);
                    let payload = input.split_to(length);
                    return self.control(kind, flags, &payload).map(Some);
                }
                State::Data { .. } if input.is_empty() => return Ok(None),
                State::Data { .. } => return Ok(Some(self.data(input))),
                State::Skip { left } => {
                    let skipped = left.min(input.len());
                    input.advance(skipped);
                    if skipped < left {
                        self.state = State::Skip { left: left - skipped };
                        return Ok(None);
                    }
                    self.state = State::Head;
                    return Ok(Some(Frame::Other));
                }
            }
        }
    }

    fn data(&mut self, input: &mut BytesMut) -> Frame {
        let State::Data { stream, left, fin } = self.state else { return Frame::Other };
        let taken = left.min(input.len());
        let left = left - taken;
        self.state = match left {
            0 => State::Head,
            left => State::Data { stream, left, fin },
        };
        Frame::Data { stream, bytes: input.split_to(taken).freeze(), fin: fin && left == 0 }
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Frame, SpdyError> {
        let fin = flags & FIN != 0;
        match kind {
            SYN_STREAM => {
                let (stream, rest) = number(payload)?;
                // The stream it belongs to, its priority and slot.
                let block = rest.get(6..).ok_or(SpdyError::Malformed("short SYN_STREAM"))?;
                Ok(Frame::SynStream { stream: id(stream)?, headers: self.headers(block)?, fin })
            }
            SYN_REPLY => {
                let (stream, block) = number(payload)?;
                Ok(Frame::SynReply { stream: id(stream)?, headers: self.headers(block)?, fin })
            }
            RST_STREAM => {
                let (stream, rest) = number(payload)?;
                let (status, _) = number(rest)?;
                Ok(Frame::RstStream { stream: id(stream)?, status })
            }
            PING => Ok(Frame::Ping { id: number(payload)?.0 }),
            GOAWAY => Ok(Frame::GoAway),
            _ => {
                // HEADERS: read only because later blocks build on this one.
                let (_, block) = number(payload)?;
                self.headers(block).map(|_| Frame::Other)
            }
        }
    }

    fn headers(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        Headers::parse(&self.inflater.inflate(block)?)
    }
}

fn id(number: u32) -> Result<u32, SpdyError> {
    match number & 0x7fff_ffff {
        0 => Err(SpdyError::Malformed("stream 0")),
        id => Ok(id),
    }
}

fn number(bytes: &[u8]) -> Result<(u32, &[u8]), SpdyError> {
    let (number, rest) =
        bytes.split_first_chunk::<4>().ok_or(SpdyError::Malformed("short control frame"))?;
    Ok((u32::from_be_bytes(*number), rest))
}

/// What goes before a piece of data of at most 16 MiB.
pub fn data_head(stream: u32, length: usize, fin: bool) -> [u8; 8] {
    let ([a, b, c, d], [_, x, y, z]) =
        (stream.to_be_bytes(), (length as u32 & 0x00ff_ffff).to_be_bytes());
    [a, b, c, d, if fin { FIN } else { 0 }, x, y, z]
}

fn control(kind: u16, flags: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    let mut frame = Vec::with_capacity(8 + length);
    frame.extend_from_slice(&(VERSION | 0x8000).to_be_bytes());
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(&((length as u32) | u32::from(flags) << 24).to_be_bytes());
    for part in parts {
        frame.extend_from_slice(part);
    }
    frame
}

/// Opens a stream (a client's part).
pub fn syn_stream(stream: u32, headers: &Headers, fin: bool, deflater: &mut Deflater) -> Vec<u8> {
    let block = deflater.deflate(&headers.encode());
    control(SYN_STREAM, u8::from(fin), &[&stream.to_be_bytes(), &[0; 6], &block])
}

/// Accepts a stream.
pub fn syn_reply(stream: u32, deflater: &mut Deflater) -> Vec<u8> {
    let block = deflater.deflate(&Headers::default().encode());
    control(SYN_REPLY, 0, &[&stream.to_be_bytes(), &block])
}

/// Ends a stream in both directions.
pub fn rst_stream(stream: u32, status: u32) -> Vec<u8> {
    control(RST_STREAM, 0, &[&stream.to_be_bytes(), &status.to_be_bytes()])
}

/// A ping, or the answer to one.
pub fn ping(id: u32) -> Vec<u8> {
    control(PING, 0, &[&id.to_be_bytes()])
}

/// Says that the connection ends, without an error.
pub fn goaway(last_stream: u32) -> Vec<u8> {
    control(GOAWAY, 0, &[&last_stream.to_be_bytes(), &[0; 4]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Decodes bytes that come in pieces, joining the pieces of data.
    fn decode(bytes: &[u8], piece: usize) -> Result<Vec<Frame>, SpdyError> {
        let (mut decoder, mut input, mut frames) =
            (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece.max(1)) {
            input.extend_from_slice(piece);
            while let Some(frame) = decoder.next(&mut input)? {
                match (frames.last_mut(), frame) {
                    (
                        Some(Frame::Data { stream, bytes, fin: last @ false }),
                        Frame::Data { stream: same, bytes: more, fin },
                    ) if *stream == same => {
                        *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
                        *last = fin;
                    }
                    (_, frame) => frames.push(frame),
                }
            }
        }
        Ok(frames)
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let stream = 1u32..0x7fff_ffff;
        let headers = proptest::collection::hash_map("[a-z-]{1,20}", "[ -~]{0,50}", 0..8)
            .prop_map(|h| Headers(h.into_iter().collect()));
        let frame = prop_oneof![
            (stream.clone(), headers, any::<bool>())
                .prop_map(|(stream, headers, fin)| Frame::SynStream { stream, headers, fin }),
            (stream.clone(), any::<u32>())
                .prop_map(|(stream, status)| Frame::RstStream { stream, status }),
            any::<u32>().prop_map(|id| Frame::Ping { id }),
            Just(Frame::GoAway),
            (stream, proptest::collection::vec(any::<u8>(), 0..3000))
                .prop_map(|(stream, b)| Frame::Data { stream, bytes: b.into(), fin: true }),
        ];
        proptest::collection::vec(frame, 0..12)
    }

    fn encode(frames: &[Frame]) -> Vec<u8> {
        let mut deflater = Deflater::default();
        let each = frames.iter().map(|frame| match frame {
            Frame::SynStream { stream, headers, fin } => {
                syn_stream(*stream, headers, *fin, &mut deflater)
            }
            Frame::RstStream { stream, status } => rst_stream(*stream, *status),
            Frame::Ping { id } => ping(*id),
            Frame::Data { stream, bytes, fin } => {
                [&data_head(*stream, bytes.len(), *fin)[..], bytes].concat()
            }
            _ => goaway(0),
        });
        each.collect::<Vec<_>>().concat()
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_however_it_is_cut(frames in frames(), piece in 1usize..5000) {
            prop_assert_eq!(decode(&encode(&frames), piece).unwrap(), frames);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused_alike_however_they_are_cut(
            bytes in proptest::collection::vec(any::<u8>(), 0..4096),
            piece in 1usize..100,
        ) {
            prop_assert_eq!(decode(&bytes, piece).is_ok(), decode(&bytes, bytes.len()).is_ok());
        }

        #[test]
        fn damaged_frames_never_panic(
            frames in frames(),
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = encode(&frames);
            for (at, value) in damage {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
            }
            let _ = decode(&bytes, 37);
        }
    }

    #[test]
    fn a_control_frame_that_is_too_long_is_refused_by_its_head() {
        let head = [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff];
        assert_eq!(decode(&head, 8), Err(SpdyError::TooLong(0x00ff_ffff)));
        let alien = [0x80, 2, 0, 1, 0, 0, 0, 0];
        assert_eq!(decode(&alien, 8), Err(SpdyError::Version(2)));
    }

    #[test]
    fn an_unknown_frame_is_skipped_without_being_held() {
        let mut decoder = Decoder::default();
        let mut input = BytesMut::from(&[0x80, 3, 0, 99, 0, 0x01, 0, 0][..]);
        for _ in 0..256 {
            input.extend_from_slice(&[0; 256]);
            assert!(decoder.next(&mut input).unwrap().is_none_or(|f| f == Frame::Other));
            assert!(input.is_empty());
        }
    }
}
