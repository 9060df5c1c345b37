//! Puts a pod's CSI volume in place: attached, staged, published, given to the pod's group.
//!
//! Each step is idempotent, and each is written down when it is done. The pod's record is there
//! before the driver is first asked, so that the pod's end takes back whatever came of it.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use k8s_openapi::api::authentication::v1::{
    BoundObjectReference, TokenRequestSpec, TokenRequestStatus,
};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSIDriver;
use tokio::sync::watch;

use super::client::Client;
use super::record::{Record, absent};
use super::request::{self, Capabilities};
use super::unmount::users;
use super::volume::Key;
use super::wire::csi::{NodePublishVolumeRequest, NodeStageVolumeRequest};
use super::{Csi, CsiError, CsiVolume, blocking, device, is_mount_point};
use crate::ids::{NamespacedName, PodUid};
use crate::volume::Group;

const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// A volume that is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where its files are, or the device.
    pub path: PathBuf,
    /// The pod's link to it, where it is a device.
    pub link: Option<PathBuf>,
    /// The driver wants to be asked again now and then (`requiresRepublish`).
    pub republish: bool,
}

/// What one mount is about.
struct Job<'a> {
    pod: &'a Pod,
    volume: &'a CsiVolume,
    key: &'a Key,
    /// Holds the pod's record.
    folder: &'a Path,
    placed: &'a Placed,
    driver: Option<&'a CSIDriver>,
    client: Client,
    capabilities: Capabilities,
    attachment: BTreeMap<String, String>,
    group: Option<Group>,
}

impl Csi {
    /// Puts `volume` of `pod` in place, or asks the driver to bring it up to date (`again`). `group`
    /// is the pod's fsGroup. Ends early when `ending` turns true.
    pub async fn set_up(
        &self,
        pod: &Pod,
        volume: &CsiVolume,
        group: Option<Group>,
        again: bool,
        mut ending: watch::Receiver<bool>,
    ) -> Result<Placed, CsiError> {
        tokio::select! {
            placed = self.put_in_place(pod, volume, group, again) => placed,
            _ = ending.wait_for(|ending| *ending) => Err(CsiError::Ending),
        }
    }

    async fn put_in_place(
        &self,
        pod: &Pod,
        volume: &CsiVolume,
        group: Option<Group>,
        again: bool,
    ) -> Result<Placed, CsiError> {
        check_names(volume)?;
        let uid = &PodUid::of(pod);
        let driver = self.objects.csi_driver(&volume.driver).await?;
        let driver = driver.as_deref();
        if let Some(reason) = request::unsupported_lifecycle(volume, driver) {
            return Err(CsiError::Invalid(reason));
        }
        let key = &volume.key();
        let folder = self.layout.of_pod(uid, volume.block).join(&volume.spec_name);
        let placed = Placed {
            path: self.layout.target(uid, &folder, key),
            link: self.layout.link(uid, key),
            republish: driver.and_then(|d| d.spec.requires_republish).unwrap_or(false),
        };
        let attach = request::attach_required(volume, driver);
        if attach {
            self.in_use.add(&key.unique_name(), uid);
        }
        if again && !placed.republish {
            return Ok(placed);
        }
        if !again && self.is_in_place(&folder, volume, &placed.path).await? {
            return Ok(placed);
        }
        let attachment = if attach { self.attached(volume).await? } else { BTreeMap::new() };
        let _only = self.only(key).await;
        if volume.is_for_one_pod() && !again {
            let (layout, key, folder) = (self.layout.clone(), key.clone(), folder.clone());
            if blocking(move || users(&layout, &key, &folder)).await? {
                return Err(CsiError::InUse);
            }
        }
        let client = self.drivers.client(&volume.driver)?;
        let capabilities = client.capabilities().await?;
        // A device has no files to give.
        let group = group.filter(|_| !volume.block);
        let job = Job {
            pod,
            volume,
            key,
            folder: &folder,
            placed: &placed,
            driver,
            client,
            capabilities,
            attachment,
            group,
        };
        let record = Record::of_pod(volume, &self.node_name);
        if !again {
            let (record, folder, of) = (record.clone(), folder.clone(), placed.clone());
            blocking(move || {
                private_folder(&folder)?;
                record.write(&folder)?;
                of.link.map_or(Ok(()), |link| device::prepare(&of.path, &link))
            })
            .await?;
        }
        let staged = match self.stage(&job).await {
            Ok(staged) => staged,
            Err(error) => {
                if error.is_final() && !again {
                    self.forget(&job).await;
                }
                return Err(error);
            }
        };
        self.publish(&job, staged.as_deref(), again).await?;
        let done = record.done(&self.boot);
        blocking(move || done.write(&folder)).await?;
        Ok(placed)
    }

