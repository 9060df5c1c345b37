//! The generated messages of CSI.

#![allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]

pub(super) mod csi {
    tonic::include_proto!("csi.v1");
}
