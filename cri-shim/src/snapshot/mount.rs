//! Mounting an overlay by the interface that the kernel at hand has.
//!
//! mount(2) works everywhere, but takes one page of options. With the layers named relative to
//! their common folder that is room for some 140 of them, more than image builders make. Beyond it
//! there is fsconfig(2) with an option per layer (`lowerdir+`, kernel 6.5). It is not tried first:
//! an older kernel refuses it after logging an error for each container.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, umount2},
    unistd::chdir,
};

use super::{Rootfs, SnapshotError};
use crate::mount::{Detached, attr, context, context_option};
use crate::selinux::label_one;

/// Mounts `rootfs` at its `merged` folder in the caller's mount namespace. An image without layers
/// is its bare upper folder, bind mounted.
///
/// The mount is `volatile` where the kernel has it: containers do not outlive the node, so syncing
/// all they wrote when they are removed would only cost time.
///
/// # Errors
/// [`SnapshotError::Io`] with the kernel's reason.
pub fn mount(rootfs: &Rootfs) -> Result<(), SnapshotError> {
    // What a volatile mount leaves behind; it would refuse to be mounted again, as after a reboot.
    let _ = fs::remove_dir_all(rootfs.work.join("work/incompat"));
    if let Some(label) = &rootfs.label {
        let failed = SnapshotError::io("label", &rootfs.upper);
        let upper = fs::File::open(&rootfs.upper);
        upper.and_then(|upper| label_one(&upper, label)).map_err(failed)?;
    }
    if rootfs.lowerdirs.is_empty() {
        return nix::mount::mount(
            Some(&rootfs.upper),
            &rootfs.merged,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(|errno| SnapshotError::io("bind mount", &rootfs.merged)(errno.into()));
    }
    let mounted = match Options::of(rootfs) {
        Some(options) if options.text.len() < PAGE - VOLATILE.len() => mount_by_options(&options),
        _ => mount_by_layers(rootfs).map_err(explain),
    };
    mounted.map_err(SnapshotError::io("mount overlay", &rootfs.merged))
}

/// Mounts an image's files, topmost layer first, so that nobody can change them, all of them with an
/// SELinux label if one is given. `target` is an empty folder.
///
/// # Errors
/// [`SnapshotError::Io`] with the kernel's reason.
pub fn mount_read_only(
    lowerdirs: &[PathBuf],
    target: &Path,
    label: Option<&str>,
) -> Result<(), SnapshotError> {
    let mounted = match (lowerdirs, label) {
        ([], _) => {
            let size = format!("size=4k{}", label.map(context_option).unwrap_or_default());
            let (kind, flags) = (Some("tmpfs"), MsFlags::MS_RDONLY);
            nix::mount::mount(Some("none"), target, kind, flags, Some(size.as_str()))
                .map_err(io::Error::from)
        }
        // An overlay needs two layers, or one to write to.
        ([only], None) => bind_read_only(only, target),
        ([only], Some(_)) => {
            overlay_read_only(&[only.clone(), target.to_path_buf()], target, label)
        }
        (layers, _) => overlay_read_only(layers, target, label),
    };
    mounted.map_err(SnapshotError::io("mount image", target))
}

fn bind_read_only(source: &Path, target: &Path) -> io::Result<()> {
    let mount = |source: Option<&Path>, more: MsFlags| {
        nix::mount::mount(source, target, None::<&str>, MsFlags::MS_BIND | more, None::<&str>)
    };
    mount(Some(source), MsFlags::empty())?;
    Ok(mount(None, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?)
}

fn overlay_read_only(layers: &[PathBuf], target: &Path, label: Option<&str>) -> io::Result<()> {
    let kind = Some("overlay");
    let folder = layers.first().and_then(|first| first.parent()?.parent());
    let text = lower_option(layers)
        .map(|text| text + &label.map(context_option).unwrap_or_default())
        .filter(|text| text.len() < PAGE);
    if let (Some(folder), Some(text)) = (folder, text) {
        return in_folder(folder, || {
            let flags = MsFlags::MS_RDONLY;
            Ok(nix::mount::mount(kind, target, kind, flags, Some(text.as_str()))?)
        });
    }
    let layers = layers.iter().map(|path| format!("lowerdir+={}", path.display()));
    let options: Vec<String> = layers.chain(label.map(context)).collect();
    Detached::new("overlay", "overlay", &options, attr::RDONLY)
        .and_then(|made| made.attach_at(target))
        .map_err(explain)
}

/// What mount(2) takes of options, with the byte that ends them.
const PAGE: usize = 4096;
const VOLATILE: &str = ",volatile";

/// An overlay's mount options, with the layers relative to a folder.
#[derive(Debug, PartialEq, Eq)]
struct Options<'a> {
    folder: &'a Path,
    merged: &'a Path,
    text: String,
}

impl<'a> Options<'a> {
    /// `None` when a name has a character that means something in the options.
    fn of(rootfs: &'a Rootfs) -> Option<Self> {
        let folder = rootfs.lowerdirs.first()?.parent()?.parent()?;
        let mut text = lower_option(&rootfs.lowerdirs)?;
        text.push_str(",upperdir=");
        text.push_str(plain(&rootfs.upper)?);
        text.push_str(",workdir=");
        text.push_str(plain(&rootfs.work)?);
        if let Some(label) = &rootfs.label {
            text.push_str(&context_option(label));
        }
        Some(Options { folder, merged: &rootfs.merged, text })
    }
}

/// The layers, relative to the folder of the first.
fn lower_option(lowerdirs: &[PathBuf]) -> Option<String> {
    let folder = lowerdirs.first()?.parent()?.parent()?;
    let mut text = String::from("lowerdir=");
    for (at, lower) in lowerdirs.iter().enumerate() {
        if at > 0 {
            text.push(':');
        }
        text.push_str(plain(lower.strip_prefix(folder).unwrap_or(lower))?);
    }
    Some(text)
}

fn plain(path: &Path) -> Option<&str> {
    path.to_str().filter(|text| !text.contains([':', ',', '\\']))
}

fn mount_by_options(options: &Options<'_>) -> io::Result<()> {
    let mount = |text: &str| -> io::Result<()> {
        let (kind, flags) = (Some("overlay"), MsFlags::empty());
        Ok(nix::mount::mount(kind, options.merged, kind, flags, Some(text))?)
    };
    in_folder(options.folder, || {
        mount(&format!("{}{VOLATILE}", options.text)).or_else(|_| mount(&options.text))
    })
}

/// In a thread whose working directory is its own.
fn in_folder(folder: &Path, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
                chdir(folder)?;
                work()
            })
            .join()
            .map_err(|_| io::Error::other("the mounting thread panicked"))?
    })
}

