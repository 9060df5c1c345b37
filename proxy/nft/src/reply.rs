//! Answers of the kernel to a batch: which change was refused, and why.

use nix::errno::Errno;

use crate::encode::Batch;
use crate::transaction::{Op, Transaction};
use crate::wire::{Attributes, HEADER_LEN, Message, NLM_F_ACK_TLVS, NLM_F_CAPPED};

/// A change that the kernel refused. Every refused change of a batch is told, not only the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Index into the transaction's changes; `None` if the whole batch was refused.
    pub op: Option<usize>,
    /// Index of the element within the change, if it is one of many and the kernel told.
    pub element: Option<usize>,
    /// The object by name.
    pub object: String,
    /// The kernel's error.
    pub errno: Errno,
    /// The kernel's explanation, where it has one.
    pub message: Option<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.object, self.errno.desc())?;
        match &self.message {
            Some(message) => write!(f, " ({message})"),
            None => Ok(()),
        }
    }
}

/// Reads an error message: `None` for an acknowledgement.
pub(crate) fn error_of(message: &Message<'_>) -> Option<Errno> {
    let code = message.payload.get(..4)?;
    let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
    (code != 0).then(|| Errno::from_raw(-code))
}

/// The extended acknowledgement of an error message: text, and offset of the bad attribute.
fn explanation(message: &Message<'_>) -> (Option<String>, Option<u32>) {
    if message.flags & NLM_F_ACK_TLVS == 0 {
        return (None, None);
    }
    // The request follows the error code: its header only, if the message is capped.
    let request = message.payload.get(4..).unwrap_or_default();
    let len = if message.flags & NLM_F_CAPPED != 0 {
        HEADER_LEN
    } else {
        request
            .get(..4)
            .map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]) as usize)
            .next_multiple_of(4)
    };
    let attributes = Attributes(request.get(len..).unwrap_or_default());
    let offset = attributes.get(2).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    (attributes.string(1), offset)
}

/// Turns an error message into the failure of a change.
pub(crate) fn failure(
    transaction: &Transaction,
    batch: &Batch,
    message: &Message<'_>,
    errno: Errno,
) -> Failure {
    let (text, offset) = explanation(message);
    let index = message.seq.wrapping_sub(batch.first_seq) as usize;
    let Some(origin) = batch.origins.get(index) else {
        let object = format!("table {}", transaction.table);
        return Failure { op: None, element: None, object, errno, message: text };
    };
    let op = &transaction.ops[origin.op];
    let element = match op {
        Op::AddElements { elements, .. } | Op::DeleteElements { elements, .. } => {
            if elements.len() == 1 {
                Some(0)
            } else {
                offset
                    .and_then(|offset| element_at(&batch.bytes[origin.start..], offset as usize))
                    .map(|i| origin.first + i)
                    .filter(|i| *i < elements.len())
            }
        }
        _ => None,
    };
    Failure {
        op: Some(origin.op),
        element,
        object: format!("{} of table {}", op.object(), transaction.table),
        errno,
        message: text,
    }
}

/// Which element of a message the attribute at `offset` is, or is part of.
fn element_at(bytes: &[u8], offset: usize) -> Option<usize> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let mut at = HEADER_LEN + crate::wire::GENMSG_LEN;
    let header = |at: usize| -> Option<(usize, u16)> {
        let bytes = bytes.get(at..at + 4)?;
        let len = u16::from_ne_bytes([bytes[0], bytes[1]]) as usize;
        Some((len.next_multiple_of(4), u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff))
    };
    while at < len {
        let (attribute, kind) = header(at)?;
        if kind == 3 {
            let end = at + attribute;
            let mut index = 0;
            at += 4;
            while at < end {
                let (element, _) = header(at)?;
                if offset < at + element {
                    return (offset >= at).then_some(index);
                }
                at += element;
                index += 1;
            }
            return None;
        }
        at += attribute;
    }
    None
}
