//! Mirror pods: what the API shows of static pods.
//!
//! The pure half decides what is to be created and deleted; the loop does it and tries again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Client;
use kube::api::{DeleteParams, PostParams, Preconditions};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::status_sink::ClusterStatuses;
use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, REQUEST_TIMEOUT};
use crate::ids::{NamespacedName, PodUid};
use crate::source::cluster::{MIRROR, MirrorSeen};
use crate::source::{PodChange, PodSource};

/// Annotation of a static pod: what its manifest was.
const HASH: &str = "kubernetes.io/config.hash";

/// Something to do to the API.
#[derive(Clone, Debug, PartialEq)]
enum Action {
    Create(Arc<Pod>),
    Delete(NamespacedName, PodUid),
}

#[derive(Default)]
struct World {
    wanted: BTreeMap<NamespacedName, Arc<Pod>>,
    by_uid: HashMap<PodUid, NamespacedName>,
    seen: BTreeMap<NamespacedName, Arc<Pod>>,
    wanted_known: bool,
    seen_known: bool,
    /// Nobody tells of static pods any more, or ever did: this node has no folder of them.
    no_more_statics: bool,
}

impl World {
    /// What is to be done now: at most one action for each pod; an outdated mirror pod is deleted
    /// first and created when it is gone.
    fn plan(&self) -> Vec<Action> {
        if !self.seen_known {
            return Vec::new();
        }
        let missing = self
            .wanted
            .iter()
            .filter(|(key, _)| !self.seen.contains_key(*key))
            .map(|(_, pod)| Action::Create(pod.clone()));
        let stale = self.seen.iter().filter(|(key, mirror)| match self.wanted.get(*key) {
            Some(pod) => {
                annotation(mirror, MIRROR) != hash(pod)
                    || mirror.metadata.deletion_timestamp.is_some()
            }
            None => self.wanted_known,
        });
        let stale = stale.map(|(key, mirror)| Action::Delete(key.clone(), PodUid::of(mirror)));
        missing.chain(stale).collect()
    }

