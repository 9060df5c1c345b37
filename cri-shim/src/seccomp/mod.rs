//! Seccomp filters as programs: compiled once for a profile, loaded by every process that gets it.
//!
//! Compiling the default profile for three architectures takes longer than everything else that
//! makes a container's process, so the shim does it once per profile and leaves the program in the
//! bundles; what only knows the profile compiles it itself.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::LinuxSeccomp;
use sha2::{Digest as _, Sha256};

mod compile;
mod sys;

pub use compile::{SeccompError, compile};

/// The program's file in a container's bundle.
pub const FILE: &str = "seccomp.bpf";

/// A filter as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
    /// `struct sock_filter`, one after the other.
    instructions: Vec<u8>,
}

impl Program {
    /// From this call on the calling process, and what it starts, is bound by the filter. Needs
    /// CAP_SYS_ADMIN or `no_new_privs`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn load(&self) -> io::Result<()> {
        sys::load(self.flags, &self.instructions)
    }

    fn to_bytes(&self) -> Vec<u8> {
        [&self.flags.to_le_bytes(), self.instructions.as_slice()].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (flags, instructions) = bytes.split_first_chunk::<4>()?;
        let whole = !instructions.is_empty() && instructions.len() % sys::INSTRUCTION == 0;
        whole.then(|| Program {
            flags: u32::from_le_bytes(*flags),
            instructions: instructions.to_vec(),
        })
    }
}

/// The filter of the container with this bundle: the program in it, else compiled from `profile`.
///
/// # Errors
/// When the profile cannot be compiled.
pub fn of_bundle(bundle: &Path, profile: &LinuxSeccomp) -> Result<Program, SeccompError> {
    let read = fs::read(bundle.join(FILE)).ok();
    match read.as_deref().and_then(Program::from_bytes) {
        Some(program) => Ok(program),
        None => compile(profile),
    }
}

/// The programs of the profiles in use, each a file that bundles have a link to.
#[derive(Debug)]
pub struct Programs {
    folder: PathBuf,
    known: Mutex<HashMap<[u8; 32], PathBuf>>,
}

impl Programs {
    /// `folder` must be on the bundles' file system; what an earlier version compiled there is
    /// removed.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => fs::create_dir_all(&folder)?,
        }
        Ok(Programs { folder, known: Mutex::default() })
    }

    /// Puts the program of `profile` into a bundle.
    ///
    /// # Errors
    /// When the profile cannot be compiled or the file not be made.
    pub fn place(&self, profile: &LinuxSeccomp, bundle: &Path) -> Result<(), SeccompError> {
        let text = serde_json::to_vec(profile).map_err(io::Error::from)?;
        let digest: [u8; 32] = Sha256::digest(&text).into();
        // Held while compiling, so that a burst of starts compiles once.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match known.get(&digest) {
            Some(file) => file.clone(),
            None => {
                let file = self.folder.join(known.len().to_string());
                fs::write(&file, compile(profile)?.to_bytes())?;
                known.insert(digest, file.clone());
                file
            }
        };
        drop(known);
        Ok(fs::hard_link(file, bundle.join(FILE))?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn profile(names: &[&str]) -> LinuxSeccomp {
        let text = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 42}],
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn equal_profiles_share_a_program_and_others_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let programs = Programs::open(folder.path().join("programs")).unwrap();
        let bundle = |name: &str, profile: &LinuxSeccomp| {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            programs.place(profile, &path).unwrap();
            fs::read(path.join(FILE)).unwrap()
        };
        let first = bundle("a", &profile(&["getppid"]));
        assert_eq!(first, bundle("b", &profile(&["getppid"])));
        assert_ne!(first, bundle("c", &profile(&["getpgid"])));
        assert_eq!(fs::read_dir(folder.path().join("programs")).unwrap().count(), 2);
    }

    #[test]
    fn a_damaged_program_is_compiled_anew() {
        let bundle = tempfile::tempdir().unwrap();
        let profile = profile(&["getppid"]);
        for damaged in [&b""[..], b"123", b"1234", b"12345678901"] {
            fs::write(bundle.path().join(FILE), damaged).unwrap();
            assert_eq!(of_bundle(bundle.path(), &profile).unwrap(), compile(&profile).unwrap());
        }
    }

    /// In a process of its own, as a filter cannot be taken off.
    fn with(profile: &LinuxSeccomp, asks: impl FnOnce() -> bool) -> bool {
        use nix::sys::wait::{WaitStatus, waitpid};
        let program = compile(profile).unwrap();
        let program = Program::from_bytes(&program.to_bytes()).unwrap();
        let Some(child) = crate::monitor::sys::fork().unwrap() else {
            let loaded = nix::sys::prctl::set_no_new_privs().is_ok() && program.load().is_ok();
            crate::monitor::sys::exit(if loaded && asks() { 7 } else { 1 });
        };
        waitpid(child, None).unwrap() == WaitStatus::Exited(child, 7)
    }

    #[test]
    fn a_loaded_program_answers_for_the_kernel() {
        // getppid(2) cannot fail but by a filter.
        assert!(with(&profile(&["getppid"]), || nix::unistd::getppid().as_raw() < 0));
    }

    /// `value` is the mask and `valueTwo` what is compared, as runc has it: the other way round the
    /// default profile lets every clone(2) make namespaces.
    #[test]
    fn a_masked_argument_is_compared_under_its_mask() {
        use nix::sys::signal::{Signal, kill};
        let text = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42, "args": [
                {"index": 1, "value": 0x1f, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}],
        });
        let profile: LinuxSeccomp = serde_json::from_value(text).unwrap();
        assert!(with(&profile, || {
            let own = nix::unistd::getpid();
            // Ignored unless somebody handles it.
            kill(own, Signal::SIGWINCH).is_ok() && kill(own, None).is_err()
        }));
    }
}
