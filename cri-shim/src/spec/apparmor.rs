//! AppArmor: which profile a container is confined by, and the text of the default one. Pure.
//!
//! As containerd's CRI decides it (internal/cri/sputil): who asks for nothing gets the default
//! profile where the node can have it, and who asks for one that cannot be enforced is refused. A
//! privileged container is never confined, as Kubernetes documents it.

use std::fmt::Write as _;

use super::SpecError;
use crate::api::{self, SecurityProfile, security_profile::ProfileType};

/// The default profile's name in the kernel.
pub const DEFAULT: &str = "longshore-default";

/// What a container's config asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing: the default where there is one.
    Nothing,
    /// The default.
    RuntimeDefault,
    /// No confinement.
    Unconfined,
    /// A profile that is loaded on the node already.
    Localhost(String),
}

/// What the node can do, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// The kernel's list of loaded profiles (`/sys/kernel/security/apparmor/profiles`); `None` where
    /// AppArmor is not enabled or its files are not to be seen.
    pub profiles: Option<&'a str>,
    /// `apparmor_parser` is installed, with which profiles are loaded.
    pub parser: bool,
}

/// What is to be done for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// It is not confined.
    Unconfined,
    /// It enters this profile.
    Enter(String),
    /// It enters the default profile, which has to be loaded first.
    LoadDefault,
}

/// What a container's config asks for.
///
/// # Errors
/// [`SpecError::AppArmorProfile`] for a profile without a name, or that is not of a known kind.
pub fn asked(security: Option<&api::LinuxContainerSecurityContext>) -> Result<Asked, SpecError> {
    let Some(security) = security else { return Ok(Asked::Nothing) };
    if security.privileged {
        return Ok(Asked::Unconfined);
    }
    let Some(profile) = &security.apparmor else {
        #[allow(deprecated, reason = "kubelets before 1.30 and other CRI clients still send it")]
        return of_text(&security.apparmor_profile);
    };
    let SecurityProfile { localhost_ref: name, .. } = profile;
    let bad = |reason| SpecError::AppArmorProfile { profile: name.clone(), reason };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Localhost) => localhost(name),
        Ok(_) if !name.is_empty() => {
            Err(bad("localhost_ref must only be set for a profile of type Localhost"))
        }
        Ok(ProfileType::RuntimeDefault) => Ok(Asked::RuntimeDefault),
        Ok(ProfileType::Unconfined) => Ok(Asked::Unconfined),
        Err(_) => Err(bad("its type is not known")),
    }
}

/// The older field: `runtime/default`, `unconfined` or `localhost/<name>`.
fn of_text(text: &str) -> Result<Asked, SpecError> {
    match text {
        "" => Ok(Asked::Nothing),
        "runtime/default" => Ok(Asked::RuntimeDefault),
        "unconfined" => Ok(Asked::Unconfined),
        _ if text.starts_with("localhost/") => localhost(text),
        _ => Err(SpecError::AppArmorProfile {
            profile: text.to_owned(),
            reason: "it is none of runtime/default, unconfined and localhost/<name>",
        }),
    }
}

fn localhost(name: &str) -> Result<Asked, SpecError> {
    match name.strip_prefix("localhost/").unwrap_or(name).trim() {
        "" => Err(SpecError::AppArmorProfile {
            profile: name.to_owned(),
            reason: "a Localhost profile needs a name",
        }),
        name => Ok(Asked::Localhost(name.to_owned())),
    }
}

/// Decides what is done for a container.
///
/// # Errors
/// For what was asked for and cannot be enforced on this node.
pub fn plan(asked: &Asked, node: Node<'_>) -> Result<Plan, SpecError> {
    let Some(profiles) = node.profiles else {
        return match asked {
            Asked::Nothing | Asked::Unconfined => Ok(Plan::Unconfined),
            Asked::RuntimeDefault => Err(SpecError::NotInKernel("the default AppArmor profile")),
            Asked::Localhost(_) => Err(SpecError::NotInKernel("an AppArmor Localhost profile")),
        };
    };
    match asked {
        Asked::Unconfined => Ok(Plan::Unconfined),
        Asked::Localhost(name) if is_loaded(profiles, name) => Ok(Plan::Enter(name.clone())),
        Asked::Localhost(name) => Err(SpecError::AppArmorProfile {
            profile: name.clone(),
            reason: "it is not loaded on this node; load it with apparmor_parser -r",
        }),
        _ if is_loaded(profiles, DEFAULT) => Ok(Plan::Enter(DEFAULT.to_owned())),
        _ if node.parser => Ok(Plan::LoadDefault),
        Asked::Nothing => Ok(Plan::Unconfined),
        Asked::RuntimeDefault => Err(SpecError::AppArmorProfile {
            profile: DEFAULT.to_owned(),
            reason: "loading it needs apparmor_parser, which is not installed on this node; \
                     install the package apparmor",
        }),
    }
}

