//! SIGTERM: the machine shuts down, and the shim has ended before.
//!
//! The containers end first, so that their exits are on disk for the next boot; one that does not
//! heed the signal is killed, or the shutdown would wait for it (systemd: 90 s).

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Pod, Progress, send_signal};

/// What containers get to end by themselves.
const GRACE: Duration = Duration::from_secs(10);

impl Pod {
    /// Asks everything to end; what is left at the deadline is killed.
    pub(super) fn shut_down(&mut self) {
        if self.deadline.is_some() {
            return;
        }
        self.deadline = Some(Instant::now() + GRACE);
        self.abandon_launches("the machine shuts down");
        for container in &self.containers {
            send_signal(container.pid, Signal::SIGTERM as i32);
        }
    }

    /// Ends everything now, and the monitor with it.
    pub(super) fn end_all(&mut self) {
        self.deadline = Some(Instant::now());
        self.abandon_launches("the pod is ended");
    }

    fn abandon_launches(&mut self, why: &str) {
        for at in 0..self.launches.len() {
            if !self.launches[at].done {
                self.advance(at, Progress::Failed { message: why.to_owned() });
            }
        }
    }

    /// Until the deadline, once there is one.
    pub(super) fn until_deadline(&self) -> Option<Duration> {
        let left = self.deadline?.saturating_duration_since(Instant::now());
        // Rounded up to what poll(2) counts in, or the last millisecond would be spent turning.
        Some(left + Duration::from_millis(1))
    }

    /// Ends the monitor when nothing is left, and at the deadline what is.
    pub(super) fn kill_at_deadline(&mut self) {
        let Some(deadline) = self.deadline else { return };
        if self.containers.is_empty() && self.launches.is_empty() {
            self.ending = true;
        } else if Instant::now() >= deadline {
            self.deadline = Some(Instant::now() + GRACE);
            for container in &self.containers {
                self.cgroups.kill(&container.cgroup);
                send_signal(container.pid, Signal::SIGKILL as i32);
            }
        }
    }
}
