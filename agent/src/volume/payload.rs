//! What a volume of files shall hold, and how to get there from what it holds. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// One file of a volume.
#[derive(Clone, PartialEq, Eq)]
pub struct File {
    /// Content; never logged.
    pub data: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner, root unless told otherwise.
    pub uid: u32,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, mode {:o}, uid {}", self.data.len(), self.mode, self.uid)
    }
}

/// Files by their path below the volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload {
    files: BTreeMap<String, File>,
}

impl Payload {
    /// Adds a file; a later one of the same path wins, as for kubelet.
    pub fn insert(&mut self, path: &str, file: File) -> Result<(), String> {
        let path = clean(path)?;
        self.files.insert(path, file);
        Ok(())
    }

    /// All of `other` on top.
    pub fn extend(&mut self, other: Payload) {
        self.files.extend(other.files);
    }

    /// Path and content of each file.
    pub fn files(&self) -> impl Iterator<Item = (&str, &File)> {
        self.files.iter().map(|(path, file)| (path.as_str(), file))
    }

    /// First components of all paths: the names seen in the volume's root.
    pub fn names(&self) -> BTreeSet<&str> {
        self.files.keys().filter_map(|path| path.split('/').next()).collect()
    }

    /// Fails if one path is a directory of another.
    pub fn check(&self) -> Result<(), String> {
        for path in self.files.keys() {
            let mut parent = path.as_str();
            while let Some((up, _)) = parent.rsplit_once('/') {
                if self.files.contains_key(up) {
                    return Err(format!(
                        "{up:?} cannot be both a file and a directory of {path:?}"
                    ));
                }
                parent = up;
            }
        }
        Ok(())
    }
}

/// A path that stays below the volume and out of the writer's own names.
fn clean(path: &str) -> Result<String, String> {
    if path.is_empty() || path.starts_with('/') || path.len() > 4096 || path.contains('\0') {
        return Err(format!("path {path:?} must be relative and not empty"));
    }
    let parts: Vec<&str> =
        path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(format!("path {path:?} must not contain '..'"));
    }
    match parts.first() {
        Some(first) if !first.starts_with("..") => Ok(parts.join("/")),
        _ => Err(format!("path {path:?} must not start with '..'")),
    }
}

/// What a volume holds now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Current {
    /// Target of the `..data` link.
    pub data: Option<String>,
    /// The files that `..data` shows.
    pub payload: Payload,
    /// Entries of the volume's root, with the target of those that are links.
    pub root: BTreeMap<String, Option<String>>,
}

/// One step towards the wanted content. A crash between any two leaves either the old or the new
/// content visible, and the next plan ends what is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write the payload into this new directory, and flush nothing: it is made again after a boot.
    WriteData(String),
    /// Point `..data` to this directory by rename.
    Switch(String),
    /// Make the link `name` to `..data/name`.
    Link(String),
    /// Remove what the volume no longer shows.
    RemoveLink(String),
    /// Remove a data directory that is not shown (any longer).
    RemoveData(String),
}

