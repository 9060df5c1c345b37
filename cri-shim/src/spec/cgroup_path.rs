//! The cgroup of a container, from the `cgroup_parent` the kubelet names in its driver's way.

use std::path::{Path, PathBuf};

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
pub fn container(parent: &Path, id: &str, driver: CgroupDriver) -> PathBuf {
    match driver {
        CgroupDriver::Cgroupfs => parent.join(id),
        CgroupDriver::Systemd => parent.join(format!("cri-longshore-{id}.scope")),
    }
}

/// The monitor's own cgroup in the pod's: on v2 a cgroup with children may not hold processes.
pub fn monitor(parent: &Path, sandbox: &str) -> PathBuf {
    match slice_name(parent) {
        Some(_) => parent.join(format!("longshore-{sandbox}.scope")),
        None => parent.join("longshore-monitor"),
    }
}

/// A scope in systemd's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Its name.
    pub unit: String,
    /// The slice it is in.
    pub slice: String,
}

/// The scope that a cgroup is, if it is one directly in a slice.
pub fn scope_of(cgroup: &Path) -> Option<Scope> {
    let unit = cgroup.file_name()?.to_str().filter(|name| name.ends_with(".scope"))?;
    let slice = slice_name(cgroup.parent()?)?;
    Some(Scope { unit: unit.to_owned(), slice: slice.to_owned() })
}

fn slice_name(cgroup: &Path) -> Option<&str> {
    cgroup.file_name()?.to_str().filter(|name| name.ends_with(".slice"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_and_monitors_in_slices_are_scopes() {
        let slice = Path::new("/kubepods.slice/kubepods-podx.slice");
        let scope = |unit: &str| {
            let slice = "kubepods-podx.slice".to_owned();
            Some(Scope { unit: unit.to_owned(), slice })
        };
        assert_eq!(
            scope_of(&container(slice, "a", CgroupDriver::Systemd)),
            scope("cri-longshore-a.scope")
        );
        assert_eq!(scope_of(&monitor(slice, "b")), scope("longshore-b.scope"));
        let plain = Path::new("/longshore/b");
        assert_eq!(scope_of(&container(plain, "a", CgroupDriver::Systemd)), None);
        assert_eq!(monitor(plain, "b"), plain.join("longshore-monitor"));
    }
}
