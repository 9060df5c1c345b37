//! Expressions: what a rule is made of. Registers are the 32-bit ones (`NFT_REG32_00` is 8), sixteen
//! of them; a field of a concatenation fills whole registers.

use crate::object::{Key, Verdict};

/// The first 32-bit register.
pub const REG: u32 = 8;

/// Where a payload expression reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadBase {
    /// Link layer header.
    Link = 0,
    /// Network header.
    Network = 1,
    /// Transport header.
    Transport = 2,
}

/// What a meta expression reads or sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaKey {
    /// `mark`.
    Mark = 3,
    /// Index of the input interface.
    Iif = 4,
    /// Index of the output interface.
    Oif = 5,
    /// Name of the input interface.
    Iifname = 6,
    /// Name of the output interface.
    Oifname = 7,
    /// Family of the packet in an `inet` table (2 IPv4, 10 IPv6).
    Nfproto = 15,
    /// Transport protocol.
    L4proto = 16,
}

/// What a ct expression reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtKey {
    /// Bits: 1 invalid, 2 established, 4 related, 8 new, 64 untracked.
    State = 0,
    /// `IPS_*` bits: 16 source, 32 destination translated.
    Status = 2,
    /// Connection mark.
    Mark = 3,
}

/// Comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CmpOp {
    /// Equal.
    Eq = 0,
    /// Not equal.
    Neq = 1,
    /// Less.
    Lt = 2,
    /// Less or equal.
    Lte = 3,
    /// Greater.
    Gt = 4,
    /// Greater or equal.
    Gte = 5,
}

/// `value & mask ^ xor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitwiseOp {
    /// Mask, as long as the value.
    pub mask: Vec<u8>,
    /// Exclusive or, as long as the value.
    pub xor: Vec<u8>,
}

/// What a dynset expression does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynsetOp {
    /// Add an element that is not there.
    Add = 0,
    /// Add it, or begin its timeout anew.
    Update = 1,
    /// Delete it.
    Delete = 2,
}

/// What a nat expression translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NatKind {
    /// The source.
    Snat = 0,
    /// The destination.
    Dnat = 1,
}

/// What a fib expression tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FibResult {
    /// Index of the output interface.
    Oif = 1,
    /// Type of the address: 2 is local (`RTN_LOCAL`).
    AddressType = 3,
}

/// Which address of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// How a reject answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectKind {
    /// ICMP or ICMPv6 port unreachable, by the table's family.
    PortUnreachable,
    /// TCP reset.
    TcpReset,
}

/// Level of a log expression (syslog's).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Warning.
    Warning = 4,
    /// Information.
    Info = 6,
    /// Debugging.
    Debug = 7,
}

/// One expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// Loads from the packet.
    Payload {
        /// Which header.
        base: PayloadBase,
        /// From which byte.
        offset: u32,
        /// How many bytes.
        len: u32,
        /// Into which register.
        dreg: u32,
    },
    /// Loads packet metadata.
    Meta {
        /// What.
        key: MetaKey,
        /// Into which register.
        dreg: u32,
    },
    /// Sets packet metadata.
    MetaSet {
        /// What.
        key: MetaKey,
        /// From which register.
        sreg: u32,
    },
    /// Loads connection tracking data.
    Ct {
        /// What.
        key: CtKey,
        /// Into which register.
        dreg: u32,
    },
    /// Goes on only if a register compares so.
    Cmp {
        /// Register.
        sreg: u32,
        /// How.
        op: CmpOp,
        /// With what.
        data: Vec<u8>,
    },
    /// Masks a register.
    Bitwise {
        /// From.
        sreg: u32,
        /// To.
        dreg: u32,
        /// How.
        op: BitwiseOp,
    },
    /// Loads a constant.
    Immediate {
        /// Into which register.
        dreg: u32,
        /// What.
        data: Vec<u8>,
    },
    /// Ends the rule with a verdict.
    Verdict(Verdict),
    /// Goes on only if the key is in the set (or is not, inverted).
    Lookup {
        /// Set.
        set: String,
        /// First register of the key.
        sreg: u32,
        /// Inverted.
        invert: bool,
    },
    /// Loads what the key maps to; goes on only if it is there.
    LookupMap {
        /// Map.
        set: String,
        /// First register of the key.
        sreg: u32,
        /// First register of the value.
        dreg: u32,
    },
    /// Ends the rule with the verdict that the key maps to, if it is there.
    LookupVerdict {
        /// Verdict map.
        set: String,
        /// First register of the key.
        sreg: u32,
    },
    /// Adds to, refreshes in, or deletes from a dynamic set.
    Dynset {
        /// Set or map.
        set: String,
        /// What to do.
        op: DynsetOp,
        /// First register of the key.
        key: u32,
        /// First register of the value, in a map.
        data: Option<u32>,
        /// When the element expires, milliseconds.
        timeout: Option<u64>,
    },
    /// Loads `offset` plus a random number from 0 below `modulus`, host byte order. With modulus 1
    /// it is a constant that `nft` can print as part of a key.
    NumgenRandom {
        /// Upper bound, exclusive.
        modulus: u32,
        /// Added to it.
        offset: u32,
        /// Into which register.
        dreg: u32,
    },
    /// Translates an address, by registers.
    Nat {
        /// Source or destination.
        kind: NatKind,
        /// Family of the address: 2 IPv4, 10 IPv6.
        family: u8,
        /// Register of the address.
        address: Option<u32>,
        /// Register of the port.
        port: Option<u32>,
    },
    /// Translates the source to the address of the output interface.
    Masquerade {
        /// Whether the port is chosen at random altogether.
        fully_random: bool,
    },
    /// Answers that the port cannot be reached, and drops.
    Reject(RejectKind),
    /// Looks an address up in the routing tables.
    Fib {
        /// Which address.
        address: Address,
        /// What to load.
        result: FibResult,
        /// Into which register.
        dreg: u32,
    },
    /// Counts packets and bytes.
    Counter,
    /// Goes on only below a rate.
    Limit {
        /// Packets.
        rate: u64,
        /// Per so many seconds.
        seconds: u64,
        /// Burst.
        burst: u32,
    },
    /// Writes to the kernel log.
    Log {
        /// Prefix.
        prefix: String,
        /// Level.
        level: LogLevel,
    },
}

