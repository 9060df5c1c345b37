//! Making a container, in a child of the monitor that ends when the container runs.
//!
//! libcontainer parses, allocates and forks; doing that in a child keeps the monitor's own memory
//! as it was. The child asks libcontainer for siblings, so that the container's first process is
//! the monitor's child and its exit comes to the monitor. The root file system is an overlay that
//! is mounted only in this child's mount namespace, which the container's is a copy of: the node's
//! mount table never sees it, and nothing has to be unmounted, whatever dies when.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use libcontainer::container::ContainerStatus;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::notify_socket::NotifySocket;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{Spec, UserBuilder};
use serde::{Deserialize, Serialize};

use super::external;
use super::inroot::Root;
use super::payload::Payload;
use super::protocol::StartContainer;
use super::{frame, sys};
use crate::cgroup::{Hierarchies, devices};
use crate::snapshot::Rootfs;
use crate::spec::user::{self, Identity};

/// What the child tells the monitor on its way.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Progress {
    /// The container's first process is there and waits. The terminal comes with the frame.
    Created {
        pid: i32,
        user: Identity,
    },
    /// It runs the container's program.
    Running,
    Failed {
        message: String,
    },
}

/// The container's standard streams.
pub(super) struct Stdio {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// The child's whole life. Never returns.
pub(super) fn run(start: &StartContainer, stdio: Stdio, progress: UnixStream) -> ! {
    sys::reset_signals();
    // A group that can be killed as one: libcontainer's processes stay in it until they are in the
    // container's cgroup (see `Pod::end_launch`).
    let _ = nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0));
    let code = match launch(start, stdio, &progress) {
        Ok(()) => 0,
        Err(message) => {
            let _ = frame::send(&progress, &Progress::Failed { message }, &[]);
            1
        }
    };
    sys::exit(code)
}

fn launch(start: &StartContainer, stdio: Stdio, progress: &UnixStream) -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("making a mount namespace: {e}"))?;
    mount_rootfs(start)?;

    let config = start.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|e| format!("reading {}: {e}", config.display()))?;
    let identity = prepare(start, &mut spec)?;
    spec.save(&config).map_err(|e| format!("writing {}: {e}", config.display()))?;

    if let Some(runtime) = &start.runtime {
        return external::launch(runtime, start, stdio, identity, progress);
    }
    // The program's start is known by the end of this pipe: exec closes it, a failure is written
    // to it.
    let (mut failure, report) =
        io::pipe().map_err(|e| format!("making the exec status pipe: {e}"))?;
    let state = start.bundle.join("oci");
    fs::create_dir_all(&state).map_err(|e| format!("making {}: {e}", state.display()))?;
    let console = start.bundle.join("console.sock");
    let terminal = if start.tty {
        let _ = fs::remove_file(&console);
        Some(UnixListener::bind(&console).map_err(|e| format!("binding the console: {e}"))?)
    } else {
        None
    };
    let mut builder = ContainerBuilder::new(start.id.clone(), SyscallType::default())
        .with_root_path(&state)
        .map_err(|e| e.to_string())?
        .with_executor(Payload::new(OwnedFd::from(report)));
    if start.tty {
        builder = builder.with_console_socket(Some(console.clone()));
    } else {
        builder.stdin = stdio.stdin;
        builder.stdout = stdio.stdout;
        builder.stderr = stdio.stderr;
    }
    let mut container = builder
        .as_init(&start.bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|e| chain(&e))?;
    let pid = container.pid().ok_or("libcontainer gave no process id")?.as_raw();
    restrict_devices(start, &spec)?;

    let master = terminal.as_ref().map(accept_terminal).transpose()?;
    let fds: Vec<_> = master.iter().map(AsRawFd::as_raw_fd).collect();
    frame::send(progress, &Progress::Created { pid, user: identity }, &fds)
        .map_err(|e| format!("reporting to the monitor: {e}"))?;

    container.set_status(ContainerStatus::Running);
    container.save().map_err(|e| format!("saving libcontainer's state: {e}"))?;
    NotifySocket::new(state.join(&start.id).join(libcontainer::notify_socket::NOTIFY_FILE))
        .notify_container_start()
        .map_err(|e| format!("starting the program: {e}"))?;
    let mut message = String::new();
    failure.read_to_string(&mut message).map_err(|e| format!("reading the exec status: {e}"))?;
    if !message.is_empty() {
        return Err(message);
    }
    frame::send(progress, &Progress::Running, &[]).map_err(|e| format!("reporting: {e}"))
}

/// On cgroup v1 libcontainer has done it.
fn restrict_devices(start: &StartContainer, spec: &Spec) -> Result<(), String> {
    let cgroups = Hierarchies::find().map_err(|e| format!("finding cgroups: {e}"))?;
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let (true, Some(rules)) = (cgroups.v2, resources.and_then(|r| r.devices().as_ref())) else {
        return Ok(());
    };
    let directory = cgroups.controller("", &start.cgroup);
    devices::apply(&directory, rules)
        .map_err(|e| format!("restricting the devices of {}: {e}", directory.display()))
}

fn mount_rootfs(start: &StartContainer) -> Result<(), String> {
    let overlay = &start.rootfs;
    fs::create_dir_all(&overlay.target)
        .map_err(|e| format!("making {}: {e}", overlay.target.display()))?;
    let rootfs = Rootfs {
        lowerdirs: overlay.lower.clone(),
        upper: overlay.upper.clone(),
        work: overlay.work.clone(),
        merged: overlay.target.clone(),
    };
    crate::snapshot::mount(&rootfs).map_err(|e| format!("mounting the root file system: {e}"))
}

/// What can only be decided with the root file system at hand: who the process is, and that its
/// working directory is there.
fn prepare(start: &StartContainer, spec: &mut Spec) -> Result<Identity, String> {
    let root = Root::open(&start.rootfs.target)
        .map_err(|e| format!("opening the root file system: {e}"))?;
    let read = |path: &str| match root.read(Path::new(path)) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(format!("reading the container's /{path}: {e}")),
    };
    let (passwd, group) = (read("etc/passwd")?, read("etc/group")?);
    let identity = user::resolve(&start.user, &passwd, &group)
        .map_err(|e| format!("resolving the user: {e}"))?;
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
    root.make_directory(process.cwd(), identity.uid, identity.gid)
        .map_err(|e| format!("making the working directory {}: {e}", process.cwd().display()))?;
    Ok(identity)
}

pub(super) fn accept_terminal(listener: &UnixListener) -> Result<OwnedFd, String> {
    let (stream, _) = listener.accept().map_err(|e| format!("accepting the terminal: {e}"))?;
    let (mut fds, mut buffer) = (Vec::new(), [0u8; 256]);
    sys::receive_with_fds(stream.as_raw_fd(), &mut buffer, &mut fds)
        .map_err(|e| format!("receiving the terminal: {e}"))?;
    fds.pop().ok_or_else(|| "the container sent no terminal".to_owned())
}

/// An error with its causes, without repeating a cause that the outer message already holds.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Reports that the program could not be run and ends the process as a shell would.
pub(super) fn report_and_exit(report: &OwnedFd, message: &str, code: i32) -> ! {
    if let Ok(fd) = report.try_clone() {
        let _ = fs::File::from(fd).write_all(message.as_bytes());
    }
    sys::exit(code)
}
