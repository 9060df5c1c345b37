//! The attribute that holds a file's label: getxattr(2), setxattr(2).
#![allow(unsafe_code, reason = "these system calls have no wrapper in nix")]

use std::ffi::{CStr, CString};
use std::io;

const NAME: &CStr = c"security.selinux";

/// The longest label that is compared, in bytes; the kernel's own are far shorter.
const MAX_LABEL: usize = 4096;

/// The label of what is at a path; `None` where there is none to be read.
pub(super) fn label(path: &str) -> Option<Vec<u8>> {
    let path = CString::new(path).ok()?;
    let mut buffer = vec![0u8; MAX_LABEL];
    // SAFETY: path and name are valid C strings, and the buffer is writable for the length given.
    let read = unsafe {
        libc::getxattr(path.as_ptr(), NAME.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
    };
    buffer.truncate(usize::try_from(read).ok()?);
    // The kernel's end with a NUL byte.
    while buffer.last() == Some(&0) {
        buffer.pop();
    }
    Some(buffer)
}

/// Sets the label of what is at a path.
pub(super) fn set_label(path: &str, label: &str) -> io::Result<()> {
    let (path, label) = (CString::new(path)?, CString::new(label)?);
    let label = label.as_bytes_with_nul();
    // SAFETY: path and name are valid C strings, and the label is readable for the length given.
    let result = unsafe {
        libc::setxattr(path.as_ptr(), NAME.as_ptr(), label.as_ptr().cast(), label.len(), 0)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
