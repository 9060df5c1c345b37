//! The user namespaces of pods with `hostUsers: false` (KEP-127): each gets a range of the node's ids
//! for itself, for as long as anything of it runs.
//!
//! A pod's range lies in its folder in kubelet's format (`<root>/pods/<uid>/userns`), written before
//! the runtime hears of it; which are taken is read there at the start. So a range outlives the
//! agent, and a pod that either kubelet or this agent began is understood by the other.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cri_shim::api;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::deps::Deps;
use super::spec::spec_of;
use crate::ids::PodUid;
use crate::join::files::write_atomic;
use crate::node_context::NodeContext;
use crate::user_ids::UserIds;

/// The file in a pod's folder.
const FILE: &str = "userns";

/// Why a pod gets no user namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsernsError {
    /// The runtime cannot, by its own word.
    #[error(
        "can't set `spec.hostUsers: false`, {}",
        match handler.as_str() {
            "" => "runtime does not support user namespaces".to_owned(),
            handler => format!(
                "RuntimeClass handler {handler:?} does not support user namespaces"
            ),
        }
    )]
    NotSupported { handler: String },
    /// Nobody knows such a handler.
    #[error("can't set `spec.hostUsers: false`: the handler {0:?} is not known to the runtime")]
    UnknownHandler(String),
    /// The runtime does not answer.
    #[error("can't set `spec.hostUsers: false`: asking the runtime for its features: {0}")]
    Runtime(String),
    /// The node's configuration gives no ids.
    #[error("can't set `spec.hostUsers: false` on this node: {0}")]
    NoIds(String),
    /// All ranges are taken.
    #[error(
        "could not find an empty slot to allocate a user namespace: all {0} are taken; give the \
         user kubelet more subordinate ids in /etc/subuid and /etc/subgid"
    )]
    Exhausted(u32),
    /// The pod's file says what cannot be.
    #[error(
        "user namespace: {path}: {reason}; delete the pod, or the file once nothing of it runs"
    )]
    Invalid { path: PathBuf, reason: String },
    /// The pod's file cannot be read or written.
    #[error("{doing} the user namespace mappings {path}: {reason}")]
    Io { doing: &'static str, path: PathBuf, reason: String },
}

/// A pod's mappings on disk, in kubelet's words.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Saved {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

impl Saved {
    fn new(first: u32, length: u32) -> Self {
        let mapping = Mapping { host_id: first, container_id: 0, length };
        Saved { uid_mappings: vec![mapping], gid_mappings: vec![mapping] }
    }

    /// The first id and how many there are.
    fn parse(bytes: &[u8]) -> Result<(u32, u32), String> {
        let saved: Saved = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        match (&saved.uid_mappings[..], &saved.gid_mappings[..]) {
            ([uids], [gids]) if uids == gids && uids.container_id == 0 => {
                Ok((uids.host_id, uids.length))
            }
            _ => Err("one mapping from id 0 is expected, the same for users and groups".to_owned()),
        }
    }
}

/// Which ranges are whose.
#[derive(Debug)]
struct Ranges {
    ids: UserIds,
    taken: HashSet<u32>,
    by_pod: HashMap<PodUid, u32>,
    /// Where the search begins: a range that has just come free is taken again last, as files of
    /// the pod before may still lie about.
    next: u32,
}

impl Ranges {
    fn new(ids: UserIds) -> Self {
        Self { ids, taken: HashSet::new(), by_pod: HashMap::new(), next: 0 }
    }

    /// The first id of a free range, from now on the pod's.
    fn allocate(&mut self, uid: &PodUid) -> Option<u32> {
        let ranges = self.ids.ranges();
        let at = (0..ranges)
            .map(|step| (self.next + step) % ranges)
            .find(|at| !self.taken.contains(at))?;
        self.next = (at + 1) % ranges;
        self.taken.insert(at);
        let first = self.ids.first + at * self.ids.per_pod;
        self.by_pod.insert(uid.clone(), first);
        Some(first)
    }

