//! What the cluster's signers give to a pod: their trust bundles, and certificates of its own.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ClusterTrustBundleProjection, PodCertificateProjection};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use super::{Earlier, Gather, object_error};
use crate::ids::{NamespacedName, PodUid};
use crate::objects::{ObjectError, ObjectRef};
use crate::volume::VolumeError;
use crate::volume::certificate::{Asking, State, Step, account_of, make_key, split};
use crate::volume::payload::Payload;
use crate::volume::trust_bundle::anchors;

/// A pod's start waits so long for its certificate before it says that it waits.
const PATIENCE: Duration = Duration::from_secs(5);
/// What fails is tried again after so many seconds, while the certificate that is there serves.
const RETRY: i64 = 30;

/// By pod, volume and place among the volume's sources.
type Id = (PodUid, String, usize);

/// The certificates of this node's pods. Memory only: files have what was issued.
#[derive(Default)]
pub(in crate::volume) struct Certificates(Mutex<HashMap<Id, State>>);

impl Certificates {
    fn lock(&self) -> MutexGuard<'_, HashMap<Id, State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod has gone.
    pub(in crate::volume) fn forget(&self, pod: &PodUid) {
        self.lock().retain(|(uid, ..), _| uid != pod);
    }
}

/// Files of a projected volume in the making.
pub(super) struct Making<'a> {
    pub(super) volume: &'a str,
    pub(super) default_mode: u32,
    pub(super) payload: Payload,
    pub(super) uses: Vec<ObjectRef>,
}

