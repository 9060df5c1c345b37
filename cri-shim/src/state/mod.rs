//! What the shim keeps on disk: one directory per sandbox and per container, each with an
//! immutable record; starts and exits are recorded beside it by the monitor.
//!
//! Records are versioned JSON; the CRI config inside is the protocol's own encoding, which every
//! version of the schema can read. Fields are only ever added, with a default; a version that an
//! older shim must not touch gets a new number. A malformed record is set aside as `<name>.bad`,
//! and stays known as unreadable; one of a newer version stays as it is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::api;
use crate::crash::point;
use crate::monitor::record;

pub mod durability;

/// The version of the records written here.
const VERSION: u32 = 1;

const SANDBOX: &str = "sandbox.json";
const CONTAINER: &str = "container.json";

/// What is in the directory of a sandbox or container.
pub enum Found<R, C> {
    Record(Box<R>, C),
    /// None was written yet, or it has been removed: the rest is a leftover.
    Nothing,
    Unreadable(RecordError),
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("reading the record {path} failed: {source}")]
    Io { path: PathBuf, source: io::Error },
    /// Found by an earlier start.
    #[error("the record {path} was malformed and set aside")]
    SetAside { path: PathBuf },
    #[error(
        "the record {path} is of version {version}, this program knows {VERSION}; run the newer \
         version again, or remove its pods first"
    )]
    Newer { path: PathBuf, version: u32 },
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Layout {
    pub state: PathBuf,
    pub run: PathBuf,
}

impl Layout {
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.sandboxes().join(id)
    }

    pub fn containers(&self) -> PathBuf {
        self.state.join("containers")
    }

    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    /// What lives as long as a container's processes. Short, as sockets below it must fit the
    /// 107 bytes of a socket's path.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.run.join("c").join(&id[..id.len().min(24)])
    }

    /// The socket of a sandbox's monitor.
    pub fn monitor(&self, id: &str) -> PathBuf {
        self.run.join("m").join(&id[..id.len().min(24)])
    }

    pub fn netns(&self, id: &str) -> PathBuf {
        self.run.join("netns").join(id)
    }

    /// Where a sandbox's user namespace is pinned.
    pub fn userns(&self, id: &str) -> PathBuf {
        self.run.join("userns").join(id)
    }

    /// A private mount: what is mounted below it does not propagate to other namespaces.
    pub fn mounts(&self) -> PathBuf {
        self.run.join("mnt")
    }

    /// The mount point of root file systems, in the containers' own mount namespaces.
    pub fn rootfs(&self) -> PathBuf {
        self.mounts().join("rootfs")
    }

    /// Below it the mount points of image volumes, in the containers' own mount namespaces.
    pub fn image_volumes(&self) -> PathBuf {
        self.mounts().join("images")
    }

    /// The sandbox's `/dev/shm`.
    pub fn shm(&self, id: &str) -> PathBuf {
        self.mounts().join("shm").join(id)
    }

    /// Makes the fixed directories.
    pub fn create(&self) -> Result<(), (PathBuf, io::Error)> {
        let fixed = [
            self.sandboxes(),
            self.containers(),
            self.run.join("c"),
            self.run.join("m"),
            self.run.join("netns"),
            self.mounts(),
        ];
        for directory in fixed {
            fs::create_dir_all(&directory).map_err(|e| (directory, e))?;
        }
        Ok(())
    }
}

/// A sandbox on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    version: u32,
    pub id: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// The boot it was made in; after another one nothing of it runs.
    pub boot_id: String,
    pub runtime_handler: String,
    pub ips: Vec<String>,
    /// What the network gave, as `crictl inspectp` shows it.
    #[serde(default)]
    pub network: serde_json::Value,
    /// The SELinux label of its containers' processes, unless they ask for another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selinux_label: Option<String>,
    /// Stopped for good.
    pub stopped: bool,
    /// The cgroup its containers are in.
    pub cgroup: PathBuf,
    /// The cgroup was made by the shim and goes with the sandbox.
    pub own_cgroup: bool,
    config: String,
}

/// A container on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerRecord {
    version: u32,
    pub id: String,
    pub sandbox: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    pub image_id: String,
    pub stop_signal: i32,
    pub cgroup: PathBuf,
    pub log_path: Option<PathBuf>,
    config: String,
}

