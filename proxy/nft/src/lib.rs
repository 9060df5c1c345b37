//! nf_tables over netlink: objects as plain data, batches as bytes, replies as errors that name
//! the object that was refused.
//!
//! The kernel takes a [`Transaction`] whole or not at all. [`Client`] is the real kernel in the
//! network namespace of the calling thread; [`Fake`] refuses what the kernel would refuse, applies
//! atomically and dumps sorted text, so that a test can compare whole rulesets.
//!
//! Sources: Linux `include/uapi/linux/netfilter/nf_tables.h`, `nfnetlink.h`, `netlink.h`.

mod accounting;
mod client;
mod conntrack;
mod dump;
mod encode;
mod expr;
mod fake;
mod monitor;
mod object;
mod reply;
mod syntax;
mod sys;
mod text;
mod transaction;
pub mod wire;

pub use client::{Client, Error};
pub use conntrack::Flow;
pub use dump::{ElementEntry, RuleEntry, SetEntry, TableState};
pub use encode::{Batch, encode};
pub use expr::{
    Address, BitwiseOp, CmpOp, CtKey, DynsetOp, Expr, FibResult, LogLevel, MetaKey, NatKind,
    PayloadBase, REG, RejectKind,
};
pub use fake::{Fake, FakeError};
pub use monitor::{Changed, ForeignChange, Monitor, Notification};
pub use object::{
    BaseChain, Chain, ChainType, Data, DataType, Element, Family, Hook, Key, Rule, Set, SetData,
    Table, Verdict,
};
pub use reply::Failure;
pub use syntax::commands;
pub use transaction::{Op, Transaction};
