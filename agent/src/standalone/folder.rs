//! What a folder of manifests says, and what changed in it. Pure.
//!
//! Level-triggered: a file is told anew as a whole, and the changes come out. A document that is
//! wrong is a problem of its own; while a file has one, nothing that it said before is taken away,
//! because it may be half written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::decode::{Object, decode};
use super::defaults::Origin;
use super::{defaults, validate, yaml};
use crate::ids::{NamespacedName, PodUid};

/// Something wrong in a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the file in the folder.
    pub file: String,
    /// Document in the file, from 1; 0 is the file as a whole.
    pub document: usize,
    /// Kind, name, field and cause.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.document {
            0 => write!(f, "{}: {}", self.file, self.message),
            document => write!(f, "{}: document {document}: {}", self.file, self.message),
        }
    }
}

/// Which objects the folder may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All kinds: there is no control plane.
    Standalone,
    /// Static pods beside a control plane.
    StaticPods,
}

/// An object ready for use: defaults filled in, validated.
#[derive(Clone, Debug, PartialEq)]
pub enum Ready {
    /// A static pod.
    Pod(Arc<Pod>),
    /// A Service.
    Service(Arc<Service>),
    /// An EndpointSlice.
    Slice(Arc<EndpointSlice>),
    /// A ConfigMap.
    ConfigMap(Arc<ConfigMap>),
    /// A Secret.
    Secret(Arc<Secret>),
}

/// Kinds, for keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `Pod`
    Pod,
    /// `Service`
    Service,
    /// `EndpointSlice`
    EndpointSlice,
    /// `ConfigMap`
    ConfigMap,
    /// `Secret`
    Secret,
}

/// Which object.
pub type Key = (Kind, NamespacedName);

/// One change in what the folder says.
#[derive(Clone, Debug, PartialEq)]
pub enum FolderChange {
    /// New or changed. A pod of the same UID has not changed.
    Set(NamespacedName, Ready),
    /// No longer there.
    Removed(Key),
    /// The pod of this UID is no longer there.
    PodRemoved(NamespacedName, PodUid),
}

#[derive(Debug, Default)]
struct File {
    objects: BTreeMap<Key, Ready>,
    problems: Vec<Problem>,
}

/// The folder as last read.
#[derive(Debug)]
pub struct Folder {
    node: String,
    scope: Scope,
    files: BTreeMap<String, File>,
    /// Which files hold an object; the first by name counts.
    holders: BTreeMap<Key, BTreeSet<String>>,
}

impl Folder {
    /// An empty folder of node `node`.
    pub fn new(node: &str, scope: Scope) -> Self {
        Self { node: node.into(), scope, files: BTreeMap::new(), holders: BTreeMap::new() }
    }

