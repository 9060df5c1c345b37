//! What joining leaves on disk, each file written whole (temporary file, fsync, rename).

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {cause}", path.display())]
pub struct FileError {
    /// `write`, `read`, `create`, ...
    pub what: &'static str,
    /// Which file.
    pub path: PathBuf,
    /// Why.
    pub cause: std::io::Error,
}

/// Where things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// `/etc/kubernetes`.
    pub kubernetes_dir: PathBuf,
    /// `/var/lib/kubelet`.
    pub root_dir: PathBuf,
}

impl Paths {
    /// The node's kubeconfig.
    pub fn kubelet_conf(&self) -> PathBuf {
        self.kubernetes_dir.join("kubelet.conf")
    }

    /// The kubeconfig with the bootstrap token.
    pub fn bootstrap_conf(&self) -> PathBuf {
        self.kubernetes_dir.join("bootstrap-kubelet.conf")
    }

    /// The cluster's CA, for clients of the node API.
    pub fn ca(&self) -> PathBuf {
        self.kubernetes_dir.join("pki/ca.crt")
    }

    /// What `longshore run` takes from `longshore join`.
    pub fn node_file(&self) -> PathBuf {
        self.kubernetes_dir.join("longshore-node.json")
    }

    /// Client certificates.
    pub fn cert_dir(&self) -> PathBuf {
        self.root_dir.join("pki")
    }

    /// The cluster's KubeletConfiguration.
    pub fn kubelet_config(&self) -> PathBuf {
        self.root_dir.join("config.yaml")
    }

    /// What holds here of the cluster's KubeProxyConfiguration.
    pub fn proxy_config(&self) -> PathBuf {
        self.root_dir.join("kube-proxy-config.yaml")
    }
}

/// Link to the client certificate in use, in the certificate folder.
pub const CURRENT: &str = "kubelet-client-current.pem";
/// Key of a request that is not answered yet.
pub const PENDING_KEY: &str = "kubelet-client.key.tmp";

/// What was said to `longshore join` and holds for every `longshore run` after it, unless a flag
/// says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeFile {
    /// Version of this file; 1.
    pub version: u32,
    /// `--node-name`.
    pub node_name: String,
    /// `--node-ip`.
    #[serde(default)]
    pub node_ips: Vec<IpAddr>,
    /// `--root-dir`.
    pub root_dir: PathBuf,
    /// `--container-runtime-endpoint`, if one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_runtime_endpoint: Option<String>,
    /// Kubelet's flags (`--name=value`): `kubeletExtraArgs`, or an adopted kubelet's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kubelet_flags: Vec<String>,
}

impl NodeFile {
    /// Reads the file in `kubernetes_dir`; `None` if there is none.
    pub fn load(kubernetes_dir: &Path) -> Result<Option<Self>, FileError> {
        let paths = Paths { kubernetes_dir: kubernetes_dir.to_owned(), root_dir: PathBuf::new() };
        let path = paths.node_file();
        let error = |cause| FileError { what: "read", path: path.clone(), cause };
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| error(e.into())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(error(e)),
        }
    }
}

/// Writes `content` to `path` with `mode`; its folder is made if need be. Either the old or the new
/// content is there, whatever happens meanwhile.
pub fn write_atomic(path: &Path, mode: u32, content: &[u8]) -> Result<(), FileError> {
    let mut staged = Staged::default();
    staged.add(path, mode, content)?;
    staged.commit()
}

/// Files that are all written, under other names, before any of them takes its place: a disk that is
/// full leaves nothing behind.
#[derive(Default)]
pub struct Staged {
    /// Temporary name, and the one to take.
    waiting: Vec<(PathBuf, PathBuf)>,
}

impl Staged {
    /// Writes `content` beside `path`; the folder is made if need be.
    pub fn add(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<(), FileError> {
        let error = |what, path: &Path, cause| FileError { what, path: path.to_owned(), cause };
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir).map_err(|e| error("create", dir, e))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = dir.join(format!(".{name}.{}.tmp", std::process::id()));
        let _ = fs::remove_file(&temporary);
        self.waiting.push((temporary.clone(), path.to_owned()));
        let write = || {
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|e| error("write", path, e))
    }

