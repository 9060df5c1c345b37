//! Packet counters that rules of iptables refer to by name (`linux/netfilter/nfnetlink_acct.h`): they
//! outlive the rules, and reading them lists no rules.

use std::cell::Cell;

use nix::errno::Errno;

use crate::client::{Client, Error};
use crate::object::Family;
use crate::wire::Attributes;

const ACCT_SUBSYSTEM: u16 = 7;
const ACCT_NEW: u16 = 0;
const ACCT_GET: u16 = 1;
/// Counters have no family; the kernel does not look at it.
const ANY: Family = Family::Ip;
const NAME: u16 = 1;
const PACKETS: u16 = 2;

impl Client {
    /// Makes a counter, unless there is one of that name.
    ///
    /// # Errors
    /// If the kernel has no such counters.
    pub fn ensure_counter(&mut self, name: &str) -> Result<(), Error> {
        let kind = ACCT_SUBSYSTEM << 8 | ACCT_NEW;
        match self.request(kind, ANY, |out| out.string(NAME, name))? {
            // It is there.
            None | Some(Errno::EBUSY | Errno::EEXIST) => Ok(()),
            Some(errno) => Err(Error::Dump { what: format!("counter {name}"), errno }),
        }
    }

    /// Packets that a counter has counted; `None` if there is no such counter.
    ///
    /// # Errors
    /// If the kernel cannot be read.
    pub fn counted(&mut self, name: &str) -> Result<Option<u64>, Error> {
        let found = Cell::new(None);
        self.dump_of(
            ACCT_SUBSYSTEM << 8 | ACCT_GET,
            ANY,
            "packet counters",
            |_| {},
            || found.set(None),
            |message| {
                if message.kind >> 8 == ACCT_SUBSYSTEM
                    && message.attributes().string(NAME).as_deref() == Some(name)
                {
                    found.set(packets(message.attributes()));
                }
            },
        )?;
        Ok(found.get())
    }
}

fn packets(attributes: Attributes<'_>) -> Option<u64> {
    Some(u64::from_be_bytes(attributes.get(PACKETS)?.try_into().ok()?))
}
