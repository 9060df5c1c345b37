//! From single checks to a verdict: so many in a row turn it.

use k8s_openapi::api::core::v1::Probe;

use super::Outcome;
use crate::pod::facts::ProbeKind;

/// Counts checks of one kind in a row.
#[derive(Clone, Debug)]
pub struct Tally {
    kind: ProbeKind,
    failure_threshold: u32,
    success_threshold: u32,
    last: Option<bool>,
    run: u32,
    healthy: Option<bool>,
}

impl Tally {
    /// A tally for `probe`. `healthy` is the verdict that already stands (after an agent restart).
    pub fn new(kind: ProbeKind, probe: &Probe, healthy: Option<bool>) -> Self {
        let at_least_one = |n: Option<i32>, default: u32| {
            n.and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(default)
        };
        Self {
            kind,
            failure_threshold: at_least_one(probe.failure_threshold, 3),
            success_threshold: at_least_one(probe.success_threshold, 1),
            last: None,
            run: 0,
            healthy,
        }
    }

    /// Counts one check; gives the verdict if it changed by it.
    pub fn count(&mut self, outcome: &Outcome) -> Option<bool> {
        let success = match outcome {
            Outcome::Success | Outcome::Warning(_) => true,
            Outcome::Failure(_) => false,
            Outcome::Unknown(_) => return None,
        };
        if self.last == Some(success) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(success);
            self.run = 1;
        }
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold || self.healthy == Some(success) {
            return None;
        }
        self.healthy = Some(success);
        Some(success)
    }

    /// Whether there is nothing left to ask: a condemned container is restarted, a started one is
    /// started.
    pub fn finished(&self) -> bool {
        match self.kind {
            ProbeKind::Readiness => false,
            ProbeKind::Liveness => self.healthy == Some(false),
            ProbeKind::Startup => self.healthy.is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_in_a_row() {
        let probe =
            Probe { failure_threshold: Some(2), success_threshold: Some(3), ..Default::default() };
        let mut tally = Tally::new(ProbeKind::Readiness, &probe, Some(false));
        let turns: Vec<Option<bool>> = "ss?sssfsffs"
            .chars()
            .map(|c| {
                tally.count(&match c {
                    's' => Outcome::Success,
                    'f' => Outcome::Failure(String::new()),
                    _ => Outcome::Unknown(String::new()),
                })
            })
            .collect();
        let (n, t, f) = (None, Some(true), Some(false));
        assert_eq!(turns, [n, n, n, t, n, n, n, n, n, f, n]);
    }

    #[test]
    fn liveness_ends_with_its_first_verdict_against() {
        let mut tally = Tally::new(ProbeKind::Liveness, &Probe::default(), Some(true));
        let failure = Outcome::Failure(String::new());
        assert_eq!(tally.count(&failure), None);
        assert_eq!(tally.count(&failure), None);
        assert!(!tally.finished());
        assert_eq!(tally.count(&failure), Some(false));
        assert!(tally.finished());
    }
}
