//! Versions of the CNI specification, and which one a network is run with. Pure.

use std::{fmt, str::FromStr};

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u32, u32, u32);

impl Version {
    /// The newest one known here.
    pub(crate) const NEWEST: Self = Self(1, 1, 0);
    /// What a configuration without version is of.
    pub(crate) const OLDEST: Self = Self(0, 1, 0);
    /// CHECK, and DEL's `prevResult`.
    pub(crate) const CHECK: Self = Self(0, 4, 0);
    /// GC and STATUS.
    pub(crate) const GC: Self = Self(1, 1, 0);
}

impl FromStr for Version {
    type Err = String;

    /// One to three numbers, as upstream's library reads them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut numbers = [0; 3];
        let mut parts = text.split('.');
        for (place, part) in numbers.iter_mut().zip(&mut parts) {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            let number = digits.then(|| part.parse().ok()).flatten();
            *place = number.ok_or_else(|| format!("{text:?} is no version"))?;
        }
        match parts.next() {
            None => Ok(Self(numbers[0], numbers[1], numbers[2])),
            Some(_) => Err(format!("{text:?} is no version")),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The versions a configuration may be run with, newest first.
///
/// # Errors
/// If one is no version, or all are newer than what is known here.
pub(crate) fn plan_choices(one: Option<&str>, list: &[&str]) -> Result<Vec<Version>, String> {
    let mut choices = Vec::new();
    let one = one.filter(|text| !text.is_empty());
    for text in one.into_iter().chain(list.iter().copied()) {
        let version: Version = text.parse()?;
        if version <= Version::NEWEST && !choices.contains(&version) {
            choices.push(version);
        }
    }
    choices.sort_by(|a, b| b.cmp(a));
    match (choices.is_empty(), one.is_some() || !list.is_empty()) {
        (false, _) => Ok(choices),
        (true, false) => Ok(vec![Version::OLDEST]),
        (true, true) => Err(format!(
            "its version is newer than {}, the newest known here; name an older one in cniVersions",
            Version::NEWEST
        )),
    }
}

/// The newest choice that every plugin knows; the newest at all when there is no such, or when a
/// plugin did not tell, so that the plugin's own refusal is what is seen.
pub(crate) fn plan_version(choices: &[Version], plugins: &[Vec<Version>]) -> Version {
    let known = |version: &Version| plugins.iter().all(|plugin| plugin.contains(version));
    choices
        .iter()
        .find(|version| known(version))
        .or(choices.first())
        .copied()
        .unwrap_or(Version::OLDEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(texts: &[&str]) -> Vec<Version> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn choices_are_what_both_sides_know_newest_first() {
        for (one, list, want) in [
            (None, vec![], vec!["0.1.0"]),
            (Some(""), vec![], vec!["0.1.0"]),
            (Some("0.3.1"), vec![], vec!["0.3.1"]),
            (
                Some("0.3.1"),
                vec!["0.4.0", "1.1.0", "1.0.0"],
                vec!["1.1.0", "1.0.0", "0.4.0", "0.3.1"],
            ),
            (None, vec!["1.0.0", "9.0.0"], vec!["1.0.0"]),
            (Some("1.1"), vec!["1.1.0"], vec!["1.1.0"]),
        ] {
            assert_eq!(plan_choices(one, &list).unwrap(), versions(&want), "{one:?} {list:?}");
        }
        assert!(plan_choices(Some("2.0.0"), &[]).unwrap_err().contains("newer than 1.1.0"));
        for bad in ["x", "1..0", "1.0.0.0", "1.+1", "1.0.0-rc1"] {
            assert!(plan_choices(Some(bad), &[]).unwrap_err().contains("no version"), "{bad}");
        }
    }

    #[test]
    fn the_newest_version_all_plugins_know_is_taken() {
        let choices = versions(&["1.1.0", "1.0.0", "0.4.0"]);
        let old = versions(&["0.4.0", "1.0.0"]);
        let new = versions(&["1.0.0", "1.1.0"]);
        let pick = |plugins: &[Vec<Version>]| plan_version(&choices, plugins).to_string();
        assert_eq!(pick(&[new.clone(), new.clone()]), "1.1.0");
        assert_eq!(pick(&[new.clone(), old]), "1.0.0");
        assert_eq!(pick(&[new, vec![]]), "1.1.0");
    }
}
