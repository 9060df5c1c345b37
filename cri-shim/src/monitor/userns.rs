//! Making user namespaces.
//!
//! A process cannot give itself the ids of a new user namespace and stay what it was. So a child
//! enters it, the parent writes what its ids are, the child makes there what is to belong to the
//! namespace, and the parent takes hold of all of it before the child ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{frame, sys};
use crate::mount::Detached;
use crate::snapshot::{Rootfs, mount as mount_overlay};
use crate::spec::userns::{IdMap, IdRange};

/// The child that holds new namespaces open until this is dropped.
pub(super) struct Holder {
    pid: Pid,
    /// Its end lets the child end.
    talk: UnixStream,
}

impl Holder {
    /// The file of one of its namespaces: `user`, `net`, ...
    pub(super) fn file(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/{name}", self.pid))
    }

    /// One of its namespaces.
    pub(super) fn open(&self, name: &str) -> Result<File, String> {
        let path = self.file(name);
        File::open(&path).map_err(|e| format!("opening {}: {e}", path.display()))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.talk.shutdown(std::net::Shutdown::Both);
        let _ = waitpid(self.pid, None);
    }
}

/// Makes a user namespace and runs `inside` in it, in the child: still with the node's ids, but with
/// all capabilities over what it makes there (see [`become_root`]). What it returns comes back.
pub(super) fn make<T: Serialize + DeserializeOwned>(
    map: &IdMap,
    inside: impl FnOnce(&UnixStream) -> Result<T, String>,
) -> Result<(Holder, T), String> {
    let (talk, theirs) = UnixStream::pair().map_err(|e| format!("making a socket pair: {e}"))?;
    let forked = sys::fork().map_err(|e| format!("fork: {e}"))?;
    let Some(pid) = forked else {
        drop(talk);
        sys::exit(hold(&theirs, inside));
    };
    drop(theirs);
    let holder = Holder { pid, talk };
    said::<()>(&holder.talk)?;
    for (file, range) in [("uid_map", map.uids), ("gid_map", map.gids)] {
        let path = format!("/proc/{pid}/{file}");
        fs::write(&path, range.line())
            .map_err(|e| format!("writing {:?} to {path}: {e}", range.line().trim_end()))?;
    }
    frame::send(&holder.talk, &(), &[]).map_err(|e| format!("telling the new namespace: {e}"))?;
    let made = said(&holder.talk)?;
    Ok((holder, made))
}

/// The child's life: its exit status.
fn hold<T: Serialize>(
    talk: &UnixStream,
    inside: impl FnOnce(&UnixStream) -> Result<T, String>,
) -> i32 {
    // Whoever is root in the namespace must not look into this process, which has the node's ids.
    let _ = prctl::set_dumpable(false);
    let entered = unshare(CloneFlags::CLONE_NEWUSER).map_err(explain);
    let failed = entered.is_err();
    if frame::send(talk, &entered, &[]).is_err() || failed {
        return 1;
    }
    if !matches!(frame::receive::<()>(talk), Ok(Some(()))) {
        return 1;
    }
    if frame::send(talk, &inside(talk), &[]).is_err() {
        return 1;
    }
    // Until the parent has what it wants.
    let _ = frame::receive::<()>(talk);
    0
}

fn said<T: DeserializeOwned>(talk: &UnixStream) -> Result<T, String> {
    match frame::receive::<Result<T, String>>(talk) {
        Ok(Some(said)) => said,
        Ok(None) => Err("making a user namespace: the process in it died".to_owned()),
        Err(e) => Err(format!("making a user namespace: {e}")),
    }
}

fn explain(errno: Errno) -> String {
    let hint = match errno {
        Errno::ENOSPC => "; raise the sysctl user.max_user_namespaces",
        Errno::EINVAL | Errno::ENOSYS => "; the kernel is built without CONFIG_USER_NS",
        Errno::EPERM => "; something forbids it, such as a seccomp filter around this node",
        _ => "",
    };
    format!("making a user namespace: {}{hint}", errno.desc().to_lowercase())
}

