//! CPU use as a rate: nanoseconds of CPU a second, between two looks at a cgroup's counter.

/// The shortest time between looks, in nanoseconds. Who asks more often is told the last rate: over
/// less, the kernel's own granularity would show, and two callers would spoil each other's window.
const SHORTEST: i64 = 1_000_000_000;

/// What was seen of one counter.
#[derive(Clone, Debug, Default)]
pub struct Rate {
    /// Time and counter of the last look.
    seen: Option<(i64, u64)>,
    last: Option<u64>,
}

impl Rate {
    /// The rate up to `now` (nanoseconds since the epoch), where the counter is at `count`
    /// nanoseconds; `None` until there are two looks to compare.
    pub fn at(&mut self, now: i64, count: u64) -> Option<u64> {
        if let Some((then, before)) = self.seen {
            let elapsed = now.saturating_sub(then);
            // A counter that ran backwards is that of another cgroup, time that did a changed clock.
            if elapsed >= 0 && count >= before {
                if elapsed < SHORTEST {
                    return self.last;
                }
                let rate = u128::from(count - before) * 1_000_000_000 / elapsed as u128;
                self.seen = Some((now, count));
                self.last = Some(u64::try_from(rate).unwrap_or(u64::MAX));
                return self.last;
            }
        }
        *self = Rate { seen: Some((now, count)), last: None };
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_time_since_the_last_look_that_was_long_enough() {
        const SECOND: i64 = 1_000_000_000;
        let mut rate = Rate::default();
        assert_eq!(rate.at(10 * SECOND, 5_000), None, "nothing to compare with");
        assert_eq!(rate.at(10 * SECOND + 1, 6_000), None, "too soon");
        assert_eq!(rate.at(12 * SECOND, 1_000_005_000), Some(500_000_000), "half a core");
        assert_eq!(rate.at(12 * SECOND + 5, 9_000_000_000), Some(500_000_000), "the last one");
        assert_eq!(rate.at(16 * SECOND, 9_000_005_000), Some(2_000_000_000), "two cores");
        assert_eq!(rate.at(20 * SECOND, 9_000_005_000), Some(0), "idle");
        assert_eq!(rate.at(30 * SECOND, 7), None, "another counter");
        assert_eq!(rate.at(29 * SECOND, 8), None, "the clock went back");
        assert_eq!(rate.at(30 * SECOND, 8), Some(0));
    }
}
