//! The watch of one object by its name, and the wait for its first answer.

use std::sync::Arc;
use std::time::Duration;

use kube::Resource;
use serde::de::DeserializeOwned;
use tokio::sync::{broadcast, watch};

use crate::api::backoff::Backoff;
use crate::api::watch::{Failure, Seen, Watch};
use crate::cluster::store::Store;
use crate::ids::NamespacedName;
use crate::objects::{ObjectError, ObjectRef};

/// How long a caller waits for the first answer of a watch.
const FIRST_ANSWER: Duration = Duration::from_secs(10);

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
    pub(super) async fn run(self, objects: kube::Api<K>) {
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
