//! The sandbox's namespaces: the monitor enters its pod's own UTS and IPC namespaces, so that
//! containers inherit them and nothing has to be pinned; sysctls are set where they belong; a
//! shared PID namespace gets a first process that reaps.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname};

use super::protocol::{SpawnMonitor, Userns};
use super::{sys, userns};
use crate::network::netns;

/// Enters the namespaces; the process id of the shared PID namespace's init, if one was asked for.
pub(super) fn enter(spawn: &SpawnMonitor) -> Result<Option<i32>, String> {
    if let Some(userns) = &spawn.userns {
        return enter_of_users(spawn, userns);
    }
    let mut flags = CloneFlags::empty();
    flags.set(CloneFlags::CLONE_NEWUTS, spawn.hostname.is_some());
    flags.set(CloneFlags::CLONE_NEWIPC, spawn.ipc);
    if !flags.is_empty() {
        unshare(flags).map_err(|e| format!("making the pod's namespaces: {e}"))?;
    }
    if let Some(hostname) = &spawn.hostname {
        sethostname(hostname).map_err(|e| format!("setting the host name {hostname:?}: {e}"))?;
    }
    if !spawn.sysctls.is_empty() {
        set_sysctls(spawn)?;
    }
    if spawn.shared_pid { start_init().map(Some) } else { Ok(None) }
}

/// The same for a pod with a user namespace. The monitor itself stays outside, with the node's ids,
/// and enters only what belongs to it: whoever is root in the pod must have no power over it.
fn enter_of_users(spawn: &SpawnMonitor, pod: &Userns) -> Result<Option<i32>, String> {
    let (holder, init) = userns::make(&pod.map, |talk| make_inside(spawn, talk))?;
    netns::pin(&pod.path, &holder.file("user")).map_err(|e| e.to_string())?;
    if let Some(path) = &spawn.netns {
        netns::pin(path, &holder.file("net")).map_err(|e| e.to_string())?;
    }
    if let Some(hostname) = &spawn.hostname {
        setns(holder.open("uts")?, CloneFlags::CLONE_NEWUTS)
            .map_err(|e| format!("entering the pod's UTS namespace: {e}"))?;
        sethostname(hostname).map_err(|e| format!("setting the host name {hostname:?}: {e}"))?;
    }
    if spawn.ipc {
        setns(holder.open("ipc")?, CloneFlags::CLONE_NEWIPC)
            .map_err(|e| format!("entering the pod's IPC namespace: {e}"))?;
    }
    Ok(init)
}

/// What a pod's user namespace owns, made in it; the init of its PID namespace, if it is shared.
fn make_inside(spawn: &SpawnMonitor, talk: &UnixStream) -> Result<Option<i32>, String> {
    let mut flags = CloneFlags::empty();
    flags.set(CloneFlags::CLONE_NEWNET, spawn.netns.is_some());
    flags.set(CloneFlags::CLONE_NEWUTS, spawn.hostname.is_some());
    flags.set(CloneFlags::CLONE_NEWIPC, spawn.ipc);
    unshare(flags).map_err(|e| format!("making the pod's namespaces: {e}"))?;
    if spawn.netns.is_some() {
        netns::loopback_up().map_err(|e| format!("bringing the pod's loopback up: {e}"))?;
    }
    // Kernels differ in who may set those of an IPC namespace: the node's root, or the namespace's.
    let refused: Vec<_> = spawn.sysctls.iter().filter(|s| set_sysctl(s.0, s.1).is_err()).collect();
    userns::become_root()?;
    refused.into_iter().try_for_each(|(name, value)| set_sysctl(name, value))?;
    if !spawn.shared_pid {
        return Ok(None);
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|e| format!("making a PID namespace: {e}"))?;
    match sys::fork_sibling(None).map_err(|e| format!("fork: {e}"))? {
        Some(pid) => Ok(Some(pid.as_raw())),
        None => {
            userns::hang_up(talk);
            reap_forever()
        }
    }
}

fn set_sysctls(spawn: &SpawnMonitor) -> Result<(), String> {
    let own = File::open("/proc/self/ns/net").map_err(|e| format!("opening the netns: {e}"))?;
    if let Some(path) = &spawn.netns {
        let netns = File::open(path).map_err(|e| format!("opening {}: {e}", path.display()))?;
        setns(&netns, CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("entering {}: {e}", path.display()))?;
    }
    let result = spawn.sysctls.iter().try_for_each(|(name, value)| set_sysctl(name, value));
    setns(&own, CloneFlags::CLONE_NEWNET).map_err(|e| format!("leaving the netns: {e}"))?;
    result
}

fn set_sysctl(name: &str, value: &str) -> Result<(), String> {
    // Both spellings are in use: dots, or slashes where an interface name holds a dot.
    let relative = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if relative.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(format!("sysctl {name:?} is not a name"));
    }
    let path = PathBuf::from("/proc/sys").join(relative);
    fs::write(&path, value).map_err(|error| format!("setting sysctl {name}={value}: {error}"))
}

/// Forks the init through an intermediate, as a PID namespace begins with the next child. The init
/// is a child of the monitor itself (a sibling of the intermediate), and dies with it.
fn start_init() -> Result<i32, String> {
    let (mut reader, mut writer) = std::io::pipe().map_err(|e| format!("making a pipe: {e}"))?;
    match sys::fork().map_err(|e| format!("fork: {e}"))? {
        None => {
            drop(reader);
            let made = unshare(CloneFlags::CLONE_NEWPID).map_err(std::io::Error::from);
            match made.and_then(|()| sys::fork_sibling(None)) {
                Ok(None) => {
                    drop(writer);
                    reap_forever()
                }
                Ok(Some(pid)) => {
                    use std::io::Write;
                    let _ = writer.write_all(&pid.as_raw().to_le_bytes());
                    sys::exit(0)
                }
                Err(_) => sys::exit(1),
            }
        }
        Some(child) => {
            drop(writer);
            let mut bytes = [0u8; 4];
            let read = std::io::Read::read_exact(&mut reader, &mut bytes);
            let _ = waitpid(child, None);
            read.map_err(|_| "making the pod's PID namespace failed".to_owned())?;
            Ok(i32::from_le_bytes(bytes))
        }
    }
}

/// The init of a shared PID namespace: reaps what is orphaned, ends on SIGTERM. Its end is the end
/// of every process of the pod.
fn reap_forever() -> ! {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    let _ = signals.thread_block();
    let _ = nix::sys::prctl::set_name(c"longshore-init");
    let _ = nix::sys::prctl::set_pdeathsig(Some(Signal::SIGKILL));
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => loop {
                match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::StillAlive) | Err(_) => break,
                    Ok(_) => {}
                }
            },
            Ok(_) => sys::exit(0),
            Err(_) => {}
        }
    }
}
