//! Transactions as netlink batches. Each message's sequence number leads back to the change it is
//! part of, so that an error names its object.

use crate::expr::{Address, Expr, RejectKind};
use crate::object::{Chain, Data, DataType, Element, Family, Rule, Set, SetData, Verdict};
use crate::transaction::{Op, Transaction};
use crate::wire::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, Writer};

pub(crate) const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Message numbers (`enum nf_tables_msg_types`).
pub(crate) mod msg {
    pub(crate) const NEWTABLE: u16 = 0;
    pub(crate) const GETTABLE: u16 = 1;
    pub(crate) const DELTABLE: u16 = 2;
    pub(crate) const NEWCHAIN: u16 = 3;
    pub(crate) const GETCHAIN: u16 = 4;
    pub(crate) const DELCHAIN: u16 = 5;
    pub(crate) const NEWRULE: u16 = 6;
    pub(crate) const GETRULE: u16 = 7;
    pub(crate) const DELRULE: u16 = 8;
    pub(crate) const NEWSET: u16 = 9;
    pub(crate) const GETSET: u16 = 10;
    pub(crate) const DELSET: u16 = 11;
    pub(crate) const NEWSETELEM: u16 = 12;
    pub(crate) const GETSETELEM: u16 = 13;
    pub(crate) const DELSETELEM: u16 = 14;
    pub(crate) const NEWGEN: u16 = 15;
    pub(crate) const GETGEN: u16 = 16;
}
/// An attribute's length is 16 bits wide, so a list of elements is cut before that.
const LIST_LIMIT: usize = 60_000;

/// What a message of a batch belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// Index into [`Transaction::ops`].
    pub(crate) op: usize,
    /// First element of the message, for element messages.
    pub(crate) first: usize,
    /// Offset of the message in the batch.
    pub(crate) start: usize,
}

/// A transaction as bytes.
#[derive(Debug)]
pub struct Batch {
    /// All messages: one `sendmsg`.
    pub bytes: Vec<u8>,
    /// Sequence number of the first message after the begin mark.
    pub(crate) first_seq: u32,
    /// By sequence number, from `first_seq`.
    pub(crate) origins: Vec<Origin>,
}

impl Batch {
    /// Number of messages between the marks.
    pub fn messages(&self) -> usize {
        self.origins.len()
    }
}

struct Encoder<'a> {
    out: Writer,
    transaction: &'a Transaction,
    first_seq: u32,
    origins: Vec<Origin>,
}

/// Encodes a transaction; the last message asks for an acknowledgement.
pub fn encode(transaction: &Transaction, seq: u32) -> Batch {
    let mut out = Writer::new();
    out.begin(BATCH_BEGIN, NLM_F_REQUEST, seq, 0, SUBSYSTEM);
    out.end();
    let first_seq = seq.wrapping_add(1);
    let mut encoder = Encoder { out, transaction, first_seq, origins: Vec::new() };
    for (index, op) in transaction.ops.iter().enumerate() {
        encoder.op(index, op);
    }
    let Encoder { mut out, origins, .. } = encoder;
    if let Some(last) = origins.last() {
        out.add_flags(last.start, NLM_F_ACK);
    }
    let end_seq = first_seq.wrapping_add(origins.len() as u32);
    out.begin(BATCH_END, NLM_F_REQUEST, end_seq, 0, SUBSYSTEM);
    out.end();
    Batch { bytes: out.into_bytes(), first_seq, origins }
}

