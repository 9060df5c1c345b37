//! How long to wait before the next try: exponential, with jitter, so that a thousand nodes do not
//! come back to a restarted API server at the same instant.

use std::time::Duration;

/// Exponential backoff with full spread in its upper half.
#[derive(Clone, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `initial`, doubles up to `max`.
    pub fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, next: initial }
    }

    /// For watches and lists: 0.5 s to 30 s.
    pub fn for_watch() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(30))
    }

    /// The next wait. `random` in 0..1 spreads it over [half, whole] of the step.
    pub fn next_with(&mut self, random: f64) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.max);
        step / 2 + (step / 2).mul_f64(random.clamp(0.0, 1.0))
    }

    /// The next wait, spread by chance.
    pub fn next_delay(&mut self) -> Duration {
        self.next_with(fastrand::f64())
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.next = self.initial;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_limit_and_spreads_over_the_upper_half() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let whole: Vec<_> = (0..4).map(|_| backoff.next_with(1.0).as_millis()).collect();
        assert_eq!(whole, [1000, 2000, 4000, 5000]);
        assert_eq!(backoff.next_with(0.0).as_millis(), 2500);
        backoff.reset();
        assert_eq!(backoff.next_with(0.5).as_millis(), 750);
    }
}
