//! The limit of the API: a bucket of tokens. Pure.

use tokio::time::Instant;

/// Tokens that come a second, and at most wait, as under kubelet.
const RATE: f64 = 100.0;
const BURST: f64 = 10.0;

/// The tokens.
#[derive(Debug)]
pub(super) struct Bucket {
    tokens: f64,
    since: Instant,
}

impl Bucket {
    /// Full.
    pub(super) fn new(now: Instant) -> Self {
        Self { tokens: BURST, since: now }
    }

    /// Takes one token, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let came = now.duration_since(self.since).as_secs_f64() * RATE;
        (self.tokens, self.since) = ((self.tokens + came).min(BURST), now);
        let any = self.tokens >= 1.0;
        if any {
            self.tokens -= 1.0;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ten_go_at_once_and_then_a_hundred_a_second() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let taken = |bucket: &mut Bucket, now| (0..50).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 10);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(55)), 5);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(60)), 10);
    }
}
