//! The monitor: one tiny single-threaded process per pod, parent of the pod's containers.
//!
//! It owns the containers' standard streams and writes their logs, records starts and exits on
//! disk, runs processes in containers, and tells whoever is connected. It knows nothing of the
//! CRI, holds no state that a restarted shim would need from its memory, and lives on when
//! `longshore` stops, crashes or is upgraded.
//!
//! Monitors are forked from a **zygote**, the program re-executed as `longshore monitor`, rather
//! than executed one by one: a large position-independent program dirties a megabyte of its own
//! data by relocation, which forks share and executions do not; and a fork takes a millisecond
//! less than an execution. The zygote ends with the shim; the monitors do not.

use std::ffi::OsString;
use std::process::ExitCode;

mod container;
mod exec;
pub(crate) mod external;
mod follower;
pub mod frame;
mod image_volumes;
mod inroot;
mod launch;
pub mod log;
mod make;
mod namespaces;
mod payload;
mod pod;
mod process;
pub mod protocol;
pub mod record;
mod staging;
pub mod sys;
mod tree;
mod userns;
mod zygote;

pub(crate) use make::hooks;

/// The entry of `longshore monitor`. The binary's `main` calls it before it starts a thread, a
/// runtime or a logger; `arguments` are those after `monitor`. There are none so far: what to do
/// comes over standard input, a unix socket that the shim made.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    if arguments.next().is_some() {
        return ExitCode::from(64);
    }
    match zygote::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
