//! Mounts and folders: unmounted and removed, never across a mount that is still there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::volume::mount_points;

/// Unmounts everything below `dirs`, the latest mounts first; what is busy is detached.
pub(super) fn unmount_below(dirs: &[PathBuf]) -> (String, Vec<String>) {
    let mountinfo = match fs::read("/proc/self/mountinfo") {
        Ok(text) => text,
        Err(e) => return (String::new(), vec![format!("cannot read /proc/self/mountinfo: {e}")]),
    };
    // A folder that is itself a mount point was made so by the administrator and stays.
    let below = |path: &PathBuf| dirs.iter().any(|dir| path.starts_with(dir) && path != dir);
    let mut points: Vec<PathBuf> = mount_points(&mountinfo).into_iter().filter(below).collect();
    points.reverse();
    let mut failures = Vec::new();
    for point in &points {
        if umount2(point, MntFlags::UMOUNT_NOFOLLOW).is_ok() {
            continue;
        }
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // EINVAL: it went with another.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => failures.push(format!("cannot unmount {}: {error}", point.display())),
        }
    }
    (format!("{} unmounted", points.len() - failures.len()), failures)
}

/// Removes `dir` and all in it; of a folder that is a mount point, what is in it. Returns whether
/// there was anything. Stops at mounts.
pub(super) fn remove(dir: &Path) -> Result<bool, String> {
    let failed = |path: &Path, e: io::Error| format!("cannot remove {}: {e}", path.display());
    let metadata = match fs::symlink_metadata(dir) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(failed(dir, e)),
    };
    if !metadata.is_dir() {
        return Err(failed(dir, io::Error::other("it is no folder")));
    }
    remove_entries(dir, metadata.dev())?;
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::ResourceBusy => Err(failed(dir, e)),
        _ => Ok(true),
    }
}

fn remove_entries(dir: &Path, device: u64) -> Result<(), String> {
    let failed = |path: &Path, e: io::Error| format!("cannot remove {}: {e}", path.display());
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let path = entry.map_err(|e| failed(dir, e))?.path();
        let metadata = fs::symlink_metadata(&path).map_err(|e| failed(&path, e))?;
        if metadata.is_dir() {
            if metadata.dev() != device {
                return Err(failed(&path, io::Error::other("something is still mounted there")));
            }
            remove_entries(&path, device)?;
            fs::remove_dir(&path).map_err(|e| failed(&path, e))?;
        } else {
            fs::remove_file(&path).map_err(|e| failed(&path, e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn folders_go_with_all_in_them_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, kept) = (dir.path().join("a"), dir.path().join("kept"));
        fs::create_dir_all(victim.join("b/c")).unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("f"), "").unwrap();
        std::os::unix::fs::symlink(&kept, victim.join("b/link")).unwrap();
        assert_eq!(remove(&victim), Ok(true));
        assert_eq!(remove(&victim), Ok(false));
        assert!(kept.join("f").exists());
    }
}
