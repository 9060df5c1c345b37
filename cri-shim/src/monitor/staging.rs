//! The mounts of a container that only the node's root can make: copies of what is bound into it,
//! id-mapped where the spec says so, and its image's layers, id-mapped under the overlay.
//!
//! Our own maker hands the copies over as they are (`make::users`). An OCI runtime's program wants
//! paths, so for it they are attached in an area that everybody may look into, and the spec names
//! them there. The area is only in this process's mount namespace, which the runtime inherits.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{SFlag, fstat};
use oci_spec::runtime::{Mount, Spec};

use super::launch::Stdio;
use super::protocol::{Overlay, Userns};
use super::{process, userns};
use crate::mount::Detached;
use crate::snapshot::Rootfs;
use crate::spec::user::Identity;
use crate::spec::userns::IdMap;

/// Whether a mount has ids of its own.
pub(super) fn is_mapped(mount: &Mount) -> bool {
    mount.uid_mappings().is_some() || mount.gid_mappings().is_some()
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
}

/// The container's cgroup is not: the runtime has yet to make it, and everybody may look into it.
fn is_staged(mount: &Mount) -> bool {
    is_mapped(mount) || is_bind(mount) && !source(mount).starts_with(crate::cgroup::ROOT)
}

fn source(mount: &Mount) -> &Path {
    mount.source().as_deref().unwrap_or(Path::new("/"))
}

/// The user namespace pinned at a path.
pub(super) fn open(path: &Path) -> Result<File, String> {
    if !crate::network::netns::exists(path) {
        let path = path.display();
        return Err(format!("the pod's user namespace is not pinned at {path}; delete the pod"));
    }
    File::open(path).map_err(|e| format!("opening the user namespace {}: {e}", path.display()))
}

/// A copy of the source of a bind mount. `others` are user namespaces made for mounts with mappings
/// that are not the pod's.
pub(super) fn copy(
    mount: &Mount,
    own: Option<&(IdMap, File)>,
    others: &mut Vec<(IdMap, File)>,
) -> Result<Detached, String> {
    let path = source(mount);
    let has = |option: &str| mount.options().iter().flatten().any(|o| o == option);
    let said = |doing: &'static str| {
        move |e: std::io::Error| format!("{doing} the mount of {}: {e}", path.display())
    };
    let copy = Detached::copy(path, has("rbind")).map_err(said("copying"))?;
    if is_mapped(mount) {
        let lines = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
        let map = IdMap::from_oci(lines.0.unwrap_or_default(), lines.1.unwrap_or_default())
            .ok_or_else(|| format!("{}: one uid and one gid mapping are needed", path.display()))?;
        let known = own.into_iter().chain(others.iter()).find(|(known, _)| *known == map);
        match known {
            Some((_, userns)) => userns::map(&copy, path, userns)?,
            None => {
                let (holder, ()) = userns::make(&map, |_| Ok(()))?;
                let userns = holder.open("user")?;
                userns::map(&copy, path, &userns)?;
                others.push((map, userns));
            }
        }
    }
    // Before the container's own namespace makes a slave of all that is shared.
    if has("rprivate") {
        copy.propagate(libc::MS_PRIVATE, true).map_err(said("making private"))?;
    } else if has("rslave") {
        copy.propagate(libc::MS_SLAVE, true).map_err(said("making a slave of"))?;
    }
    Ok(copy)
}

/// The overlay over id-mapped layers, whose folder is attached at `here`. An image without layers is
/// its upper folder. `label` is what SELinux is to take its files for.
pub(super) fn map_layers(
    overlay: &Overlay,
    label: Option<&String>,
    userns: &File,
    here: &Path,
) -> Result<Rootfs, String> {
    let mut rootfs = Rootfs {
        lowerdirs: overlay.lower.clone(),
        upper: overlay.upper.clone(),
        work: overlay.work.clone(),
        merged: overlay.target.clone(),
        label: label.cloned(),
    };
    map_folder(&mut rootfs.lowerdirs, userns, here)?;
    Ok(rootfs)
}

