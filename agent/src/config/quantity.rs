//! Eviction thresholds (`100Mi`, `10%`).

pub use crate::pod::quantity::parse_bytes;

/// An eviction threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threshold {
    /// That many bytes (or inodes) left.
    Absolute(u64),
    /// That share of the capacity left, 0.0 to 1.0.
    Share(f64),
}

impl Threshold {
    /// Parses `10%` or a quantity.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_suffix('%') {
            Some(percent) => {
                let percent: f64 = percent.parse().ok()?;
                (0.0..=100.0).contains(&percent).then_some(Self::Share(percent / 100.0))
            }
            None => parse_bytes(text).map(Self::Absolute),
        }
    }

    /// The threshold in units of `capacity`.
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Absolute(value) => value,
            // Upstream keeps shares as 32 bit numbers, which shows in a node's allocatable disk.
            Self::Share(share) => (capacity as f64 * f64::from(share as f32)) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_shares_or_amounts() {
        assert_eq!(Threshold::parse("10%").map(|t| t.of(1000)), Some(100));
        assert_eq!(Threshold::parse("100Mi").map(|t| t.of(1)), Some(100 << 20));
        // As a kubelet 1.36 tells of such a disk.
        assert_eq!(Threshold::parse("10%").map(|t| t.of(270_553_174_016)), Some(27_055_317_804));
        assert_eq!(Threshold::parse("101%"), None);
        assert_eq!(Threshold::parse("ten"), None);
    }
}
