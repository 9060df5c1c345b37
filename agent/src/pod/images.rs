//! Images for containers: is it here, may it be pulled, with whose credentials.

mod credentials;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use cri_shim::api;
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, ObjectReference, Pod};
use tokio::sync::{Mutex, Semaphore};

use super::facts::ReadyImage;
use super::image_name::{ImageName, parse_image};
use super::keyring::Credential;
use super::spec::spec_of;
use crate::credential::Providers;
use crate::metrics::METRICS;
use crate::node_context::{NodeContext, PullLimits};
use crate::objects::Objects;
use crate::report::{EventSink, EventType};
use crate::runtime::{Runtime, RuntimeError};
use credentials::Credentials;

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
    events: Arc<dyn EventSink>,
    credentials: Credentials,
    slots: Option<Semaphore>,
    rate: Option<Mutex<Bucket>>,
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
        providers: Arc<Providers>,
    ) -> Self {
        let PullLimits { serialize, max_parallel, registry_qps, registry_burst } = node.pull;
        let slots = if serialize { Some(1) } else { max_parallel };
        let burst = f64::from(registry_burst.max(1));
        Self {
            runtime,
            credentials: Credentials::new(&node.root_dir, objects, events.clone(), providers),
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
        // Before the pull has a slot: a provider that hangs must not hold up other pulls.
        let credentials = self.credentials.of(pod, &name, regarding).await;
        let (pulled, took) = self.pull(&name, credentials).await;
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

    /// Pulls with one credential after the other until one opens.
    async fn pull(
        &self,
        name: &ImageName,
        credentials: Vec<Credential>,
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
            credentials.into_iter().map(|credential| Some(credential.auth)).collect();
        if tries.is_empty() {
            tries.push(None);
        }
        let mut errors: Vec<RuntimeError> = Vec::new();
        for auth in tries {
            match self.pull_with(name, auth).await {
                Ok(image) => return (Ok(image), begun.elapsed()),
                Err(error) => errors.push(error),
            }
        }
        (Err(aggregate(errors)), begun.elapsed())
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
}

/// Errors of several tries as one: `[a, b]`, each once, as kubelet's are told.
fn aggregate(errors: Vec<RuntimeError>) -> RuntimeError {
    let mut messages: Vec<&str> = Vec::new();
    for error in &errors {
        if !messages.contains(&error.message.as_str()) {
            messages.push(&error.message);
        }
    }
    let message = match &messages[..] {
        [one] => (*one).to_owned(),
        all => format!("[{}]", all.join(", ")),
    };
    let kind = errors.last().map_or(crate::runtime::RuntimeErrorKind::Failed, |error| error.kind);
    RuntimeError { verb: "PullImage", kind, message }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_several_tries_are_told_once_each() {
        let error = |message: &str| RuntimeError {
            verb: "PullImage",
            kind: crate::runtime::RuntimeErrorKind::Failed,
            message: message.to_owned(),
        };
        assert_eq!(aggregate(vec![error("denied")]).message, "denied");
        assert_eq!(aggregate(vec![error("a"), error("a")]).message, "a");
        assert_eq!(aggregate(vec![error("a"), error("b"), error("a")]).message, "[a, b]");
    }
}
