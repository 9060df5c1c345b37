//! The sandbox's namespaces: the monitor enters its pod's own UTS and IPC namespaces, so that
//! containers inherit them and nothing has to be pinned; sysctls are set where they belong; a
//! shared PID namespace gets a first process that reaps.

use std::fs::{self, File};
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname};

use super::protocol::SpawnMonitor;
use super::sys;

/// Enters the namespaces; the process id of the shared PID namespace's init, if one was asked for.
pub(super) fn enter(spawn: &SpawnMonitor) -> Result<Option<i32>, String> {
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

fn set_sysctls(spawn: &SpawnMonitor) -> Result<(), String> {
    let own = File::open("/proc/self/ns/net").map_err(|e| format!("opening the netns: {e}"))?;
    if let Some(path) = &spawn.netns {
        let netns = File::open(path).map_err(|e| format!("opening {}: {e}", path.display()))?;
        setns(&netns, CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("entering {}: {e}", path.display()))?;
    }
    let mut result = Ok(());
    for (name, value) in &spawn.sysctls {
        // Both spellings are in use: dots, or slashes where an interface name holds a dot.
        let relative = if name.contains('/') { name.clone() } else { name.replace('.', "/") };
        if relative.split('/').any(|part| part.is_empty() || part == "..") {
            result = Err(format!("sysctl {name:?} is not a name"));
            break;
        }
        let path = PathBuf::from("/proc/sys").join(relative);
        if let Err(error) = fs::write(&path, value) {
            result = Err(format!("setting sysctl {name}={value}: {error}"));
            break;
        }
    }
    setns(&own, CloneFlags::CLONE_NEWNET).map_err(|e| format!("leaving the netns: {e}"))?;
    result
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
