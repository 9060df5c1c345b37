//! Letting clients in whose `:authority` is the path of the socket.
//!
//! Go's gRPC, which nearly all plugins and monitors are written with, makes an authority of whatever it
//! was told to dial: `%2Fvar%2Flib%2Fkubelet%2F...`, or the bare path in older releases. No URI has such
//! a host, and the HTTP/2 library here refuses the request for it, where Go's servers do not look. So the
//! bytes of each connection pass through here: what is no host's name in that one header becomes dots.
//!
//! The header keeps its length, so that the compression of what follows (HPACK's table of headers seen
//! before, bounded by their sizes) is the same for both sides. Nothing else is touched, and what is not
//! understood goes on as it came: the library behind judges it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::Connected;

/// What a client of HTTP/2 says first.
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
/// Frames of headers that are looked into: the largest that a client may send unasked.
const MAX_FRAME: usize = 16_384;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;

/// Connections to `listener`, as [`Lenient`] ones.
pub(crate) fn incoming(listener: UnixListener) -> impl Stream<Item = io::Result<Lenient>> {
    tokio_stream::wrappers::UnixListenerStream::new(listener).map(|found| found.map(Lenient::new))
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Lenient {
    stream: UnixStream,
    filter: Filter,
    /// What has passed the filter and was not read yet.
    ready: Vec<u8>,
    /// How much of it was.
    at: usize,
}

impl Lenient {
    fn new(stream: UnixStream) -> Self {
        Self { stream, filter: Filter::default(), ready: Vec::new(), at: 0 }
    }
}

impl Connected for Lenient {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Lenient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.at == this.ready.len() {
            (this.ready, this.at) = (Vec::new(), 0);
            let mut bytes = [0; 8192];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // The end; what is left of a frame is nothing.
                return Poll::Ready(Ok(()));
            }
            this.filter.pass(read.filled(), &mut this.ready);
        }
        let rest = &this.ready[this.at..];
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        this.at += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Lenient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Where in what the client sends.
#[derive(Debug)]
enum State {
    /// So many bytes of no interest are left.
    Passing(usize),
    /// Before a frame.
    Frame,
}

#[derive(Debug)]
struct Filter {
    state: State,
    /// The beginning of a frame.
    held: Vec<u8>,
}

impl Default for Filter {
    fn default() -> Self {
        Self { state: State::Passing(PREFACE), held: Vec::new() }
    }
}

impl Filter {
    /// Takes `bytes` in and puts out what is known to be as it shall be.
    fn pass(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            match self.state {
                State::Passing(0) => self.state = State::Frame,
                State::Passing(left) => {
                    let (now, rest) = bytes.split_at(left.min(bytes.len()));
                    out.extend_from_slice(now);
                    (bytes, self.state) = (rest, State::Passing(left - now.len()));
                }
                State::Frame => {
                    let header = FRAME_HEADER.saturating_sub(self.held.len()).min(bytes.len());
                    self.held.extend_from_slice(&bytes[..header]);
                    bytes = &bytes[header..];
                    let [a, b, c, kind, ..] = self.held[..] else { continue };
                    if self.held.len() < FRAME_HEADER {
                        continue;
                    }
                    let length = u32::from_be_bytes([0, a, b, c]) as usize;
                    if kind != HEADERS || length > MAX_FRAME {
                        out.append(&mut self.held);
                        self.state = State::Passing(length);
                        continue;
                    }
                    let whole = FRAME_HEADER + length;
                    let (now, rest) = bytes.split_at((whole - self.held.len()).min(bytes.len()));
                    self.held.extend_from_slice(now);
                    bytes = rest;
                    if self.held.len() == whole {
                        let frame = std::mem::take(&mut self.held);
                        out.extend_from_slice(&amended(&frame).unwrap_or(frame));
                    }
                }
            }
        }
    }
}

/// A frame of headers with another authority; `None` if there is nothing to amend.
fn amended(frame: &[u8]) -> Option<Vec<u8>> {
    let flags = *frame.get(4)?;
    let mut start = FRAME_HEADER;
    let mut padding = 0;
    if flags & PADDED != 0 {
        padding = usize::from(*frame.get(start)?);
        start += 1;
    }
    if flags & PRIORITY != 0 {
        start += 5;
    }
    let block = frame.get(start..frame.len().checked_sub(padding)?)?;
    let (from, to, name) = find_authority(block)?;
    if !name.iter().any(|b| matches!(b, b'/' | b'%')) {
        return None;
    }
    let host = name.iter().map(|b| match b {
        b if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_') => *b,
        _ => b'.',
    });
    let mut new = frame[..start + from].to_vec();
    // Seven bits, of which the eighth says that it is plain.
    write_integer(&mut new, name.len(), 7);
    new.extend(host);
    new.extend_from_slice(&frame[start + to..]);
    let length = u32::try_from(new.len() - FRAME_HEADER).ok()?;
    if length as usize > MAX_FRAME {
        return None;
    }
    new[..3].copy_from_slice(&length.to_be_bytes()[1..]);
    Some(new)
}

