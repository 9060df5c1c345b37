//! One ConfigMap or Secret that pods here use: watched by its name, or looked at now and then
//! (`configMapAndSecretChangeDetectionStrategy`).

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Resource;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, broadcast, watch};

use super::store::Store;
use crate::api::backoff::Backoff;
use crate::api::watch::{Failure, Seen, Watch};
use crate::api::{self, REQUEST_TIMEOUT};
use crate::ids::NamespacedName;
use crate::objects::{ObjectError, ObjectRef};

/// How long a caller waits for the first answer.
const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// How long an answer is good for where the node does not say.
const TIME_TO_LIVE: Duration = Duration::from_secs(60);
/// The node's annotation that says so, which the cluster sets by its size.
const TTL: &str = "node.alpha.kubernetes.io/ttl";

/// How changes of ConfigMaps and Secrets are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// The API server tells of them (`Watch`).
    Watch,
    /// Asked anew when an answer is too old, or for a new pod (`Cache`).
    Cache,
    /// Asked whenever it is needed, and so often for pods that run (`Get`).
    Get(Duration),
}

fn time_to_live(node: Option<&Node>) -> Duration {
    let told = node.and_then(|node| node.metadata.annotations.as_ref()?.get(TTL)?.parse().ok());
    // Zero is for small clusters, and is not meant to be all the time.
    told.map_or(TIME_TO_LIVE, |seconds: u64| Duration::from_secs(seconds.max(1)))
}

/// What a watch of one object knows.
#[derive(Clone)]
pub(super) enum Known<K> {
    Nothing,
    Failed(ObjectError),
    Value(Option<Arc<K>>),
}

/// The watch of one object.
pub(super) struct One<K> {
    pub(super) key: NamespacedName,
    pub(super) reference: ObjectRef,
    pub(super) kind: &'static str,
    pub(super) before: Option<Arc<K>>,
    pub(super) tx: watch::Sender<Known<K>>,
    pub(super) changes: broadcast::Sender<ObjectRef>,
    pub(super) store: Store,
}

impl<K> One<K>
where
    K: Resource + Clone + serde::Serialize + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    /// Looks for ever, in the way of `look`; `node` tells how long an answer is good for, `again` that
    /// somebody wants to know sooner.
    pub(super) async fn run(
        self,
        objects: kube::Api<K>,
        look: Look,
        node: watch::Receiver<Option<Arc<Node>>>,
        again: Arc<Notify>,
    ) {
        if look != Look::Watch {
            return self.poll(objects, look, node, again).await;
        }
        // The Node authorizer learns of a new pod a moment after we do: be quick at first.
        let backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(30));
        let fields = format!("metadata.name={}", self.key.name);
        let mut watch = Watch::with_backoff(objects, &fields, backoff);
        let mut listed = None;
        loop {
            match watch.next().await {
                Seen::Restarted => listed = None,
                Seen::Listed(object) => listed = Some(object),
                Seen::Complete => self.tell(listed.take()),
                Seen::Applied(object) => self.tell(Some(object)),
                Seen::Deleted(_) => self.tell(None),
                Seen::Failed(failure) => self.fail(failure),
            }
        }
    }

    async fn poll(
        self,
        objects: kube::Api<K>,
        look: Look,
        node: watch::Receiver<Option<Arc<Node>>>,
        again: Arc<Notify>,
    ) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(30));
        loop {
            let what = format!("get {} {}", self.kind, self.key);
            let got = api::timed(what, REQUEST_TIMEOUT, objects.get_opt(&self.key.name)).await;
            let wait = match got {
                Ok(object) => {
                    self.tell(object);
                    backoff.reset();
                    match look {
                        Look::Get(every) => every,
                        Look::Cache | Look::Watch => time_to_live(node.borrow().as_deref()),
                    }
                }
                Err(error) => {
                    let forbidden = error.code() == Some(403);
                    self.fail(Failure { forbidden, message: error.to_string() });
                    backoff.next_delay()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = again.notified() => {}
            }
        }
    }

    fn tell(&self, mut object: Option<K>) {
        if let Some(object) = &mut object {
            object.meta_mut().managed_fields = None;
        }
        let version = |k: &K| k.meta().resource_version.clone();
        let same = match (&*self.tx.borrow(), &object) {
            (Known::Value(Some(old)), Some(new)) => version(old) == version(new),
            (Known::Value(None), None) => true,
            _ => false,
        };
        if same {
            return;
        }
        match &object {
            Some(object) => self.store.put(&self.key.to_string(), object),
            None => self.store.remove(&self.key.to_string()),
        }
        self.tx.send_replace(Known::Value(object.map(Arc::new)));
        // Nobody listening is fine.
        let _ = self.changes.send(self.reference.clone());
    }

    fn fail(&self, failure: Failure) {
        if matches!(&*self.tx.borrow(), Known::Value(_)) {
            return;
        }
        let (kind, key, cause) = (self.kind, self.key.clone(), failure.message);
        let error = match (failure.forbidden, &self.before) {
            (false, Some(before)) => {
                self.tx.send_replace(Known::Value(Some(before.clone())));
                return;
            }
            (true, _) => ObjectError::Forbidden { kind, key, cause },
            (false, None) => ObjectError::Unavailable { kind, key, cause },
        };
        self.tx.send_replace(Known::Failed(error));
    }
}

/// The first answer of a watch; a failure counts only when time is up.
pub(super) async fn answer<K>(
    mut rx: watch::Receiver<Known<K>>,
    kind: &'static str,
    key: &NamespacedName,
) -> Result<Option<Arc<K>>, ObjectError> {
    let wait = rx.wait_for(|known| matches!(known, Known::Value(_)));
    if let Ok(Ok(known)) = tokio::time::timeout(FIRST_ANSWER, wait).await
        && let Known::Value(value) = &*known
    {
        return Ok(value.clone());
    }
    match &*rx.borrow() {
        Known::Failed(error) => Err(error.clone()),
        Known::Value(value) => Ok(value.clone()),
        Known::Nothing => Err(ObjectError::Unavailable {
            kind,
            key: key.clone(),
            cause: format!("no answer within {} s", FIRST_ANSWER.as_secs()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cluster_says_how_long_an_answer_is_good_for() {
        let mut node = Node::default();
        assert_eq!(time_to_live(None), TIME_TO_LIVE);
        assert_eq!(time_to_live(Some(&node)), TIME_TO_LIVE);
        for (told, seconds) in [("15", 15), ("0", 1), ("x", 60)] {
            node.metadata.annotations = Some([(TTL.to_owned(), told.to_owned())].into());
            assert_eq!(time_to_live(Some(&node)).as_secs(), seconds, "{told}");
        }
    }
}