    /// Names of the files known.
    pub fn files(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    /// All problems of all files, and objects that several files hold.
    pub fn problems(&self) -> Vec<Problem> {
        let own = self.files.values().flat_map(|file| file.problems.iter().cloned());
        let shared = self.holders.iter().flat_map(|((kind, key), holders)| {
            let first = holders.first().cloned().unwrap_or_default();
            holders.iter().skip(1).map(move |file| Problem {
                file: file.clone(),
                document: 0,
                message: format!("{kind:?} {key} is also in {first}; the first by name counts"),
            })
        });
        own.chain(shared).collect()
    }

    /// The file `name` cannot be read: what it said stays.
    pub fn unreadable(&mut self, name: &str, cause: impl fmt::Display) {
        let file = self.files.entry(name.into()).or_default();
        file.problems =
            vec![Problem { file: name.into(), document: 0, message: cause.to_string() }];
    }

    /// The file `name` is gone.
    pub fn removed(&mut self, name: &str) -> Vec<FolderChange> {
        self.replace(name, File::default(), true)
    }

    /// The file `name` says `text`; `seen` is the time, for new pods.
    pub fn read(&mut self, name: &str, text: &[u8], seen: &str) -> Vec<FolderChange> {
        // An address is a file that has its URL for a name.
        let source = if name.contains("://") { "http" } else { "file" };
        let from = Origin { source, seen };
        let mut file = File::default();
        let documents = yaml::documents(text);
        let problem =
            |document: usize, message: String| Problem { file: name.into(), document, message };
        if documents.is_empty() {
            file.problems
                .push(problem(0, "empty; to end what it ran, remove the file instead".into()));
        }
        for document in documents {
            let number = document.number;
            let value = match document.value {
                Ok(value) => value,
                Err(error) => {
                    file.problems.push(problem(number, error.to_string()));
                    continue;
                }
            };
            for decoded in decode(value) {
                let made = decoded.map_err(|e| e.to_string()).and_then(|o| self.prepare(o, from));
                match made {
                    Ok((key, _)) if file.objects.contains_key(&key) => {
                        let message = format!("{:?} {} a second time in this file", key.0, key.1);
                        file.problems.push(problem(number, message));
                    }
                    Ok((key, ready)) => {
                        file.objects.insert(key, ready);
                    }
                    Err(message) => file.problems.push(problem(number, message)),
                }
            }
        }
        self.replace(name, file, false)
    }

    /// Defaults, validation, identity.
    fn prepare(&self, object: Object, from: Origin<'_>) -> Result<(Key, Ready), String> {
        let named =
            |kind: Kind, metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
                let namespace = metadata.namespace.as_deref().unwrap_or("default");
                let name = metadata.name.as_deref().unwrap_or_default();
                (kind, NamespacedName::new(namespace, name))
            };
        let fail = |key: &Key, found: Vec<validate::Invalid>| {
            let causes: Vec<String> = found.iter().map(ToString::to_string).collect();
            format!("{:?} {}: {}", key.0, key.1, causes.join("; "))
        };
        if self.scope == Scope::StaticPods && !matches!(object, Object::Pod(..)) {
            return Err(format!("{object:?} is taken from manifests only with --standalone"));
        }
        match object {
            Object::Pod(pod, hash) => {
                let key = named(Kind::Pod, &pod.metadata);
                let pod = defaults::static_pod(*pod, &self.node, hash.uid(&self.node), from);
                validate::pod(&pod).map_err(|found| fail(&key, found))?;
                if self.scope == Scope::StaticPods
                    && let Some(found) = pod.spec.as_ref().and_then(validate::api_reference)
                {
                    return Err(fail(&key, vec![found]));
                }
                Ok((key, Ready::Pod(Arc::new(pod))))
            }
            Object::Service(mut service) => {
                defaults::service(&mut service);
                let key = named(Kind::Service, &service.metadata);
                validate::service(&service).map_err(|found| fail(&key, found))?;
                Ok((key, Ready::Service(Arc::new(*service))))
            }
            Object::EndpointSlice(mut slice) => {
                slice.metadata.namespace.get_or_insert_with(|| "default".into());
                let key = named(Kind::EndpointSlice, &slice.metadata);
                validate::named(&slice.metadata).map_err(|found| fail(&key, found))?;
                Ok((key, Ready::Slice(Arc::new(*slice))))
            }
            Object::ConfigMap(mut map) => {
                map.metadata.namespace.get_or_insert_with(|| "default".into());
                let key = named(Kind::ConfigMap, &map.metadata);
                let keys = map.data.iter().flat_map(|data| data.keys());
                let keys = keys.chain(map.binary_data.iter().flat_map(|data| data.keys()));
                validate::keyed(&map.metadata, keys).map_err(|found| fail(&key, found))?;
                Ok((key, Ready::ConfigMap(Arc::new(*map))))
            }
            Object::Secret(mut secret) => {
                secret.metadata.namespace.get_or_insert_with(|| "default".into());
                let key = named(Kind::Secret, &secret.metadata);
                let keys = secret.data.iter().flat_map(|data| data.keys());
                validate::keyed(&secret.metadata, keys).map_err(|found| fail(&key, found))?;
                Ok((key, Ready::Secret(Arc::new(*secret))))
            }
        }
    }

    /// What a key means now.
    fn effective(&self, key: &Key) -> Option<&Ready> {
        let holder = self.holders.get(key)?.first()?;
        self.files.get(holder)?.objects.get(key)
    }

