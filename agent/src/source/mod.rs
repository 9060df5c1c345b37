//! Where pods come from: manifests in a folder (`file`) and the API server (`cluster`).
//!
//! Every source speaks the same small language to the sync loop, so that the loop does not know
//! whether a control plane exists.

pub mod cluster;
pub mod file;
pub mod proxy_object;
pub mod url;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use crate::ids::PodUid;

/// Which source a pod came from. Both at once is normal: static pods on a cluster node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PodSource {
    /// A manifest in the static pod folder, or at the static pod URL.
    File,
    /// The API server.
    Cluster,
}

/// One change in what this node should run.
#[derive(Clone, Debug)]
pub enum PodChange {
    /// The pod is new, or its object changed (spec, metadata, `deletionTimestamp`). Defaults are
    /// filled in as the API server would, UID and namespace are always set.
    Set(PodSource, Arc<Pod>),
    /// The manifest was removed, or the object is gone from the API: end the pod.
    Removed(PodSource, PodUid),
    /// The source has now told all it knew at its start. Only then may what no source named be
    /// taken for orphaned.
    Synced(PodSource),
}
