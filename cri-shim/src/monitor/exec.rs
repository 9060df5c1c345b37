//! Running a process in a container: joining what its first process is in, then becoming what its
//! spec says, with the same user, capabilities and seccomp filter.
//!
//! libcontainer's own way (its tenant builder) leaves the seccomp filter out, so the joining is
//! done here and only the building blocks are libcontainer's.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libcontainer::syscall::syscall::create_syscall;
use nix::fcntl::{AT_FDCWD, FcntlArg, FdFlag, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::stat::{fstat, major, minor};
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, fstatfs};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fchown, setgroups, setresgid, setresuid,
    setsid,
};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::launch::{Progress, report_and_exit};
use super::{frame, payload, sys};
use crate::cgroup::Hierarchies;
use crate::spec::user::Identity;

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
    join_cgroup(target)?;
    let namespaces = open_namespaces(target.init, &spec)?;
    let (mut failure, report) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    // The process must not run before its id is known here, or its end could be missed.
    let (mut go, mut ready) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    for (name, fd, flag) in &namespaces {
        setns(fd, *flag).map_err(|e| format!("entering the container's {name} namespace: {e}"))?;
    }
    let (stdio, master) = match streams {
        Streams::Given(stdio) => (stdio, None),
        Streams::Terminal => {
            let (master, peer) = open_terminal().map_err(|e| format!("opening a terminal: {e}"))?;
            (vec![peer], Some(master))
        }
    };
    let forked = sys::fork_sibling().map_err(|e| format!("fork: {e}"))?;
    let Some(pid) = forked else {
        drop((ready, failure));
        let report = OwnedFd::from(report);
        // Without the word the exec was abandoned.
        if !matches!(go.read(&mut [0u8; 1]), Ok(1)) {
            sys::exit(1);
        }
        drop(go);
        let message = become_process(&spec, stdio, &report);
        report_and_exit(&report, &message, 127)
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
fn open_terminal() -> std::io::Result<(OwnedFd, OwnedFd)> {
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

fn join_cgroup(target: &Target<'_>) -> Result<(), String> {
    let hierarchies = Hierarchies::find().map_err(|e| format!("finding cgroups: {e}"))?;
    for directory in hierarchies.directories(target.cgroup) {
        fs::write(directory.join("cgroup.procs"), "0")
            .map_err(|e| format!("joining {}: {e}", directory.display()))?;
    }
    Ok(())
}

/// The namespaces of the container's first process, the mount namespace last.
fn open_namespaces(
    init: i32,
    spec: &Spec,
) -> Result<Vec<(&'static str, fs::File, CloneFlags)>, String> {
    // The monitor is already in the pod's IPC and UTS namespaces.
    let all = [
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
fn become_process(spec: &Spec, stdio: Vec<OwnedFd>, report: &OwnedFd) -> String {
    let Some(process) = spec.process() else { return "the spec has no process".to_owned() };
    match apply(spec, process, stdio, report) {
        Ok(()) => payload::run(process),
        Err(message) => message,
    }
}

fn apply(
    spec: &Spec,
    process: &Process,
    stdio: Vec<OwnedFd>,
    report: &OwnedFd,
) -> Result<(), String> {
    let said = |what: &'static str| move |e: nix::Error| format!("{what}: {e}");
    setsid().map_err(said("making a session"))?;
    let streams = match stdio.as_slice() {
        [terminal] => {
            sys::control_terminal(terminal).map_err(|e| format!("taking the terminal: {e}"))?;
            Some((terminal, terminal, terminal))
        }
        [input, output, error] => Some((input, output, error)),
        _ => None,
    };
    if let Some((input, output, error)) = streams {
        dup2_stdin(input).map_err(said("setting standard input"))?;
        dup2_stdout(output).map_err(said("setting standard output"))?;
        dup2_stderr(error).map_err(said("setting standard error"))?;
        for stream in [input, output, error] {
            give_stream(stream, process.user().uid());
        }
    }
    drop(stdio);
    let syscall = create_syscall();
    let adjustment = process.oom_score_adj().unwrap_or(0).to_string();
    let _ = fs::write("/proc/self/oom_score_adj", adjustment);
    for rlimit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(rlimit).map_err(|e| format!("setting a resource limit: {e}"))?;
    }
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        prctl::set_no_new_privs().map_err(said("setting no_new_privs"))?;
    }
    if let Some(profile) = process.apparmor_profile() {
        libcontainer::apparmor::apply_profile(profile)
            .map_err(|e| format!("entering the AppArmor profile {profile}: {e}"))?;
    }
    syscall.close_range(0).map_err(|e| format!("closing descriptors: {e}"))?;
    fcntl(report, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(said("keeping the report"))?;
    let user = process.user();
    let groups: Vec<Gid> =
        user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).map_err(said("setting groups"))?;
    prctl::set_keepcaps(true).map_err(said("keeping capabilities"))?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).map_err(said("setting the group"))?;
    setresuid(uid, uid, uid).map_err(said("setting the user"))?;
    chdir(process.cwd()).map_err(said("entering the working directory"))?;
    libcontainer::capabilities::reset_effective(syscall.as_ref())
        .map_err(|e| format!("keeping capabilities: {e}"))?;
    let seccomp = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    if let (Some(filter), false) = (seccomp, no_new_privileges) {
        load(filter)?;
    }
    if let Some(capabilities) = process.capabilities() {
        libcontainer::capabilities::drop_privileges(capabilities, syscall.as_ref())
            .map_err(|e| format!("dropping capabilities: {e}"))?;
    }
    if let (Some(filter), true) = (seccomp, no_new_privileges) {
        load(filter)?;
    }
    Ok(())
}

/// Lets the process open its own `/dev/stdout` by path. Not everything can be given away, which is
/// no reason to refuse it.
fn give_stream(stream: &OwnedFd, uid: u32) {
    let null = (1, 3);
    let device = fstat(stream.as_fd()).map(|s| (major(s.st_rdev), minor(s.st_rdev)));
    if device.is_ok_and(|device| device != null) {
        let _ = fchown(stream, Some(Uid::from_raw(uid)), None);
    }
}

fn load(filter: &oci_spec::runtime::LinuxSeccomp) -> Result<(), String> {
    match libcontainer::seccomp::initialize_seccomp(filter) {
        Ok(Some(notify)) => {
            let _ = nix::unistd::close(notify);
            Err("seccomp notification is not supported for exec".to_owned())
        }
        Ok(None) => Ok(()),
        Err(e) => Err(format!("loading the seccomp filter: {e}")),
    }
}

/// Whether descriptors were passed as an exec needs them: input, output, error.
pub(super) fn complete(fds: &[OwnedFd]) -> bool {
    fds.len() == 3 && fds.iter().all(|fd| fd.as_raw_fd() > 2)
}