/// Steps from `current` to `wanted`; `fresh` is a new name for a data directory.
pub fn plan_write(current: &Current, wanted: &Payload, fresh: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut shown = current.data.as_deref();
    if shown.is_none() || current.payload != *wanted {
        steps.push(Step::WriteData(fresh.into()));
        steps.push(Step::Switch(fresh.into()));
        shown = Some(fresh);
    }
    let names = wanted.names();
    for name in &names {
        let link = format!("..data/{name}");
        if current.root.get(*name).is_none_or(|target| target.as_deref() != Some(&link)) {
            steps.push(Step::Link((*name).into()));
        }
    }
    for name in current.root.keys() {
        if name.starts_with("..") {
            if name != "..data" && Some(name.as_str()) != shown {
                steps.push(Step::RemoveData(name.clone()));
            }
        } else if !names.contains(name.as_str()) {
            steps.push(Step::RemoveLink(name.clone()));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(data: &[u8]) -> File {
        File { data: data.to_vec(), mode: 0o644, uid: 0 }
    }

    fn payload(entries: &[(String, Vec<u8>)]) -> Payload {
        let mut payload = Payload::default();
        for (path, data) in entries {
            payload.insert(path, file(data)).unwrap();
        }
        payload
    }

    /// The volume as a model: data directories and the entries of its root.
    #[derive(Clone, Debug, Default)]
    struct Model {
        directories: BTreeMap<String, Payload>,
        root: BTreeMap<String, Option<String>>,
    }

    impl Model {
        fn current(&self) -> Current {
            let data = self.root.get("..data").cloned().flatten();
            let payload = data.as_ref().and_then(|d| self.directories.get(d)).cloned();
            Current { data, payload: payload.unwrap_or_default(), root: self.root.clone() }
        }

        fn apply(&mut self, step: &Step, wanted: &Payload) {
            match step {
                Step::WriteData(name) => {
                    assert!(!self.directories.contains_key(name));
                    self.directories.insert(name.clone(), wanted.clone());
                    self.root.insert(name.clone(), None);
                }
                Step::Switch(name) => {
                    assert!(self.directories.contains_key(name), "switch to nothing");
                    self.root.insert("..data".into(), Some(name.clone()));
                }
                Step::Link(name) => {
                    self.root.insert(name.clone(), Some(format!("..data/{name}")));
                }
                Step::RemoveLink(name) => {
                    self.root.remove(name).unwrap();
                }
                Step::RemoveData(name) => {
                    let shown = self.root.get("..data").cloned().flatten();
                    assert_ne!(shown.as_deref(), Some(name.as_str()), "removed what is shown");
                    self.directories.remove(name);
                    self.root.remove(name).unwrap();
                }
            }
        }

        /// What a reader sees through the links.
        fn seen(&self) -> Payload {
            let current = self.current();
            let links = current
                .payload
                .names()
                .into_iter()
                .all(|name| self.root.get(name) == Some(&Some(format!("..data/{name}"))));
            if links { current.payload } else { Payload::default() }
        }
    }

    fn entries() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
        let path = proptest::sample::select(vec!["a", "b", "c", "d/e", "d/f", "g/h/i"]);
        let entry = (path.prop_map(String::from), proptest::collection::vec(any::<u8>(), 0..3));
        proptest::collection::vec(entry, 0..6)
    }

    proptest! {
        #[test]
        fn a_plan_applied_gives_what_was_wanted(
            first in entries(), second in entries(), crash in 0usize..12,
        ) {
            let (first, second) = (payload(&first), payload(&second));
            let mut model = Model::default();
            for step in plan_write(&model.current(), &first, "..1") {
                model.apply(&step, &first);
            }
            prop_assert_eq!(model.seen(), first.clone());
            // A crash anywhere within the second write shows old or new, never a mixture.
            let steps = plan_write(&model.current(), &second, "..2");
            for step in steps.iter().take(crash) {
                model.apply(step, &second);
                let shown = model.current().payload;
                prop_assert!(shown == first || shown == second);
            }
            for step in plan_write(&model.current(), &second, "..3") {
                model.apply(&step, &second);
            }
            prop_assert_eq!(model.seen(), second.clone());
            prop_assert!(plan_write(&model.current(), &second, "..4").is_empty());
            prop_assert!(model.directories.len() == 1);
        }
    }

    #[test]
    fn paths_stay_inside() {
        for (path, ok) in [
            ("a", true),
            ("a/b", true),
            ("./a", true),
            (".hidden", true),
            ("", false),
            ("/a", false),
            ("../a", false),
            ("a/../b", false),
            ("..data", false),
            ("..a/b", false),
        ] {
            assert_eq!(Payload::default().insert(path, file(b"")).is_ok(), ok, "{path}");
        }
        let clash = payload(&[("a".into(), vec![]), ("a/b".into(), vec![])]);
        assert!(clash.check().is_err());
    }
}
