//! Identities as types, so that a UID is never taken for a name.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

/// The UID of one pod object. A static pod's UID is derived from its manifest; a pod of the API
/// brings its own. Two pods of the same name, one after the other, differ in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(pub Arc<str>);

impl PodUid {
    /// The UID as Kubernetes writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The UID of `pod`; empty where the object has none (a source never hands out such a pod).
    pub fn of(pod: &Pod) -> Self {
        Self(pod.metadata.uid.as_deref().unwrap_or_default().into())
    }
}

impl From<&str> for PodUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `namespace/name` of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedName {
    /// Namespace; never empty.
    pub namespace: Arc<str>,
    /// Object name.
    pub name: Arc<str>,
}

impl NamespacedName {
    /// The key of an object `name` in `namespace`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The key of `pod`; the namespace defaults to `default`.
    pub fn of_pod(pod: &Pod) -> Self {
        Self::new(
            pod.metadata.namespace.as_deref().unwrap_or("default"),
            pod.metadata.name.as_deref().unwrap_or_default(),
        )
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
