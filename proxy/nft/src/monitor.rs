//! Watching for changes that somebody else makes: a firewall reload that flushes every table is
//! noticed when it happens, not at the next periodic look.

use std::collections::{BTreeSet, VecDeque};
use std::io;

use tokio::io::unix::AsyncFd;

use crate::client::{Client, Error};
use crate::encode::{SUBSYSTEM, msg};
use crate::sys::Socket;
use crate::wire::{Message, Messages};

const NFNLGRP_NFTABLES: u32 = 7;
/// A commit of more different changes is told as [`Notification::Overflow`].
const LIMIT: usize = 4096;

/// What a change was made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Changed {
    /// A table.
    Table,
    /// A chain.
    Chain,
    /// A rule.
    Rule,
    /// A set, its elements, or something else.
    Other,
}

/// A change that somebody else made.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignChange {
    /// Name of the table (the family is not told).
    pub table: String,
    /// The chain, of a chain or rule.
    pub chain: Option<String>,
    /// What kind of object.
    pub object: Changed,
    /// Whether it was deleted, else made or changed.
    pub deleted: bool,
}

/// What somebody else did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// One commit: each different change once.
    Commit {
        /// Name of the program, at most 15 bytes.
        by: String,
        /// What it changed.
        changes: BTreeSet<ForeignChange>,
    },
    /// So much that not all was told.
    Overflow,
}

/// A subscription to nf_tables' notifications.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<Socket>,
    buffer: Vec<u8>,
    /// Changes of the commit that is being told; its end tells who made it.
    pending: BTreeSet<ForeignChange>,
    ready: VecDeque<Notification>,
}

fn foreign_change(message: &Message<'_>) -> Option<ForeignChange> {
    let kind = message.kind & 0xff;
    let (object, chain) = match kind {
        msg::NEWTABLE | msg::DELTABLE => (Changed::Table, None),
        msg::NEWCHAIN | msg::DELCHAIN => (Changed::Chain, Some(3)),
        msg::NEWRULE | msg::DELRULE => (Changed::Rule, Some(2)),
        _ => (Changed::Other, None),
    };
    let deleted =
        [msg::DELTABLE, msg::DELCHAIN, msg::DELRULE, msg::DELSET, msg::DELSETELEM].contains(&kind);
    let attributes = message.attributes();
    // Attribute 1 is the table's name in the messages of every object.
    let table = attributes.string(1)?;
    Some(ForeignChange { table, chain: chain.and_then(|n| attributes.string(n)), object, deleted })
}

impl Monitor {
    /// Subscribes in the network namespace of the calling thread. Changes that `own` makes are
    /// filtered out in the kernel. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the kernel has no nfnetlink.
    pub fn new(own: Option<&Client>) -> Result<Self, Error> {
        let failed = |source| Error::Socket { operation: "subscribe to changes", source };
        let socket = Socket::open(true).map_err(failed)?;
        socket.receive_buffer(1 << 20).map_err(failed)?;
        if let Some(own) = own {
            socket.ignore_port(own.port()).map_err(failed)?;
        }
        socket.join(NFNLGRP_NFTABLES).map_err(failed)?;
        let socket = socket.into_async().map_err(failed)?;
        Ok(Monitor {
            socket,
            buffer: vec![0; 64 * 1024],
            pending: BTreeSet::new(),
            ready: VecDeque::new(),
        })
    }

    /// Takes in the messages of one datagram.
    fn take(&mut self, len: usize) {
        for message in Messages(&self.buffer[..len]) {
            if message.kind >> 8 != SUBSYSTEM {
                continue;
            }
            if message.kind & 0xff != msg::NEWGEN {
                self.pending.extend(foreign_change(&message));
                continue;
            }
            let changes = std::mem::take(&mut self.pending);
            if !changes.is_empty() {
                let by = message.attributes().string(3).unwrap_or_default();
                self.ready.push_back(Notification::Commit { by, changes });
            }
        }
        if self.pending.len() > LIMIT {
            self.overflow();
        }
    }

    fn overflow(&mut self) {
        self.pending.clear();
        self.ready.clear();
        self.ready.push_back(Notification::Overflow);
    }

    /// Waits until somebody else changes something. Cancel-safe.
    ///
    /// # Errors
    /// If the subscription is broken; make a new one.
    pub async fn changed(&mut self) -> Result<Notification, Error> {
        loop {
            if let Some(told) = self.ready.pop_front() {
                return Ok(told);
            }
            let failed = |source| Error::Socket { operation: "receive notifications", source };
            let mut ready = self.socket.readable_mut().await.map_err(failed)?;
            let buffer = &mut self.buffer;
            match ready.try_io(|socket| socket.get_ref().receive(buffer, false)) {
                Err(_would_block) => {}
                Ok(Ok(len)) => self.take(len),
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => self.overflow(),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(source)) => return Err(failed(source)),
            }
        }
    }

    /// What has been told already, without waiting: the kernel tells a change before the call that
    /// made it returns.
    pub fn told(&mut self) -> Vec<Notification> {
        loop {
            match self.socket.get_ref().receive(&mut self.buffer, false) {
                Ok(len) => self.take(len),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.overflow(),
                Err(_) => break,
            }
        }
        self.ready.drain(..).collect()
    }
}
