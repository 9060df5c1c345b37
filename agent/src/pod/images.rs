//! Images for containers: is it here, may it be pulled, with whose credentials.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use cri_shim::api;
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, ObjectReference, Pod};
use tokio::sync::{Mutex, Semaphore};

use super::facts::ReadyImage;
use super::image_name::{ImageName, parse_image};
use super::keyring::Keyring;
use super::spec::spec_of;
use crate::ids::NamespacedName;
use crate::metrics::METRICS;
use crate::node_context::{NodeContext, PullLimits};
use crate::objects::Objects;
use crate::report::{EventSink, EventType};
use crate::runtime::{Runtime, RuntimeError};

/// Why an image is not there, in kubelet's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct ImageFailure {
    /// `ErrImagePull`, `ErrImageNeverPull`, `InvalidImageName`, `ImageInspectError`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// Brings images to the node.
pub struct Images {
    runtime: Arc<dyn Runtime>,
    objects: Arc<dyn Objects>,
    events: Arc<dyn EventSink>,
    slots: Option<Semaphore>,
    rate: Option<Mutex<Bucket>>,
    node_config: PathBuf,
}

/// `registryPullQPS` with its burst.
struct Bucket {
    tokens: f64,
    filled: tokio::time::Instant,
    per_second: f64,
    burst: f64,
}

impl Bucket {
    async fn take(&mut self) {
        let now = tokio::time::Instant::now();
        let since = now.duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + since * self.per_second).min(self.burst);
        self.filled = now;
        if self.tokens < 1.0 {
            let wait = (1.0 - self.tokens) / self.per_second;
            tokio::time::sleep(std::time::Duration::from_secs_f64(wait)).await;
            self.filled = tokio::time::Instant::now();
            self.tokens = 1.0;
        }
        self.tokens -= 1.0;
    }
}

/// What the pod says of pulling, or what follows from the tag.
fn pull_policy<'a>(asked: Option<&'a str>, name: &ImageName) -> &'a str {
    match asked {
        Some(policy) if !policy.is_empty() => policy,
        _ if name.latest => "Always",
        _ => "IfNotPresent",
    }
}

impl Images {
    /// Images over `runtime`, within the node's limits.
    pub fn new(
        node: &NodeContext,
        runtime: Arc<dyn Runtime>,
        objects: Arc<dyn Objects>,
        events: Arc<dyn EventSink>,
    ) -> Self {
        let PullLimits { serialize, max_parallel, registry_qps, registry_burst } = node.pull;
        let slots = if serialize { Some(1) } else { max_parallel };
        let burst = f64::from(registry_burst.max(1));
        Self {
            runtime,
            objects,
            events,
            slots: slots.map(|n| Semaphore::new(n.max(1))),
            rate: (registry_qps > 0).then(|| {
                Mutex::new(Bucket {
                    tokens: burst,
                    filled: tokio::time::Instant::now(),
                    per_second: f64::from(registry_qps),
                    burst,
                })
            }),
            node_config: node.root_dir.join("config.json"),
        }
    }

    /// Sees that the image of `container` is on the node, and those of the image volumes it mounts.
    pub async fn ensure(
        &self,
        pod: &Pod,
        container: &Container,
        regarding: &ObjectReference,
    ) -> Result<ReadyImage, ImageFailure> {
        let image = container.image.as_deref().unwrap_or_default();
        let policy = container.image_pull_policy.as_deref();
        let mut ready = ready(self.ensure_one(pod, (image, policy), regarding).await?);
        for source in volume_images(pod, container) {
            let reference = source.reference.as_deref().unwrap_or_default();
            if !ready.volumes.contains_key(reference) {
                let policy = source.pull_policy.as_deref();
                let found = self.ensure_one(pod, (reference, policy), regarding).await?;
                ready.volumes.insert(reference.to_owned(), found.id);
            }
        }
        Ok(ready)
    }

