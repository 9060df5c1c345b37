//! Configuration: flags over `--config` documents over defaults, resolved once into `NodeConfig`.
//!
//! Floor 1: `resolve` is a pure function of what was given; reading the file is the caller's.

mod behaviour;
mod configz;
mod documents;
mod fields;
mod garbage;
mod kube_proxy;
mod kubelet;
mod longshore;
mod node;
pub mod node_api;
mod numa;
mod proxy;
mod proxy_pages;
mod pulls;
mod quantity;
mod resources;
mod shutdown;
pub mod tracing;
mod volumes;

#[cfg(test)]
pub(crate) use documents::has_kubelet_field;
pub use documents::{Documents, merge, parse};
pub(crate) use fields::{is_dns1123_label, is_dns1123_subdomain};
pub use kube_proxy::KubeProxyConfiguration;
pub use kubelet::KubeletConfiguration;
pub use longshore::{LongshoreConfiguration, RuntimeHandler};
pub use node::{CgroupDriver, Host, NodeConfig, Parts, resolve};
pub use node_api::NodeApiConfig;
pub use numa::{NumaConfig, Scope};
pub use proxy_pages::ProxyPages;
pub use quantity::{Threshold, parse_bytes};
pub use resources::{MemoryQos, ResourceConfig};
pub use volumes::VolumeGates;

/// Something in the configuration that an operator should know, without stopping the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A known field that changes nothing here.
    Inert {
        /// Kind of the document and path of the field.
        field: String,
    },
    /// A field that asks for a behaviour that is not built.
    NotBuilt {
        /// Kind of the document and path of the field.
        field: String,
        /// The value asked for.
        value: String,
    },
    /// A field that asks for something that cannot be had here, or that nothing depends on.
    NoEffect {
        /// Kind of the document and path of the field.
        field: String,
        /// The value asked for.
        value: String,
        /// Why.
        reason: &'static str,
    },
}

impl Note {
    /// Kind of the document and path of the field.
    pub fn field(&self) -> &str {
        match self {
            Self::Inert { field } | Self::NotBuilt { field, .. } | Self::NoEffect { field, .. } => {
                field
            }
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file is not YAML.
    #[error("configuration document {document}: {cause}")]
    Syntax {
        /// Counted from 1.
        document: usize,
        /// What the parser said, with the line.
        cause: String,
    },
    /// The document is of a kind that means nothing here.
    #[error(
        "configuration document {document}: kind {kind:?} of apiVersion {api_version:?} is unknown; expected \
         KubeletConfiguration (kubelet.config.k8s.io/v1beta1), KubeProxyConfiguration \
         (kubeproxy.config.k8s.io/v1alpha1) or LongshoreConfiguration (longshore.io/v1alpha1)"
    )]
    UnknownKind {
        /// Counted from 1.
        document: usize,
        /// As written.
        kind: String,
        /// As written.
        api_version: String,
    },
    /// Two documents of one kind.
    #[error("configuration document {document}: a second {kind}; merge them into one")]
    Repeated {
        /// Counted from 1.
        document: usize,
        /// Its kind.
        kind: &'static str,
    },
    /// No version of the kind has this field.
    #[error("{kind}: unknown field {field:?}{}", suggestion.as_ref().map(|s| format!("; did you mean {s:?}?")).unwrap_or_default())]
    UnknownField {
        /// Kind of the document.
        kind: &'static str,
        /// As written.
        field: String,
        /// A field of a similar name.
        suggestion: Option<&'static str>,
    },
    /// The value cannot be used.
    #[error("{field}: {reason}")]
    Invalid {
        /// Kind and field, or the flag.
        field: String,
        /// What is wrong and what is expected.
        reason: String,
    },
}

impl ConfigError {
    pub(crate) fn invalid(field: impl Into<String>, reason: impl ToString) -> Self {
        Self::Invalid { field: field.into(), reason: reason.to_string() }
    }
}
