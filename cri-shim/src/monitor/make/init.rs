//! A container's first process, from its fork to its program.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::chdir;
use oci_spec::runtime::{LinuxNamespaceType, Spec, UserBuilder};

use super::super::exec::open_terminal;
use super::super::image_volumes;
use super::super::inroot::Root;
use super::super::launch::Stdio;
use super::super::protocol::StartContainer;
use super::super::{frame, payload, process, sys};
use super::{Made, Result, Told, enter, hooks, rootfs, wait};
use crate::seccomp::{self, Program};
use crate::spec::user::{self, Identity};

/// The whole life of the process as ours. Never returns.
pub(super) fn run(
    start: &StartContainer,
    spec: &mut Spec,
    stdio: Stdio,
    made: Made,
    mut socket: UnixStream,
) -> ! {
    let message = match become_container(start, spec, stdio, made, &mut socket) {
        Ok(never) => match never {},
        Err(message) => message,
    };
    let _ = frame::send(&socket, &Told::Failed { message }, &[]);
    sys::exit(128)
}

fn become_container(
    start: &StartContainer,
    spec: &mut Spec,
    stdio: Stdio,
    mut made: Made,
    socket: &mut UnixStream,
) -> Result<std::convert::Infallible> {
    let proc = process::open_proc()?;
    let (root, identity, filter) = match &mut made.held {
        None => {
            let filter = filter(start, spec)?;
            enter_namespaces(spec)?;
            rootfs::separate(spec)?;
            mount_rootfs(start, spec)?;
            image_volumes::mount(start, spec)?;
            let root = Root::open(&start.rootfs.target)
                .map_err(|e| format!("opening the root file system: {e}"))?;
            let identity = prepare(start, spec, &root)?;
            (root, identity, filter)
        }
        Some(held) => (held.enter(spec)?, held.identity.clone(), held.filter.take()),
    };
    // On v1 the cgroups are entered meanwhile; nothing that is charged for comes before.
    rootfs::fill(&root, spec, made.mounts, made.held)?;
    wait(socket);
    let hooks = spec.hooks().clone().unwrap_or_default();
    let annotations = spec.annotations().clone();
    let state = |status| hooks::State {
        annotations: annotations.as_ref(),
        id: &start.id,
        bundle: &start.bundle,
        status,
        pid: std::process::id() as i32,
    };
    if spec.hooks().is_some() {
        frame::send(socket, &Told::Mounted, &[]).map_err(|e| format!("reporting: {e}"))?;
        wait(socket);
        hooks::run(hooks.create_container().as_deref().unwrap_or_default(), &state("creating"))?;
    }
    rootfs::enter(&root, spec)?;
    rootfs::restrict(&root, spec)?;
    let (streams, terminal) = streams(start, &root, stdio)?;
    drop(root);

    let Some(process) = spec.process() else { return Err("the spec has no process".to_owned()) };
    process::take_streams(streams, process)?;
    let cwd = process.cwd();
    chdir(cwd).map_err(|e| format!("entering the working directory {}: {e}", cwd.display()))?;
    let fds: Vec<_> = terminal.iter().map(OwnedFd::as_raw_fd).collect();
    frame::send(socket, &Told::Ready { user: identity }, &fds)
        .map_err(|e| format!("reporting: {e}"))?;
    drop(terminal);
    wait(socket);
    hooks::run(hooks.start_container().as_deref().unwrap_or_default(), &state("created"))?;
    process::label(&proc, process)?;
    process::become_user(process, filter.as_ref())?;
    Err(payload::run(process))
}

/// The compiled seccomp profile.
pub(super) fn filter(start: &StartContainer, spec: &Spec) -> Result<Option<Program>> {
    let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let filter = profile.map(|p| seccomp::of_bundle(&start.bundle, p)).transpose();
    filter.map_err(|e| e.to_string())
}