impl Encoder<'_> {
    fn message(
        &mut self,
        op: usize,
        first: usize,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Writer),
    ) {
        let seq = self.first_seq.wrapping_add(self.origins.len() as u32);
        self.origins.push(Origin { op, first, start: self.out.len() });
        let family = self.transaction.table.family as u8;
        self.out.begin(SUBSYSTEM << 8 | kind, NLM_F_REQUEST | flags, seq, family, 0);
        body(&mut self.out);
        self.out.end();
    }

    fn op(&mut self, index: usize, op: &Op) {
        let transaction = self.transaction;
        let table = transaction.table.name.as_str();
        match op {
            Op::AddTable(comment) => self.message(index, 0, msg::NEWTABLE, NLM_F_CREATE, |out| {
                out.string(1, table);
                out.u32(2, 0);
                if let Some(comment) = comment {
                    out.bytes(6, &comment_udata(0, comment));
                }
            }),
            Op::DeleteTable => {
                self.message(index, 0, msg::DELTABLE, 0, |out| out.string(1, table));
            }
            Op::AddChain(chain) => {
                self.message(index, 0, msg::NEWCHAIN, NLM_F_CREATE, |out| {
                    write_chain(out, table, chain);
                });
            }
            Op::FlushChain(chain) => self.message(index, 0, msg::DELRULE, 0, |out| {
                out.string(1, table);
                out.string(2, chain);
            }),
            Op::DeleteChain(chain) => self.message(index, 0, msg::DELCHAIN, 0, |out| {
                out.string(1, table);
                out.string(3, chain);
            }),
            Op::AddRule(rule) => {
                self.message(index, 0, msg::NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |out| {
                    write_rule(out, transaction.table.family, table, rule);
                });
            }
            Op::DeleteRule { chain, handle } => self.message(index, 0, msg::DELRULE, 0, |out| {
                out.string(1, table);
                out.string(2, chain);
                out.u64(3, *handle);
            }),
            Op::AddSet(set) => self.message(index, 0, msg::NEWSET, NLM_F_CREATE, |out| {
                write_set(out, table, set, index as u32 + 1);
            }),
            Op::FlushSet(set) => self.message(index, 0, msg::DELSETELEM, 0, |out| {
                out.string(1, table);
                out.string(2, set);
            }),
            Op::DeleteSet(set) => self.message(index, 0, msg::DELSET, 0, |out| {
                out.string(1, table);
                out.string(2, set);
            }),
            Op::AddElements { set, elements } => {
                self.elements(index, msg::NEWSETELEM, NLM_F_CREATE, table, set, elements);
            }
            Op::DeleteElements { set, elements } => {
                self.elements(index, msg::DELSETELEM, 0, table, set, elements);
            }
        }
    }

    fn elements(
        &mut self,
        op: usize,
        kind: u16,
        flags: u16,
        table: &str,
        set: &str,
        elements: &[Element],
    ) {
        let mut first = 0;
        while first < elements.len() {
            let mut next = first;
            self.message(op, first, kind, flags, |out| {
                out.string(1, table);
                out.string(2, set);
                out.nest(3, |out| {
                    let start = out.len();
                    while next < elements.len() && out.len() - start < LIST_LIMIT {
                        out.nest(1, |out| write_element(out, &elements[next]));
                        next += 1;
                    }
                });
            });
            first = next;
        }
    }
}

/// A comment as `nft` keeps it: type, length, text with its zero.
fn comment_udata(kind: u8, comment: &str) -> Vec<u8> {
    let mut end = comment.len().min(250);
    while !comment.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![kind, (end + 1) as u8];
    bytes.extend_from_slice(&comment.as_bytes()[..end]);
    bytes.push(0);
    bytes
}

fn write_chain(out: &mut Writer, table: &str, chain: &Chain) {
    out.string(1, table);
    out.string(3, &chain.name);
    if let Some(base) = &chain.base {
        out.nest(4, |out| {
            out.u32(1, base.hook as u32);
            out.bytes(2, &base.priority.to_be_bytes());
        });
        out.u32(5, 1);
        out.string(7, base.chain_type.name());
    }
}

fn write_rule(out: &mut Writer, family: Family, table: &str, rule: &Rule) {
    out.string(1, table);
    out.string(2, &rule.chain);
    out.nest(4, |out| {
        for expr in &rule.exprs {
            out.nest(1, |out| write_expr(out, family, expr));
        }
    });
    if let Some(comment) = &rule.comment {
        out.bytes(7, &comment_udata(0, comment));
    }
}

fn write_set(out: &mut Writer, table: &str, set: &Set, id: u32) {
    let concat = set.key.len() > 1;
    out.string(1, table);
    out.string(2, &set.name);
    out.u32(3, set.flags());
    out.u32(4, DataType::concat(&set.key));
    out.u32(5, DataType::concat_len(&set.key) as u32);
    match &set.data {
        None => {}
        Some(SetData::Verdict) => {
            out.u32(6, 0xffff_ff00);
            out.u32(7, 0);
        }
        Some(SetData::Value(types)) => {
            out.u32(6, DataType::concat(types));
            out.u32(7, DataType::concat_len(types) as u32);
        }
    }
    out.nest(9, |out| {
        if let Some(size) = set.size {
            out.u32(1, size);
        }
        if set.interval && concat {
            out.nest(2, |out| {
                for field in &set.key {
                    out.nest(1, |out| out.u32(1, field.len() as u32));
                }
            });
        }
    });
    out.u32(10, id);
    // Without this `nft` prints a number with its bytes turned round.
    if set.key == [DataType::Mark] {
        out.bytes(13, &host_order());
    }
}

/// That a set's key is in host byte order, as `nft` keeps it: type (0, the key's), length, order (1).
fn host_order() -> [u8; 6] {
    let [a, b, c, d] = 1_u32.to_ne_bytes();
    [0, 4, a, b, c, d]
}

fn write_element(out: &mut Writer, element: &Element) {
    out.nest(1, |out| out.bytes(1, element.key.bytes()));
    if let Some(end) = &element.key_end {
        out.nest(10, |out| out.bytes(1, end.bytes()));
    }
    match &element.data {
        None => {}
        Some(Data::Value(value)) => out.nest(2, |out| out.bytes(1, value.bytes())),
        Some(Data::Verdict(verdict)) => {
            out.nest(2, |out| out.nest(2, |out| write_verdict(out, verdict)));
        }
    }
    if let Some(timeout) = element.timeout {
        out.u64(4, timeout.as_millis() as u64);
    }
}

