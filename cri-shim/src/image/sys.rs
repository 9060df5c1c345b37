//! Extended attributes on open files.
#![allow(unsafe_code, reason = "fsetxattr has no wrapper in nix")]

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd},
};

/// Sets extended attribute `name` of an open file or folder.
pub(super) fn set_xattr(file: impl AsFd, name: &[u8], value: &[u8]) -> io::Result<()> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the name is a C string and the value readable for its length.
    let result = unsafe {
        libc::fsetxattr(
            file.as_fd().as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads extended attribute `name`, up to 4 KiB.
pub(crate) fn get_xattr(file: impl AsFd, name: &std::ffi::CStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; 4096];
    // SAFETY: the name is a C string and the buffer writable for its length.
    let length = unsafe {
        libc::fgetxattr(
            file.as_fd().as_raw_fd(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(length).map_err(|_| io::Error::last_os_error())?);
    Ok(value)
}
