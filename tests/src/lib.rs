//! Black-box suites, the test control plane, benchmarks.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "code of tests: a panic is how it reports"
)]

pub mod control_plane;
pub mod driver;
pub mod harness;
