//! A limit that lets bursts through: tokens that come with time, up to as many as the bucket holds. Pure:
//! the time is an argument, and whoever must wait is told how long.

use std::time::Duration;

use tokio::time::Instant;

/// The tokens.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    tokens: f64,
    size: f64,
    each: Duration,
    at: Option<Instant>,
}

impl TokenBucket {
    /// Full, with `size` tokens; one more comes each time `each` passes.
    pub(crate) fn new(size: f64, each: Duration) -> Self {
        Self { tokens: size, size, each, at: None }
    }

    fn fill(&mut self, now: Instant) {
        let passed = self.at.map_or(Duration::ZERO, |at| now.duration_since(at));
        self.tokens = (self.tokens + passed.as_secs_f64() / self.each.as_secs_f64()).min(self.size);
        self.at = Some(now);
    }

    /// Whether nothing of it is used.
    pub(crate) fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.tokens >= self.size
    }

    /// Takes one token, if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }

    /// How long until there is one.
    pub(crate) fn lack(&mut self, now: Instant) -> Duration {
        self.fill(now);
        self.each.mul_f64((1.0 - self.tokens).max(0.0))
    }

    /// Takes one that may be yet to come; how long until it does.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        let lack = self.lack(now);
        self.tokens -= 1.0;
        lack
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_go_at_once_and_then_a_hundred_a_second() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10.0, Duration::from_millis(10));
        let taken = |bucket: &mut TokenBucket, now| (0..50).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 10);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(55)), 5);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(60)), 10);
    }
}
