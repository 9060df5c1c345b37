//! Mounting an overlay without the one-page limit of mount(2)'s options.

use std::{fs, io, path::Path};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, umount2},
    unistd::chdir,
};

use super::{Rootfs, SnapshotError, sys};

/// Mounts `rootfs` at its `merged` folder in the caller's mount namespace. An image without layers
/// is its bare upper folder, bind mounted.
///
/// The mount is `volatile` where the kernel has it: containers do not outlive the node, so syncing
/// all they wrote when they are removed would only cost time.
///
/// # Errors
/// [`SnapshotError::Io`] with the kernel's reason.
pub fn mount(rootfs: &Rootfs) -> Result<(), SnapshotError> {
    // What a volatile mount leaves behind; it would refuse to be mounted again, as after a reboot.
    let _ = fs::remove_dir_all(rootfs.work.join("work/incompat"));
    if rootfs.lowerdirs.is_empty() {
        return nix::mount::mount(
            Some(&rootfs.upper),
            &rootfs.merged,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(|errno| SnapshotError::io("bind mount", &rootfs.merged)(errno.into()));
    }
    let mounted = match sys::mount_overlay(rootfs) {
        // Kernels before 6.5 have no `lowerdir+`, before 5.2 no fsopen.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP)
            ) =>
        {
            mount_by_options(rootfs)
        }
        other => other,
    };
    mounted.map_err(SnapshotError::io("mount overlay", &rootfs.merged))
}

/// mount(2) with the layers named relative to their common folder, in a thread whose working
/// directory is its own.
fn mount_by_options(rootfs: &Rootfs) -> io::Result<()> {
    let layers = rootfs
        .lowerdirs
        .first()
        .and_then(|lower| lower.parent()?.parent())
        .ok_or(io::ErrorKind::InvalidInput)?;
    let relative: Vec<_> = rootfs
        .lowerdirs
        .iter()
        .map(|lower| lower.strip_prefix(layers).unwrap_or(lower).to_string_lossy())
        .collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        relative.join(":"),
        rootfs.upper.display(),
        rootfs.work.display()
    );
    let mount = |options: &str| -> io::Result<()> {
        Ok(nix::mount::mount(
            Some("overlay"),
            &rootfs.merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(options),
        )?)
    };
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
                chdir(layers)?;
                mount(&format!("{options},volatile")).or_else(|_| mount(&options))
            })
            .join()
            .map_err(|_| io::Error::other("the mounting thread panicked"))?
    })
}

/// Whether something is mounted at `path`.
pub fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let parent = path.parent().and_then(|parent| fs::metadata(parent).ok());
    match (fs::metadata(path), parent) {
        (Ok(here), Some(above)) => here.dev() != above.dev(),
        _ => false,
    }
}

/// Unmounts whatever is mounted at `path`; nothing there is a success.
///
/// # Errors
/// [`SnapshotError::Io`].
pub fn unmount(path: &Path) -> Result<(), SnapshotError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(SnapshotError::io("unmount", path)(errno.into())),
        }
    }
}
