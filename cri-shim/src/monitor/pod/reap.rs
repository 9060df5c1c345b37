//! The ends of processes: containers', execs', and of what makes them.

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Pod, reply};
use crate::monitor::container::Container;
use crate::monitor::follower::Follower;
use crate::monitor::protocol::{Exited, Reply};
use crate::monitor::record;

impl Pod {
    pub(super) fn reap(&mut self) {
        loop {
            let (pid, code, signal) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code, 0),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid, 128 + signal as i32, signal as i32)
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if !self.ended(pid, code, signal) && !self.launches.is_empty() {
                self.unclaimed.push((pid, code, signal));
            }
        }
    }

    /// Deals with the end of a process; `false` when it is nobody's.
    pub(super) fn ended(&mut self, pid: Pid, code: i32, signal: i32) -> bool {
        if let Some(at) = self.containers.iter().position(|c| c.pid == pid) {
            let mut container = self.containers.swap_remove(at);
            // In a PID namespace of its own nothing is left; elsewhere its processes go with it.
            self.cgroups.kill(&container.cgroup);
            container.drain();
            let oom_killed = code != 0 && self.oom_killed(&container, signal);
            let exit = Exited { code, signal, at: record::now(), oom_killed, ..Exited::default() };
            self.write_exit(&container.id, container.records.clone(), &exit);
            let _ = self.cgroups.remove(&container.cgroup);
            container.followers.retain(Follower::is_behind);
            self.followers.append(&mut container.followers);
            let event = Reply::Exited { container: container.id, exit };
            for connection in self.connections.iter_mut().filter(|c| c.subscribed) {
                reply(connection, &event);
            }
            return true;
        }
        if let Some(at) = self.execs.iter().position(|e| e.pid == pid) {
            let exec = self.execs.swap_remove(at);
            self.tell(exec.connection, &Reply::ExecExited { code });
            return true;
        }
        self.launches.iter().any(|l| l.child == pid)
    }

    /// Whether the kernel killed it for want of memory. systemd removes a scope as soon as it is
    /// empty, and its counter with it, which may be before we look: then the pod's tells, where the
    /// container's is counted too.
    fn oom_killed(&self, container: &Container, signal: i32) -> bool {
        match self.cgroups.oom_kills(&container.cgroup) {
            Some(kills) => kills > 0,
            None => {
                let now = self.cgroups.oom_kills_around(&container.cgroup);
                let before = container.oom_kills_before;
                signal == libc::SIGKILL && now.zip(before).is_some_and(|(now, before)| now > before)
            }
        }
    }
}
