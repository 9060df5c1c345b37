//! SELinux on this node: whether there is any, what its policy says of containers, and the labels of
//! files that containers are to use.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::dir::{Dir, OwningIter};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::spec::selinux::{Defaults, may_relabel};

mod sys;

/// The kernel's files of a running SELinux.
const KERNEL: &str = "/sys/fs/selinux";
/// Which policy the node has.
const CONFIG: &str = "/etc/selinux/config";

/// How deep a volume's folders may go: each holds two open descriptors while it is walked.
const MAX_DEPTH: usize = 1000;

/// The node's SELinux.
#[derive(Clone, Debug, Default)]
pub struct SeLinux {
    /// The kernel has it enabled.
    pub enabled: bool,
    /// Its policy has levels.
    pub levels: bool,
    /// Its policy's labels for containers.
    pub defaults: Option<Defaults>,
}

/// Why files were not given their label.
#[derive(Debug, thiserror::Error)]
pub enum RelabelError {
    /// A directory that is not a volume's alone.
    #[error(
        "relabelling {0} would break the node; mount a directory below it, or leave the label out"
    )]
    Shared(PathBuf),
    /// The folders go too deep.
    #[error("relabelling {0}: its folders are nested more than {MAX_DEPTH} deep")]
    Deep(PathBuf),
    /// The kernel refused.
    #[error("giving {path} the SELinux label {label}: {source}")]
    Io { path: PathBuf, label: String, source: io::Error },
}

impl SeLinux {
    /// Looks at the kernel and the policy.
    pub fn open() -> Self {
        let kernel = Path::new(KERNEL);
        if !kernel.join("enforce").exists() {
            return SeLinux::default();
        }
        let levels = fs::read_to_string(kernel.join("mls")).is_ok_and(|word| word.trim() == "1");
        let config = fs::read_to_string(CONFIG).unwrap_or_default();
        let policy = config.lines().find_map(|line| line.trim().strip_prefix("SELINUXTYPE="));
        let defaults = policy.and_then(|policy| {
            let path = Path::new("/etc/selinux").join(policy.trim()).join("contexts/lxc_contexts");
            Defaults::parse(&fs::read_to_string(path).ok()?)
        });
        SeLinux { enabled: true, levels, defaults }
    }
}

/// Gives a file, or a directory with all that is in it, a label. File systems that have none are
/// left as they are.
///
/// Containers may change what is in there meanwhile: nothing is reached by a path, and no symbolic
/// link is followed.
///
/// # Errors
/// For a directory of the node's own, and the kernel's.
pub fn relabel(path: &Path, label: &str) -> Result<(), RelabelError> {
    let failed = |source: io::Error| RelabelError::Io {
        path: path.to_path_buf(),
        label: label.to_owned(),
        source,
    };
    // Where the path leads to, as what is mounted is.
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let top = open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    let real = fs::read_link(descriptor(&top)).map_err(failed)?;
    if !may_relabel(&real) {
        return Err(RelabelError::Shared(real));
    }
    walk(top, label).map_err(|e| match e {
        Walk::Deep => RelabelError::Deep(path.to_path_buf()),
        Walk::Io(e) => failed(e),
    })
}

/// Gives one folder a label, and nothing that is in it.
///
/// # Errors
/// The kernel's.
pub fn label_folder(path: &Path, label: &str) -> Result<(), RelabelError> {
    let file = fs::File::open(path).and_then(|folder| label_one(&folder, label));
    let said = |source| RelabelError::Io { path: path.into(), label: label.to_owned(), source };
    file.map_err(said)
}

/// Whether what is at a path has just this label.
pub fn has_label(path: impl AsRef<Path>, label: &str) -> bool {
    path.as_ref().to_str().and_then(sys::label).is_some_and(|is| is == label.as_bytes())
}

enum Walk {
    Deep,
    Io(io::Error),
}

impl From<io::Error> for Walk {
    fn from(error: io::Error) -> Self {
        Walk::Io(error)
    }
}

