//! A container in a user namespace: what only the node's root can do, done before it is entered.
//!
//! Root of a user namespace may neither look into the node's directories, nor id-map a mount, nor
//! make a device, nor reach another process's namespaces. So the maker makes all that is mounted
//! into the container, with the node's view, as mounts that are nowhere yet, and opens what is to be
//! joined; the first process, born inside, only puts the mounts in their places.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::unistd::{Pid, chdir};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::super::inroot::{Place, Root};
use super::super::launch::Stdio;
use super::super::protocol::{StartContainer, Userns};
use super::super::{frame, image_volumes, process, staging, sys, userns};
use super::{Result, devices, init, options, rootfs};
use crate::mount::Detached;
use crate::seccomp::Program;
use crate::spec::user::Identity;
use crate::spec::userns::IdMap;

/// What the maker has made for the first process.
pub(super) struct Held {
    userns: File,
    namespaces: Vec<(LinuxNamespaceType, File)>,
    rootfs: Detached,
    /// The devices that everybody has, and where.
    devices: Vec<(&'static Path, Detached)>,
    pub(super) identity: Identity,
    pub(super) filter: Option<Program>,
}

/// Makes it, in a mount namespace of the maker's own, with the bind mounts by their index in the
/// spec. The container's cgroups are there already.
pub(super) fn hold(
    start: &StartContainer,
    spec: &mut Spec,
    pod: &Userns,
    stdio: &Stdio,
) -> Result<(Held, BTreeMap<usize, Detached>)> {
    let filter = init::filter(start, spec)?;
    let own = (pod.map, staging::open(&pod.path)?);
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("making a mount namespace: {e}"))?;
    image_volumes::mount(start, spec)?;
    let mounts = copy_mounts(spec, Some(&own))?;
    let rootfs = make_rootfs(start, spec, &own)?;
    let root = root_of(&rootfs)?;
    let identity = init::prepare(start, spec, &root)?;
    staging::give_streams(pod, stdio, &identity);
    let devices = devices::DEFAULT.iter().map(|(path, ..)| {
        let path = Path::new(*path);
        Detached::copy(path, false)
            .and_then(|copy| copy.propagate(libc::MS_PRIVATE, false).map(|()| (path, copy)))
            .map_err(|e| format!("copying the mount of {}: {e}", path.display()))
    });
    let held = Held {
        devices: devices.collect::<Result<_>>()?,
        namespaces: open_namespaces(spec)?,
        userns: own.1,
        rootfs,
        identity,
        filter,
    };
    Ok((held, mounts))
}

/// Copies of the sources of bind mounts: of all in the user namespace `own`, else of those that are
/// id-mapped, which their first process could not make either.
pub(super) fn copy_mounts(
    spec: &Spec,
    own: Option<&(IdMap, File)>,
) -> Result<BTreeMap<usize, Detached>> {
    let (mut others, mut made) = (Vec::new(), BTreeMap::new());
    for (at, mount) in spec.mounts().iter().flatten().enumerate() {
        let options = options::parse(mount.options().as_deref().unwrap_or_default());
        if !options.bind || own.is_none() && !staging::is_mapped(mount) {
            continue;
        }
        let copy = staging::copy(mount, own, &mut others)?;
        rootfs::change(&copy, &options).map_err(|e| rootfs::describe(mount, &e))?;
        made.insert(at, copy);
    }
    Ok(made)
}

/// The overlay over id-mapped layers. The maker's working directory is where it will be.
fn make_rootfs(start: &StartContainer, spec: &Spec, own: &(IdMap, File)) -> Result<Detached> {
    let overlay = &start.rootfs;
    let target = &overlay.target;
    let failed = |doing: &'static str, path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| format!("{doing} {path}: {e}")
    };
    fs::create_dir_all(target).map_err(failed("making", target))?;
    chdir(target.as_path()).map_err(|e| failed("entering", target)(e.into()))?;
    // Its owner is who owns `/` in the container; what else is in it, the container makes.
    let (uid, gid) = own.0.root().map_err(|e| e.to_string())?;
    chown(&overlay.upper, Some(uid), Some(gid)).map_err(failed("giving away", &overlay.upper))?;
    let area = target.parent().ok_or("the root file system has no folder")?.join("layers");
    let label = spec.linux().as_ref().and_then(|l| l.mount_label().as_ref());
    let mapped = staging::map_layers(overlay, label, &own.1, &area)?;
    crate::snapshot::mount(&mapped).map_err(|e| format!("mounting the root file system: {e}"))?;
    let rootfs = Detached::copy(target, false).map_err(failed("copying the mount of", target))?;
    rootfs.propagate(libc::MS_PRIVATE, false).map_err(failed("separating", target))?;
    for done in [target.as_path(), &area] {
        // Not mounted for an image without layers.
        let _ = umount2(done, MntFlags::MNT_DETACH);
    }
    Ok(rootfs)
}

