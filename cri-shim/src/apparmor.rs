//! AppArmor on this node: what its kernel has loaded, and the loading of the default profile.
//!
//! The kernel is asked for each container, as anybody may load and unload profiles meanwhile; its
//! list is a few kilobytes. The default profile is loaded when the first container needs it.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::spec::SpecError;
use crate::spec::apparmor::{self, Asked, Node, Plan};

/// Whether the running kernel has it switched on: `Y` or `N`.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// The profiles that are loaded. Not there for a node in a container, which has no say in it.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";
/// What this program is confined by: `unconfined`, or `<profile> (<mode>)`.
const OWN: &str = "/proc/self/attr/current";
/// Where the parser of AppArmor 3.0 and newer finds what the profile is written for.
const ABI: &str = "/etc/apparmor.d/abi/3.0";

/// Why a container's profile cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// What is asked for cannot be had.
    #[error(transparent)]
    Refused(#[from] SpecError),
    /// The kernel's list of profiles could not be read.
    #[error("reading {PROFILES}: {0}; is securityfs mounted at /sys/kernel/security?")]
    Profiles(io::Error),
    /// The parser could not be run.
    #[error("running {parser} to load the AppArmor profile {profile}: {source}", profile = apparmor::DEFAULT)]
    Run { parser: PathBuf, source: io::Error },
    /// The parser, or the kernel, did not take the profile.
    #[error("{parser} could not load the AppArmor profile {profile}: {said}", profile = apparmor::DEFAULT)]
    Load { parser: PathBuf, said: String },
}

/// Whether the running kernel confines processes with AppArmor, and this node may have it do so.
pub fn enabled() -> bool {
    let enabled = fs::read_to_string(ENABLED).is_ok_and(|word| word.trim() == "Y");
    enabled && Path::new(PROFILES).exists()
}

/// The node's AppArmor.
#[derive(Debug)]
pub struct AppArmor {
    enabled: bool,
    parser: Option<PathBuf>,
    /// Held while the default profile is loaded: once is enough.
    loading: Mutex<()>,
}

impl AppArmor {
    /// Looks at the kernel. `parser` is `apparmor_parser` where it is installed.
    pub fn open(parser: Option<PathBuf>) -> Self {
        AppArmor { enabled: enabled(), parser, loading: Mutex::default() }
    }

    /// Whether containers can be confined.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The profile that a container enters, which is loaded then; `None` for no confinement.
    ///
    /// # Errors
    /// For a profile that is not there, and for the default when it cannot be loaded.
    pub fn profile(&self, asked: &Asked) -> Result<Option<String>, AppArmorError> {
        match self.plan(asked)? {
            Plan::Unconfined => Ok(None),
            Plan::Enter(name) => Ok(Some(name)),
            Plan::LoadDefault => {
                let _loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
                // Another container may have had it loaded meanwhile.
                if self.plan(asked)? == Plan::LoadDefault {
                    self.load_default()?;
                }
                Ok(Some(apparmor::DEFAULT.to_owned()))
            }
        }
    }

    fn plan(&self, asked: &Asked) -> Result<Plan, AppArmorError> {
        let profiles = match self.enabled && *asked != Asked::Unconfined {
            true => Some(fs::read_to_string(PROFILES).map_err(AppArmorError::Profiles)?),
            false => None,
        };
        let node = Node { profiles: profiles.as_deref(), parser: self.parser.is_some() };
        Ok(apparmor::plan(asked, node)?)
    }

    fn load_default(&self) -> Result<(), AppArmorError> {
        let Some(parser) = &self.parser else { return Ok(()) };
        let own = fs::read_to_string(OWN).unwrap_or_default();
        let own = own.rsplit_once(" (").map_or(own.as_str(), |(name, _)| name).trim();
        let own = if own.is_empty() { "unconfined" } else { own };
        load(parser, &apparmor::default_profile(own, Path::new(ABI).exists()))?;
        tracing::info!(profile = apparmor::DEFAULT, "loaded the default AppArmor profile");
        Ok(())
    }
}

/// Has the parser take a profile from its standard input.
fn load(parser: &Path, text: &str) -> Result<(), AppArmorError> {
    let failed = |source| AppArmorError::Run { parser: parser.to_path_buf(), source };
    let mut child = Command::new(parser)
        // Nothing is cached: what is read from standard input has no name to cache it by.
        .args(["--replace", "--skip-cache"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends before it has read all says why.
        let _ = input.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = match said.trim() {
        "" => output.status.to_string(),
        words => words.replace('\n', "; "),
    };
    Err(AppArmorError::Load { parser: parser.to_path_buf(), said })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// A program in the parser's place.
    fn parser(folder: &Path, script: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = folder.join("apparmor_parser");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_parser_is_given_the_profile_and_what_it_says_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let given = folder.path().join("given");
        let script = format!("echo \"$@\" > {0}; cat >> {0}", given.display());
        load(&parser(folder.path(), &script), "profile p {}\n").unwrap();
        let given = fs::read_to_string(given).unwrap();
        assert_eq!(given, "--replace --skip-cache\nprofile p {}\n");

        let refuse = parser(folder.path(), "echo 'syntax error, line 3' >&2; exit 1");
        let error = load(&refuse, &"x".repeat(1 << 20)).unwrap_err().to_string();
        assert!(error.contains("syntax error, line 3"), "{error}");
        assert!(error.contains(apparmor::DEFAULT), "{error}");
        let error = load(Path::new("/no/parser"), "").unwrap_err().to_string();
        assert!(error.contains("/no/parser"), "{error}");
    }

    #[test]
    fn where_the_kernel_has_none_only_those_who_ask_are_refused() {
        let none = AppArmor { enabled: false, parser: None, loading: Mutex::default() };
        assert_eq!(none.profile(&Asked::Nothing).unwrap(), None);
        assert_eq!(none.profile(&Asked::Unconfined).unwrap(), None);
        assert!(none.profile(&Asked::RuntimeDefault).is_err());
        assert!(none.profile(&Asked::Localhost("a".into())).is_err());
    }
}
