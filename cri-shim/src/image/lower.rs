//! What a layer takes from the layers below it, once those are in place.
//!
//! Layers are unpacked side by side, each into a folder of its own; an archive is written as if it
//! were unpacked over the others. Three things follow from what lies below: the owner and mode of
//! folders that the archive only implies; where such a folder really is, when the name below is a
//! link (`bin` to `usr/bin`); and hard links to files of lower layers. The last is left to
//! overlayfs itself, whose copy-up makes of it what it would be in a running container
//! (kernel overlayfs.rst "Non-standard behavior", hard links).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2, renameat},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::{FileStat, Mode, fchmod, fstat, futimens, mkdirat},
    unistd::{Gid, Uid, UnlinkatFlags, linkat, unlinkat},
};

use super::unpack::{
    LowerLink, UnpackError, Unpacked, bad, disk, in_root, io_disk, is_folder, is_whiteout, mode,
    stat, timespec,
};
use crate::scoped;
use crate::snapshot::{self, Rootfs, entries, remove_tree, remove_tree_at};

/// Completes the layer unpacked into `work`/d with what the layers `below` (nearest first) have.
/// Blocking; `work` has nothing more in it afterwards than before.
pub(crate) fn complete(
    work: &Path,
    unpacked: &Unpacked,
    below: &[PathBuf],
) -> Result<(), UnpackError> {
    let layer = Layer { work, files: work.join("d"), below };
    let mut moved: Vec<(PathBuf, PathBuf)> = Vec::new();
    for path in &unpacked.implicit {
        let path = follow(&moved, path);
        if layer.inherit(&path)? == Below::Link
            && let Some(real) = layer.apart(|| layer.resolve(&path))?
            && layer.graft(&path, &real)?
        {
            moved.push((path, real));
        }
    }
    if !unpacked.links.is_empty() {
        layer.apart(|| layer.link(&unpacked.links))?;
    }
    Ok(())
}

/// Where a path is after the folders that were moved.
fn follow(moved: &[(PathBuf, PathBuf)], path: &Path) -> PathBuf {
    moved.iter().fold(path.to_owned(), |path, (from, to)| match path.strip_prefix(from) {
        Ok(rest) => to.join(rest),
        Err(_) => path,
    })
}

/// What the layers below have under a folder's name.
#[derive(Debug, PartialEq, Eq)]
enum Below {
    /// A folder, or nothing.
    Plain,
    /// A symbolic link, there or on the way.
    Link,
}

struct Layer<'a> {
    work: &'a Path,
    files: PathBuf,
    below: &'a [PathBuf],
}