/// Where in a block of headers (RFC 7541) the authority's text is, and what it says.
fn find_authority(block: &[u8]) -> Option<(usize, usize, Vec<u8>)> {
    let mut at = 0;
    loop {
        let first = *block.get(at)?;
        if first & 0x80 != 0 {
            // A header that was seen before.
            at = read_integer(block, at, 7)?.1;
            continue;
        }
        let (bits, update) = match first {
            b if b & 0x40 != 0 => (6, false),
            b if b & 0x20 != 0 => (5, true),
            _ => (4, false),
        };
        let (index, next) = read_integer(block, at, bits)?;
        at = next;
        if update {
            continue;
        }
        let mut found = index == AUTHORITY;
        if index == 0 {
            let (name, next) = read_text(block, at)?;
            found = name.is_some_and(|name| name == b":authority");
            at = next;
        }
        let (value, next) = read_text(block, at)?;
        if found {
            return Some((at, next, value?));
        }
        at = next;
    }
}

/// An integer whose first byte has `bits` of it, and where it ends.
fn read_integer(block: &[u8], mut at: usize, bits: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << bits) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    at += 1;
    if value < mask {
        return Some((value, at));
    }
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(at)?);
        at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

fn write_integer(out: &mut Vec<u8>, value: usize, bits: u32) {
    let mask = (1_usize << bits) - 1;
    let low = |n: usize| u8::try_from(n & 0xff).unwrap_or_default();
    if value < mask {
        out.push(low(value));
        return;
    }
    out.push(low(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(low((rest & 0x7f) | 0x80));
        rest >>= 7;
    }
    out.push(low(rest));
}

/// A text, where it can be understood, and where it ends.
fn read_text(block: &[u8], at: usize) -> Option<(Option<Vec<u8>>, usize)> {
    let huffman = block.get(at)? & 0x80 != 0;
    let (length, start) = read_integer(block, at, 7)?;
    let end = start.checked_add(length)?;
    let bytes = block.get(start..end)?;
    let text = if huffman { unpack(bytes) } else { Some(bytes.to_vec()) };
    Some((text, end))
}

/// HPACK's Huffman code (RFC 7541, appendix B) of printable ASCII: for each length the first code, and
/// whose that and the following are.
const CODES: [(u32, u32, &[u8]); 10] = [
    (5, 0, b"012aceiost"),
    (6, 20, b" %-./3456789=A_bdfghlmnpru"),
    (7, 92, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, 248, b"&*,;XZ"),
    (10, 1016, b"!\"()?"),
    (11, 2042, b"'+|"),
    (12, 4090, b"#>"),
    (13, 8184, b"\0$@[]~"),
    (14, 16380, b"^}"),
    (15, 32764, b"<`{"),
];

/// The text of Huffman-coded `bytes`; `None` if it is not all printable.
fn unpack(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    let (mut code, mut length) = (0_u32, 0_u32);
    for bit in bytes.iter().flat_map(|byte| (0..8).rev().map(move |n| (byte >> n) & 1)) {
        (code, length) = ((code << 1) | u32::from(bit), length + 1);
        let own = CODES.iter().find(|(bits, first, all)| {
            *bits == length
                && code >= *first
                && code - first < u32::try_from(all.len()).unwrap_or(0)
        });
        if let Some((_, first, all)) = own {
            text.push(*all.get(usize::try_from(code - first).ok()?)?);
            (code, length) = (0, 0);
        } else if length > 15 {
            return None;
        }
    }
    // Ones fill the last byte up.
    let filled = length < 8 && code == (1 << length) - 1;
    (filled && !text.contains(&0)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The headers of a call as Go's gRPC sends them, its authority in a Huffman code.
    const GO: &[u8] = &[
        0x83, 0x86, 0x45, 0x02, b'/', b'x', 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b,
        0xa0, 0xab, 0x90, 0xf4, 0xff,
    ];

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags, 0, 0, 0, 1]);
        frame.extend_from_slice(payload);
        frame
    }

    fn literal(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x41];
        write_integer(&mut block, authority.len(), 7);
        block.extend_from_slice(authority);
        block.extend([0x84]);
        block
    }

    /// What comes out of the filter, fed with so many bytes at once.
    fn passed(bytes: &[u8], at_once: usize) -> Vec<u8> {
        let (mut filter, mut out) = (Filter::default(), Vec::new());
        for chunk in bytes.chunks(at_once) {
            filter.pass(chunk, &mut out);
        }
        out
    }

    #[test]
    fn a_path_becomes_a_host_of_the_same_length() {
        // RFC 7541, C.4.1: www.example.com.
        let (at, to, text) = find_authority(GO).unwrap();
        assert_eq!((at, to, &*text), (7, 20, &b"www.example.com"[..]));
        assert_eq!(amended(&frame(HEADERS, 4, GO)), None, "it is one");
        for (path, host) in [
            ("/var/lib/kubelet.sock", ".var.lib.kubelet.sock"),
            ("%2Fvar%2Fx", ".2Fvar.2Fx"),
            (&"/a".repeat(100), &*".a".repeat(100)),
        ] {
            let given = frame(HEADERS, 4, &literal(path.as_bytes()));
            let wanted = frame(HEADERS, 4, &literal(host.as_bytes()));
            assert_eq!(amended(&given).unwrap(), wanted, "{path}");
        }
        for host in ["localhost", "localhost:80", "[::1]:80"] {
            assert_eq!(amended(&frame(HEADERS, 4, &literal(host.as_bytes()))), None);
        }
    }

    #[test]
    fn padding_and_priority_are_passed_over() {
        let mut payload = vec![3, 0, 0, 0, 0, 9];
        payload.extend(literal(b"/a"));
        payload.extend([0; 3]);
        let mut wanted = vec![3, 0, 0, 0, 0, 9];
        wanted.extend(literal(b".a"));
        wanted.extend([0; 3]);
        let flags = 4 | PADDED | PRIORITY;
        assert_eq!(
            amended(&frame(HEADERS, flags, &payload)).unwrap(),
            frame(HEADERS, flags, &wanted)
        );
    }

    #[test]
    fn only_headers_are_changed_however_they_arrive() {
        let stream = |authority: &[u8]| {
            let mut bytes = vec![b'p'; PREFACE];
            bytes.extend(frame(4, 0, &[]));
            bytes.extend(frame(HEADERS, 4, &literal(authority)));
            bytes.extend(frame(0, 1, &literal(b"/not/a/header")));
            bytes.extend(frame(HEADERS, 5, &[0x83, 0xbe]));
            bytes
        };
        let (given, wanted) = (stream(b"/run/x"), stream(b".run.x"));
        for at_once in [1, 2, 7, 1000] {
            assert_eq!(passed(&given, at_once), wanted, "{at_once}");
        }
        // What is no HTTP/2 at all goes on as it is.
        let noise: Vec<u8> = (0..=255).cycle().take(5000).collect();
        let out = passed(&noise, 100);
        assert_eq!(out, noise[..out.len()]);
    }

    #[tokio::test]
    async fn a_call_by_path_is_answered() {
        use crate::plugins::wire::registration_server::{Registration, RegistrationServer};
        use crate::plugins::wire::{
            InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
        };
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        use tonic::{Request, Response, Status};

        struct Server;
        #[async_trait::async_trait]
        impl Registration for Server {
            async fn get_info(
                &self,
                _: Request<InfoRequest>,
            ) -> Result<Response<PluginInfo>, Status> {
                Ok(Response::new(PluginInfo { name: "it-is-me".into(), ..Default::default() }))
            }

            async fn notify_registration_status(
                &self,
                _: Request<RegistrationStatus>,
            ) -> Result<Response<RegistrationStatusResponse>, Status> {
                Err(Status::unimplemented(""))
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = tonic::transport::Server::builder()
            .add_service(RegistrationServer::new(Server))
            .serve_with_incoming(incoming(listener));
        tokio::spawn(serving);
        for authority in ["%2Fvar%2Flib%2Fkubelet%2Fkubelet.sock", "/var/lib/x.sock", "localhost"] {
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            bytes.extend(frame(4, 0, &[]).iter().enumerate().map(|(i, b)| match i {
                // Settings are the connection's, not a stream's.
                8 => 0,
                _ => *b,
            }));
            let mut block = vec![0x83, 0x86];
            for (index, text) in [
                (4, "/pluginregistration.Registration/GetInfo"),
                (1, authority),
                (31, "application/grpc"),
            ] {
                write_integer(&mut block, index, 4);
                write_integer(&mut block, text.len(), 7);
                block.extend_from_slice(text.as_bytes());
            }
            block.extend([0, 2, b't', b'e', 8]);
            block.extend_from_slice(b"trailers");
            bytes.extend(frame(HEADERS, 4, &block));
            bytes.extend(frame(0, 1, &[0; 5]));
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let mut answer = Vec::new();
            while !String::from_utf8_lossy(&answer).contains("it-is-me") {
                let read = stream.read_buf(&mut answer).await.unwrap();
                assert_ne!(read, 0, "{authority} is refused: {answer:?}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_headers_make_it_fail(block in proptest::collection::vec(0_u8.., 0..200), flags in 0_u8..) {
            let given = frame(HEADERS, flags, &block);
            if let Some(new) = amended(&given) {
                let length = usize::from(u16::from_be_bytes([new[1], new[2]]));
                proptest::prop_assert_eq!(new.len(), FRAME_HEADER + length);
            }
        }
    }
}
