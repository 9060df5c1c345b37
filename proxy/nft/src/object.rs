//! The objects of nf_tables as plain data.

use std::net::IpAddr;
use std::time::Duration;

use smallvec::SmallVec;

/// Address family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ip = 2,
    /// Bridge.
    Bridge = 7,
    /// IPv6.
    Ip6 = 10,
}

impl Family {
    /// The name that `nft` uses.
    pub fn name(self) -> &'static str {
        match self {
            Family::Inet => "inet",
            Family::Ip => "ip",
            Family::Bridge => "bridge",
            Family::Ip6 => "ip6",
        }
    }
}

/// A table's identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Table {
    /// Family.
    pub family: Family,
    /// Name.
    pub name: String,
}

impl Table {
    /// A table of that family and name.
    pub fn new(family: Family, name: impl Into<String>) -> Self {
        Table { family, name: name.into() }
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.family.name(), self.name)
    }
}

/// Where a base chain is hooked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Every arriving packet, before routing.
    Prerouting = 0,
    /// Packets for this host.
    Input = 1,
    /// Packets that this host forwards.
    Forward = 2,
    /// Packets that this host makes.
    Output = 3,
    /// Every leaving packet, after routing.
    Postrouting = 4,
}

impl Hook {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        }
    }
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainType {
    /// Filtering.
    Filter,
    /// Address translation; sees the first packet of each connection.
    Nat,
    /// Rerouting of local packets.
    Route,
}

impl ChainType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            ChainType::Filter => "filter",
            ChainType::Nat => "nat",
            ChainType::Route => "route",
        }
    }
}

/// What makes a chain a base chain. The policy is always accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// Type.
    pub chain_type: ChainType,
    /// Hook.
    pub hook: Hook,
    /// Priority: lower is earlier; dstnat is -100, filter 0, srcnat 100.
    pub priority: i32,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Name.
    pub name: String,
    /// `None` for a chain that is only jumped to.
    pub base: Option<BaseChain>,
}

/// What a rule or an element decides.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// Accept.
    Accept,
    /// Drop.
    Drop,
    /// Go on with the next rule.
    Continue,
    /// Return to the calling chain.
    Return,
    /// Call a chain.
    Jump(String),
    /// Continue in a chain without coming back.
    Goto(String),
}

/// A rule: its expressions in order, and a comment of at most 250 bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Chain it is appended to.
    pub chain: String,
    /// Expressions.
    pub exprs: Vec<crate::Expr>,
    /// Comment.
    pub comment: Option<String>,
}

/// Type of a key or data field, by the numbers that `nft` prints from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataType {
    /// A 32-bit number without a meaning, in host byte order.
    Integer = 4,
    /// IPv4 address.
    Ipv4Addr = 7,
    /// IPv6 address.
    Ipv6Addr = 8,
    /// Transport protocol.
    InetProto = 12,
    /// Port.
    InetService = 13,
    /// 32-bit mark, host byte order.
    Mark = 19,
    /// Interface name.
    Ifname = 41,
}

impl DataType {
    /// Bytes of a value.
    pub fn len(self) -> usize {
        match self {
            DataType::InetProto => 1,
            DataType::InetService => 2,
            DataType::Ipv4Addr | DataType::Mark | DataType::Integer => 4,
            DataType::Ipv6Addr | DataType::Ifname => 16,
        }
    }

    /// Bytes of a value as a field of a concatenation: whole 32-bit registers.
    pub fn padded_len(self) -> usize {
        self.len().next_multiple_of(4)
    }

    /// Always false; the companion of [`DataType::len`].
    pub fn is_empty(self) -> bool {
        false
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            DataType::Integer => "integer",
            DataType::Ipv4Addr => "ipv4_addr",
            DataType::Ipv6Addr => "ipv6_addr",
            DataType::InetProto => "inet_proto",
            DataType::InetService => "inet_service",
            DataType::Mark => "mark",
            DataType::Ifname => "ifname",
        }
    }

    /// Number of a concatenation of types, six bits each.
    pub(crate) fn concat(types: &[DataType]) -> u32 {
        types.iter().fold(0, |sum, t| (sum << 6) | *t as u32)
    }

    /// Length of a key of these types: exact if it is one, else padded.
    pub(crate) fn concat_len(types: &[DataType]) -> usize {
        match types {
            [one] => one.len(),
            more => more.iter().map(|t| t.padded_len()).sum(),
        }
    }
}