/// Attaches an id-mapped copy of the folder of `layers` at `here`, and names them there.
pub(super) fn map_folder(layers: &mut [PathBuf], userns: &File, here: &Path) -> Result<(), String> {
    let folder = layers.first().and_then(|l| l.parent()?.parent()).map(Path::to_path_buf);
    let Some(folder) = folder else { return Ok(()) };
    fs::create_dir_all(here).map_err(|e| format!("making {}: {e}", here.display()))?;
    userns::copy_mapped(&folder, userns)?
        .attach_at(here)
        .map_err(|e| format!("attaching {}: {e}", folder.display()))?;
    for layer in layers {
        let name = layer
            .strip_prefix(&folder)
            .map_err(|_| format!("the layer {} is not in {}", layer.display(), folder.display()))?;
        *layer = here.join(name);
    }
    Ok(())
}

/// Lets the process open its own `/dev/stdout` by path: what it is inside, it cannot tell the node.
pub(super) fn give_streams(pod: &Userns, stdio: &Stdio, identity: &Identity) {
    let Ok((uid, _)) = pod.map.to_host(identity.uid, identity.gid) else { return };
    for stream in [&stdio.stdin, &stdio.stdout, &stdio.stderr].into_iter().flatten() {
        process::give_stream(stream, uid);
    }
}

/// Mounts the root file system for an OCI runtime's program, and the sources of the spec's bind
/// mounts beside it.
pub(super) fn place_all(spec: &mut Spec, overlay: &Overlay, pod: &Userns) -> Result<(), String> {
    let area = overlay.target.parent().ok_or("the root file system has no folder")?;
    let own = (pod.map, open(&pod.path)?);
    let (mut others, mut copies) = (Vec::new(), Vec::new());
    for (at, mount) in spec.mounts().iter().flatten().enumerate().filter(|(_, m)| is_staged(m)) {
        copies.push((at, copy(mount, Some(&own), &mut others)?));
    }
    // The layers are found by a path that the area may cover.
    let folder = area.join("layers");
    userns::cover(area)?;
    let label = spec.linux().as_ref().and_then(|l| l.mount_label().as_ref());
    let rootfs = map_layers(overlay, label, &own.1, &folder)?;
    let (uid, gid) = pod.map.root().map_err(|e| e.to_string())?;
    chown(&overlay.upper, Some(uid), Some(gid))
        .map_err(|e| format!("giving away {}: {e}", overlay.upper.display()))?;
    make_directory(&overlay.target)?;
    crate::snapshot::mount(&rootfs).map_err(|e| format!("mounting the root file system: {e}"))?;
    // Not mounted for an image without layers.
    let _ = umount2(&folder, MntFlags::MNT_DETACH);
    place(spec, copies, area)
}

fn place(spec: &mut Spec, copies: Vec<(usize, Detached)>, area: &Path) -> Result<(), String> {
    let Some(mounts) = spec.mounts_mut() else { return Ok(()) };
    for (at, copy) in copies {
        let mount = &mut mounts[at];
        let here: PathBuf = area.join(at.to_string());
        let name = source(mount).display().to_string();
        let said = |e: std::io::Error| format!("attaching the copy of {name}: {e}");
        let mode = fstat(&copy).map_err(|e| said(e.into()))?.st_mode;
        if SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
            make_directory(&here)?;
        } else {
            File::create(&here).map_err(|e| format!("making {}: {e}", here.display()))?;
        }
        copy.attach_at(&here).map_err(said)?;
        mount.set_source(Some(here));
        mount.set_uid_mappings(None);
        mount.set_gid_mappings(None);
    }
    // A mount that came from a stronger user namespace keeps how it tells times of access.
    for mount in mounts.iter_mut().filter(|mount| is_bind(mount)) {
        if let Some(options) = mount.options_mut() {
            options.retain(|option| option != "relatime");
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), String> {
    fs::create_dir(path).map_err(|e| format!("making {}: {e}", path.display()))
}
