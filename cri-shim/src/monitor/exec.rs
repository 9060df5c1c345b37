//! Running a process in a container: joining what its first process is in, then becoming what its
//! spec says, with the same user, capabilities and seccomp filter.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::stat::{fstat, major, minor};
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, fstatfs};
use nix::unistd::{Pid, chdir};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::launch::{Progress, report_and_exit};
use super::{frame, payload, process, sys, userns};
use crate::cgroup::Hierarchies;
use crate::seccomp::{self, Program};
use crate::spec::user::Identity;
use crate::spec::userns::IdMap;

/// The environment of a process with a terminal says what the terminal is like.
const TERM: &str = "TERM=xterm";

/// What a process reads and writes.
pub(super) enum Streams {
    /// Standard input, output and error.
    Given(Vec<OwnedFd>),
    /// A terminal of the container's, whose other end is passed back.
    Terminal,
}

/// What to join.
pub(super) struct Target<'a> {
    /// The container's first process.
    pub init: i32,
    pub bundle: &'a Path,
    pub cgroup: &'a Path,
    /// The ids of its user namespace.
    pub userns: Option<&'a IdMap>,
}

/// The child's whole life: forks the process as the monitor's child and tells whether its program
/// runs. Never returns.
pub(super) fn run(
    target: &Target<'_>,
    arguments: &[String],
    streams: Streams,
    progress: UnixStream,
) -> ! {
    sys::reset_signals();
    let code = match start(target, arguments, streams, &progress) {
        Ok(()) => 0,
        Err(message) => {
            let _ = frame::send(&progress, &Progress::Failed { message }, &[]);
            1
        }
    };
    sys::exit(code)
}

fn start(
    target: &Target<'_>,
    arguments: &[String],
    streams: Streams,
    progress: &UnixStream,
) -> Result<(), String> {
    let config = target.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|e| format!("reading {}: {e}", config.display()))?;
    if let Some(process) = spec.process_mut() {
        process.set_args(Some(arguments.to_vec()));
        process.set_terminal(Some(matches!(streams, Streams::Terminal)));
        if matches!(streams, Streams::Terminal)
            && let Some(env) = process.env_mut()
            && !env.iter().any(|e| e.starts_with("TERM="))
        {
            env.push(TERM.to_owned());
        }
    }
    let Some(process) = spec.process().as_ref() else {
        return Err("the spec has no process".into());
    };
    let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let filter = profile.map(|p| seccomp::of_bundle(target.bundle, p)).transpose();
    let filter = filter.map_err(|e| e.to_string())?;
    let cgroup = join_cgroup(target)?;
    let namespaces = open_namespaces(target.init, &spec)?;
    let proc = process::open_proc()?;
    process::before_entering(process)?;
    if let (Some(users), Streams::Given(stdio)) = (target.userns, &streams)
        && let Ok((uid, _)) = users.to_host(process.user().uid(), process.user().gid())
    {
        // What it is inside, it cannot tell the node.
        stdio.iter().for_each(|stream| process::give_stream(stream, uid));
    }
    let (mut failure, report) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    // The process must not run before its id is known here, or its end could be missed.
    let (mut go, mut ready) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    if target.userns.is_some() {
        // Root of the user namespace must not look into this process on its way in.
        prctl::set_dumpable(false).map_err(|e| format!("hiding from the container: {e}"))?;
    }
    // Who is born in a cgroup must see it and its parent's from its cgroup namespace, where those bound
    // delegation (`nsdelegate`, cgroup_namespaces(7)): that one is entered after the fork.
    let late = |flag: CloneFlags| cgroup.is_some() && flag == CloneFlags::CLONE_NEWCGROUP;
    let enter = |late_ones: bool| -> Result<(), String> {
        let wanted = namespaces.iter().filter(|(_, _, flag)| late(*flag) == late_ones);
        for (name, fd, flag) in wanted {
            setns(fd, *flag)
                .map_err(|e| format!("entering the container's {name} namespace: {e}"))?;
        }
        Ok(())
    };
    enter(false)?;
    if target.userns.is_some() {
        userns::become_root()?;
    }
    let (stdio, master) = match streams {
        Streams::Given(stdio) => (stdio, None),
        Streams::Terminal => {
            let (master, peer) = open_terminal().map_err(|e| format!("opening a terminal: {e}"))?;
            (vec![peer], Some(master))
        }
    };
    let forked = sys::fork_sibling(cgroup.as_ref().map(AsFd::as_fd));
    let Some(pid) = forked.map_err(|e| format!("fork: {e}"))? else {
        drop((ready, failure));
        // Without the word the exec was abandoned.
        if !matches!(go.read(&mut [0u8; 1]), Ok(1)) {
            sys::exit(1);
        }
        drop(go);
        let message = match enter(true).and_then(|()| process::label(&proc, process)) {
            Ok(()) => become_process(process, filter.as_ref(), stdio),
            Err(message) => message,
        };
        report_and_exit(&OwnedFd::from(report), &message, 127)
    };
    drop((report, stdio, go));
    let created = Progress::Created { pid: pid.as_raw(), user: Identity::default() };
    let fds: Vec<_> = master.iter().map(AsRawFd::as_raw_fd).collect();
    frame::send(progress, &created, &fds).map_err(|e| format!("reporting to the monitor: {e}"))?;
    ready.write_all(b"1").map_err(|e| format!("starting the process: {e}"))?;
    let mut message = String::new();
    failure.read_to_string(&mut message).map_err(|e| format!("reading the exec status: {e}"))?;
    if !message.is_empty() {
        return Err(message);
    }
    frame::send(progress, &Progress::Running, &[]).map_err(|e| format!("reporting: {e}"))
}

