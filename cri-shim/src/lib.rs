//! The CRI shim: a CRI v1 server that runs the containers itself.
//!
//! Three parts, each with its own floor: [`spec`] decides (CRI config and image config to an OCI
//! spec), `cri` answers the verbs, and [`monitor`] is the small process per pod that is the
//! parent of the pod's containers and outlives this server.

/// The CRI v1 wire types, generated from `proto/cri.proto`.
pub mod api {
    #![allow(clippy::all, reason = "generated code")]
    tonic::include_proto!("runtime.v1");
}

pub mod apparmor;
pub mod cdi;
pub mod cgroup;
pub mod client;
pub mod config;
mod crash;
pub mod cri;
pub mod image;
pub mod monitor;
pub mod mount;
pub mod network;
pub mod scoped;
pub mod seccomp;
pub mod selinux;
mod serve;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod streaming;
pub mod systemd;
mod traces;
pub mod zygote;

pub use config::Config;
pub use serve::{ServeError, serve};
