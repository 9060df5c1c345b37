//! Header blocks: name and value pairs, compressed in one zlib stream per direction that lasts as
//! long as the connection.
//!
//! Everything is bounded before it is allocated: a few hundred compressed bytes may claim megabytes.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_HAS_MORE_INPUT;
use miniz_oxide::inflate::core::{DecompressorOxide, TINFL_LZ_DICT_SIZE, decompress};

use super::SpdyError;
use super::dictionary::{ADLER_32, dictionary};

/// The most a header block may hold, decompressed, in bytes.
pub const MAX_BLOCK: usize = 16 << 10;
/// The most headers a block may hold.
pub const MAX_HEADERS: usize = 64;
/// The longest name or value, in bytes.
pub const MAX_FIELD: usize = 4 << 10;

/// The headers of a stream. Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The value of a header; `name` in lower case. Several values are separated by NUL.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Parses a decompressed block.
    ///
    /// # Errors
    /// [`SpdyError::HeaderLimit`] or [`SpdyError::Malformed`].
    pub fn parse(block: &[u8]) -> Result<Self, SpdyError> {
        let mut rest = block;
        let count = number(&mut rest)?;
        if count > MAX_HEADERS {
            return Err(SpdyError::HeaderLimit("their number"));
        }
        let mut headers = Headers::default();
        for _ in 0..count {
            let name = field(&mut rest)?;
            let value = field(&mut rest)?;
            if name.is_empty() || name.bytes().any(|b| b.is_ascii_uppercase()) {
                return Err(SpdyError::Malformed("header name"));
            }
            if headers.get(&name).is_some() {
                return Err(SpdyError::Malformed("header twice"));
            }
            headers.0.push((name, value));
        }
        if rest.is_empty() { Ok(headers) } else { Err(SpdyError::Malformed("header block")) }
    }

    /// The block, not compressed yet.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = Vec::new();
        block.extend_from_slice(&(self.0.len() as u32).to_be_bytes());
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(text.len() as u32).to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        block
    }
}

fn number(rest: &mut &[u8]) -> Result<usize, SpdyError> {
    let (bytes, after) =
        rest.split_first_chunk::<4>().ok_or(SpdyError::Malformed("header block"))?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes) as usize)
}

fn field(rest: &mut &[u8]) -> Result<String, SpdyError> {
    let length = number(rest)?;
    if length > MAX_FIELD {
        return Err(SpdyError::HeaderLimit("the length of one"));
    }
    let (bytes, after) =
        rest.split_at_checked(length).ok_or(SpdyError::Malformed("header block"))?;
    *rest = after;
    String::from_utf8(bytes.to_vec()).map_err(|_| SpdyError::Malformed("header text"))
}

/// The decompressing end.
pub struct Inflater {
    core: Box<DecompressorOxide>,
    /// The last 32 KiB, at first the dictionary's end.
    window: Vec<u8>,
    at: usize,
    begun: bool,
}

impl Default for Inflater {
    fn default() -> Self {
        let dictionary = dictionary();
        let mut window = vec![0u8; TINFL_LZ_DICT_SIZE];
        window[..dictionary.len()].copy_from_slice(&dictionary);
        Inflater { core: Box::default(), window, at: dictionary.len(), begun: false }
    }
}

impl Inflater {
    /// Decompresses one block, at most [`MAX_BLOCK`] bytes.
    ///
    /// # Errors
    /// [`SpdyError::Compression`] and [`SpdyError::HeaderLimit`]; the connection is lost then, as
    /// later blocks build on this one.
    pub fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, SpdyError> {
        if !self.begun {
            input = skip_header(input).ok_or(SpdyError::Compression)?;
            self.begun = true;
        }
        let mut block = Vec::new();
        loop {
            let flags = TINFL_FLAG_HAS_MORE_INPUT;
            let (status, consumed, produced) =
                decompress(&mut self.core, input, &mut self.window, self.at, flags);
            let end = self.at + produced;
            let fresh = self.window.get(self.at..end).ok_or(SpdyError::Compression)?;
            if block.len() + fresh.len() > MAX_BLOCK {
                return Err(SpdyError::HeaderLimit("their size"));
            }
            block.extend_from_slice(fresh);
            self.at = end % TINFL_LZ_DICT_SIZE;
            input = input.get(consumed..).unwrap_or_default();
            match status {
                TINFLStatus::HasMoreOutput => {}
                TINFLStatus::NeedsMoreInput if input.is_empty() => return Ok(block),
                _ => return Err(SpdyError::Compression),
            }
        }
    }
}

/// The two bytes every zlib stream begins with, and the four that name its dictionary.
fn skip_header(input: &[u8]) -> Option<&[u8]> {
    let ([method, flags], rest) = input.split_first_chunk::<2>()?;
    let check = u16::from_be_bytes([*method, *flags]);
    if method & 0x0f != 8 || !check.is_multiple_of(31) {
        return None;
    }
    if flags & 0x20 == 0 {
        return Some(rest);
    }
    let (name, rest) = rest.split_first_chunk::<4>()?;
    (u32::from_be_bytes(*name) == ADLER_32).then_some(rest)
}

/// The compressing end. It stores: what a server has to say in headers is nothing.
#[derive(Default)]
pub struct Deflater {
    begun: bool,
}

impl Deflater {
    /// Wraps a block of at most 65,535 bytes into stored zlib blocks, flushed.
    pub fn deflate(&mut self, block: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(block.len() + 12);
        if !self.begun {
            out.extend_from_slice(&[0x78, 0x01]);
            self.begun = true;
        }
        // The empty block after it tells the other end to hand out what it has.
        for part in [block, &[]] {
            let length = part.len() as u16;
            out.push(0);
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(&(!length).to_le_bytes());
            out.extend_from_slice(part);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Headers {
        Headers(vec![("streamtype".into(), "error".into()), ("port".into(), "80".into())])
    }

    #[test]
    fn blocks_follow_each_other_in_one_stream() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for _ in 0..2000 {
            let block = inflater.inflate(&deflater.deflate(&sample().encode())).unwrap();
            assert_eq!(Headers::parse(&block).unwrap(), sample());
        }
    }

    #[test]
    fn a_block_made_with_the_dictionary_is_read() {
        let block = Inflater::default().inflate(&hex(MATCH)).unwrap();
        assert_eq!(block, b"\0\0\0\x07options\0\0\0");
    }

    /// `zlib.compressobj(zdict=dictionary)` over the dictionary's first 14 bytes.
    const MATCH: &str = "78f9e3c6a7c26240298e01000000ffff";

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_held() {
        let bomb = miniz_oxide::deflate::compress_to_vec_zlib(&vec![0u8; 64 << 20], 9);
        assert!(bomb.len() < 100_000);
        let refused = Inflater::default().inflate(&bomb);
        assert_eq!(refused, Err(SpdyError::HeaderLimit("their size")));
    }

    #[test]
    fn counts_and_lengths_are_not_believed() {
        let claim = |count: u32, length: u32| [count.to_be_bytes(), length.to_be_bytes()].concat();
        assert_eq!(
            Headers::parse(&claim(u32::MAX, 0)),
            Err(SpdyError::HeaderLimit("their number"))
        );
        assert_eq!(
            Headers::parse(&claim(1, u32::MAX)),
            Err(SpdyError::HeaderLimit("the length of one"))
        );
        assert_eq!(Headers::parse(&claim(1, 100)), Err(SpdyError::Malformed("header block")));
        assert_eq!(Headers::parse(b"\0\0\0\0x"), Err(SpdyError::Malformed("header block")));
    }
}
