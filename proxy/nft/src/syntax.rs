//! Transactions as `nft` would write them, for people: what a batch does can be read without
//! knowing netlink. Rules are followed register by register, so a key that `nft`'s grammar cannot
//! say (a random number as a part of it) reads as `nft list ruleset` prints it.

use std::collections::HashMap;
use std::fmt::Write;

use crate::expr::{Address, CmpOp, DynsetOp, Expr, FibResult, MetaKey, NatKind, RejectKind};
use crate::object::{DataType, Set, SetData};
use crate::text;
use crate::transaction::{Op, Transaction};

/// The commands of a transaction, a line each; `sets` tells the types of sets that it does not make.
pub fn commands(transaction: &Transaction, sets: &[Set]) -> String {
    let mut known: HashMap<&str, &Set> = sets.iter().map(|set| (set.name.as_str(), set)).collect();
    let table = &transaction.table;
    let mut out = String::new();
    for op in &transaction.ops {
        // Writing to a string cannot fail.
        let _ = match op {
            Op::AddTable(None) => writeln!(out, "add table {table}"),
            Op::AddTable(Some(comment)) => {
                writeln!(out, "add table {table} {{ comment {comment:?}; }}")
            }
            Op::DeleteTable => writeln!(out, "delete table {table}"),
            Op::AddChain(chain) => match chain.base {
                None => writeln!(out, "add chain {table} {}", chain.name),
                Some(base) => writeln!(
                    out,
                    "add chain {table} {} {{ type {} hook {} priority {}; }}",
                    chain.name,
                    base.chain_type.name(),
                    base.hook.name(),
                    base.priority
                ),
            },
            Op::FlushChain(name) => writeln!(out, "flush chain {table} {name}"),
            Op::DeleteChain(name) => writeln!(out, "delete chain {table} {name}"),
            Op::AddRule(rule) => {
                writeln!(out, "add rule {table} {} {}", rule.chain, words(&rule.exprs, &known))
            }
            Op::DeleteRule { chain, handle } => {
                writeln!(out, "delete rule {table} {chain} handle {handle}")
            }
            Op::AddSet(set) => {
                known.insert(&set.name, set);
                let (kind, shape) = (kind(set), shape(set));
                writeln!(out, "add {kind} {table} {} {{ {shape} }}", set.name)
            }
            Op::FlushSet(name) => {
                let kind = known.get(name.as_str()).map_or("set", |set| kind(set));
                writeln!(out, "flush {kind} {table} {name}")
            }
            Op::DeleteSet(name) => {
                let kind = known.get(name.as_str()).map_or("set", |set| kind(set));
                writeln!(out, "delete {kind} {table} {name}")
            }
            Op::AddElements { set, elements } | Op::DeleteElements { set, elements } => {
                let verb = if matches!(op, Op::AddElements { .. }) { "add" } else { "delete" };
                for element in elements {
                    let shown = known.get(set.as_str()).map(|set| text::element(set, element));
                    let _ = writeln!(
                        out,
                        "{verb} element {table} {set} {{ {} }}",
                        shown.unwrap_or_else(|| format!("{:02x?}", element.key.bytes()))
                    );
                }
                Ok(())
            }
        };
    }
    out
}

fn kind(set: &Set) -> &'static str {
    if set.data.is_some() { "map" } else { "set" }
}

/// `type ipv4_addr . inet_service : verdict; flags interval;`
fn shape(set: &Set) -> String {
    let whole = text::set(set);
    let inner = whole.split_once("{ ").map_or(whole.as_str(), |(_, inner)| inner);
    let mut parts = inner.trim_end_matches(" }").split("; ");
    let mut shape = format!("{};", parts.next().unwrap_or_default());
    let flags: Vec<&str> = parts.collect();
    if !flags.is_empty() {
        let _ = write!(shape, " flags {};", flags.join(","));
    }
    shape
}

/// What the registers hold: a description and how many 32-bit registers it fills.
#[derive(Default)]
struct Registers(HashMap<u32, (String, u32)>);

/// Numbers of registers: 1 to 4 stand for four 32-bit ones each.
fn first(register: u32) -> u32 {
    if (1..=4).contains(&register) { 8 + (register - 1) * 4 } else { register }
}

impl Registers {
    fn load(&mut self, register: u32, what: impl Into<String>, bytes: u32) {
        let (at, words) = (first(register), bytes.div_ceil(4));
        // What was there before is gone, but for the end of what reaches beyond.
        for covered in at..at + words {
            if let Some((before, len)) = self.0.remove(&covered)
                && covered + len > at + words
            {
                self.0.insert(at + words, (before, covered + len - at - words));
            }
        }
        self.0.insert(at, (what.into(), words));
    }

