//! Image volumes: the files of an image, read-only, where a pod wants them.
//!
//! They are mounted in the container's own mount namespace before anything is bound from there, like
//! its root file system: the node's mount table never has them and nothing is left to unmount.

use std::fs;
use std::path::Path;

use oci_spec::runtime::Spec;

use super::inroot::Root;
use super::protocol::{ImageVolume, StartContainer};

/// Mounts a container's image volumes and has the spec bind the part of each that is asked for.
pub(super) fn mount(start: &StartContainer, spec: &mut Spec) -> Result<(), String> {
    for volume in &start.image_volumes {
        mount_one(volume, spec)
            .map_err(|e| format!("mounting the volume of {}: {e}", volume.image))?;
    }
    Ok(())
}

fn mount_one(volume: &ImageVolume, spec: &mut Spec) -> Result<(), String> {
    let target = &volume.target;
    fs::create_dir_all(target).map_err(|e| format!("making {}: {e}", target.display()))?;
    crate::snapshot::mount_read_only(&volume.layers, target).map_err(|e| e.to_string())?;
    if volume.sub_path.is_empty() {
        return Ok(());
    }
    // The mount cannot change, so a path that was resolved within it stays right.
    let root = Root::open(target).map_err(|e| format!("opening {}: {e}", target.display()))?;
    let path = root
        .real_path(Path::new(&volume.sub_path))
        .map_err(|e| format!("finding the sub path {:?} in the image: {e}", volume.sub_path))?;
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.source().as_deref() == Some(target) {
            mount.set_source(Some(path.clone()));
        }
    }
    Ok(())
}
