//! The places on the node that volumes are mounted from: made when they are missing, and checked for
//! the propagation that a volume asks for, which the kernel would silently not do.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use tonic::Status;

use super::internal;
use crate::api::{self, MountPropagation};

/// Prepares the sources of all volumes.
pub(super) fn prepare(mounts: &[api::Mount]) -> Result<(), Status> {
    for mount in mounts.iter().filter(|mount| mount.image.is_none()) {
        let path = Path::new(&mount.host_path);
        if path.is_absolute() && fs::symlink_metadata(path).is_err() {
            // As other runtimes do it.
            fs::create_dir_all(path)
                .map_err(|e| internal(&format!("making the mount source {}", path.display()), e))?;
        }
        check_propagation(path, mount.propagation())?;
    }
    Ok(())
}

fn check_propagation(path: &Path, asked: MountPropagation) -> Result<(), Status> {
    if asked == MountPropagation::PropagationPrivate {
        return Ok(());
    }
    let found = propagation_of(path)
        .map_err(|e| internal(&format!("looking up the mount of {}", path.display()), e))?;
    let (kind, fits) = match asked {
        MountPropagation::PropagationBidirectional => ("shared", found.shared),
        _ => ("shared or slave", found.shared || found.slave),
    };
    if fits {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "path {:?} is mounted on {:?} but it is not a {kind} mount; mount --make-shared it, or \
         take mountPropagation out of the pod",
        path.display(),
        found.mount_point
    )))
}

/// How a mount propagates (mount_namespaces(7)).
#[derive(Debug, PartialEq, Eq)]
struct Propagation {
    mount_point: String,
    shared: bool,
    slave: bool,
}

/// Of the mount that a path is on, symbolic links followed.
fn propagation_of(path: &Path) -> io::Result<Propagation> {
    let file = open_path(path)?;
    let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let id = id.ok_or_else(|| io::Error::other("the kernel tells no mount id"))?.trim();
    parse(&fs::read_to_string("/proc/thread-self/mountinfo")?, id)
        .ok_or_else(|| io::Error::other(format!("mount {id} is not in mountinfo")))
}

fn open_path(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    use nix::fcntl::{OFlag, open};
    Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?)
}

/// Finds a mount by its id (proc_pid_mountinfo(5)).
fn parse(mountinfo: &str, id: &str) -> Option<Propagation> {
    let line = mountinfo.lines().find(|line| line.split(' ').next() == Some(id))?;
    let mut fields = line.split(' ');
    let mount_point = fields.nth(4)?.to_owned();
    let optional: Vec<&str> = fields.skip(1).take_while(|field| *field != "-").collect();
    let has = |prefix: &str| optional.iter().any(|field| field.starts_with(prefix));
    Some(Propagation { mount_point, shared: has("shared:"), slave: has("master:") })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;

    #[test]
    fn optional_fields_say_how_a_mount_propagates() {
        let info = "\
            21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            22 21 0:5 / /a rw master:1 shared:7 - tmpfs shared:9 rw\n\
            23 21 0:6 / /b\\040c rw - tmpfs master:2 rw\n";
        let found = |id| parse(info, id).map(|p| (p.mount_point, p.shared, p.slave));
        assert_eq!(found("21"), Some(("/".into(), true, false)));
        assert_eq!(found("22"), Some(("/a".into(), true, true)));
        assert_eq!(found("23"), Some(("/b\\040c".into(), false, false)));
        assert_eq!(found("2"), None);
    }

    /// On the real kernel, in a mount namespace of the test's own.
    #[test]
    fn volumes_that_cannot_propagate_are_refused() {
        use MountPropagation::*;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let change = |path: &Path, flags| {
            mount(None::<&str>, path, None::<&str>, flags, None::<&str>).unwrap();
        };
        change(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        let root = tempfile::tempdir().unwrap();
        mount(Some("t"), root.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let volume = |propagation: MountPropagation| api::Mount {
            host_path: root.path().join("made/here").display().to_string(),
            propagation: propagation as i32,
            ..Default::default()
        };
        assert!(prepare(&[volume(PropagationPrivate)]).is_ok());
        assert!(root.path().join("made/here").is_dir());
        let refused = prepare(&[volume(PropagationHostToContainer)]).unwrap_err();
        assert!(refused.message().contains("not a shared or slave mount"), "{refused}");
        assert!(refused.message().contains(root.path().to_str().unwrap()), "{refused}");
        change(root.path(), MsFlags::MS_SHARED);
        assert!(prepare(&[volume(PropagationBidirectional)]).is_ok());
        assert!(prepare(&[volume(PropagationHostToContainer)]).is_ok());
        change(root.path(), MsFlags::MS_SLAVE);
        // Alone in its group, it is slave of nothing.
        let refused = prepare(&[volume(PropagationBidirectional)]).unwrap_err();
        assert!(refused.message().contains("not a shared mount"), "{refused}");
        let _ = nix::mount::umount2(root.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}
