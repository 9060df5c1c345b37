//! The cgroup of a container, from the `cgroup_parent` the kubelet names in its driver's way.

use std::path::PathBuf;

use super::SpecError;
use crate::config::CgroupDriver;

/// The parent cgroup as a path from the root of a hierarchy.
///
/// systemd spells a slice's ancestors in its name: `kubepods-burstable-podX.slice` is
/// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice` (systemd.slice(5)).
pub fn parent(cgroup_parent: &str, driver: CgroupDriver) -> Result<PathBuf, SpecError> {
    let name = cgroup_parent.rsplit('/').next().unwrap_or_default();
    if driver == CgroupDriver::Cgroupfs && !name.ends_with(".slice") {
        return clean(cgroup_parent);
    }
    let Some(stem) = name.strip_suffix(".slice") else { return clean(cgroup_parent) };
    if stem == "-" || stem.is_empty() {
        return Ok(PathBuf::from("/"));
    }
    let bad = || SpecError::BadSlice(cgroup_parent.to_owned());
    if stem.starts_with('-') || stem.ends_with('-') || stem.contains("--") {
        return Err(bad());
    }
    let mut path = PathBuf::from("/");
    for (at, _) in stem.match_indices('-') {
        path.push(format!("{}.slice", &stem[..at]));
    }
    path.push(name);
    Ok(path)
}

/// The container's own cgroup below `parent`.
pub fn container(parent: &std::path::Path, id: &str, driver: CgroupDriver) -> PathBuf {
    match driver {
        CgroupDriver::Cgroupfs => parent.join(id),
        CgroupDriver::Systemd => parent.join(format!("cri-longshore-{id}.scope")),
    }
}

fn clean(path: &str) -> Result<PathBuf, SpecError> {
    let mut clean = PathBuf::from("/");
    for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
        if part == ".." {
            return Err(SpecError::BadSlice(path.to_owned()));
        }
        clean.push(part);
    }
    Ok(clean)
}