    async fn ensure_one(
        &self,
        pod: &Pod,
        (image, policy): (&str, Option<&str>),
        regarding: &ObjectReference,
    ) -> Result<api::Image, ImageFailure> {
        let event = |kind, reason: &str, message: String| {
            self.events.record(regarding.clone(), kind, reason, message);
        };
        let failed = |reason: &'static str, message: String| {
            event(EventType::Warning, "Failed", format!("Error: {reason}"));
            ImageFailure { reason, message }
        };
        let name = parse_image(image).map_err(|error| {
            event(EventType::Warning, "InspectFailed", error.to_string());
            failed("InvalidImageName", error.to_string())
        })?;
        let policy = pull_policy(policy, &name);
        if policy != "Always" {
            let present = self.runtime.image_status(&name.full).await.map_err(|error| {
                let message = format!("Failed to inspect image \"{image}\": {error}");
                event(EventType::Warning, "InspectFailed", message.clone());
                failed("ImageInspectError", message)
            })?;
            match present {
                Some(found) => {
                    let message = format!(
                        "Container image \"{image}\" already present on machine and can be accessed by the pod"
                    );
                    event(EventType::Normal, "Pulled", message);
                    return Ok(found);
                }
                None if policy == "Never" => {
                    let message = format!(
                        "Container image \"{image}\" is not present with pull policy of Never"
                    );
                    event(EventType::Warning, "ErrImageNeverPull", message.clone());
                    return Err(failed("ErrImageNeverPull", message));
                }
                None => {}
            }
        }
        let asked = Instant::now();
        event(EventType::Normal, "Pulling", format!("Pulling image \"{image}\""));
        let (pulled, took) = self.pull(pod, &name, regarding).await;
        let found = match pulled {
            Ok(found) => found,
            Err(error) => {
                let message = error.message;
                let shown = format!("Failed to pull image \"{image}\": {message}");
                event(EventType::Warning, "Failed", shown);
                return Err(failed("ErrImagePull", message));
            }
        };
        METRICS.image_pulled(found.size, took);
        let seconds = |d: std::time::Duration| format!("{:.3}s", d.as_secs_f64());
        let message = format!(
            "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {} bytes.",
            seconds(took),
            seconds(asked.elapsed()),
            found.size
        );
        event(EventType::Normal, "Pulled", message);
        Ok(found)
    }

    async fn pull(
        &self,
        pod: &Pod,
        name: &ImageName,
        regarding: &ObjectReference,
    ) -> (Result<api::Image, RuntimeError>, std::time::Duration) {
        let _slot = match &self.slots {
            Some(slots) => slots.acquire().await.ok(),
            None => None,
        };
        if let Some(rate) = &self.rate {
            rate.lock().await.take().await;
        }
        let begun = Instant::now();
        let mut tries: Vec<Option<api::AuthConfig>> =
            self.keyring(pod, regarding).await.lookup(name).into_iter().map(Some).collect();
        if tries.is_empty() {
            tries.push(None);
        }
        let mut result = Err(RuntimeError {
            verb: "PullImage",
            kind: crate::runtime::RuntimeErrorKind::Failed,
            message: "no way to pull was tried".into(),
        });
        for auth in tries {
            result = self.pull_with(name, auth).await;
            if result.is_ok() {
                break;
            }
        }
        (result, begun.elapsed())
    }

    async fn pull_with(
        &self,
        name: &ImageName,
        auth: Option<api::AuthConfig>,
    ) -> Result<api::Image, RuntimeError> {
        let reference = self.runtime.pull_image(&name.full, auth, None).await?;
        if let Some(image) = self.runtime.image_status(&reference).await? {
            return Ok(image);
        }
        self.runtime.image_status(&name.full).await?.ok_or_else(|| RuntimeError {
            verb: "ImageStatus",
            kind: crate::runtime::RuntimeErrorKind::NotFound,
            message: format!("{} was pulled, and is not there", name.full),
        })
    }

    async fn keyring(&self, pod: &Pod, regarding: &ObjectReference) -> Keyring {
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
        if let Ok(json) = tokio::fs::read(&self.node_config).await
            && keyring.add_config(&json).is_none()
        {
            tracing::warn!(path = %self.node_config.display(), "not valid docker configuration");
        }
        keyring
    }
}

/// The sources of the image volumes that a container mounts.
fn volume_images<'a>(
    pod: &'a Pod,
    container: &'a Container,
) -> impl Iterator<Item = &'a ImageVolumeSource> {
    let mounts = container.volume_mounts.as_deref().unwrap_or_default();
    let volumes = spec_of(pod).volumes.as_deref().unwrap_or_default();
    let mounted = move |name: &str| mounts.iter().any(|mount| mount.name == name);
    volumes.iter().filter(move |v| mounted(&v.name)).filter_map(|v| v.image.as_ref())
}

fn ready(image: api::Image) -> ReadyImage {
    ReadyImage {
        image_ref: image.id,
        uid: image.uid.map(|uid| uid.value),
        username: image.username,
        volumes: BTreeMap::new(),
    }
}