    /// Whether the driver has put it there in this boot, and it still is.
    async fn is_in_place(
        &self,
        folder: &Path,
        volume: &CsiVolume,
        target: &Path,
    ) -> Result<bool, CsiError> {
        let (folder, target, boot) = (folder.to_owned(), target.to_owned(), self.boot.clone());
        let block = volume.block;
        let (driver, handle) = (volume.driver.clone(), volume.handle.clone());
        blocking(move || {
            let Some(record) = Record::read(&folder)? else { return Ok(false) };
            if !record.is_of(&driver, &handle) {
                return Err(still_another(&folder, &record));
            }
            let there = if block { device::is_device(&target) } else { target.is_dir() };
            Ok(record.is_done(&boot) && there)
        })
        .await
    }

    /// Stages the volume for the node, where the driver does that, unless it is; where it is then.
    async fn stage(&self, job: &Job<'_>) -> Result<Option<PathBuf>, CsiError> {
        let volume = job.volume;
        let stages = job.capabilities.stage && !volume.ephemeral;
        // What a device is stands in the node's record, whether it is staged or not.
        if !stages && !volume.block {
            return Ok(None);
        }
        let (stage, global) = (self.layout.stage(job.key), self.layout.staging(job.key));
        let record = if volume.block {
            Record::of_pod(volume, &self.node_name)
        } else {
            Record::of_stage(&volume.driver, &volume.handle)
        };
        let (of, at, boot, key) =
            (stage.clone(), global.clone(), self.boot.clone(), job.key.clone());
        let done = blocking(move || {
            let Some(found) = Record::read(&of)? else { return Ok(false) };
            if !found.is_of(&key.driver, &key.handle) {
                return Err(still_another(&of, &found));
            }
            Ok(found.is_done(&boot) && at.is_dir())
        })
        .await?;
        if done {
            return Ok(Some(global));
        }
        let secrets = self.secret("NodeStageSecretRef", volume.stage_secret.as_ref()).await?;
        let (of, at, noted) = (stage.clone(), global.clone(), record.clone());
        blocking(move || {
            private_folder(&of)?;
            if stages {
                private_folder(&at)?;
            }
            noted.write(&of)
        })
        .await?;
        if !stages {
            return Ok(None);
        }
        let request = NodeStageVolumeRequest {
            volume_id: volume.handle.clone(),
            publish_context: job.attachment.clone().into_iter().collect(),
            staging_target_path: global.display().to_string(),
            volume_capability: Some(request::capability(
                volume,
                job.capabilities,
                job.group.map(|g| g.id),
            )),
            secrets: secrets.into_iter().collect(),
            volume_context: volume.attributes.clone().into_iter().collect(),
        };
        job.client.stage(request).await?;
        let done = record.done(&self.boot);
        blocking(move || done.write(&stage)).await?;
        Ok(Some(global))
    }

