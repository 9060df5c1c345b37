//! The monitor: one tiny single-threaded process per pod, parent of the pod's containers.

use std::ffi::OsString;
use std::process::ExitCode;

/// The entry of `longshore monitor …`. The binary's `main` calls it before it starts a thread, a
/// runtime or a logger; `arguments` are those after `monitor`.
pub fn main(_arguments: impl Iterator<Item = OsString>) -> ExitCode {
    ExitCode::from(64)
}
