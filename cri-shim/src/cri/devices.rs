//! Looking up the device nodes a container gets.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use oci_spec::runtime::LinuxDeviceType;
use tonic::Status;

use crate::api;
use crate::spec::HostDevice;

/// Entries of `/dev` that a container has of its own, or that are not devices.
const OWN: [&str; 6] = ["pts", "shm", "fd", "mqueue", "console", "ptmx"];

/// The given devices; a privileged container gets all of the host's besides.
pub(super) fn look_up(
    devices: &[api::Device],
    privileged: bool,
) -> Result<Vec<HostDevice>, Status> {
    let mut found = Vec::new();
    if privileged {
        walk(Path::new("/dev"), Path::new("/dev"), "rwm", &mut found);
    }
    for device in devices {
        let host = Path::new(&device.host_path);
        let inside =
            if device.container_path.is_empty() { host } else { Path::new(&device.container_path) };
        let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
        let before = found.len();
        match fs::metadata(host) {
            Ok(meta) if meta.is_dir() => walk(host, inside, access, &mut found),
            Ok(_) => found.extend(one(host, inside, access)),
            Err(e) => {
                let path = host.display();
                return Err(Status::invalid_argument(format!("device {path}: {e}")));
            }
        }
        if found.len() == before {
            let path = host.display();
            return Err(Status::invalid_argument(format!("{path} is not a device node")));
        }
    }
    // A later entry for the same place wins.
    let mut seen = std::collections::HashSet::new();
    found.reverse();
    found.retain(|d| seen.insert(d.path.clone()));
    found.reverse();
    Ok(found)
}

/// What a CDI file's device node is on this machine.
pub(super) fn inspect(host: &Path) -> io::Result<HostDevice> {
    if fs::symlink_metadata(host)?.file_type().is_fifo() {
        return Ok(HostDevice { kind: LinuxDeviceType::P, ..HostDevice::at(host) });
    }
    one(host, host, "rwm").ok_or_else(|| io::Error::other("not a device node"))
}

fn walk(host: &Path, inside: &Path, access: &str, found: &mut Vec<HostDevice>) {
    let Ok(entries) = fs::read_dir(host) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if OWN.iter().any(|own| *own == name) {
            continue;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let (path, target): (PathBuf, PathBuf) = (entry.path(), inside.join(&name));
        if kind.is_dir() {
            walk(&path, &target, access, found);
        } else if kind.is_block_device() || kind.is_char_device() {
            found.extend(one(&path, &target, access));
        }
    }
}

fn one(host: &Path, inside: &Path, access: &str) -> Option<HostDevice> {
    let meta = fs::metadata(host).ok()?;
    let kind = match meta.file_type() {
        kind if kind.is_block_device() => LinuxDeviceType::B,
        kind if kind.is_char_device() => LinuxDeviceType::C,
        _ => return None,
    };
    Some(HostDevice {
        host: host.to_path_buf(),
        path: inside.to_path_buf(),
        kind,
        major: major(meta.rdev()) as i64,
        minor: minor(meta.rdev()) as i64,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        access: access.to_owned(),
    })
}
