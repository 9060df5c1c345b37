//! Files of a container's root file system, reached without ever leaving it: an image may hold
//! symbolic links to anywhere (openat2(2), RESOLVE_IN_ROOT).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

/// The most a passwd or group file may hold, in bytes.
const MAX_FILE: u64 = 8 << 20;

/// An open root directory.
pub(super) struct Root(OwnedFd);

impl Root {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Root(File::open(path)?.into()))
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let relative: PathBuf =
            path.components().filter(|c| !matches!(c, Component::RootDir)).collect();
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { &relative };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
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
            fchownat(
                &parent,
                name,
                Some(Uid::from_raw(uid)),
                Some(Gid::from_raw(gid)),
                nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
            )?;
        }
        Ok(())
    }
}
