//! The pods of this node.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use tokio::sync::mpsc;

use super::{AWAY_AFTER, Deleting, Errors, MIRROR, MirrorSeen};
use crate::api::watch::{Seen, Watch};
use crate::cluster::store::Store;
use crate::ids::{NamespacedName, PodUid};
use crate::source::{PodChange, PodSource};

/// Where pods go.
pub struct PodLoop {
    /// To the sync loop.
    pub pods: mpsc::Sender<PodChange>,
    /// To the mirror loop.
    pub mirrors: mpsc::UnboundedSender<MirrorSeen>,
    /// Told of every deletion, by UID, also after the sync loop has let go of the pod.
    pub deletions: mpsc::UnboundedSender<PodUid>,
    /// Kept up to date.
    pub deleting: Arc<Deleting>,
    /// For the next start.
    pub store: Store,
    /// Shown in status.
    pub errors: Errors,
}

struct KnownPod {
    version: Option<String>,
    mirror: bool,
    key: NamespacedName,
}

impl PodLoop {
    /// Runs for ever: pods of `node_name`.
    pub async fn run(self, client: Client, node_name: String) {
        let fields = format!("spec.nodeName={node_name}");
        let mut watch = Watch::<Pod>::new(kube::Api::all(client), &fields);
        let mut known: HashMap<PodUid, KnownPod> = HashMap::new();
        let mut listed: HashSet<PodUid> = HashSet::new();
        let (mut synced, mut told) = (false, false);
        let away = tokio::time::sleep(AWAY_AFTER);
        tokio::pin!(away);
        loop {
            let seen = tokio::select! {
                seen = watch.next() => seen,
                () = &mut away, if !told => {
                    told = true;
                    self.tell_last_known(&mut known).await;
                    continue;
                }
            };
            match seen {
                Seen::Restarted => listed.clear(),
                Seen::Listed(pod) => {
                    listed.insert(PodUid::of(&pod));
                    self.set(&mut known, pod).await;
                }
                Seen::Complete => {
                    self.errors.clear("pods");
                    let gone: Vec<PodUid> =
                        known.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                    for uid in gone {
                        self.removed(&mut known, &uid).await;
                    }
                    self.store.keep(|uid| listed.contains(&PodUid::from(uid)));
                    listed.clear();
                    let _ = self.mirrors.send(MirrorSeen::Synced);
                    told = true;
                    if !synced {
                        synced = true;
                        let _ = self.pods.send(PodChange::Synced(PodSource::Cluster)).await;
                    }
                }
                Seen::Applied(pod) => {
                    self.errors.clear("pods");
                    self.set(&mut known, pod).await;
                }
                Seen::Deleted(pod) => self.removed(&mut known, &PodUid::of(&pod)).await,
                Seen::Failed(failure) => {
                    self.errors.set("pods", failure.message);
                    if !told {
                        told = true;
                        self.tell_last_known(&mut known).await;
                    }
                }
            }
        }
    }

    async fn set(&self, known: &mut HashMap<PodUid, KnownPod>, mut pod: Pod) {
        let uid = PodUid::of(&pod);
        if uid.as_str().is_empty() {
            return;
        }
        let version = pod.metadata.resource_version.clone();
        if known.get(&uid).is_some_and(|k| k.version == version) {
            return;
        }
        pod.metadata.managed_fields = None;
        let mirror = pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR));
        let key = NamespacedName::of_pod(&pod);
        known.insert(uid.clone(), KnownPod { version, mirror, key });
        if mirror {
            let _ = self.mirrors.send(MirrorSeen::Set(Arc::new(pod)));
            return;
        }
        let deleting = pod.metadata.deletion_timestamp.is_some();
        self.deleting.set(uid.clone(), deleting);
        self.store.put(uid.as_str(), &pod);
        let _ = self.pods.send(PodChange::Set(PodSource::Cluster, Arc::new(pod))).await;
        if deleting {
            let _ = self.deletions.send(uid);
        }
    }

    async fn removed(&self, known: &mut HashMap<PodUid, KnownPod>, uid: &PodUid) {
        let Some(pod) = known.remove(uid) else { return };
        if pod.mirror {
            let _ = self.mirrors.send(MirrorSeen::Gone(pod.key));
            return;
        }
        self.deleting.forget(uid);
        self.store.remove(uid.as_str());
        let _ = self.pods.send(PodChange::Removed(PodSource::Cluster, uid.clone())).await;
    }

    /// Tells the pods of the last run. `Synced` is not told: what the API server has besides is not
    /// known, so nothing may be taken for orphaned.
    async fn tell_last_known(&self, known: &mut HashMap<PodUid, KnownPod>) {
        let pods: Vec<Pod> = self.store.load().into_iter().flatten().collect();
        tracing::warn!(pods = pods.len(), "the API server is away: running the last known pods");
        for mut pod in pods {
            // Whatever the API says later is news, even at the same version.
            pod.metadata.managed_fields = None;
            self.set(known, pod).await;
        }
    }
}
