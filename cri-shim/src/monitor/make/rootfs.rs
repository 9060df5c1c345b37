//! The container's file system: its mounts, its devices, and the change of the root to it.
//!
//! Runs in the mount namespace that becomes the container's, before anything of the container does.
//! Paths inside are an image's and a pod's word: each is resolved within the root and used as an
//! open descriptor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{chdir, fchdir, pivot_root};
use oci_spec::runtime::{Mount, Spec};

use super::super::inroot::{Place, Root};
use super::devices;
use super::options::{self, Options};
use super::users::Held;
use crate::mount::Detached;

type Result<T> = std::result::Result<T, String>;

/// Files of `/proc` that may have something else mounted over them (lxcfs does).
const REPLACEABLE: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/sys/crypto/fips_enabled",
    "/proc/uptime",
];

/// Separates this mount namespace from the node's, as far as the volumes allow: what the node
/// mounts comes in; what is mounted here goes out only where a volume asks for that.
pub(super) fn separate(spec: &Spec) -> Result<()> {
    if propagation(spec) == Some("shared") {
        return Ok(());
    }
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|e| format!("separating the mount namespace: {e}"))
}

fn propagation(spec: &Spec) -> Option<&str> {
    spec.linux().as_ref()?.rootfs_propagation().as_deref()
}

/// Makes all mounts and devices below `root`.
///
/// `made` are mounts that the maker has made, by their index in the spec; `held` is what else it has
/// for a container in a user namespace.
pub(super) fn fill(
    root: &Root,
    spec: &Spec,
    mut made: BTreeMap<usize, Detached>,
    held: Option<Held>,
) -> Result<()> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let label = spec.linux().as_ref().and_then(|l| l.mount_label().as_deref());
    for (at, mount) in mounts.iter().enumerate() {
        add(root, mount, made.remove(&at), label).map_err(|e| describe(mount, &e))?;
    }
    // A volume over all of /dev brings its own.
    if mounts.iter().any(|m| m.destination() == Path::new("/dev") && is_bind(m)) {
        return Ok(());
    }
    match held {
        None => devices::add(root, spec),
        Some(held) => {
            held.place_devices(root)?;
            devices::add_links(root)
        }
    }
}

fn is_bind(mount: &Mount) -> bool {
    options::parse(mount.options().as_deref().unwrap_or_default()).bind
}

pub(super) fn describe(mount: &Mount, error: &io::Error) -> String {
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    format!("mounting {} at {}: {error}", source.display(), mount.destination().display())
}

fn add(root: &Root, mount: &Mount, made: Option<Detached>, label: Option<&str>) -> io::Result<()> {
    let mut options = options::parse(mount.options().as_deref().unwrap_or_default());
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    let kind = mount.typ().as_deref().unwrap_or_default();
    let made = if let Some(made) = made {
        made
    } else if options.bind {
        let made = Detached::copy(source, options.recursive)?;
        change(&made, &options)?;
        made
    } else {
        let kind = if kind == "cgroup" { "cgroup2" } else { kind };
        let name = source.to_str().unwrap_or_default();
        // Those whose files are the container's own; the kernel's have labels by their policy.
        options.data.extend(
            label.filter(|_| matches!(kind, "tmpfs" | "devpts")).map(crate::mount::context),
        );
        let made = Detached::new(kind, name, &options.data, options.attributes)?;
        if let Some(label) = label.filter(|_| kind == "mqueue") {
            // It takes no such option.
            crate::selinux::label_one(&made, label)?;
        }
        propagate(&made, &options)?;
        made
    };
    let place = match SFlag::from_bits_truncate(fstat(&made)?.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => Place::Directory,
        _ => Place::File,
    };
    made.attach(&target(root, mount.destination(), kind, place)?)
}

fn propagate(made: &Detached, options: &Options) -> io::Result<()> {
    options.propagation.map_or(Ok(()), |(how, recursive)| made.propagate(how, recursive))
}

/// Makes of a copy what a bind mount's options say.
pub(super) fn change(made: &Detached, options: &Options) -> io::Result<()> {
    if options.attributes != 0 {
        made.set(options.attributes, false)?;
    }
    if options.recursive_attributes != 0 {
        made.set(options.recursive_attributes, true)?;
    }
    propagate(made, options)
}

