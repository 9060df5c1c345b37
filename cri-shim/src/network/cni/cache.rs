//! Results of ADD where upstream's library keeps them (`/var/lib/cni/results`).
//!
//! The shim's own records are what it goes by: they are there before the first plugin runs, which
//! the library's files are not, so only they can undo an ADD that a crash cut off. The files are
//! written beside them for those who know only these: `cnitool`, plugins that list attachments, and
//! the garbage collection of another runtime on the machine. They are read for that last reason too,
//! so that our own collection spares what another runtime attached to the same network.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::result::INTERFACE;
use crate::network::{netns, records::remove_unfinished};

const KIND: &str = "cniCacheV1";
/// How names of files begin that are being written; the folder is shared.
const UNFINISHED: &str = ".longshore-";

/// The library's folder.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    folder: PathBuf,
}

/// An attachment to write down.
pub(crate) struct Entry<'a> {
    pub(crate) network: &'a str,
    pub(crate) container: &'a str,
    pub(crate) netns: &'a Path,
    pub(crate) config: &'a str,
    /// `CNI_ARGS`
    pub(crate) arguments: &'a str,
    pub(crate) capabilities: &'a Map<String, Value>,
    pub(crate) result: &'a Value,
}

impl Cache {
    /// The cache beneath `folder`, such as `/var/lib/cni`.
    pub(crate) fn new(folder: &Path) -> Self {
        let folder = folder.join("results");
        remove_unfinished(&folder, UNFINISHED);
        Self { folder }
    }

    /// Writes an attachment down. That it cannot is not the pod's to fail by.
    pub(crate) fn put(&self, entry: &Entry<'_>) {
        let path = self.path(entry.network, entry.container);
        if let Err(error) = self.write(&path, entry) {
            tracing::warn!(path = %path.display(), %error, "cannot write the CNI library's record");
        }
    }

    fn write(&self, path: &Path, entry: &Entry<'_>) -> io::Result<()> {
        let arguments: Vec<_> =
            entry.arguments.split(';').filter_map(|pair| pair.split_once('=')).collect();
        let value = json!({
            "kind": KIND,
            "containerId": entry.container,
            "config": STANDARD.encode(entry.config),
            "ifName": INTERFACE,
            "networkName": entry.network,
            "netns": entry.netns,
            "cniArgs": arguments,
            "capabilityArgs": entry.capabilities,
            "result": entry.result,
        });
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .permissions(fs::Permissions::from_mode(0o600))
            .tempfile_in(&self.folder)?;
        io::Write::write_all(&mut file, &serde_json::to_vec(&value)?)?;
        file.persist(path)?;
        Ok(())
    }

    pub(crate) fn remove(&self, network: &str, container: &str) {
        let path = self.path(network, container);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "cannot remove the CNI library's record");
            }
            _ => {}
        }
    }

    /// Attachments to `network` whose network namespace lives, as container and interface.
    pub(crate) fn living(&self, network: &str) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let value = fs::read(entry.path())
                .ok()
                .and_then(|text| serde_json::from_slice::<Value>(&text).ok())
                .unwrap_or_default();
            let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
            if text("kind") == KIND
                && text("networkName") == network
                && netns::exists(Path::new(text("netns")))
            {
                found.push((text("containerId").to_owned(), text("ifName").to_owned()));
            }
        }
        found.sort();
        found
    }

    fn path(&self, network: &str, container: &str) -> PathBuf {
        self.folder.join(format!("{network}-{container}-{INTERFACE}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_written_as_the_library_reads_it() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::new(place.path());
        let own = Path::new("/proc/self/ns/net");
        let capabilities = Map::from_iter([("mac".to_owned(), json!("m"))]);
        let mut entry = Entry {
            network: "n",
            container: "c",
            netns: own,
            config: "{}",
            arguments: "IgnoreUnknown=1",
            capabilities: &capabilities,
            result: &json!({"cniVersion": "1.0.0"}),
        };
        cache.put(&entry);
        let path = place.path().join("results/n-c-eth0");
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            value,
            json!({"kind": "cniCacheV1", "containerId": "c", "config": "e30=", "ifName": "eth0",
                "networkName": "n", "netns": own, "cniArgs": [["IgnoreUnknown", "1"]],
                "capabilityArgs": {"mac": "m"}, "result": {"cniVersion": "1.0.0"}})
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        (entry.container, entry.netns) = ("dead", Path::new("/nowhere"));
        cache.put(&entry);
        fs::write(place.path().join("results/torn"), "{").unwrap();
        assert_eq!(cache.living("n"), [("c".to_owned(), "eth0".to_owned())]);
        assert!(cache.living("m").is_empty());
        cache.remove("n", "c");
        cache.remove("n", "c");
        assert!(!path.exists());
    }
}