/// Whether a profile is in the kernel's list, whose lines are `<name> (<mode>)`. A name may have
/// spaces.
pub fn is_loaded(profiles: &str, name: &str) -> bool {
    let of_line = |line: &str| line.rsplit_once(" (").map(|(name, _)| name.to_owned());
    profiles.lines().any(|line| of_line(line).as_deref() == Some(name))
}

/// The default profile's text, for `apparmor_parser`. `daemon` is the profile that this program is
/// confined by itself (`unconfined` where it is not); with `abi` the parser is told for which
/// kernel's rules it was written, which it knows since AppArmor 3.0.
///
/// It allows everything that capabilities, file modes and seccomp allow, but for what reaches the
/// node through the kernel's own files, mounting, and processes outside.
pub fn default_profile(daemon: &str, abi: bool) -> String {
    let mut text = String::new();
    if abi {
        text.push_str("abi <abi/3.0>,\n");
    }
    // A path may be one that the container cannot name (a descriptor it was given), or of a file
    // that was deleted.
    let _ = writeln!(text, "profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{");
    text.push_str(
        "  capability,\n  network,\n  unix,\n  dbus,\n  file,\n  umount,\n\
         \n  deny mount,\n  deny remount,\n  deny pivot_root,\n\n",
    );
    for (paths, access) in DENIED {
        for path in *paths {
            let _ = writeln!(text, "  deny {path} {access},");
        }
    }
    // The node's processes, and OCI runtimes that have a profile of their own, may signal and look
    // into the container's; those of other containers and of other profiles may not.
    let mut outside = vec!["unconfined", "runc", "crun"];
    if !outside.contains(&daemon) {
        outside.push(daemon);
    }
    text.push('\n');
    for peer in outside {
        let _ = writeln!(text, "  signal (receive) peer=\"{peer}\",");
        let _ = writeln!(text, "  ptrace (readby, tracedby) peer=\"{peer}\",");
    }
    let _ = writeln!(text, "  signal (send, receive) peer={DEFAULT},");
    let _ = writeln!(text, "  ptrace (trace, tracedby, read, readby) peer={DEFAULT},\n}}");
    text
}

const WRITE: &str = "w";
const CHANGE: &str = "wklx";
const ALL: &str = "rwklx";

