//! What a list-and-watch of very many objects has told.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher as _, RandomState};

use kube::Resource;
use proxy::object::NamespacedName as ProxyKey;

use crate::cluster::store::Store;

/// What a list-and-watch has told, as keyed hashes of keys and of versions: there are tens of
/// thousands, each kept in full elsewhere. That two of 100,000 keys meet has odds of 1 to 3 billion.
#[derive(Default)]
pub(super) struct List {
    hasher: RandomState,
    held: HashMap<u64, Option<u64>>,
    listed: HashSet<u64>,
    pub(super) told: bool,
}

impl List {
    pub(super) fn restart(&mut self) {
        self.listed.clear();
    }

    fn hash(&self, namespace: &str, name: &str) -> u64 {
        self.hasher.hash_one((namespace, name))
    }

    fn hash_of<K: Resource>(&self, object: &K) -> u64 {
        let meta = object.meta();
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        self.hash(namespace, meta.name.as_deref().unwrap_or_default())
    }

    /// Notes `object`; whether it is news.
    pub(super) fn note<K: Resource>(&mut self, object: &K) -> bool {
        let hash = self.hash_of(object);
        let version = object.meta().resource_version.as_deref();
        let version = version.map(|version| self.hasher.hash_one(version));
        self.listed.insert(hash);
        let before = self.held.insert(hash, version);
        version.is_none() || before != Some(version)
    }

    /// Notes an object from disk: the next time it is seen it is news.
    pub(super) fn recall<K: Resource>(&mut self, object: &K) {
        self.held.insert(self.hash_of(object), None);
    }

    pub(super) fn forget(&mut self, key: &ProxyKey) {
        self.held.remove(&self.hash(&key.namespace, &key.name));
    }

    /// Ends a list: what it did not name is forgotten, also by the `store`, and returned.
    pub(super) fn complete(&mut self, store: &Store) -> Vec<ProxyKey> {
        self.told = true;
        let listed = std::mem::take(&mut self.listed);
        self.held.retain(|hash, _| listed.contains(hash));
        self.held.shrink_to_fit();
        let gone = store.keep(|text| {
            text.split_once('/')
                .is_some_and(|(space, name)| self.held.contains_key(&self.hash(space, name)))
        });
        gone.iter()
            .filter_map(|text| text.split_once('/'))
            .map(|(namespace, name)| ProxyKey { namespace: namespace.into(), name: name.into() })
            .collect()
    }
}

pub(super) fn text(key: &ProxyKey) -> String {
    format!("{}/{}", key.namespace, key.name)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Service;

    use super::*;
    use crate::source::proxy_object::key;

    fn service(name: &str, version: &str) -> Service {
        let mut service = Service::default();
        service.metadata.namespace = Some("n".into());
        service.metadata.name = Some(name.into());
        service.metadata.resource_version = Some(version.into());
        service
    }

    #[test]
    fn a_list_tells_what_is_news_and_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "services");
        let mut list = List::default();
        for name in ["a", "b", "c"] {
            store.put(&format!("n/{name}"), &service(name, "1"));
            assert!(list.note(&service(name, "1")));
        }
        assert!(list.complete(&store).is_empty());
        list.restart();
        assert!(!list.note(&service("a", "1")) && list.note(&service("b", "2")));
        let gone = list.complete(&store);
        assert_eq!(gone.iter().map(text).collect::<Vec<_>>(), ["n/c"]);
        // What was gone is news when it is back; so is all that only the disk told of.
        assert!(list.note(&service("c", "1")));
        list.recall(&service("a", "1"));
        assert!(list.note(&service("a", "1")));
        list.forget(&key(&service("b", "2").metadata));
        assert!(list.note(&service("b", "2")));
    }
}
