//! The one system call that no crate wraps.
#![allow(unsafe_code, reason = "adjtimex(2) has no safe wrapper in nix")]

/// Whether the kernel's clock is kept in step with others (NTP); `None` where it does not say.
pub(super) fn clock_is_synchronized() -> Option<bool> {
    // SAFETY: timex is plain data, for which all zeros is a value; `modes` 0 makes the call read only.
    let state = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        libc::adjtimex(&raw mut timex)
    };
    (state >= 0).then_some(state != libc::TIME_ERROR)
}
