//! The folder of network configurations, read again when something in it changes.
//!
//! What changed is seen by the files' stamps whenever the network is asked for: a watch would be one
//! more thing that can be lost, and a look costs a few microseconds.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::config::{File, NetworkList};
use crate::network::NetworkError;

/// The largest file that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// A file that could not be used.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Problem {
    pub(crate) path: PathBuf,
    pub(crate) reason: String,
}

impl Problem {
    fn new(path: &Path, reason: impl ToString) -> Self {
        Self { path: path.to_owned(), reason: reason.to_string() }
    }

    fn error(&self) -> NetworkError {
        NetworkError::CniConfig { path: self.path.clone(), reason: self.reason.clone() }
    }
}

/// What the folder held at the last look.
#[derive(Debug, Clone, Default)]
pub(crate) struct Loaded {
    /// The network and its file; none when there is no configuration.
    pub(crate) network: Option<(PathBuf, Arc<NetworkList>)>,
    /// What could not be used.
    pub(crate) problems: Vec<Problem>,
    /// Counts the changes of the network.
    pub(crate) generation: u64,
}

pub(crate) struct Folder {
    path: PathBuf,
    last: Mutex<Option<(Vec<Stamp>, Loaded)>>,
}

/// By what a change of a file is seen.
type Stamp = (PathBuf, u64, u64, (i64, i64), (i64, i64));

impl Folder {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, last: Mutex::new(None) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the folder holds now.
    pub(crate) fn load(&self) -> Loaded {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let files = match list(&self.path, &["conf", "conflist", "json"]) {
            Ok(files) => files,
            Err(error) => {
                let mut loaded = last.take().map(|(_, loaded)| loaded).unwrap_or_default();
                loaded.problems = vec![Problem::new(&self.path, error)];
                return loaded;
            }
        };
        // Taken before the files are read: what changes meanwhile is read again the next time.
        let stamps = stamps(&self.path, &files);
        if let Some((known, loaded)) = last.as_ref()
            && *known == stamps
        {
            return loaded.clone();
        }
        let before = last.take().map(|(_, loaded)| loaded).unwrap_or_default();
        let loaded = choose(&files, before);
        *last = Some((stamps, loaded.clone()));
        loaded
    }

    /// The network pods are connected to; none when there is no configuration.
    ///
    /// # Errors
    /// [`NetworkError::CniConfig`] when there are configurations, but none can be used.
    pub(crate) fn network(&self) -> Result<Option<Arc<NetworkList>>, NetworkError> {
        let loaded = self.load();
        match (loaded.network, loaded.problems.first()) {
            (Some((_, network)), _) => Ok(Some(network)),
            (None, Some(problem)) => Err(problem.error()),
            (None, None) => Ok(None),
        }
    }
}

/// The first file, by name, that can be used. While the file in use is broken, such as in the
/// middle of an edit, what it said before stays: going over to the next file would put pods on
/// another network for that moment.
fn choose(files: &[PathBuf], before: Loaded) -> Loaded {
    let mut problems = Vec::new();
    let mut network = None;
    for path in files {
        match read(path) {
            Ok(read) => {
                network = Some((path.clone(), Arc::new(read)));
                break;
            }
            Err(problem) => {
                let kept = before.network.as_ref().filter(|(used, _)| used == path);
                if !before.problems.contains(&problem) {
                    tracing::warn!(path = %problem.path.display(), reason = problem.reason,
                        kept = kept.is_some(), "CNI configuration cannot be used");
                }
                problems.push(problem);
                if let Some(kept) = kept {
                    network = Some(kept.clone());
                    break;
                }
            }
        }
    }
    let name = |network: &Option<(PathBuf, Arc<NetworkList>)>| {
        network.as_ref().map(|(path, network)| (path.clone(), network.name.clone()))
    };
    let same = network == before.network;
    if name(&network) != name(&before.network) {
        match &network {
            Some((path, network)) => tracing::info!(path = %path.display(),
                network = network.name, "pods are connected by CNI"),
            None => tracing::info!("no CNI configuration is there any more"),
        }
    }
    Loaded { network, problems, generation: before.generation + u64::from(!same) }
}

fn read(path: &Path) -> Result<NetworkList, Problem> {
    let text = |path: &Path| read_text(path).map_err(|error| Problem::new(path, error));
    let file = File::parse(&text(path)?).map_err(|reason| Problem::new(path, reason))?;
    let mut further = Vec::new();
    if let (Some(folder), Some(parent)) = (file.folder(), path.parent()) {
        let folder = parent.join(folder);
        for plugin in list(&folder, &["conf"]).map_err(|error| Problem::new(&folder, error))? {
            further.push((plugin.clone(), text(&plugin)?));
        }
    }
    let further: Vec<_> =
        further.iter().map(|(path, text)| (path.as_path(), text.clone())).collect();
    file.finish(&further).map_err(|reason| Problem::new(path, reason))
}