impl SandboxRecord {
    /// A new record of the sandbox's config.
    pub fn new(id: &str, config: &api::PodSandboxConfig) -> Self {
        SandboxRecord {
            version: VERSION,
            id: id.to_owned(),
            created_at: record::now(),
            boot_id: String::new(),
            runtime_handler: String::new(),
            ips: Vec::new(),
            network: serde_json::Value::Null,
            selinux_label: None,
            stopped: false,
            cgroup: PathBuf::new(),
            own_cgroup: false,
            config: STANDARD.encode(config.encode_to_vec()),
        }
    }

    pub fn config(&self) -> io::Result<api::PodSandboxConfig> {
        decode(&self.config)
    }

    /// Replaces the config, as `UpdatePodSandboxResources` does.
    pub fn set_config(&mut self, config: &api::PodSandboxConfig) {
        self.config = STANDARD.encode(config.encode_to_vec());
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        record::write(directory, SANDBOX, self)
    }

    pub fn find(directory: &Path) -> Found<Self, api::PodSandboxConfig> {
        find(directory, SANDBOX, Self::config)
    }
}

impl ContainerRecord {
    /// A new record of the container's config.
    pub fn new(id: &str, sandbox: &str, config: &api::ContainerConfig) -> Self {
        ContainerRecord {
            version: VERSION,
            id: id.to_owned(),
            sandbox: sandbox.to_owned(),
            created_at: record::now(),
            image_id: String::new(),
            stop_signal: libc::SIGTERM,
            cgroup: PathBuf::new(),
            log_path: None,
            config: STANDARD.encode(config.encode_to_vec()),
        }
    }

    pub fn config(&self) -> io::Result<api::ContainerConfig> {
        decode(&self.config)
    }

    /// Replaces the config, as `UpdateContainerResources` does.
    pub fn set_config(&mut self, config: &api::ContainerConfig) {
        self.config = STANDARD.encode(config.encode_to_vec());
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        record::write(directory, CONTAINER, self)
    }

    pub fn find(directory: &Path) -> Found<Self, api::ContainerConfig> {
        find(directory, CONTAINER, Self::config)
    }
}

fn find<R: serde::de::DeserializeOwned, C>(
    directory: &Path,
    name: &str,
    config: impl FnOnce(&R) -> io::Result<C>,
) -> Found<R, C> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let path = directory.join(name);
    let io = |source| Found::Unreadable(RecordError::Io { path: path.clone(), source });
    // The version first: what a newer one says of the rest is its own affair.
    match fs::read(&path).map(|bytes| serde_json::from_slice::<Version>(&bytes)) {
        Ok(Ok(Version { version })) if version > VERSION => {
            return Found::Unreadable(RecordError::Newer { path, version });
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let bad = directory.join(format!("{name}.bad"));
            return if bad.exists() {
                Found::Unreadable(RecordError::SetAside { path: bad })
            } else {
                Found::Nothing
            };
        }
        _ => {}
    }
    match record::read::<R>(directory, name) {
        Ok(Some(record)) => match config(&record) {
            Ok(config) => Found::Record(Box::new(record), config),
            Err(error) => io(record::set_aside(directory, name, &error)),
        },
        Ok(None) => Found::Nothing,
        Err(error) => io(error),
    }
}

/// Keeps a record that nobody can read for whoever wants to know, before its directory goes.
pub fn keep_unreadable(layout: &Layout, directory: &Path, id: &str) {
    let kept = layout.state.join("unreadable");
    let _ = fs::create_dir_all(&kept);
    for name in [SANDBOX, CONTAINER] {
        for name in [name.to_owned(), format!("{name}.bad")] {
            let _ = fs::rename(directory.join(&name), kept.join(format!("{id}-{name}")));
        }
    }
}

fn decode<M: Message + Default>(text: &str) -> io::Result<M> {
    let invalid = |e: String| io::Error::new(io::ErrorKind::InvalidData, e);
    let bytes = STANDARD.decode(text).map_err(|e| invalid(e.to_string()))?;
    M::decode(bytes.as_slice()).map_err(|e| invalid(e.to_string()))
}

/// Removes a directory: first its record, so that a removal that is interrupted is recognised by
/// what it left, then the rest. Nothing there is a success.
pub fn remove_directory(directory: &Path) -> io::Result<()> {
    for name in [SANDBOX, CONTAINER] {
        ignore_absent(fs::remove_file(directory.join(name)))?;
    }
    point("state: record removed");
    ignore_absent(fs::remove_dir_all(directory))
}

/// An absent file is as good as a removed one.
pub fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The names in a directory.
pub fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

/// The kernel's identifier of this boot.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A new identifier: 64 hexadecimal digits, as log collectors expect of container ids.
pub fn new_id() -> String {
    (0..4).map(|_| format!("{:016x}", fastrand::u64(..))).collect()
}
