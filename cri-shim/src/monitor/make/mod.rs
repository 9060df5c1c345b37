//! Making a container: its cgroups, its first process, and what that does before it is the
//! container's program.
//!
//! Two processes share the work. The *maker* (this module, a short-lived child of the monitor) has
//! the node's view: it makes the cgroups, puts the first process into them, runs hooks, reports.
//! The *first process* ([`init`]) makes the mounts and becomes what the spec says. They talk over
//! one socket; its end at the program's start is how the maker knows that the program runs. They
//! work side by side because joining a v1 cgroup waits for the kernel (an RCU grace period), which
//! is as long as everything else together; on v2 the process is born in its cgroup and nothing
//! waits. A container in a user namespace is made by both in another way ([`users`]).

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::{fs, mem};

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::Pid;
use oci_spec::runtime::{Hooks, LinuxNamespaceType, LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use super::frame;
use super::launch::{Progress, Stdio};
use super::protocol::StartContainer;
use super::{process, sys};
use crate::cgroup::{Hierarchies, create};
use crate::crash::point;
use crate::mount::Detached;
use crate::spec::user::Identity;

mod devices;
pub(crate) mod hooks;
mod init;
mod options;
mod rootfs;
mod users;

pub(super) use init::{mount_rootfs, prepare};

type Result<T> = std::result::Result<T, String>;

/// What the maker has made for the first process, which could not.
struct Made {
    /// By their index in the spec.
    mounts: BTreeMap<usize, Detached>,
    /// For a container in a user namespace.
    held: Option<users::Held>,
}

/// What the first process tells the maker.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    /// The mounts are there and the root is still the node's: hooks are to be run.
    Mounted,
    /// All but the program. The other end of the terminal comes with the frame.
    Ready {
        user: Identity,
    },
    Failed {
        message: String,
    },
}

/// The word to go on, one byte each time.
const GO: [u8; 1] = [b'g'];

/// Makes the container and starts its program.
pub(super) fn run(start: &StartContainer, stdio: Stdio, progress: &UnixStream) -> Result<()> {
    let config = start.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|e| format!("reading {}: {e}", config.display()))?;
    let cgroups = Hierarchies::find().map_err(|e| format!("finding cgroups: {e}"))?;
    let linux = spec.linux().as_ref();
    let none = LinuxResources::default();
    let resources = linux.and_then(|l| l.resources().as_ref()).unwrap_or(&none);
    create::create(&cgroups, &start.cgroup, resources).map_err(|e| e.to_string())?;
    point("maker: cgroups made");

    let (mut ours, theirs) =
        UnixStream::pair().map_err(|e| format!("making the socket to the container: {e}"))?;
    let hooks = spec.hooks().clone().unwrap_or_default();
    let made = match &start.userns {
        None => Made { mounts: users::copy_mounts(&spec, None)?, held: None },
        Some(pod) => {
            let (held, mounts) = users::hold(start, &mut spec, pod, &stdio)?;
            Made { mounts, held: Some(held) }
        }
    };
    let Some(pid) = fork(start, &spec, &cgroups, made.held.as_ref())? else {
        drop(ours);
        init::run(start, &mut spec, stdio, made, theirs);
    };
    drop((theirs, stdio, made));
    point("maker: process made");
    if !cgroups.v2 {
        for directory in cgroups.directories(&start.cgroup) {
            match fs::write(directory.join("cgroup.procs"), pid.as_raw().to_string()) {
                // It has failed already, and says why.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => break,
                joined => joined.map_err(|e| format!("joining {}: {e}", directory.display()))?,
            }
        }
    }
    // One that has failed does not listen; what it said is read below.
    let _ = go_on(&mut ours);
    let state = |status| hooks::State {
        id: &start.id,
        bundle: &start.bundle,
        status,
        pid: pid.as_raw(),
        annotations: spec.annotations().as_ref(),
    };
    let (user, terminal) = loop {
        let mut fds = Vec::new();
        match receive(&ours, &mut fds)? {
            Told::Mounted => {
                for hooks in before_start(&hooks) {
                    hooks::run(hooks, &state("creating"))?;
                }
                go_on(&mut ours)?;
            }
            Told::Ready { user } => break (user, fds.pop()),
            Told::Failed { message } => return Err(message),
        }
    };
    let fds: Vec<_> = terminal.iter().map(OwnedFd::as_raw_fd).collect();
    frame::send(progress, &Progress::Created { pid: pid.as_raw(), user }, &fds)
        .map_err(|e| format!("reporting to the monitor: {e}"))?;
    drop(terminal);
    point("maker: process reported");
    go_on(&mut ours)?;
    // The program's start closes the socket; what keeps it from starting is said over it.
    match frame::receive::<Told>(&ours).map_err(|e| format!("waiting for the program: {e}"))? {
        None => {}
        Some(Told::Failed { message }) => return Err(message),
        Some(other) => return Err(format!("the container's process said {other:?} out of turn")),
    }
    point("maker: program runs");
    frame::send(progress, &Progress::Running, &[]).map_err(|e| format!("reporting: {e}"))?;
    // Too late to fail the start; upstream's runtimes warn.
    let _ = hooks::run(hooks.poststart().as_deref().unwrap_or_default(), &state("running"));
    Ok(())
}

