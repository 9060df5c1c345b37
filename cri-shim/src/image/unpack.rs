//! Unpacking a layer into a folder, whatever its author had in mind.
//!
//! Every path is resolved by the kernel below the layer's folder (openat2 with RESOLVE_IN_ROOT), so
//! neither `..`, nor absolute names, nor links planted by earlier members lead outside. OCI
//! whiteouts become overlayfs' own: a character device 0:0 for a removed name, and
//! `trusted.overlay.opaque` for a folder whose lower content is hidden
//! (image-spec layer.md "Whiteouts"; kernel overlayfs.rst "whiteouts and opaque directories").

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat},
    sys::{
        stat::{
            FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, mkdirat, mknodat,
            utimensat,
        },
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};

use super::{
    sys,
    tar_stream::{Kind, Member, TarError, TarStream},
};
use crate::scoped;
use crate::snapshot::remove_tree_at;

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// The most bytes of folder names kept until their times are set.
const MAX_FOLDER_NAMES: usize = 128 << 20;

/// What one layer may grow to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Folders that members lie in but that the layer does not describe: they get their owner and
    /// mode from the layers below.
    pub(crate) implicit: Vec<PathBuf>,
    /// Hard links to files that are not in the layer, so must be in one below.
    pub(crate) links: Vec<LowerLink>,
}

impl Unpacked {
    /// Whether the layer's files follow from its own archive alone.
    pub(crate) fn stands_alone(&self) -> bool {
        self.implicit.is_empty() && self.links.is_empty()
    }
}

/// A hard link that [`super::lower::complete`] makes when the layers below are in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LowerLink {
    pub(crate) path: PathBuf,
    pub(crate) target: PathBuf,
}

/// Why a layer can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    /// The archive is malformed or hostile.
    #[error("{0}")]
    Archive(String),
    /// The stream broke off or does not decompress.
    #[error("{0}")]
    Source(io::Error),
    /// The disk refused.
    #[error("{operation} {path}: {source}")]
    Disk { operation: &'static str, path: PathBuf, source: io::Error },
}

impl From<TarError> for UnpackError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Format(text) => Self::Archive(text),
            TarError::Read(error) => Self::Source(error),
        }
    }
}

