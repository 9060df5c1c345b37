//! Mounts as the kernel has them, and the few kinds made here.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};

use super::VolumeError;

/// Mount points at or below `root`, in the order in which they were made.
pub(super) fn mounts_below(root: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let table = Path::new("/proc/thread-self/mountinfo");
    let text = std::fs::read(table).map_err(VolumeError::io("read", table))?;
    Ok(mount_points(&text).into_iter().filter(|point| point.starts_with(root)).collect())
}

/// The mount points of a mountinfo: the fifth field of each line (proc_pid_mountinfo(5)), with its
/// octal escapes undone.
pub(crate) fn mount_points(text: &[u8]) -> Vec<PathBuf> {
    text.split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let octal = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// Whether `path` is the root of a mount of type `kind`.
pub(super) fn is_mounted(path: &Path, kind: FsType) -> bool {
    let device = |path: &Path| std::fs::symlink_metadata(path).map(|m| m.dev()).ok();
    let apart = path.parent().is_some_and(|parent| device(path) != device(parent));
    apart && statfs(path).is_ok_and(|stat| stat.filesystem_type() == kind)
}

/// Mounts a tmpfs of at most `size` bytes on `path`, unless one is there. Without swap where the
/// kernel can (6.4), as it may hold secrets.
pub(super) fn mount_tmpfs(path: &Path, size: Option<u64>, secret: bool) -> Result<(), VolumeError> {
    if is_mounted(path, TMPFS_MAGIC) {
        return Ok(());
    }
    let size = size.map(|bytes| format!("size={bytes}"));
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let flags = if secret { flags | MsFlags::MS_NOEXEC } else { MsFlags::empty() };
    let attempt = |options: &[&str]| {
        let options = options.join(",");
        mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str()))
    };
    let base: Vec<&str> = size.as_deref().into_iter().collect();
    let mut result = Err(nix::errno::Errno::EINVAL);
    if secret {
        result = attempt(&[&base[..], &["noswap"]].concat());
    }
    if result == Err(nix::errno::Errno::EINVAL) {
        result = attempt(&base);
    }
    result.map_err(|errno| VolumeError::io("mount tmpfs on", path)(errno.into()))
}

/// Mounts huge pages of `page_size` bytes on `path`, unless they are there.
pub(super) fn mount_hugetlbfs(path: &Path, page_size: u64, size: u64) -> Result<(), VolumeError> {
    if is_mounted(path, FsType(HUGETLBFS_MAGIC.0)) {
        return Ok(());
    }
    let options = format!("pagesize={page_size},size={size}");
    mount(Some("nodev"), path, Some("hugetlbfs"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|errno| VolumeError::io("mount hugetlbfs on", path)(errno.into()))
}

/// Takes the topmost mount on `path` away; one that is in use is detached.
pub(super) fn unmount(path: &Path) -> Result<(), VolumeError> {
    let result = match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Err(nix::errno::Errno::EBUSY) => {
            umount2(path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
        }
        other => other,
    };
    match result {
        // Not a mount (any longer).
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(VolumeError::io("unmount", path)(io::Error::from(errno))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let text = b"36 35 98:0 / / rw - ext4 /dev/root rw\n\
            37 36 0:5 / /a\\040b/c\\134d rw,noatime shared:1 - tmpfs none rw\n";
        assert_eq!(mount_points(text), [Path::new("/"), Path::new("/a b/c\\d")]);
        let text = b"36 35 98:0 / /a\\040b\\134c rw - ext4 /dev/x rw\n37 36 0:1 / /d rw - t t rw\n";
        assert_eq!(mount_points(text), [Path::new("/a b\\c"), Path::new("/d")]);
        assert_eq!(unescape(b"x\\9"), b"x\\9");
    }
}
