//! Puts on disk what was gathered for a pod's volumes; those of drivers are theirs to put in place.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::claim::Backing;
use super::disks::Disks;
use super::gather::{Earlier, Wanted};
use super::layout::{Layout, Plugin, is_file_name};
use super::{Group, VolumeError, atomic, device, empty_dir, host_path, local, mounts, nfs};
use crate::ids::PodUid;

/// Brings about what is `wanted`, by the volumes' names. Blocking; done again it changes nothing.
pub(super) fn apply_all(
    layout: &Layout,
    disks: &Disks,
    uid: &PodUid,
    wanted: &[(String, Wanted)],
    group: Option<u32>,
    of_existing: Option<Group>,
) -> Result<(), VolumeError> {
    let pod = layout.pod(uid);
    private_directory(&pod)?;
    private_directory(&layout.volumes(uid))?;
    for (name, want) in wanted {
        if !is_file_name(name) {
            let reason = "name cannot name a directory".into();
            return Err(VolumeError::Invalid { volume: name.clone(), reason });
        }
        match want {
            Wanted::EmptyDir(medium) => {
                let path = layout.volume(uid, Plugin::EmptyDir, name);
                parent_directory(&path)?;
                empty_dir::apply(&path, *medium, group)?;
            }
            // A driver's is put in place by it, after all others.
            Wanted::Image
            | Wanted::Unused
            | Wanted::Growing(..)
            | Wanted::Claimed(Backing::Csi(_)) => {}
            Wanted::HostPath(source) | Wanted::Claimed(Backing::HostPath(source, _)) => {
                host_path::apply(name, source)?;
            }
            Wanted::Claimed(Backing::Local(volume)) => {
                check_name(name, &volume.name)?;
                let target = layout.volume(uid, Plugin::Local, &volume.name);
                parent_directory(&target)?;
                local::apply(volume, &target, disks, of_existing)?;
            }
            Wanted::Claimed(Backing::Nfs(volume)) => {
                check_name(name, &volume.name)?;
                let target = layout.volume(uid, Plugin::Nfs, &volume.name);
                parent_directory(&target)?;
                nfs::apply(volume, &target)?;
            }
            Wanted::Claimed(Backing::Device { name: pv, path, .. }) => {
                check_name(name, pv)?;
                let link = layout.device(uid, Plugin::Local, pv);
                private_directory(&layout.devices(uid))?;
                parent_directory(&link)?;
                device::apply(pv, path, &link)?;
            }
            Wanted::Files { plugin, payload, .. } => {
                let path = layout.volume(uid, *plugin, name);
                parent_directory(&path)?;
                fs::create_dir_all(&path).map_err(VolumeError::io("create", &path))?;
                // ConfigMaps lie on disk; what may be secret stays in memory.
                if *plugin != Plugin::ConfigMap {
                    mounts::mount_tmpfs(&path, None, true)?;
                }
                let mode = if group.is_some() { 0o2777 } else { 0o777 };
                chown(&path, None, group).map_err(VolumeError::io("chown", &path))?;
                fs::set_permissions(&path, Permissions::from_mode(mode))
                    .map_err(VolumeError::io("chmod", &path))?;
                atomic::apply_payload(&path, payload, group)?;
            }
        }
    }
    Ok(())
}

/// Whether the PersistentVolume of the volume `name` can name what is made of it.
fn check_name(name: &str, pv: &str) -> Result<(), VolumeError> {
    if is_file_name(pv) {
        return Ok(());
    }
    let reason = format!("PersistentVolume {pv:?} cannot name a directory");
    Err(VolumeError::Invalid { volume: name.to_owned(), reason })
}

/// Makes a directory that only root may enter.
pub(super) fn private_directory(path: &Path) -> Result<(), VolumeError> {
    fs::create_dir_all(path).map_err(VolumeError::io("create", path))?;
    fs::set_permissions(path, Permissions::from_mode(0o750)).map_err(VolumeError::io("chmod", path))
}

fn parent_directory(path: &Path) -> Result<(), VolumeError> {
    match path.parent() {
        Some(parent) => private_directory(parent),
        None => Ok(()),
    }
}

/// A projected volume as an earlier call left it.
pub(super) struct OnDisk(pub(super) PathBuf);

impl Earlier for OnDisk {
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        // Through `..data`, which only the agent writes.
        let data = self.0.join("..data");
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(data.join(path))
            .ok()?;
        let mut token = Vec::new();
        file.take(64 << 10).read_to_end(&mut token).ok()?;
        Some(token)
    }

    fn existed(&self) -> bool {
        self.0.is_dir()
    }
}
