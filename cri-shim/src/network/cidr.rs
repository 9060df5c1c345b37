//! An address block, as in a node's `podCIDR`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A network: its base address (host bits zero) and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    base: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The network that holds `address`, or none when `prefix` is too long for its family.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let width = width(address);
        if prefix > width {
            return None;
        }
        let bits = to_bits(address) & mask(width, prefix);
        Some(Self { base: from_bits(address, bits), prefix })
    }

    /// The base address.
    pub fn base(&self) -> IpAddr {
        self.base
    }

    /// The prefix length in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether the network is IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.base.is_ipv4()
    }

    /// Whether `address` lies in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.is_ipv4()
            && to_bits(address) & mask(width(address), self.prefix) == to_bits(self.base)
    }

    /// The number of addresses, saturating.
    pub fn size(&self) -> u128 {
        1u128.checked_shl(u32::from(width(self.base) - self.prefix)).unwrap_or(u128::MAX)
    }

    /// The `n`th address, counted from the base; none beyond the end.
    pub fn nth(&self, n: u128) -> Option<IpAddr> {
        (n < self.size()).then(|| from_bits(self.base, to_bits(self.base).wrapping_add(n)))
    }

    /// Where `address` lies, counted from the base; none when it is outside.
    pub fn index_of(&self, address: IpAddr) -> Option<u128> {
        self.contains(address).then(|| to_bits(address) - to_bits(self.base))
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn from_bits(family: IpAddr, bits: u128) -> IpAddr {
    match family {
        IpAddr::V4(_) => Ipv4Addr::from_bits(bits as u32).into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(bits).into(),
    }
}

fn mask(width: u8, prefix: u8) -> u128 {
    let host = width - prefix;
    let all = if width == 32 { u128::from(u32::MAX) } else { u128::MAX };
    if host == 128 { 0 } else { all & !((1u128 << host) - 1) }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// A text that is no CIDR.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a CIDR such as 10.88.0.0/16 or fd00:10:88::/64")]
pub struct ParseCidrError(String);

impl FromStr for Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('/')
            .and_then(|(address, prefix)| Self::new(address.parse().ok()?, prefix.parse().ok()?))
            .ok_or_else(|| ParseCidrError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_contains_and_counts() {
        let v4: Cidr = "10.88.7.9/16".parse().unwrap();
        assert_eq!(v4.to_string(), "10.88.0.0/16");
        assert_eq!(v4.size(), 65536);
        assert_eq!(v4.nth(258), Some("10.88.1.2".parse().unwrap()));
        assert_eq!(v4.nth(65536), None);
        assert_eq!(v4.index_of("10.88.255.255".parse().unwrap()), Some(65535));
        assert!(!v4.contains("10.89.0.0".parse().unwrap()));
        assert!(!v4.contains("::1".parse().unwrap()));
        let v6: Cidr = "fd00:10:88::/64".parse().unwrap();
        assert_eq!(v6.nth(2), Some("fd00:10:88::2".parse().unwrap()));
        assert!("::/0".parse::<Cidr>().unwrap().contains("fe80::1".parse().unwrap()));
        assert_eq!("0.0.0.0/0".parse::<Cidr>().unwrap().size(), 1 << 32);
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "x/8", "10.0.0.0/-1"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }
}
