//! What the fuzz targets in `cri-shim/fuzz` call: the decoders of what streaming clients send. Each
//! looks at what must hold for any input.

use bytes::BytesMut;

use super::spdy::frame::{self as spdy, MAX_CONTROL};
use super::spdy::headers::{Deflater, Headers, MAX_BLOCK};
use super::websocket::frame::{self as websocket};

/// What is said of data that may be cut anywhere: the same, however it is cut.
fn spdy_frames(bytes: &[u8], piece: usize) -> Result<Vec<spdy::Frame>, String> {
    let mut decoder = spdy::Decoder::default();
    let (mut input, mut frames) = (BytesMut::new(), Vec::<spdy::Frame>::new());
    for piece in bytes.chunks(piece.max(1)) {
        input.extend_from_slice(piece);
        while let Some(frame) = decoder.next(&mut input).map_err(|error| error.to_string())? {
            if let spdy::Frame::SynStream { headers, .. } | spdy::Frame::SynReply { headers, .. } =
                &frame
            {
                let size: usize =
                    headers.0.iter().map(|(name, value)| name.len() + value.len()).sum();
                assert!(size <= MAX_BLOCK, "headers of {size} bytes");
            }
            // Pieces of data are joined, as they depend on the cuts.
            match (frames.last_mut(), frame) {
                (
                    Some(spdy::Frame::Data { stream, bytes, fin: last @ false }),
                    spdy::Frame::Data { stream: same, bytes: more, fin },
                ) if *stream == same => {
                    *bytes = [bytes.as_ref(), more.as_ref()].concat().into();
                    *last = fin;
                }
                (_, frame) => frames.push(frame),
            }
        }
        assert!(input.len() <= 8 + MAX_CONTROL, "{} bytes are held", input.len());
    }
    Ok(frames)
}

/// SPDY frames. The first byte says how they are cut.
pub fn spdy(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let whole = spdy_frames(data, MAX_CONTROL);
    let cut = spdy_frames(data, usize::from(*piece));
    assert_eq!(whole, cut);
}

/// SPDY header blocks that come in the right frame with a right compression, which no fuzzer
/// guesses: lines of `name: value`, compressed, and `damage` done to the compressed block.
pub fn spdy_headers(data: &[u8]) {
    let (damage, text) = data.split_at(data.len().min(4));
    let text = String::from_utf8_lossy(text);
    let headers = Headers(
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    );
    let mut bytes = spdy::syn_stream(1, &headers, false, &mut Deflater::default());
    if let [at, value, rest @ ..] = damage
        && rest.iter().any(|byte| *byte != 0)
    {
        let length = bytes.len();
        bytes[8 + usize::from(*at) % (length - 8)] ^= *value;
    }
    let _ = spdy_frames(&bytes, MAX_CONTROL);
}

fn websocket_frames(
    mut decoder: websocket::Decoder,
    bytes: &[u8],
    piece: usize,
) -> Result<Vec<websocket::Frame>, String> {
    let (mut input, mut frames) = (BytesMut::new(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        input.extend_from_slice(piece);
        while let Some(frame) = decoder.next(&mut input).map_err(|error| error.to_string())? {
            frames.push(frame);
        }
        // A head of 14 bytes and a control frame of 125 at most; data is not held.
        assert!(input.len() <= 14 + 125, "{} bytes are held", input.len());
    }
    Ok(frames)
}

/// WebSocket frames of a client. The first byte says how they are cut.
pub fn websocket(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let whole = websocket_frames(websocket::Decoder::server(), data, data.len());
    let cut = websocket_frames(websocket::Decoder::server(), data, usize::from(*piece));
    assert_eq!(whole.is_ok(), cut.is_ok(), "{whole:?} {cut:?}");
}
