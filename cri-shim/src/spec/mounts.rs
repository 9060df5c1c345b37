//! The mounts of a container: the kernel's file systems, the sandbox's files, the pod's volumes.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};

use super::userns::{self, IdMap};
use super::{Host, HostDevice, Inputs, SpecError};
use crate::api::{self, MountPropagation};

const SYS: [&str; 4] = ["nosuid", "noexec", "nodev", "relatime"];

/// All mounts in the order they are to be made: a parent before what is below it. A volume
/// mounted at the place of a default mount replaces it.
pub(super) fn plan(inputs: &Inputs<'_>, privileged: bool) -> Result<Vec<Mount>, SpecError> {
    let (config, pod) = (inputs.config, inputs.pod);
    let access = if privileged { "rw" } else { "ro" };
    let mut kernel = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])?,
    ];
    kernel.extend(cgroups(inputs, access, privileged)?);

    let mut bound = Vec::new();
    for (target, source) in &pod.files {
        let mut file = bind(source, target, &["rbind", "rprivate", "rw"])?;
        if let Some(userns) = &pod.userns {
            map_ids(&mut file, &userns.map)?;
        }
        bound.push(file);
    }
    for volume in &inputs.declared {
        let options = ["rbind", "rprivate", "rw"];
        let mut declared = bind(&volume.source, &volume.target, &options)?;
        if let Some(userns) = &pod.userns {
            map_ids(&mut declared, &userns.map)?;
        }
        bound.push(declared);
    }
    if pod.userns.is_some() {
        for device in &inputs.devices {
            bound.push(plan_device(device)?);
        }
    }
    if !pod.shm.as_os_str().is_empty() {
        bound.push(bind(&pod.shm, "/dev/shm", &["rbind", "rprivate", "rw"])?);
    }
    let mut volumes = Vec::new();
    let mut images = 0;
    for volume in &config.mounts {
        volumes.push(match volume.image {
            Some(_) => plan_image(volume, &staged(&inputs.image_volumes, &mut images))?,
            None => plan_volume(volume)?,
        });
    }
    // What the node has at these places comes whole.
    let whole = ["/dev", "/sys/fs/cgroup"].map(Path::new);
    let whole =
        whole.map(|place| (place, volumes.iter().any(|v| same_place(v.destination(), place))));
    let replaced = |m: &Mount| {
        let below = whole.iter().any(|(place, given)| *given && m.destination().starts_with(place));
        below || volumes.iter().any(|v| same_place(v.destination(), m.destination()))
    };
    kernel.retain(|m| !replaced(m));
    bound.retain(|m| !replaced(m));
    bound.append(&mut volumes);
    bound.sort_by_key(|m| m.destination().components().count());
    kernel.append(&mut bound);
    Ok(kernel)
}

/// The container's view of its cgroups. On v1 each hierarchy is bound from the container's own
/// directory, as the runtimes do it.
fn cgroups(inputs: &Inputs<'_>, access: &str, privileged: bool) -> Result<Vec<Mount>, SpecError> {
    let mut options = SYS.to_vec();
    if inputs.host.cgroup_v2 {
        options.push(access);
        // Without a cgroup namespace it is the node's own mount that these options are given to.
        if privileged {
            options.extend(inputs.host.cgroup_v2_options.iter().map(String::as_str));
        }
        return Ok(vec![mount("/sys/fs/cgroup", "cgroup", "cgroup", &options)?]);
    }
    options.extend(["mode=755", "size=64k"]);
    let mut mounts = vec![mount("/sys/fs/cgroup", "tmpfs", "tmpfs", &options)?];
    let own = inputs.cgroup.strip_prefix("/").unwrap_or(&inputs.cgroup);
    for hierarchy in &inputs.host.cgroup_v1 {
        let target = Path::new("/sys/fs/cgroup").join(hierarchy);
        let mut options = SYS.to_vec();
        options.extend(["bind", access]);
        mounts.push(bind(&target.join(own), &target, &options)?);
    }
    Ok(mounts)
}

/// Adds a mount in the place of one at the same path, and where a parent comes before what is below
/// it.
pub(crate) fn place(mounts: &mut Vec<Mount>, mount: Mount) {
    mounts.retain(|other| !same_place(other.destination(), mount.destination()));
    mounts.push(mount);
    mounts.sort_by_key(|m| m.destination().components().count());
}

fn same_place(a: &Path, b: &Path) -> bool {
    a.components().eq(b.components())
}

