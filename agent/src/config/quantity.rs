//! Quantities (`10Mi`, `500m`) and eviction thresholds (`100Mi`, `10%`).

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
            Self::Share(share) => (capacity as f64 * share) as u64,
        }
    }
}

/// A quantity as a whole number, rounded up as Kubernetes' `Quantity.Value()` does. `None` if it is
/// no quantity, or negative.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-')));
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let (multiplier, exponent): (u128, i32) = match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        other => (1, other.strip_prefix(['e', 'E'])?.parse().ok()?),
    };
    if fraction.len() > 18 || !(-18..=18).contains(&exponent) {
        return None;
    }
    let digits: u128 = format!("0{whole}{fraction}").parse().ok()?;
    let scale = exponent - i32::try_from(fraction.len()).ok()?;
    let value = digits.checked_mul(multiplier)?;
    let value = if scale >= 0 {
        value.checked_mul(10u128.checked_pow(scale.unsigned_abs())?)?
    } else {
        value.div_ceil(10u128.checked_pow(scale.unsigned_abs())?)
    };
    u64::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1", Some(1)),
            ("10Mi", Some(10 << 20)),
            ("1.5Gi", Some(3 << 29)),
            ("64M", Some(64_000_000)),
            ("1e3", Some(1000)),
            ("100m", Some(1)),
            ("1500m", Some(2)),
            ("+5k", Some(5000)),
            (".5Ki", Some(512)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("-1", None),
            ("", None),
            ("Mi", None),
            ("1 Mi", None),
            ("1MiB", None),
            ("99999Ei", None),
        ] {
            assert_eq!(parse_bytes(text), expected, "{text:?}");
        }
    }

    #[test]
    fn thresholds_are_shares_or_amounts() {
        assert_eq!(Threshold::parse("10%").map(|t| t.of(1000)), Some(100));
        assert_eq!(Threshold::parse("100Mi").map(|t| t.of(1)), Some(100 << 20));
        assert_eq!(Threshold::parse("101%"), None);
        assert_eq!(Threshold::parse("ten"), None);
    }
}
