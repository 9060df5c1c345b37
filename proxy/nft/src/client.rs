//! The kernel, in the network namespace of the thread that made the client.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::encode::{SUBSYSTEM, encode};
use crate::object::{Family, Table};
use crate::reply::{Failure, error_of, failure};
use crate::sys::Socket;
use crate::transaction::Transaction;
use crate::wire::{
    Message, Messages, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, Writer,
};

const MEGABYTE: usize = 1 << 20;
/// Dumps that were interrupted by a change are begun again so often.
const DUMP_ATTEMPTS: usize = 20;
/// Times of so many batches are kept for whoever asks.
const TIMES: usize = 4096;

/// Why the kernel could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket does not work: no nf_tables in this kernel, or no CAP_NET_ADMIN.
    #[error("{operation} over nfnetlink: {source}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The batch was refused; nothing of it was applied.
    #[error("nf_tables refused a batch of {ops} changes to table {table}: {}", list(failures))]
    Refused {
        /// The table.
        table: Table,
        /// Number of changes in the batch.
        ops: usize,
        /// What was refused.
        failures: Vec<Failure>,
    },
    /// The kernel refused to list objects.
    #[error("list {what}: {errno}")]
    Dump {
        /// What was listed.
        what: String,
        /// The kernel's error.
        errno: Errno,
    },
    /// The rules kept changing while they were listed.
    #[error("list {what}: the ruleset kept changing; try again")]
    Unstable {
        /// What was listed.
        what: String,
    },
}

fn list(failures: &[Failure]) -> String {
    let mut text: Vec<String> = failures.iter().take(5).map(Failure::to_string).collect();
    if failures.len() > 5 {
        text.push(format!("and {} more", failures.len() - 5));
    }
    text.join("; ")
}

