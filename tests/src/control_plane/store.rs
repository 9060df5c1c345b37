//! The objects and their history: what etcd is to an API server. Plain data behind one lock; a
//! watch is a cursor into the log, so that nothing can be missed or told twice.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use super::error::ApiError;
use super::resources::Resource;
use super::selector::Selector;

/// `namespace` (empty for cluster-wide objects) and name.
pub type Key = (String, String);

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Created.
    Added,
    /// Updated.
    Modified,
    /// Removed.
    Deleted,
}

impl Change {
    /// The watch event's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// One entry of the history.
#[derive(Debug)]
pub struct LogEntry {
    /// The store's version that this write made.
    pub version: u64,
    /// Which kind.
    pub resource: &'static Resource,
    /// What happened.
    pub change: Change,
    /// The object after it (for a deletion: its last state with the deletion's version).
    pub object: Arc<Value>,
    /// The object before it.
    pub previous: Option<Arc<Value>>,
}

#[derive(Default)]
struct Inner {
    version: u64,
    compacted: u64,
    objects: HashMap<&'static str, BTreeMap<Key, Arc<Value>>>,
    log: Vec<Arc<LogEntry>>,
}

/// The store. It outlives the server in front of it, so that a restart keeps the state.
pub struct Store {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

/// What a write function decides.
pub enum Write {
    /// Store this.
    Put(Value),
    /// Remove the object; this is its last state.
    Remove(Value),
    /// Leave it.
    Keep,
}

/// A consistent list.
pub struct Listed {
    /// Objects in key order.
    pub items: Vec<Arc<Value>>,
    /// The version it shows.
    pub version: u64,
    /// Key of the last object, if a limit cut the list.
    pub next: Option<Key>,
    /// How many come after the cut.
    pub remaining: usize,
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// An empty store. Versions start above 0, which has a meaning of its own in requests.
    pub fn new() -> Self {
        let inner = Inner { version: 1, compacted: 1, ..Inner::default() };
        Self { inner: Mutex::new(inner), changed: watch::Sender::new(1) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current version.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// Wakes at every write.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Forgets the history: every watch, running or resumed from before, and every exact list of
    /// before gets 410.
    pub fn compact(&self) -> u64 {
        let mut inner = self.lock();
        inner.version += 1;
        inner.compacted = inner.version;
        inner.log.clear();
        let version = inner.version;
        drop(inner);
        self.changed.send_replace(version);
        version
    }

    /// Makes a version without a change, as a write to an unserved kind would: wakes everybody.
    pub fn touch(&self) {
        let mut inner = self.lock();
        inner.version += 1;
        let version = inner.version;
        drop(inner);
        self.changed.send_replace(version);
    }

    /// One object.
    pub fn get(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
    ) -> Option<Arc<Value>> {
        let key = (namespace.to_owned(), name.to_owned());
        self.lock().objects.get(resource.plural)?.get(&key).cloned()
    }

    /// All objects of a kind now, in every namespace where `namespace` is empty.
    pub fn all(&self, resource: &'static Resource, namespace: &str) -> Vec<Arc<Value>> {
        self.lock()
            .objects
            .get(resource.plural)
            .into_iter()
            .flatten()
            .filter(|(key, _)| namespace.is_empty() || key.0 == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// A list as it was at `at` (now, if `None`), after key `after`, at most `limit` objects.
    ///
    /// # Errors
    /// 410 when `at` is compacted, 504 when it is in the future.
    pub fn list(
        &self,
        resource: &'static Resource,
        namespace: &str,
        selector: &Selector,
        at: Option<u64>,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Listed, ApiError> {
        let inner = self.lock();
        let version = at.unwrap_or(inner.version);
        if version > inner.version {
            return Err(ApiError::too_large_resource_version(version, inner.version));
        }
        if version < inner.compacted {
            return Err(ApiError::expired(
                "The provided continue parameter or resourceVersion is too old to display a consistent list result.",
            ));
        }
        let mut objects = inner.objects.get(resource.plural).cloned().unwrap_or_default();
        for entry in inner.log.iter().rev().take_while(|e| e.version > version) {
            if entry.resource == resource {
                match &entry.previous {
                    Some(previous) => objects.insert(key_of(previous), previous.clone()),
                    None => objects.remove(&key_of(&entry.object)),
                };
            }
        }
        drop(inner);
        let mut matching = objects.into_iter().filter(|(key, object)| {
            (namespace.is_empty() || key.0 == namespace)
                && after.is_none_or(|after| key > after)
                && selector.matches(object)
        });
        let mut items = Vec::new();
        let mut last = None;
        for (key, object) in matching.by_ref() {
            items.push(object);
            last = Some(key);
            if items.len() == limit {
                break;
            }
        }
        let remaining = matching.count();
        let next = if remaining > 0 { last } else { None };
        Ok(Listed { items, version, next, remaining })
    }

    /// The entries after `cursor` of one kind, and the cursor that has seen them.
    ///
    /// # Errors
    /// 410 when some of them are compacted.
    pub fn since(
        &self,
        resource: &'static Resource,
        cursor: u64,
    ) -> Result<(Vec<Arc<LogEntry>>, u64), ApiError> {
        let inner = self.lock();
        if cursor < inner.compacted {
            return Err(ApiError::expired(format!(
                "too old resource version: {cursor} ({})",
                inner.compacted
            )));
        }
        let from = inner.log.partition_point(|e| e.version <= cursor);
        let entries =
            inner.log[from..].iter().filter(|e| e.resource == resource).cloned().collect();
        Ok((entries, inner.version.max(cursor)))
    }

    /// Reads an object, lets `decide` say what becomes of it, and writes that: all under one lock.
    /// A write that changes nothing makes no version. Returns the object as stored.
    ///
    /// # Errors
    /// What `decide` returns; nothing is written then.
    pub fn write(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
        decide: impl FnOnce(Option<&Arc<Value>>) -> Result<Write, ApiError>,
    ) -> Result<Arc<Value>, ApiError> {
        let key = (namespace.to_owned(), name.to_owned());
        let mut inner = self.lock();
        let previous = inner.objects.get(resource.plural).and_then(|m| m.get(&key)).cloned();
        let (mut object, removed) = match decide(previous.as_ref())? {
            Write::Keep => return previous.ok_or_else(|| ApiError::not_found(resource, name)),
            Write::Put(object) => (object, false),
            Write::Remove(object) => (object, true),
        };
        if !removed && previous.as_deref() == Some(&object) {
            return previous.ok_or_else(|| ApiError::not_found(resource, name));
        }
        inner.version += 1;
        let version = inner.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let object = Arc::new(object);
        let map = inner.objects.entry(resource.plural).or_default();
        let change = if removed {
            map.remove(&key);
            Change::Deleted
        } else {
            map.insert(key, object.clone());
            if previous.is_some() { Change::Modified } else { Change::Added }
        };
        inner.log.push(Arc::new(LogEntry {
            version,
            resource,
            change,
            object: object.clone(),
            previous,
        }));
        drop(inner);
        self.changed.send_replace(version);
        Ok(object)
    }
}

/// The key of a stored object.
pub fn key_of(object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::resources::known;
    use super::*;

    fn put(store: &Store, name: &str, data: u32) -> u64 {
        let object = json!({"metadata": {"namespace": "d", "name": name}, "data": data});
        let stored =
            store.write(known("configmaps"), "d", name, |_| Ok(Write::Put(object))).unwrap();
        stored["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
    }

    #[test]
    fn shows_any_version_until_it_is_compacted() {
        let store = Store::new();
        let kind = known("configmaps");
        let first = put(&store, "a", 1);
        put(&store, "b", 1);
        let third = put(&store, "a", 2);
        store.write(kind, "d", "b", |old| Ok(Write::Remove((**old.unwrap()).clone()))).unwrap();
        let names = |at| {
            let listed = store.list(kind, "", &Selector::default(), at, None, 0).unwrap();
            listed
                .items
                .iter()
                .map(|o| (key_of(o).1, o["data"].as_u64().unwrap()))
                .collect::<Vec<_>>()
        };
        assert_eq!(names(Some(first)), [("a".into(), 1)]);
        assert_eq!(names(Some(third)), [("a".into(), 2), ("b".into(), 1)]);
        assert_eq!(names(None), [("a".into(), 2)]);
        let (entries, cursor) = store.since(kind, first).unwrap();
        assert_eq!(
            entries.iter().map(|e| e.change).collect::<Vec<_>>(),
            [Change::Added, Change::Modified, Change::Deleted]
        );
        assert_eq!(cursor, store.version());
        store.compact();
        assert_eq!(store.since(kind, first).unwrap_err().code, 410);
        assert_eq!(store.since(kind, cursor).unwrap_err().code, 410);
        assert!(store.since(kind, store.version()).unwrap().0.is_empty());
        assert_eq!(
            store.list(kind, "", &Selector::default(), Some(first), None, 0).err().unwrap().code,
            410
        );
    }
}
