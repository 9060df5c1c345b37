//! `subPath`: one path inside a volume, mounted into a container.
//!
//! What lies in a volume belongs to the pods that share it, symlinks included. The path is resolved
//! by the kernel beneath the volume's root (openat2 RESOLVE_BENEATH), and what was resolved is bound
//! by its descriptor, so that nothing can be swapped in between.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

use super::VolumeError;
use super::mounts::unmount;

/// Binds `sub_path` of the volume at `volume` onto `target`, making directories that are missing
/// (owned and permitted as the volume's root).
pub(super) fn bind(volume: &Path, sub_path: &str, target: &Path) -> Result<(), VolumeError> {
    let root = open_root(volume)?;
    let found = resolve(&root, sub_path)
        .map_err(|errno| VolumeError::io("resolve subPath in", volume)(explain(errno, sub_path)))?;
    let wanted = fstat(&found).map_err(|e| VolumeError::io("look at", volume)(e.into()))?;
    prepare_target(target, is_directory(&wanted))?;
    if same_file(target, &wanted) {
        return Ok(());
    }
    unmount(target)?;
    let source = format!("/proc/self/fd/{}", found.as_raw_fd());
    mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| VolumeError::io("bind subPath on", target)(errno.into()))
}

fn explain(errno: Errno, sub_path: &str) -> io::Error {
    match errno {
        Errno::EXDEV | Errno::ELOOP => io::Error::other(format!(
            "{sub_path:?} leads out of the volume through a symlink; it must stay inside"
        )),
        other => io::Error::other(format!("{sub_path:?}: {}", other.desc())),
    }
}

fn open_root(volume: &Path) -> Result<OwnedFd, VolumeError> {
    nix::fcntl::open(volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| VolumeError::io("open volume", volume)(errno.into()))
}

fn open_beneath(root: &OwnedFd, path: &str) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    cri_shim::scoped::open(root, path, how)
}

/// Opens `sub_path` beneath `root`, making what is missing of it as directories.
fn resolve(root: &OwnedFd, sub_path: &str) -> nix::Result<OwnedFd> {
    match open_beneath(root, sub_path) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let like = fstat(root)?;
    let mode = Mode::from_bits_truncate(like.st_mode) | Mode::S_IRWXU;
    let mut path = String::from(".");
    for part in sub_path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            return Err(Errno::EXDEV);
        }
        let parent = open_beneath(root, &path)?;
        path = format!("{path}/{part}");
        match open_beneath(root, &path) {
            Ok(_) => continue,
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        match mkdirat(parent.as_fd(), part, Mode::S_IRWXU) {
            Ok(()) => {
                let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
                let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
                fchownat(parent.as_fd(), part, Some(uid), Some(gid), flags)?;
                // By descriptor: the name may be a link by now.
                let made = openat2(
                    parent.as_fd(),
                    part,
                    OpenHow::new()
                        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
                        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS),
                )?;
                nix::sys::stat::fchmod(&made, mode)?;
            }
            // A dangling link, or somebody was quicker.
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    open_beneath(root, sub_path)
}

fn is_directory(stat: &FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR
}

/// Whether `target` already shows the file of `wanted`.
fn same_file(target: &Path, wanted: &FileStat) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(target)
        .is_ok_and(|shown| shown.dev() == wanted.st_dev && shown.ino() == wanted.st_ino)
}

/// Makes something of the right type to mount on. The folder is the agent's own: no pod writes here.
fn prepare_target(target: &Path, directory: bool) -> Result<(), VolumeError> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(VolumeError::io("create", parent))?;
    }
    match fs::symlink_metadata(target) {
        Ok(metadata) if metadata.is_dir() == directory => return Ok(()),
        // What an earlier attempt bound was of the other type.
        Ok(_) => {
            unmount(target)?;
            if let Ok(below) = fs::symlink_metadata(target)
                && below.is_dir() != directory
            {
                let removed =
                    if below.is_dir() { fs::remove_dir(target) } else { fs::remove_file(target) };
                removed.map_err(VolumeError::io("remove", target))?;
            }
        }
        Err(_) => {}
    }
    let made = if directory {
        fs::create_dir(target)
    } else {
        fs::OpenOptions::new().write(true).create_new(true).open(target).map(drop)
    };
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(VolumeError::io("create", target)),
    }
}