    /// Takes a range that was the pod's before.
    fn record(&mut self, uid: &PodUid, first: u32, length: u32) -> Result<(), String> {
        match self.by_pod.get(uid) {
            Some(known) if *known == first => return Ok(()),
            Some(known) => return Err(format!("the pod has the ids from {known} already")),
            None => {}
        }
        let UserIds { first: begin, per_pod, .. } = self.ids;
        let at = first.checked_sub(begin).filter(|offset| offset % per_pod == 0);
        let at = at.map(|offset| offset / per_pod).filter(|at| *at < self.ids.ranges());
        let Some(at) = at.filter(|_| length == per_pod) else {
            return Err(format!(
                "{length} ids from {first} are none of this node's ranges ({per_pod} each, from \
                 {begin})"
            ));
        };
        if !self.taken.insert(at) {
            return Err(format!("the ids from {first} are taken by another pod"));
        }
        self.by_pod.insert(uid.clone(), first);
        Ok(())
    }

    fn release(&mut self, uid: &PodUid) {
        if let Some(first) = self.by_pod.remove(uid) {
            self.taken.remove(&((first - self.ids.first) / self.ids.per_pod));
        }
    }
}

/// The ranges of this node's pods.
pub(crate) struct UserNamespaces {
    pods: PathBuf,
    /// None, with the reason, where the node's configuration gives none.
    ranges: Result<Mutex<Ranges>, String>,
}

impl UserNamespaces {
    /// Finds what pods had before. Reads the disk.
    pub(crate) fn open(node: &NodeContext) -> Self {
        let this = Self {
            pods: node.root_dir.join("pods"),
            ranges: match &node.user_ids {
                Ok(ids) => Ok(Mutex::new(Ranges::new(*ids))),
                Err(reason) => {
                    tracing::error!(reason, "pods with hostUsers: false cannot run on this node");
                    Err(reason.clone())
                }
            },
        };
        for entry in fs::read_dir(&this.pods).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            // A pod whose file is bad is refused a sandbox, with this error; the others go on.
            if let Err(error) = this.load(&PodUid::from(name.as_str())) {
                tracing::error!(pod = name, %error, "cannot tell which ids a pod has");
            }
        }
        this
    }

    fn ranges(&self) -> Result<MutexGuard<'_, Ranges>, UsernsError> {
        match &self.ranges {
            Ok(ranges) => Ok(ranges.lock().unwrap_or_else(PoisonError::into_inner)),
            Err(reason) => Err(UsernsError::NoIds(reason.clone())),
        }
    }

    fn path(&self, uid: &PodUid) -> PathBuf {
        self.pods.join(uid.as_str()).join(FILE)
    }

    /// What the disk says of a pod.
    fn load(&self, uid: &PodUid) -> Result<Option<u32>, UsernsError> {
        let path = self.path(uid);
        if matches!(uid.as_str(), "" | "." | "..") || uid.as_str().contains('/') {
            let reason = "the pod's UID cannot name a folder".to_owned();
            return Err(UsernsError::Invalid { path, reason });
        }
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if absent(&error) => return Ok(None),
            Err(error) => {
                return Err(UsernsError::Io { doing: "reading", path, reason: error.to_string() });
            }
        };
        let mut ranges = self.ranges()?;
        let recorded = Saved::parse(&bytes)
            .and_then(|(first, length)| ranges.record(uid, first, length).map(|()| first));
        recorded.map(Some).map_err(|reason| UsernsError::Invalid { path, reason })
    }

    /// The pod's range, a new one if it has none: the first id and how many there are.
    fn get_or_create(&self, uid: &PodUid) -> Result<(u32, u32), UsernsError> {
        let per_pod = self.ranges()?.ids.per_pod;
        if let Some(first) = self.load(uid)? {
            return Ok((first, per_pod));
        }
        let first = {
            let mut ranges = self.ranges()?;
            let known = ranges.by_pod.get(uid).copied();
            let total = ranges.ids.ranges();
            let first = known.or_else(|| ranges.allocate(uid));
            first.ok_or(UsernsError::Exhausted(total))?
        };
        let path = self.path(uid);
        if let Err(reason) = save(&path, &Saved::new(first, per_pod)) {
            self.ranges()?.release(uid);
            return Err(UsernsError::Io { doing: "writing", path, reason });
        }
        Ok((first, per_pod))
    }

    /// Frees the range of a pod of which nothing runs any more.
    pub(crate) fn release(&self, uid: &PodUid) {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(error) if !absent(&error) => {
                tracing::warn!(path = %path.display(), %error, "cannot remove a pod's id mappings");
            }
            _ => {}
        }
        if let Ok(mut ranges) = self.ranges() {
            ranges.release(uid);
        }
    }

    /// Whether the pod has a range.
    pub(crate) fn has(&self, uid: &PodUid) -> bool {
        self.ranges().is_ok_and(|ranges| ranges.by_pod.contains_key(uid))
    }
}

