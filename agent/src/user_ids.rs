//! The ids of the node that pods' user namespaces may be made of, by kubelet's rules (KEP-127): all
//! but the first range, or what the node's administrator gave the user `kubelet` as subordinate ids
//! (`/etc/subuid`, `/etc/subgid`).

use std::process::Command;

/// Ranges begin and end at multiples of this.
const UNIT: u32 = 65_536;
/// Who has the ids.
const USER: &str = "kubelet";
const TOOL: &str = "getsubids";

/// The ids, cut into one range for each pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserIds {
    /// The first id.
    pub first: u32,
    /// How many there are.
    pub length: u32,
    /// How many a pod gets (`userNamespaces.idsPerPod`).
    pub per_pod: u32,
}

impl Default for UserIds {
    fn default() -> Self {
        UserIds::all(UNIT)
    }
}

/// Why the configured ids are of no use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserIdsError {
    /// kubelet's rule for `userNamespaces.idsPerPod`.
    #[error("userNamespaces.idsPerPod {0}: a multiple of 65536 up to 4294901760 is needed")]
    PerPod(i64),
    /// The tool could not be run.
    #[error("{TOOL} {USER}: {0}; it has to tell the subordinate ids while there is a user {USER}")]
    Tool(String),
    /// Users and groups must be mapped alike.
    #[error(
        "mismatched subuids and subgids for user {USER:?}: {uids:?} and {gids:?}; make the lines in /etc/subuid and /etc/subgid the same"
    )]
    Mismatch { uids: String, gids: String },
    /// What the tool said.
    #[error(
        "{TOOL} {USER} says {0:?}: one line \"0: {USER} FIRST COUNT\" is expected; give the user one range in /etc/subuid"
    )]
    Output(String),
    /// The first id is none that a pod's range could begin at.
    #[error(
        "kubelet user assigned ID {first} is not a multiple of {per_pod}, or is less; change /etc/subuid and /etc/subgid"
    )]
    First { first: u32, per_pod: u32 },
    /// Part of a range would be left.
    #[error(
        "kubelet user assigned IDs length {length} is not a multiple of {per_pod}; change /etc/subuid and /etc/subgid"
    )]
    Length { length: u32, per_pod: u32 },
    /// Fewer ranges than pods.
    #[error(
        "kubelet user assigned IDs are not enough to support {max_pods} pods with {per_pod} each; raise the count in /etc/subuid and /etc/subgid, or lower maxPods"
    )]
    TooFew { max_pods: u32, per_pod: u32 },
}

impl UserIds {
    /// All ids of the node but those that the first range would have: its own users are there.
    pub fn all(per_pod: u32) -> Self {
        UserIds { first: per_pod, length: 0u32.wrapping_sub(per_pod), per_pod }
    }

    /// How many ranges there are. The one with the last 32-bit number, which is nobody's id, is not
    /// used.
    pub fn ranges(&self) -> u32 {
        let whole = self.length / self.per_pod;
        match self.first.checked_add(whole * self.per_pod) {
            Some(_) => whole,
            None => whole - 1,
        }
    }

    /// The ids by what `getsubids` says of users and groups; all of them where it is not asked.
    ///
    /// # Errors
    /// kubelet's rules.
    pub fn plan(
        per_pod: Option<i64>,
        subordinate: Option<(&str, &str)>,
        max_pods: u32,
    ) -> Result<Self, UserIdsError> {
        let per_pod = check_per_pod(per_pod)?;
        let Some((uids, gids)) = subordinate else { return Ok(UserIds::all(per_pod)) };
        if uids != gids {
            return Err(UserIdsError::Mismatch { uids: uids.to_owned(), gids: gids.to_owned() });
        }
        let (first, length) = parse(uids)?;
        if first < per_pod || first % per_pod != 0 {
            return Err(UserIdsError::First { first, per_pod });
        }
        if length % per_pod != 0 {
            return Err(UserIdsError::Length { length, per_pod });
        }
        let ids = UserIds { first, length, per_pod };
        if length == 0 || ids.ranges() < max_pods {
            return Err(UserIdsError::TooFew { max_pods, per_pod });
        }
        Ok(ids)
    }

