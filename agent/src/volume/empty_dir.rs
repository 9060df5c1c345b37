//! `emptyDir`: a directory that lives as long as its pod; on disk, in memory, or in huge pages.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod};

use super::VolumeError;
use super::mounts::{mount_hugetlbfs, mount_tmpfs};
use crate::config::parse_bytes;

/// What backs an emptyDir.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// The disk under the pod root. A size limit is watched, not enforced.
    Disk,
    /// A tmpfs of at most so many bytes.
    Memory(Option<u64>),
    /// Huge pages: page size and total, in bytes.
    HugePages(u64, u64),
}

/// Decides what backs the volume `name` of `pod`.
pub(super) fn plan_medium(
    pod: &Pod,
    name: &str,
    source: &EmptyDirVolumeSource,
) -> Result<Medium, VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid { volume: name.into(), reason };
    let limit =
        match &source.size_limit {
            None => None,
            Some(limit) => Some(parse_bytes(&limit.0).ok_or_else(|| {
                invalid(format!("emptyDir.sizeLimit {:?} is no quantity", limit.0))
            })?),
        }
        .filter(|limit| *limit > 0);
    match source.medium.as_deref().unwrap_or_default() {
        "" => Ok(Medium::Disk),
        "Memory" => {
            // Never more than the pod may use (KEP-1967).
            Ok(Medium::Memory([limit, pod_memory_limit(pod)].into_iter().flatten().min()))
        }
        medium => {
            let sizes = huge_page_requests(pod);
            let chosen = match medium.strip_prefix("HugePages") {
                Some("") if sizes.len() == 1 => sizes.first().copied(),
                Some("") => {
                    return Err(invalid(format!(
                        "emptyDir.medium HugePages needs one page size in the containers' \
                         resources, found {}; name it as HugePages-<size>",
                        sizes.len()
                    )));
                }
                Some(size) => parse_bytes(size.trim_start_matches('-'))
                    .and_then(|size| sizes.iter().copied().find(|(page, _)| *page == size)),
                None => return Err(invalid(format!("emptyDir.medium {medium:?} is unknown"))),
            };
            let (page, total) = chosen.ok_or_else(|| {
                invalid(format!("emptyDir.medium {medium:?}: no container asks for such pages"))
            })?;
            Ok(Medium::HugePages(page, limit.map_or(total, |limit| limit.min(total))))
        }
    }
}

/// The memory that all containers together may use, if all are limited.
fn pod_memory_limit(pod: &Pod) -> Option<u64> {
    let spec = pod.spec.as_ref()?;
    let limits = spec.containers.iter().map(|container| {
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        parse_bytes(&limits.get("memory")?.0)
    });
    limits.sum::<Option<u64>>().filter(|limit| *limit > 0)
}

/// Page sizes that the containers ask for, each with its total.
fn huge_page_requests(pod: &Pod) -> Vec<(u64, u64)> {
    let mut sizes: Vec<(u64, u64)> = Vec::new();
    for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
        let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
        for (resource, quantity) in limits.into_iter().flatten() {
            let page = resource.strip_prefix("hugepages-").and_then(parse_bytes);
            if let (Some(page), Some(total)) = (page, parse_bytes(&quantity.0)) {
                match sizes.iter_mut().find(|(known, _)| *known == page) {
                    Some((_, sum)) => *sum = sum.saturating_add(total),
                    None => sizes.push((page, total)),
                }
            }
        }
    }
    sizes
}

/// Makes the directory, open to every user of the pod's containers.
pub(super) fn apply(path: &Path, medium: Medium, group: Option<u32>) -> Result<(), VolumeError> {
    fs::create_dir_all(path).map_err(VolumeError::io("create", path))?;
    match medium {
        Medium::Disk => {}
        Medium::Memory(size) => mount_tmpfs(path, size, false)?,
        Medium::HugePages(page, size) => mount_hugetlbfs(path, page, size)?,
    }
    let mode = if group.is_some() { 0o2777 } else { 0o777 };
    chown(path, None, group).map_err(VolumeError::io("chown", path))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(VolumeError::io("chmod", path))
}
