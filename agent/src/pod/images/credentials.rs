//! The credentials that a pod may pull an image with: of its `imagePullSecrets`, of the node's docker
//! configuration, of credential providers; tried in this order, as kubelet tries them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};

use super::super::image_name::ImageName;
use super::super::keyring::{Credential, Keyring};
use super::super::spec::spec_of;
use crate::credential::Providers;
use crate::ids::NamespacedName;
use crate::objects::Objects;
use crate::report::{EventSink, EventType};

/// Where credentials come from.
pub(super) struct Credentials {
    objects: Arc<dyn Objects>,
    events: Arc<dyn EventSink>,
    providers: Arc<Providers>,
    node_files: NodeFiles,
}

impl Credentials {
    pub(super) fn new(
        root_dir: &Path,
        objects: Arc<dyn Objects>,
        events: Arc<dyn EventSink>,
        providers: Arc<Providers>,
    ) -> Self {
        let home = std::env::home_dir().filter(|home| home.is_absolute());
        let node_files = NodeFiles::of(root_dir, std::env::current_dir().ok(), home);
        Self { objects, events, providers, node_files }
    }

    /// What to try for `image`, in order.
    pub(super) async fn of(
        &self,
        pod: &Pod,
        image: &ImageName,
        regarding: &ObjectReference,
    ) -> Vec<Credential> {
        let mut found = self.of_secrets(pod, regarding).await.lookup(image);
        found.extend(self.node_files.read().await.lookup(image));
        let mut provided = Keyring::default();
        for (logins, source) in self.providers.lookup(&image.repository, pod, &*self.objects).await
        {
            provided.add_logins(&logins, &source);
        }
        found.extend(provided.lookup(image));
        found
    }

    async fn of_secrets(&self, pod: &Pod, regarding: &ObjectReference) -> Keyring {
        let mut keyring = Keyring::default();
        let namespace = NamespacedName::of_pod(pod).namespace;
        let mut missing = Vec::new();
        for reference in spec_of(pod).image_pull_secrets.iter().flatten() {
            let key = NamespacedName::new(&namespace, &reference.name);
            match self.objects.secret(&key).await {
                Ok(Some(secret)) => {
                    if let Err(error) = keyring.add_secret(&secret) {
                        tracing::warn!(pod = %NamespacedName::of_pod(pod), %error, "pull secret");
                        missing.push(reference.name.clone());
                    }
                }
                Ok(None) => missing.push(reference.name.clone()),
                Err(error) => {
                    tracing::warn!(secret = %key, %error, "pull secret");
                    missing.push(reference.name.clone());
                }
            }
        }
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            self.events.record(
                ObjectReference { field_path: None, ..regarding.clone() },
                EventType::Warning,
                "FailedToRetrieveImagePullSecret",
                message,
            );
        }
        keyring
    }
}

/// Where kubelet looks for docker configuration of the node; the first file that is one counts.
struct NodeFiles {
    /// `config.json`, with `auths`.
    current: Vec<PathBuf>,
    /// `.dockercfg`, without.
    legacy: Vec<PathBuf>,
}

impl NodeFiles {
    fn of(root_dir: &Path, working: Option<PathBuf>, home: Option<PathBuf>) -> Self {
        let docker = |dir: &PathBuf| dir.join(".docker");
        let root = PathBuf::from("/");
        let near = || [Some(root_dir.to_owned()), working.clone()].into_iter().flatten();
        let current = near().chain(home.as_ref().map(docker)).chain([docker(&root)]);
        let legacy = near().chain(home.clone()).chain([root.clone()]);
        Self {
            current: current.map(|dir| dir.join("config.json")).collect(),
            legacy: legacy.map(|dir| dir.join(".dockercfg")).collect(),
        }
    }

    async fn read(&self) -> Keyring {
        let mut keyring = Keyring::default();
        type Add = fn(&mut Keyring, &[u8]) -> Option<()>;
        for (paths, add) in
            [(&self.current, Keyring::add_config as Add), (&self.legacy, Keyring::add_legacy)]
        {
            for path in paths {
                let Ok(text) = tokio::fs::read(path).await else { continue };
                if add(&mut keyring, &text).is_some() {
                    return keyring;
                }
                tracing::warn!(path = %path.display(), "not valid docker configuration");
            }
        }
        keyring
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::image_name::parse_image;

    #[tokio::test]
    async fn the_first_of_the_nodes_files_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (root, home) = (dir.path().join("kubelet"), dir.path().join("home"));
        std::fs::create_dir_all(home.join(".docker")).unwrap();
        std::fs::create_dir_all(&root).unwrap();
        let files = NodeFiles::of(&root, None, Some(home.clone()));
        let user = async || {
            let found = files.read().await.lookup(&parse_image("test.invalid/a").unwrap());
            found.into_iter().map(|c| c.auth.username).collect::<Vec<_>>()
        };
        let entry =
            |user: &str| format!(r#"{{"test.invalid":{{"username":"{user}","password":"p"}}}}"#);
        let config = |user: &str| format!(r#"{{"auths":{}}}"#, entry(user));
        std::fs::write(home.join(".dockercfg"), entry("legacy")).unwrap();
        assert_eq!(user().await, ["legacy"]);
        std::fs::write(home.join(".docker/config.json"), config("home")).unwrap();
        assert_eq!(user().await, ["home"]);
        std::fs::write(root.join("config.json"), "{").unwrap();
        assert_eq!(user().await, ["home"], "what is none is passed over");
        std::fs::write(root.join("config.json"), config("root")).unwrap();
        assert_eq!(user().await, ["root"]);
    }
}