/// A connection to nf_tables. Calls block; the kernel does the work within the call.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    seq: u32,
    send_buffer: usize,
    commits: u32,
    batch_times: Vec<Duration>,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the kernel has no nfnetlink.
    pub fn new() -> Result<Self, Error> {
        let open = |source| Error::Socket { operation: "open a socket", source };
        let socket = Socket::open(false).map_err(open)?;
        socket.receive_buffer(4 * MEGABYTE).map_err(open)?;
        socket.receive_timeout(Duration::from_secs(30)).map_err(open)?;
        Ok(Client {
            socket,
            seq: 1,
            send_buffer: 0,
            commits: 0,
            batch_times: Vec::new(),
            buffer: vec![0; 64 * 1024],
        })
    }

    /// The netlink port by which notifications tell this client's changes from others'.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Number of batches that the kernel took from this client.
    pub fn commits(&self) -> u32 {
        self.commits
    }

    /// How long the kernel had each batch since this was last asked: it holds the lock of the
    /// network namespace's rules meanwhile.
    pub fn take_batch_times(&mut self) -> Vec<Duration> {
        std::mem::take(&mut self.batch_times)
    }

    /// Applies a transaction whole, or not at all.
    ///
    /// # Errors
    /// [`Error::Refused`] names every change that the kernel refused.
    pub fn apply(&mut self, transaction: &Transaction) -> Result<(), Error> {
        if transaction.is_empty() {
            return Ok(());
        }
        let batch = encode(transaction, self.seq);
        if batch.messages() == 0 {
            return Ok(());
        }
        self.seq = self.seq.wrapping_add(batch.messages() as u32 + 2);
        // The socket's accounting adds some overhead to the bytes of the batch.
        let needed = batch.bytes.len() + batch.bytes.len() / 4 + 256 * 1024;
        let failed = |source| Error::Socket { operation: "send a batch", source };
        if needed > self.send_buffer {
            self.socket.send_buffer(needed).map_err(failed)?;
            self.send_buffer = needed;
        }
        self.drain();
        let begin = Instant::now();
        let sent = self.socket.send(&batch.bytes);
        if self.batch_times.len() < TIMES {
            self.batch_times.push(begin.elapsed());
        }
        sent.map_err(failed)?;
        let mut failures = Vec::new();
        let mut acknowledged = false;
        // The kernel has done the work within send(): every answer is waiting already. Only the
        // first receive may wait, in case that ever changes.
        let mut first = true;
        loop {
            let len = match self.socket.receive(&mut self.buffer, first) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !first => break,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(source) => {
                    return Err(Error::Socket { operation: "receive answers", source });
                }
            };
            first = false;
            for message in Messages(&self.buffer[..len]) {
                let ours = message.seq.wrapping_sub(batch.first_seq.wrapping_sub(1)) as usize;
                if message.kind != NLMSG_ERROR || ours > batch.messages() + 1 {
                    continue;
                }
                match error_of(&message) {
                    Some(errno) => failures.push(failure(transaction, &batch, &message, errno)),
                    None => acknowledged = true,
                }
            }
        }
        if failures.is_empty() && acknowledged {
            self.commits = self.commits.wrapping_add(1);
            return Ok(());
        }
        let table = transaction.table.clone();
        Err(Error::Refused { table, ops: transaction.ops.len(), failures })
    }

    /// Throws away what an earlier, failed call left.
    fn drain(&mut self) {
        while self.socket.receive(&mut self.buffer, false).is_ok() {}
    }

    /// Sends one message outside of a batch; tells the number that its answers carry.
    fn send(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        body: impl Fn(&mut Writer),
    ) -> io::Result<u32> {
        self.seq = self.seq.wrapping_add(1);
        let mut out = Writer::new();
        out.begin(kind, NLM_F_REQUEST | flags, self.seq, family, 0);
        body(&mut out);
        out.end();
        self.drain();
        self.socket.send(&out.into_bytes())?;
        Ok(self.seq)
    }

    /// Lists objects; `each` is called per message, `begin` before each attempt. An object that is
    /// not there lists as nothing.
    pub(crate) fn dump(
        &mut self,
        kind: u16,
        family: Family,
        what: &str,
        body: impl Fn(&mut Writer),
        begin: impl FnMut(),
        each: impl FnMut(&Message<'_>),
    ) -> Result<(), Error> {
        self.dump_of(SUBSYSTEM << 8 | kind, family, what, body, begin, each)
    }

    /// Sends one request outside of a batch; tells the kernel's error, if any.
    pub(crate) fn request(
        &mut self,
        kind: u16,
        family: Family,
        body: impl Fn(&mut Writer),
    ) -> Result<Option<Errno>, Error> {
        let failed = |source| Error::Socket { operation: "send a request", source };
        let seq = self.send(kind, NLM_F_ACK, family as u8, body).map_err(failed)?;
        loop {
            let len = self.socket.receive(&mut self.buffer, true).map_err(failed)?;
            for message in Messages(&self.buffer[..len]) {
                if message.seq == seq && message.kind == NLMSG_ERROR {
                    return Ok(error_of(&message));
                }
            }
        }
    }

    /// Sends a request without attributes that is answered by one message.
    pub(crate) fn ask(&mut self, kind: u16, each: impl FnMut(&Message<'_>)) -> Result<(), Error> {
        let mut each = each;
        let failed = |source| Error::Socket { operation: "send a request", source };
        let seq = self.send(kind, 0, 0, |_| {}).map_err(failed)?;
        loop {
            let len = self.socket.receive(&mut self.buffer, true).map_err(failed)?;
            let mut messages = Messages(&self.buffer[..len]);
            let Some(message) = messages.find(|message| message.seq == seq) else { continue };
            if message.kind == NLMSG_ERROR
                && let Some(errno) = error_of(&message)
            {
                return Err(Error::Dump { what: "an object".to_owned(), errno });
            }
            each(&message);
            return Ok(());
        }
    }

    /// As [`Client::dump`], for any subsystem.
    pub(crate) fn dump_of(
        &mut self,
        kind: u16,
        family: Family,
        what: &str,
        body: impl Fn(&mut Writer),
        mut begin: impl FnMut(),
        mut each: impl FnMut(&Message<'_>),
    ) -> Result<(), Error> {
        for _ in 0..DUMP_ATTEMPTS {
            begin();
            let failed = |source| Error::Socket { operation: "list objects", source };
            let seq = self.send(kind, NLM_F_DUMP, family as u8, &body).map_err(failed)?;
            let mut interrupted = false;
            'dump: loop {
                let len = self.socket.receive(&mut self.buffer, true).map_err(failed)?;
                for message in Messages(&self.buffer[..len]) {
                    if message.seq != seq {
                        continue;
                    }
                    interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                    match message.kind {
                        NLMSG_DONE => break 'dump,
                        NLMSG_ERROR => match error_of(&message) {
                            None | Some(Errno::ENOENT) => break 'dump,
                            Some(Errno::EINTR | Errno::EAGAIN) => {
                                interrupted = true;
                                break 'dump;
                            }
                            Some(errno) => {
                                return Err(Error::Dump { what: what.to_owned(), errno });
                            }
                        },
                        _ => each(&message),
                    }
                }
            }
            if !interrupted {
                return Ok(());
            }
        }
        Err(Error::Unstable { what: what.to_owned() })
    }
}