/// Takes on the ids of the user namespace's root, whom files and processes made from now on are; but
/// whoever is root there must still not look into this process.
pub(super) fn become_root() -> Result<(), String> {
    let said = |e: Errno| format!("becoming root of the user namespace: {e}");
    setgroups(&[]).map_err(said)?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).map_err(said)?;
    setresuid(uid, uid, uid).map_err(said)?;
    // With another user the kernel has set it anew, by a sysctl.
    prctl::set_dumpable(false).map_err(said)
}

/// Whether pods can have user namespaces here, tried with what each of them needs: an overlay over
/// id-mapped image layers. `area` is a mount that does not propagate. Leaves nothing behind, as it
/// happens in a process of its own.
pub(super) fn probe(layers: &Path, area: &Path) -> Result<(), String> {
    let (mut reader, writer) = io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    let forked = sys::fork().map_err(|e| format!("fork: {e}"))?;
    let Some(_) = forked else {
        drop(reader);
        // The zygote ignores its children; here they are waited for.
        sys::default_action(nix::sys::signal::Signal::SIGCHLD);
        let text = match try_all(layers, area) {
            Ok(()) => "ok".to_owned(),
            Err(message) => message,
        };
        let mut writer = writer;
        let _ = io::Write::write_all(&mut writer, text.as_bytes());
        sys::exit(0);
    };
    drop(writer);
    let mut text = String::new();
    io::Read::read_to_string(&mut reader, &mut text).map_err(|e| format!("reading: {e}"))?;
    match text.as_str() {
        "ok" => Ok(()),
        "" => Err("the process that tries user namespaces died; see the kernel log".to_owned()),
        _ => Err(text),
    }
}

fn try_all(layers: &Path, area: &Path) -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("making a mount namespace: {e}"))?;
    let range = IdRange { container: 0, host: 65_536, length: 65_536 };
    let (holder, ()) = make(&IdMap { uids: range, gids: range }, |_| Ok(()))?;
    let userns = holder.open("user")?;
    cover(area)?;
    let directory = |name: &str| {
        let path = area.join(name);
        fs::create_dir(&path).map_err(|e| format!("making {}: {e}", path.display()))?;
        Ok::<_, String>(path)
    };
    let mapped = directory("layers")?;
    copy_mapped(layers, &userns)?
        .attach_at(&mapped)
        .map_err(|e| format!("attaching {}: {e}", layers.display()))?;
    let rootfs = Rootfs {
        lowerdirs: vec![mapped],
        upper: directory("upper")?,
        work: directory("work")?,
        merged: directory("merged")?,
        label: None,
    };
    mount_overlay(&rootfs)
        .map_err(|e| format!("{e}; overlays of id-mapped layers need Linux 5.19 or newer"))
}

/// A copy of a mount whose files belong to the same ids inside the user namespace as on the disk.
pub(super) fn copy_mapped(path: &Path, userns: &File) -> Result<Detached, String> {
    let copy = Detached::copy(path, false).map_err(|e| format!("copying {}: {e}", path.display()));
    let copy = copy?;
    map(&copy, path, userns)?;
    Ok(copy)
}

/// Maps the ids of a copy of `path`.
pub(super) fn map(copy: &Detached, path: &Path, userns: &File) -> Result<(), String> {
    copy.map_ids(userns).map_err(|e| {
        let path = path.display();
        let hint = match e.raw_os_error() {
            Some(libc::ENOSYS) => "id-mapped mounts need Linux 5.12 or newer".to_owned(),
            Some(libc::EINVAL) => format!(
                "the file system of {path} cannot be id-mapped by this kernel (tmpfs, as which \
                 secrets come, can since Linux 6.3)"
            ),
            Some(libc::EPERM) => format!("{path} is on a mount that is id-mapped already"),
            _ => "see mount_setattr(2)".to_owned(),
        };
        format!("id-mapping the mount of {path}: {e}; {hint}")
    })
}

/// Covers `area` with an empty file system that everybody may look into.
pub(super) fn cover(area: &Path) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("longshore"), area, Some("tmpfs"), flags, Some("mode=0755,size=1m"))
        .map_err(|e| format!("mounting over {}: {e}", area.display()))
}

/// Closes the end of [`make`]'s talk in a process that outlives the child it was forked from.
pub(super) fn hang_up(talk: &UnixStream) {
    let _ = nix::unistd::close(talk.as_raw_fd());
}