#[allow(deprecated, reason = "prestart hooks are deprecated and still made, by CDI 0.3 for one")]
fn before_start(hooks: &Hooks) -> [&[oci_spec::runtime::Hook]; 2] {
    [
        hooks.prestart().as_deref().unwrap_or_default(),
        hooks.create_runtime().as_deref().unwrap_or_default(),
    ]
}

/// Forks the first process as the monitor's child, in its PID namespace; `None` in the child.
fn fork(
    start: &StartContainer,
    spec: &Spec,
    cgroups: &Hierarchies,
    held: Option<&users::Held>,
) -> Result<Option<Pid>> {
    let directory = cgroups.controller("", &start.cgroup);
    let cgroup = match cgroups.v2 {
        true => Some(
            fs::File::open(&directory)
                .map_err(|e| format!("opening {}: {e}", directory.display()))?,
        ),
        false => None,
    };
    if let Some(held) = held {
        return users::fork(held, spec, cgroup.as_ref());
    }
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref());
    let pid = namespaces.into_iter().flatten().find(|n| n.typ() == LinuxNamespaceType::Pid);
    let own = Path::new("/proc/self/ns/pid");
    // Hooks are forked later, and are the node's: in the container's namespace they would end with
    // its first process, or could not even begin.
    let own = match spec.hooks().is_some() && pid.is_some() {
        true => Some(
            fs::File::open(own).map_err(|e| format!("opening the node's PID namespace: {e}"))?,
        ),
        false => None,
    };
    match pid.map(|n| n.path()) {
        None => {}
        Some(None) => unshare(CloneFlags::CLONE_NEWPID)
            .map_err(|e| format!("making the container's PID namespace: {e}"))?,
        Some(Some(path)) => enter(path, CloneFlags::CLONE_NEWPID)?,
    }
    if let Some(process) = spec.process() {
        // Inherited.
        process::before_entering(process)?;
    }
    let forked = sys::fork_sibling(cgroup.as_ref().map(AsFd::as_fd))
        .map_err(|e| format!("forking the container's first process: {e}"))?;
    if let (Some(own), Some(_)) = (own, forked) {
        setns(&own, CloneFlags::CLONE_NEWPID)
            .map_err(|e| format!("forking in the node's PID namespace again: {e}"))?;
    }
    Ok(forked)
}

/// Enters the namespace that a path holds.
fn enter(path: &std::path::Path, kind: CloneFlags) -> Result<()> {
    let failed =
        |e: &dyn std::fmt::Display| format!("entering the namespace {}: {e}", path.display());
    let file = fs::File::open(path).map_err(|e| failed(&e))?;
    setns(&file, kind).map_err(|e| failed(&e))
}

fn go_on(socket: &mut UnixStream) -> Result<()> {
    socket.write_all(&GO).map_err(|e| format!("talking to the container's process: {e}"))
}

/// Waits for the word; the maker's end is the end of this process too.
fn wait(socket: &mut UnixStream) {
    let mut word = [0u8; 1];
    if socket.read_exact(&mut word).is_err() || word != GO {
        sys::exit(1);
    }
}

fn receive(socket: &UnixStream, fds: &mut Vec<OwnedFd>) -> Result<Told> {
    let mut inbox = frame::Inbox::default();
    let failed = |e: std::io::Error| format!("listening to the container's process: {e}");
    loop {
        if let Some(told) = inbox.take_frame().map_err(failed)? {
            *fds = mem::take(&mut inbox.fds);
            return Ok(told);
        }
        if !inbox.fill(socket).map_err(failed)? {
            return Err("the container's process died while it was made; see the kernel log for \
                        want of memory, or raise the container's limits"
                .to_owned());
        }
    }
}
