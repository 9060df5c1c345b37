//! Writes the image that `examples/` run: `example-image FILE.tar`. Made from Debian's
//! busybox-static, so that the demo needs no registry.

#![allow(clippy::print_stderr, reason = "a tool for people")]

use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(file) = std::env::args_os().nth(1) else {
        eprintln!("usage: example-image FILE.tar");
        return ExitCode::from(64);
    };
    let workload = tests::harness::node::built("workload").ok();
    match tests::harness::image::write_archive(
        file.as_ref(),
        &[tests::harness::image::IMAGE],
        workload.as_deref(),
        &["/bin/sh"],
    ) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("example-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}
