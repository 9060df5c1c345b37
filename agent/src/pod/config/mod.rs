//! From a pod's spec to the sandbox and container configurations of the CRI. Pure: what must be
//! fetched (ConfigMaps, Secrets, the node's resolver) is an argument.

pub mod container;
pub mod dns;
pub mod downward;
pub mod env;
pub mod expand;
pub mod hosts;
pub mod resources;
pub mod sandbox;
pub mod security;

/// Why no configuration can be made of a container or pod. Kubelet's `CreateContainerConfigError`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A ConfigMap or Secret that is needed does not exist.
    #[error("{kind} \"{name}\" not found")]
    Missing {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A key that is needed is not in the object.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    MissingKey {
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// Namespace of the object.
        namespace: String,
        /// Name of the object.
        name: String,
        /// The key.
        key: String,
    },
    /// An object could not be read.
    #[error("{0}")]
    Unreadable(String),
    /// A downward API path that means nothing.
    #[error("unsupported fieldPath: {0}")]
    FieldPath(String),
    /// A resource that the container does not have.
    #[error("unsupported container resource: {0}")]
    Resource(String),
    /// `runAsNonRoot` is violated.
    #[error("{0}")]
    RunsAsRoot(String),
    /// A value that cannot be used.
    #[error("{0}")]
    Invalid(String),
}
