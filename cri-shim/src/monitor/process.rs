//! Taking on what a spec says of a process (OCI runtime spec, config.md, "Process"): the last steps
//! of a container's first process and of an exec's, in a child that then runs the program.
//!
//! The order is what the kernel asks for: limits while there is privilege to raise them; the user
//! before the capabilities are cut, which changing it would clear; the seccomp filter before they
//! are cut unless `no_new_privs` allows it afterwards, and then as late as possible.

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};

use caps::{CapSet, CapsHashSet};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open, openat};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, lstat, major, makedev, minor, umask};
use nix::unistd::{
    Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fchown, setgroups, setresgid, setresuid, setsid,
};
use oci_spec::runtime::{Capability, LinuxCapabilities, PosixRlimitType, Process};

use super::sys;
use crate::seccomp::Program;

type Result<T> = std::result::Result<T, String>;

fn said<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> String {
    move |e| format!("{what}: {e}")
}

/// What the kernel keeps until the next exec, or what children inherit; done where `/proc` is the
/// node's own, which a container cannot have put something else over.
pub(super) fn before_entering(process: &Process) -> Result<()> {
    let adjustment = process.oom_score_adj().unwrap_or(0).to_string();
    // Refused to a node that is a container itself, where it does not matter.
    let _ = fs::write("/proc/self/oom_score_adj", adjustment);
    for rlimit in process.rlimits().iter().flatten() {
        setrlimit(resource(rlimit.typ()), rlimit.soft(), rlimit.hard())
            .map_err(said("setting a resource limit"))?;
    }
    Ok(())
}

/// The security module's word for the program that is run next. `proc` is the node's own `/proc`.
pub(super) fn label(proc: &OwnedFd, process: &Process) -> Result<()> {
    let write = |file: &str, text: &str| -> std::io::Result<()> {
        let opened = openat(proc, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        fs::File::from(opened).write_all(text.as_bytes())
    };
    if let Some(profile) = process.apparmor_profile().as_ref().filter(|p| !p.is_empty()) {
        let text = format!("exec {profile}");
        write("thread-self/attr/apparmor/exec", &text)
            .or_else(|_| write("thread-self/attr/exec", &text))
            .map_err(|e| {
                format!("entering the AppArmor profile {profile}: {e}; is it loaded on the node?")
            })?;
    }
    if let Some(label) = process.selinux_label().as_ref().filter(|l| !l.is_empty()) {
        write("thread-self/attr/exec", label)
            .map_err(|e| format!("taking the SELinux label {label}: {e}"))?;
    }
    Ok(())
}

/// The node's own `/proc`, for [`label`]; to be opened before any namespace is entered.
pub(super) fn open_proc() -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc", flags, Mode::empty()).map_err(said("opening /proc"))
}

/// A session of its own with these streams: one terminal, or input, output and error.
pub(super) fn take_streams(stdio: Vec<OwnedFd>, process: &Process) -> Result<()> {
    setsid().map_err(said("making a session"))?;
    let stdio: Vec<OwnedFd> = stdio.into_iter().map(own_null).collect();
    let streams = match stdio.as_slice() {
        [terminal] => {
            sys::control_terminal(terminal).map_err(said("taking the terminal"))?;
            [terminal, terminal, terminal]
        }
        [input, output, error] => [input, output, error],
        _ => return Ok(()),
    };
    dup2_stdin(streams[0]).map_err(said("setting standard input"))?;
    dup2_stdout(streams[1]).map_err(said("setting standard output"))?;
    dup2_stderr(streams[2]).map_err(said("setting standard error"))?;
    for stream in streams {
        give_stream(stream, process.user().uid());
    }
    Ok(())
}

/// The container's own `/dev/null` in the place of the node's: a device of a file system that the
/// container does not have is a way out of it, and nothing that CRIU could dump.
fn own_null(stream: OwnedFd) -> OwnedFd {
    let is_null = |stat: &FileStat| {
        SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
            && stat.st_rdev == makedev(1, 3)
    };
    if !fstat(&stream).is_ok_and(|stat| is_null(&stat))
        || !lstat("/dev/null").is_ok_and(|stat| is_null(&stat))
    {
        return stream;
    }
    // What an image or a volume put there meanwhile must neither be waited for nor used.
    let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    match open("/dev/null", flags, Mode::empty()) {
        Ok(own)
            if fstat(&own).is_ok_and(|stat| is_null(&stat))
                && fcntl(&own, FcntlArg::F_SETFL(OFlag::O_RDWR)).is_ok() =>
        {
            own
        }
        _ => stream,
    }
}

/// Becomes the process's user, with its capabilities and its filter. Every other descriptor than
/// the standard streams is closed when the program is run.
pub(super) fn become_user(process: &Process, filter: Option<&Program>) -> Result<()> {
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        prctl::set_no_new_privs().map_err(said("setting no_new_privs"))?;
    }
    sys::close_others_on_exec().map_err(said("closing descriptors"))?;
    let user = process.user();
    if let Some(mask) = user.umask() {
        umask(Mode::from_bits_truncate(mask));
    }
    let groups: Vec<Gid> =
        user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    setgroups(&groups).map_err(said("setting groups"))?;
    prctl::set_keepcaps(true).map_err(said("keeping capabilities"))?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).map_err(said("setting the group"))?;
    setresuid(uid, uid, uid).map_err(said("setting the user"))?;
    prctl::set_keepcaps(false).map_err(said("letting capabilities go"))?;
    // A change of user has cleared the effective ones.
    let permitted = caps::read(None, CapSet::Permitted).map_err(said("reading capabilities"))?;
    caps::set(None, CapSet::Effective, &permitted).map_err(said("keeping capabilities"))?;
    if let (Some(filter), false) = (filter, no_new_privileges) {
        filter.load().map_err(said("loading the seccomp filter"))?;
    }
    if let Some(capabilities) = process.capabilities() {
        cut(capabilities).map_err(said("dropping capabilities"))?;
    }
    if let (Some(filter), true) = (filter, no_new_privileges) {
        filter.load().map_err(said("loading the seccomp filter"))?;
    }
    Ok(())
}

fn cut(wanted: &LinuxCapabilities) -> std::result::Result<(), caps::errors::CapsError> {
    let all = caps::all();
    // Both types name the kernel's numbers (include/uapi/linux/capability.h).
    let known = |name: &Capability| {
        let bit = crate::spec::capabilities::ALL.iter().position(|c| c == name)?;
        all.iter().find(|c| usize::from(c.index()) == bit).copied()
    };
    let set = |names: &Option<HashSet<Capability>>| -> CapsHashSet {
        names.iter().flatten().filter_map(known).collect()
    };
    for dropped in caps::read(None, CapSet::Bounding)?.difference(&set(wanted.bounding())) {
        caps::drop(None, CapSet::Bounding, *dropped)?;
    }
    caps::set(None, CapSet::Effective, &set(wanted.effective()))?;
    caps::set(None, CapSet::Permitted, &set(wanted.permitted()))?;
    caps::set(None, CapSet::Inheritable, &set(wanted.inheritable()))?;
    caps::set(None, CapSet::Ambient, &set(wanted.ambient()))
}

/// Lets the process open its own `/dev/stdout` by path. Not everything can be given away, which is
/// no reason to refuse it.
pub(super) fn give_stream(stream: &OwnedFd, uid: u32) {
    let null = (1, 3);
    let device = fstat(stream.as_fd()).map(|s| (major(s.st_rdev), minor(s.st_rdev)));
    if device.is_ok_and(|device| device != null) {
        let _ = fchown(stream, Some(Uid::from_raw(uid)), None);
    }
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}