/// The flag of a kind of namespace that the first process enters.
pub(super) fn flag(kind: LinuxNamespaceType) -> Result<CloneFlags> {
    Ok(match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        other => return Err(format!("{other} namespaces are not supported by this runtime")),
    })
}

fn enter_namespaces(spec: &Spec) -> Result<()> {
    let listed = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref());
    for namespace in listed.into_iter().flatten() {
        // Entered by the fork.
        if namespace.typ() == LinuxNamespaceType::Pid {
            continue;
        }
        let kind = flag(namespace.typ())?;
        match namespace.path() {
            Some(path) => enter(path, kind)?,
            None => {
                unshare(kind).map_err(|e| format!("making a {} namespace: {e}", namespace.typ()))?
            }
        }
    }
    Ok(())
}

/// Mounts the container's root file system in this process's mount namespace.
pub(in crate::monitor) fn mount_rootfs(start: &StartContainer, spec: &Spec) -> Result<()> {
    let overlay = &start.rootfs;
    fs::create_dir_all(&overlay.target)
        .map_err(|e| format!("making {}: {e}", overlay.target.display()))?;
    let rootfs = crate::snapshot::Rootfs {
        lowerdirs: overlay.lower.clone(),
        upper: overlay.upper.clone(),
        work: overlay.work.clone(),
        merged: overlay.target.clone(),
        label: spec.linux().as_ref().and_then(|l| l.mount_label().clone()),
    };
    crate::snapshot::mount(&rootfs).map_err(|e| format!("mounting the root file system: {e}"))?;
    // What is mounted below is nobody else's business, unless a volume says so for itself.
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, &rootfs.merged, None::<&str>, private, None::<&str>)
        .map_err(|e| format!("separating the root file system: {e}"))
}

/// What can only be decided with the root file system at hand: who the process is, and that its
/// working directory is there.
pub(in crate::monitor) fn prepare(
    start: &StartContainer,
    spec: &mut Spec,
    root: &Root,
) -> Result<Identity> {
    let read = |path: &str| match root.read(Path::new(path)) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(format!("reading the container's /{path}: {e}")),
    };
    let (passwd, group) = (read("etc/passwd")?, read("etc/group")?);
    let identity = user::resolve(&start.user, &passwd, &group)
        .map_err(|e| format!("resolving the user: {e}"))?;
    // Who that is on the node.
    let owner = match &start.userns {
        Some(userns) => {
            let map = &userns.map;
            map.check(identity.uid, identity.gid, &identity.groups)
                .and_then(|()| map.to_host(identity.uid, identity.gid))
                .map_err(|e| e.to_string())?
        }
        None => (identity.uid, identity.gid),
    };
    let Some(process) = spec.process_mut() else { return Err("the spec has no process".into()) };
    let resolved = UserBuilder::default()
        .uid(identity.uid)
        .gid(identity.gid)
        .additional_gids(identity.groups.clone())
        .build()
        .map_err(|e| e.to_string())?;
    process.set_user(resolved);
    if let Some(env) = process.env_mut()
        && !env.iter().any(|e| e.starts_with("HOME="))
    {
        env.push(format!("HOME={}", identity.home));
    }
    root.make_directory(process.cwd(), owner.0, owner.1)
        .map_err(|e| format!("making the working directory {}: {e}", process.cwd().display()))?;
    // Who the process is, for execs.
    let config = start.bundle.join("config.json");
    spec.save(&config).map_err(|e| format!("writing {}: {e}", config.display()))?;
    Ok(identity)
}

/// The process's streams, and the other end of its terminal if it has one.
fn streams(
    start: &StartContainer,
    root: &Root,
    stdio: Stdio,
) -> Result<(Vec<OwnedFd>, Option<OwnedFd>)> {
    if !start.tty {
        return Ok((
            [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().flatten().collect(),
            None,
        ));
    }
    let (terminal, peer) = open_terminal().map_err(|e| format!("opening a terminal: {e}"))?;
    rootfs::console(root, &peer)?;
    Ok((vec![peer], Some(terminal)))
}