    /// Puts `new` in the place of the file `name`.
    fn replace(&mut self, name: &str, mut new: File, gone: bool) -> Vec<FolderChange> {
        let old = self.files.remove(name).unwrap_or_default();
        if !new.problems.is_empty() {
            // Perhaps half written: what it said before and does not say now stays.
            for (key, ready) in &old.objects {
                new.objects.entry(key.clone()).or_insert_with(|| ready.clone());
            }
        }
        // A pod that did not change keeps the object it has, with the time it was first seen.
        for (key, ready) in &mut new.objects {
            if let (Ready::Pod(pod), Some(Ready::Pod(before))) = (&*ready, old.objects.get(key))
                && pod.metadata.uid == before.metadata.uid
            {
                *ready = Ready::Pod(before.clone());
            }
        }
        let touched: BTreeSet<Key> =
            old.objects.keys().chain(new.objects.keys()).cloned().collect();
        // What counted before: only this file's own entries can have changed.
        let before: BTreeMap<Key, Ready> = touched
            .iter()
            .filter_map(|key| {
                let holder = self.holders.get(key)?.first()?;
                let ready = if holder == name {
                    old.objects.get(key)?
                } else {
                    self.files.get(holder)?.objects.get(key)?
                };
                Some((key.clone(), ready.clone()))
            })
            .collect();
        for key in &touched {
            let holders = self.holders.entry(key.clone()).or_default();
            if new.objects.contains_key(key) {
                holders.insert(name.into());
            } else {
                holders.remove(name);
                if holders.is_empty() {
                    self.holders.remove(key);
                }
            }
        }
        if !gone {
            self.files.insert(name.into(), new);
        }
        let mut changes = Vec::new();
        for key in touched {
            let after = self.effective(&key).cloned();
            changes.extend(difference(&key, before.get(&key), after));
        }
        changes
    }
}

