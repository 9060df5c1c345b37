//! May a pod use an image that is on the node, or must it show the registry its credentials first
//! (KEP-2535)? Pure.

use super::record::{PullAccount, PullCredentials, PullSecret, PulledRecord};
use crate::pod::image_name::without_tag;

/// Of more Secrets than this no further ones are noted while they are only looked up.
const NOTED: usize = 100;

/// `imagePullCredentialsVerificationPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Who may see the node may use its images.
    NeverVerify,
    /// Images that were not pulled by this node are free.
    #[default]
    NeverVerifyPreloadedImages,
    /// Images that are listed are free: whole names, and prefixes that end in a slash.
    NeverVerifyAllowlistedImages {
        /// Names without tag or digest.
        names: Vec<String>,
        /// Beginnings of names.
        prefixes: Vec<String>,
    },
    /// None is free.
    AlwaysVerify,
}

impl Policy {
    /// The policy that frees what `patterns` (`preloadedImagesVerificationAllowlist`) say.
    ///
    /// # Errors
    /// Which pattern is none, and why.
    pub fn allowing(patterns: &[String]) -> Result<Self, String> {
        let (mut names, mut prefixes) = (Vec::new(), Vec::new());
        for pattern in patterns {
            let wrong = |reason: &str| Err(format!("{pattern:?} {reason}"));
            if pattern.trim() != pattern {
                return wrong("begins or ends with a space");
            }
            let prefix = pattern.strip_suffix('*').filter(|prefix| prefix.ends_with('/'));
            if prefix.unwrap_or(pattern).contains('*') {
                return wrong("may have a wildcard as its end only, as r.example/team/*");
            }
            match prefix {
                Some("/") => return wrong("must begin with a registry"),
                Some(prefix) => prefixes.push(prefix.to_owned()),
                None => match without_tag(pattern) {
                    Ok(name) if name == pattern => names.push(pattern.clone()),
                    Ok(_) => return wrong("must have neither tag nor digest"),
                    Err(_) => return wrong("is no image's name"),
                },
            }
        }
        Ok(Self::NeverVerifyAllowlistedImages { names, prefixes })
    }

    /// Whether a pod must have shown credentials for `image`, which this node pulled or not.
    fn verifies(&self, image: &str, pulled_here: bool) -> bool {
        match self {
            Self::NeverVerify => false,
            Self::NeverVerifyPreloadedImages => pulled_here,
            Self::NeverVerifyAllowlistedImages { names, prefixes } => {
                let name = without_tag(image).unwrap_or(image);
                let free = names.iter().any(|n| n == name)
                    || prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
                !free
            }
            Self::AlwaysVerify => true,
        }
    }
}

/// What is known of an image's pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// It is nobody's of this node.
    Nothing,
    /// It was begun here; nothing tells who may use it.
    Intent,
    /// It was pulled here.
    Record(PulledRecord),
    /// The records cannot be read.
    Unreadable,
}

/// What follows from what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// Any pod may use it; upstream's word for why.
    Allowed(&'static str),
    /// It must be pulled again, so that the registry judges; upstream's word for why.
    MustPull(&'static str),
    /// It depends on the pod's credentials.
    Compare(PullCredentials),
}

/// Decides as far as that can be without the pod's credentials.
pub fn plan_check(policy: &Policy, image: &str, known: &Known) -> Check {
    let pulled_here = match known {
        Known::Unreadable => return Check::MustPull("error"),
        Known::Nothing => false,
        Known::Intent | Known::Record(_) => true,
    };
    if !policy.verifies(image, pulled_here) {
        return Check::Allowed("credentialPolicyAllowed");
    }
    let Known::Record(record) = known else { return Check::MustPull("mustAuthenticate") };
    let Ok(name) = without_tag(image) else { return Check::MustPull("error") };
    match record.credential_mapping.get(name) {
        None => Check::MustPull("mustAuthenticate"),
        Some(of) if of.node_pods_accessible => Check::Allowed("credentialRecordFound"),
        Some(of)
            if of.kubernetes_secrets.is_empty() && of.kubernetes_service_accounts.is_empty() =>
        {
            Check::MustPull("mustAuthenticate")
        }
        Some(of) => Check::Compare(of.clone()),
    }
}

/// What a pod has to show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Secrets that are for the image, with the digests of what is in them.
    pub secrets: Vec<PullSecret>,
    /// The account that it runs as, if a provider takes that for the image.
    pub account: Option<PullAccount>,
}

/// Whether what a pod shows is what opened the registry before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// It is.
    Found,
    /// It is, under another name or with other content; that is worth noting.
    FoundAs(PullSecret),
    /// It is not.
    None,
}

