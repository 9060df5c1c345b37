//! One-time tokens: what a URL that the CRI gave out stands for. Each works once, for a minute.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How long a token waits for its client.
pub const LIFETIME: Duration = Duration::from_secs(60);

/// The most tokens that wait at a time.
pub const MAX_WAITING: usize = 1000;

/// What waits for its clients.
pub struct Tokens<T> {
    waiting: HashMap<String, T>,
    /// In the order of their ends.
    ends: VecDeque<(Instant, String)>,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Tokens { waiting: HashMap::new(), ends: VecDeque::new() }
    }
}

impl<T> Tokens<T> {
    /// Keeps `request` under `token`; `false` when too many wait.
    pub fn insert(&mut self, token: String, request: T, now: Instant) -> bool {
        self.expire(now);
        if self.waiting.len() >= MAX_WAITING {
            return false;
        }
        self.ends.push_back((now + LIFETIME, token.clone()));
        self.waiting.insert(token, request);
        true
    }

    /// Takes what `token` stands for, once.
    pub fn take(&mut self, token: &str, now: Instant) -> Option<T> {
        self.expire(now);
        self.waiting.remove(token)
    }

    fn expire(&mut self, now: Instant) {
        while self.ends.front().is_some_and(|(end, _)| *end <= now) {
            if let Some((_, token)) = self.ends.pop_front() {
                self.waiting.remove(&token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_for_a_minute() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        assert!(tokens.insert("a".into(), 1, now) && tokens.insert("b".into(), 2, now));
        assert_eq!(tokens.take("a", now), Some(1));
        assert_eq!(tokens.take("a", now), None);
        assert_eq!(tokens.take("b", now + LIFETIME), None);
    }

    #[test]
    fn those_that_wait_are_bounded_and_leave_room_when_they_end() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        for n in 0..MAX_WAITING {
            assert!(tokens.insert(n.to_string(), n, now));
        }
        assert!(!tokens.insert("more".into(), 0, now));
        assert!(tokens.insert("later".into(), 0, now + LIFETIME));
        // Also those that were taken leave nothing behind.
        assert_eq!((tokens.waiting.len(), tokens.ends.len()), (1, 1));
    }
}
