//! The store on disk: opening it, reading the index, listing and removing images.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use oci_spec::image::ImageConfiguration;

use super::{
    error::ImageError,
    index::{self, Index},
    layers::Flights,
    layout::{self, Layout},
    progress::Pulls,
    steps::step,
    unpack::Limits,
};
use crate::snapshot::{self, remove_tree};

/// How a store is set up.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The shim's state folder, such as `/var/lib/longshore`; the store takes `images` in it.
    pub state_dir: PathBuf,
    /// Folders with `<host>/hosts.toml`; the first one that exists is used.
    pub registry_dirs: Vec<PathBuf>,
    /// Layers downloaded and unpacked at once, over all pulls.
    pub parallel: usize,
    /// The most one layer may unpack to, in bytes.
    pub max_layer_bytes: u64,
    /// The most files one layer may have.
    pub max_layer_entries: u64,
    /// References, by tag or digest, and ids that are never garbage-collected.
    pub pinned: Vec<String>,
    /// How long connecting to a registry may take.
    pub connect_timeout: Duration,
    /// How long a registry may stay silent in the middle of an answer.
    pub read_timeout: Duration,
    /// How often a broken download is taken up again.
    pub retries: u32,
    /// How long a pull may get nothing and unpack nothing before it is given up (containerd's
    /// `image_pull_progress_timeout`).
    pub progress_timeout: Duration,
    /// How long layers stay that no image names, such as those of a pull that was killed.
    pub orphan_life: Duration,
}

impl StoreConfig {
    /// The defaults for a store in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self {
            state_dir: state_dir.into(),
            registry_dirs: vec!["/etc/longshore/certs.d".into(), "/etc/containerd/certs.d".into()],
            parallel: cores.clamp(3, 8),
            max_layer_bytes: 64 << 30,
            max_layer_entries: 4_000_000,
            pinned: Vec::new(),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            retries: 4,
            progress_timeout: Duration::from_secs(300),
            orphan_life: Duration::from_secs(3600),
        }
    }
}

/// An image's identity: the digest of its config, `sha256:<hex>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub(crate) String);

impl ImageId {
    /// The digest with its algorithm.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image of the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of its config.
    pub id: ImageId,
    /// Its names, such as `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// Its names by the digest of the manifest or index it was pulled by.
    pub repo_digests: Vec<String>,
    /// Bytes that its unpacked layers take on disk.
    pub size: u64,
    /// User, environment, command and so on.
    pub config: ImageConfiguration,
    /// The keys of its layers in the store, bottom first, each once: of equal layers the topmost
    /// says all that the others say.
    pub layers: Vec<String>,
    /// Whether garbage collection must leave it alone.
    pub pinned: bool,
}

impl Image {
    /// The chain id of its topmost layer; empty without layers.
    pub fn chain_id(&self) -> String {
        let diff_ids = self.config.rootfs().diff_ids();
        let plans = super::layers::plan_layers(diff_ids, std::iter::repeat(None));
        plans.last().map(|plan| plan.chain_id.clone()).unwrap_or_default()
    }
}

/// What the image filesystem holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// A folder on the filesystem.
    pub mountpoint: PathBuf,
    /// Bytes of all layers.
    pub used_bytes: u64,
    /// Files of all layers.
    pub inodes_used: u64,
}

/// Where an imported archive comes from.
pub enum ImportSource {
    /// A docker-archive or OCI-layout tar (optionally gzip or zstd).
    File(PathBuf),
    /// The same as a stream, such as standard input.
    Reader(Box<dyn std::io::Read + Send>),
}

impl fmt::Debug for ImportSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Reader(_) => f.write_str("Reader"),
        }
    }
}

/// The store. Cheap to clone; all clones share the pulls in flight.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    pub(crate) layout: Layout,
    pub(crate) flights: Flights,
    pub(crate) pulls: Pulls,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    /// Device, inode, size and mtime of the index file the rest was read from.
    stamp: Option<(u64, u64, u64, i64, i64)>,
    index: Arc<Index>,
    images: HashMap<String, Arc<Image>>,
}

impl Shared {
    pub(crate) fn limits(&self) -> Limits {
        Limits { bytes: self.config.max_layer_bytes, entries: self.config.max_layer_entries }
    }
}

impl ImageStore {
    /// Opens the store and removes what an earlier, interrupted run left half done. For the shim;
    /// there is one such owner at a time.
    ///
    /// # Errors
    /// [`ImageError::Io`] when the folders can't be made or read.
    pub fn open(config: StoreConfig) -> Result<Self, ImageError> {
        let store = Self::open_shared(config)?;
        store.sweep()?;
        Ok(store)
    }

