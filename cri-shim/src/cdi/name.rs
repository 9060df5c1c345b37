//! Names of CDI devices: `vendor/class=device`.

use std::fmt;
use std::str::FromStr;

use super::CdiError;

/// What a file's devices are of: `vendor.com/class`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    vendor: String,
    class: String,
}

/// A device's whole name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    kind: Kind,
    device: String,
}

impl Kind {
    /// Reads `vendor/class`; what is wrong with it otherwise.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (vendor, class) = text.split_once('/').ok_or("it has no vendor")?;
        check(vendor, |c| c.is_ascii_alphabetic(), "")
            .ok_or("its vendor may hold letters, digits, '_', '-' and '.' after a letter")?;
        check(class, |c| c.is_ascii_alphabetic(), "")
            .ok_or("its class may hold letters, digits, '_', '-' and '.' after a letter")?;
        Ok(Kind { vendor: vendor.to_owned(), class: class.to_owned() })
    }

    /// The class alone.
    pub fn class(&self) -> &str {
        &self.class
    }
}

impl Name {
    /// A device of a kind; what is wrong with its name otherwise.
    pub fn new(kind: &Kind, device: &str) -> Result<Self, &'static str> {
        check(device, |c| c.is_ascii_alphanumeric(), ":")
            .ok_or("its device may hold letters, digits, '_', '-', '.' and ':'")?;
        Ok(Name { kind: kind.clone(), device: device.to_owned() })
    }
}

/// Starts as `first` says, ends with a letter or digit, has `_-.` and `more` between.
fn check(text: &str, first: impl Fn(char) -> bool, more: &str) -> Option<()> {
    let between = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c) || more.contains(c);
    let good = text.starts_with(first)
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(between);
    good.then_some(())
}

impl FromStr for Name {
    type Err = CdiError;

    fn from_str(text: &str) -> Result<Self, CdiError> {
        let bad = |reason| CdiError::BadName { device: text.to_owned(), reason };
        let (kind, device) = text.split_once('=').ok_or_else(|| bad("it has no '='"))?;
        Name::new(&Kind::parse(kind).map_err(bad)?, device).map_err(bad)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vendor, self.class)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["nvidia.com/gpu=0", "a/b=c", "vendor.com/net-if_1=eth0:1.2-x", "v/c.d=all"] {
            assert_eq!(good.parse::<Name>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "gpu",
            "nvidia.com=0",
            "/gpu=0",
            "nvidia.com/=0",
            "nvidia.com/gpu=",
            "1v/c=d",
            "v/1c=d",
            "v/c=-d",
            "v/c=d-",
            "v/c=d e",
            "v./c=d",
            "v/c/x=d",
            "v/c=d,e",
        ] {
            let error = bad.parse::<Name>().unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }
}
