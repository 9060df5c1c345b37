//! The `longshore` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // A pod's monitor: before anything starts a thread, an allocator arena or a runtime.
    if args.next().is_some_and(|verb| verb == "monitor") {
        return cri_shim::monitor::main(args);
    }
    agent::cli::main(std::env::args_os())
}