/// Where the volumes go that an image declares: not where the pod has a volume of its own, nor where
/// every container has what is the runtime's.
pub fn declared(image: &[String], volumes: &[api::Mount]) -> Vec<PathBuf> {
    const RUNTIMES: [&str; 6] =
        ["/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];
    let taken = |path: &Path| {
        let given = |volume: &api::Mount| Path::new("/").join(&volume.container_path);
        path == Path::new("/")
            || RUNTIMES.iter().any(|place| path.starts_with(place))
            || volumes.iter().any(|volume| same_place(&given(volume), path))
    };
    let paths = image.iter().map(|path| {
        let plain = |part: &Component| matches!(part, Component::Normal(_));
        let parts = Path::new(path).components().filter(plain);
        Path::new("/").join(parts.collect::<PathBuf>())
    });
    let mut paths: Vec<PathBuf> = paths.filter(|path| !taken(path)).collect();
    paths.sort();
    paths.dedup();
    paths
}

/// Refuses volumes that cannot be mounted on this machine.
pub(super) fn check(volumes: &[api::Mount], host: &Host) -> Result<(), SpecError> {
    for volume in volumes {
        match volume.image {
            Some(_) => plan_image(volume, Path::new("/"))?,
            None => plan_volume(volume)?,
        };
        if volume.recursive_read_only && !host.recursive_read_only {
            return Err(bad(
                volume,
                "recursiveReadOnly needs mount_setattr(2), Linux 5.12 or newer",
            ));
        }
    }
    Ok(())
}

/// Where the monitor mounts a container's nth image volume, to be bound from there.
pub fn staged(folder: &Path, at: &mut usize) -> PathBuf {
    let path = folder.join(at.to_string());
    *at += 1;
    path
}

fn bad(volume: &api::Mount, reason: &'static str) -> SpecError {
    SpecError::BadMount {
        source_path: volume.host_path.clone(),
        target: volume.container_path.clone(),
        reason,
    }
}

/// An image's files, which nobody may change: other containers have the same.
fn plan_image(volume: &api::Mount, source: &Path) -> Result<Mount, SpecError> {
    if !volume.host_path.is_empty() {
        return Err(bad(volume, "an image volume has no host path"));
    }
    if !volume.readonly {
        return Err(bad(volume, "an image volume must be read-only"));
    }
    if volume.image.as_ref().is_none_or(|image| image.image.is_empty()) {
        return Err(bad(volume, "the image volume names no image"));
    }
    if volume.container_path.is_empty() {
        return Err(bad(volume, "the container path must not be empty"));
    }
    bind(source, Path::new("/").join(&volume.container_path), &["rbind", "rprivate", "ro"])
}

fn plan_volume(volume: &api::Mount) -> Result<Mount, SpecError> {
    let bad = |reason| bad(volume, reason);
    if volume.host_path.is_empty() || !volume.host_path.starts_with('/') {
        return Err(bad("the host path must be absolute"));
    }
    if volume.container_path.is_empty() {
        return Err(bad("the container path must not be empty"));
    }
    let propagation = match volume.propagation() {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional => "rshared",
    };
    let access = match (volume.readonly, volume.recursive_read_only) {
        (true, true) if propagation != "rprivate" => {
            return Err(bad("recursiveReadOnly needs private propagation"));
        }
        (true, true) => "rro",
        (true, false) => "ro",
        (false, true) => return Err(bad("recursiveReadOnly needs readOnly")),
        (false, false) => "rw",
    };
    let target = Path::new("/").join(&volume.container_path);
    let mut mount = bind(Path::new(&volume.host_path), target, &["rbind", propagation, access])?;
    if !volume.uid_mappings.is_empty() || !volume.gid_mappings.is_empty() {
        map_ids(&mut mount, &userns::plan_mappings(&volume.uid_mappings, &volume.gid_mappings)?)?;
    }
    Ok(mount)
}

/// Files of such a mount belong to the same ids in the container as on the disk.
fn map_ids(mount: &mut Mount, map: &IdMap) -> Result<(), SpecError> {
    let [uids, gids] = map.oci()?;
    mount.set_uid_mappings(Some(uids));
    mount.set_gid_mappings(Some(gids));
    Ok(())
}

fn plan_device(device: &HostDevice) -> Result<Mount, SpecError> {
    bind(&device.host, &device.path, &["bind", "rprivate", "rw"])
}

/// Propagation the container's root needs for its volumes to send or receive mounts.
pub(super) fn rootfs_propagation(volumes: &[api::Mount]) -> Option<&'static str> {
    let most = volumes.iter().map(api::Mount::propagation).max_by_key(|p| *p as i32)?;
    match most {
        MountPropagation::PropagationPrivate => None,
        MountPropagation::PropagationHostToContainer => Some("slave"),
        MountPropagation::PropagationBidirectional => Some("shared"),
    }
}

fn mount(target: &str, typ: &str, source: &str, options: &[&str]) -> Result<Mount, SpecError> {
    Ok(MountBuilder::default()
        .destination(target)
        .typ(typ)
        .source(source)
        .options(options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
        .build()?)
}

fn bind(source: &Path, target: impl AsRef<Path>, options: &[&str]) -> Result<Mount, SpecError> {
    Ok(MountBuilder::default()
        .destination(target.as_ref())
        .typ("bind")
        .source(source)
        .options(options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
        .build()?)
}
