//! Network namespaces, pinned by bind mounts so that a sandbox needs no process.
//!
//! A namespace is made by a thread of its own that unshares and ends: only that thread's view of
//! the network changes, and no `ip` is run.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
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
/// is kept. Blocks for a millisecond or two when none was made ahead.
///
/// # Errors
/// [`NetworkError::Io`]; nothing is left behind then.
pub fn create(path: &Path) -> Result<(), NetworkError> {
    if exists(path) {
        return Ok(());
    }
    let namespace = spare::take()
        .map_or_else(make, Ok)
        .map_err(NetworkError::io("create network namespace", path.display()))?;
    pin(path, Path::new(&format!("/proc/thread-self/fd/{}", namespace.as_raw_fd())))
}

/// Pins a namespace of any kind, given by its file in `/proc`, at `path`.
///
/// # Errors
/// [`NetworkError::Io`]; nothing is left behind then.
pub fn pin(path: &Path, namespace: &Path) -> Result<(), NetworkError> {
    let fail = |operation| NetworkError::io(operation, path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail("create folder for namespace"))?;
    }
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => {}
        // A mount point that a crash left empty.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(fail("create namespace file")(error)),
    }
    mount(Some(namespace), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|errno| {
        let _ = fs::remove_file(path);
        fail("pin namespace at")(errno.into())
    })
}

/// Brings the loopback of the calling thread's network namespace up.
///
/// # Errors
/// The kernel's.
pub(crate) fn loopback_up() -> io::Result<()> {
    sys::loopback_up()
}

/// Makes a network namespace that lives as long as its descriptor.
fn make() -> io::Result<File> {
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        sys::loopback_up()?;
        File::open("/proc/thread-self/ns/net")
    })
    .and_then(|made| made)
}

/// Namespaces made ahead, as making one takes a millisecond and more. They are mere descriptors:
/// the end of this process is theirs.
mod spare {
    use std::{
        fs::File,
        sync::{Mutex, MutexGuard, PoisonError},
        thread,
        time::Duration,
    };

    /// How many are kept. More would help few: pods that start together outrun any number.
    const KEPT: usize = 2;
    /// After what time one is made again: what it was taken for is done by then, and needs the
    /// kernel's locks itself.
    const LATER: Duration = Duration::from_millis(50);

    #[derive(Default)]
    struct Spare {
        made: Vec<File>,
        making: bool,
    }

    fn spare() -> MutexGuard<'static, Spare> {
        static SPARE: Mutex<Spare> = Mutex::new(Spare { made: Vec::new(), making: false });
        SPARE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that is there already.
    pub(super) fn take() -> Option<File> {
        let mut spare = spare();
        let taken = spare.made.pop();
        if !spare.making {
            let started = thread::Builder::new()
                .name("netns-spare".to_owned())
                .stack_size(64 * 1024)
                .spawn(fill);
            spare.making = started.is_ok();
        }
        taken
    }

    #[allow(clippy::disallowed_methods, reason = "a thread of its own, which nobody waits for")]
    fn fill() {
        loop {
            thread::sleep(LATER);
            let made = super::make();
            let mut spare = spare();
            // A failure is for the next to meet, which tells it.
            let failed = made.is_err();
            spare.made.extend(made);
            if failed || spare.made.len() >= KEPT {
                spare.making = false;
                return;
            }
        }
    }
}

/// Whether a namespace is pinned at `path`.
pub fn exists(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Unpins the namespace, of any kind, at `path`; the kernel removes it, and the veth in it, with its
/// last user.
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
                return Err(NetworkError::errno("unpin namespace", path.display())(errno));
            }
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(NetworkError::io("remove namespace file", path.display())(error))
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
        // Those made ahead are as good, and each pod's own.
        let more: Vec<_> = (0..4).map(|n| folder.path().join(format!("more{n}"))).collect();
        let mut seen = std::collections::BTreeSet::from([own.clone(), inside.0]);
        for path in &more {
            create(path).unwrap();
            let (name, up) = within(path, || {
                (fs::read_link("/proc/thread-self/ns/net").unwrap(), sys::loopback_is_up())
            })
            .unwrap();
            assert!(up.unwrap() && seen.insert(name));
            delete(path).unwrap();
        }
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
