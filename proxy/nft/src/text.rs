//! Objects as text for the fake's dumps: for people and golden files, not for `nft`.

use std::fmt::Write;

use crate::expr::{Address, CmpOp, DynsetOp, Expr, FibResult, NatKind, RejectKind};
use crate::object::{Data, DataType, Element, Set, SetData, Verdict};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// A key's or value's fields by their types.
pub(crate) fn fields(types: &[DataType], bytes: &[u8]) -> String {
    parts(types, bytes).join(" . ")
}

/// From one key to another, field by field: a network as such, other ranges by their ends.
fn ranges(types: &[DataType], from: &[u8], to: &[u8]) -> String {
    let network = |from: &str, to: &str| -> Option<String> {
        let bits = |text: &str| match text.parse::<std::net::IpAddr>().ok()? {
            std::net::IpAddr::V4(a) => Some((u128::from(a.to_bits()) << 96, 32)),
            std::net::IpAddr::V6(a) => Some((a.to_bits(), 128)),
        };
        let ((first, len), (last, _)) = (bits(from)?, bits(to)?);
        let prefix = (first ^ last).leading_zeros().min(len);
        let host =
            u128::MAX.checked_shr(prefix).unwrap_or(0) & !u128::MAX.checked_shr(len).unwrap_or(0);
        (first & host == 0 && last & host == host).then(|| format!("{from}/{prefix}"))
    };
    let all = parts(types, from).into_iter().zip(parts(types, to)).map(|(from, to)| {
        if from == to { from } else { network(&from, &to).unwrap_or(format!("{from}-{to}")) }
    });
    all.collect::<Vec<_>>().join(" . ")
}

fn parts(types: &[DataType], mut bytes: &[u8]) -> Vec<String> {
    let mut parts = Vec::new();
    for t in types {
        let (field, rest) = bytes.split_at(t.padded_len().min(bytes.len()));
        bytes = rest;
        parts.push(match (t, field) {
            (DataType::Ipv4Addr, [a, b, c, d]) => format!("{a}.{b}.{c}.{d}"),
            (DataType::Ipv6Addr, f) if f.len() == 16 => {
                let mut octets = [0; 16];
                octets.copy_from_slice(f);
                std::net::Ipv6Addr::from(octets).to_string()
            }
            (DataType::InetProto, [6, ..]) => "tcp".into(),
            (DataType::InetProto, [17, ..]) => "udp".into(),
            (DataType::InetProto, [132, ..]) => "sctp".into(),
            (DataType::InetService, [a, b, ..]) => u16::from_be_bytes([*a, *b]).to_string(),
            (DataType::Mark | DataType::Integer, [a, b, c, d]) => {
                match u32::from_ne_bytes([*a, *b, *c, *d]) {
                    // An index or a count; others are read by their digits.
                    few @ 0..0x1_0000 => few.to_string(),
                    number => format!("{number:#010x}"),
                }
            }
            (_, f) => hex(f),
        });
    }
    parts
}

pub(crate) fn set(set: &Set) -> String {
    let types = |types: &[DataType]| types.iter().map(|t| t.name()).collect::<Vec<_>>().join(" . ");
    let mut text = format!(
        "{} {} {{ type {}",
        if set.data.is_some() { "map" } else { "set" },
        set.name,
        types(&set.key)
    );
    match &set.data {
        None => {}
        Some(SetData::Verdict) => text.push_str(" : verdict"),
        Some(SetData::Value(value)) => {
            let _ = write!(text, " : {}", types(value));
        }
    }
    for (on, flag) in
        [(set.interval, "interval"), (set.dynamic, "dynamic"), (set.timeout, "timeout")]
    {
        if on {
            let _ = write!(text, "; {flag}");
        }
    }
    text.push_str(" }");
    text
}

pub(crate) fn element(set: &Set, element: &Element) -> String {
    let mut text = match &element.key_end {
        Some(end) => ranges(&set.key, element.key.bytes(), end.bytes()),
        None => fields(&set.key, element.key.bytes()),
    };
    match (&element.data, &set.data) {
        (Some(Data::Verdict(v)), _) => {
            let _ = write!(text, " : {}", verdict(v));
        }
        (Some(Data::Value(value)), Some(SetData::Value(types))) => {
            let _ = write!(text, " : {}", fields(types, value.bytes()));
        }
        _ => {}
    }
    text
}

