//! Making a container, in a child of the monitor that ends when the container runs.
//!
//! Parsing and allocating is done in a child, so that the monitor's own memory stays as it was. What
//! becomes the container's first process is made the monitor's child, so that its exit comes to the
//! monitor. The root file system is an overlay that is mounted only in the container's own mount
//! namespace: the node's mount table never sees it, and nothing has to be unmounted, whatever dies
//! when.

use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use super::inroot::Root;
use super::protocol::StartContainer;
use super::{external, frame, image_volumes, make, staging, sys};
use crate::spec::user::Identity;

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
    // Nobody would take what is made any more.
    let _ = prctl::set_pdeathsig(Some(Signal::SIGKILL));
    // A group that can be killed as one: the container's first process stays in it until it is in
    // the container's cgroup (see `Pod::end_launch`).
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
    let Some(runtime) = &start.runtime else {
        return make::run(start, stdio, progress);
    };
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("making a mount namespace: {e}"))?;
    let config = start.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|e| format!("reading {}: {e}", config.display()))?;
    image_volumes::mount(start, &mut spec)?;
    match &start.userns {
        None => make::mount_rootfs(start, &spec)?,
        Some(pod) => staging::place_all(&mut spec, &start.rootfs, pod)?,
    }
    let root = Root::open(&start.rootfs.target)
        .map_err(|e| format!("opening the root file system: {e}"))?;
    let identity = make::prepare(start, &mut spec, &root)?;
    if let Some(pod) = &start.userns {
        staging::give_streams(pod, &stdio, &identity);
    }
    external::launch(runtime, start, stdio, identity, progress)
}

pub(super) fn accept_terminal(listener: &UnixListener) -> Result<OwnedFd, String> {
    let (stream, _) = listener.accept().map_err(|e| format!("accepting the terminal: {e}"))?;
    let (mut fds, mut buffer) = (Vec::new(), [0u8; 256]);
    sys::receive_with_fds(stream.as_raw_fd(), &mut buffer, &mut fds)
        .map_err(|e| format!("receiving the terminal: {e}"))?;
    fds.pop().ok_or_else(|| "the container sent no terminal".to_owned())
}

/// Reports that the program could not be run and ends the process as a shell would.
pub(super) fn report_and_exit(report: &OwnedFd, message: &str, code: i32) -> ! {
    if let Ok(fd) = report.try_clone() {
        let _ = fs::File::from(fd).write_all(message.as_bytes());
    }
    sys::exit(code)
}