    /// After the driver has surely not staged the volume: what was noted for it goes, so that the
    /// pod's end need not ask the driver.
    async fn forget(&self, job: &Job<'_>) {
        let (layout, key) = (self.layout.clone(), job.key.clone());
        let (folder, placed) = (job.folder.to_owned(), job.placed.clone());
        let forgotten = blocking(move || {
            let global = layout.staging(&key);
            let used = users(&layout, &key, &folder)?;
            if !used && !is_mount_point(&global)? {
                absent(fs::remove_dir(&global)).map_err(CsiError::io("remove", &global))?;
                Record::remove(&layout.stage(&key))?;
                device::tidy(&layout, &key);
            }
            let target = placed.path;
            if !is_mount_point(&target)? && !target.exists() {
                placed.link.map_or(Ok(()), |link| device::unlink(&link))?;
                Record::remove(&folder)?;
            }
            Ok(())
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(volume = job.volume.handle, %error, "cannot clean up after a failed stage");
        }
    }

    async fn publish(
        &self,
        job: &Job<'_>,
        staged: Option<&Path>,
        again: bool,
    ) -> Result<(), CsiError> {
        let volume = job.volume;
        let target = job.placed.path.clone();
        let mut secrets =
            self.secret("NodePublishSecretRef", volume.publish_secret.as_ref()).await?;
        let mut context = volume.attributes.clone();
        let spec = job.driver.map(|driver| &driver.spec);
        if spec.and_then(|spec| spec.pod_info_on_mount).unwrap_or(false) {
            context.extend(request::pod_info(job.pod, volume));
        }
        if let Some(tokens) = self.tokens(job.pod, job.driver).await? {
            let secret = spec.and_then(|spec| spec.service_account_token_in_secrets);
            let told = if secret.unwrap_or(false) { &mut secrets } else { &mut context };
            told.insert(TOKENS.into(), tokens);
        }
        let request = NodePublishVolumeRequest {
            volume_id: volume.handle.clone(),
            publish_context: job.attachment.clone().into_iter().collect(),
            staging_target_path: staged.map(|path| path.display().to_string()).unwrap_or_default(),
            target_path: target.display().to_string(),
            volume_capability: Some(request::capability(
                volume,
                job.capabilities,
                job.group.map(|g| g.id),
            )),
            readonly: volume.read_only,
            secrets: secrets.into_iter().collect(),
            volume_context: context.into_iter().collect(),
        };
        if let Err(error) = job.client.publish(request).await {
            if error.is_final() && !again {
                // An empty folder that the driver left; the pod must not take it for the volume.
                let _ = blocking(move || {
                    if !is_mount_point(&target)? {
                        let _ = fs::remove_dir(&target);
                    }
                    Ok(())
                })
                .await;
            }
            return Err(error);
        }
        if volume.block && !device::is_device(&target) {
            return Err(CsiError::Invalid(format!(
                "driver {} says that it published the volume, but {} is no block device",
                volume.driver,
                target.display()
            )));
        }
        let group = job.group.filter(|_| {
            !job.capabilities.mount_group && request::applies_group(volume, job.driver)
        });
        if let Some(group) = group {
            blocking(move || {
                group.apply(&target).map_err(|error| {
                    CsiError::Invalid(format!("applyFSGroup failed for vol {error}"))
                })
            })
            .await?;
        }
        Ok(())
    }

    /// What a Secret holds for the driver.
    pub(super) async fn secret(
        &self,
        field: &str,
        key: Option<&NamespacedName>,
    ) -> Result<BTreeMap<String, String>, CsiError> {
        let Some(key) = key else { return Ok(BTreeMap::new()) };
        let failed =
            |cause: String| CsiError::Invalid(format!("fetching {field} {key} failed: {cause}"));
        let found = self.objects.secret(key).await.map_err(|error| failed(error.to_string()))?;
        let found = found.ok_or_else(|| failed(format!("secret {:?} not found", &*key.name)))?;
        let text = |(key, value): (&String, &k8s_openapi::ByteString)| match String::from_utf8(
            value.0.clone(),
        ) {
            Ok(value) => Ok((key.clone(), value)),
            Err(_) => Err(failed(format!("the value of {key:?} is no text"))),
        };
        found.data.iter().flatten().map(text).collect()
    }

    /// Tokens of the pod's service account for the audiences that the driver names, by audience.
    async fn tokens(
        &self,
        pod: &Pod,
        driver: Option<&CSIDriver>,
    ) -> Result<Option<String>, CsiError> {
        let requests = driver.and_then(|d| d.spec.token_requests.as_deref()).unwrap_or_default();
        if requests.is_empty() {
            return Ok(None);
        }
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
        let account = account.filter(|name| !name.is_empty()).unwrap_or("default");
        let key = NamespacedName::new(&NamespacedName::of_pod(pod).namespace, account);
        let mut tokens: BTreeMap<&str, TokenRequestStatus> = BTreeMap::new();
        for asked in requests {
            let audiences = Some(asked.audience.clone()).filter(|audience| !audience.is_empty());
            let spec = TokenRequestSpec {
                audiences: Some(audiences.into_iter().collect()),
                expiration_seconds: asked.expiration_seconds,
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            };
            let token = self.objects.service_account_token(&key, spec).await?;
            tokens.insert(&asked.audience, token);
        }
        let text = serde_json::to_string(&tokens);
        text.map(Some).map_err(|error| CsiError::Invalid(format!("write tokens: {error}")))
    }
}

/// A driver's or volume's name becomes the name of a folder.
fn check_names(volume: &CsiVolume) -> Result<(), CsiError> {
    for (what, name) in [("driver", &volume.driver), ("volume", &volume.spec_name)] {
        let bad = name.is_empty() || name.len() > 253 || name == "." || name == "..";
        if bad || name.contains(['/', '\0']) {
            return Err(CsiError::Invalid(format!("{name:?} is no name of a {what}")));
        }
    }
    if volume.handle.is_empty() {
        return Err(CsiError::Invalid("the volume has no volumeHandle".into()));
    }
    Ok(())
}

/// Another volume is where this one shall be.
fn still_another(folder: &Path, record: &Record) -> CsiError {
    CsiError::Invalid(format!(
        "{} is still the volume {} of driver {}; it goes with its pods",
        folder.display(),
        record.handle(),
        record.driver(),
    ))
}

/// Makes a folder that only root may enter.
pub(super) fn private_folder(path: &Path) -> Result<(), CsiError> {
    DirBuilder::new().recursive(true).mode(0o750).create(path).map_err(CsiError::io("create", path))
}
