//! The system calls without a safe wrapper: fork, exit without destructors, descriptors in and out.
#![allow(unsafe_code, reason = "fork, _exit, SCM_RIGHTS and raw clone have no safe interface")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::signal::{SigHandler, SigSet, Signal};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use nix::unistd::{ForkResult, Pid};

/// Forks; `None` in the child.
pub fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the zygote and the monitors are single-threaded, so the child may use everything its
    // parent could.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// linux/sched.h; libc's constant has the wrong width.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of linux/sched.h.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks a child of the caller's parent (`CLONE_PARENT`); `None` in the child. It begins in the
/// cgroup (v2) that is an open directory here, which costs no migration.
pub fn fork_sibling(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    // With CLONE_PARENT the exit signal is the caller's and may not be given.
    let mut args = CloneArgs { flags: libc::CLONE_PARENT as u64, ..CloneArgs::default() };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and a stack this is fork with another parent; the caller is
    // single-threaded. The arguments outlive the call.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &args as *const CloneArgs, size_of::<CloneArgs>())
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(pid as i32))),
    }
}

/// Has every descriptor but the standard streams closed by the next exec.
pub fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: close_range(2) takes three integers.
    let done = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends this process at once: a forked child must not run its parent's destructors.
pub fn exit(code: i32) -> ! {
    // SAFETY: _exit takes any value and does not return.
    unsafe { libc::_exit(code) }
}

/// The kernel's highest signal (`_NSIG`).
const LAST_SIGNAL: libc::c_int = 64;

/// Undoes what the monitor set for itself: a container starts with default signals, none blocked.
pub fn reset_signals() {
    let _ = SigSet::empty().thread_set_mask();
    // The kernel's own struct is smaller on every architecture; all zero is the default action.
    let default = [0u64; 8];
    // By the system call: the C library keeps two real-time signals for itself and, as it starts a
    // process, leaves them ignored.
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: rt_sigaction(2) reads the struct, which outlives the call; the default action runs
        // no code of ours.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null::<u8>(),
                size_of::<u64>(),
            )
        };
    }
}

/// Has the kernel reap this process's children.
pub fn ignore_children() {
    // SAFETY: ignoring a signal runs no code of ours.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) };
}

/// Makes a signal's default action apply again.
pub fn default_action(signal: Signal) {
    // SAFETY: the default action runs no code of ours.
    let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
}

/// Sends bytes with descriptors; the number of bytes that went.
pub fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    let parts = [IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(fds)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    Ok(sendmsg::<UnixAddr>(stream.as_raw_fd(), &parts, &rights, flags, None)?)
}

/// Receives bytes and any descriptors that come with them.
pub fn receive_with_fds(
    socket: RawFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let message =
        recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for this process; nothing else
            // owns them.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(message.bytes)
}

/// Unlocks a pseudoterminal's other end and opens it, without looking at any path.
pub fn open_peer(master: &OwnedFd) -> io::Result<OwnedFd> {
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value and returns a descriptor.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a terminal the controlling one of the session this process leads.
pub fn control_terminal(terminal: &OwnedFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes its argument by value.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells a terminal how large it is shown; its foreground processes get SIGWINCH.
pub fn set_window_size(terminal: &impl AsRawFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends a signal by number, real-time ones too; a process that is gone is no error.
pub fn kill(pid: Pid, signal: i32) {
    if pid.as_raw() > 0 {
        // SAFETY: kill(2) takes any two integers.
        let _ = unsafe { libc::kill(pid.as_raw(), signal) };
    }
}

/// Reads once, as much as `buffer` has capacity for beyond what it holds; nothing at the end.
pub fn read(fd: &impl AsRawFd, buffer: &mut Vec<u8>) -> io::Result<()> {
    let spare = buffer.spare_capacity_mut();
    // SAFETY: read(2) writes at most the spare capacity, which is ours and need not be initialised.
    let read = unsafe { libc::read(fd.as_raw_fd(), spare.as_mut_ptr().cast(), spare.len()) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has just filled so many bytes of it.
    unsafe { buffer.set_len(buffer.len() + read) };
    Ok(())
}