impl Gather<'_> {
    fn put(&self, making: &mut Making<'_>, path: &str, data: Vec<u8>) -> Result<(), VolumeError> {
        let file = self.token_file(data, making.default_mode);
        let invalid = |reason| VolumeError::Invalid { volume: making.volume.to_owned(), reason };
        making.payload.insert(path, file).map_err(invalid)
    }

    /// Puts a file of certificates that the cluster trusts into the volume.
    pub(super) async fn trust_bundle(
        &self,
        source: &ClusterTrustBundleProjection,
        making: &mut Making<'_>,
    ) -> Result<(), VolumeError> {
        let volume = making.volume;
        let invalid = |reason: String| VolumeError::Invalid { volume: volume.to_owned(), reason };
        if !self.node.volumes.trust_bundles {
            return Err(invalid(
                "a clusterTrustBundle is given only with featureGates: {ClusterTrustBundle: true, \
                 ClusterTrustBundleProjection: true} of KubeletConfiguration"
                    .into(),
            ));
        }
        let all = self.objects.trust_bundles().await.map_err(object_error(volume))?;
        making.uses.push(ObjectRef::TrustBundles);
        let data = anchors(source, all.iter().map(AsRef::as_ref)).map_err(invalid)?;
        self.put(making, &source.path, data)
    }

    /// Puts key and certificates of the pod into the volume; when they must be looked at again.
    pub(super) async fn certificate(
        &self,
        index: usize,
        source: &PodCertificateProjection,
        earlier: &dyn Earlier,
        making: &mut Making<'_>,
    ) -> Result<Option<i64>, VolumeError> {
        let volume = making.volume;
        let invalid = |reason: String| VolumeError::Invalid { volume: volume.to_owned(), reason };
        if !self.node.volumes.certificates {
            return Err(invalid(
                "a podCertificate is given only with featureGates: {PodCertificateRequest: true} \
                 of KubeletConfiguration"
                    .into(),
            ));
        }
        making.uses.push(ObjectRef::CertificateRequests);
        let now = self.now.as_second();
        let id = (PodUid::of(self.pod), volume.to_owned(), index);
        let known = self.certificates.lock().get(&id).cloned();
        let mut state = known.unwrap_or_else(|| held_by_files(source, earlier, now));
        let renewed = self.advance(&mut state, source, &id).await;
        self.certificates.lock().insert(id, state.clone());
        let mut due = state.due(now);
        match renewed {
            Ok(()) => {}
            Err(error) if state.held.is_some() && !state.has_expired(now) => {
                tracing::warn!(volume, %error, "cannot renew the pod's certificate yet");
                due = Some(now + RETRY);
            }
            Err(error) => return Err(error),
        }
        if let (Some(why), true) = (state.refusal(), state.held.is_some()) {
            tracing::warn!(volume, why, "the pod's certificate is not renewed");
        }
        let held = state.credential().map_err(invalid)?;
        let path = |path: &Option<String>| path.clone().filter(|path| !path.is_empty());
        if let Some(path) = path(&source.credential_bundle_path) {
            self.put(making, &path, format!("{}{}", held.key, held.chain).into_bytes())?;
        }
        if let Some(path) = path(&source.key_path) {
            self.put(making, &path, held.key.clone().into_bytes())?;
        }
        if let Some(path) = path(&source.certificate_chain_path) {
            self.put(making, &path, held.chain.clone().into_bytes())?;
        }
        Ok(due)
    }

    /// Asks for a certificate, or looks what became of that, as far as it goes now.
    async fn advance(
        &self,
        state: &mut State,
        source: &PodCertificateProjection,
        id: &Id,
    ) -> Result<(), VolumeError> {
        let now = self.now.as_second();
        let mut changes = self.objects.changes();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match state.step(now) {
                Step::Nothing => return Ok(()),
                Step::Ask => {
                    let (name, key) = self.ask(source, &id.1).await?;
                    state.asked(name, key, now);
                    // Should nobody wait any more: it is not asked for twice.
                    self.certificates.lock().insert(id.clone(), state.clone());
                }
                Step::Look(name) => {
                    let (node, key) = (&self.node.node_name, self.key(&name));
                    let found = self.objects.certificate_request(node, &key).await;
                    let found = found.map_err(object_error(&id.1))?;
                    state.found(found.as_deref(), now, fastrand::f64());
                    if !state.is_waiting() {
                        return Ok(());
                    }
                    match tokio::time::timeout_at(deadline, changes.recv()).await {
                        Ok(Ok(_) | Err(RecvError::Lagged(_))) => {}
                        Ok(Err(RecvError::Closed)) | Err(_) => return Ok(()),
                    }
                }
            }
        }
    }

    /// Makes a key and a request for it; the request's name and the key.
    async fn ask(
        &self,
        source: &PodCertificateProjection,
        volume: &str,
    ) -> Result<(String, String), VolumeError> {
        let account = self.key(account_of(self.pod));
        let missing = |kind: &'static str, key: &NamespacedName| ObjectError::Unavailable {
            kind,
            key: key.clone(),
            cause: "not found".into(),
        };
        let found = self.objects.service_account(&account).await.map_err(object_error(volume))?;
        let account_uid = found.and_then(|account| account.metadata.uid.clone());
        let account_uid = account_uid
            .ok_or_else(|| missing("ServiceAccount", &account))
            .map_err(object_error(volume))?;
        let node_name = self.node.node_name.as_str();
        let node_uid = self.objects.node().and_then(|node| node.metadata.uid.clone());
        let node_uid = node_uid
            .ok_or_else(|| missing("Node", &NamespacedName::new("", node_name)))
            .map_err(object_error(volume))?;
        let kind = source.key_type.clone();
        let made = tokio::task::spawn_blocking(move || make_key(&kind)).await;
        let (key, proof) = made
            .unwrap_or_else(|cause| Err(cause.to_string()))
            .map_err(|reason| VolumeError::Invalid { volume: volume.to_owned(), reason })?;
        let asking = Asking { pod: self.pod, account_uid, node_name, node_uid };
        let request = asking.request(source, proof);
        let name = self.objects.request_certificate(request).await;
        let name = name.map_err(object_error(volume))?;
        Ok((name.name.to_string(), key))
    }
}

/// What the volume's files hold of an earlier run.
fn held_by_files(source: &PodCertificateProjection, earlier: &dyn Earlier, now: i64) -> State {
    let read = |path: &Option<String>| {
        path.as_deref().filter(|path| !path.is_empty()).and_then(|path| earlier.read(path))
    };
    let bundle = read(&source.credential_bundle_path).and_then(|bundle| split(&bundle));
    let (key, chain) = match bundle {
        Some((key, chain)) => (Some(key), Some(chain)),
        None => (read(&source.key_path), read(&source.certificate_chain_path)),
    };
    State::of_files(key.as_deref(), chain.as_deref(), now)
}
