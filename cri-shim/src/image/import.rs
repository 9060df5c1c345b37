//! Importing archives.

use super::{ImageError, ImageId, ImageStore, ImportSource};

impl ImageStore {
    /// Imports all images of an archive.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn import(&self, source: ImportSource) -> Result<Vec<ImageId>, ImageError> {
        Err(ImageError::Unsupported {
            reference: format!("{source:?}"),
            reason: "imports are unimplemented".to_owned(),
        })
    }
}
