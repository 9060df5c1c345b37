//! Mounts that are made first and put somewhere afterwards.
//!
//! A mount is a descriptor here (kernel 5.12 for its attributes), so that nobody sees it before it
//! is as it should be, and its place is a descriptor too: what a path leads to is decided once,
//! when it is opened, and cannot be changed under our hands by whoever may write to the file system.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

mod sys;

/// `MOUNT_ATTR_*` flags (linux/mount.h).
pub mod attr {
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// A mount that is nowhere yet. Dropping it unmounts it, unless it was put somewhere.
#[derive(Debug)]
pub struct Detached(OwnedFd);

impl Detached {
    /// A new file system of `kind` with options (`key=value`, or a flag).
    ///
    /// # Errors
    /// The kernel's, with what it logged.
    pub fn new(kind: &str, source: &str, options: &[String], attributes: u64) -> io::Result<Self> {
        let context = sys::fsopen(&c_string(Path::new(kind))?)?;
        let context = context.as_fd();
        if !source.is_empty() {
            // Only a name to be shown; not every file system takes one.
            let _ = sys::set(context, c"source", Some(&c_string(Path::new(source))?));
        }
        for option in options {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(c_string(Path::new(value))?)),
                None => (option.as_str(), None),
            };
            sys::set(context, &c_string(Path::new(key))?, value.as_deref())
                .map_err(|e| io::Error::new(e.kind(), format!("option {option:?}: {e}")))?;
        }
        sys::create(context)?;
        Ok(Detached(sys::fsmount(context, attributes)?))
    }

    /// An overlay, each layer an option of its own (kernel 6.5: Documentation/filesystems/
    /// overlayfs.rst, "lowerdir+"), uppermost first.
    ///
    /// # Errors
    /// The kernel's, with what it logged.
    pub fn overlay<'a>(
        lower: impl IntoIterator<Item = &'a Path>,
        upper: &Path,
        work: &Path,
        label: Option<&str>,
    ) -> io::Result<Self> {
        let context = sys::fsopen(c"overlay")?;
        let context = context.as_fd();
        let set = |key: &CStr, value: &Path| sys::set(context, key, Some(&c_string(value)?));
        set(c"source", Path::new("overlay"))?;
        for layer in lower {
            set(c"lowerdir+", layer)?;
        }
        set(c"upperdir", upper)?;
        set(c"workdir", work)?;
        if let Some(label) = label {
            set(c"context", Path::new(label))?;
        }
        // Only a matter of speed: an older kernel refuses the option, and the mount goes on without.
        let _ = sys::set(context, c"volatile", None);
        sys::create(context)?;
        Ok(Detached(sys::fsmount(context, 0)?))
    }

    /// A copy of what is mounted at `path`, with what is mounted below it when `recursive`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn copy(path: &Path, recursive: bool) -> io::Result<Self> {
        Ok(Detached(sys::open_tree(libc::AT_FDCWD, &c_string(path)?, recursive)?))
    }

    /// A copy of what an open file or directory is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn copy_of(file: &impl AsFd, recursive: bool) -> io::Result<Self> {
        Ok(Detached(sys::open_tree(file.as_fd().as_raw_fd(), c"", recursive)?))
    }

    /// Sets attributes; others stay as they are.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set(&self, attributes: u64, recursive: bool) -> io::Result<()> {
        sys::setattr(self.0.as_fd(), recursive, attributes, 0)
    }

    /// From now on the files of the topmost mount belong to whom the user namespace maps their
    /// owners to.
    ///
    /// # Errors
    /// The kernel's: EINVAL where the file system cannot be id-mapped, ENOSYS before Linux 5.12.
    pub fn map_ids(&self, userns: &impl AsFd) -> io::Result<()> {
        sys::map_ids(self.0.as_fd(), userns.as_fd())
    }

    /// Sets the propagation, one of `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn propagate(&self, how: u64, recursive: bool) -> io::Result<()> {
        sys::setattr(self.0.as_fd(), recursive, 0, how)
    }

    /// Puts it over an open file or directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(self, target: &impl AsFd) -> io::Result<()> {
        self.place(target)
    }

    /// The same, and keeps it at hand, to make copies of.
    ///
    /// # Errors
    /// The kernel's.
    pub fn place(&self, target: &impl AsFd) -> io::Result<()> {
        sys::move_mount(self.0.as_fd(), target.as_fd().as_raw_fd(), c"")
    }

    /// Puts it over the working directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach_here(&self) -> io::Result<()> {
        sys::move_mount(self.0.as_fd(), libc::AT_FDCWD, c"")
    }

    /// Puts it at a path that nobody else can change.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach_at(self, target: &Path) -> io::Result<()> {
        sys::move_mount(self.0.as_fd(), libc::AT_FDCWD, &c_string(target)?)
    }
}

impl AsFd for Detached {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes the mount at an open directory read-only.
///
/// # Errors
/// The kernel's.
pub fn make_read_only(mounted: &impl AsFd) -> io::Result<()> {
    sys::setattr(mounted.as_fd(), false, attr::RDONLY, 0)
}

/// The option of mount(2) that has all files of a file system labelled for SELinux, after others. A
/// label with categories has a comma, hence the quotes.
pub fn context_option(label: &str) -> String {
    format!(",context=\"{label}\"")
}

/// The same for fsconfig(2), and so for [`Detached::new`].
pub fn context(label: &str) -> String {
    format!("context={label}")
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
