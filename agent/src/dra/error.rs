//! Why a pod's claims are not ready, in the words that kubelet has for it.

use std::path::PathBuf;

use tonic::Status;

use crate::ids::NamespacedName;
use crate::join::files::FileError;
use crate::objects::ObjectError;

/// Why claims cannot be prepared, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DraError {
    /// The object of a template is not made yet.
    #[error("pod \"{0}\": ResourceClaim not created yet")]
    NotCreated(NamespacedName),
    /// Neither a name nor a template.
    #[error("pod \"{pod}\", spec.resourceClaim {claim:?}: none of the supported fields are set")]
    Unsupported {
        /// The pod.
        pod: NamespacedName,
        /// Its name for the claim.
        claim: String,
    },
    /// The claim cannot be read.
    #[error("fetch ResourceClaim {name}: {source}")]
    Fetch {
        /// The claim.
        name: String,
        /// Why.
        source: ObjectError,
    },
    /// There is no such claim.
    #[error("fetch ResourceClaim {0}: resourceclaims.resource.k8s.io \"{0}\" not found")]
    NotFound(String),
    /// It was made from a template for another pod.
    #[error("ResourceClaim {claim} was not created for Pod {pod} (Pod is not owner)")]
    NotOwner {
        /// The claim.
        claim: NamespacedName,
        /// The pod.
        pod: NamespacedName,
    },
    /// The scheduler has not let the pod have it.
    #[error("pod {pod} ({uid}) is not allowed to use ResourceClaim {claim} ({claim_uid})")]
    NotReserved {
        /// The pod's name.
        pod: String,
        /// The pod's UID.
        uid: String,
        /// The claim's name.
        claim: String,
        /// The claim's UID.
        claim_uid: String,
    },
    /// Nothing is allocated for it.
    #[error("ResourceClaim {0}: not allocated")]
    NotAllocated(String),
    /// Its driver is not here.
    #[error("DRA driver {0} is not registered; see whether the driver's pod runs on this node")]
    NotRegistered(String),
    /// A claim of that name that is gone from the API is still prepared.
    #[error(
        "old ResourceClaim with same name {name} and different UID {uid} still exists (previous pod force-deleted?!)"
    )]
    OldClaim {
        /// The claim's name.
        name: String,
        /// The UID of the one that is prepared.
        uid: String,
    },
    /// The driver refused all, or did not answer.
    #[error("{call}: rpc error: code = {:?} desc = {}", status.code(), status.message())]
    Rpc {
        /// What it was asked.
        call: &'static str,
        /// Its answer.
        status: Box<Status>,
    },
    /// The driver refused one claim.
    #[error("{call} failed for ResourceClaim {claim}: {message}")]
    Refused {
        /// What it was asked.
        call: &'static str,
        /// The claim.
        claim: String,
        /// Its words.
        message: String,
    },
    /// The driver answered for what it was not asked for.
    #[error("{call} returned result for unknown claim UID {uid}")]
    Stranger {
        /// What it was asked.
        call: &'static str,
        /// The UID.
        uid: String,
    },
    /// The driver left claims out.
    #[error("{call} skipped {count} ResourceClaims")]
    Skipped {
        /// What it was asked.
        call: &'static str,
        /// How many.
        count: usize,
    },
    /// A container wants of a claim of which nothing is known.
    #[error(
        "unable to get claim info for ResourceClaim {claim} in namespace {namespace}: it was not prepared on this node; delete the pod"
    )]
    Unprepared {
        /// The claim.
        claim: String,
        /// Its namespace.
        namespace: String,
    },
    /// What is prepared could not be put on disk.
    #[error("checkpoint ResourceClaim state: {0}")]
    Checkpoint(#[from] FileError),
    /// What is on disk cannot be used.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// `read`, `write`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}
