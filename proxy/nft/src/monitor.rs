//! Watching for changes that somebody else makes: a firewall reload that flushes every table is
//! noticed when it happens, not at the next periodic look.

use std::io;

use tokio::io::unix::AsyncFd;

use crate::client::{Client, Error};
use crate::encode::{SUBSYSTEM, msg};
use crate::sys::Socket;
use crate::wire::Messages;

const NFNLGRP_NFTABLES: u32 = 7;

/// What somebody else did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// Something within these tables, by name (the family is not told here).
    Tables(Vec<String>),
    /// So much that not all was told.
    Overflow,
}

/// A subscription to nf_tables' notifications.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<Socket>,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Subscribes in the network namespace of the calling thread. Changes that `own` makes are
    /// filtered out in the kernel. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If the kernel has no nfnetlink.
    pub fn new(own: &Client) -> Result<Self, Error> {
        let failed = |source| Error::Socket { operation: "subscribe to changes", source };
        let socket = Socket::open(true).map_err(failed)?;
        socket.receive_buffer(1 << 20).map_err(failed)?;
        socket.ignore_port(own.port()).map_err(failed)?;
        socket.join(NFNLGRP_NFTABLES).map_err(failed)?;
        let socket = socket.into_async().map_err(failed)?;
        Ok(Monitor { socket, buffer: vec![0; 64 * 1024] })
    }

    /// Waits until somebody else changes something. Cancel-safe.
    ///
    /// # Errors
    /// If the subscription is broken; make a new one.
    pub async fn changed(&mut self) -> Result<Notification, Error> {
        loop {
            let failed = |source| Error::Socket { operation: "receive notifications", source };
            let mut ready = self.socket.readable_mut().await.map_err(failed)?;
            let buffer = &mut self.buffer;
            let len = match ready.try_io(|socket| socket.get_ref().receive(buffer, false)) {
                Err(_would_block) => continue,
                Ok(Ok(len)) => len,
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Notification::Overflow);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(Err(source)) => return Err(failed(source)),
            };
            let mut tables: Vec<String> = Vec::new();
            for message in Messages(&self.buffer[..len]) {
                if message.kind >> 8 != SUBSYSTEM || message.kind & 0xff == msg::NEWGEN {
                    continue;
                }
                // Attribute 1 is the table's name in the messages of every object.
                if let Some(table) = message.attributes().string(1)
                    && !tables.contains(&table)
                {
                    tables.push(table);
                }
            }
            if !tables.is_empty() {
                return Ok(Notification::Tables(tables));
            }
        }
    }
}
