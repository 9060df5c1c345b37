//! The black-box suites: the real `longshore` in namespaces of its own, watched from outside.
//!
//! They need root; a machine that lacks something fails them loudly.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests: a panic is how they report"
)]

mod join;
mod lab;
