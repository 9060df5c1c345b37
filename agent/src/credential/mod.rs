//! Credentials for registries that programs know (KEP-2133, KEP-4412): ECR, GCR, ACR and their like
//! have no passwords that last, so kubelet asks a program of theirs, and so does this node.
//!
//! `config`, `glob`, `protocol` and `cache` decide and are pure, `provider` brings them together,
//! `load` reads the configuration, `exec` runs the programs. A provider that fails costs a line in the
//! log: the pull goes on with what else there is. No credential is in any of these lines.

mod cache;
mod config;
mod exec;
pub(crate) mod glob;
mod leftover;
mod load;
mod protocol;
mod provider;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

pub use config::Provider;
pub use exec::{Exec, ExecError, Programs, Run};
pub use leftover::{end_leftovers, mark};
pub use load::{LoadError, Loaded, Places, load};
pub use protocol::{Login, Logins};

use crate::ids::NamespacedName;
use crate::objects::Objects;
use provider::Asked;

/// Whose an account is, by all its names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Account {
    /// `metadata.uid`.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Whose credentials these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Any pod's of this node.
    Node,
    /// Of those who may use this Secret.
    Secret(Account),
    /// Of those who run as this service account.
    ServiceAccount(Account),
}

/// All providers of the node, in order.
#[derive(Default)]
pub struct Providers(Vec<Asked>);

impl Providers {
    /// The configured ones, with programs in `programs` that `exec` runs.
    pub fn new(providers: Vec<Provider>, programs: &Path, exec: &Arc<dyn Exec>) -> Self {
        Self(providers.into_iter().map(|p| Asked::new(p, programs, exec.clone())).collect())
    }

    /// Logins for `image` (registry and path), in the order of providers. They are asked at the same
    /// time; one that fails is told of in the log.
    pub async fn lookup(
        &self,
        image: &str,
        pod: &Pod,
        objects: &dyn Objects,
    ) -> Vec<(Arc<Logins>, Source)> {
        let asked = self.0.iter().map(|provider| async move {
            match provider.provide(image, pod, objects).await {
                Ok(found) => found,
                Err(error) => {
                    let pod = NamespacedName::of_pod(pod);
                    tracing::warn!(provider = provider.name(), image, %pod, %error,
                        "a credential provider gave no credentials");
                    None
                }
            }
        });
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }
}
