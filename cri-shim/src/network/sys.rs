//! Interface flags by ioctl: what netlink would take a whole connection for.
#![allow(unsafe_code, reason = "ioctl on interface flags has no safe wrapper")]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Brings `lo` of the calling thread's network namespace up.
pub(super) fn loopback_up() -> io::Result<()> {
    let socket = socket()?;
    let mut request = flags(&socket)?;
    // SAFETY: SIOCGIFFLAGS filled the union's `ifru_flags` member.
    unsafe { request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short };
    // SAFETY: `request` is a valid ifreq that outlives the call, as SIOCSIFFLAGS requires.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether `lo` is up.
#[cfg(test)]
pub(super) fn loopback_is_up() -> io::Result<bool> {
    let request = flags(&socket()?)?;
    // SAFETY: SIOCGIFFLAGS filled the union's `ifru_flags` member.
    Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_UP != 0)
}

fn flags(socket: &OwnedFd) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    // SAFETY: `request` is a valid, exclusively borrowed ifreq, as SIOCGIFFLAGS requires.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request)
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
