//! The black-box suites: the real `longshore` in namespaces of its own, watched from outside.
//!
//! They need root; a machine that lacks something fails them loudly. With
//! `LONGSHORE_TEST_KUBECONFIG` (and the test run where that API server is reachable) the suites
//! that need a cluster use it instead of the test control plane.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "tests: a panic is how they report"
)]

mod block;
mod certificates;
mod cluster;
mod csi;
mod devices;
mod disk;
mod dra;
mod faults;
mod issued;
mod join;
mod lab;
mod numa;
mod pods;
mod probes;
mod proxy;
mod pulls;
mod registry;
mod restart;
mod standalone;
mod storage;
mod support;
mod traces;
mod volumes;
