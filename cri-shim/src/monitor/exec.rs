//! Running a process in a container: joining what its first process is in, then becoming what its
//! spec says, with the same user, capabilities and seccomp filter.
//!
//! libcontainer's own way (its tenant builder) leaves the seccomp filter out, so the joining is
//! done here and only the building blocks are libcontainer's.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libcontainer::syscall::syscall::create_syscall;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, setgroups, setresgid, setresuid, setsid,
};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::launch::{Progress, report_and_exit};
use super::{frame, payload, sys};
use crate::cgroup::Hierarchies;
use crate::spec::user::Identity;

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
    stdio: Vec<OwnedFd>,
    progress: UnixStream,
) -> ! {
    sys::reset_signals();
    let code = match start(target, arguments, stdio, &progress) {
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
    stdio: Vec<OwnedFd>,
    progress: &UnixStream,
) -> Result<(), String> {
    let config = target.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|e| format!("reading {}: {e}", config.display()))?;
    if let Some(process) = spec.process_mut() {
        process.set_args(Some(arguments.to_vec()));
        process.set_terminal(Some(false));
    }
    join_cgroup(target)?;
    let namespaces = open_namespaces(target.init, &spec)?;
    let (mut failure, report) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    // The process must not run before its id is known here, or its end could be missed.
    let (mut go, mut ready) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    for (name, fd, flag) in &namespaces {
        setns(fd, *flag).map_err(|e| format!("entering the container's {name} namespace: {e}"))?;
    }
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
    frame::send(progress, &Progress::Created { pid: pid.as_raw(), user: Identity::default() }, &[])
        .map_err(|e| format!("reporting to the monitor: {e}"))?;
    ready.write_all(b"1").map_err(|e| format!("starting the process: {e}"))?;
    let mut message = String::new();
    failure.read_to_string(&mut message).map_err(|e| format!("reading the exec status: {e}"))?;
    if !message.is_empty() {
        return Err(message);
    }
    frame::send(progress, &Progress::Running, &[]).map_err(|e| format!("reporting: {e}"))
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
    let mut stdio = stdio.into_iter();
    if let (Some(input), Some(output), Some(error)) = (stdio.next(), stdio.next(), stdio.next()) {
        dup2_stdin(&input).map_err(said("setting standard input"))?;
        dup2_stdout(&output).map_err(said("setting standard output"))?;
        dup2_stderr(&error).map_err(said("setting standard error"))?;
    }
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
