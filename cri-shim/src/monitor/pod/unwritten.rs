//! Exits that the disk had no room for: kept and told until they are written.
//!
//! A full disk passes; an exit code that was dropped does not come again, and a container without
//! one would be taken for running by the next shim.

use std::path::PathBuf;
use std::time::Duration;

use nix::poll::PollTimeout;

use super::{Pod, reply};
use crate::monitor::protocol::{Exited, Reply};
use crate::monitor::record;

/// How long until the next attempt.
const PAUSE: Duration = Duration::from_secs(2);

/// An exit without its record.
pub(super) struct Unwritten {
    container: String,
    records: PathBuf,
    exit: Exited,
}

impl Pod {
    /// Records a container's exit, now or later.
    pub(super) fn write_exit(&mut self, container: &str, records: PathBuf, exit: &Exited) {
        // Removed meanwhile: nobody asks for it any more.
        if record::write(&records, record::EXITED, exit).is_err() && records.exists() {
            let (container, exit) = (container.to_owned(), exit.clone());
            self.unwritten.push(Unwritten { container, records, exit });
        }
    }

    pub(super) fn write_again(&mut self) {
        self.unwritten.retain(|left| {
            record::write(&left.records, record::EXITED, &left.exit).is_err()
                && left.records.exists()
        });
    }

    /// Until there is something to do without being asked.
    pub(super) fn time_left(&self) -> Option<PollTimeout> {
        let pause = (!self.unwritten.is_empty()).then_some(PAUSE);
        let left = [self.until_deadline(), pause].into_iter().flatten().min()?;
        Some(PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO))
    }

    /// Tells a shim that has just subscribed what it will not find on disk.
    pub(super) fn tell_unwritten(&mut self, at: usize) {
        for left in &self.unwritten {
            let (container, exit) = (left.container.clone(), left.exit.clone());
            reply(&mut self.connections[at], &Reply::Exited { container, exit });
        }
    }
}
