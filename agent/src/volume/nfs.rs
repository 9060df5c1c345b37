//! `nfs`: a folder of a server, mounted for each pod by mount(8) and its helper mount.nfs.
//!
//! A server that is away must not hold up the node: whatever it is asked for is asked in a thread that
//! may be left behind.

use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::VolumeError;
use super::command::{mount, plan_mount};
use super::mounts::{mounts_below, unmount};

/// mount.nfs itself gives up after two minutes.
const MOUNT: Duration = Duration::from_secs(130);
/// What is not unmounted by then is so by force.
const UNMOUNT: Duration = Duration::from_secs(60);

/// One volume of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NfsVolume {
    /// The PersistentVolume's name, or the volume's in the pod.
    pub(super) name: String,
    pub(super) server: String,
    pub(super) path: String,
    pub(super) options: Vec<String>,
    pub(super) read_only: bool,
}

impl NfsVolume {
    fn arguments(&self, target: &Path) -> Vec<String> {
        let source = match self.server.parse::<Ipv6Addr>() {
            Ok(address) => format!("[{address}]:{}", self.path),
            Err(_) => format!("{}:{}", self.server, self.path),
        };
        let mut options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        if self.read_only && !options.contains(&"ro") {
            options.push("ro");
        }
        plan_mount("nfs", &options, &source, target)
    }
}

/// Mounts the volume on `target`, unless it is.
pub(super) fn apply(volume: &NfsVolume, target: &Path) -> Result<(), VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid { volume: volume.name.clone(), reason };
    if volume.server.is_empty() || volume.server.starts_with('-') || !volume.path.starts_with('/') {
        return Err(invalid(format!(
            "nfs.server {:?} and nfs.path {:?} must name a server and an absolute path",
            volume.server, volume.path
        )));
    }
    if is_mounted(target)? {
        return Ok(());
    }
    fs::create_dir_all(target).map_err(VolumeError::io("create", target))?;
    let mounted = mount(&volume.arguments(target), MOUNT);
    if mounted.is_err() {
        // A mount that came too late must not stay.
        tear_down(target)?;
        let _ = fs::remove_dir(target);
    }
    mounted.map_err(|reason| {
        // As mount(8) says it, by whether the kernel knows of nfs.
        let lacks = ["mount.<type>", "unknown filesystem type"].iter().any(|w| reason.contains(w));
        let hint = "; the node lacks mount.nfs: install nfs-common (Debian) or nfs-utils";
        invalid(if lacks { format!("{reason}{hint}") } else { reason })
    })
}

/// The mount points as the kernel has them: looking at one would ask the server.
fn at(path: &Path) -> Result<Option<PathBuf>, VolumeError> {
    let Some((parent, name)) = path.parent().zip(path.file_name()) else { return Ok(None) };
    match parent.canonicalize() {
        Ok(parent) => Ok(Some(parent.join(name))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(VolumeError::io("look at", parent)(error)),
    }
}

fn is_mounted(path: &Path) -> Result<bool, VolumeError> {
    match at(path)? {
        Some(path) => Ok(mounts_below(&path)?.contains(&path)),
        None => Ok(false),
    }
}

/// Unmounts what is at and below `folder`; what a server that is away holds up, by force.
pub(super) fn tear_down(folder: &Path) -> Result<(), VolumeError> {
    let Some(folder) = at(folder)? else { return Ok(()) };
    let mut points = mounts_below(&folder)?;
    points.reverse();
    for point in points {
        let (done, ended) = mpsc::channel();
        let of = point.clone();
        std::thread::Builder::new()
            .name("unmount-nfs".into())
            .spawn(move || done.send(unmount(&of)))
            .map_err(VolumeError::io("start a thread to unmount", &point))?;
        match ended.recv_timeout(UNMOUNT) {
            Ok(result) => result?,
            Err(_) => {
                tracing::warn!(point = %point.display(), "unmounting by force: no server answers");
                let how = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
                umount2(&point, how)
                    .map_err(|errno| VolumeError::io("unmount", &point)(errno.into()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_that_of_kubelet() {
        let of = |server: &str, options: &[&str], read_only| {
            let volume = NfsVolume {
                name: "v".into(),
                server: server.into(),
                path: "/export".into(),
                options: options.iter().map(|&option| option.to_owned()).collect(),
                read_only,
            };
            volume.arguments(Path::new("/t")).join(" ")
        };
        assert_eq!(of("nas", &[], false), "-t nfs nas:/export /t");
        assert_eq!(
            of("::1", &["hard", "nfsvers=4.1"], true),
            "-t nfs -o hard,nfsvers=4.1,ro [::1]:/export /t"
        );
        assert_eq!(of("10.0.0.1", &["ro"], true), "-t nfs -o ro 10.0.0.1:/export /t");
    }

    #[test]
    fn a_server_and_a_path_are_needed() {
        for (server, path) in [("", "/x"), ("-o", "/x"), ("nas", "x")] {
            let volume =
                NfsVolume { server: server.into(), path: path.into(), ..NfsVolume::default() };
            assert!(apply(&volume, Path::new("/nonexistent/t")).is_err());
        }
        tear_down(Path::new("/nonexistent/folder/t")).unwrap();
    }
}
