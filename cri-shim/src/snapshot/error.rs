//! What can go wrong with snapshots.

use std::{io, path::PathBuf};

/// A snapshot operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file or mount operation failed.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// With which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A layer of the image is not in the store.
    #[error(
        "container {container}: layer {chain_id} of image {image} is gone; pull the image again"
    )]
    MissingLayer {
        /// The container.
        container: String,
        /// The image's id.
        image: String,
        /// The layer's chain id.
        chain_id: String,
    },
    /// A container id with characters that can't be a folder name.
    #[error("{container:?} is no container id")]
    BadId {
        /// The id given.
        container: String,
    },
}

impl SnapshotError {
    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }
}