fn read_text(path: &Path) -> io::Result<String> {
    let size = fs::metadata(path)?.len();
    if size > LARGEST {
        return Err(io::Error::other(format!("it has {size} bytes, more than {LARGEST}")));
    }
    fs::read_to_string(path)
}

/// The files of a folder with one of the extensions, by name. A folder that is not there is empty.
fn list(folder: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            extension.is_some_and(|e| extensions.contains(&e)) && !path.is_dir()
        })
        .collect();
    paths.sort();
    Ok(paths)
}

/// Stamps of the files, and of what is in folders beside them, one of which may belong to a list.
fn stamps(folder: &Path, files: &[PathBuf]) -> Vec<Stamp> {
    let folders = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut inner: Vec<PathBuf> = folders
        .filter(|path| path.is_dir())
        .flat_map(|path| list(&path, &["conf"]).unwrap_or_default())
        .collect();
    inner.sort();
    files
        .iter()
        .chain(&inner)
        .filter_map(|path| {
            let meta = fs::metadata(path).ok()?;
            let modified = (meta.mtime(), meta.mtime_nsec());
            Some((
                path.clone(),
                meta.ino(),
                meta.size(),
                modified,
                (meta.ctime(), meta.ctime_nsec()),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conflist(name: &str) -> String {
        format!(r#"{{"cniVersion":"1.1.0","name":"{name}","plugins":[{{"type":"a"}}]}}"#)
    }

    fn name(folder: &Folder) -> Option<String> {
        folder.network().unwrap().map(|network| network.name.clone())
    }

    #[test]
    fn the_first_usable_file_counts_and_changes_are_seen() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::new(place.path().join("net.d"));
        assert_eq!(name(&folder), None);
        fs::create_dir(folder.path()).unwrap();
        let put = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        put("20-b.conflist", &conflist("b"));
        put("README", "{");
        fs::create_dir(folder.path().join("05-folder.conf")).unwrap();
        assert_eq!(name(&folder).as_deref(), Some("b"));
        put("10-a.conflist", "{");
        assert_eq!(name(&folder).as_deref(), Some("b"), "a broken one is left out");
        let problems = folder.load().problems;
        assert!(problems[0].path.ends_with("10-a.conflist"), "{problems:?}");
        put("10-a.conflist", &conflist("a"));
        assert_eq!(name(&folder).as_deref(), Some("a"));
        let generation = folder.load().generation;
        put("10-a.conflist", "{\"name\"");
        assert_eq!(name(&folder).as_deref(), Some("a"), "what was in use stays");
        assert_eq!(folder.load().generation, generation);
        assert_eq!(folder.load().problems.len(), 1);
        fs::remove_file(folder.path().join("10-a.conflist")).unwrap();
        assert_eq!(name(&folder).as_deref(), Some("b"));
        assert!(folder.load().problems.is_empty() && folder.load().generation > generation);
        fs::remove_file(folder.path().join("20-b.conflist")).unwrap();
        assert_eq!(name(&folder), None);
    }

    #[test]
    fn nothing_usable_names_the_file_and_the_cause() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::new(place.path().to_owned());
        fs::write(place.path().join("10.conf"), "{").unwrap();
        fs::write(place.path().join("20.conf"), "[]").unwrap();
        let error = folder.network().unwrap_err().to_string();
        assert!(error.contains("10.conf") && error.contains("EOF"), "{error}");
        fs::write(place.path().join("10.conf"), " ".repeat(2 << 20)).unwrap();
        assert!(folder.network().unwrap_err().to_string().contains("bytes"));
    }

    #[test]
    fn a_lists_folder_is_part_of_it() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::new(place.path().to_owned());
        fs::write(place.path().join("10.conflist"), r#"{"cniVersion":"1.1.0","name":"n"}"#)
            .unwrap();
        assert!(folder.network().unwrap_err().to_string().contains("no plugins"));
        fs::create_dir(place.path().join("n")).unwrap();
        fs::write(place.path().join("n/20.conf"), r#"{"type":"b"}"#).unwrap();
        fs::write(place.path().join("n/10.conf"), r#"{"type":"a"}"#).unwrap();
        let kinds: Vec<_> = folder
            .network()
            .unwrap()
            .unwrap()
            .plugins
            .iter()
            .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(kinds, ["a", "b"]);
        fs::remove_file(place.path().join("n/10.conf")).unwrap();
        assert_eq!(folder.network().unwrap().unwrap().plugins.len(), 1);
        fs::write(place.path().join("n/30.conf"), "{").unwrap();
        assert!(folder.load().problems[0].reason.contains("n/30.conf"));
    }
}