/// Nothing there, or a pod's UID that is no folder's name.
fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn save(path: &Path, saved: &Saved) -> Result<(), String> {
    let text = serde_json::to_vec(saved).map_err(|e| e.to_string())?;
    write_atomic(path, 0o600, &text).map_err(|e| e.to_string())
}

/// The CRI's word for a pod's users: the node's, or a range of its own.
pub(crate) async fn options(
    deps: &Deps,
    pod: &Pod,
    handler: &str,
) -> Result<api::UserNamespace, UsernsError> {
    let mode =
        |mode: api::NamespaceMode| api::UserNamespace { mode: mode.into(), ..Default::default() };
    if spec_of(pod).host_users != Some(false) {
        return Ok(mode(api::NamespaceMode::Node));
    }
    let uid = PodUid::of(pod);
    // What has a range has passed.
    if !deps.userns.has(&uid) {
        let status = deps.runtime.status().await;
        check(&status.map_err(|e| UsernsError::Runtime(e.to_string()))?, handler)?;
    }
    let userns = deps.userns.clone();
    let made = tokio::task::spawn_blocking(move || userns.get_or_create(&uid)).await;
    let (host_id, length) = made.map_err(|e| UsernsError::Runtime(e.to_string()))??;
    let ids = vec![api::IdMapping { host_id, container_id: 0, length }];
    Ok(api::UserNamespace { uids: ids.clone(), gids: ids, ..mode(api::NamespaceMode::Pod) })
}

/// Whether the runtime says that its handler can.
fn check(status: &api::StatusResponse, handler: &str) -> Result<(), UsernsError> {
    let known = status.runtime_handlers.iter().find(|known| known.name == handler);
    match known {
        Some(known) if known.features.is_some_and(|f| f.user_namespaces) => Ok(()),
        // Runtimes before CRI 1.30 name no handlers at all.
        None if !status.runtime_handlers.is_empty() => {
            Err(UsernsError::UnknownHandler(handler.to_owned()))
        }
        _ => Err(UsernsError::NotSupported { handler: handler.to_owned() }),
    }
}