/// Unpacks `tar` into `folder`, which exists and is empty.
pub(crate) fn unpack<R: Read>(
    tar: &mut TarStream<R>,
    folder: &Path,
    limits: Limits,
) -> Result<Unpacked, UnpackError> {
    let root = open(folder, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(disk("open", folder))?;
    let mut layer = Layer {
        root,
        limits,
        done: Unpacked::default(),
        times: Vec::new(),
        names: 0,
        parent: None,
        buffer: vec![0; 128 * 1024],
    };
    while let Some(member) = tar.next()? {
        layer.add(&member, tar)?;
    }
    layer.set_folder_times();
    Ok(layer.done)
}

struct Layer {
    root: OwnedFd,
    limits: Limits,
    done: Unpacked,
    /// Folders and their times, set last as each new entry would change them.
    times: Vec<(PathBuf, (i64, u32))>,
    names: usize,
    /// The folder of the last member: most follow one another in the same.
    parent: Option<(PathBuf, OwnedFd)>,
    buffer: Vec<u8>,
}

impl Layer {
    fn add(&mut self, member: &Member, data: &mut impl Read) -> Result<(), UnpackError> {
        self.done.inodes += 1;
        if self.done.inodes > self.limits.entries {
            return Err(UnpackError::Archive(format!("more than {} files", self.limits.entries)));
        }
        let path = clean(&member.path)?;
        let Some(name) = path.file_name() else {
            // The layer's own root.
            if member.kind == Kind::Directory {
                let root = self.root.try_clone().map_err(UnpackError::Source)?;
                self.describe(root.as_fd(), Path::new(""), member)?;
                self.later(Path::new(""), member.mtime)?;
            }
            return Ok(());
        };
        let name = Path::new(name);
        let folder = path.parent().unwrap_or(Path::new(""));
        let parent = self.open_parent(folder)?;
        let result = self.place(&parent, &path, name, member, data);
        self.parent = match result {
            // Replacing a folder or link may change where a path leads.
            Ok(Replaced::Other) => None,
            Ok(Replaced::Nothing) => Some((folder.to_owned(), parent)),
            Err(error) => return Err(error),
        };
        Ok(())
    }

    fn place(
        &mut self,
        parent: &OwnedFd,
        path: &Path,
        name: &Path,
        member: &Member,
        data: &mut impl Read,
    ) -> Result<Replaced, UnpackError> {
        if let Some(hidden) = name.as_os_str().as_bytes().strip_prefix(b".wh.") {
            return self.white_out(parent, path, Path::new(std::ffi::OsStr::from_bytes(hidden)));
        }
        if member.kind == Kind::Device {
            // Nodes would open the host's devices, and 0:0 would pass for a whiteout. /dev is
            // mounted over in every container.
            tracing::debug!(path = %path.display(), "device node in image layer left out");
            self.done.inodes -= 1;
            return Ok(Replaced::Nothing);
        }
        let before = stat(parent, name).map_err(disk("look at", path))?;
        let keep = member.kind == Kind::Directory && before.as_ref().is_some_and(is_folder);
        let mut replaced = Replaced::Nothing;
        let mut opaque = false;
        if let Some(before) = before.filter(|_| !keep) {
            opaque = is_whiteout(&before);
            if !is_file(&before) {
                replaced = Replaced::Other;
            }
            remove(parent, name, &before).map_err(disk("replace", path))?;
        }
        match member.kind {
            Kind::File => self.write(parent, path, name, member, data)?,
            Kind::Directory => {
                if !keep {
                    mkdirat(parent, name, Mode::S_IRWXU).map_err(disk("create folder", path))?;
                }
                let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let folder = openat(parent, name, flags, Mode::empty())
                    .map_err(disk("open folder", path))?;
                if opaque {
                    sys::set_xattr(&folder, OPAQUE, b"y").map_err(io_disk("mark opaque", path))?;
                }
                self.describe(folder.as_fd(), path, member)?;
                self.later(path, member.mtime)?;
            }
            Kind::Symlink => {
                if member.link.is_empty() || member.link.contains(&0) {
                    return Err(bad(path, "a symbolic link without a target"));
                }
                let target = std::ffi::OsStr::from_bytes(&member.link);
                symlinkat(target, parent, name).map_err(disk("create link", path))?;
                self.own(parent, path, name, member)?;
            }
            Kind::HardLink => {
                let target = clean(&member.link)?;
                let (Some(from), Some(file)) = (target.parent(), target.file_name()) else {
                    return Err(bad(path, "a hard link to the root"));
                };
                let linked =
                    self.open_below(from).and_then(|from| match stat(&from, Path::new(file))? {
                        Some(there) if !is_whiteout(&there) => {
                            linkat(&from, file, parent, name, AtFlags::empty())
                        }
                        _ => Err(Errno::ENOENT),
                    });
                match linked {
                    Ok(()) => {}
                    Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
                        // A whiteout keeps the place, which later members may still take.
                        mknodat(parent, name, SFlag::S_IFCHR, Mode::empty(), 0)
                            .map_err(disk("keep the place of", path))?;
                        self.count_name(path)?;
                        self.count_name(&target)?;
                        self.done.links.push(LowerLink { path: path.to_owned(), target });
                    }
                    Err(Errno::EPERM) => return Err(bad(path, "a hard link to a folder")),
                    Err(errno) => return Err(disk("create hard link", path)(errno)),
                }
            }
            Kind::Fifo => {
                mknodat(parent, name, SFlag::S_IFIFO, mode(member.mode), 0)
                    .map_err(disk("create pipe", path))?;
                self.own(parent, path, name, member)?;
            }
            Kind::Device => {}
        }
        Ok(replaced)
    }

    fn write(
        &mut self,
        parent: &OwnedFd,
        path: &Path,
        name: &Path,
        member: &Member,
        data: &mut impl Read,
    ) -> Result<(), UnpackError> {
        self.done.bytes = self.done.bytes.saturating_add(member.size);
        if self.done.bytes > self.limits.bytes {
            return Err(UnpackError::Archive(format!(
                "it unpacks to more than {} bytes",
                self.limits.bytes
            )));
        }
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(parent, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(disk("create", path))?;
        let mut file = std::fs::File::from(file);
        match &member.sparse {
            None => self.copy(data, &mut file, path)?,
            Some(map) => {
                for (offset, length) in &map.pieces {
                    file.seek(SeekFrom::Start(*offset)).map_err(io_disk("seek in", path))?;
                    self.copy(&mut data.take(*length), &mut file, path)?;
                }
                file.set_len(map.size).map_err(io_disk("set size of", path))?;
            }
        }
        self.describe(file.as_fd(), path, member)?;
        let time = timespec(member.mtime);
        futimens(&file, &time, &time).map_err(disk("set time of", path))
    }

    fn copy(
        &mut self,
        data: &mut impl Read,
        file: &mut std::fs::File,
        path: &Path,
    ) -> Result<(), UnpackError> {
        loop {
            let read = match data.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(UnpackError::Source(error)),
            };
            file.write_all(&self.buffer[..read]).map_err(io_disk("write", path))?;
        }
    }

    /// Owner, mode and extended attributes of an open file or folder. The owner comes first: a
    /// change of it clears set-user-ID bits and capabilities.
    fn describe(&self, file: BorrowedFd, path: &Path, member: &Member) -> Result<(), UnpackError> {
        nix::unistd::fchown(file, Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))
            .map_err(disk("set owner of", path))?;
        fchmod(file, mode(member.mode)).map_err(disk("set mode of", path))?;
        for (name, value) in &member.xattrs {
            // Others are the host's business: labels of its policy, overlayfs' own markers.
            let wanted = name == b"security.capability"
                || name.strip_prefix(b"user.").is_some_and(|n| !n.starts_with(b"overlay."));
            if !wanted {
                continue;
            }
            match sys::set_xattr(file, name, value) {
                // The filesystem keeps no attributes of users; capabilities it must keep.
                Err(error)
                    if error.raw_os_error() == Some(libc::EOPNOTSUPP)
                        && name != b"security.capability" => {}
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::E2BIG | libc::ERANGE | libc::EINVAL)
                    ) =>
                {
                    return Err(bad(path, &format!("an extended attribute: {error}")));
                }
                other => other.map_err(io_disk("set extended attribute of", path))?,
            }
        }
        Ok(())
    }

    /// Owner and time of a link or pipe, by name.
    fn own(
        &self,
        parent: &OwnedFd,
        path: &Path,
        name: &Path,
        member: &Member,
    ) -> Result<(), UnpackError> {
        let (uid, gid) = (Uid::from_raw(member.uid), Gid::from_raw(member.gid));
        fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(disk("set owner of", path))?;
        let time = timespec(member.mtime);
        utimensat(parent, name, &time, &time, UtimensatFlags::NoFollowSymlink)
            .map_err(disk("set time of", path))
    }

    fn white_out(
        &mut self,
        parent: &OwnedFd,
        path: &Path,
        hidden: &Path,
    ) -> Result<Replaced, UnpackError> {
        let bytes = hidden.as_os_str().as_bytes();
        if bytes == b".wh..opq" {
            let here = openat(parent, ".", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(disk("open folder of", path))?;
            sys::set_xattr(&here, OPAQUE, b"y").map_err(io_disk("mark opaque", path))?;
            return Ok(Replaced::Nothing);
        }
        if bytes.starts_with(b".wh.") {
            // Leftovers of aufs, such as `.wh..wh.plnk`.
            return Ok(Replaced::Nothing);
        }
        if matches!(bytes, b"" | b"." | b"..") {
            return Err(bad(path, "a whiteout without a name"));
        }
        match stat(parent, hidden).map_err(disk("look at", path))? {
            // A whiteout hides what is below; what this layer itself adds stays.
            Some(own) if is_folder(&own) => {
                let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let folder = openat(parent, hidden, flags, Mode::empty())
                    .map_err(disk("open folder", path))?;
                sys::set_xattr(&folder, OPAQUE, b"y").map_err(io_disk("mark opaque", path))?;
            }
            Some(_) => {}
            None => mknodat(parent, hidden, SFlag::S_IFCHR, Mode::empty(), 0)
                .map_err(disk("create whiteout", path))?,
        }
        Ok(Replaced::Nothing)
    }

    /// The folder a member lies in, made where the archive left it out.
    fn open_parent(&mut self, folder: &Path) -> Result<OwnedFd, UnpackError> {
        if let Some((path, fd)) = self.parent.take()
            && path == folder
        {
            return Ok(fd);
        }
        match self.open_below(folder) {
            Ok(fd) => return Ok(fd),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => return Err(disk("open", folder)(errno)),
        }
        let mut path = PathBuf::new();
        let mut parent = self.root.try_clone().map_err(UnpackError::Source)?;
        for name in folder {
            path.push(name);
            let opened = match self.open_below(&path) {
                Err(Errno::ENOENT | Errno::ENOTDIR) => {
                    self.make_implicit(&parent, &path, Path::new(name))?;
                    self.open_below(&path)
                }
                opened => opened,
            };
            parent = opened.map_err(disk("open", &path))?;
        }
        Ok(parent)
    }

    fn make_implicit(
        &mut self,
        parent: &OwnedFd,
        path: &Path,
        name: &Path,
    ) -> Result<(), UnpackError> {
        let before = stat(parent, name).map_err(disk("look at", path))?;
        let opaque = match &before {
            None => false,
            Some(before) if is_whiteout(before) => {
                remove(parent, name, before).map_err(disk("replace", path))?;
                true
            }
            Some(_) => return Err(bad(path, "members below something that is no folder")),
        };
        let open_mode = Mode::from_bits_truncate(0o755);
        mkdirat(parent, name, open_mode).map_err(disk("create folder", path))?;
        self.done.inodes += 1;
        if opaque {
            let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let folder =
                openat(parent, name, flags, Mode::empty()).map_err(disk("open folder", path))?;
            sys::set_xattr(&folder, OPAQUE, b"y").map_err(io_disk("mark opaque", path))?;
        } else {
            self.count_name(path)?;
            self.done.implicit.push(path.to_owned());
        }
        Ok(())
    }

    fn open_below(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        scoped::open(&self.root, path, in_root(OFlag::O_PATH | OFlag::O_DIRECTORY))
    }

    fn later(&mut self, path: &Path, mtime: (i64, u32)) -> Result<(), UnpackError> {
        self.count_name(path)?;
        self.times.push((path.to_owned(), mtime));
        Ok(())
    }

    fn count_name(&mut self, path: &Path) -> Result<(), UnpackError> {
        self.names += path.as_os_str().len() + 64;
        if self.names > MAX_FOLDER_NAMES {
            return Err(UnpackError::Archive("its folders' names take too much memory".to_owned()));
        }
        Ok(())
    }

    fn set_folder_times(&mut self) {
        for (path, mtime) in self.times.drain(..).rev() {
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path.as_path() };
            // A folder that a later member replaced has no time to set.
            if let Ok(folder) =
                scoped::open(&self.root, path, in_root(OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW))
            {
                let time = timespec(mtime);
                let _ = futimens(&folder, &time, &time);
            }
        }
    }
}

