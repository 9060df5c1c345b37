//! Several rtnetlink requests in one system call.
//!
//! A pod's interface takes some ten requests. The kernel handles those of one message one after the
//! other before the call returns, so that a batch costs what its work costs, and no task waits in
//! between.

use std::io;

use bytes::BytesMut;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// Length of a netlink message's header.
const HEADER: usize = 16;
/// The kind of acknowledgements and refusals.
const NLMSG_ERROR: u16 = 2;
/// The answer has attributes, of which [`MESSAGE`] says in words what is wrong.
const NLM_F_ACK_TLVS: u16 = 0x200;
const MESSAGE: u16 = 1;

/// Requests to be sent together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    requests: Vec<(RouteNetlinkMessage, u16, Step)>,
}

/// What a request is for.
#[derive(Debug, Clone, Copy)]
struct Step {
    operation: &'static str,
    /// An errno that is as good as success.
    accepted: Option<i32>,
}

/// A request that was refused.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) operation: &'static str,
    pub(super) source: io::Error,
    /// What the kernel says of it.
    pub(super) message: Option<String>,
}

impl Batch {
    /// Adds a request with `flags` beside those of every request.
    pub(super) fn add(
        &mut self,
        operation: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> &mut Self {
        self.requests.push((message, flags, Step { operation, accepted: None }));
        self
    }

    /// Takes `errno` for a success of the request added last.
    pub(super) fn accepting(&mut self, errno: i32) -> &mut Self {
        if let Some((_, _, step)) = self.requests.last_mut() {
            step.accepted = Some(errno);
        }
        self
    }
}

/// A connection to the kernel, in the network namespace of the thread that opened it.
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Answers in words, without the request; an old kernel has neither.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a batch; the first refusal, if there is one. Requests after it are handled all the same.
    pub(super) fn run(&mut self, batch: Batch) -> Result<(), Refused> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let mut steps = Vec::new();
        for (message, flags, step) in batch.requests {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::from(message);
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = bytes.len();
            bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut bytes[start..]);
            steps.push(step);
        }
        let Some(one) = steps.first().copied() else {
            return Ok(());
        };
        let failed = |source| Refused { operation: one.operation, source, message: None };
        self.socket.send(&bytes, 0).map_err(failed)?;
        let mut refused: Option<(usize, Refused)> = None;
        let mut open = steps.len();
        let mut buffer = BytesMut::with_capacity(16 << 10);
        while open > 0 {
            buffer.clear();
            self.socket.recv(&mut buffer, 0).map_err(failed)?;
            let mut rest = &buffer[..];
            while let Some((answer, next)) = Answer::split(rest) {
                rest = next;
                let at = answer.sequence.wrapping_sub(first) as usize;
                let Some(step) = steps.get(at).filter(|_| answer.kind == NLMSG_ERROR) else {
                    continue;
                };
                open -= 1;
                let errno = answer.errno();
                if errno != 0
                    && step.accepted != Some(errno)
                    && refused.as_ref().is_none_or(|(before, _)| at < *before)
                {
                    let source = io::Error::from_raw_os_error(errno);
                    let message = answer.message();
                    refused = Some((at, Refused { operation: step.operation, source, message }));
                }
            }
        }
        refused.map_or(Ok(()), |(_, refused)| Err(refused))
    }
}

/// One message of an answer.
struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl<'a> Answer<'a> {
    /// The first message, and what follows it.
    fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let length = usize::try_from(word(bytes, 0)?).ok()?;
        let payload = bytes.get(HEADER..length)?;
        let answer = Self {
            kind: half(bytes, 4)?,
            flags: half(bytes, 6)?,
            sequence: word(bytes, 8)?,
            payload,
        };
        Some((answer, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
    }

    /// 0 for an acknowledgement.
    fn errno(&self) -> i32 {
        word(self.payload, 0).map_or(libc::EPROTO, |code| code.cast_signed().saturating_neg())
    }

    fn message(&self) -> Option<String> {
        if self.flags & NLM_F_ACK_TLVS == 0 {
            return None;
        }
        // The attributes follow the errno and the header of the request, which is not repeated.
        let mut rest = self.payload.get(4 + HEADER..)?;
        loop {
            let length = usize::from(half(rest, 0)?);
            let value = rest.get(4..length)?;
            if half(rest, 2)? & 0x3fff == MESSAGE {
                let text = value.strip_suffix(&[0]).unwrap_or(value);
                return Some(String::from_utf8_lossy(text).into_owned());
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use rtnetlink::{
        LinkMessageBuilder, LinkUnspec,
        packet_core::{NLM_F_CREATE, NLM_F_EXCL},
    };

    use super::*;

    #[test]
    fn the_first_refusal_counts_and_the_rest_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ns");
        super::super::netns::create(&path).unwrap();
        let refused = super::super::netns::within(&path, || {
            let mut connection = Connection::open().unwrap();
            let mut batch = Batch::default();
            let bridge = || {
                let link = rtnetlink::LinkBridge::new("d0").build();
                RouteNetlinkMessage::NewLink(link)
            };
            let up = |name: &str| {
                let link = LinkMessageBuilder::<LinkUnspec>::new().name(name).up().build();
                RouteNetlinkMessage::SetLink(link)
            };
            batch.add("make", bridge(), NLM_F_CREATE | NLM_F_EXCL);
            batch.add("make again", bridge(), NLM_F_CREATE | NLM_F_EXCL).accepting(libc::EEXIST);
            batch.add("open nothing", up("nothing"), 0);
            batch.add("open nothing else", up("else"), 0);
            batch.add("open", up("d0"), 0);
            let refused = connection.run(batch).unwrap_err();
            let links = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            assert!(links.contains("d0"), "{links}: {refused:?}");
            connection.run(Batch::default()).unwrap();
            // The numbers of the next batch go on.
            let mut batch = Batch::default();
            batch.add("open", up("d0"), 0);
            connection.run(batch).unwrap();
            refused
        })
        .unwrap();
        assert_eq!(refused.operation, "open nothing");
        assert_eq!(refused.source.raw_os_error(), Some(libc::ENODEV));
        super::super::netns::delete(&path).unwrap();
    }

    #[test]
    fn torn_answers_are_no_panic() {
        let mut bytes = [0u8; 64];
        bytes[0] = 40;
        bytes[4] = 2;
        bytes[7] = 2;
        bytes[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        for end in 0..bytes.len() {
            if let Some((answer, _)) = Answer::split(&bytes[..end]) {
                assert_eq!(answer.errno(), 17);
                let _ = answer.message();
            }
        }
    }
}
