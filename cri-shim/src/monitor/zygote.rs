//! The process that monitors are forked from.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, getpid, getppid, setsid};

use super::protocol::{SpawnMonitor, Spawned, ZygoteRequest};
use super::{frame, namespaces, pod, sys, userns};
use crate::crash::point;

/// Serves spawn requests on standard input until the shim closes it.
pub(super) fn run() -> io::Result<()> {
    let requests = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Not the shim's session: a terminal's Ctrl-C must not reach containers.
    let _ = setsid();
    let _ = prctl::set_name(c"longshore-zygot");
    quiet_stdio()?;
    sys::ignore_children();
    while let Some(request) = frame::receive::<ZygoteRequest>(&requests)? {
        let spawn = match request {
            ZygoteRequest::Spawn(spawn) => spawn,
            ZygoteRequest::ProbeUserns { layers, area } => {
                let error = userns::probe(&layers, &area).err().unwrap_or_default();
                frame::send(&requests, &Spawned { error }, &[])?;
                continue;
            }
        };
        point("zygote: asked");
        let (ours, theirs) = UnixStream::pair()?;
        let zygote = getpid();
        match sys::fork() {
            Ok(Some(_)) => {
                drop(theirs);
                point("zygote: forked");
                let spawned = frame::receive::<Spawned>(&ours)?
                    .unwrap_or(Spawned { error: "the monitor died before it listened".to_owned() });
                point("zygote: told");
                frame::send(&requests, &spawned, &[])?;
            }
            Ok(None) => {
                drop(ours);
                drop(requests);
                sys::exit(become_monitor(&spawn, zygote, theirs));
            }
            Err(error) => {
                let spawned = Spawned { error: format!("fork: {error}") };
                frame::send(&requests, &spawned, &[])?;
            }
        }
    }
    Ok(())
}

/// Nothing of the shim's is kept open: whoever reads its output must see the end of it.
fn quiet_stdio() -> io::Result<()> {
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

fn become_monitor(spawn: &SpawnMonitor, zygote: Pid, answer: UnixStream) -> i32 {
    sys::default_action(Signal::SIGCHLD);
    // Without the zygote nobody is told of this monitor, and another is made in its place, whose
    // socket this one must not take.
    let _ = prctl::set_pdeathsig(Some(Signal::SIGKILL));
    if getppid() != zygote {
        return 1;
    }
    match prepare(spawn) {
        Ok((listener, init)) => {
            let _ = prctl::set_pdeathsig(None);
            let told = frame::send(&answer, &Spawned { error: String::new() }, &[]);
            drop(answer);
            if told.is_err() {
                return 1;
            }
            pod::run(listener, init)
        }
        Err(error) => {
            let _ = frame::send(&answer, &Spawned { error }, &[]);
            1
        }
    }
}

fn prepare(spawn: &SpawnMonitor) -> Result<(UnixListener, Option<i32>), String> {
    let _ = setsid();
    let _ = prctl::set_name(c"longshore-pod");
    prctl::set_child_subreaper(true).map_err(|e| format!("becoming a subreaper: {e}"))?;
    // Without its monitor a pod is lost: the kernel should take the containers first.
    let _ = fs::write("/proc/self/oom_score_adj", "-998");
    for procs in &spawn.cgroup_procs {
        let _ = fs::write(procs, "0");
    }
    let init = namespaces::enter(spawn)?;
    let _ = fs::remove_file(&spawn.socket);
    let listener = UnixListener::bind(&spawn.socket)
        .map_err(|e| format!("binding {}: {e}", spawn.socket.display()))?;
    point("monitor: listens");
    Ok((listener, init))
}