/// What a set's elements map to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetData {
    /// A verdict map.
    Verdict,
    /// A data map.
    Value(Vec<DataType>),
}

/// A named set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Name.
    pub name: String,
    /// Types of the key's fields.
    pub key: Vec<DataType>,
    /// What elements map to; `None` for a plain set.
    pub data: Option<SetData>,
    /// Elements may be ranges ([`Element::key_end`]).
    pub interval: bool,
    /// The packet path adds elements ([`crate::Expr::Dynset`]).
    pub dynamic: bool,
    /// Elements may expire.
    pub timeout: bool,
    /// Upper bound of the number of elements.
    pub size: Option<u32>,
}

impl Set {
    /// A set of keys without options.
    pub fn plain(name: impl Into<String>, key: &[DataType]) -> Self {
        Set {
            name: name.into(),
            key: key.to_vec(),
            data: None,
            interval: false,
            dynamic: false,
            timeout: false,
            size: None,
        }
    }

    /// `NFT_SET_*` bits.
    pub(crate) fn flags(&self) -> u32 {
        [
            (self.interval, 0x4),
            (self.data.is_some(), 0x8),
            (self.timeout, 0x10),
            (self.dynamic, 0x20),
            (self.interval && self.key.len() > 1, 0x80),
        ]
        .into_iter()
        .map(|(on, bit)| if on { bit } else { 0 })
        .sum()
    }

    /// A verdict map.
    pub fn verdict_map(name: impl Into<String>, key: &[DataType]) -> Self {
        Set { data: Some(SetData::Verdict), ..Set::plain(name, key) }
    }

    /// A map to data.
    pub fn map(name: impl Into<String>, key: &[DataType], data: &[DataType]) -> Self {
        Set { data: Some(SetData::Value(data.to_vec())), ..Set::plain(name, key) }
    }
}

/// Bytes of a key that are held in place: an IPv6 address, protocol, port and a number make 28.
const KEY: usize = 32;

/// A key or a value, field after field.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(SmallVec<[u8; KEY]>);

impl Key {
    /// An empty key, to be built field by field.
    pub fn new() -> Self {
        Key::default()
    }

    /// Raw bytes, already padded.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Key(SmallVec::from_slice(bytes))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A single field keeps its length; fields of a concatenation fill whole registers.
    fn field(mut self, bytes: &[u8]) -> Self {
        let first = self.0.is_empty();
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend_from_slice(bytes);
        if !first {
            self.0.resize(self.0.len().next_multiple_of(4), 0);
        }
        self
    }

    /// Adds an address.
    pub fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(a) => self.field(&a.octets()),
            IpAddr::V6(a) => self.field(&a.octets()),
        }
    }

    /// Adds a transport protocol (6 TCP, 17 UDP, 132 SCTP).
    pub fn protocol(self, protocol: u8) -> Self {
        self.field(&[protocol])
    }

    /// Adds a port.
    pub fn port(self, port: u16) -> Self {
        self.field(&port.to_be_bytes())
    }

    /// Adds a number in host byte order (types mark and integer).
    pub fn number(self, number: u32) -> Self {
        self.field(&number.to_ne_bytes())
    }

    /// Adds an interface name of at most 15 bytes.
    pub fn ifname(self, name: &str) -> Self {
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().zip(name.bytes().take(15)) {
            *to = from;
        }
        self.field(&bytes)
    }
}

/// What an element maps to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Data {
    /// A value.
    Value(Key),
    /// A verdict.
    Verdict(Verdict),
}

/// An element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// Its key, or the first of a range.
    pub key: Key,
    /// The last key of a range, field by field, in a concatenated interval set.
    pub key_end: Option<Key>,
    /// What it maps to.
    pub data: Option<Data>,
    /// When it expires.
    pub timeout: Option<Duration>,
}

impl Element {
    /// An element of a plain set.
    pub fn new(key: Key) -> Self {
        Element { key, key_end: None, data: None, timeout: None }
    }

    /// An element of a verdict map.
    pub fn verdict(key: Key, verdict: Verdict) -> Self {
        Element { data: Some(Data::Verdict(verdict)), ..Element::new(key) }
    }

    /// An element of a data map.
    pub fn value(key: Key, value: Key) -> Self {
        Element { data: Some(Data::Value(value)), ..Element::new(key) }
    }
}
