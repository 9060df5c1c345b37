//! The devices of all files, and which file wins: pure.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use super::document::{Document, DocumentError};
use super::{CdiError, Edits, Name};

/// A file as it was found.
#[derive(Clone, Debug)]
pub struct File {
    pub path: PathBuf,
    /// Its folder's place in the list: devices of later folders replace those of earlier ones.
    pub priority: usize,
    pub document: Result<Document, DocumentError>,
}

#[derive(Clone, Copy)]
enum Entry {
    /// File and device by their places.
    At(usize, usize),
    /// The files that both have it.
    Conflict(usize, usize),
}

/// All devices of a node.
pub struct Registry {
    directories: Vec<PathBuf>,
    files: Vec<File>,
    devices: BTreeMap<Name, Entry>,
}

impl Registry {
    /// Sorts out which file has which device. Unusable files count only as a hint in errors: one
    /// vendor's mistake is not another's.
    pub fn new(directories: Vec<PathBuf>, files: Vec<File>) -> Self {
        let mut devices = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            let names = file.document.as_ref().ok().and_then(|d| d.names().ok());
            for (device, name) in names.unwrap_or_default().into_iter().enumerate() {
                let here = Entry::At(at, device);
                devices
                    .entry(name)
                    .and_modify(|entry| {
                        let (Entry::At(other, _) | Entry::Conflict(other, _)) = *entry;
                        match file.priority.cmp(&files[other].priority) {
                            std::cmp::Ordering::Greater => *entry = here,
                            std::cmp::Ordering::Equal => *entry = Entry::Conflict(other, at),
                            std::cmp::Ordering::Less => {}
                        }
                    })
                    .or_insert(here);
            }
        }
        Registry { directories, files, devices }
    }

    /// What changes in a container that gets these devices: for each, what its file says for all
    /// its devices (once a file), then what it says for this one.
    ///
    /// # Errors
    /// [`CdiError::Unknown`] and [`CdiError::Conflict`], with the first device that cannot be had.
    pub fn resolve(&self, names: &[Name]) -> Result<Edits, CdiError> {
        let mut edits = Edits::default();
        let mut seen = HashSet::new();
        for name in names {
            let (at, device) = match self.devices.get(name) {
                Some(Entry::At(file, device)) => (*file, *device),
                Some(Entry::Conflict(first, second)) => {
                    return Err(CdiError::Conflict {
                        device: name.to_string(),
                        first: self.files[*first].path.clone(),
                        second: self.files[*second].path.clone(),
                    });
                }
                None => return Err(self.unknown(name)),
            };
            let file = &self.files[at];
            let Ok(document) = &file.document else { continue };
            if seen.insert(at) {
                edits.add(name, &file.path, &document.container_edits);
            }
            edits.add(name, &file.path, &document.devices[device].container_edits);
        }
        Ok(edits)
    }

    fn unknown(&self, name: &Name) -> CdiError {
        let shown: Vec<_> = self.directories.iter().map(|d| d.display().to_string()).collect();
        let unusable = |file: &File| {
            let error = file.document.as_ref().err()?;
            Some(format!("; {}: {error}", file.path.display()))
        };
        CdiError::Unknown {
            device: name.to_string(),
            directories: shown.join(", "),
            hint: self.files.iter().filter_map(unusable).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, priority: usize, devices: &str, value: &str) -> File {
        let devices: Vec<String> = devices
            .split_whitespace()
            .map(|name| {
                format!(r#"{{"name":"{name}","containerEdits":{{"env":["{name}={value}"]}}}}"#)
            })
            .collect();
        let text = format!(
            r#"{{"cdiVersion":"0.3.0","kind":"v/c","devices":[{}],
            "containerEdits":{{"env":["FILE={value}"]}}}}"#,
            devices.join(",")
        );
        let path = PathBuf::from(path);
        let document = Document::parse(&path, &text);
        File { path, priority, document }
    }

    fn environment(registry: &Registry, names: &[&str]) -> Result<Vec<String>, CdiError> {
        let names: Vec<Name> = names.iter().map(|name| name.parse().unwrap()).collect();
        Ok(registry.resolve(&names)?.environment())
    }

    #[test]
    fn later_folders_win_and_equal_ones_conflict() {
        let directories = vec!["/etc/cdi".into(), "/var/run/cdi".into()];
        let files = vec![
            file("/etc/cdi/a.json", 0, "one two both", "a"),
            file("/etc/cdi/b.json", 0, "two three both", "b"),
            file("/var/run/cdi/c.json", 1, "one both", "c"),
            file("/etc/cdi/broken.json", 0, "\"", ""),
        ];
        let registry = Registry::new(directories, files);
        assert_eq!(environment(&registry, &["v/c=one"]).unwrap(), ["FILE=c", "one=c"]);
        assert_eq!(environment(&registry, &["v/c=both"]).unwrap(), ["FILE=c", "both=c"]);
        assert_eq!(
            environment(&registry, &["v/c=both", "v/c=three", "v/c=one"]).unwrap(),
            ["FILE=c", "both=c", "FILE=b", "three=b", "one=c"]
        );
        let conflict = environment(&registry, &["v/c=three", "v/c=two"]).unwrap_err().to_string();
        assert!(conflict.contains("v/c=two"), "{conflict}");
        assert!(conflict.contains("/etc/cdi/a.json and /etc/cdi/b.json"), "{conflict}");
        let unknown = environment(&registry, &["v/c=four"]).unwrap_err().to_string();
        assert!(unknown.contains("v/c=four is in no file of /etc/cdi, /var/run/cdi"), "{unknown}");
        assert!(unknown.contains("/etc/cdi/broken.json: not readable"), "{unknown}");
    }
}