    fn one(&self, register: u32) -> String {
        self.0.get(&first(register)).map(|(what, _)| what.clone()).unwrap_or_default()
    }

    /// The parts that fill `len` registers from here.
    fn concat(&self, register: u32, len: u32) -> String {
        let mut parts = Vec::new();
        let (mut at, end) = (first(register), first(register) + len);
        while at < end {
            let Some((what, words)) = self.0.get(&at) else {
                // A part of what began before: the end of what a map tells.
                let whole = (first(1)..at).rev().find_map(|r| Some((r, self.0.get(&r)?)));
                if let Some((r, (what, words))) = whole.filter(|(r, (_, words))| r + words > at) {
                    parts.push(what.as_str());
                    at = r + words;
                    continue;
                }
                break;
            };
            parts.push(what.as_str());
            at += words;
        }
        parts.join(" . ")
    }
}

fn key_words(set: Option<&&Set>) -> u32 {
    set.map_or(1, |set| set.key.iter().map(|t| t.padded_len() as u32 / 4).sum())
}

fn constant(what: &str, data: &[u8]) -> String {
    match (what, data) {
        ("meta l4proto", [6, ..]) => "tcp".into(),
        ("meta l4proto", [17, ..]) => "udp".into(),
        ("meta l4proto", [132, ..]) => "sctp".into(),
        (w, [2, 0, 0, 0]) if w.starts_with("fib") => "local".into(),
        (w, data) if w.starts_with("meta iifname") || w.starts_with("meta oifname") => {
            let name = String::from_utf8_lossy(data);
            let whole = data.contains(&0);
            format!("\"{}{}\"", name.trim_end_matches('\0'), if whole { "" } else { "*" })
        }
        (w, [a, b, c, d]) if w.contains("addr") => format!("{a}.{b}.{c}.{d}"),
        (w, data) if w.contains("addr") && data.len() == 16 => {
            text::fields(&[DataType::Ipv6Addr], data)
        }
        (w, [a, b]) if w.starts_with("th ") => u16::from_be_bytes([*a, *b]).to_string(),
        (_, [a, b, c, d]) => format!("{:#x}", u32::from_ne_bytes([*a, *b, *c, *d])),
        (_, data) => data.iter().fold("0x".to_owned(), |t, b| format!("{t}{b:02x}")),
    }
}