fn root_of(rootfs: &Detached) -> Result<Root> {
    let root = rootfs.as_fd().try_clone_to_owned();
    Ok(Root::of(root.map_err(|e| format!("holding the root file system: {e}"))?))
}

fn open_namespaces(spec: &Spec) -> Result<Vec<(LinuxNamespaceType, File)>> {
    let listed = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref());
    let joined = listed.into_iter().flatten().filter_map(|n| Some((n.typ(), n.path().as_ref()?)));
    joined
        .map(|(kind, path): (_, &PathBuf)| {
            let file = File::open(path)
                .map_err(|e| format!("opening the {kind} namespace {}: {e}", path.display()))?;
            Ok((kind, file))
        })
        .collect()
}

/// Forks the first process as the monitor's child, inside the user namespace; `None` in the child.
/// A process between does it, as the maker itself must stay outside.
pub(super) fn fork(held: &Held, spec: &Spec, cgroup: Option<&File>) -> Result<Option<Pid>> {
    if let Some(process) = spec.process() {
        // Inherited.
        process::before_entering(process)?;
    }
    let (ours, theirs) = UnixStream::pair().map_err(|e| format!("making a socket pair: {e}"))?;
    // Born in the container's cgroup, where root of the user namespace may not put anybody.
    let between = sys::fork_sibling(cgroup.map(AsFd::as_fd))
        .map_err(|e| format!("forking into the user namespace: {e}"))?;
    if between.is_none() {
        drop(ours);
        let forked = enter_users(held, spec).and_then(|()| {
            sys::fork_sibling(None)
                .map_err(|e| format!("forking the container's first process: {e}"))
        });
        let answer = match forked {
            Ok(None) => return Ok(None),
            Ok(Some(pid)) => Ok(pid.as_raw()),
            Err(message) => Err(message),
        };
        let _ = frame::send::<std::result::Result<i32, String>>(&theirs, &answer, &[]);
        sys::exit(0);
    }
    drop(theirs);
    match frame::receive::<std::result::Result<i32, String>>(&ours) {
        Ok(Some(pid)) => pid.map(|pid| Some(Pid::from_raw(pid))),
        Ok(None) => Err("the process that enters the user namespace died".to_owned()),
        Err(e) => Err(format!("entering the user namespace: {e}")),
    }
}

fn enter_users(held: &Held, spec: &Spec) -> Result<()> {
    prctl::set_dumpable(false).map_err(|e| format!("hiding from the container: {e}"))?;
    setns(&held.userns, CloneFlags::CLONE_NEWUSER)
        .map_err(|e| format!("entering the user namespace: {e}"))?;
    userns::become_root()?;
    let listed = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref());
    let kind = LinuxNamespaceType::Pid;
    if !listed.into_iter().flatten().any(|n| n.typ() == kind) {
        return Ok(());
    }
    match held.namespaces.iter().find(|(held, _)| *held == kind) {
        Some((_, file)) => setns(file, CloneFlags::CLONE_NEWPID),
        None => unshare(CloneFlags::CLONE_NEWPID),
    }
    .map_err(|e| format!("entering the PID namespace: {e}"))
}

impl Held {
    /// Enters the other namespaces, in the first process, and puts the root file system in its
    /// place there.
    pub(super) fn enter(&self, spec: &Spec) -> Result<Root> {
        let listed = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref());
        for namespace in listed.into_iter().flatten() {
            let kind = namespace.typ();
            // Entered by the forks.
            if matches!(kind, LinuxNamespaceType::User | LinuxNamespaceType::Pid) {
                continue;
            }
            let flag = init::flag(kind)?;
            let file = self.namespaces.iter().find(|(held, _)| *held == kind);
            file.map_or_else(|| unshare(flag), |(_, file)| setns(file, flag))
                .map_err(|e| format!("entering a {kind} namespace: {e}"))?;
        }
        rootfs::separate(spec)?;
        let root = root_of(&self.rootfs)?;
        // Here is the maker's working directory, in this namespace's copy of the mount.
        self.rootfs.attach_here().map_err(|e| format!("placing the root file system: {e}"))?;
        Ok(root)
    }

    /// Puts the devices that everybody has in their places.
    pub(super) fn place_devices(self, root: &Root) -> Result<()> {
        for (path, copy) in self.devices {
            let placed =
                root.ensure(path, Place::File).and_then(|target: OwnedFd| copy.attach(&target));
            placed.map_err(|e| format!("mounting the device {}: {e}", path.display()))?;
        }
        Ok(())
    }
}