    /// Opens the store beside a shim that may be running, without clearing up.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub fn open_shared(config: StoreConfig) -> Result<Self, ImageError> {
        let layout = Layout::new(&config.state_dir);
        layout.create().map_err(ImageError::io("create image store", &config.state_dir))?;
        let flights = Flights::new(config.parallel.max(1));
        let pulls = Pulls::default();
        let shared = Shared { config, layout, flights, pulls, cache: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// All images, by id.
    ///
    /// # Errors
    /// [`ImageError::Io`] when the index can't be read.
    pub fn list(&self) -> Result<Vec<Arc<Image>>, ImageError> {
        self.with_cache(|cache| {
            let mut images: Vec<_> = cache.images.values().cloned().collect();
            images.sort_by(|a, b| a.id.cmp(&b.id));
            images
        })
    }

    /// The image that `name` (a reference, an id, or the start of an id) means.
    ///
    /// # Errors
    /// As [`ImageStore::list`].
    pub fn status(&self, name: &str) -> Result<Option<Arc<Image>>, ImageError> {
        self.with_cache(|cache| {
            cache.index.resolve(name).and_then(|id| cache.images.get(id)).cloned()
        })
    }

    /// Removes an image with all its names, and the layers no other image needs. An image that is
    /// not there is a success.
    ///
    /// # Errors
    /// [`ImageError::InUse`] while a container's snapshot needs it.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let layout = &self.shared.layout;
        let _lock = self.lock(true)?;
        let mut index = (*self.read_index()?).clone();
        let Some(id) = index.resolve(name).map(str::to_owned) else {
            return Ok(());
        };
        let freed = index.layers_freed_by(&id);
        let users = snapshot::users(&layout.snapshots())
            .map_err(ImageError::io("read snapshots", layout.snapshots()))?;
        if let Some(user) = users
            .iter()
            .find(|user| user.image == id || user.layers.iter().any(|l| freed.contains(l)))
        {
            return Err(ImageError::InUse {
                reference: name.to_owned(),
                container: user.container.clone(),
            });
        }
        index.images.remove(&id);
        self.write_index(&index)?;
        step("image forgotten");
        let config = layout.config(&id);
        if let Err(error) = fs::remove_file(&config) {
            tracing::debug!(path = %config.display(), %error, "cannot remove image config");
        }
        step("config removed");
        for key in &freed {
            self.discard_layer(&layout.layer(key))?;
        }
        // Room is wanted: what forgotten pulls left goes too.
        self.discard_orphans(&index)
    }

