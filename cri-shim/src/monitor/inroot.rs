//! Files of a container's root file system, reached without ever leaving it: an image may hold
//! symbolic links to anywhere (openat2(2), RESOLVE_IN_ROOT).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, readlinkat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

use crate::scoped;

/// The most a passwd or group file may hold, in bytes.
const MAX_FILE: u64 = 8 << 20;

/// The most symbolic links that a path may lead through, as the kernel's.
const MAX_LINKS: usize = 40;

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
        Ok(scoped::open(&self.0, relative, how)?)
    }

    /// Where a path leads to, by a path without symbolic links. Of use only where nothing changes.
    pub(super) fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        use std::os::fd::AsRawFd;
        let found = self.resolve(path, OFlag::O_PATH)?;
        std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
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
        // Images have files that are links to what only a running system has, /etc/resolv.conf for
        // one: the file is made where the link leads to.
        let mut wanted = path.to_path_buf();
        for _ in 0..MAX_LINKS {
            let (parent, name) = self.parent(&wanted)?;
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            match openat(&parent, name, flags, Mode::from_bits_truncate(0o644)) {
                Ok(_) => return self.locate(&wanted),
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            match readlinkat(&parent, name) {
                Ok(target) => {
                    let folder = wanted.parent().unwrap_or(Path::new("/"));
                    wanted = self.make(folder, 0, 0)?.join(target);
                }
                // Made by somebody else meanwhile.
                Err(_) => return self.locate(&wanted),
            }
        }
        Err(Errno::ELOOP.into())
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
        self.make(path, uid, gid).map(|_| ())
    }

    /// The same, also where links lead to what is not there. The path of the directory without
    /// links, for as long as nobody changes it.
    fn make(&self, path: &Path, uid: u32, gid: u32) -> io::Result<PathBuf> {
        let parts = |path: &Path| -> Vec<OsString> {
            path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
        };
        let (mut done, mut todo, mut links) = (PathBuf::new(), parts(path), 0);
        while let Some(name) = todo.pop() {
            match name.as_bytes() {
                b"/" => done.clear(),
                b"." => {}
                b".." => {
                    done.pop();
                }
                _ => {
                    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
                    let plain = ResolveFlag::RESOLVE_NO_SYMLINKS;
                    let parent = self.resolve_with(&done, directory, plain)?;
                    match mkdirat(&parent, name.as_os_str(), Mode::from_bits_truncate(0o755)) {
                        Ok(()) => {
                            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
                            fchownat(&parent, name.as_os_str(), owner.0, owner.1, flags)?;
                        }
                        Err(Errno::EEXIST) => {
                            if let Ok(target) = readlinkat(&parent, name.as_os_str()) {
                                links += 1;
                                if links > MAX_LINKS {
                                    return Err(Errno::ELOOP.into());
                                }
                                todo.extend(parts(Path::new(&target)));
                                continue;
                            }
                        }
                        Err(errno) => return Err(errno.into()),
                    }
                    done.push(name);
                }
            }
        }
        // Not a file.
        self.resolve(&done, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        Ok(done)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_links_lead_to_is_made_within_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join("root").join(path);
        fs::create_dir_all(at("etc")).unwrap();
        for (link, target) in [
            ("var", "/srv/data"),
            ("etc/resolv.conf", "../run/systemd/resolve/stub"),
            ("up", "../../../../outside"),
            ("chain", "up/more"),
            ("loop", "loop"),
            ("etc/loop", "/etc/loop"),
        ] {
            symlink(target, at(link)).unwrap();
        }
        fs::write(at("file"), "").unwrap();
        let root = Root::open(&at("")).unwrap();
        for (path, place, made) in [
            ("/var/run/secrets", Place::Directory, "srv/data/run/secrets"),
            ("/etc/resolv.conf", Place::File, "run/systemd/resolve/stub"),
            ("/up/in", Place::Directory, "outside/in"),
            ("/chain/file", Place::File, "outside/more/file"),
            ("plain/a/b", Place::Directory, "plain/a/b"),
            ("/chain", Place::Directory, "outside/more"),
        ] {
            let found = root.ensure(Path::new(path), place).unwrap();
            let is_file = File::from(found).metadata().unwrap().is_file();
            assert_eq!(is_file, place == Place::File, "{path}");
            assert!(at(made).exists(), "{path}");
        }
        assert!(!folder.path().join("outside").exists());
        for (path, place) in [
            ("/loop/x", Place::Directory),
            ("/loop", Place::Directory),
            ("/etc/loop", Place::File),
            ("/file/x", Place::Directory),
        ] {
            assert!(root.ensure(Path::new(path), place).is_err(), "{path}");
        }
    }
}
