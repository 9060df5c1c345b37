//! All objects of a kind that a node may watch, for what picks among them: ClusterTrustBundles, and the
//! PodCertificateRequests of this node. Few pods need any, so that nothing is watched before one does.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kube::Resource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

use super::objects::keyed;
use super::one::Known;
use super::store::Store;
use crate::api::backoff::Backoff;
use crate::api::watch::{Failure, Seen, Watch};
use crate::ids::NamespacedName;
use crate::objects::{ObjectError, ObjectRef};

/// Objects by namespace and name.
pub(super) type Set<K> = BTreeMap<NamespacedName, Arc<K>>;

/// A watch that is started when somebody first needs it, and ends with this.
pub(super) struct Watched<K>(OnceLock<(watch::Receiver<Known<Set<K>>>, AbortHandle)>);

impl<K> Default for Watched<K> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        if let Some((_, task)) = self.0.get() {
            task.abort();
        }
    }
}

impl<K> Watched<K>
where
    K: Resource + Clone + Serialize + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    K::DynamicType: Default,
{
    /// What it sees; `wanted` says of what it is.
    pub(super) fn seen(
        &self,
        wanted: impl FnOnce() -> Wanted<K>,
    ) -> watch::Receiver<Known<Set<K>>> {
        let start = || {
            let (tx, rx) = watch::channel(Known::Nothing);
            (rx, tokio::spawn(wanted().run(tx)).abort_handle())
        };
        self.0.get_or_init(start).0.clone()
    }
}

/// What is watched.
pub(super) struct Wanted<K> {
    pub(super) objects: kube::Api<K>,
    /// A field selector; empty for all.
    pub(super) fields: String,
    pub(super) kind: &'static str,
    /// What is told of a change.
    pub(super) reference: ObjectRef,
    pub(super) changes: broadcast::Sender<ObjectRef>,
    /// Keeps them for a restart while the control plane is away.
    pub(super) store: Option<Store>,
}

impl<K> Wanted<K>
where
    K: Resource + Clone + Serialize + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    async fn run(self, tx: watch::Sender<Known<Set<K>>>) {
        let before: Option<Set<K>> =
            self.store.as_ref().and_then(|store| Some(store.load::<K>()?.map(keyed).collect()));
        let backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(30));
        let mut watch = Watch::with_backoff(self.objects.clone(), &self.fields, backoff);
        let (mut all, mut listed) = (Set::new(), Set::new());
        loop {
            match watch.next().await {
                Seen::Restarted => listed = Set::new(),
                Seen::Listed(object) => {
                    let (key, object) = bare(object);
                    listed.insert(key, object);
                }
                Seen::Complete => {
                    all = std::mem::take(&mut listed);
                    if let Some(store) = &self.store {
                        let keys: Vec<String> = all.keys().map(ToString::to_string).collect();
                        store.keep(|key| keys.iter().any(|kept| kept == key));
                        all.iter().for_each(|(key, object)| store.put(&key.to_string(), &**object));
                    }
                    self.tell(&tx, &all);
                }
                Seen::Applied(object) => {
                    let (key, object) = bare(object);
                    if let Some(store) = &self.store {
                        store.put(&key.to_string(), &*object);
                    }
                    all.insert(key, object);
                    self.tell(&tx, &all);
                }
                Seen::Deleted(object) => {
                    let (key, _) = keyed(object);
                    if let Some(store) = &self.store {
                        store.remove(&key.to_string());
                    }
                    all.remove(&key);
                    self.tell(&tx, &all);
                }
                Seen::Failed(failure) => self.fail(&tx, failure, before.as_ref()),
            }
        }
    }

    fn tell(&self, tx: &watch::Sender<Known<Set<K>>>, all: &Set<K>) {
        tx.send_replace(Known::Value(Some(Arc::new(all.clone()))));
        // Nobody listening is fine.
        let _ = self.changes.send(self.reference.clone());
    }

    fn fail(&self, tx: &watch::Sender<Known<Set<K>>>, failure: Failure, before: Option<&Set<K>>) {
        if matches!(&*tx.borrow(), Known::Value(_)) {
            return;
        }
        let (kind, key, cause) = (self.kind, NamespacedName::new("", "*"), failure.message);
        tx.send_replace(match (failure.forbidden, before) {
            (false, Some(before)) => Known::Value(Some(Arc::new(before.clone()))),
            (true, _) => Known::Failed(ObjectError::Forbidden { kind, key, cause }),
            (false, None) => Known::Failed(ObjectError::Unavailable { kind, key, cause }),
        });
    }
}

fn bare<K: Resource>(mut object: K) -> (NamespacedName, Arc<K>) {
    object.meta_mut().managed_fields = None;
    keyed(object)
}