fn mount_by_layers(rootfs: &Rootfs) -> io::Result<()> {
    let lower = rootfs.lowerdirs.iter().map(std::path::PathBuf::as_path);
    Detached::overlay(lower, &rootfs.upper, &rootfs.work, rootfs.label.as_deref())?
        .attach_at(&rootfs.merged)
}

/// Says what a kernel without `lowerdir+` means by its refusal.
fn explain(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP) => io::Error::new(
            error.kind(),
            format!(
                "{error}: so many layers, or a state directory with one of \":,\\\" in its name, \
                 need Linux 6.5 or newer"
            ),
        ),
        _ => error,
    }
}

/// Whether something is mounted at `path`.
pub fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let parent = path.parent().and_then(|parent| fs::metadata(parent).ok());
    match (fs::metadata(path), parent) {
        (Ok(here), Some(above)) => here.dev() != above.dev(),
        _ => false,
    }
}

/// Unmounts whatever is mounted at `path`; nothing there is a success.
///
/// # Errors
/// [`SnapshotError::Io`].
pub fn unmount(path: &Path) -> Result<(), SnapshotError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(SnapshotError::io("unmount", path)(errno.into())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Folders of an overlay in `state`, each layer with a file of its own and one all share.
    fn rootfs(state: &Path, layers: usize) -> Rootfs {
        let made = |name: String| {
            let path = state.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let lowerdirs: Vec<_> =
            (0..layers).map(|n| made(format!("images/layers/{n:024}/d"))).collect();
        for (n, lower) in lowerdirs.iter().enumerate() {
            fs::write(lower.join(format!("{n}")), "").unwrap();
            fs::write(lower.join("which"), n.to_string()).unwrap();
        }
        let snapshot = format!("snapshots/{:064}", 0);
        Rootfs {
            lowerdirs,
            upper: made(format!("{snapshot}/upper")),
            work: made(format!("{snapshot}/work")),
            merged: made(format!("{snapshot}/merged")),
            label: None,
        }
    }

    fn older_than_6_5() -> bool {
        let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
        let mut parts = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        (parts.next().unwrap(), parts.next().unwrap()) < (6, 5)
    }

    #[test]
    fn the_layers_of_an_image_fit_in_a_page_of_options() {
        let state = tempfile::tempdir().unwrap();
        // Builders stop at 127 layers.
        let rootfs = rootfs(state.path(), 128);
        let options = Options::of(&rootfs).unwrap();
        assert!(options.text.starts_with("lowerdir=000000000000000000000000/d:0000"));
        assert!(options.text.len() + VOLATILE.len() < PAGE, "{}", options.text.len());
        let labelled = Rootfs { label: Some("a:b:c:s0:c1,c2".into()), ..rootfs.clone() };
        let text = Options::of(&labelled).unwrap().text;
        assert!(text.ends_with(",context=\"a:b:c:s0:c1,c2\""), "{text}");
        let odd = Rootfs { upper: "/a,b".into(), ..rootfs };
        assert_eq!(Options::of(&odd), None);
    }

    /// Mounts on the real kernel, in a mount namespace of the test's own: by mount(2), by fsconfig(2)
    /// for more layers than fit, and for a folder whose name the options cannot hold.
    #[test]
    fn overlays_of_few_many_and_odd_folders_are_mounted() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        for (name, layers) in [("few", 2), ("many", 120), ("more", 200), ("od,d:", 2)] {
            let state = tempfile::tempdir().unwrap();
            // Not on an overlay, which cannot be an upper layer.
            let kind = Some("tmpfs");
            nix::mount::mount(kind, state.path(), kind, MsFlags::empty(), None::<&str>).unwrap();
            let rootfs = rootfs(&state.path().join(name), layers);
            match mount(&rootfs) {
                Err(error) if older_than_6_5() => {
                    assert!(Options::of(&rootfs).is_none_or(|o| o.text.len() > PAGE));
                    assert!(error.to_string().contains("6.5"), "{error}");
                    continue;
                }
                mounted => mounted.unwrap(),
            }
            let read = |name: &str| fs::read_to_string(rootfs.merged.join(name)).unwrap();
            assert_eq!(read("which"), "0", "the first layer is the topmost of {name}");
            assert_eq!(read(&format!("{}", layers - 1)), "");
            fs::write(rootfs.merged.join("new"), "").unwrap();
            assert!(rootfs.upper.join("new").exists());
            unmount(&rootfs.merged).unwrap();
            unmount(state.path()).unwrap();
        }
    }
}
