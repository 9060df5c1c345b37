//! Opening below a root where symbolic links may climb (`..`). The kernel cannot tell a climb apart
//! from an escape while anybody on the machine renames or mounts, and then answers EAGAIN
//! (openat2(2)); on a node that starts pods this happens all the time.

use std::os::fd::{AsFd, OwnedFd};

use nix::NixPath;
use nix::errno::Errno;
use nix::fcntl::{OpenHow, openat2};

/// Some 20 ms of trying: a try takes microseconds, and whoever renames in a loop to keep us here
/// gets an error in the end.
const TRIES: u32 = 10_000;

/// openat2(2), tried anew while the kernel asks for it. EAGAIN if it never stopped asking.
pub fn open<P: ?Sized + NixPath>(root: impl AsFd, path: &P, how: OpenHow) -> nix::Result<OwnedFd> {
    let root = root.as_fd();
    for _ in 0..TRIES {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => std::thread::yield_now(),
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};

    use nix::fcntl::{OFlag, ResolveFlag};

    use super::*;

    #[test]
    fn links_that_climb_are_followed_while_others_rename() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("../../../../file", dir.path().join("a/b/c/link")).unwrap();
        let root = fs::File::open(dir.path()).unwrap();
        let how = OpenHow::new().flags(OFlag::O_PATH).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let done = AtomicBool::new(false);
        let elsewhere = tempfile::tempdir().unwrap();
        let (one, other) = (elsewhere.path().join("1"), elsewhere.path().join("2"));
        fs::create_dir(&one).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    fs::rename(&one, &other).unwrap();
                    fs::rename(&other, &one).unwrap();
                }
            });
            let mut asked_again = 0;
            let mut opened = Ok(());
            for _ in 0..200_000 {
                if matches!(openat2(&root, "a/b/c/link", how), Err(Errno::EAGAIN)) {
                    asked_again += 1;
                }
                opened = open(&root, Path::new("a/b/c/link"), how).map(drop);
                if opened.is_err() || asked_again > 20 {
                    break;
                }
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(opened, Ok(()), "after {asked_again} times EAGAIN");
            assert!(asked_again > 0, "the kernel never asked to try again: nothing was tested");
        });
    }
}
