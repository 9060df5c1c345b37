//! A pod's bandwidth limits, from its annotations. Pure.
//!
//! The kubelet hands annotations on as they are; what they mean is the runtime's to know
//! (`kubernetes.io/ingress-bandwidth`, `kubernetes.io/egress-bandwidth`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::NetworkError;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// What Kubernetes takes for a mistake beyond: 1 kbit/s and 1 Pbit/s.
const LOWEST: u128 = 1_000;
const HIGHEST: u128 = 1_000_000_000_000_000;
/// The least that may go at once: two of the largest packets that a stack hands to a link, or a slow
/// link would pass none of them.
const LEAST_BURST: u64 = 128 * 1024 * 8;

/// Limits in bits per second, seen from the pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bandwidth {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ingress: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) egress: Option<u64>,
}

impl Bandwidth {
    /// Reads a pod's annotations.
    ///
    /// # Errors
    /// [`NetworkError::BadAnnotation`] for what is no quantity, or out of Kubernetes' bounds.
    pub(crate) fn from_annotations(
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, NetworkError> {
        let read = |name: &'static str| -> Result<Option<u64>, NetworkError> {
            let Some(text) = annotations.get(name) else {
                return Ok(None);
            };
            let bad = |reason| NetworkError::BadAnnotation {
                annotation: name,
                value: text.chars().take(64).collect(),
                reason,
            };
            match quantity(text) {
                None => Err(bad("it is no quantity such as 10M")),
                Some(bits) if bits < LOWEST => Err(bad("it is less than 1k bits per second")),
                Some(bits) if bits > HIGHEST => Err(bad("it is more than 1P bits per second")),
                Some(bits) => Ok(u64::try_from(bits).ok()),
            }
        };
        Ok(Self { ingress: read(INGRESS)?, egress: read(EGRESS)? })
    }

    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What may go at once at `rate`, in bits: a second's worth, within what fits 32 bits. Upstream lets
/// half a gigabyte pass before it limits anything, so that short transfers never meet the limit.
pub(crate) fn burst(rate: u64) -> u64 {
    rate.clamp(LEAST_BURST, u64::from(u32::MAX))
}

/// A Kubernetes quantity (`1.5M`, `64Ki`, `1e6`), rounded up to a whole number. None for what is
/// none, or is negative.
fn quantity(text: &str) -> Option<u128> {
    let text = text.trim();
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    if digits.len() > 30 {
        return None;
    }
    let mantissa: u128 = digits.parse().ok()?;
    let (ten, factor): (i32, u128) = match suffix {
        "n" => (-9, 1),
        "u" => (-6, 1),
        "m" => (-3, 1),
        "" => (0, 1),
        "k" => (3, 1),
        "M" => (6, 1),
        "G" => (9, 1),
        "T" => (12, 1),
        "P" => (15, 1),
        "E" => (18, 1),
        "Ki" => (0, 1 << 10),
        "Mi" => (0, 1 << 20),
        "Gi" => (0, 1 << 30),
        "Ti" => (0, 1 << 40),
        "Pi" => (0, 1 << 50),
        "Ei" => (0, 1 << 60),
        exponent => (exponent.strip_prefix(['e', 'E'])?.parse().ok()?, 1),
    };
    let scale = ten.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    let power = 10u128.checked_pow(scale.unsigned_abs());
    let value = mantissa.checked_mul(factor)?;
    match (scale >= 0, power) {
        (true, power) => value.checked_mul(power?),
        (false, Some(power)) => Some(value.div_ceil(power)),
        (false, None) => Some(u128::from(value > 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, want) in [
            ("10M", Some(10_000_000)),
            ("1.5M", Some(1_500_000)),
            ("0.5k", Some(500)),
            ("64Ki", Some(65_536)),
            ("1.5Ki", Some(1_536)),
            ("1e6", Some(1_000_000)),
            ("1E3", Some(1_000)),
            ("12e-1", Some(2)),
            ("2E", Some(2_000_000_000_000_000_000)),
            ("1500m", Some(2)),
            ("+7", Some(7)),
            (".5", Some(1)),
            ("5.", Some(5)),
            ("1e-60", Some(1)),
            ("", None),
            (".", None),
            ("1.2.3", None),
            ("-1M", None),
            ("ten", None),
            ("10MB", None),
            ("1e99", None),
            ("99999999999999999999999999999999999999999999", None),
        ] {
            assert_eq!(quantity(text), want, "{text}");
        }
    }

    #[test]
    fn unreasonable_limits_are_refused_by_name() {
        let of = |name: &str, value: &str| {
            Bandwidth::from_annotations(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
        };
        let limits = of(INGRESS, "10M").unwrap();
        assert_eq!((limits.ingress, limits.egress), (Some(10_000_000), None));
        assert!(of("other", "x").unwrap().is_none());
        for (value, want) in [("999", "less than"), ("2P", "more than"), ("fast", "no quantity")] {
            let error = of(EGRESS, value).unwrap_err().to_string();
            assert!(error.contains(EGRESS) && error.contains(want) && error.contains(value));
        }
        assert_eq!(burst(1_000), LEAST_BURST);
        assert_eq!(burst(10_000_000), 10_000_000);
        assert_eq!(burst(1 << 40), u64::from(u32::MAX));
    }
}
