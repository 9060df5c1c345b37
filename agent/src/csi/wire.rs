//! The generated messages of CSI and of plugin registration.

#![allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]

pub(super) mod csi {
    tonic::include_proto!("csi.v1");
}

pub(super) mod registration {
    tonic::include_proto!("pluginregistration");
}