fn difference(key: &Key, before: Option<&Ready>, after: Option<Ready>) -> Vec<FolderChange> {
    if before == after.as_ref() {
        return Vec::new();
    }
    let mut changes = Vec::new();
    match (before, &after) {
        (Some(Ready::Pod(old)), Some(Ready::Pod(new))) if old.metadata.uid == new.metadata.uid => {
            return Vec::new();
        }
        // Another UID is another pod: the old one ends.
        (Some(Ready::Pod(old)), _) => {
            changes.push(FolderChange::PodRemoved(key.1.clone(), PodUid::of(old)));
        }
        (Some(_), None) => changes.push(FolderChange::Removed(key.clone())),
        _ => {}
    }
    if let Some(ready) = after {
        changes.push(FolderChange::Set(key.1.clone(), ready));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "kind: Pod\napiVersion: v1\nmetadata: {name: web}\nspec:\n  containers:\n  - {name: c, image: i}\n";
    const MAP: &str = "kind: ConfigMap\napiVersion: v1\nmetadata: {name: m}\ndata: {a: '1'}\n";

    fn folder() -> Folder {
        Folder::new("node", Scope::Standalone)
    }

    fn names(changes: &[FolderChange]) -> Vec<String> {
        let name = |change: &FolderChange| match change {
            FolderChange::Set(key, Ready::Pod(_)) => format!("set pod {key}"),
            FolderChange::Set(key, _) => format!("set {key}"),
            FolderChange::Removed((kind, key)) => format!("removed {kind:?} {key}"),
            FolderChange::PodRemoved(key, _) => format!("removed pod {key}"),
        };
        changes.iter().map(name).collect()
    }

    #[test]
    fn only_what_changed_comes_out() {
        let mut folder = folder();
        let both = format!("{POD}---\n{MAP}");
        let changes = folder.read("a", both.as_bytes(), "t1");
        assert_eq!(names(&changes), ["set pod default/web", "set default/m"]);
        let FolderChange::Set(_, Ready::Pod(pod)) = &changes[0] else { panic!() };
        assert_eq!(pod.metadata.name.as_deref(), Some("web-node"));
        let annotations = pod.metadata.annotations.as_ref().unwrap();
        assert_eq!(annotations.get(defaults::CONFIG_SOURCE).unwrap(), "file");
        assert_eq!(annotations.get(defaults::CONFIG_HASH), pod.metadata.uid.as_ref());
        // Comments and order are no change.
        let same = format!("# comment\n{MAP}---\n{POD}");
        assert_eq!(folder.read("a", same.as_bytes(), "t2"), []);
        // Another image is another pod.
        let other = both.replace("image: i", "image: j");
        let changes = folder.read("a", other.as_bytes(), "t3");
        assert_eq!(names(&changes), ["removed pod default/web", "set pod default/web"]);
        let changes = folder.read("a", POD.replace("image: i", "image: j").as_bytes(), "t4");
        assert_eq!(names(&changes), ["removed ConfigMap default/m"]);
        assert_eq!(names(&folder.removed("a")), ["removed pod default/web"]);
        assert!(folder.files().is_empty() && folder.holders.is_empty());
    }

    #[test]
    fn a_broken_file_takes_nothing_away_and_stops_nothing() {
        let mut folder = folder();
        let both = format!("{POD}---\n{MAP}");
        folder.read("a", both.as_bytes(), "t");
        for broken in [
            &both[..both.len() - 20],
            &both[..40],
            "",
            "kind: Pod\n",
            "{",
            "kind: Deployment\napiVersion: apps/v1\n",
        ] {
            let changes = folder.read("a", broken.as_bytes(), "t");
            assert!(changes.is_empty(), "{broken:?}: {changes:?}");
            assert!(!folder.problems().is_empty(), "{broken:?}");
        }
        // The good document of a broken file counts.
        let text = format!("a: [\n---\n{}", MAP.replace("'1'", "'2'"));
        assert_eq!(names(&folder.read("a", text.as_bytes(), "t")), ["set default/m"]);
        assert_eq!(
            folder.read("a", format!("{POD}---\n{}", MAP.replace("'1'", "'2'")).as_bytes(), "t"),
            []
        );
        assert!(folder.problems().is_empty());
    }

    #[test]
    fn the_first_file_by_name_counts() {
        let mut folder = folder();
        folder.read("b", MAP.as_bytes(), "t");
        let first = MAP.replace("'1'", "'2'");
        assert_eq!(names(&folder.read("a", first.as_bytes(), "t")), ["set default/m"]);
        assert_eq!(folder.problems().len(), 1);
        assert_eq!(names(&folder.removed("a")), ["set default/m"]);
        assert_eq!(names(&folder.removed("b")), ["removed ConfigMap default/m"]);
    }

    #[test]
    fn problems_name_file_document_and_field() {
        for (text, expected) in [
            (
                "kind: Pod\napiVersion: v1\nmetadata: {name: A_b}\nspec: {containers: [{name: c, image: i}]}",
                "f: document 1: Pod default/A_b: metadata.name: ",
            ),
            (
                "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [{name: c}]}",
                "spec.containers[0].image: required",
            ),
            (
                "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [{name: c, image: i, redinessProbe: {}, comand: [a]}]}",
                "spec.containers[0].comand: unknown field",
            ),
            (
                "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [{name: 5, image: i}]}",
                "spec.containers[0].name: invalid type",
            ),
            (
                "kind: Service\napiVersion: v1\nmetadata: {name: s}\nspec: {ports: [{port: 70000}]}",
                "spec.ports[0].port: 70000 is not between",
            ),
            (
                "kind: Secret\napiVersion: v1\nmetadata: {name: s}\ndata: {k: 'hunter2!'}",
                "data.k: must be base64",
            ),
            ("# c\n---\nkind: Job\napiVersion: batch/v1", "f: document 1: kind \"Job\""),
        ] {
            let mut folder = folder();
            folder.read("f", text.as_bytes(), "t");
            let problems: Vec<String> = folder.problems().iter().map(ToString::to_string).collect();
            assert_eq!(problems.len(), 1, "{text}: {problems:?}");
            assert!(problems[0].contains(expected), "{text}: {problems:?}");
            assert!(!problems[0].contains("hunter2"));
        }
        let mut cluster = Folder::new("node", Scope::StaticPods);
        cluster.read("f", MAP.as_bytes(), "t");
        assert!(cluster.problems()[0].message.contains("--standalone"));
    }

    #[test]
    fn numbers_may_stand_for_quantities_and_defaults_are_the_apis() {
        let mut folder = folder();
        let text = "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec:\n  containers:\n  - name: c\n    image: reg:5000/x\n    resources: {limits: {cpu: 1, memory: 64Mi}}\n    ports: [{containerPort: 80}]\n    livenessProbe: {httpGet: {port: 80}}\n  volumes:\n  - name: v\n  - {name: c, configMap: {name: m}}\n";
        let changes = folder.read("f", text.as_bytes(), "t");
        let FolderChange::Set(_, Ready::Pod(pod)) = &changes[0] else {
            panic!("{:?}", folder.problems())
        };
        let spec = pod.spec.as_ref().unwrap();
        let container = &spec.containers[0];
        assert_eq!(container.image_pull_policy.as_deref(), Some("Always"));
        assert_eq!(container.resources.as_ref().unwrap().requests.as_ref().unwrap()["cpu"].0, "1");
        assert_eq!(container.ports.as_ref().unwrap()[0].protocol.as_deref(), Some("TCP"));
        let probe = container.liveness_probe.as_ref().unwrap();
        assert_eq!((probe.period_seconds, probe.failure_threshold), (Some(10), Some(3)));
        assert_eq!(probe.http_get.as_ref().unwrap().path.as_deref(), Some("/"));
        assert_eq!(spec.termination_grace_period_seconds, Some(30));
        let volumes = spec.volumes.as_ref().unwrap();
        assert!(volumes[0].empty_dir.is_some());
        assert_eq!(volumes[1].config_map.as_ref().unwrap().default_mode, Some(0o644));
    }
}
