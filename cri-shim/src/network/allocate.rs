//! Which address a sandbox gets. Pure.
//!
//! Addresses are handed out in a circle, so that one that was given back rests as long as possible:
//! peers, proxies and connection tracking may still know its last owner.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};

use super::Cidr;

/// Where each block's circle stands: the index handed out last, by the block's text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cursors(BTreeMap<String, u64>);

/// The gateway's place in a block: the first address after the network's own.
pub(crate) fn gateway(cidr: &Cidr) -> Option<IpAddr> {
    cidr.nth(1)
}

/// The next free address of `cidr`, or none when all are taken.
pub(crate) fn allocate(
    cidr: &Cidr,
    used: &BTreeSet<IpAddr>,
    cursors: &mut Cursors,
) -> Option<IpAddr> {
    // Network and gateway are first, IPv4's broadcast last. Larger blocks than 2^32 have enough in
    // their first part.
    let end = cidr.size().min(1 << 32) - if cidr.is_ipv4() { 1 } else { 0 };
    let end = u64::try_from(end).unwrap_or(u64::MAX);
    const FIRST: u64 = 2;
    if end <= FIRST {
        return None;
    }
    let last = cursors.0.get(&cidr.to_string()).copied().filter(|last| (FIRST..end).contains(last));
    let start = last.map_or(FIRST, |last| if last + 1 < end { last + 1 } else { FIRST });
    // At most one more step than there are used addresses is needed.
    let steps = (end - FIRST).min(used.len() as u64 + 1);
    for step in 0..steps {
        let at = FIRST + (start - FIRST + step) % (end - FIRST);
        let address = cidr.nth(u128::from(at))?;
        if !used.contains(&address) {
            cursors.0.insert(cidr.to_string(), at);
            return Some(address);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_unique_and_rest_before_they_come_again() {
        let cidr: Cidr = "10.0.0.0/29".parse().unwrap();
        let (mut used, mut cursors) = (BTreeSet::new(), Cursors::default());
        let mut take = |used: &mut BTreeSet<IpAddr>| {
            let address = allocate(&cidr, used, &mut cursors)?;
            assert!(used.insert(address));
            Some(address.to_string())
        };
        for want in ["10.0.0.2", "10.0.0.3", "10.0.0.4"] {
            assert_eq!(take(&mut used).as_deref(), Some(want));
        }
        used.remove(&"10.0.0.2".parse().unwrap());
        for want in [Some("10.0.0.5"), Some("10.0.0.6"), Some("10.0.0.2"), None] {
            assert_eq!(take(&mut used).as_deref(), want);
        }
    }

    #[test]
    fn blocks_without_room_give_nothing() {
        for tiny in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/128", "fd00::/127"] {
            let cidr: Cidr = tiny.parse().unwrap();
            assert_eq!(allocate(&cidr, &BTreeSet::new(), &mut Cursors::default()), None, "{tiny}");
        }
        let six: Cidr = "fd00::/64".parse().unwrap();
        let first = allocate(&six, &BTreeSet::new(), &mut Cursors::default());
        assert_eq!(first, "fd00::2".parse().ok());
        assert_eq!(gateway(&six), "fd00::1".parse().ok());
    }

    proptest::proptest! {
        #[test]
        fn a_free_address_is_found_if_there_is_one(
            prefix in 24u8..=30,
            taken in proptest::collection::btree_set(0u8.., 0..256),
            last in 0u64..300,
        ) {
            let cidr = Cidr::new("10.0.0.0".parse().unwrap(), prefix).unwrap();
            let used: BTreeSet<IpAddr> =
                taken.iter().map(|n| IpAddr::from([10, 0, 0, *n])).collect();
            let mut cursors = Cursors(BTreeMap::from([(cidr.to_string(), last)]));
            let free = (2..cidr.size() - 1).any(|n| !used.contains(&cidr.nth(n).unwrap()));
            let got = allocate(&cidr, &used, &mut cursors);
            proptest::prop_assert_eq!(got.is_some(), free);
            if let Some(got) = got {
                proptest::prop_assert!(!used.contains(&got) && cidr.contains(got));
                let index = cidr.index_of(got).unwrap();
                proptest::prop_assert!(index >= 2 && index < cidr.size() - 1);
            }
        }
    }
}
