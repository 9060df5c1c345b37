//! The generated messages of the device plugin protocol.

#![allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]

tonic::include_proto!("v1beta1");