/// What a container must not do with the kernel's files, whoever it is in there.
const DENIED: &[(&[&str], &str)] = &[
    // Of /proc, processes' own folders may be written to, and shared memory's limits.
    (&["/proc/*"], WRITE),
    (&["/proc/{[^0-9s],s[^y],sy[^s],sys[^/]}*/**"], WRITE),
    (
        &[
            "/proc/sys/[^k]**",
            "/proc/sys/k[^e]**",
            "/proc/sys/kernel/[^s]**",
            "/proc/sys/kernel/s[^h]**",
            "/proc/sys/kernel/sh[^m]**",
        ],
        WRITE,
    ),
    (&["/proc/{sysrq-trigger,mem,kmem,kcore}"], ALL),
    // Of /sys, only the container's cgroups.
    (
        &["/sys/[^f]**", "/sys/f[^s]**", "/sys/fs/[^c]**", "/sys/fs/c[^g]**", "/sys/fs/cg[^r]**"],
        CHANGE,
    ),
    (&["/sys/{firmware,kernel/security,devices/virtual/powercap}/**"], ALL),
];

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn security(kind: ProfileType, name: &str) -> api::LinuxContainerSecurityContext {
        api::LinuxContainerSecurityContext {
            apparmor: Some(SecurityProfile {
                profile_type: kind as i32,
                localhost_ref: name.to_owned(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_asked_for() {
        use ProfileType::*;
        let local = |name: &str| Some(Asked::Localhost(name.to_owned()));
        for (kind, name, expected) in [
            (RuntimeDefault, "", Some(Asked::RuntimeDefault)),
            (Unconfined, "", Some(Asked::Unconfined)),
            (Localhost, "strict", local("strict")),
            (Localhost, "localhost/strict", local("strict")),
            (Localhost, "", None),
            (Localhost, "localhost/", None),
            (RuntimeDefault, "strict", None),
            (Unconfined, "strict", None),
        ] {
            let asked = asked(Some(&security(kind, name))).ok();
            assert_eq!(asked, expected, "{kind:?} {name:?}");
        }
        assert_eq!(asked(None), Ok(Asked::Nothing));
        assert_eq!(asked(Some(&Default::default())), Ok(Asked::Nothing));
        let unknown = SecurityProfile { profile_type: 7, localhost_ref: String::new() };
        let unknown =
            api::LinuxContainerSecurityContext { apparmor: Some(unknown), ..Default::default() };
        assert!(asked(Some(&unknown)).is_err());
        let privileged = api::LinuxContainerSecurityContext {
            privileged: true,
            ..security(Localhost, "strict")
        };
        assert_eq!(asked(Some(&privileged)), Ok(Asked::Unconfined));
    }

    #[test]
    #[allow(deprecated, reason = "what older kubelets send")]
    fn the_older_field() {
        for (text, expected) in [
            ("runtime/default", Some(Asked::RuntimeDefault)),
            ("unconfined", Some(Asked::Unconfined)),
            ("localhost/a b", Some(Asked::Localhost("a b".to_owned()))),
            ("localhost/", None),
            ("strict", None),
        ] {
            let security = api::LinuxContainerSecurityContext {
                apparmor_profile: text.to_owned(),
                ..Default::default()
            };
            assert_eq!(asked(Some(&security)).ok(), expected, "{text}");
        }
    }

    #[test]
    fn what_the_node_cannot_enforce_is_refused_and_the_rest_is_enforced() {
        let none = Node { profiles: None, parser: true };
        let bare = Node { profiles: Some("other (enforce)\n"), parser: false };
        let able = Node { parser: true, ..bare };
        let loaded = "strict (enforce)\nlongshore-default (enforce)\n/usr/bin/a b (complain)\n";
        let loaded = Node { profiles: Some(loaded), parser: false };
        let local = |name: &str| Asked::Localhost(name.to_owned());
        let enter = |name: &str| Ok(Plan::Enter(name.to_owned()));
        let free = || Ok(Plan::Unconfined);
        for (asked, node, expected) in [
            (Asked::Nothing, none, free()),
            (Asked::Nothing, bare, free()),
            (Asked::Nothing, able, Ok(Plan::LoadDefault)),
            (Asked::Nothing, loaded, enter(DEFAULT)),
            (Asked::RuntimeDefault, none, Err("not enabled in this node's kernel")),
            (Asked::RuntimeDefault, bare, Err("apparmor_parser")),
            (Asked::RuntimeDefault, able, Ok(Plan::LoadDefault)),
            (Asked::RuntimeDefault, loaded, enter(DEFAULT)),
            (Asked::Unconfined, none, free()),
            (Asked::Unconfined, loaded, free()),
            (local("strict"), none, Err("not enabled in this node's kernel")),
            (local("strict"), able, Err("\"strict\": it is not loaded")),
            (local("strict"), loaded, enter("strict")),
            (local("stric"), loaded, Err("not loaded")),
            (local("/usr/bin/a b"), loaded, enter("/usr/bin/a b")),
            (local("/usr/bin/a"), loaded, Err("not loaded")),
        ] {
            let planned = plan(&asked, node).map_err(|e| e.to_string());
            match expected {
                Ok(expected) => assert_eq!(planned, Ok(expected), "{asked:?} on {node:?}"),
                Err(part) => {
                    let error = planned.unwrap_err();
                    assert!(error.contains(part), "{asked:?} on {node:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn the_default_profile_names_who_may_reach_in() {
        let text = default_profile("unconfined", true);
        assert!(text.starts_with("abi <abi/3.0>,\nprofile longshore-default "), "{text}");
        assert_eq!(text.matches("peer=\"unconfined\"").count(), 2);
        let text = default_profile("/usr/bin/longshore", false);
        assert!(text.starts_with("profile longshore-default "), "{text}");
        assert!(text.contains("signal (receive) peer=\"/usr/bin/longshore\","), "{text}");
        assert!(text.contains("deny mount,"), "{text}");
    }
}
