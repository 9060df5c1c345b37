//! The volumes that an image declares (`VOLUME` of a Dockerfile): folders of the container's own,
//! beside its root file system. They begin with what the image has at their place, can be written
//! where the root file system cannot, and go with the container.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::scoped;
use crate::snapshot::mount_read_only;
use crate::spec::Declared;

/// Where the volumes of a container are, below its directory.
const FOLDER: &str = "volumes";

/// Makes a container's volumes out of its image's layers, topmost first.
pub(super) fn make(
    directory: &Path,
    layers: &[PathBuf],
    targets: &[PathBuf],
) -> Result<(), String> {
    if targets.is_empty() {
        return Ok(());
    }
    let folder = directory.join(FOLDER);
    let image = folder.join("image");
    // The image is mounted where nobody else sees it, and gone with the thread, whatever happens.
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            let made =
                fs::create_dir_all(&image).and_then(|()| Ok(unshare(CloneFlags::CLONE_NEWNS)?));
            made.and_then(|()| {
                let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
                Ok(mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?)
            })
            .map_err(|e| e.to_string())?;
            mount_read_only(layers, &image, None).map_err(|e| e.to_string())?;
            for (at, target) in targets.iter().enumerate() {
                fill(&image, target, &folder.join(at.to_string()))
                    .map_err(|e| format!("copying {} of the image: {e}", target.display()))?;
            }
            Ok(())
        });
        made.join().unwrap_or_else(|_| Err("the thread panicked".to_owned()))
    })?;
    fs::remove_dir(&image).map_err(|e| e.to_string())
}

/// The volumes that were made of a container, with where they go. One of before there were such
/// volumes has none.
pub(super) fn find(directory: &Path, targets: Vec<PathBuf>) -> Vec<Declared> {
    let source = |at: usize| directory.join(FOLDER).join(at.to_string());
    let all = targets.into_iter().enumerate();
    all.map(|(at, target)| Declared { source: source(at), target })
        .filter(|volume| volume.source.is_dir())
        .collect()
}

fn fill(image: &Path, target: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    let Some(from) = locate(image, target)? else { return Ok(()) };
    copy_tree(&PathBuf::from(format!("/proc/self/fd/{}", from.as_raw_fd())), to)
}

/// The folder that the image has there, its links followed as the container would.
fn locate(image: &Path, target: &Path) -> io::Result<Option<OwnedFd>> {
    let root = fs::File::open(image)?;
    let relative = target.strip_prefix("/").unwrap_or(target);
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    match scoped::open(&root, relative, how).map_err(io::Error::from) {
        Err(e) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&e.kind()) => {
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// Copies what is in a folder, with owners, modes and times of change. Nothing changes the source
/// meanwhile, and nobody else has the copy yet.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let mut folders = vec![(from.to_path_buf(), to.to_path_buf())];
    let mut at = 0;
    while let Some((from, to)) = folders.get(at).cloned() {
        at += 1;
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            let (source, copy) = (entry.path(), to.join(entry.file_name()));
            let kind = entry.file_type()?;
            if kind.is_dir() {
                fs::create_dir(&copy)?;
                folders.push((source, copy));
            } else if kind.is_symlink() {
                symlink(fs::read_link(&source)?, &copy)?;
                let meta = fs::symlink_metadata(&source)?;
                lchown(&copy, Some(meta.uid()), Some(meta.gid()))?;
            } else if kind.is_file() {
                fs::copy(&source, &copy)?;
                adopt(&source, &copy)?;
            }
            // Sockets, pipes and devices of an image are no content.
        }
    }
    // The innermost first: making an entry changes its folder's time.
    for (from, to) in folders.iter().rev() {
        adopt(from, to)?;
    }
    Ok(())
}

fn adopt(from: &Path, to: &Path) -> io::Result<()> {
    let meta = fs::metadata(from)?;
    // A new owner takes setuid away.
    chown(to, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    fs::File::open(to)?.set_modified(meta.modified()?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// On the real kernel: needs root.
    #[test]
    fn volumes_begin_with_what_the_image_has_there() {
        let root = tempfile::tempdir().unwrap();
        let layer = root.path().join("layers/1/d");
        fs::create_dir_all(layer.join("data/sub")).unwrap();
        fs::write(layer.join("data/sub/tool"), "x").unwrap();
        chown(layer.join("data"), Some(1000), Some(2000)).unwrap();
        chown(layer.join("data/sub/tool"), Some(7), Some(8)).unwrap();
        fs::set_permissions(layer.join("data"), fs::Permissions::from_mode(0o1770)).unwrap();
        fs::set_permissions(layer.join("data/sub/tool"), fs::Permissions::from_mode(0o4755))
            .unwrap();
        symlink("/etc/shadow", layer.join("data/link")).unwrap();
        symlink("../../../../data", layer.join("climbs")).unwrap();
        fs::write(layer.join("file"), "y").unwrap();
        let directory = root.path().join("c");
        let targets = ["/data", "/absent", "/file", "/climbs"].map(PathBuf::from);
        make(&directory, std::slice::from_ref(&layer), &targets).unwrap();
        let volumes = find(&directory, targets.to_vec());
        let entries = |at: usize| fs::read_dir(&volumes[at].source).unwrap().count();
        assert_eq!([0, 1, 2, 3].map(entries), [2, 0, 0, 2]);
        let of = |path: &str| {
            let meta = fs::symlink_metadata(volumes[0].source.join(path)).unwrap();
            (meta.uid(), meta.gid(), meta.mode() & 0o7777)
        };
        assert_eq!(of("."), (1000, 2000, 0o1770));
        assert_eq!(of("sub/tool"), (7, 8, 0o4755));
        assert!(fs::symlink_metadata(volumes[0].source.join("link")).unwrap().is_symlink());
        assert!(!directory.join("volumes/image").exists());
        assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains("volumes/image"));
        assert!(find(&root.path().join("old"), targets.to_vec()).is_empty());
    }
}