    /// Says whether `name` is to be kept from garbage collection. Images that the configuration
    /// pins are pinned whatever is said here.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] for an image that is not there.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<ImageId, ImageError> {
        let _lock = self.lock(true)?;
        let mut index = (*self.read_index()?).clone();
        let id = index.resolve(name).map(str::to_owned);
        let Some((id, record)) = id.and_then(|id| index.images.get_mut(&id).map(|r| (id, r)))
        else {
            return Err(ImageError::NotFound {
                reference: name.to_owned(),
                reason: "it is not on this node".to_owned(),
            });
        };
        record.pinned = pinned;
        self.write_index(&index)?;
        Ok(ImageId(id))
    }

    /// What the layers take on disk.
    ///
    /// # Errors
    /// As [`ImageStore::list`].
    pub fn fs_info(&self) -> Result<FsInfo, ImageError> {
        let (used_bytes, inodes_used) = self.with_cache(|cache| cache.index.usage())?;
        Ok(FsInfo { mountpoint: self.shared.layout.images(), used_bytes, inodes_used })
    }

    pub(crate) fn lock(&self, exclusive: bool) -> Result<fs::File, ImageError> {
        let layout = &self.shared.layout;
        layout.lock(exclusive).map_err(ImageError::io("lock image store", layout.images()))
    }

    /// Moves a layer out of sight in one step, then deletes it: a crash in between leaves only
    /// rubbish in `tmp`.
    fn discard_layer(&self, folder: &Path) -> Result<(), ImageError> {
        let layout = &self.shared.layout;
        let grave = tempfile::Builder::new()
            .prefix("gone")
            .tempdir_in(layout.tmp())
            .map_err(ImageError::io("create folder in", layout.tmp()))?;
        step("grave dug");
        match fs::rename(folder, grave.path().join("layer")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ImageError::io("remove layer", folder)(error));
            }
            _ => {}
        }
        step("layer out of sight");
        remove_tree(&grave.path().join("layer"))
            .and_then(|()| grave.close())
            .map_err(ImageError::io("remove layer", folder))
    }

    /// Removes layers that no image names and that nobody has taken up for a while. Those of an
    /// earlier boot may not be whole.
    fn discard_orphans(&self, index: &Index) -> Result<(), ImageError> {
        let layout = &self.shared.layout;
        let boot = super::layers::boot_id();
        let used: BTreeSet<&str> =
            index.layers_in_use().into_iter().map(layout::layer_name).collect();
        for folder in read_dir(&layout.layers())? {
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if used.contains(name) {
                continue;
            }
            let young = fs::metadata(&folder).and_then(|meta| meta.modified()).is_ok_and(|time| {
                time.elapsed().unwrap_or_default() < self.shared.config.orphan_life
            });
            let whole = layout.meta_in(&folder).is_some_and(|meta| meta.boot == boot);
            if !(young && whole && boot.is_some()) {
                self.discard_layer(&folder)?;
            }
        }
        Ok(())
    }

    /// Removes unfinished work and layers that no image names any more. Work of a running import is
    /// locked and stays; whole layers of a pull that was killed stay a while, for it to be resumed.
    fn sweep(&self) -> Result<(), ImageError> {
        let layout = &self.shared.layout;
        let _lock = self.lock(true)?;
        let mut index = (*self.read_index()?).clone();
        let lost = index.drop_unsynced(&super::layers::boot_id().unwrap_or_default());
        if !lost.is_empty() {
            tracing::warn!(images = ?lost, "the machine stopped before these were on disk; they \
                must be pulled again");
            self.write_index(&index)?;
        }
        for entry in read_dir(&layout.tmp())? {
            if !super::work::is_live(&entry) {
                remove_all(&entry)?;
            }
        }
        self.discard_orphans(&index)?;
        let ids: BTreeSet<&str> = index.images.keys().map(|id| layout::hex(id)).collect();
        for entry in read_dir(&layout.images().join("configs"))? {
            if !entry.file_name().is_some_and(|n| n.to_str().is_some_and(|n| ids.contains(n))) {
                remove_all(&entry)?;
            }
        }
        Ok(())
    }

    /// The index as it is on disk now. Unreadable ones are set aside: the layers are lost to it,
    /// and the images are pulled again.
    pub(crate) fn read_index(&self) -> Result<Arc<Index>, ImageError> {
        let path = self.shared.layout.index();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Arc::default()),
            Err(error) => return Err(ImageError::io("read image index", path)(error)),
        };
        match serde_json::from_slice::<Index>(&text) {
            Ok(index) if index.version == index::VERSION => Ok(Arc::new(index)),
            other => {
                let reason = match other {
                    Ok(index) => format!("its version is {}", index.version),
                    Err(error) => error.to_string(),
                };
                let aside = path.with_extension("json.unreadable");
                tracing::error!(path = %path.display(), aside = %aside.display(), reason,
                    "image index is unreadable and was set aside; images must be pulled again");
                fs::rename(&path, &aside).map_err(ImageError::io("set aside", path))?;
                Ok(Arc::default())
            }
        }
    }

    /// Replaces the index. The caller holds the exclusive lock.
    pub(crate) fn write_index(&self, index: &Index) -> Result<(), ImageError> {
        let path = self.shared.layout.index();
        let text = serde_json::to_vec(index)
            .map_err(|e| ImageError::io("encode image index", &path)(e.into()))?;
        step("index to be written");
        layout::write_whole(&path, &text, 0o600)
            .map_err(ImageError::io("write image index", path))?;
        step("index written");
        Ok(())
    }

    /// Reads the index again if another process or thread replaced it.
    fn with_cache<T>(&self, read: impl FnOnce(&Cache) -> T) -> Result<T, ImageError> {
        let mut cache = self.shared.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.shared.layout.index();
        let stamp = match fs::metadata(&path) {
            Ok(m) => Some((m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(ImageError::io("read image index", path)(error)),
        };
        if cache.stamp != stamp {
            let index = self.read_index()?;
            let mut images = HashMap::new();
            for (id, record) in &index.images {
                match self.load(id, record) {
                    Ok(image) => {
                        images.insert(id.clone(), Arc::new(image));
                    }
                    // One bad image never hides the others; a new pull repairs it.
                    Err(error) => tracing::error!(image = %id, %error, "image is unusable"),
                }
            }
            *cache = Cache { stamp, index, images };
        }
        Ok(read(&cache))
    }

    fn load(&self, id: &str, record: &index::Record) -> Result<Image, ImageError> {
        let path = self.shared.layout.config(id);
        let text = fs::read(&path).map_err(ImageError::io("read image config", &path))?;
        let config = serde_json::from_slice(&text).map_err(|error| ImageError::Corrupt {
            reference: id.to_owned(),
            object: "config".to_owned(),
            reason: error.to_string(),
        })?;
        let named = |pin: &super::ImageReference| match (pin.repo_tag(), pin.digest()) {
            (Some(tag), _) => record.repo_tags.contains(&tag),
            (None, Some(digest)) => record.repo_digests.contains(&pin.repo_digest(digest)),
            (None, None) => false,
        };
        let pinned =
            self.shared.config.pinned.iter().any(|pin| {
                pin == id || super::ImageReference::parse(pin).is_ok_and(|pin| named(&pin))
            });
        let mut seen = BTreeSet::new();
        let mut layers: Vec<_> =
            record.layers.iter().rev().filter(|layer| seen.insert(&layer.key)).collect();
        layers.reverse();
        Ok(Image {
            id: ImageId(id.to_owned()),
            repo_tags: record.repo_tags.clone(),
            repo_digests: record.repo_digests.clone(),
            size: layers.iter().map(|layer| layer.bytes).sum(),
            config,
            layers: layers.into_iter().map(|layer| layer.key.clone()).collect(),
            pinned: pinned || record.pinned,
        })
    }
}

fn read_dir(path: &Path) -> Result<Vec<PathBuf>, ImageError> {
    fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
        .map_err(ImageError::io("read folder", path))
}

fn remove_all(path: &Path) -> Result<(), ImageError> {
    remove_tree(path).map_err(ImageError::io("remove leftover", path))
}
