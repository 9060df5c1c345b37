//! A `local` PersistentVolume: a folder of this node, bound into the pod's own.

use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::mounts::mounts_below;
use super::{Group, VolumeError};

/// The flags that `mountOptions` stand for. A folder has no file system of its own, so that others
/// mean nothing here.
fn plan_flags(options: &[String]) -> Result<MsFlags, String> {
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

/// Binds the folder `source` onto `target`, unless it is, and gives its files to the pod's group.
pub(super) fn apply(
    name: &str,
    source: &str,
    target: &Path,
    (options, read_only): (&[String], bool),
    group: Option<Group>,
) -> Result<(), VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid { volume: name.into(), reason };
    let mut flags = plan_flags(options).map_err(invalid)?;
    if read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    let source = Path::new(source);
    if !source.is_absolute() || source.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(invalid(format!(
            "local.path {:?} must be absolute, without '..'",
            source.display()
        )));
    }
    match std::fs::metadata(source) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => {
            return Err(invalid(format!(
                "path {:?} is no directory; a block device needs volumeMode Block",
                source.display()
            )));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(invalid(format!("path {:?} does not exist", source.display())));
        }
        Err(error) => return Err(VolumeError::io("look at", source)(error)),
    }
    std::fs::create_dir_all(target).map_err(VolumeError::io("create", target))?;
    let resolved = target.canonicalize().map_err(VolumeError::io("look at", target))?;
    if mounts_below(&resolved)?.contains(&resolved) {
        return Ok(());
    }
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
            plan_flags(&options.iter().map(|&option| option.to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&[]), Ok(MsFlags::empty()));
        assert_eq!(of(&["nosuid,nodev", "rw"]), Ok(MsFlags::MS_NOSUID | MsFlags::MS_NODEV));
        assert_eq!(of(&["ro"]), Ok(MsFlags::MS_RDONLY));
        assert!(of(&["data=ordered"]).unwrap_err().contains("\"data=ordered\""));
    }
}
