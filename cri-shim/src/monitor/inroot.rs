//! Files of a container's root file system, reached without ever leaving it: an image may hold
//! symbolic links to anywhere (openat2(2), RESOLVE_IN_ROOT).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

/// The most a passwd or group file may hold, in bytes.
const MAX_FILE: u64 = 8 << 20;

/// An open root directory.
pub(super) struct Root(OwnedFd);

/// What is to be at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Directory,
    File,
}

impl Root {
    /// An open directory as root.
    pub(super) fn of(directory: OwnedFd) -> Self {
        Root(directory)
    }

    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Root(File::open(path)?.into()))
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        self.resolve_with(path, flags, ResolveFlag::empty())
    }

    fn resolve_with(&self, path: &Path, flags: OFlag, more: ResolveFlag) -> io::Result<OwnedFd> {
        let relative: PathBuf =
            path.components().filter(|c| !matches!(c, Component::RootDir)).collect();
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { &relative };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | more);
        Ok(openat2(self.0.as_fd(), relative, how)?)
    }

    /// The text of a regular file.
    pub(super) fn read(&self, path: &Path) -> io::Result<String> {
        let file = File::from(self.resolve(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// What is at a path, for naming it only (`O_PATH`).
    pub(super) fn locate(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, OFlag::O_PATH)
    }

    /// The same where no part of the path may be a symbolic link.
    pub(super) fn locate_plain(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve_with(path, OFlag::O_PATH, ResolveFlag::RESOLVE_NO_SYMLINKS)
    }

    /// What is at a path, made with its missing parents if nothing is, as root's.
    pub(super) fn ensure(&self, path: &Path, place: Place) -> io::Result<OwnedFd> {
        match self.locate(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        if place == Place::Directory {
            self.make_directory(path, 0, 0)?;
            return self.locate(path);
        }
        let (parent, name) = self.parent(path)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&parent, name, flags, Mode::from_bits_truncate(0o644)) {
            Ok(_) | Err(Errno::EEXIST) => self.locate(path),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The directory that a path is in, made if need be, and the path's last part.
    pub(super) fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path without a name"));
        };
        self.make_directory(parent, 0, 0)?;
        Ok((self.resolve(parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?, name))
    }

    /// Makes a directory and its missing parents; the new ones belong to `uid` and `gid`.
    pub(super) fn make_directory(&self, path: &Path, uid: u32, gid: u32) -> io::Result<()> {
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
        if self.resolve(path, directory).is_ok() {
            return Ok(());
        }
        let mut done = PathBuf::new();
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            let parent = self.resolve(&done, directory)?;
            done.push(name);
            if self.resolve(&done, directory).is_ok() {
                continue;
            }
            mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            fchownat(&parent, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
