//! Image volumes: the files of an image, read-only, where a pod wants them.
//!
//! They are mounted in the container's own mount namespace before anything is bound from there, like
//! its root file system: the node's mount table never has them and nothing is left to unmount. Under
//! SELinux they have the label of the container's own files, which on disk no layer has.

use std::fs::{self, File};
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;

use super::inroot::Root;
use super::protocol::{ImageVolume, StartContainer};
use super::staging;

/// Mounts a container's image volumes and has the spec bind the part of each that is asked for. In a
/// pod with a user namespace files belong to whom they belong in the image, as in its own image.
pub(super) fn mount(start: &StartContainer, spec: &mut Spec) -> Result<(), String> {
    if start.image_volumes.is_empty() {
        return Ok(());
    }
    let userns = start.userns.as_ref().map(|pod| staging::open(&pod.path)).transpose()?;
    for volume in &start.image_volumes {
        mount_one(volume, userns.as_ref(), spec)
            .map_err(|e| format!("mounting the volume of {}: {e}", volume.image))?;
    }
    Ok(())
}

fn mount_one(volume: &ImageVolume, userns: Option<&File>, spec: &mut Spec) -> Result<(), String> {
    let target = &volume.target;
    fs::create_dir_all(target).map_err(|e| format!("making {}: {e}", target.display()))?;
    let mut layers = volume.layers.clone();
    let area = target.with_extension("layers");
    if let Some(userns) = userns {
        staging::map_folder(&mut layers, userns, &area)?;
    }
    let label = spec.linux().as_ref().and_then(|linux| linux.mount_label().as_deref());
    crate::snapshot::mount_read_only(&layers, target, label).map_err(|e| e.to_string())?;
    if userns.is_some() {
        // Not mounted for an image without layers.
        let _ = umount2(&area, MntFlags::MNT_DETACH);
    }
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