impl From<Errno> for Walk {
    fn from(errno: Errno) -> Self {
        Walk::Io(errno.into())
    }
}

fn walk(top: OwnedFd, label: &str) -> Result<(), Walk> {
    let mut open = Vec::new();
    open.extend(enter(top, label)?);
    while let Some((directory, entries)) = open.last_mut() {
        let Some(entry) = entries.next() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = match openat(&*directory, name, flags, Mode::empty()) {
            // Removed meanwhile.
            Err(Errno::ENOENT) => continue,
            found => found?,
        };
        if let Some(below) = enter(found, label)? {
            if open.len() >= MAX_DEPTH {
                return Err(Walk::Deep);
            }
            open.push(below);
        }
    }
    Ok(())
}

/// Labels one thing; a directory's entries are to be labelled next.
fn enter(found: OwnedFd, label: &str) -> Result<Option<(OwnedFd, OwningIter)>, Walk> {
    label_one(&found, label)?;
    let mode = SFlag::from_bits_truncate(fstat(&found)?.st_mode) & SFlag::S_IFMT;
    if mode != SFlag::S_IFDIR {
        return Ok(None);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let entries = Dir::openat(&found, c".", flags, Mode::empty())?.into_iter();
    Ok(Some((found, entries)))
}

/// The path by which a descriptor is known to its own process.
fn descriptor(file: &impl AsFd) -> String {
    format!("/proc/thread-self/fd/{}", file.as_fd().as_raw_fd())
}

/// Labels what a descriptor stands for, a symbolic link too.
///
/// # Errors
/// The kernel's, but not for a file system without labels, nor for one that cannot be written to.
pub fn label_one(file: &impl AsFd, label: &str) -> io::Result<()> {
    // A descriptor of the kind that only names something has no fsetxattr(2).
    let path = descriptor(file);
    if has_label(&path, label) {
        return Ok(());
    }
    match sys::set_label(&path, label) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EROFS)) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const LABEL: &str = "system_u:object_r:container_file_t:s0:c1,c2";

    fn label_of(path: &Path) -> Option<String> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = open(path, flags, Mode::empty()).unwrap();
        sys::label(&descriptor(&file)).map(|label| String::from_utf8(label).unwrap())
    }

    /// A kernel without SELinux keeps the attribute as any other.
    #[test]
    fn all_of_a_volume_is_labelled_and_nothing_that_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let (volume, outside) = (folder.path().join("volume"), folder.path().join("outside"));
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        for file in [volume.join("file"), volume.join("a/b/deep"), outside.join("file")] {
            fs::write(file, "").unwrap();
        }
        std::os::unix::fs::symlink(&outside, volume.join("a/link")).unwrap();
        relabel(&volume, LABEL).unwrap();
        // Again, where it is there already.
        relabel(&volume, LABEL).unwrap();
        for path in ["", "file", "a", "a/b", "a/b/deep"] {
            assert_eq!(label_of(&volume.join(path)).as_deref(), Some(LABEL), "{path}");
        }
        assert_eq!(label_of(&outside), None);
        assert_eq!(label_of(&outside.join("file")), None);
        let other = LABEL.replace("c1,c2", "c3,c4");
        relabel(&volume.join("file"), &other).unwrap();
        assert_eq!(label_of(&volume.join("file")), Some(other));
        assert_eq!(label_of(&volume.join("a")).as_deref(), Some(LABEL));
    }

    #[test]
    fn the_nodes_directories_are_refused_also_by_another_name() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/usr", &link).unwrap();
        for path in [Path::new("/etc"), &link] {
            let error = relabel(path, LABEL).unwrap_err();
            assert!(matches!(error, RelabelError::Shared(_)), "{error}");
        }
        let error = relabel(&folder.path().join("nothing"), LABEL).unwrap_err().to_string();
        assert!(error.contains("nothing") && error.contains(LABEL), "{error}");
    }
}