pub(crate) fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".into(),
        Verdict::Drop => "drop".into(),
        Verdict::Continue => "continue".into(),
        Verdict::Return => "return".into(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
    }
}

/// An expression by its registers, as the kernel sees it.
pub(crate) fn expr(expr: &Expr) -> String {
    match expr {
        Expr::Payload { base, offset, len, dreg } => {
            format!("[payload {base:?} {offset}+{len} -> r{dreg}]").to_lowercase()
        }
        Expr::Meta { key, dreg } => format!("[meta {key:?} -> r{dreg}]").to_lowercase(),
        Expr::MetaSet { key, sreg } => format!("[meta set {key:?} <- r{sreg}]").to_lowercase(),
        Expr::Ct { key, dreg } => format!("[ct {key:?} -> r{dreg}]").to_lowercase(),
        Expr::Cmp { sreg, op, data } => {
            let op = match op {
                CmpOp::Eq => "==",
                CmpOp::Neq => "!=",
                CmpOp::Lt => "<",
                CmpOp::Lte => "<=",
                CmpOp::Gt => ">",
                CmpOp::Gte => ">=",
            };
            format!("[r{sreg} {op} {}]", hex(data))
        }
        Expr::Bitwise { sreg, dreg, op } => {
            format!("[r{dreg} = r{sreg} & {} ^ {}]", hex(&op.mask), hex(&op.xor))
        }
        Expr::Immediate { dreg, data } => format!("[r{dreg} = {}]", hex(data)),
        Expr::Verdict(v) => verdict(v),
        Expr::Lookup { set, sreg, invert } => {
            format!("[r{sreg} {}in @{set}]", if *invert { "not " } else { "" })
        }
        Expr::LookupMap { set, sreg, dreg } => format!("[r{sreg} map @{set} -> r{dreg}]"),
        Expr::LookupVerdict { set, sreg } => format!("[r{sreg} vmap @{set}]"),
        Expr::Dynset { set, op, key, data, timeout } => {
            let op = match op {
                DynsetOp::Add => "add",
                DynsetOp::Update => "update",
                DynsetOp::Delete => "delete",
            };
            let data = data.map(|d| format!(" : r{d}")).unwrap_or_default();
            let timeout = timeout.map(|t| format!(" timeout {t}ms")).unwrap_or_default();
            format!("[{op} @{set} r{key}{data}{timeout}]")
        }
        Expr::NumgenRandom { modulus: 1, offset, dreg } => format!("[r{dreg} = {offset}]"),
        Expr::NumgenRandom { modulus, offset: 0, dreg } => {
            format!("[random mod {modulus} -> r{dreg}]")
        }
        Expr::NumgenRandom { modulus, offset, dreg } => {
            format!("[random mod {modulus} offset {offset} -> r{dreg}]")
        }
        Expr::Nat { kind, address, port, .. } => {
            let kind = if *kind == NatKind::Dnat { "dnat" } else { "snat" };
            let register = |r: &Option<u32>| r.map_or("-".to_owned(), |r| format!("r{r}"));
            format!("[{kind} {}:{}]", register(address), register(port))
        }
        Expr::Masquerade { fully_random } => {
            format!("masquerade{}", if *fully_random { " fully-random" } else { "" })
        }
        Expr::Reject(RejectKind::PortUnreachable) => "reject".into(),
        Expr::Reject(RejectKind::TcpReset) => "reject with tcp reset".into(),
        Expr::Fib { address, result, dreg } => {
            let address = if *address == Address::Source { "saddr" } else { "daddr" };
            let result = if *result == FibResult::AddressType { "type" } else { "oif" };
            format!("[fib {address} {result} -> r{dreg}]")
        }
        Expr::Counter => "counter".into(),
        Expr::Limit { rate, seconds, burst } => format!("[limit {rate}/{seconds}s burst {burst}]"),
        Expr::Log { prefix, .. } => format!("[log {prefix:?}]"),
    }
}