/// Compares. The same login is good from any Secret; the same Secret is good whatever is in it now.
pub fn plan_match(of: &PullCredentials, shown: &Shown) -> Match {
    let few = of.kubernetes_secrets.len() < NOTED;
    for secret in &shown.secrets {
        for known in &of.kubernetes_secrets {
            let same_login = !known.credential_hash.is_empty()
                && known.credential_hash == secret.credential_hash;
            let same_object = known.is_same_object(secret);
            match (same_login, same_object) {
                (true, false) if few => return Match::FoundAs(secret.clone()),
                (true, _) => return Match::Found,
                (false, true) if few => return Match::FoundAs(secret.clone()),
                _ => {}
            }
        }
    }
    match &shown.account {
        Some(account) if of.kubernetes_service_accounts.contains(account) => Match::Found,
        _ => Match::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::at;

    fn allowing(patterns: &[&str]) -> Result<Policy, String> {
        Policy::allowing(&patterns.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    fn secret(name: &str, hash: &str) -> PullSecret {
        PullSecret {
            uid: format!("uid-{name}"),
            namespace: "ns".into(),
            name: name.into(),
            credential_hash: hash.into(),
        }
    }

    #[test]
    fn policies_free_what_they_say() {
        let listed = allowing(&["r.io/free", "r.io/team/*", "busybox"]).unwrap();
        for (policy, image, pulled_here, verifies) in [
            (&Policy::NeverVerify, "r.io/a:1", true, false),
            (&Policy::AlwaysVerify, "r.io/a:1", false, true),
            (&Policy::default(), "r.io/a:1", false, false),
            (&Policy::default(), "r.io/a:1", true, true),
            (&listed, "r.io/free:2", true, false),
            (&listed, "r.io/free@sha256:0123456789abcdef0123456789abcdef", true, false),
            (&listed, "r.io/freedom:2", false, true),
            (&listed, "r.io/team/a/b:1", true, false),
            (&listed, "r.io/teams/a", false, true),
            (&listed, "busybox", true, false),
        ] {
            assert_eq!(policy.verifies(image, pulled_here), verifies, "{policy:?} {image}");
        }
        for (pattern, said) in [
            (" r.io/a", "space"),
            ("r.io/*/a", "as its end only"),
            ("r.io/a*", "as its end only"),
            ("/*", "a registry"),
            ("r.io/a:1", "neither tag"),
            ("R.io/A", "is no image's name"),
            ("", "is no image's name"),
        ] {
            let error = allowing(&[pattern]).unwrap_err();
            assert!(error.contains(said), "{pattern}: {error}");
        }
    }

    #[test]
    fn what_is_known_decides_as_far_as_it_goes() {
        let image = "r.io/a:1";
        let mut record = PulledRecord::new("id", at(0));
        let check = |policy: &Policy, known: &Known| plan_check(policy, image, known);
        let usual = Policy::default();
        let must = Check::MustPull("mustAuthenticate");
        let free = Check::Allowed("credentialPolicyAllowed");
        assert_eq!(check(&usual, &Known::Nothing), free);
        assert_eq!(check(&usual, &Known::Unreadable), Check::MustPull("error"));
        assert_eq!(check(&usual, &Known::Intent), must);
        assert_eq!(check(&Policy::NeverVerify, &Known::Intent), free);
        assert_eq!(check(&Policy::AlwaysVerify, &Known::Nothing), must);
        assert_eq!(check(&usual, &Known::Record(record.clone())), must, "by nobody known");
        let only = PullCredentials {
            kubernetes_secrets: vec![secret("s", "h")],
            ..PullCredentials::default()
        };
        record.merge("r.io/b", &only, at(1));
        assert_eq!(check(&usual, &Known::Record(record.clone())), must, "under another name");
        record.merge("r.io/a", &only, at(1));
        assert_eq!(check(&usual, &Known::Record(record.clone())), Check::Compare(only));
        let all = PullCredentials { node_pods_accessible: true, ..PullCredentials::default() };
        record.merge("r.io/a", &all, at(2));
        let found = Check::Allowed("credentialRecordFound");
        assert_eq!(check(&usual, &Known::Record(record)), found);
    }

    #[test]
    fn a_login_or_the_secret_or_the_account_is_enough() {
        let account =
            |name: &str| PullAccount { uid: "u".into(), namespace: "ns".into(), name: name.into() };
        let of = PullCredentials {
            kubernetes_secrets: vec![secret("one", "h1"), secret("unhashed", "")],
            kubernetes_service_accounts: vec![account("sa")],
            node_pods_accessible: false,
        };
        let shows = |secrets: Vec<PullSecret>, name: Option<&str>| {
            plan_match(&of, &Shown { secrets, account: name.map(account) })
        };
        assert_eq!(shows(vec![secret("one", "h1")], None), Match::Found);
        let copy = secret("copy", "h1");
        assert_eq!(shows(vec![copy.clone()], None), Match::FoundAs(copy));
        let changed = secret("one", "h2");
        assert_eq!(shows(vec![changed.clone()], None), Match::FoundAs(changed));
        assert_eq!(shows(vec![secret("other", "h9")], None), Match::None);
        assert_eq!(shows(vec![secret("other", "")], None), Match::None, "no digest is no match");
        assert_eq!(shows(vec![], Some("sa")), Match::Found);
        assert_eq!(shows(vec![], Some("sb")), Match::None);
        let many = PullCredentials {
            kubernetes_secrets: (0..NOTED).map(|i| secret(&i.to_string(), "h")).collect(),
            ..PullCredentials::default()
        };
        let shown = |s: PullSecret| plan_match(&many, &Shown { secrets: vec![s], account: None });
        assert_eq!(shown(secret("copy", "h")), Match::Found, "not noted any more");
        assert_eq!(shown(secret("7", "changed")), Match::None);
    }
}
