//! Resource quantities (`500m`, `1.5Gi`, `2e3`) as numbers. Sub-units are rounded up, as
//! apimachinery's `Value()` and `MilliValue()` do.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// One unit in nano-units, the finest grain of a quantity.
const NANO: i128 = 1_000_000_000;

/// The quantity in nano-units; `None` where the text is not a quantity or does not fit.
fn nanos(text: &str) -> Option<i128> {
    let split = text
        .char_indices()
        .find(|(i, c)| !(c.is_ascii_digit() || *c == '.' || (*i == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(i, _)| i);
    let (number, suffix) = text.split_at(split);
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    // multiplier = numerator * 10^power
    let (binary, power): (i128, i32) = match suffix {
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
        _ => (1, suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok()?),
    };
    let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
    let scale = i32::try_from(fraction.len()).ok()?;
    let exponent = 9i32.checked_add(power)?.checked_sub(scale)?;
    let value = digits.checked_mul(binary)?;
    let ten = |n: i32| 10i128.checked_pow(n.unsigned_abs());
    let value = if exponent >= 0 {
        value.checked_mul(ten(exponent)?)?
    } else {
        let divisor = ten(exponent)?;
        // Finer than a nano-unit: rounded away from zero.
        value.checked_add(divisor - 1)? / divisor
    };
    Some(if negative { -value } else { value })
}

fn rounded(value: i128, unit: i128) -> Option<i64> {
    let up = if value >= 0 { (value + unit - 1) / unit } else { value / unit };
    i64::try_from(up).ok()
}

/// Whole units of the quantity that `text` is, rounded up. `None` if it is none, or negative.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let value = nanos(text)?;
    u64::try_from(if value > 0 { (value + NANO - 1) / NANO } else { value }).ok()
}

/// Whole units (bytes, counts), rounded up.
pub fn value(quantity: &Quantity) -> Option<i64> {
    rounded(nanos(&quantity.0)?, NANO)
}

/// Thousandths of a unit (milli-CPUs), rounded up.
pub fn milli_value(quantity: &Quantity) -> Option<i64> {
    rounded(nanos(&quantity.0)?, NANO / 1000)
}

/// A set of resources as `requests` and `limits` hold them.
pub type ResourceList = BTreeMap<String, Quantity>;

/// Milli-CPUs in `list`; `None` where it names no CPU.
pub fn cpu_milli(list: Option<&ResourceList>) -> Option<i64> {
    milli_value(list?.get("cpu")?)
}

/// Whole units of `resource` in `list`; `None` where it is not named.
pub fn amount(list: Option<&ResourceList>, resource: &str) -> Option<i64> {
    value(list?.get(resource)?)
}

/// `milli` thousandths, as apimachinery writes them.
pub fn milli_text(milli: i64) -> Quantity {
    Quantity(if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") })
}

/// How an amount is written: by powers of 1024 or of 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Notation {
    /// `Ki`, `Mi`, ...
    #[default]
    Binary,
    /// `k`, `M`, ...
    Decimal,
}

impl Notation {
    /// The notation of `text`; that of a share is binary.
    pub fn of(text: &str) -> Self {
        if text.ends_with(['i', '%']) { Self::Binary } else { Self::Decimal }
    }

    /// `amount` with the largest suffix that leaves a whole number, as apimachinery writes it.
    pub fn text(self, amount: u64) -> String {
        let (step, suffixes) = match self {
            Self::Binary => (1024, ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]),
            Self::Decimal => (1000, ["k", "M", "G", "T", "P", "E"]),
        };
        let (mut rest, mut suffix) = (amount, "");
        for larger in suffixes {
            if rest == 0 || !rest.is_multiple_of(step) {
                break;
            }
            rest /= step;
            suffix = larger;
        }
        format!("{rest}{suffix}")
    }
}

/// `bytes` with the largest suffix of a power of 1024 that leaves a whole number.
pub fn bytes_text(bytes: i64) -> Quantity {
    let sign = if bytes < 0 { "-" } else { "" };
    Quantity(format!("{sign}{}", Notation::Binary.text(bytes.unsigned_abs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_what_it_reads() {
        for (bytes, text) in
            [(0, "0"), (1000, "1000"), (1024, "1Ki"), (3 << 29, "1536Mi"), (1 << 40, "1Ti")]
        {
            assert_eq!(bytes_text(bytes).0, text);
            assert_eq!(value(&bytes_text(bytes)), Some(bytes));
        }
        for (written, amount, text) in [
            ("1.5Gi", 3 << 29, "1536Mi"),
            ("1000M", 1_000_000_000, "1G"),
            ("5", 5, "5"),
            ("10%", 2048, "2Ki"),
        ] {
            assert_eq!(Notation::of(written).text(amount), text);
        }
        for (milli, text) in [(0, "0"), (100, "100m"), (2000, "2"), (1500, "1500m")] {
            assert_eq!(milli_text(milli).0, text);
        }
    }

    #[test]
    fn reads_every_notation() {
        for (text, milli) in [
            ("0", 0),
            ("1", 1000),
            ("100m", 100),
            ("0.1", 100),
            ("1.5", 1500),
            (".5", 500),
            ("5.", 5000),
            ("1n", 1),
            ("2u", 1),
            ("1k", 1_000_000),
            ("1Ki", 1_024_000),
            ("1.5Ki", 1_536_000),
            ("1e3", 1_000_000),
            ("1E-3", 1),
            ("+2", 2000),
            ("-1", -1000),
        ] {
            assert_eq!(milli_value(&Quantity(text.into())), Some(milli), "{text}");
        }
        assert_eq!(value(&Quantity("1Gi".into())), Some(1 << 30));
        assert_eq!(value(&Quantity("1500m".into())), Some(2));
        assert_eq!(value(&Quantity("1E".into())), Some(1_000_000_000_000_000_000));
    }

    #[test]
    fn bytes_are_whole_and_not_negative() {
        for (text, expected) in [
            ("0", Some(0)),
            ("10Mi", Some(10 << 20)),
            ("1.5Gi", Some(3 << 29)),
            ("64M", Some(64_000_000)),
            ("100m", Some(1)),
            (".5Ki", Some(512)),
            ("15Ei", Some(15 << 60)),
            ("-1", None),
            ("1 Mi", None),
            ("99999Ei", None),
        ] {
            assert_eq!(parse_bytes(text), expected, "{text:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_quantity() {
        for text in ["", "x", "1x", "1KiB", "--1", "1.2.3", "e3", "99999E", "1e400"] {
            assert_eq!(value(&Quantity(text.into())), None, "{text}");
        }
    }
}