/// A rule's expressions in `nft`'s words.
fn words(exprs: &[Expr], sets: &HashMap<&str, &Set>) -> String {
    let mut registers = Registers::default();
    let mut out: Vec<String> = Vec::new();
    for expr in exprs {
        match expr {
            Expr::Payload { base, offset, len, dreg } => {
                use crate::expr::PayloadBase::{Network, Transport};
                let what = match (base, offset, len) {
                    (Network, 12, 4) => "ip saddr".to_owned(),
                    (Network, 16, 4) => "ip daddr".to_owned(),
                    (Network, 8, 16) => "ip6 saddr".to_owned(),
                    (Network, 24, 16) => "ip6 daddr".to_owned(),
                    (Network, 12..=15, _) => "ip saddr".to_owned(),
                    (Network, 16..=19, _) => "ip daddr".to_owned(),
                    (Transport, 0, 2) => "th sport".to_owned(),
                    (Transport, 2, 2) => "th dport".to_owned(),
                    _ => format!("@{base:?},{},{}", offset * 8, len * 8).to_lowercase(),
                };
                registers.load(*dreg, what, *len);
            }
            Expr::Meta { key, dreg } => {
                let bytes = if matches!(key, MetaKey::Iifname | MetaKey::Oifname) { 16 } else { 4 };
                registers.load(*dreg, format!("meta {key:?}").to_lowercase(), bytes);
            }
            Expr::MetaSet { key, sreg } => {
                out.push(format!("meta {} set {}", lower(key), registers.one(*sreg)));
            }
            Expr::Ct { key, dreg } => registers.load(*dreg, format!("ct {}", lower(key)), 4),
            Expr::Cmp { sreg, op, data } => {
                let what = registers.one(*sreg);
                let op = match op {
                    CmpOp::Eq => "",
                    CmpOp::Neq => "!= ",
                    CmpOp::Lt => "< ",
                    CmpOp::Lte => "<= ",
                    CmpOp::Gt => "> ",
                    CmpOp::Gte => ">= ",
                };
                // `ct state & new != 0` is written without the comparison.
                let text = match (what.strip_prefix("bits "), what.split_once(" & /")) {
                    (Some(bits), _) if op == "!= " && data.iter().all(|b| *b == 0) => {
                        bits.to_owned()
                    }
                    (_, Some((what, ones))) => {
                        format!("{what} {op}{}/{ones}", constant(what, data))
                    }
                    _ => format!("{what} {op}{}", constant(&what, data)),
                };
                out.push(text);
            }
            Expr::Bitwise { sreg, dreg, op } => {
                let what = registers.one(*sreg);
                let number = |bytes: &[u8]| match bytes {
                    [a, b, c, d] => u32::from_ne_bytes([*a, *b, *c, *d]),
                    _ => 0,
                };
                let (mask, xor) = (number(&op.mask), number(&op.xor));
                let text = match what.as_str() {
                    "ct state" if mask == 8 => "bits ct state new".to_owned(),
                    "ct status" if mask == 32 => "bits ct status dnat".to_owned(),
                    w if w.contains("addr") => {
                        let ones: u32 = op.mask.iter().map(|b| b.count_ones()).sum();
                        format!("{w} & /{ones}")
                    }
                    w if xor != 0 && mask == !xor => format!("{w} | {xor:#x}"),
                    w if xor == 0 => format!("{w} & {mask:#x}"),
                    w => format!("{w} & {mask:#x} ^ {xor:#x}"),
                };
                registers.load(*dreg, text, op.mask.len() as u32);
            }
            Expr::Immediate { dreg, data } => {
                let bytes = data.len() as u32;
                let types = [if bytes == 16 { DataType::Ipv6Addr } else { DataType::Ipv4Addr }];
                let text = match data[..] {
                    [a, b] => u16::from_be_bytes([a, b]).to_string(),
                    _ => text::fields(&types, data),
                };
                registers.load(*dreg, text, bytes);
            }
            Expr::Verdict(verdict) => out.push(text::verdict(verdict)),
            Expr::Lookup { set, sreg, invert } => {
                let key = registers.concat(*sreg, key_words(sets.get(set.as_str())));
                out.push(format!("{key} {}@{set}", if *invert { "!= " } else { "" }));
            }
            Expr::LookupMap { set, sreg, dreg } => {
                let key = registers.concat(*sreg, key_words(sets.get(set.as_str())));
                let value = match sets.get(set.as_str()).and_then(|set| set.data.as_ref()) {
                    Some(SetData::Value(types)) => types.iter().map(|t| t.padded_len()).sum(),
                    _ => 4,
                };
                registers.load(*dreg, format!("{key} map @{set}"), value as u32);
            }
            Expr::LookupVerdict { set, sreg } => {
                let key = registers.concat(*sreg, key_words(sets.get(set.as_str())));
                out.push(format!("{key} vmap @{set}"));
            }
            Expr::Dynset { set, op, key, data: _, timeout } => {
                let key = registers.concat(*key, key_words(sets.get(set.as_str())));
                let timeout = timeout.map(|ms| format!(" timeout {}s", ms / 1000));
                let verb = match op {
                    DynsetOp::Add => "add",
                    DynsetOp::Update => "update",
                    DynsetOp::Delete => "delete",
                };
                out.push(format!("{verb} @{set} {{ {key}{} }}", timeout.unwrap_or_default()));
            }
            Expr::NumgenRandom { modulus, offset, dreg } => {
                let offset = if *offset > 0 { format!(" offset {offset}") } else { String::new() };
                registers.load(*dreg, format!("numgen random mod {modulus}{offset}"), 4);
            }
            Expr::Nat { kind, family, address, port } => {
                let kind = if *kind == NatKind::Dnat { "dnat" } else { "snat" };
                let family = if *family == 2 { "ip" } else { "ip6" };
                let address = address.map(|r| registers.one(r)).unwrap_or_default();
                // A map's value holds the port too.
                let port = port.map(|r| registers.one(r)).filter(|port| !port.is_empty());
                let port = port.map(|port| format!(":{port}")).unwrap_or_default();
                out.push(format!("{kind} {family} to {address}{port}"));
            }
            Expr::Masquerade { fully_random } => {
                out.push(
                    if *fully_random { "masquerade fully-random" } else { "masquerade" }.into(),
                );
            }
            Expr::Reject(RejectKind::PortUnreachable) => out.push("reject".into()),
            Expr::Reject(RejectKind::TcpReset) => out.push("reject with tcp reset".into()),
            Expr::Fib { address, result, dreg } => {
                let address = if *address == Address::Source { "saddr" } else { "daddr" };
                let result = if *result == FibResult::AddressType { "type" } else { "oif" };
                registers.load(*dreg, format!("fib {address} {result}"), 4);
            }
            other => out.push(text::expr(other)),
        }
    }
    out.join(" ")
}

fn lower(key: &dyn std::fmt::Debug) -> String {
    format!("{key:?}").to_lowercase()
}
