//! Folders for work in progress, locked while their process lives.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use super::layout::Layout;
use crate::snapshot::remove_tree;

/// A folder in the store's `tmp` that disappears with its owner: on drop, or at the next sweep
/// after a crash.
#[derive(Debug)]
pub(crate) struct Work {
    folder: tempfile::TempDir,
    /// The lock tells a sweep that this work is alive.
    _lock: File,
}

impl Work {
    pub(crate) fn new(layout: &Layout) -> io::Result<Self> {
        // Shared, so that a sweep can't see the folder before its lock is taken.
        let _store = layout.lock(false)?;
        let folder = tempfile::Builder::new().prefix("work").tempdir_in(layout.tmp())?;
        let lock = File::create(lock_of(folder.path()))?;
        lock.lock()?;
        Ok(Self { folder, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Layers may be deeper than what the folder's own removal gets down to. What stays is the
        // next sweep's.
        if let Err(error) = remove_tree(self.path()) {
            tracing::debug!(path = %self.path().display(), %error, "cannot remove work");
        }
    }
}

/// Whether the process that made `folder` still works there.
pub(crate) fn is_live(folder: &Path) -> bool {
    match File::open(lock_of(folder)) {
        Ok(lock) => matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

fn lock_of(folder: &Path) -> PathBuf {
    folder.join("lock")
}