/// A terminal of the container's own `/dev/pts`, both ends. The container may have put anything at
/// that path, so what is opened has to be the real thing.
pub(super) fn open_terminal() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let master = openat2(AT_FDCWD, "/dev/pts/ptmx", how)?;
    let device = fstat(&master)?.st_rdev;
    let genuine = fstatfs(&master)?.filesystem_type() == DEVPTS_SUPER_MAGIC
        && (major(device), minor(device)) == (5, 2);
    if !genuine {
        return Err(std::io::Error::other("/dev/pts/ptmx of the container is not a terminal's"));
    }
    let peer = sys::open_peer(&master)?;
    Ok((master, peer))
}

/// On cgroup v2 the directory that the process is to begin in; on v1 this process joins the
/// container's, for its child to inherit. So it does before it enters a user namespace, whose root
/// may put nobody anywhere.
fn join_cgroup(target: &Target<'_>) -> Result<Option<fs::File>, String> {
    let hierarchies = Hierarchies::find().map_err(|e| format!("finding cgroups: {e}"))?;
    let own = nix::unistd::getpid();
    let failed = |(path, e): (std::path::PathBuf, std::io::Error)| {
        format!("joining {}: {e}", path.display())
    };
    if hierarchies.v2 && target.userns.is_none() {
        return hierarchies.group(target.cgroup, &group(own)).map(Some).map_err(failed);
    }
    hierarchies.join(target.cgroup, &group(own)).map(|()| None).map_err(failed)
}

/// The cgroup below the container's in which what the child `maker` makes is found again, however
/// far it got from its parent and session.
pub(super) fn group(maker: Pid) -> String {
    format!("exec-{maker}")
}

/// The namespaces of the container's first process, the mount namespace last.
fn open_namespaces(
    init: i32,
    spec: &Spec,
) -> Result<Vec<(&'static str, fs::File, CloneFlags)>, String> {
    // The monitor is already in the pod's IPC and UTS namespaces.
    let all = [
        // It owns the others.
        (LinuxNamespaceType::User, "user", CloneFlags::CLONE_NEWUSER),
        (LinuxNamespaceType::Network, "net", CloneFlags::CLONE_NEWNET),
        (LinuxNamespaceType::Pid, "pid", CloneFlags::CLONE_NEWPID),
        (LinuxNamespaceType::Cgroup, "cgroup", CloneFlags::CLONE_NEWCGROUP),
        (LinuxNamespaceType::Mount, "mnt", CloneFlags::CLONE_NEWNS),
    ];
    let listed = spec.linux().as_ref().and_then(|l| l.namespaces().clone()).unwrap_or_default();
    let mut opened = Vec::new();
    for (typ, name, flag) in all {
        if listed.iter().any(|n| n.typ() == typ) {
            let path = format!("/proc/{init}/ns/{name}");
            let file = fs::File::open(&path)
                .map_err(|e| format!("opening {path}: {e}; has the container ended?"))?;
            opened.push((name, file, flag));
        }
    }
    Ok(opened)
}

/// Takes on the spec's identity and runs the program; returns only with the reason why not.
fn become_process(process: &Process, filter: Option<&Program>, stdio: Vec<OwnedFd>) -> String {
    let done = process::take_streams(stdio, process)
        .and_then(|()| {
            chdir(process.cwd()).map_err(|e| format!("entering {}: {e}", process.cwd().display()))
        })
        .and_then(|()| process::become_user(process, filter));
    match done {
        Ok(()) => payload::run(process),
        Err(message) => message,
    }
}

/// Whether descriptors were passed as an exec needs them: input, output, error.
pub(super) fn complete(fds: &[OwnedFd]) -> bool {
    fds.len() == 3 && fds.iter().all(|fd| fd.as_raw_fd() > 2)
}
