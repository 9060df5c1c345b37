//! What can go wrong with images, told apart so that the kubelet's message and its back-off fit.

use std::{io, path::PathBuf};

/// An image operation that failed. The texts end up in `ErrImagePull` events, so each names the
/// image, the cause and, where there is one, the next step.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The reference or identifier cannot be parsed.
    #[error("invalid image reference {reference:?}: {reason}")]
    InvalidReference {
        /// What was asked for.
        reference: String,
        /// The rule it breaks.
        reason: String,
    },
    /// The registry does not have the image, or not for this platform.
    #[error("image {reference} not found: {reason}")]
    NotFound {
        /// The normalised reference.
        reference: String,
        /// What the registry said.
        reason: String,
    },
    /// The registry refuses without, or with these, credentials.
    #[error(
        "pull of {reference} unauthorized: {reason}; check the imagePullSecrets of the pod, and \
         that the repository exists"
    )]
    Unauthorized {
        /// The normalised reference.
        reference: String,
        /// What the registry said.
        reason: String,
    },
    /// The registry cannot be reached, broke off, or answered with a server error. Worth a retry.
    #[error("pull of {reference} from {host} failed: {reason}")]
    Network {
        /// The normalised reference.
        reference: String,
        /// The registry or mirror host.
        host: String,
        /// The cause.
        reason: String,
    },
    /// Content that does not have the digest, size or form it was announced with.
    #[error("image {reference} is corrupt: {object}: {reason}")]
    Corrupt {
        /// The image or archive.
        reference: String,
        /// The layer, config or manifest.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A form of image that is not supported, such as foreign layers or schema 1 manifests.
    #[error("image {reference} cannot be used: {reason}")]
    Unsupported {
        /// The image or archive.
        reference: String,
        /// What is not supported.
        reason: String,
    },
    /// A container still uses the image.
    #[error("image {reference} is in use by container {container}; remove the container first")]
    InUse {
        /// What was to be removed.
        reference: String,
        /// One of its users.
        container: String,
    },
    /// A `hosts.toml` that cannot be used.
    #[error("registry configuration {path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The disk has no room left.
    #[error(
        "no space left on the image filesystem {path} while {operation}; free disk space or move --state-dir"
    )]
    NoSpace {
        /// What was being done.
        operation: String,
        /// Where.
        path: PathBuf,
    },
    /// A file operation on the store failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl ImageError {
    /// Wraps a file error, with a full disk told apart.
    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| {
            if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
                Self::NoSpace { operation: operation.to_owned(), path }
            } else {
                Self::Io { operation, path, source }
            }
        }
    }

    /// Whether trying again soon may help without anything being changed.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Network { .. })
    }
}

impl From<ImageError> for tonic::Status {
    fn from(error: ImageError) -> Self {
        let text = error.to_string();
        match error {
            ImageError::InvalidReference { .. } => Self::invalid_argument(text),
            ImageError::NotFound { .. } => Self::not_found(text),
            ImageError::Unauthorized { .. } => Self::permission_denied(text),
            ImageError::Network { .. } => Self::unavailable(text),
            ImageError::Corrupt { .. } => Self::data_loss(text),
            ImageError::Unsupported { .. } | ImageError::InUse { .. } => {
                Self::failed_precondition(text)
            }
            ImageError::NoSpace { .. } => Self::resource_exhausted(text),
            ImageError::Config { .. } | ImageError::Io { .. } => Self::internal(text),
        }
    }
}
