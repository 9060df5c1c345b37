//! The generated messages of DRA drivers.

#![allow(clippy::all, clippy::pedantic, missing_docs, reason = "generated code")]

pub(super) mod v1 {
    tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
}

pub(super) mod v1beta1 {
    tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1beta1");
}

pub(super) mod health {
    tonic::include_proto!("v1alpha1");
}