impl Layer<'_> {
    /// Gives an implied folder the owner, mode and times it has in the nearest layer that has it.
    fn inherit(&self, path: &Path) -> Result<Below, UnpackError> {
        let own = match straight(&open_folder(&self.files)?, path) {
            Ok(own) => own,
            // A later member took its place.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(Below::Plain),
            Err(errno) => return Err(disk("open", path)(errno)),
        };
        for lower in self.below {
            let found = match straight(&open_folder(lower)?, path) {
                Ok(found) => found,
                Err(Errno::ENOENT) => continue,
                Err(Errno::ELOOP) => return Ok(Below::Link),
                // A link in the last place is told by ENOTDIR as well; anything else, also a
                // whiteout, ends the search as it hides what is lower.
                Err(_) => {
                    let link = fs::symlink_metadata(lower.join(path)).is_ok_and(|m| m.is_symlink());
                    return Ok(if link { Below::Link } else { Below::Plain });
                }
            };
            let of = fstat(&found).map_err(disk("look at", path))?;
            let (uid, gid) = (Uid::from_raw(of.st_uid), Gid::from_raw(of.st_gid));
            nix::unistd::fchown(&own, Some(uid), Some(gid)).map_err(disk("set owner of", path))?;
            fchmod(&own, mode(of.st_mode & 0o7777)).map_err(disk("set mode of", path))?;
            let time = timespec((of.st_mtime, u32::try_from(of.st_mtime_nsec).unwrap_or(0)));
            futimens(&own, &time, &time).map_err(disk("set time of", path))?;
            break;
        }
        Ok(Below::Plain)
    }

    /// Runs `work` in a thread with a mount namespace of its own: what is mounted there goes with
    /// it, whatever happens.
    fn apart<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, UnpackError> + Send,
    ) -> Result<T, UnpackError> {
        let merged = self.merged();
        fs::create_dir_all(&merged).map_err(io_disk("create", &merged))?;
        let done = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
                    .and_then(|()| {
                        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
                    })
                    .map_err(disk("make a mount namespace for", &merged))?;
                work()
            });
            let panicked = || io_disk("join the thread of", &merged)(io::Error::other("panicked"));
            thread.join().map_err(|_| panicked()).flatten()
        });
        for rest in [merged, self.work_folder()] {
            remove_tree(&rest).map_err(io_disk("remove", &rest))?;
        }
        done
    }

    fn merged(&self) -> PathBuf {
        self.work.join("m")
    }

    fn work_folder(&self) -> PathBuf {
        self.work.join("w")
    }

    /// The folder that `path` leads to by links of the layers below; none if it leads to none.
    fn resolve(&self, path: &Path) -> Result<Option<PathBuf>, UnpackError> {
        let merged = self.merged();
        snapshot::mount_read_only(self.below, &merged, None).map_err(|error| {
            io_disk("mount the layers below at", &merged)(io::Error::other(error))
        })?;
        let root = open_folder(&merged)?;
        let Ok(found) = scoped::open(&root, path, in_root(OFlag::O_PATH | OFlag::O_DIRECTORY))
        else {
            return Ok(None);
        };
        let name_of = |fd: &OwnedFd| {
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
            fs::read_link(&link).map_err(io_disk("read", Path::new(&link)))
        };
        let (found, root) = (name_of(&found)?, name_of(&root)?);
        Ok(found.strip_prefix(&root).ok().map(Path::to_owned))
    }

    /// Moves what an implied folder holds to where it belongs. False, with nothing done, where the
    /// layer itself has something else on that way.
    fn graft(&self, path: &Path, real: &Path) -> Result<bool, UnpackError> {
        if real.starts_with(path) {
            return Ok(false);
        }
        let root = open_folder(&self.files)?;
        let mut way = PathBuf::new();
        for name in real {
            let parent = straight(&root, &way).map_err(disk("open", &way))?;
            way.push(name);
            match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => {
                    self.inherit(&way)?;
                }
                Err(Errno::EEXIST) if straight(&root, &way).is_ok() => {}
                Err(Errno::EEXIST) => return Ok(false),
                Err(errno) => return Err(disk("create folder", &way)(errno)),
            }
        }
        merge(&root, path, real)?;
        self.inherit(real)?;
        Ok(true)
    }

    /// Makes the links in an overlay of the layer over those below.
    fn link(&self, links: &[LowerLink]) -> Result<(), UnpackError> {
        let rootfs = Rootfs {
            lowerdirs: self.below.to_vec(),
            upper: self.files.clone(),
            work: self.work_folder(),
            merged: self.merged(),
            label: None,
        };
        fs::create_dir_all(&rootfs.work).map_err(io_disk("create", &rootfs.work))?;
        snapshot::mount(&rootfs).map_err(|error| {
            io_disk("mount the layers below at", &rootfs.merged)(io::Error::other(error))
        })?;
        let merged = open_folder(&rootfs.merged)?;
        let folder = |root: &OwnedFd, path: &Path| {
            let path = path.parent().filter(|path| !path.as_os_str().is_empty());
            scoped::open(
                root,
                path.unwrap_or(Path::new(".")),
                in_root(OFlag::O_PATH | OFlag::O_DIRECTORY),
            )
        };
        for LowerLink { path, target } in links {
            let (Some(name), Some(file)) = (path.file_name(), target.file_name()) else { continue };
            let to = folder(&merged, path).map_err(disk("open folder of", path))?;
            // Its place is held by a whiteout, if no later member took it.
            let (name, file) = (Path::new(name), Path::new(file));
            let there = stat(&to, name).map_err(disk("look at", path))?;
            if there.is_some_and(|there| !is_whiteout(&there)) {
                continue;
            }
            let from = folder(&merged, target);
            match from.and_then(|from| linkat(&from, file, &to, name, AtFlags::empty())) {
                Ok(()) => {}
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EEXIST) => {
                    let target = target.display();
                    let what = format!("a hard link to {target}, not in the layer nor below it");
                    return Err(bad(path, &what));
                }
                Err(Errno::EPERM) => return Err(bad(path, "a hard link to a folder")),
                Err(errno) => return Err(disk("create hard link", path)(errno)),
            }
        }
        Ok(())
    }
}

/// Moves the entries of one folder into another; what both have as folders is merged in turn.
fn merge(root: &OwnedFd, from: &Path, to: &Path) -> Result<(), UnpackError> {
    let mut todo = vec![(from.to_owned(), to.to_owned(), false)];
    while let Some((from, to, emptied)) = todo.pop() {
        if emptied {
            let (Some(parent), Some(name)) = (from.parent(), from.file_name()) else { continue };
            let parent = straight(root, parent).map_err(disk("open", parent))?;
            unlinkat(&parent, name, UnlinkatFlags::RemoveDir).map_err(disk("remove", &from))?;
            continue;
        }
        todo.push((from.clone(), to.clone(), true));
        let source = straight(root, &from).map_err(disk("open", &from))?;
        let target = straight(root, &to).map_err(disk("open", &to))?;
        for (name, _) in entries(&source).map_err(disk("read", &from))? {
            let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let look = |fd: &OwnedFd| stat(fd, name).map_err(disk("look at", &to.join(name)));
            let (ours, theirs) = (look(&source)?, look(&target)?);
            let is = |what: &Option<FileStat>| what.as_ref().is_some_and(is_folder);
            if is(&ours) && is(&theirs) {
                todo.push((from.join(name), to.join(name), false));
                continue;
            }
            // What hides something below stays hidden behind what is really there.
            if theirs.is_some() && ours.as_ref().is_some_and(is_whiteout) {
                unlinkat(&source, name, UnlinkatFlags::NoRemoveDir)
                    .map_err(disk("remove", &from.join(name)))?;
                continue;
            }
            if theirs.is_some() {
                remove_tree_at(target.as_fd(), name.as_os_str())
                    .map_err(disk("replace", &to.join(name)))?;
            }
            renameat(&source, name, &target, name).map_err(disk("move", &from.join(name)))?;
        }
    }
    Ok(())
}

fn open_folder(path: &Path) -> Result<OwnedFd, UnpackError> {
    open(path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).map_err(disk("open", path))
}

/// Opens a folder below another, by no link.
fn straight(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(root, or_here(path), how)
}

fn or_here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

#[cfg(test)]
mod tests;
