//! Where things lie in a store, and the lock over it.
//!
//! ```text
//! <state>/images/lock                  flock: exclusive to change the index or remove layers
//!               /index.json            the images (`index`)
//!               /configs/<hex>         image configs as they came, named by their digest
//!               /layers/<24 hex>/d     an unpacked layer, named by the start of its key
//!                               /layer.json
//!               /tmp/<random>/         work in progress, removed at the next start
//! <state>/snapshots/<container id>/    (`crate::snapshot`)
//! ```
//! Layer folders have short names because overlay's mount options must fit in one page.
//!
//! A layer's key is the digest of its tar, so that images share it whatever is below it. One that
//! leaves out the folders its files lie in takes their owners and modes from the layers below, so
//! its key is the chain id, which stands for those too.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The paths of a store.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    state: PathBuf,
}

/// What a layer folder says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerMeta {
    pub(crate) version: u32,
    #[serde(rename = "chain_id")]
    pub(crate) key: String,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// The boot it was unpacked in. In another one, only an image's word makes it whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) boot: Option<String>,
}

impl Layout {
    pub(crate) fn new(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into() }
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.images().join("index.json")
    }

    pub(crate) fn config(&self, id: &str) -> PathBuf {
        self.images().join("configs").join(hex(id))
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.images().join("layers")
    }

    pub(crate) fn layer(&self, key: &str) -> PathBuf {
        self.layers().join(layer_name(key))
    }

    /// The unpacked files of a layer.
    pub(crate) fn layer_files(&self, key: &str) -> PathBuf {
        self.layer(key).join("d")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.images().join("tmp")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.state.join("snapshots")
    }

    /// Makes the folders.
    pub(crate) fn create(&self) -> io::Result<()> {
        for folder in [self.images().join("configs"), self.layers(), self.tmp(), self.snapshots()] {
            fs::create_dir_all(folder)?;
        }
        Ok(())
    }

    /// Locks the store against other processes and threads until the file is dropped. Held only
    /// for short file operations, never over a download.
    pub(crate) fn lock(&self, exclusive: bool) -> io::Result<File> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.images().join("lock"))?;
        if exclusive {
            file.lock()?
        } else {
            file.lock_shared()?
        }
        Ok(file)
    }

    /// The layer's own record, if the layer is there and is the one meant.
    pub(crate) fn layer_meta(&self, key: &str) -> Option<LayerMeta> {
        self.meta_in(&self.layer(key)).filter(|meta| meta.key == key)
    }

    /// The record in a layer's folder.
    pub(crate) fn meta_in(&self, folder: &Path) -> Option<LayerMeta> {
        serde_json::from_slice(&fs::read(folder.join("layer.json")).ok()?).ok()
    }
}

/// The folder name of a layer: enough of the key to be unique, short for the mount options.
pub(crate) fn layer_name(key: &str) -> &str {
    let hex = hex(key);
    hex.get(..24).unwrap_or(hex)
}

/// A digest without its algorithm.
pub(crate) fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

/// Writes a file whole: temporary file, fsync, rename, fsync of the folder.
pub(crate) fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = tempfile::Builder::new().prefix(".new").tempfile_in(folder)?;
    temporary.write_all(content)?;
    fs::set_permissions(temporary.path(), std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}
