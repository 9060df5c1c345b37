//! A `local` PersistentVolume with files: a folder of this node, or the file system on a device of it,
//! bound into the pod's own.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::disks::Disks;
use super::mounts::mounts_below;
use super::{Group, VolumeError};

/// What a PersistentVolume says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LocalVolume {
    /// The PersistentVolume's name.
    pub(super) name: String,
    /// Of a folder or a block device.
    pub(super) path: String,
    /// Of a device's file system, where it has none yet.
    pub(super) fs_type: Option<String>,
    pub(super) options: Vec<String>,
    pub(super) read_only: bool,
}

/// The flags that `mountOptions` stand for. A folder has no file system of its own, so that others
/// mean nothing there; a device's was told of them when it was mounted.
fn plan_flags(options: &[String], of_device: bool) -> Result<MsFlags, String> {
    let mut flags = MsFlags::empty();
    for option in options.iter().flat_map(|option| option.split(',')).map(str::trim) {
        flags |= match option {
            "" | "defaults" | "bind" | "rw" | "suid" | "dev" | "exec" | "atime" | "diratime" => {
                MsFlags::empty()
            }
            "ro" => MsFlags::MS_RDONLY,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "nodiratime" => MsFlags::MS_NODIRATIME,
            "relatime" => MsFlags::MS_RELATIME,
            "strictatime" => MsFlags::MS_STRICTATIME,
            _ if of_device => MsFlags::empty(),
            other => {
                return Err(format!(
                    "mountOptions: {other:?} is not one of a folder that is bound; use ro, nosuid, \
                     nodev, noexec, noatime, nodiratime, relatime or strictatime"
                ));
            }
        };
    }
    Ok(flags)
}

/// Binds the folder, or the device's file system, onto `target`, unless it is, and gives its files to the
/// pod's group.
pub(super) fn apply(
    volume: &LocalVolume,
    target: &Path,
    disks: &Disks,
    group: Option<Group>,
) -> Result<(), VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid { volume: volume.name.clone(), reason };
    let source = Path::new(&volume.path);
    if !source.is_absolute() || source.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(invalid(format!(
            "local.path {:?} must be absolute, without '..'",
            source.display()
        )));
    }
    let of_device = match std::fs::metadata(source) {
        Ok(found) if found.is_dir() => false,
        Ok(found) if found.file_type().is_block_device() => true,
        Ok(_) => {
            return Err(invalid(format!(
                "path {:?}: only directory and block device are supported",
                source.display()
            )));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(invalid(format!("path {:?} does not exist", source.display())));
        }
        Err(error) => return Err(VolumeError::io("look at", source)(error)),
    };
    let mut flags = plan_flags(&volume.options, of_device).map_err(invalid)?;
    if volume.read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    std::fs::create_dir_all(target).map_err(VolumeError::io("create", target))?;
    let resolved = target.canonicalize().map_err(VolumeError::io("look at", target))?;
    if mounts_below(&resolved)?.contains(&resolved) {
        return Ok(());
    }
    let mounted = if of_device { Some(disks.mounted(volume, source)?) } else { None };
    let source = mounted.as_deref().unwrap_or(source);
    if let Some(group) = group.filter(|_| !flags.contains(MsFlags::MS_RDONLY)) {
        // Before it is mounted, so that what is mounted is done.
        group.apply(source)?;
    }
    let failed = |operation| {
        move |errno: nix::errno::Errno| VolumeError::io(operation, target)(errno.into())
    };
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(failed("bind a local volume on"))?;
    if !flags.is_empty() {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
        let remounted = mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
        if let Err(errno) = remounted {
            super::mounts::unmount(target)?;
            return Err(failed("set the mount options of")(errno));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_folder_are_flags_and_others_are_refused() {
        let of = |options: &[&str]| {
            let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
            plan_flags(&options, false)
        };
        assert_eq!(of(&[]), Ok(MsFlags::empty()));
        assert_eq!(of(&["nosuid,nodev", "rw"]), Ok(MsFlags::MS_NOSUID | MsFlags::MS_NODEV));
        assert_eq!(of(&["ro"]), Ok(MsFlags::MS_RDONLY));
        assert!(of(&["data=ordered"]).unwrap_err().contains("\"data=ordered\""));
        let told = ["data=ordered,ro".to_owned()];
        assert_eq!(plan_flags(&told, true), Ok(MsFlags::MS_RDONLY));
    }
}
