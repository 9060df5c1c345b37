//! Loading a filter: seccomp(2).
#![allow(unsafe_code, reason = "seccomp(2) takes pointers and has no safe interface")]

use std::io;

/// The size of an instruction, `struct sock_filter`.
pub(super) const INSTRUCTION: usize = size_of::<libc::sock_filter>();

pub(super) fn load(flags: u32, instructions: &[u8]) -> io::Result<()> {
    let filter: Vec<libc::sock_filter> = instructions
        .chunks_exact(INSTRUCTION)
        .map(|chunk| {
            // SAFETY: the chunk has the size of the structure, in which any bytes are valid.
            unsafe { chunk.as_ptr().cast::<libc::sock_filter>().read_unaligned() }
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and its instructions outlive the call, which only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &program as *const libc::sock_fprog,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