/// Where a mount goes, made if it is not there.
fn target(root: &Root, path: &Path, kind: &str, place: Place) -> io::Result<OwnedFd> {
    if matches!(kind, "proc" | "sysfs") {
        // What is masked later is found by these paths: an image must not lead them elsewhere.
        return match root.locate_plain(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => root.ensure(path, place),
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
                Err(io::Error::other("the image has a symbolic link there"))
            }
            found => found,
        };
    }
    let target = root.ensure(path, place)?;
    let replaceable = REPLACEABLE.iter().any(|allowed| path == Path::new(allowed));
    if path != Path::new("/proc")
        && !replaceable
        && fstatfs(&target)?.filesystem_type() == PROC_SUPER_MAGIC
    {
        return Err(io::Error::other("nothing may be mounted inside /proc; use another path"));
    }
    Ok(target)
}

/// Makes `root` the root directory of this mount namespace and lets go of the node's.
pub(super) fn enter(root: &Root, spec: &Spec) -> Result<()> {
    let failed = |what: &'static str| move |e: nix::Error| format!("{what}: {e}");
    let flags = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let old = openat(AT_FDCWD, "/", flags, Mode::empty())
        .map_err(failed("opening the node's root directory"))?;
    fchdir(root).map_err(failed("entering the root file system"))?;
    pivot_root(".", ".").map_err(failed("changing the root directory"))?;
    // The old root is over the new one now. Its unmounting must not reach the node.
    fchdir(&old).map_err(failed("entering the old root directory"))?;
    mount(None::<&str>, ".", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .map_err(failed("separating the old root directory"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("unmounting the old root directory"))?;
    chdir("/").map_err(failed("entering the new root directory"))?;
    if propagation(spec) == Some("shared") {
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .map_err(failed("sharing the root directory"))?;
    }
    Ok(())
}

/// What can be done only from inside: paths that are hidden or read-only, and the root itself.
pub(super) fn restrict(root: &Root, spec: &Spec) -> Result<()> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    for path in linux.readonly_paths().iter().flatten() {
        read_only(root, Path::new(path)).map_err(|e| format!("making {path} read-only: {e}"))?;
    }
    let masked = linux.masked_paths().as_deref().unwrap_or_default();
    mask(root, masked)?;
    if spec.root().as_ref().and_then(|r| r.readonly()) == Some(true) {
        crate::mount::make_read_only(root)
            .map_err(|e| format!("making the root file system read-only: {e}"))?;
    }
    Ok(())
}

/// `None` where there is nothing, which is as good.
fn existing(root: &Root, path: &Path) -> io::Result<Option<OwnedFd>> {
    match root.locate(path) {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => Ok(None),
        Err(e) => Err(e),
    }
}

fn read_only(root: &Root, path: &Path) -> io::Result<()> {
    let Some(target) = existing(root, path)? else { return Ok(()) };
    let copy = Detached::copy_of(&target, true)?;
    copy.set(crate::mount::attr::RDONLY, false)?;
    copy.attach(&target)
}

fn mask(root: &Root, paths: &[String]) -> Result<()> {
    let mut empty: Option<Detached> = None;
    for path in paths {
        let failed = |e: io::Error| format!("hiding {path}: {e}");
        let Some(target) = existing(root, Path::new(path)).map_err(failed)? else { continue };
        let mode = fstat(&target).map_err(|e| failed(e.into()))?.st_mode;
        if SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFDIR {
            hide_directory(&target, &mut empty)
        } else {
            devices::null(root)
                .and_then(|null| Detached::copy_of(&null, false))
                .and_then(|cover| cover.attach(&target))
        }
        .map_err(failed)?;
    }
    Ok(())
}

/// One empty file system covers all directories: the first has it, others a copy of the mount. Only
/// what is in its place can be copied: a kernel before 6.15 refuses it of a mount that is nowhere.
fn hide_directory(target: &OwnedFd, empty: &mut Option<Detached>) -> io::Result<()> {
    if let Some(placed) = empty {
        return Detached::copy_of(placed, false)?.attach(target);
    }
    let made = Detached::new("tmpfs", "tmpfs", &[], crate::mount::attr::RDONLY)?;
    made.place(target)?;
    *empty = Some(made);
    Ok(())
}

/// Shows a terminal at `/dev/console`.
pub(super) fn console(root: &Root, terminal: &impl AsFd) -> Result<()> {
    root.ensure(Path::new("/dev/console"), Place::File)
        .and_then(|target| Detached::copy_of(terminal, false)?.attach(&target))
        .map_err(|e| format!("putting the terminal at /dev/console: {e}"))
}
