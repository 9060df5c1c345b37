//! Container root filesystems: overlayfs over the shared layers of an image.
//!
//! A snapshot is a folder with the container's own upper and work folder and a record of the layers
//! below. The record is what keeps an image from being removed under a container, so it is written
//! under the image store's lock.

pub mod diff;
mod error;
mod mount;
mod remove;

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use error::SnapshotError;
pub use mount::{is_mounted, mount, mount_read_only, unmount};
pub(crate) use remove::{entries, remove_tree, remove_tree_at};

use crate::image::{Image, layout::Layout, layout::write_whole};
use crate::selinux::{self, RelabelError};

const VERSION: u32 = 1;
const RECORD: &str = "snapshot.json";

/// The folders of a container's root filesystem. Mount them with [`mount()`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    /// The image's layers, topmost first.
    pub lowerdirs: Vec<PathBuf>,
    /// What the container changed.
    pub upper: PathBuf,
    /// overlayfs' own folder.
    pub work: PathBuf,
    /// Where it is to be mounted.
    pub merged: PathBuf,
    /// The SELinux label of all its files.
    pub label: Option<String>,
}

/// What a container's own layer takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files, folders and links.
    pub inodes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    image: String,
    /// Bottom first.
    layers: Vec<String>,
    /// Images that are volumes of the container.
    #[serde(default)]
    volumes: Vec<Volume>,
}

/// An image that a container has as a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Volume {
    image: String,
    /// Bottom first.
    layers: Vec<String>,
}

/// The layers of an image volume. Mount them with [`mount_read_only()`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeLayers {
    /// The image's id.
    pub image: String,
    /// Topmost first.
    pub layers: Vec<PathBuf>,
}

/// A container that needs an image.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) container: String,
    pub(crate) image: String,
    pub(crate) layers: Vec<String>,
}

/// All snapshots of a state folder.
#[derive(Debug, Clone)]
pub struct SnapshotStore {
    layout: Layout,
}

impl SnapshotStore {
    /// Opens the snapshots in `state_dir` (the same as the image store's) and removes half-made ones.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn open(state_dir: &Path) -> Result<Self, SnapshotError> {
        let layout = Layout::new(state_dir);
        layout.create().map_err(SnapshotError::io("create snapshot folder", state_dir))?;
        let store = Self { layout };
        for id in store.list()? {
            if !store.folder(&id)?.join(RECORD).exists() {
                store.remove(&id)?;
            }
        }
        Ok(store)
    }

    /// Gives all layers, and what is made beside them from now on, a label for SELinux. Costs a walk
    /// over all files where the folder of the layers has another.
    ///
    /// # Errors
    /// [`RelabelError`]; the next call tries again.
    pub fn label_layers(&self, label: &str) -> Result<(), RelabelError> {
        // New layers and upper folders take after the folder that they are made in.
        selinux::label_folder(&self.layout.tmp(), label)?;
        selinux::label_folder(&self.layout.snapshots(), label)?;
        let layers = self.layout.layers();
        if selinux::has_label(&layers, label) {
            return Ok(());
        }
        let folders = fs::read_dir(&layers).into_iter().flatten().flatten();
        folders.map(|layer| layer.path()).try_for_each(|layer| selinux::relabel(&layer, label))?;
        // Last, as it stands for all.
        selinux::label_folder(&layers, label)
    }

    /// Makes the folders of `container`'s root filesystem. One that is there already is returned as it is.
    ///
    /// # Errors
    /// [`SnapshotError::MissingLayer`] when the image was removed meanwhile: pull it again.
    pub fn prepare(&self, container: &str, image: &Image) -> Result<Rootfs, SnapshotError> {
        self.prepare_with(container, image, &[])
    }

    /// The same, and keeps the images of the container's volumes.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_with(
        &self,
        container: &str,
        image: &Image,
        volumes: &[std::sync::Arc<Image>],
    ) -> Result<Rootfs, SnapshotError> {
        let folder = self.folder(container)?;
        let lock = self.layout.lock(false);
        let _lock = lock.map_err(SnapshotError::io("lock image store", self.layout.images()))?;
        if let Some(rootfs) = self.get(container)? {
            return Ok(rootfs);
        }
        for image in std::iter::once(image).chain(volumes.iter().map(|volume| &**volume)) {
            for chain_id in &image.layers {
                if self.layout.layer_meta(chain_id).is_none() {
                    return Err(SnapshotError::MissingLayer {
                        container: container.to_owned(),
                        image: image.id.to_string(),
                        chain_id: chain_id.clone(),
                    });
                }
            }
        }
        let make = |path: &Path| match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(SnapshotError::io("create", path)(error))
            }
            _ => Ok(()),
        };
        make(&folder)?;
        crate::crash::point("snapshot: folder made");
        for name in ["upper", "work", "merged"] {
            make(&folder.join(name))?;
        }
        let volume =
            |image: &Image| Volume { image: image.id.to_string(), layers: image.layers.clone() };
        let record = Record {
            version: VERSION,
            image: image.id.to_string(),
            layers: image.layers.clone(),
            volumes: volumes.iter().map(|image| volume(image)).collect(),
        };
        let path = folder.join(RECORD);
        let text = serde_json::to_vec(&record)
            .map_err(|error| SnapshotError::io("encode", &path)(error.into()))?;
        write_whole(&path, &text, 0o600).map_err(SnapshotError::io("write", &path))?;
        Ok(self.rootfs(&folder, &record))
    }

    /// The root filesystem of a container that was prepared.
    ///
    /// # Errors
    /// [`SnapshotError::Io`] when its record can't be read.
    pub fn get(&self, container: &str) -> Result<Option<Rootfs>, SnapshotError> {
        let folder = self.folder(container)?;
        let record = read_record(&folder).map_err(SnapshotError::io("read snapshot", &folder))?;
        Ok(record.map(|record| self.rootfs(&folder, &record)))
    }

    /// The image volumes of a container that was prepared, in the order they were given.
    ///
    /// # Errors
    /// [`SnapshotError::Io`] when its record can't be read.
    pub fn volumes(&self, container: &str) -> Result<Vec<VolumeLayers>, SnapshotError> {
        let folder = self.folder(container)?;
        let record = read_record(&folder).map_err(SnapshotError::io("read snapshot", &folder))?;
        let files = |volume: Volume| VolumeLayers {
            layers: volume.layers.iter().rev().map(|id| self.layout.layer_files(id)).collect(),
            image: volume.image,
        };
        Ok(record.into_iter().flat_map(|record| record.volumes).map(files).collect())
    }

    /// Unmounts the container's root filesystem, if it is mounted here, and removes it. Nothing
    /// there is a success.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn remove(&self, container: &str) -> Result<(), SnapshotError> {
        let folder = self.folder(container)?;
        unmount(&folder.join("merged"))?;
        crate::crash::point("snapshot: removal begun");
        // The record goes last, so that an interrupted removal is found again by its name.
        for name in ["upper", "work", "merged", RECORD] {
            let path = folder.join(name);
            remove_tree(&path).map_err(SnapshotError::io("remove", &path))?;
        }
        crate::crash::point("snapshot: emptied");
        remove_tree(&folder).map_err(SnapshotError::io("remove", &folder))
    }

    /// What the container wrote, by walking its upper folder. Blocking; cost grows with the number
    /// of files it changed.
    ///
    /// # Errors
    /// [`SnapshotError::Io`]; files that vanish during the walk are not one.
    pub fn usage(&self, container: &str) -> Result<Usage, SnapshotError> {
        let upper = self.folder(container)?.join("upper");
        let mut usage = Usage::default();
        let mut folders = vec![upper];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                // Deeper than a path can say: what is above is counted.
                Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => continue,
                Err(error) => return Err(SnapshotError::io("read", &folder)(error)),
            };
            for entry in entries.flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                usage.inodes += 1;
                usage.bytes += meta.blocks() * 512;
                if meta.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        Ok(usage)
    }

    /// The containers that have a snapshot.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn list(&self) -> Result<Vec<String>, SnapshotError> {
        let folder = self.layout.snapshots();
        let entries = fs::read_dir(&folder).map_err(SnapshotError::io("read", &folder))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    fn folder(&self, container: &str) -> Result<PathBuf, SnapshotError> {
        let plain = !container.is_empty()
            && container.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if plain {
            Ok(self.layout.snapshots().join(container))
        } else {
            Err(SnapshotError::BadId { container: container.to_owned() })
        }
    }

    fn rootfs(&self, folder: &Path, record: &Record) -> Rootfs {
        Rootfs {
            lowerdirs: record.layers.iter().rev().map(|id| self.layout.layer_files(id)).collect(),
            upper: folder.join("upper"),
            work: folder.join("work"),
            merged: folder.join("merged"),
            label: None,
        }
    }
}

