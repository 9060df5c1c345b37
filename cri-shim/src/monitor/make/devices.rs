//! `/dev` of a container: the devices everybody has, those it was given, and the usual links.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, major, makedev, minor, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::super::inroot::Root;

/// OCI runtime spec, config-linux.md, "Default Devices": name, major, minor.
pub(super) const DEFAULT: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
    ("/dev/core", "/proc/kcore"),
];

struct Node<'a> {
    path: &'a Path,
    kind: SFlag,
    device: u64,
    mode: u32,
    owner: (u32, u32),
}

/// Makes them all; what is there already stays.
pub(super) fn add(root: &Root, spec: &Spec) -> Result<(), String> {
    add_nodes(root, spec)?;
    add_links(root)
}

fn add_nodes(root: &Root, spec: &Spec) -> Result<(), String> {
    let given = spec.linux().as_ref().and_then(|l| l.devices().as_deref()).unwrap_or_default();
    for device in given {
        let node = Node {
            path: device.path(),
            kind: kind(device),
            device: makedev(device.major() as u64, device.minor() as u64),
            mode: device.file_mode().unwrap_or(0o666),
            owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
        };
        make(root, &node)?;
    }
    for (path, major, minor) in DEFAULT {
        let path = Path::new(path);
        if given.iter().any(|device| device.path() == path) {
            continue;
        }
        let device = makedev(major, minor);
        make(root, &Node { path, kind: SFlag::S_IFCHR, device, mode: 0o666, owner: (0, 0) })?;
    }
    Ok(())
}

/// The usual links alone.
pub(super) fn add_links(root: &Root) -> Result<(), String> {
    for (link, target) in LINKS {
        let made = root.parent(Path::new(link)).and_then(|(parent, name)| {
            match symlinkat(target, &parent, name) {
                Ok(()) | Err(Errno::EEXIST) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        });
        made.map_err(|e| format!("linking {link}: {e}"))?;
    }
    Ok(())
}

fn kind(device: &LinuxDevice) -> SFlag {
    match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        _ => SFlag::S_IFCHR,
    }
}

fn make(root: &Root, node: &Node<'_>) -> Result<(), String> {
    let made = root.parent(node.path).and_then(|(parent, name)| {
        let mode = Mode::from_bits_truncate(node.mode & 0o7777);
        match mknodat(&parent, name, node.kind, mode, node.device) {
            Ok(()) => {}
            Err(Errno::EEXIST) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        // The umask has taken its part.
        fchmodat(&parent, name, mode, FchmodatFlags::FollowSymlink)?;
        if node.owner != (0, 0) {
            let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
            fchownat(&parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    });
    made.map_err(|e| format!("making the device {}: {e}", node.path.display()))
}

/// The container's `/dev/null`, which must be the real one: what is hidden is hidden by it.
pub(super) fn null(root: &Root) -> io::Result<OwnedFd> {
    let null = root.locate_plain(Path::new("/dev/null"))?;
    let status = fstat(&null)?;
    let device = (major(status.st_rdev), minor(status.st_rdev));
    let character = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    if character && device == (1, 3) {
        return Ok(null);
    }
    Err(io::Error::other("/dev/null of the container is not the null device"))
}