impl Expr {
    /// The IPv4 source or destination address into a register.
    pub fn ip4(address: Address, dreg: u32) -> Expr {
        let offset = if address == Address::Source { 12 } else { 16 };
        Expr::Payload { base: PayloadBase::Network, offset, len: 4, dreg }
    }

    /// The IPv6 source or destination address into four registers.
    pub fn ip6(address: Address, dreg: u32) -> Expr {
        let offset = if address == Address::Source { 8 } else { 24 };
        Expr::Payload { base: PayloadBase::Network, offset, len: 16, dreg }
    }

    /// The transport protocol into a register.
    pub fn l4proto(dreg: u32) -> Expr {
        Expr::Meta { key: MetaKey::L4proto, dreg }
    }

    /// The destination port into a register (TCP, UDP, SCTP alike).
    pub fn dport(dreg: u32) -> Expr {
        Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, dreg }
    }

    /// Compares a register with a key's bytes, unpadded.
    pub fn cmp(sreg: u32, op: CmpOp, data: &[u8]) -> Expr {
        Expr::Cmp { sreg, op, data: data.to_vec() }
    }

    /// Goes on only if the packet's protocol is this one.
    pub fn is_l4proto(protocol: u8) -> [Expr; 2] {
        [Expr::l4proto(REG), Expr::cmp(REG, CmpOp::Eq, &[protocol])]
    }

    /// Goes on only if the destination port is this one.
    pub fn is_dport(port: u16) -> [Expr; 2] {
        [Expr::dport(REG), Expr::cmp(REG, CmpOp::Eq, &port.to_be_bytes())]
    }

    /// Goes on only if the address lies (or, inverted, does not lie) within `network`/`prefix_len`.
    pub fn in_network(
        address: Address,
        network: std::net::IpAddr,
        prefix_len: u8,
        invert: bool,
    ) -> Vec<Expr> {
        if prefix_len == 0 && !invert {
            return Vec::new();
        }
        let (load, bytes) = match network {
            std::net::IpAddr::V4(a) => (Expr::ip4(address, REG), a.octets().to_vec()),
            std::net::IpAddr::V6(a) => (Expr::ip6(address, REG), a.octets().to_vec()),
        };
        let mask: Vec<u8> = (0..bytes.len())
            .map(|i| match usize::from(prefix_len).saturating_sub(i * 8) {
                0 => 0,
                bits @ 1..8 => !(0xff_u8 >> bits),
                _ => 0xff,
            })
            .collect();
        let data: Vec<u8> = bytes.iter().zip(&mask).map(|(b, m)| b & m).collect();
        let op = if invert { CmpOp::Neq } else { CmpOp::Eq };
        let mut exprs = vec![load];
        if mask.iter().any(|m| *m != 0xff) {
            let xor = vec![0; mask.len()];
            exprs.push(Expr::Bitwise { sreg: REG, dreg: REG, op: BitwiseOp { mask, xor } });
        }
        exprs.push(Expr::Cmp { sreg: REG, op, data });
        exprs
    }

    /// Goes on only if the address is (or is not) one of this host's.
    pub fn is_local(address: Address, invert: bool) -> [Expr; 2] {
        let op = if invert { CmpOp::Neq } else { CmpOp::Eq };
        [
            Expr::Fib { address, result: FibResult::AddressType, dreg: REG },
            Expr::cmp(REG, op, &2u32.to_ne_bytes()),
        ]
    }

    /// Goes on only if the interface has (or has not) this name.
    pub fn is_interface(key: MetaKey, name: &str, invert: bool) -> [Expr; 2] {
        let op = if invert { CmpOp::Neq } else { CmpOp::Eq };
        [Expr::Meta { key, dreg: REG }, Expr::cmp(REG, op, Key::new().ifname(name).bytes())]
    }

    /// Goes on only if one of these bits of the connection's state or status is set.
    pub fn has_ct(key: CtKey, bits: u32) -> [Expr; 3] {
        let op = BitwiseOp { mask: bits.to_ne_bytes().to_vec(), xor: vec![0; 4] };
        [
            Expr::Ct { key, dreg: REG },
            Expr::Bitwise { sreg: REG, dreg: REG, op },
            Expr::cmp(REG, CmpOp::Neq, &[0; 4]),
        ]
    }

    /// Translates the destination to a constant address and port.
    pub fn dnat_to(to: std::net::SocketAddr) -> [Expr; 3] {
        let (family, address) = match to.ip() {
            std::net::IpAddr::V4(a) => (2, a.octets().to_vec()),
            std::net::IpAddr::V6(a) => (10, a.octets().to_vec()),
        };
        [
            Expr::Immediate { dreg: REG, data: address },
            Expr::Immediate { dreg: REG + 4, data: to.port().to_be_bytes().to_vec() },
            Expr::Nat { kind: NatKind::Dnat, family, address: Some(REG), port: Some(REG + 4) },
        ]
    }
}
