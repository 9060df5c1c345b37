//! The ends of processes: containers', execs', and of what makes them.

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Pod, reply};
use crate::crash::point;
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
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => continue,
            };
            if !self.ended(pid, code, signal) && !self.launches.is_empty() {
                self.unclaimed.push((pid, code, signal));
            }
        }
        self.spent.retain(|group| !self.cgroups.remove(group));
    }

    /// Deals with the end of a process; `false` when it is nobody's.
    pub(super) fn ended(&mut self, pid: Pid, code: i32, signal: i32) -> bool {
        if let Some(at) = self.containers.iter().position(|c| c.pid == pid) {
            let mut container = self.containers.swap_remove(at);
            // In a PID namespace of its own nothing is left; elsewhere its processes go with it.
            self.cgroups.kill(&container.cgroup);
            container.drain();
            point("monitor: exit seen");
            let kills = self.oom_kills(&container, signal);
            let oom_killed = plan_oom_killed(kills, code, signal, container.asked);
            let exit = Exited { code, signal, at: record::now(), oom_killed, ..Exited::default() };
            self.write_exit(&container.id, container.records.clone(), &exit);
            point("monitor: exit recorded");
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
            self.spent.push(exec.group);
            self.tell(exec.connection, &Reply::ExecExited { code });
            return true;
        }
        self.launches.iter().any(|l| l.child == pid)
    }

    /// Whether the kernel killed processes of the container for want of memory. systemd removes a
    /// scope as soon as it is empty, and its counter with it, which may be before we look: then the
    /// pod's tells, where the container's is counted too.
    fn oom_kills(&self, container: &Container, signal: i32) -> bool {
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

/// Whether a container ended for want of memory, given whether any of its processes was killed for
/// that (`kills`), how it ended, and the last signal it was asked to be sent. A container that
/// outlives the loss of a process and succeeds, or is stopped later, did not; one that fails by the
/// loss did, as a shell does that passes on its child's 137.
fn plan_oom_killed(kills: bool, code: i32, signal: i32, asked: i32) -> bool {
    match asked {
        0 => kills && code != 0,
        // Asked to end, and killed before it could.
        asked => kills && signal == libc::SIGKILL && asked != libc::SIGKILL,
    }
}

#[cfg(test)]
mod tests {
    use super::plan_oom_killed;
    use libc::{SIGKILL, SIGTERM};

    #[test]
    fn only_an_end_by_the_kernel_is_one_for_want_of_memory() {
        assert!(plan_oom_killed(true, 137, SIGKILL, 0), "the first process itself");
        assert!(plan_oom_killed(true, 137, 0, 0), "a shell tells of its child");
        assert!(plan_oom_killed(true, 1, 0, 0), "it failed for the loss of a child");
        assert!(!plan_oom_killed(true, 0, 0, 0), "a child was lost, and it went on");
        assert!(!plan_oom_killed(false, 137, SIGKILL, 0), "somebody in the container killed it");
        assert!(!plan_oom_killed(true, 143, SIGTERM, SIGTERM), "lost a child, stopped later");
        assert!(!plan_oom_killed(true, 137, SIGKILL, SIGKILL), "stopped without grace");
        assert!(plan_oom_killed(true, 137, SIGKILL, SIGTERM), "while it stopped");
    }
}
