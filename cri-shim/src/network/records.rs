//! What is known of each connected sandbox, on disk: one small file each, so that a crash at any
//! point leaves something to tear down by.
//!
//! Files are replaced whole but not synced: after a power cut there are no sandboxes either, and
//! syncing would cost more than all the rest of a setup.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{NetworkError, PortMapping, SandboxNetwork, bandwidth::Bandwidth, cni::Attachment};

const VERSION: u32 = 1;
/// How names of files begin that are being written.
const UNFINISHED: &str = ".new";

/// A connected sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    pub(crate) id: String,
    pub(crate) netns: PathBuf,
    /// namespace/name, for messages.
    pub(crate) pod: String,
    pub(crate) uid: String,
    pub(crate) ips: Vec<IpAddr>,
    /// Whether everything was set up; a record without it is torn down and made again.
    pub(crate) ready: bool,
    pub(crate) kind: Kind,
}

/// By whom a sandbox was connected.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Bridge {
        veth: String,
        ports: Vec<PortMapping>,
        #[serde(default, skip_serializing_if = "Bandwidth::is_none")]
        bandwidth: Bandwidth,
    },
    Cni(Box<Attachment>),
}

impl Record {
    pub(crate) fn new(sandbox: &SandboxNetwork, ips: Vec<IpAddr>, kind: Kind) -> Self {
        Self {
            version: VERSION,
            id: sandbox.id.clone(),
            netns: sandbox.netns.clone(),
            pod: format!("{}/{}", sandbox.namespace, sandbox.name),
            uid: sandbox.uid.clone(),
            ips,
            ready: false,
            kind,
        }
    }

    pub(crate) fn ports(&self) -> &[PortMapping] {
        match &self.kind {
            Kind::Bridge { ports, .. } => ports,
            Kind::Cni(_) => &[],
        }
    }
}

/// The records' folder.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    folder: PathBuf,
}

impl Records {
    /// Opens the folder and reads all records. Unreadable ones are set aside.
    pub(crate) fn open(state: &Path) -> Result<(Self, BTreeMap<String, Record>), NetworkError> {
        let folder = state.join("sandboxes");
        let fail = NetworkError::io("open network state", folder.display());
        fs::create_dir_all(&folder).map_err(fail)?;
        for place in [state, &folder] {
            remove_unfinished(place, UNFINISHED);
        }
        let mut records = BTreeMap::new();
        let entries = fs::read_dir(&folder)
            .map_err(NetworkError::io("read network state", folder.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            if let Some(record) = read::<Record>(&path).filter(|r| r.version == VERSION) {
                records.insert(record.id.clone(), record);
            } else {
                set_aside(&path);
            }
        }
        Ok((Self { folder }, records))
    }

    pub(crate) fn put(&self, record: &Record) -> Result<(), NetworkError> {
        write(&self.path(&record.id), record)
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), NetworkError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(NetworkError::io("remove", path.display())(error))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}

/// Reads a JSON file, if it is there and whole.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Replaces a JSON file.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), NetworkError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(NetworkError::io("write", path.display()))
}

/// Removes what a crash left of files that were being written.
pub(crate) fn remove_unfinished(folder: &Path, prefix: &str) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove what a crash left");
        }
    }
}

fn set_aside(path: &Path) {
    let aside = path.with_extension("unreadable");
    tracing::error!(path = %path.display(), aside = %aside.display(),
        "network record is unreadable and was set aside");
    if let Err(error) = fs::rename(path, &aside) {
        tracing::error!(path = %path.display(), %error, "cannot set aside");
    }
}

/// Whether an id can be a file's name.
pub(crate) fn check_id(id: &str) -> Result<(), NetworkError> {
    let plain = !id.is_empty()
        && id.len() <= 128
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if plain {
        Ok(())
    } else {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "not a sandbox id");
        Err(NetworkError::io("connect sandbox", id)(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crash_left_unfinished_is_removed_and_the_unreadable_set_aside() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("sandboxes");
        fs::create_dir_all(&folder).unwrap();
        for path in [state.path().join(".newAbC"), folder.join(".newDeF"), folder.join("a.json")] {
            fs::write(path, "{").unwrap();
        }
        let (records, known) = Records::open(state.path()).unwrap();
        assert!(known.is_empty());
        let names = |folder: &Path| -> Vec<_> {
            let entries = fs::read_dir(folder).unwrap().flatten();
            entries.map(|e| e.file_name().into_string().unwrap()).collect()
        };
        assert_eq!(names(state.path()), ["sandboxes"]);
        assert_eq!(names(&folder), ["a.unreadable"]);
        let sandbox = SandboxNetwork { id: "b".to_owned(), ..SandboxNetwork::default() };
        let kind =
            Kind::Bridge { veth: "v".to_owned(), ports: vec![], bandwidth: Bandwidth::default() };
        records.put(&Record::new(&sandbox, vec![], kind)).unwrap();
        assert_eq!(Records::open(state.path()).unwrap().1.len(), 1);
        records.remove("b").unwrap();
        records.remove("b").unwrap();
        assert!(Records::open(state.path()).unwrap().1.is_empty());
    }
}
