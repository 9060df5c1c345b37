//! Points between the steps of what has effects, at which a test kills the process.
//!
//! `tests/crash.rs` finds every point in the source, dies at each in turn as by `kill -9`, and
//! looks whether the next shim makes sense of what is left. A release build has nothing of this.

/// Names the step that has just been done. The name is unique; its first part is the process or the
/// verb it belongs to.
#[inline(always)]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    armed::reached(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod armed {
    use std::fs::OpenOptions;

    use nix::sys::signal::{Signal, raise};

    /// `<point>=<file>`: dies at that point, unless the file is there already, which it makes
    /// before. So one process dies once, and the test sees that it did.
    const VARIABLE: &str = "LONGSHORE_CRASH_AT";

    pub(super) fn reached(name: &str) {
        let Ok(armed) = std::env::var(VARIABLE) else { return };
        let Some(mark) = armed.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) else {
            return;
        };
        if OpenOptions::new().write(true).create_new(true).open(mark).is_ok() {
            let _ = raise(Signal::SIGKILL);
        }
    }
}