    /// The ids of this machine. Runs `getsubids` where there is a user `kubelet`.
    ///
    /// # Errors
    /// As [`UserIds::plan`], and that the tool failed.
    pub fn find(per_pod: Option<i64>, max_pods: u32) -> Result<Self, UserIdsError> {
        let known = nix::unistd::User::from_name(USER);
        if known.map_err(|e| UserIdsError::Tool(e.to_string()))?.is_none() {
            return Self::plan(per_pod, None, max_pods);
        }
        // With the user but without the tool there is nobody to ask, as upstream sees it.
        let Some(uids) = ask(&[USER])? else { return Self::plan(per_pod, None, max_pods) };
        let gids = ask(&["-g", USER])?.unwrap_or_default();
        Self::plan(per_pod, Some((&uids, &gids)), max_pods)
    }
}

/// Ids for each pod.
///
/// # Errors
/// [`UserIdsError::PerPod`].
pub fn check_per_pod(per_pod: Option<i64>) -> Result<u32, UserIdsError> {
    let asked = per_pod.unwrap_or(i64::from(UNIT));
    u32::try_from(asked)
        .ok()
        .filter(|ids| *ids >= UNIT && ids % UNIT == 0)
        .ok_or(UserIdsError::PerPod(asked))
}

/// `0: kubelet FIRST COUNT`, one line.
fn parse(output: &str) -> Result<(u32, u32), UserIdsError> {
    let bad = || UserIdsError::Output(output.to_owned());
    let fields: Vec<&str> = output.split_whitespace().collect();
    let [_, _, first, length] = fields[..] else { return Err(bad()) };
    if output.trim_matches('\n').contains('\n') {
        return Err(bad());
    }
    let number = |text: &str| text.parse().map_err(|_| bad());
    Ok((number(first)?, number(length)?))
}

/// What the tool says; nothing where there is none.
fn ask(arguments: &[&str]) -> Result<Option<String>, UserIdsError> {
    let output = match Command::new(TOOL).args(arguments).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| UserIdsError::Tool(e.to_string()))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(UserIdsError::Tool(format!("{}: {said}", output.status)));
    }
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ids_but_those_of_the_node_itself() {
        let ids = UserIds::default();
        assert_eq!((ids.first, ids.length, ids.per_pod), (65_536, 4_294_901_760, 65_536));
        assert_eq!(ids.ranges(), 65_534);
        let last = u64::from(ids.first) + u64::from(ids.ranges()) * 65_536 - 1;
        assert!(last < u64::from(u32::MAX));
        let wide = UserIds::plan(Some(131_072), None, 110).unwrap();
        assert_eq!((wide.first, wide.ranges()), (131_072, 32_766));
    }

    #[test]
    fn subordinate_ids_by_kubelets_rules() {
        let said = |text: &str| UserIds::plan(None, Some((text, text)), 110);
        let ids = said("0: kubelet 65536 7208960\n").unwrap();
        assert_eq!((ids.first, ids.ranges()), (65_536, 110));
        assert_eq!(said("0: kubelet 65536 65536"), too_few());
        assert_eq!(said("0: kubelet 65536 0"), too_few());
        assert!(matches!(said("0: kubelet 0 7208960"), Err(UserIdsError::First { .. })));
        assert!(matches!(said("0: kubelet 65537 7208960"), Err(UserIdsError::First { .. })));
        assert!(matches!(said("0: kubelet 65536 7208961"), Err(UserIdsError::Length { .. })));
        for text in ["", "0: kubelet 65536", "0: kubelet x y", "0: kubelet 65536 99999999999"] {
            assert!(matches!(said(text), Err(UserIdsError::Output(_))), "{text}");
        }
        assert!(said("0: kubelet 65536 7208960\n1: kubelet 1 1").is_err());
        let differ = UserIds::plan(None, Some(("0: kubelet 65536 65536", "")), 1);
        assert!(matches!(differ, Err(UserIdsError::Mismatch { .. })));
    }

    fn too_few() -> Result<UserIds, UserIdsError> {
        Err(UserIdsError::TooFew { max_pods: 110, per_pod: 65_536 })
    }

    #[test]
    fn ids_per_pod() {
        assert_eq!(check_per_pod(None), Ok(65_536));
        assert_eq!(check_per_pod(Some(131_072)), Ok(131_072));
        for bad in [0, -1, 1, 65_537, 4_294_967_296] {
            assert_eq!(check_per_pod(Some(bad)), Err(UserIdsError::PerPod(bad)));
        }
    }
}
