//! The CRI shim: a CRI v1 server that runs the containers itself.

/// The CRI v1 wire types, generated from `proto/cri.proto`.
pub mod api {
    #![allow(clippy::all, reason = "generated code")]
    tonic::include_proto!("runtime.v1");
}

pub mod image;
pub mod network;
pub mod snapshot;