fn write_verdict(out: &mut Writer, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Continue => (-1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5_i32, None),
    };
    out.bytes(1, &code.to_be_bytes());
    if let Some(chain) = chain {
        out.string(2, chain);
    }
}

pub(crate) fn write_expr(out: &mut Writer, family: Family, expr: &Expr) {
    let mut named = |name: &str, body: &dyn Fn(&mut Writer)| {
        out.string(1, name);
        out.nest(2, body);
    };
    let value = |out: &mut Writer, kind: u16, data: &[u8]| out.nest(kind, |out| out.bytes(1, data));
    match expr {
        Expr::Payload { base, offset, len, dreg } => named("payload", &|out| {
            out.u32(1, *dreg);
            out.u32(2, *base as u32);
            out.u32(3, *offset);
            out.u32(4, *len);
        }),
        Expr::Meta { key, dreg } => named("meta", &|out| {
            out.u32(1, *dreg);
            out.u32(2, *key as u32);
        }),
        Expr::MetaSet { key, sreg } => named("meta", &|out| {
            out.u32(2, *key as u32);
            out.u32(3, *sreg);
        }),
        Expr::Ct { key, dreg } => named("ct", &|out| {
            out.u32(1, *dreg);
            out.u32(2, *key as u32);
        }),
        Expr::Cmp { sreg, op, data } => named("cmp", &|out| {
            out.u32(1, *sreg);
            out.u32(2, *op as u32);
            value(out, 3, data);
        }),
        Expr::Bitwise { sreg, dreg, op } => named("bitwise", &|out| {
            out.u32(1, *sreg);
            out.u32(2, *dreg);
            out.u32(3, op.mask.len() as u32);
            value(out, 4, &op.mask);
            value(out, 5, &op.xor);
        }),
        Expr::Immediate { dreg, data } => named("immediate", &|out| {
            out.u32(1, *dreg);
            value(out, 2, data);
        }),
        Expr::Verdict(verdict) => named("immediate", &|out| {
            out.u32(1, 0);
            out.nest(2, |out| out.nest(2, |out| write_verdict(out, verdict)));
        }),
        Expr::Lookup { set, sreg, invert } => named("lookup", &|out| {
            out.string(1, set);
            out.u32(2, *sreg);
            if *invert {
                out.u32(5, 1);
            }
        }),
        Expr::LookupMap { set, sreg, dreg } => named("lookup", &|out| {
            out.string(1, set);
            out.u32(2, *sreg);
            out.u32(3, *dreg);
        }),
        Expr::LookupVerdict { set, sreg } => named("lookup", &|out| {
            out.string(1, set);
            out.u32(2, *sreg);
            out.u32(3, 0);
        }),
        Expr::Dynset { set, op, key, data, timeout } => named("dynset", &|out| {
            out.string(1, set);
            out.u32(3, *op as u32);
            out.u32(4, *key);
            if let Some(data) = data {
                out.u32(5, *data);
            }
            if let Some(timeout) = timeout {
                out.u64(6, *timeout);
            }
        }),
        Expr::NumgenRandom { modulus, offset, dreg } => named("numgen", &|out| {
            out.u32(1, *dreg);
            out.u32(2, *modulus);
            out.u32(3, 1);
            if *offset > 0 {
                out.u32(4, *offset);
            }
        }),
        Expr::Nat { kind, family, address, port } => named("nat", &|out| {
            out.u32(1, *kind as u32);
            out.u32(2, u32::from(*family));
            let mut flags = 0;
            if let Some(address) = address {
                out.u32(3, *address);
                flags |= 1;
            }
            if let Some(port) = port {
                out.u32(5, *port);
                flags |= 2;
            }
            out.u32(7, flags);
        }),
        Expr::Masquerade { fully_random } => named("masq", &|out| {
            if *fully_random {
                out.u32(1, 16);
            }
        }),
        Expr::Reject(kind) => named("reject", &|out| {
            // (type, code): ICMP's and ICMPv6's own number of "port unreachable", or the one that
            // stands for both.
            let (kind, code) = match (kind, family) {
                (RejectKind::TcpReset, _) => (1, 0),
                (RejectKind::PortUnreachable, Family::Ip) => (0, 3),
                (RejectKind::PortUnreachable, Family::Ip6) => (0, 4),
                (RejectKind::PortUnreachable, _) => (2, 1),
            };
            out.u32(1, kind);
            out.bytes(2, &[code]);
        }),
        Expr::Fib { address, result, dreg } => named("fib", &|out| {
            out.u32(1, *dreg);
            out.u32(2, *result as u32);
            out.u32(3, if *address == Address::Source { 1 } else { 2 });
        }),
        Expr::Counter => named("counter", &|_| {}),
        Expr::Limit { rate, seconds, burst } => named("limit", &|out| {
            out.u64(1, *rate);
            out.u64(2, *seconds);
            out.u32(3, *burst);
            out.u32(4, 0);
        }),
        Expr::Log { prefix, level } => named("log", &|out| {
            out.string(2, prefix);
            out.u32(5, *level as u32);
        }),
    }
}