    fn observe_static(&mut self, change: PodChange) {
        match change {
            PodChange::Set(PodSource::File, pod) => {
                let (key, uid) = (NamespacedName::of_pod(&pod), PodUid::of(&pod));
                self.by_uid.insert(uid, key.clone());
                self.wanted.insert(key, pod);
            }
            PodChange::Removed(PodSource::File, uid) => {
                // The manifest may have been replaced by one of the same name.
                if let Some(key) = self.by_uid.remove(&uid)
                    && self.wanted.get(&key).is_some_and(|pod| PodUid::of(pod) == uid)
                {
                    self.wanted.remove(&key);
                }
            }
            PodChange::Synced(PodSource::File) => self.wanted_known = true,
            _ => {}
        }
    }
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// What tells one manifest from another: its hash annotation, else the UID made from it.
fn hash(pod: &Pod) -> Option<&str> {
    annotation(pod, HASH).or(pod.metadata.uid.as_deref())
}

/// The mirror pod of static pod `pod` on `node`: NodeRestriction demands the annotation, the owner
/// and no references to other objects.
fn mirror_of(pod: &Pod, node: &Node) -> Pod {
    let mut mirror = pod.clone();
    let hash = hash(pod).unwrap_or_default().to_owned();
    let metadata = &mut mirror.metadata;
    metadata.annotations.get_or_insert_default().insert(MIRROR.to_owned(), hash);
    metadata.uid = None;
    metadata.resource_version = None;
    metadata.creation_timestamp = None;
    metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone().unwrap_or_default(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    if let Some(spec) = &mut mirror.spec {
        spec.node_name.clone_from(&node.metadata.name);
    }
    mirror.status = None;
    mirror
}

/// Keeps the API's mirror pods like the static pods of this node.
pub struct MirrorLoop {
    /// To create and delete them.
    pub client: Client,
    /// Static pods.
    pub statics: mpsc::UnboundedReceiver<PodChange>,
    /// Mirror pods.
    pub mirrors: mpsc::UnboundedReceiver<MirrorSeen>,
    /// Owner of the mirror pods; none is made before it is registered.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// Must know the UIDs.
    pub statuses: Arc<ClusterStatuses>,
}

impl MirrorLoop {
    /// Runs until the mirror pods are no longer watched.
    pub async fn run(mut self) {
        let mut world = World::default();
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
        let mut retry: Option<Instant> = None;
        loop {
            let at = retry.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                change = self.statics.recv(), if !world.no_more_statics => match change {
                    Some(change) => world.observe_static(change),
                    None => {
                        world.no_more_statics = true;
                        world.wanted_known = true;
                    }
                },
                seen = self.mirrors.recv() => match seen {
                    Some(seen) => self.observe_mirror(&mut world, seen),
                    None => return,
                },
                changed = self.node.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(at) => {}
            }
            // A burst of changes is one look.
            while let Ok(change) = self.statics.try_recv() {
                world.observe_static(change);
            }
            while let Ok(seen) = self.mirrors.try_recv() {
                self.observe_mirror(&mut world, seen);
            }
            if retry.is_some_and(|at| at > Instant::now()) {
                continue;
            }
            let node = self.node.borrow().clone().filter(|n| n.metadata.uid.is_some());
            let Some(node) = node else { continue };
            retry = None;
            for action in world.plan() {
                if let Err(error) = self.apply(&mut world, &action, &node).await {
                    tracing::warn!(%error, "cannot bring a mirror pod about");
                    retry = Some(Instant::now() + backoff.next_delay());
                }
            }
            if retry.is_none() {
                backoff.reset();
            }
        }
    }

    fn observe_mirror(&self, world: &mut World, seen: MirrorSeen) {
        match seen {
            MirrorSeen::Set(pod) => {
                let key = NamespacedName::of_pod(&pod);
                self.statuses.mirror(&key, Some(PodUid::of(&pod)));
                world.seen.insert(key, pod);
            }
            MirrorSeen::Gone(key) => {
                self.statuses.mirror(&key, None);
                world.seen.remove(&key);
            }
            MirrorSeen::Synced => world.seen_known = true,
        }
    }

    async fn apply(&self, world: &mut World, action: &Action, node: &Node) -> Result<(), ApiError> {
        match action {
            Action::Create(pod) => {
                let key = NamespacedName::of_pod(pod);
                let pods: kube::Api<Pod> =
                    kube::Api::namespaced(self.client.clone(), &key.namespace);
                let (mirror, params) = (mirror_of(pod, node), PostParams::default());
                let request = pods.create(&params, &mirror);
                let what = format!("create mirror pod {key}");
                match api::timed(what, REQUEST_TIMEOUT, request).await {
                    Ok(made) => {
                        self.statuses.mirror(&key, Some(PodUid::of(&made)));
                        world.seen.insert(key, Arc::new(made));
                        Ok(())
                    }
                    // It is there; the watch will show it.
                    Err(error) if error.code() == Some(409) => Ok(()),
                    Err(error) => Err(error),
                }
            }
            Action::Delete(key, uid) => {
                let pods: kube::Api<Pod> =
                    kube::Api::namespaced(self.client.clone(), &key.namespace);
                let preconditions =
                    Preconditions { uid: Some(uid.to_string()), ..Preconditions::default() };
                let params = DeleteParams::default().grace_period(0).preconditions(preconditions);
                let request = pods.delete(&key.name, &params);
                let what = format!("delete mirror pod {key}");
                match api::timed(what, REQUEST_TIMEOUT, request).await {
                    Ok(_) => Ok(()),
                    Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(()),
                    Err(error) => Err(error),
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, uid: &str, annotations: serde_json::Value) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "namespace": "n", "uid": uid, "annotations": annotations},
                "spec": {"containers": []}
            }))
            .unwrap(),
        )
    }

    fn world(statics: &[&Arc<Pod>], mirrors: &[&Arc<Pod>]) -> World {
        let mut world = World { seen_known: true, ..World::default() };
        for pod in statics {
            world.observe_static(PodChange::Set(PodSource::File, Arc::clone(pod)));
        }
        world.observe_static(PodChange::Synced(PodSource::File));
        world.seen = mirrors.iter().map(|p| (NamespacedName::of_pod(p), Arc::clone(p))).collect();
        world
    }

    #[test]
    fn mirror_pods_follow_the_static_pods() {
        let wanted = pod("a", "u1", json!({HASH: "h1"}));
        let delete = |uid: &str| vec![Action::Delete(NamespacedName::new("n", "a"), uid.into())];
        let good = pod("a", "m1", json!({MIRROR: "h1"}));
        assert_eq!(world(&[&wanted], &[]).plan(), [Action::Create(wanted.clone())]);
        assert_eq!(world(&[&wanted], &[&good]).plan(), []);
        let old = pod("a", "m2", json!({MIRROR: "h0"}));
        assert_eq!(world(&[&wanted], &[&old]).plan(), delete("m2"));
        assert_eq!(world(&[], &[&good]).plan(), delete("m1"));

        let mut unknown = world(&[], &[&good]);
        unknown.wanted_known = false;
        assert_eq!(unknown.plan(), [], "static pods are not known yet");
        let mut unseen = world(&[&wanted], &[]);
        unseen.seen_known = false;
        assert_eq!(unseen.plan(), [], "mirror pods are not known yet");

        let mut replaced = world(&[&wanted], &[]);
        let newer = pod("a", "u2", json!({HASH: "h2"}));
        replaced.observe_static(PodChange::Set(PodSource::File, newer.clone()));
        replaced.observe_static(PodChange::Removed(PodSource::File, "u1".into()));
        assert_eq!(replaced.plan(), [Action::Create(newer)]);
    }

    #[test]
    fn a_mirror_pod_is_owned_by_its_node() {
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "me", "uid": "nu"}})).unwrap();
        let mirror = mirror_of(&pod("a", "u1", json!({HASH: "h1"})), &node);
        assert_eq!(annotation(&mirror, MIRROR), Some("h1"));
        assert_eq!(mirror.metadata.uid, None);
        let owner = &mirror.metadata.owner_references.unwrap()[0];
        assert_eq!(
            (owner.kind.as_str(), owner.uid.as_str(), owner.controller),
            ("Node", "nu", Some(true))
        );
        assert_eq!(mirror.spec.unwrap().node_name.as_deref(), Some("me"));
    }
}