/// The containers with a snapshot, and what they need. The caller holds the store's lock.
pub(crate) fn users(snapshots: &Path) -> io::Result<Vec<User>> {
    let mut users = Vec::new();
    for entry in fs::read_dir(snapshots)? {
        let entry = entry?;
        if let Some(Record { image, layers, volumes, .. }) = read_record(&entry.path())? {
            let container = entry.file_name().to_string_lossy().into_owned();
            for Volume { image, layers } in volumes {
                users.push(User { container: container.clone(), image, layers });
            }
            users.push(User { container, image, layers });
        }
    }
    Ok(users)
}

fn read_record(folder: &Path) -> io::Result<Option<Record>> {
    let text = match fs::read(folder.join(RECORD)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let record: Record = serde_json::from_slice(&text)?;
    if record.version != VERSION {
        return Err(io::Error::other(format!("unknown snapshot version {}", record.version)));
    }
    Ok(Some(record))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const LABEL: &str = "system_u:object_r:container_ro_file_t:s0";

    /// A kernel without SELinux keeps the attribute as any other.
    #[test]
    fn layers_are_labelled_whole_and_once() {
        let state = tempfile::tempdir().unwrap();
        let snapshots = SnapshotStore::open(state.path()).unwrap();
        let layers = snapshots.layout.layers();
        let file = layers.join("one/d/bin/file");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "").unwrap();
        snapshots.label_layers(LABEL).unwrap();
        let labelled = |path: &Path| selinux::has_label(path, LABEL);
        let folders = [snapshots.layout.tmp(), snapshots.layout.snapshots(), layers.clone()];
        assert!(folders.iter().chain([&file]).all(|path| labelled(path)));

        // What came since took after its folder; nothing is walked again.
        fs::write(layers.join("one/d/other"), "").unwrap();
        snapshots.label_layers(LABEL).unwrap();
        assert!(!labelled(&layers.join("one/d/other")));
        // Somebody has relabelled the folder, and so perhaps what is in it.
        selinux::label_folder(&layers, "a:b:c:s0").unwrap();
        snapshots.label_layers(LABEL).unwrap();
        assert!(labelled(&layers) && labelled(&layers.join("one/d/other")));
    }
}