/// Has the mounts of a container belong to the same ids inside as on the disk.
pub(crate) fn map_mounts(mounts: &mut [api::Mount], userns: &api::UserNamespace) {
    for mount in mounts {
        mount.uid_mappings = userns.uids.clone();
        mount.gid_mappings = userns.gids.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: UserIds = UserIds { first: 65_536, length: 3 * 65_536, per_pod: 65_536 };

    fn node(dir: &Path) -> NodeContext {
        let mut node = NodeContext::new("n", vec![]);
        node.root_dir = dir.to_path_buf();
        node.user_ids = Ok(IDS);
        node
    }

    #[test]
    fn ranges_never_overlap_and_come_free_again_last() {
        let mut ranges = Ranges::new(IDS);
        let (a, b, c, d) = ("a".into(), "b".into(), "c".into(), "d".into());
        assert_eq!(ranges.allocate(&a), Some(65_536));
        assert_eq!(ranges.allocate(&b), Some(2 * 65_536));
        ranges.release(&a);
        assert_eq!(ranges.allocate(&c), Some(3 * 65_536), "not the one that has just come free");
        assert_eq!(ranges.allocate(&d), Some(65_536));
        assert_eq!(ranges.allocate(&a), None);
        ranges.release(&b);
        ranges.release(&b);
        assert_eq!(ranges.allocate(&a), Some(2 * 65_536));
    }

    #[test]
    fn what_was_a_pods_before_is_checked() {
        let mut ranges = Ranges::new(IDS);
        let (a, b) = ("a".into(), "b".into());
        for (first, length, expected) in
            [(2 * 65_536, 65_536, true), (2 * 65_536, 65_536, true), (65_536, 65_536, false)]
        {
            assert_eq!(ranges.record(&a, first, length).is_ok(), expected, "{first}");
        }
        for (first, length) in
            [(2 * 65_536, 65_536), (0, 65_536), (65_537, 65_536), (65_536, 7), (4 * 65_536, 65_536)]
        {
            assert!(ranges.record(&b, first, length).is_err(), "{first} {length}");
        }
        assert!(ranges.record(&b, 3 * 65_536, 65_536).is_ok());
    }

    #[test]
    fn a_range_outlives_the_agent_and_goes_with_its_pod() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let (a, b) = (PodUid::from("a"), PodUid::from("b"));
        let userns = UserNamespaces::open(&node);
        let first = userns.get_or_create(&a).unwrap();
        assert_eq!(userns.get_or_create(&a).unwrap(), first);
        let file = dir.path().join("pods/a/userns");
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(
            text,
            r#"{"uidMappings":[{"hostId":65536,"containerId":0,"length":65536}],"gidMappings":[{"hostId":65536,"containerId":0,"length":65536}]}"#
        );
        let again = UserNamespaces::open(&node);
        assert!(again.has(&a));
        assert_ne!(again.get_or_create(&b).unwrap(), first);
        assert_eq!(again.get_or_create(&a).unwrap(), first);
        again.release(&a);
        assert!(!file.exists() && !again.has(&a));
        // Its folder was taken away before.
        fs::remove_dir_all(dir.path().join("pods/b")).unwrap();
        again.release(&b);
        assert_eq!(again.ranges().unwrap().taken.len(), 0);
    }

    #[test]
    fn a_bad_file_stops_its_pod_alone() {
        let dir = tempfile::tempdir().unwrap();
        for (uid, text) in [
            ("torn", "{\"uidMap"),
            ("two", r#"{"uidMappings":[],"gidMappings":[]}"#),
            ("good", &serde_json::to_string(&Saved::new(131_072, 65_536)).unwrap()),
        ] {
            fs::create_dir_all(dir.path().join("pods").join(uid)).unwrap();
            fs::write(dir.path().join("pods").join(uid).join(FILE), text).unwrap();
        }
        let userns = UserNamespaces::open(&node(dir.path()));
        assert_eq!(userns.get_or_create(&"good".into()).unwrap(), (131_072, 65_536));
        for uid in ["torn", "two"] {
            let refused = userns.get_or_create(&uid.into()).unwrap_err().to_string();
            assert!(refused.contains(&format!("pods/{uid}/userns")), "{refused}");
        }
        assert_eq!(userns.get_or_create(&"new".into()).unwrap(), (65_536, 65_536));
    }

    #[test]
    fn what_the_runtime_says_of_itself() {
        let status = |handlers: &[(&str, bool)]| api::StatusResponse {
            runtime_handlers: handlers
                .iter()
                .map(|(name, user_namespaces)| api::RuntimeHandler {
                    name: (*name).to_owned(),
                    features: Some(api::RuntimeHandlerFeatures {
                        user_namespaces: *user_namespaces,
                        recursive_read_only_mounts: false,
                    }),
                })
                .collect(),
            ..Default::default()
        };
        let two = status(&[("", true), ("kata", false)]);
        assert!(check(&two, "").is_ok());
        let said = |status: &api::StatusResponse, handler: &str| {
            check(status, handler).unwrap_err().to_string()
        };
        assert_eq!(
            said(&two, "kata"),
            "can't set `spec.hostUsers: false`, RuntimeClass handler \"kata\" does not support user namespaces"
        );
        assert_eq!(
            said(&status(&[]), ""),
            "can't set `spec.hostUsers: false`, runtime does not support user namespaces"
        );
        assert!(said(&two, "other").contains("\"other\" is not known"));
    }
}
