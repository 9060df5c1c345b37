//! Sets of CPUs as Linux and KubeletConfiguration write them (cpuset(7), "List format"): `0-3,8`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// CPUs by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuSet(BTreeSet<u32>);

/// More than any kernel has: a list is checked before it takes memory.
const MAX: u32 = 65_535;

impl CpuSet {
    /// Number of CPUs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `other` has all of these.
    pub fn is_within(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }

    /// Whether `cpu` is one of them.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// The CPUs, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// These and those of `other`.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(self.0.union(&other.0).copied().collect())
    }

    /// Those that `other` has, too.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).copied().collect())
    }

    /// Those that `other` has not.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        Self(cpus.into_iter().collect())
    }
}

impl FromStr for CpuSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| match part.trim().parse::<u32>() {
            Ok(cpu) if cpu <= MAX => Ok(cpu),
            _ => Err(format!("{part:?} in {text:?} is no CPU; expected a list such as 0-3,8")),
        };
        let mut cpus = BTreeSet::new();
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(format!("{part:?} in {text:?} ends before it begins"));
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.iter().copied().peekable();
        let mut sep = "";
        while let Some(first) = left.next() {
            let mut last = first;
            while let Some(next) = left.next_if_eq(&(last + 1)) {
                last = next;
            }
            if first == last {
                write!(f, "{sep}{first}")?;
            } else {
                write!(f, "{sep}{first}-{last}")?;
            }
            sep = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        for (text, written, count) in [
            ("", "", 0),
            ("0", "0", 1),
            ("3,1,2,7\n", "1-3,7", 4),
            ("0-3,2-5", "0-5", 6),
            (" 1 - 2 , 4", "1-2,4", 3),
        ] {
            let set: CpuSet = text.parse().unwrap();
            assert_eq!((set.to_string().as_str(), set.len()), (written, count), "{text:?}");
        }
        for text in ["a", "1-", "-1", "3-1", "0-70000", "1,2,x"] {
            let error = text.parse::<CpuSet>().unwrap_err();
            assert!(error.contains(text), "{error}");
        }
        let all: CpuSet = "0-3".parse().unwrap();
        assert!("1,3".parse::<CpuSet>().unwrap().is_within(&all));
        let odd: CpuSet = "3-4".parse().unwrap();
        assert!(!odd.is_within(&all) && odd.contains(4) && !all.contains(4));
        let text = |set: CpuSet| set.to_string();
        assert_eq!(text(all.union(&odd)), "0-4");
        assert_eq!(text(all.intersection(&odd)), "3");
        assert_eq!(text(all.difference(&odd)), "0-2");
        assert_eq!(text(odd.iter().chain([9]).collect()), "3-4,9");
    }
}
