//! Network namespaces, pinned by bind mounts so that a sandbox needs no process.
//!
//! A namespace is made by a thread of its own that unshares and ends: only that thread's view of
//! the network changes, and no `ip` is run.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    thread,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{NSFS_MAGIC, statfs},
};

use super::{NetworkError, sys};

/// Makes a network namespace with its loopback up and pins it at `path`. One that is there already
/// is kept. Blocks for about a millisecond.
///
/// # Errors
/// [`NetworkError::Io`]; nothing is left behind then.
pub fn create(path: &Path) -> Result<(), NetworkError> {
    if exists(path) {
        return Ok(());
    }
    let fail = |operation| NetworkError::io(operation, path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail("create folder for network namespace"))?;
    }
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => {}
        // A mount point that a crash left empty.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(fail("create network namespace file")(error)),
    }
    let made = in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        sys::loopback_up()?;
        mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(io::Error::from)
    })
    .and_then(|made| made);
    made.map_err(|error| {
        let _ = fs::remove_file(path);
        fail("create network namespace")(error)
    })
}

/// Whether a namespace is pinned at `path`.
pub fn exists(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Unpins the namespace at `path`; the kernel removes it, and the veth in it, with its last user.
/// Nothing there is a success.
///
/// # Errors
/// [`NetworkError::Io`] when the mount or the file cannot be removed.
pub fn delete(path: &Path) -> Result<(), NetworkError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // Mounts may be stacked after a crash.
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(errno) => {
                return Err(NetworkError::errno("unmount network namespace", path.display())(
                    errno,
                ));
            }
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetworkError::io("remove network namespace file", path.display())(error))
        }
        _ => Ok(()),
    }
}

/// Runs `work` in a thread of its own inside the namespace at `path`. What it opens there, such as
/// a socket, belongs to that namespace also afterwards.
///
/// # Errors
/// Of opening or entering the namespace; `work`'s own result is the inner one.
pub(crate) fn within<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    inside(&File::open(path)?, work)
}

/// As [`within`], for a namespace that is open already.
pub(crate) fn inside<T: Send>(place: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    in_thread(|| {
        setns(place, CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    })
    .and_then(|entered| entered)
}

/// Runs `work` in a fresh thread, so that a namespace it enters ends with it.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(256 * 1024)
            .spawn_scoped(scope, work)?
            .join()
            .map_err(|_| io::Error::other("the namespace's thread panicked"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_made_entered_and_removed_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/ns");
        create(&path).unwrap();
        create(&path).unwrap();
        assert!(exists(&path));
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let inside = within(&path, || {
            let up = fs::read_to_string("/sys/class/net/lo/operstate");
            (fs::read_link("/proc/thread-self/ns/net").unwrap(), sys::loopback_is_up(), up)
        })
        .unwrap();
        assert_ne!(own, inside.0);
        assert!(inside.1.unwrap());
        assert_eq!(own, fs::read_link("/proc/thread-self/ns/net").unwrap());
        delete(&path).unwrap();
        delete(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn an_empty_file_left_by_a_crash_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ns");
        File::create(&path).unwrap();
        assert!(!exists(&path));
        create(&path).unwrap();
        assert!(exists(&path));
        delete(&path).unwrap();
    }
}
