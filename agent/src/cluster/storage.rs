//! Claims (of volumes, of devices) and what is behind them, as the API server has them, and as it last
//! had them.
//!
//! A node may get these objects one by one, and no more; they are asked for when a pod is set up.
//! What was answered is kept, so that a pod's containers are started again while the control plane
//! is away.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kube::Resource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::objects::object_error;
use super::store::Store;
use crate::api::backoff::Backoff;
use crate::api::{self, Api, REQUEST_TIMEOUT};
use crate::ids::NamespacedName;
use crate::objects::ObjectError;

/// Objects that are kept; a node has some hundred volumes at most.
const MAX_KEPT: usize = 2048;
/// A refusal is tried again so often before it counts.
const REFUSALS: u32 = 5;

/// Objects of storage, with what was last known of them.
pub(super) struct Storage {
    api: Api,
    store: Store,
    kept: Mutex<HashMap<String, Value>>,
}

impl Storage {
    pub(super) fn new(api: Api, store: Store) -> Self {
        let kept = store.load::<(String, Value)>().into_iter().flatten().collect();
        Self { api, store, kept: Mutex::new(kept) }
    }

    /// The object `name` of the whole cluster; `None` if it does not exist.
    pub(super) async fn get_of_cluster<K>(
        &self,
        kind: &'static str,
        name: &str,
    ) -> Result<Option<Arc<K>>, ObjectError>
    where
        K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
    {
        let objects = kube::Api::all(self.api.objects.clone());
        self.get(kind, &NamespacedName::new("", name), &objects).await
    }

    /// The object `key` of `objects`; `None` if it does not exist.
    pub(super) async fn get<K>(
        &self,
        kind: &'static str,
        key: &NamespacedName,
        objects: &kube::Api<K>,
    ) -> Result<Option<Arc<K>>, ObjectError>
    where
        K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
    {
        let kept_as = format!("{kind} {key}");
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        let mut refusals = 0;
        let found = loop {
            let what = format!("get {kept_as}");
            match api::timed(what, REQUEST_TIMEOUT, objects.get_opt(&key.name)).await {
                // The Node authorizer learns of a new pod a moment after we do.
                Err(error) if error.code() == Some(403) && refusals < REFUSALS => {
                    refusals += 1;
                    tokio::time::sleep(backoff.next_delay()).await;
                }
                other => break other,
            }
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match found {
            Ok(Some(mut object)) => {
                object.meta_mut().managed_fields = None;
                if let Ok(value) = serde_json::to_value(&object)
                    && kept.get(&kept_as) != Some(&value)
                {
                    if kept.len() >= MAX_KEPT
                        && let Some(other) = kept.keys().next().cloned()
                    {
                        kept.remove(&other);
                        self.store.remove(&other);
                    }
                    self.store.put(&kept_as, &(&kept_as, &value));
                    kept.insert(kept_as, value);
                }
                Ok(Some(Arc::new(object)))
            }
            Ok(None) => {
                if kept.remove(&kept_as).is_some() {
                    self.store.remove(&kept_as);
                }
                Ok(None)
            }
            // Nobody answers: what was so is taken to be so.
            Err(error) => match kept.get(&kept_as) {
                Some(value) if error.code().is_none() => {
                    let object = serde_json::from_value(value.clone()).map(Arc::new);
                    object.map(Some).map_err(|_| object_error(kind, key, &error))
                }
                _ => Err(object_error(kind, key, &error)),
            },
        }
    }
}
