//! `fsGroup` of a volume that holds files already: all of them become the group's.
//!
//! Pods that share the volume may change it meanwhile. Everything is reached by descriptors from the
//! volume's root, no link is followed and no other mount entered, so that nothing outside changes
//! hands.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat};
use nix::unistd::{Gid, fchownat};

use super::VolumeError;

/// Bits that files get; a folder's search bits and setgid come on top.
const FILE: u32 = 0o660;
const FOLDER: u32 = 0o2770;
/// Folders held open at once while descending.
const MAX_DEPTH: usize = 512;

/// A pod's `fsGroup`, and how it is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// The group's id.
    pub id: u32,
    /// `fsGroupChangePolicy: OnRootMismatch`: a volume whose root is the group's already is left as
    /// it is.
    pub on_root_mismatch: bool,
}

impl Group {
    /// Gives all files of the volume at `root` to the group.
    pub fn apply(self, root: &Path) -> Result<(), VolumeError> {
        let failed = |errno: Errno| VolumeError::io("give to fsGroup", root)(errno.into());
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW);
        let top = openat2(nix::fcntl::AT_FDCWD, root, how).map_err(failed)?;
        let stat = fstat(&top).map_err(failed)?;
        if self.on_root_mismatch && fits(&stat, self.id) {
            return Ok(());
        }
        if kind(&stat) == SFlag::S_IFDIR {
            self.walk(&top).map_err(failed)?;
        }
        // Last, as it says that the rest is done.
        self.give(&top, &stat).map_err(failed)
    }

    fn walk(self, top: &OwnedFd) -> nix::Result<()> {
        let root = (open_folder(top, c".")?, top.try_clone().map_err(|_| Errno::EMFILE)?);
        let mut stack = vec![(entries(root.0), root.1)];
        while let Some((left, folder)) = stack.last_mut() {
            let Some(name) = left.pop() else {
                // A folder after what is in it.
                if let Some((_, folder)) = stack.pop()
                    && !stack.is_empty()
                {
                    let stat = fstat(&folder)?;
                    self.give(&folder, &stat)?;
                }
                continue;
            };
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
            let found = match openat2(&*folder, name.as_c_str(), how) {
                // Gone meanwhile, or another file system.
                Err(Errno::ENOENT | Errno::EXDEV) => continue,
                other => other?,
            };
            let stat = fstat(&found)?;
            if kind(&stat) == SFlag::S_IFDIR {
                if stack.len() >= MAX_DEPTH {
                    return Err(Errno::ELOOP);
                }
                let opened = open_folder(&found, c".")?;
                stack.push((entries(opened), found));
            } else {
                self.give(&found, &stat)?;
            }
        }
        Ok(())
    }

    /// What the kernel refuses for one file (some file systems know no owners) is no reason to keep the pod
    /// from its volume, as under kubelet.
    fn give(self, found: &OwnedFd, stat: &FileStat) -> nix::Result<()> {
        if stat.st_gid != self.id {
            let flags = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
            let group = Some(Gid::from_raw(self.id));
            if let Err(errno) = fchownat(found.as_fd(), c"", None, group, flags) {
                tracing::debug!(%errno, "a file of a volume keeps its group");
            }
        }
        let wanted = match kind(stat) {
            SFlag::S_IFLNK => return Ok(()),
            SFlag::S_IFDIR => FOLDER,
            _ => FILE,
        };
        // Changing the group may have cleared bits.
        let mode = (stat.st_mode & 0o7777) | wanted;
        let path = format!("/proc/self/fd/{}", found.as_raw_fd());
        let mode = Mode::from_bits_truncate(mode);
        let follow = FchmodatFlags::FollowSymlink;
        if let Err(errno) = fchmodat(nix::fcntl::AT_FDCWD, path.as_str(), mode, follow) {
            tracing::debug!(%errno, "a file of a volume keeps its mode");
        }
        Ok(())
    }
}

/// Whether the root of a volume is the group's, with all that the group needs there.
fn fits(stat: &FileStat, group: u32) -> bool {
    kind(stat) == SFlag::S_IFDIR && stat.st_gid == group && stat.st_mode & FOLDER == FOLDER
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn open_folder(at: &OwnedFd, name: &std::ffi::CStr) -> nix::Result<Dir> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW);
    Dir::from_fd(openat2(at, name, how)?)
}

fn entries(mut folder: Dir) -> Vec<CString> {
    let name = |entry: nix::dir::Entry| {
        let _: Option<Type> = entry.file_type();
        entry.file_name().to_owned()
    };
    folder
        .iter()
        .filter_map(Result::ok)
        .map(name)
        .filter(|name| !matches!(name.to_bytes(), b"." | b".."))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn everything_in_the_volume_becomes_the_groups_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(root.join("a/b/file"), "x").unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        let set = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&root, 0o700);
        set(&root.join("a/b/file"), 0o4604);
        symlink(&outside, root.join("link")).unwrap();
        symlink(outside.join("file"), root.join("a/link")).unwrap();
        let show = |path: &Path| {
            let found = fs::symlink_metadata(path).unwrap();
            (found.gid(), found.mode() & 0o7777)
        };
        let before = [show(&outside), show(&outside.join("file"))];
        let group = Group { id: 4242, on_root_mismatch: true };
        group.apply(&root).unwrap();
        assert_eq!(show(&root), (4242, 0o2770));
        assert_eq!(show(&root.join("a/b")), (4242, 0o2775));
        let (gid, mode) = show(&root.join("a/b/file"));
        assert_eq!((gid, mode & 0o777), (4242, 0o664));
        assert_eq!(show(&root.join("link")).0, 4242);
        assert_eq!([show(&outside), show(&outside.join("file"))], before);

        // The root fits: what is below is left alone, unless the policy says otherwise.
        set(&root.join("a/b/file"), 0o600);
        group.apply(&root).unwrap();
        assert_eq!(show(&root.join("a/b/file")).1, 0o600);
        Group { on_root_mismatch: false, ..group }.apply(&root).unwrap();
        assert_eq!(show(&root.join("a/b/file")).1, 0o660);
        set(&root, 0o770);
        set(&root.join("a/b/file"), 0o600);
        group.apply(&root).unwrap();
        assert_eq!(show(&root.join("a/b/file")).1, 0o660, "the root lacked setgid");
    }
}
