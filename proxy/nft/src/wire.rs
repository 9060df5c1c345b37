//! Netlink's messages and attributes as bytes (`linux/netlink.h`): written into one buffer,
//! read without copying.

/// Length of `struct nlmsghdr`.
pub const HEADER_LEN: usize = 16;
/// Length of `struct nfgenmsg`.
pub const GENMSG_LEN: usize = 4;
/// A request.
pub const NLM_F_REQUEST: u16 = 0x1;
/// Answer even if it succeeds.
pub const NLM_F_ACK: u16 = 0x4;
/// The dump was interrupted by a change.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// The error does not carry the whole request.
pub const NLM_F_CAPPED: u16 = 0x100;
/// Extended acknowledgement attributes follow.
pub const NLM_F_ACK_TLVS: u16 = 0x200;
/// All objects.
pub const NLM_F_DUMP: u16 = 0x300;
/// Fail if it is there.
pub const NLM_F_EXCL: u16 = 0x200;
/// Make it if it is not there.
pub const NLM_F_CREATE: u16 = 0x400;
/// At the end.
pub const NLM_F_APPEND: u16 = 0x800;
/// Message type: error or acknowledgement.
pub const NLMSG_ERROR: u16 = 2;
/// Message type: end of a dump.
pub const NLMSG_DONE: u16 = 3;

const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Writes messages into a buffer.
#[derive(Debug, Default)]
pub struct Writer {
    buffer: Vec<u8>,
    message: usize,
}

impl Writer {
    /// An empty buffer.
    pub fn new() -> Self {
        Writer::default()
    }

    /// The messages written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.buffer
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Begins a netfilter message: `struct nlmsghdr` and `struct nfgenmsg`.
    pub fn begin(&mut self, kind: u16, flags: u16, seq: u32, family: u8, resource: u16) {
        self.message = self.buffer.len();
        self.buffer.extend_from_slice(&0u32.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(&flags.to_ne_bytes());
        self.buffer.extend_from_slice(&seq.to_ne_bytes());
        self.buffer.extend_from_slice(&0u32.to_ne_bytes());
        self.buffer.extend_from_slice(&[family, 0]);
        self.buffer.extend_from_slice(&resource.to_be_bytes());
    }

    /// Ends the message: its length is written.
    pub fn end(&mut self) {
        let len = (self.buffer.len() - self.message) as u32;
        self.buffer[self.message..self.message + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Adds flags to the message begun at `start` (its offset in the buffer).
    pub fn add_flags(&mut self, start: usize, flags: u16) {
        let at = start + 6;
        let old = u16::from_ne_bytes([self.buffer[at], self.buffer[at + 1]]);
        self.buffer[at..at + 2].copy_from_slice(&(old | flags).to_ne_bytes());
    }

    /// Writes an attribute.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.buffer.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(value);
        self.buffer.resize(self.buffer.len().next_multiple_of(4), 0);
    }

    /// Writes a number in network byte order, as nf_tables has them.
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Writes a number in network byte order.
    pub fn u64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Writes a string with its terminating zero.
    pub fn string(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.bytes(kind, &bytes);
    }

    /// Writes an attribute that holds attributes.
    pub fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Writer)) {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&0u16.to_ne_bytes());
        self.buffer.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        inner(self);
        let len = (self.buffer.len() - start) as u16;
        self.buffer[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }
}

/// A netlink message as received.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
    /// `nlmsg_pid`: the socket that asked for it, or made the change it tells.
    pub port: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The attributes after `struct nfgenmsg`.
    pub fn attributes(&self) -> Attributes<'a> {
        Attributes(self.payload.get(GENMSG_LEN..).unwrap_or_default())
    }

    /// `nfgen_family`.
    pub fn family(&self) -> u8 {
        self.payload.first().copied().unwrap_or_default()
    }
}

/// Messages of a received buffer; a truncated one ends the iteration.
#[derive(Clone, Copy, Debug)]
pub struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header = self.0.get(..HEADER_LEN)?;
        let number = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let len = number(0) as usize;
        let payload = self.0.get(HEADER_LEN..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            seq: number(8),
            port: number(12),
            payload,
        })
    }
}

/// Attributes of a buffer, as (type, value).
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let header = self.0.get(..4)?;
        let len = u16::from_ne_bytes([header[0], header[1]]) as usize;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let value = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl<'a> Attributes<'a> {
    /// The first attribute of that type.
    pub fn get(self, kind: u16) -> Option<&'a [u8]> {
        { self }.find(|(k, _)| *k == kind).map(|(_, value)| value)
    }

    /// Attributes within the attribute of that type; none if it is not there.
    pub fn nested(self, kind: u16) -> Attributes<'a> {
        Attributes(self.get(kind).unwrap_or_default())
    }

    /// A string without its zero.
    pub fn string(self, kind: u16) -> Option<String> {
        let value = self.get(kind)?;
        let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
        Some(String::from_utf8_lossy(&value[..end]).into_owned())
    }

    /// A number in network byte order.
    pub fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// A number in network byte order.
    pub fn u64(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }
}
