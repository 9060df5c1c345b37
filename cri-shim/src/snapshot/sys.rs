//! The mount API with file descriptors (fsopen, fsconfig, fsmount, move_mount), which takes each
//! lower layer as an option of its own. Kernel: Documentation/filesystems/overlayfs.rst, "lowerdir+".
#![allow(unsafe_code, reason = "these system calls have no wrapper in nix")]

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

use super::Rootfs;

const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

pub(super) fn mount_overlay(rootfs: &Rootfs) -> io::Result<()> {
    // SAFETY: the name is a valid C string.
    let context =
        owned(unsafe { libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), FSOPEN_CLOEXEC) })?;
    let context = context.as_raw_fd();
    set(context, c"source", Path::new("overlay"))?;
    for lower in &rootfs.lowerdirs {
        set(context, c"lowerdir+", lower)?;
    }
    set(context, c"upperdir", &rootfs.upper)?;
    set(context, c"workdir", &rootfs.work)?;
    // Only a matter of speed: an older kernel refuses the option, and the mount goes on without.
    let _ = config(context, FSCONFIG_SET_FLAG, Some(c"volatile"), None);
    config(context, FSCONFIG_CMD_CREATE, None, None).map_err(|error| with_log(context, error))?;
    // SAFETY: fsmount(2) takes no pointers.
    let mount = owned(unsafe { libc::syscall(libc::SYS_fsmount, context, FSMOUNT_CLOEXEC, 0) })?;
    let target = c_string(&rootfs.merged)?;
    // SAFETY: both paths are valid C strings that outlive the call.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if moved < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set(context: RawFd, key: &CStr, value: &Path) -> io::Result<()> {
    let value = c_string(value)?;
    config(context, FSCONFIG_SET_STRING, Some(key), Some(&value))
        .map_err(|error| with_log(context, error))
}

fn config(
    context: RawFd,
    command: libc::c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> io::Result<()> {
    // SAFETY: key and value are null or valid C strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context,
            command,
            key.map_or(ptr::null(), CStr::as_ptr),
            value.map_or(ptr::null(), CStr::as_ptr),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Adds what the kernel logged about this mount, which says more than the error number. Numbers
/// that say what the kernel lacks are kept as they are.
fn with_log(context: RawFd, error: io::Error) -> io::Error {
    let mut text = [0u8; 512];
    // SAFETY: `text` is writable for the length given.
    let read = unsafe { libc::read(context, text.as_mut_ptr().cast(), text.len()) };
    let keep = matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP));
    match usize::try_from(read) {
        Ok(read) if read > 0 && !keep => {
            let log = String::from_utf8_lossy(&text[..read.min(text.len())]);
            io::Error::new(error.kind(), format!("{error}: {}", log.trim()))
        }
        _ => error,
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