    /// Puts all in their places, in the order in which they were added.
    pub fn commit(mut self) -> Result<(), FileError> {
        for (temporary, path) in &self.waiting {
            let dir = path.parent().unwrap_or(Path::new("/"));
            fs::rename(temporary, path)
                .and_then(|()| fs::File::open(dir)?.sync_all())
                .map_err(|cause| FileError { what: "write", path: path.clone(), cause })?;
        }
        self.waiting.clear();
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        for (temporary, _) in &self.waiting {
            // Not there where it has taken its place.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Puts the client certificate's chain and key into a file of their own in `dir` and points the link
/// at it. `stamp` (date and time) makes the name.
pub fn store_certificate(
    dir: &Path,
    chain_pem: &[u8],
    key_pem: &str,
    stamp: &str,
) -> Result<PathBuf, FileError> {
    let current = store_pair(dir, "kubelet-client", chain_pem, key_pem, stamp)?;
    let _ = fs::remove_file(dir.join(PENDING_KEY));
    Ok(current)
}

/// Puts chain and key into `<stem>-<stamp>.pem` in `dir` and points `<stem>-current.pem` at it.
pub fn store_pair(
    dir: &Path,
    stem: &str,
    chain_pem: &[u8],
    key_pem: &str,
    stamp: &str,
) -> Result<PathBuf, FileError> {
    let file = dir.join(format!("{stem}-{stamp}.pem"));
    write_atomic(&file, 0o600, &pair(chain_pem, key_pem))?;
    link_current(dir, stem, &file)
}

/// Chain and key in one text.
pub fn pair(chain_pem: &[u8], key_pem: &str) -> Vec<u8> {
    let mut content = chain_pem.to_vec();
    if !content.ends_with(b"\n") {
        content.push(b'\n');
    }
    content.extend_from_slice(key_pem.as_bytes());
    content
}

/// Points `<stem>-current.pem` in `dir` at `file`; returns the link.
pub fn link_current(dir: &Path, stem: &str, file: &Path) -> Result<PathBuf, FileError> {
    let name = format!("{stem}-current.pem");
    let current = dir.join(&name);
    let temporary = dir.join(format!(".{name}.{}.tmp", std::process::id()));
    let link = || {
        let _ = fs::remove_file(&temporary);
        symlink(file, &temporary)?;
        fs::rename(&temporary, &current)?;
        fs::File::open(dir)?.sync_all()
    };
    link().map_err(|cause| FileError { what: "link", path: current.clone(), cause })?;
    forget_old(dir, stem, file);
    Ok(current)
}

/// Removes pairs of before the last one: with certificates that live for minutes they would fill the
/// disk. What cannot be removed stays.
fn forget_old(dir: &Path, stem: &str, current: &Path) {
    let pair = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stamp = name.strip_prefix(stem).and_then(|n| n.strip_prefix('-')?.strip_suffix(".pem"));
        path != current && stamp.is_some_and(|s| s.starts_with(|c: char| c.is_ascii_digit()))
    };
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut old: Vec<PathBuf> = entries.map(|e| e.path()).filter(pair).collect();
    // Their names begin with the time.
    old.sort();
    old.pop();
    for path in old {
        let _ = fs::remove_file(path);
    }
}

/// The time in `pem` file names: `2006-01-02-15-04-05`.
pub fn stamp(now: jiff::Timestamp) -> String {
    now.strftime("%Y-%m-%d-%H-%M-%S").to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn certificates_are_private_and_the_link_follows() {
        let dir = tempfile::tempdir().unwrap();
        let pki = dir.path().join("pki");
        write_atomic(&pki.join(PENDING_KEY), 0o600, b"K").unwrap();
        store_certificate(&pki, b"CERT1", "KEY1", "1").unwrap();
        store_certificate(&pki, b"CERT2", "KEY2", "2").unwrap();
        let current = store_certificate(&pki, b"CERT3\n", "KEY3", "3").unwrap();
        assert_eq!(fs::read(&current).unwrap(), b"CERT3\nKEY3");
        assert_eq!(fs::metadata(&current).unwrap().permissions().mode() & 0o777, 0o600);
        let mut left: Vec<_> = fs::read_dir(&pki)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        // One before the one in use, and no more.
        assert_eq!(left, ["kubelet-client-2.pem", "kubelet-client-3.pem", CURRENT]);
    }

    #[test]
    fn the_node_file_reads_back_and_names_what_it_does_not_know() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(NodeFile::load(dir.path()).unwrap(), None);
        let file = NodeFile {
            version: 1,
            node_name: "n".to_owned(),
            node_ips: vec!["10.0.0.1".parse().unwrap()],
            root_dir: "/var/lib/kubelet".into(),
            container_runtime_endpoint: None,
            kubelet_flags: vec!["--node-labels=a=b".to_owned()],
        };
        let path = dir.path().join("longshore-node.json");
        write_atomic(&path, 0o644, &serde_json::to_vec(&file).unwrap()).unwrap();
        assert_eq!(NodeFile::load(dir.path()).unwrap(), Some(file));
        fs::write(&path, r#"{"version":1,"nodeName":"n","rootDir":"/","more":1}"#).unwrap();
        assert!(NodeFile::load(dir.path()).unwrap_err().to_string().contains("more"));
    }

    #[test]
    fn what_cannot_be_staged_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let mut staged = Staged::default();
        staged.add(&dir.path().join("a"), 0o600, b"1").unwrap();
        assert!(staged.add(&dir.path().join("file/b"), 0o600, b"2").is_err());
        drop(staged);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_in_the_way_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        let error = write_atomic(&dir.path().join("x"), 0o600, b"").unwrap_err().to_string();
        assert!(error.contains("/x"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
