//! A `local` PersistentVolume: a folder of this node, bound into the pod's own.

use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::mounts::mounts_below;
use super::{Group, VolumeError};

/// Binds the folder `source` onto `target`, unless it is, and gives its files to the pod's group.
pub(super) fn apply(
    name: &str,
    source: &str,
    target: &Path,
    read_only: bool,
    group: Option<Group>,
) -> Result<(), VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid { volume: name.into(), reason };
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
                "path {:?} is no directory: block devices are not provided here",
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
    if let Some(group) = group.filter(|_| !read_only) {
        // Before it is mounted, so that what is mounted is done.
        group.apply(source)?;
    }
    let failed = |operation| {
        move |errno: nix::errno::Errno| VolumeError::io(operation, target)(errno.into())
    };
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(failed("bind a local volume on"))?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let remounted = mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
        if let Err(errno) = remounted {
            super::mounts::unmount(target)?;
            return Err(failed("make read-only")(errno));
        }
    }
    Ok(())
}
