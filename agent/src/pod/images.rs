//! Images for containers: is it here, may it be pulled, with whose credentials.

mod credentials;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cri_shim::api;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, ObjectReference, Pod};
use tokio::sync::{Mutex, Semaphore};

use super::facts::ReadyImage;
use super::image_name::{ImageName, parse_image};
use super::keyring::Credential;
use super::spec::spec_of;
use crate::credential::{Account, Providers, Source};
use crate::metrics::METRICS;
use crate::node_context::{NodeContext, PullLimits};
use crate::objects::Objects;
use crate::pulled::decide::{Check, Shown};
use crate::pulled::record::{PullAccount, PullCredentials, PullSecret};
use crate::pulled::{Intent, PullRecords};
use crate::report::{EventSink, EventType};
use crate::runtime::{Runtime, RuntimeError};
use crate::token_bucket::TokenBucket;
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
    /// Who pulled what, where that is minded.
    records: Option<PullRecords>,
    slots: Option<Semaphore>,
    /// `registryPullQPS` with its burst.
    rate: Option<Mutex<TokenBucket>>,
}

/// What is asked for: an image as the pod names it, for whom.
struct Asked<'a> {
    pod: &'a Pod,
    image: &'a str,
    name: &'a ImageName,
    regarding: &'a ObjectReference,
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
        let PullLimits { serialize, max_parallel, registry_qps, registry_burst, .. } = node.pull;
        let slots = if serialize { Some(1) } else { max_parallel };
        let burst = f64::from(registry_burst.max(1));
        Self {
            runtime,
            credentials: Credentials::new(&node.root_dir, objects, events.clone(), providers),
            events,
            records: node
                .pull
                .verification
                .clone()
                .map(|policy| PullRecords::new(&node.root_dir, policy)),
            slots: slots.map(|n| Semaphore::new(n.max(1))),
            rate: (registry_qps > 0).then(|| {
                let each = Duration::from_secs_f64(1.0 / f64::from(registry_qps));
                Mutex::new(TokenBucket::new(burst, each))
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
        let name = parse_image(image).map_err(|error| {
            self.event(regarding, EventType::Warning, "InspectFailed", error.to_string());
            self.failure(regarding, "InvalidImageName", error.to_string())
        })?;
        let policy = pull_policy(policy, &name);
        let asked = Asked { pod, image, name: &name, regarding };
        let (mut present, mut required) = (None, None);
        let found = self.ensure_named(&asked, policy, (&mut present, &mut required)).await;
        METRICS.images.image_requested(policy, present, required);
        found
    }

    /// Also tells whether the image was here, and whether it had to be pulled, as far as it comes to be
    /// known.
    async fn ensure_named(
        &self,
        asked: &Asked<'_>,
        policy: &str,
        (present, required): (&mut Option<bool>, &mut Option<bool>),
    ) -> Result<api::Image, ImageFailure> {
        let Asked { image, name, regarding, .. } = *asked;
        let mut credentials = None;
        if policy != "Always" {
            let here = self.runtime.image_status(&name.full).await.map_err(|error| {
                let message = format!("Failed to inspect image \"{image}\": {error}");
                self.event(regarding, EventType::Warning, "InspectFailed", message.clone());
                self.failure(regarding, "ImageInspectError", message)
            })?;
            *present = Some(here.is_some());
            if let Some(found) = here
                && self.may_use(asked, &found, &mut credentials).await
            {
                *required = Some(false);
                let message = format!(
                    "Container image \"{image}\" already present on machine{}",
                    if self.records.is_some() { " and can be accessed by the pod" } else { "" }
                );
                self.event(regarding, EventType::Normal, "Pulled", message);
                return Ok(found);
            }
            if policy == "Never" {
                // Whether it is here and another's is not told.
                *required = Some(true).filter(|_| *present == Some(true));
                let message =
                    format!("Container image \"{image}\" is not present with pull policy of Never");
                self.event(regarding, EventType::Warning, "ErrImageNeverPull", message.clone());
                return Err(self.failure(regarding, "ErrImageNeverPull", message));
            }
        }
        *required = Some(true);
        // Before the pull has a slot: a provider that hangs must not hold up other pulls.
        let credentials = match credentials {
            Some(credentials) => credentials,
            None => self.credentials.of(asked.pod, name, regarding).await,
        };
        self.pull_recorded(asked, credentials).await
    }

    /// Whether a pod may use an image that is here.
    async fn may_use(
        &self,
        asked: &Asked<'_>,
        found: &api::Image,
        credentials: &mut Option<Vec<Credential>>,
    ) -> bool {
        let Some(records) = &self.records else { return true };
        match records.check(asked.image, &found.id).await {
            Check::Allowed(_) => true,
            Check::MustPull(_) => false,
            Check::Compare(of) => {
                let own = self.credentials.of(asked.pod, asked.name, asked.regarding).await;
                let shown = shown(&own);
                *credentials = Some(own);
                records.compare((asked.image, &found.id), &of, &shown).await
            }
        }
    }

    /// Pulls, with a record of it.
    async fn pull_recorded(
        &self,
        asked: &Asked<'_>,
        credentials: Vec<Credential>,
    ) -> Result<api::Image, ImageFailure> {
        let Asked { image, name, regarding, .. } = *asked;
        let mut under_way = None;
        if let Some(records) = &self.records {
            under_way = Some((records, self.intend(records, asked).await?));
        }
        let begun = Instant::now();
        self.event(regarding, EventType::Normal, "Pulling", format!("Pulling image \"{image}\""));
        let (pulled, took) = self.pull(name, credentials).await;
        let (found, with) = match pulled {
            Ok(pulled) => pulled,
            Err(error) => {
                if let Some((records, intent)) = under_way {
                    records.failed(intent).await;
                }
                let message = error.message;
                let shown = format!("Failed to pull image \"{image}\": {message}");
                self.event(regarding, EventType::Warning, "Failed", shown);
                return Err(self.failure(regarding, "ErrImagePull", message));
            }
        };
        if let Some((records, intent)) = under_way {
            records.pulled(intent, &found.id, opened(with.as_ref())).await;
        }
        METRICS.image_pulled(found.size, took);
        let seconds = |d: std::time::Duration| format!("{:.3}s", d.as_secs_f64());
        let message = format!(
            "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {} bytes.",
            seconds(took),
            seconds(begun.elapsed()),
            found.size
        );
        self.event(regarding, EventType::Normal, "Pulled", message);
        Ok(found)
    }

    async fn intend(
        &self,
        records: &PullRecords,
        asked: &Asked<'_>,
    ) -> Result<Intent, ImageFailure> {
        let Asked { image, regarding, .. } = *asked;
        records.intend(image).await.map_err(|error| {
            let message = format!(
                "Failed to record image pull intent for container image \"{image}\": {error}"
            );
            self.event(regarding, EventType::Warning, "Failed", message.clone());
            self.failure(regarding, "ErrImagePull", message)
        })
    }

    fn event(&self, regarding: &ObjectReference, kind: EventType, reason: &str, message: String) {
        self.events.record(regarding.clone(), kind, reason, message);
    }

    fn failure(
        &self,
        regarding: &ObjectReference,
        reason: &'static str,
        message: String,
    ) -> ImageFailure {
        self.event(regarding, EventType::Warning, "Failed", format!("Error: {reason}"));
        ImageFailure { reason, message }
    }

    /// Makes records of pulls that were under way when the agent ended.
    pub(crate) async fn recover(&self) {
        let Some(records) = &self.records else { return };
        if !records.must_recover().await {
            return;
        }
        match self.runtime.list_images().await {
            Ok(images) => records.recover(images).await,
            Err(error) => {
                tracing::warn!(%error, "pulls that were under way at the last start are not recorded");
            }
        }
    }

    /// Forgets who pulled images that are gone: `ids` are those of the node at `until`.
    pub(crate) async fn forget_all_but(&self, ids: HashSet<String>, until: Timestamp) {
        if let Some(records) = &self.records {
            records.prune(ids, until).await;
        }
    }

    /// Pulls with one credential after the other until one opens.
    async fn pull(
        &self,
        name: &ImageName,
        credentials: Vec<Credential>,
    ) -> (Result<(api::Image, Option<Credential>), RuntimeError>, std::time::Duration) {
        let _slot = match &self.slots {
            Some(slots) => slots.acquire().await.ok(),
            None => None,
        };
        if let Some(rate) = &self.rate {
            let mut rate = rate.lock().await;
            // Taken after the wait: a pull that is given up meanwhile takes none.
            let lack = rate.lack(tokio::time::Instant::now());
            tokio::time::sleep(lack).await;
            rate.wait(tokio::time::Instant::now());
        }
        let begun = Instant::now();
        let mut tries: Vec<Option<Credential>> = credentials.into_iter().map(Some).collect();
        if tries.is_empty() {
            tries.push(None);
        }
        let mut errors: Vec<RuntimeError> = Vec::new();
        for credential in tries {
            let auth = credential.as_ref().map(|credential| credential.auth.clone());
            match self.pull_with(name, auth).await {
                Ok(image) => return (Ok((image, credential)), begun.elapsed()),
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

/// What a pod shows by its credentials for an image.
fn shown(credentials: &[Credential]) -> Shown {
    let mut shown = Shown::default();
    for Credential { source, hash, .. } in credentials {
        match source {
            Source::Node => {}
            Source::Secret(of) => shown.secrets.push(pull_secret(of, hash)),
            Source::ServiceAccount(of) => {
                shown.account.get_or_insert_with(|| pull_account(of));
            }
        }
    }
    shown
}

/// Who may use an image that this opened.
fn opened(credential: Option<&Credential>) -> PullCredentials {
    let mut who = PullCredentials::default();
    match credential.map(|credential| (&credential.source, &credential.hash)) {
        None | Some((Source::Node, _)) => who.node_pods_accessible = true,
        Some((Source::Secret(of), hash)) => who.kubernetes_secrets.push(pull_secret(of, hash)),
        Some((Source::ServiceAccount(of), _)) => {
            who.kubernetes_service_accounts.push(pull_account(of));
        }
    }
    who
}

fn pull_secret(of: &Account, hash: &str) -> PullSecret {
    PullSecret {
        uid: of.uid.clone(),
        namespace: of.namespace.clone(),
        name: of.name.clone(),
        credential_hash: hash.to_owned(),
    }
}

fn pull_account(of: &Account) -> PullAccount {
    PullAccount { uid: of.uid.clone(), namespace: of.namespace.clone(), name: of.name.clone() }
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
