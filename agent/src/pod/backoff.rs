//! CrashLoopBackOff as arithmetic over what the runtime remembers, so that an agent restart
//! neither forgets nor repeats a wait.
//!
//! Each instance carries the wait that follows it (`names::BACKOFF`): none after the first
//! instance, 10 s after the second, doubling to the limit. An instance that ran for 10 minutes
//! starts the row anew.

use jiff::{SignedDuration, Timestamp};

use super::observed::{Container, ContainerState};

/// The first wait, in seconds.
pub const INITIAL_SECONDS: u64 = 10;
/// After so long a run a crash counts as the first one, in seconds.
const RESET_SECONDS: i64 = 600;

/// When the next instance may start and what wait it will carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// Not before this instant.
    pub due: Timestamp,
    /// The wait that led to `due`, in seconds; 0 is none.
    pub wait: u64,
    /// Wait that the next instance carries, in seconds.
    pub next: u64,
}

/// The restart that follows instance `last`. `since` is what the wait counts from: its end, or,
/// for one that the agent itself killed to restart, the end of the instance before it.
pub fn plan_restart(last: &Container, since: Option<Timestamp>, max_seconds: u64) -> Restart {
    let ended = last.finished_at.unwrap_or(last.created_at);
    let ran = ended.duration_since(last.created_at).as_secs();
    let max = max_seconds.max(1);
    let carried = last.backoff_seconds().min(max);
    if carried == 0 || last.state != ContainerState::Exited || ran > RESET_SECONDS {
        return Restart { due: Timestamp::MIN, wait: 0, next: INITIAL_SECONDS.min(max) };
    }
    let wait = SignedDuration::from_secs(i64::try_from(carried).unwrap_or(i64::MAX));
    let due = since.and_then(|t| t.checked_add(wait).ok()).unwrap_or(Timestamp::MIN);
    Restart { due, wait: carried, next: carried.saturating_mul(2).min(max) }
}

/// "10s", "2m40s", "5m0s": how kubelet writes a wait.
pub fn go_duration(seconds: u64) -> String {
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (h, m) {
        (0, 0) => format!("{s}s"),
        (0, _) => format!("{m}m{s}s"),
        _ => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::observed::names;
    use crate::pod::testing::{at, exited};

    #[test]
    fn waits_double_to_the_limit() {
        let mut carried = 0;
        let mut waits = Vec::new();
        for n in 0..8 {
            let mut last = exited("c", n, at(0), at(5), 1);
            last.annotations.insert(names::BACKOFF.into(), carried.to_string());
            let restart = plan_restart(&last, last.finished_at, 300);
            waits.push(restart.wait);
            if restart.wait > 0 {
                assert_eq!(restart.due, at(5 + i64::try_from(restart.wait).unwrap()));
            }
            carried = restart.next;
        }
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_long_run_starts_anew() {
        let mut last = exited("c", 6, at(0), at(601), 1);
        last.annotations.insert(names::BACKOFF.into(), "300".into());
        let restart = plan_restart(&last, last.finished_at, 300);
        assert_eq!((restart.wait, restart.next), (0, 10));
    }

    #[test]
    fn durations_read_as_in_go() {
        for (seconds, text) in [(10, "10s"), (160, "2m40s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(go_duration(seconds), text);
        }
    }
}
