//! Takes a pod's folder away: unmounts what is below it, then deletes without following a link and
//! without entering a mount, so that a volume that could not be unmounted loses nothing.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::VolumeError;
use super::mounts::{mounts_below, unmount};

/// Rounds of looking for mounts: they may be stacked, or appear while we look.
const ROUNDS: usize = 16;

/// Removes `directory` and everything in it.
pub(super) fn remove_tree(directory: &Path) -> Result<(), VolumeError> {
    match std::fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(VolumeError::io("look at", directory)(error)),
        Ok(metadata) if !metadata.is_dir() => {
            return std::fs::remove_file(directory).map_err(VolumeError::io("remove", directory));
        }
        Ok(_) => {}
    }
    unmount_below(directory)?;
    let removed = open_directory(nix::fcntl::AT_FDCWD, directory).and_then(empty);
    removed.map_err(|errno| VolumeError::io("empty", directory)(errno.into()))?;
    match std::fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(VolumeError::io("remove", directory)),
    }
}

/// Takes away what is mounted at and below `directory`, which need not exist.
pub(super) fn unmount_below(directory: &Path) -> Result<(), VolumeError> {
    for _ in 0..ROUNDS {
        let mut points = mounts_below(directory)?;
        if points.is_empty() {
            break;
        }
        // The last made may lie on an earlier one.
        points.reverse();
        for point in points {
            unmount(&point)?;
        }
    }
    Ok(())
}

fn open_directory<P: ?Sized + nix::NixPath>(at: impl AsFd, name: &P) -> nix::Result<Dir> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .mode(Mode::empty());
    Dir::from_fd(openat2(at, name, how)?)
}

/// As `open_directory`, refusing to cross into a mount.
fn open_below(at: BorrowedFd<'_>, name: &CStr) -> nix::Result<Dir> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Dir::from_fd(openat2(at, name, how)?)
}

/// Directories held open at once while descending.
const MAX_OPEN: usize = 64;

/// Empties the directory with an explicit stack: a pod can nest deeper than a thread's stack, and
/// deeper than there are file descriptors; what lies too deep is first moved up.
fn empty(root: Dir) -> nix::Result<()> {
    let top = root.as_fd().try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
    let mut moved = 0_u64;
    let mut stack = vec![(root, None::<CString>)];
    loop {
        let depth = stack.len();
        let Some((directory, _)) = stack.last_mut() else { return Ok(()) };
        let mut descend = None;
        let mut done = true;
        // Read anew after each descent: what was read before has been removed.
        let names: Vec<_> = directory
            .iter()
            .filter_map(Result::ok)
            .map(|entry| (entry.file_name().to_owned(), entry.file_type()))
            .filter(|(name, _)| !matches!(name.to_bytes(), b"." | b".."))
            .collect();
        for (name, kind) in names {
            let is_directory = match kind {
                Some(kind) => kind == Type::Directory,
                None => {
                    let stat = fstatat(
                        directory.as_fd(),
                        name.as_c_str(),
                        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
                    )?;
                    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
                }
            };
            if !is_directory {
                ignore_absent(unlinkat(
                    directory.as_fd(),
                    name.as_c_str(),
                    UnlinkatFlags::NoRemoveDir,
                ))?;
                continue;
            }
            match unlinkat(directory.as_fd(), name.as_c_str(), UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                    descend = Some(name);
                    done = false;
                    break;
                }
                Err(errno) => return Err(errno),
            }
        }
        if let Some(name) = descend.as_ref().filter(|_| depth > MAX_OPEN) {
            moved += 1;
            let up = format!(".deep-{}-{moved}", std::process::id());
            renameat(directory.as_fd(), name.as_c_str(), &top, up.as_str())?;
        } else if let Some(name) = descend {
            let below = open_below(directory.as_fd(), &name)?;
            stack.push((below, Some(name)));
        } else if done {
            let finished = stack.pop().and_then(|(_, name)| name);
            if let (Some(name), Some((parent, _))) = (finished, stack.last_mut()) {
                ignore_absent(unlinkat(parent.as_fd(), name.as_c_str(), UnlinkatFlags::RemoveDir))?;
            }
        }
    }
}

fn ignore_absent(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_any_depth_goes_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        std::fs::create_dir(&precious).unwrap();
        std::fs::write(precious.join("file"), "kept").unwrap();
        let root = dir.path().join("pod");
        std::fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink(&precious, root.join("link")).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        // Deeper than PATH_MAX allows to name at once.
        let mut at = open_directory(nix::fcntl::AT_FDCWD, &root).unwrap();
        for _ in 0..3000 {
            nix::sys::stat::mkdirat(at.as_fd(), "ddd", Mode::S_IRWXU).unwrap();
            nix::sys::stat::mkdirat(at.as_fd(), "e", Mode::S_IRWXU).unwrap();
            at = open_directory(at.as_fd(), "ddd").unwrap();
        }
        drop(at);
        remove_tree(&root).unwrap();
        assert!(!root.exists());
        assert_eq!(std::fs::read_to_string(precious.join("file")).unwrap(), "kept");
        remove_tree(&root).unwrap();
    }
}
