//! What can go wrong between this node and a CSI driver.

use std::io;
use std::path::{Path, PathBuf};

use tonic::Code;

use crate::objects::ObjectError;

/// Why a CSI volume could not be put in place or taken away. All of them may pass.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    /// No driver of this name is registered on the node (now).
    #[error(
        "driver name {0} not found in the list of registered CSI drivers; see whether its pod runs \
         on this node"
    )]
    NoDriver(String),
    /// The driver refused, or did not answer.
    #[error("rpc error: code = {code:?} desc = {message}")]
    Rpc {
        /// The gRPC code.
        code: Code,
        /// The driver's words.
        message: String,
    },
    /// The volume, its driver or its objects do not fit together.
    #[error("{0}")]
    Invalid(String),
    /// It is for one pod, and another has it.
    #[error(
        "volume uses the ReadWriteOncePod access mode and is already in use by another pod; it is mounted \
         once nothing of that pod is left"
    )]
    InUse,
    /// The volume is not attached to this node.
    #[error("{0}")]
    NotAttached(String),
    /// The attach-detach controller has not attached the volume in time.
    #[error("timed out waiting for the volume to be attached to this node: {0}")]
    AttachTimeout(String),
    /// An object could not be read.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The file system refused.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// `create`, `write`, ...
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pod ends; nobody waits for its volumes any more.
    #[error("the pod ends before its volumes are in place")]
    Ending,
}

impl CsiError {
    pub(super) fn io(
        operation: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> CsiError + use<> {
        let path = path.to_path_buf();
        move |source| CsiError::Io { operation, path, source }
    }

    /// Whether trying again as it is makes no sense (KEP-1790).
    pub fn is_infeasible(&self) -> bool {
        let hopeless = [Code::InvalidArgument, Code::OutOfRange, Code::NotFound];
        matches!(self, Self::Rpc { code, .. } if hopeless.contains(code))
    }

    /// Whether the driver has surely stopped working on it. After any other error what it was asked
    /// for may yet come about.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Rpc { code, .. } => !matches!(
                code,
                Code::Cancelled
                    | Code::DeadlineExceeded
                    | Code::Unavailable
                    | Code::ResourceExhausted
                    | Code::Aborted
            ),
            _ => false,
        }
    }
}

impl From<tonic::Status> for CsiError {
    fn from(status: tonic::Status) -> Self {
        Self::Rpc { code: status.code(), message: status.message().to_owned() }
    }
}