enum Replaced {
    Nothing,
    Other,
}

pub(super) fn in_root(flags: OFlag) -> OpenHow {
    OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

/// A member's path without `.`, doubled and outer slashes. `..` is refused: no writer of images uses it.
fn clean(path: &[u8]) -> Result<PathBuf, UnpackError> {
    let shown = || String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned();
    if path.len() > 4096 || path.contains(&0) {
        return Err(UnpackError::Archive(format!("{}: not a path", shown())));
    }
    let mut clean = PathBuf::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                return Err(UnpackError::Archive(format!("{}: leads out of the layer", shown())));
            }
            part => clean.push(std::ffi::OsStr::from_bytes(part)),
        }
    }
    Ok(clean)
}

pub(super) fn stat(parent: &OwnedFd, name: &Path) -> Result<Option<FileStat>, Errno> {
    match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn remove(parent: &OwnedFd, name: &Path, what: &FileStat) -> Result<(), Errno> {
    if !is_folder(what) {
        return unlinkat(parent, name, UnlinkatFlags::NoRemoveDir);
    }
    remove_tree_at(parent.as_fd(), name.as_os_str())
}

fn format_of(stat: &FileStat) -> u32 {
    stat.st_mode & libc::S_IFMT
}

pub(super) fn is_folder(stat: &FileStat) -> bool {
    format_of(stat) == libc::S_IFDIR
}

fn is_file(stat: &FileStat) -> bool {
    format_of(stat) == libc::S_IFREG
}

pub(super) fn is_whiteout(stat: &FileStat) -> bool {
    format_of(stat) == libc::S_IFCHR && stat.st_rdev == 0
}

pub(super) fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits)
}

pub(super) fn timespec((seconds, nanos): (i64, u32)) -> TimeSpec {
    TimeSpec::new(seconds, i64::from(nanos))
}

pub(super) fn bad(path: &Path, what: &str) -> UnpackError {
    UnpackError::Archive(format!("{}: {what}", path.display()))
}

/// Errors that the archive's content causes are its fault, not the disk's.
pub(super) fn disk(operation: &'static str, path: &Path) -> impl FnOnce(Errno) -> UnpackError {
    let path = path.to_owned();
    move |errno| match errno {
        Errno::ENAMETOOLONG | Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV => {
            UnpackError::Archive(format!("{operation} {}: {}", path.display(), errno.desc()))
        }
        errno => UnpackError::Disk { operation, path, source: errno.into() },
    }
}

pub(super) fn io_disk(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> UnpackError {
    let path = path.to_owned();
    move |source| match source.raw_os_error() {
        // Larger than the filesystem lets any file be: a hole may claim any size.
        Some(libc::EFBIG) => {
            UnpackError::Archive(format!("{operation} {}: {source}", path.display()))
        }
        _ => UnpackError::Disk { operation, path, source },
    }
}

#[cfg(test)]
pub(super) mod tests;
