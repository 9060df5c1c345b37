//! What each volume of a pod shall be: the objects it names are read here, and nothing is touched.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::TokenRequestSpec;
use k8s_openapi::api::core::v1::{
    HostPathVolumeSource, PersistentVolumeClaim, Pod, ProjectedVolumeSource,
    ServiceAccountTokenProjection, Volume,
};

use super::certificate::account_of;
use super::claim::{Backing, backing, bound_to, claim_of, is_used, mode_mismatch};
use super::config_map::{self, Selection};
use super::downward_api;
use super::empty_dir::{Medium, plan_medium};
use super::growth::{Growth, growth};
use super::layout::Plugin;
use super::nfs::NfsVolume;
use super::payload::{File, Payload};
use super::secret::{self, mode_bits};
use super::token::Lifetime;
use super::{Group, VolumeError};
use crate::csi::CsiVolume;
use crate::ids::{NamespacedName, PodUid};
use crate::node_context::NodeContext;
use crate::objects::{ObjectError, ObjectRef, Objects};

/// What a volume shall be.
pub(super) enum Wanted {
    /// A directory of the pod.
    EmptyDir(Medium),
    /// The files of an image, which the runtime mounts.
    Image,
    /// A path of the host.
    HostPath(HostPathVolumeSource),
    /// What is behind a claim, or a CSI volume of the pod's own.
    Claimed(Backing),
    /// A driver's volume behind a claim, which shall grow.
    Growing(Box<CsiVolume>, Box<Growing>),
    /// A claim that no container mounts.
    Unused,
    /// Files made from objects.
    Files {
        plugin: Plugin,
        payload: Payload,
        /// Objects that the payload came from.
        uses: Vec<ObjectRef>,
        /// When it must be gathered again, in seconds since the epoch (tokens).
        due: Option<i64>,
    },
}

/// What a volume that shall grow has to do with its claim.
pub(super) struct Growing {
    pub(super) growth: Growth,
    pub(super) key: NamespacedName,
    pub(super) claim: Arc<PersistentVolumeClaim>,
}

/// Reads token files that an earlier call wrote.
pub(super) trait Earlier: Send + Sync {
    /// Content of `path` in the volume, if it is there.
    fn read(&self, path: &str) -> Option<Vec<u8>>;
    /// Whether the volume was set up before, even if a reboot has emptied it.
    fn existed(&self) -> bool;
}

mod issued;

pub(super) use issued::Certificates;
use issued::Making;

/// What gathering needs.
pub(super) struct Gather<'a> {
    pub(super) pod: &'a Pod,
    pub(super) objects: &'a Arc<dyn Objects>,
    pub(super) node: &'a NodeContext,
    pub(super) certificates: &'a Certificates,
    pub(super) now: Timestamp,
}

impl Gather<'_> {
    fn key(&self, name: &str) -> NamespacedName {
        NamespacedName::new(&NamespacedName::of_pod(self.pod).namespace, name)
    }

    /// What `volume` shall be.
    pub(super) async fn volume(
        &self,
        volume: &Volume,
        earlier: &dyn Earlier,
    ) -> Result<Wanted, VolumeError> {
        let name = volume.name.as_str();
        if let Some(source) = &volume.empty_dir {
            return Ok(Wanted::EmptyDir(plan_medium(self.pod, name, source)?));
        }
        if let Some(source) = &volume.host_path {
            return Ok(Wanted::HostPath(source.clone()));
        }
        if let Some(source) = &volume.image {
            return match source.reference.as_deref() {
                None | Some("") => Err(VolumeError::Invalid {
                    volume: name.into(),
                    reason: "image.reference names no image".into(),
                }),
                Some(_) => Ok(Wanted::Image),
            };
        }
        if let Some((claim, read_only)) = claim_of(self.pod, volume) {
            if !is_used(self.pod, name) {
                return Ok(Wanted::Unused);
            }
            return self.claim(volume, &self.key(&claim), read_only).await;
        }
        if let Some(source) = &volume.csi {
            if !is_used(self.pod, name) {
                return Ok(Wanted::Unused);
            }
            let (uid, namespace) =
                (PodUid::of(self.pod), NamespacedName::of_pod(self.pod).namespace);
            let inline = CsiVolume::inline(&uid, &namespace, name, source);
            return Ok(Wanted::Claimed(Backing::Csi(Box::new(inline))));
        }
        if let Some(source) = &volume.nfs {
            return Ok(Wanted::Claimed(Backing::Nfs(NfsVolume {
                name: name.to_owned(),
                server: source.server.clone(),
                path: source.path.clone(),
                options: Vec::new(),
                read_only: source.read_only.unwrap_or(false),
            })));
        }
        let namespace = NamespacedName::of_pod(self.pod).namespace;
        if let Some(inline) = CsiVolume::of_inline_in_tree(volume, &namespace) {
            if !is_used(self.pod, name) {
                return Ok(Wanted::Unused);
            }
            let invalid = |reason| VolumeError::Invalid { volume: name.into(), reason };
            return Ok(Wanted::Claimed(Backing::Csi(Box::new(inline.map_err(invalid)?))));
        }
        let mut uses = Vec::new();
        if let Some(source) = &volume.config_map {
            let selection = Selection {
                volume: name,
                name: &source.name,
                items: source.items.as_ref(),
                default_mode: mode_bits(source.default_mode.unwrap_or(0o644)),
                optional: source.optional.unwrap_or(false),
            };
            let payload = self.config_map(&selection, &mut uses).await?;
            return Ok(Wanted::Files { plugin: Plugin::ConfigMap, payload, uses, due: None });
        }
        if let Some(source) = &volume.secret {
            let selection = Selection {
                volume: name,
                name: source.secret_name.as_deref().unwrap_or_default(),
                items: source.items.as_ref(),
                default_mode: mode_bits(source.default_mode.unwrap_or(0o644)),
                optional: source.optional.unwrap_or(false),
            };
            let payload = self.secret(&selection, &mut uses).await?;
            return Ok(Wanted::Files { plugin: Plugin::Secret, payload, uses, due: None });
        }
        if let Some(source) = &volume.downward_api {
            let mode = mode_bits(source.default_mode.unwrap_or(0o644));
            let items = source.items.as_deref().unwrap_or_default();
            let payload = downward_api::payload(self.pod, name, items, mode, self.node)?;
            return Ok(Wanted::Files { plugin: Plugin::DownwardApi, payload, uses, due: None });
        }
        if let Some(source) = &volume.projected {
            return self.projected(name, source, earlier).await;
        }
        // No source at all is an emptyDir, as the API server would have written.
        let fields = serde_json::to_value(volume).ok();
        let kind = fields
            .as_ref()
            .and_then(|fields| fields.as_object())
            .and_then(|fields| fields.keys().find(|field| *field != "name").cloned());
        match kind {
            Some(kind) => Err(VolumeError::Unsupported { volume: name.into(), kind }),
            None => Ok(Wanted::EmptyDir(Medium::Disk)),
        }
    }

    /// What is behind the claim `key`.
    async fn claim(
        &self,
        volume: &Volume,
        key: &NamespacedName,
        read_only: bool,
    ) -> Result<Wanted, VolumeError> {
        let failed = |reason: String| VolumeError::Claim {
            volume: volume.name.clone(),
            claim: key.clone(),
            reason,
        };
        let claim = self.objects.claim(key).await.map_err(|error| match error {
            ObjectError::Standalone { .. } => object_error(&volume.name)(error),
            other => failed(format!("failed to fetch PVC from API server: {other}")),
        })?;
        let name = bound_to(self.pod, volume, claim.as_deref(), &key.name).map_err(failed)?;
        let pv = self.objects.persistent_volume(&name).await.map_err(|error| {
            failed(format!("failed to fetch PV {name} from API server: {error}"))
        })?;
        let uid = claim.as_ref().and_then(|claim| claim.metadata.uid.clone()).unwrap_or_default();
        let found = backing(pv.as_deref(), &name, &uid, read_only).map_err(failed)?;
        if let Some((mode, field)) = mode_mismatch(self.pod, &volume.name, pv.as_deref()) {
            return Err(VolumeError::Mode { volume: volume.name.clone(), mode, field });
        }
        let (Backing::Csi(csi), Some(claim), false) = (&found, claim, read_only) else {
            return Ok(Wanted::Claimed(found));
        };
        let capacity = pv.as_ref().and_then(|pv| pv.spec.as_ref()?.capacity.as_ref());
        let Some(growth) = growth(&claim, capacity.and_then(|all| all.get("storage"))) else {
            return Ok(Wanted::Claimed(found));
        };
        let growing = Growing { growth, key: key.clone(), claim };
        Ok(Wanted::Growing(csi.clone(), Box::new(growing)))
    }

    async fn config_map(
        &self,
        selection: &Selection<'_>,
        uses: &mut Vec<ObjectRef>,
    ) -> Result<Payload, VolumeError> {
        let key = self.key(selection.name);
        uses.push(ObjectRef::ConfigMap(key.clone()));
        let object = self.objects.config_map(&key).await.map_err(object_error(selection.volume))?;
        config_map::payload(object.as_deref(), selection)
    }

    async fn secret(
        &self,
        selection: &Selection<'_>,
        uses: &mut Vec<ObjectRef>,
    ) -> Result<Payload, VolumeError> {
        let key = self.key(selection.name);
        uses.push(ObjectRef::Secret(key.clone()));
        let object = self.objects.secret(&key).await.map_err(object_error(selection.volume))?;
        secret::payload(object.as_deref(), selection)
    }

    async fn projected(
        &self,
        name: &str,
        source: &ProjectedVolumeSource,
        earlier: &dyn Earlier,
    ) -> Result<Wanted, VolumeError> {
        let default_mode = mode_bits(source.default_mode.unwrap_or(0o644));
        let mut making =
            Making { volume: name, default_mode, payload: Payload::default(), uses: Vec::new() };
        let mut due: Option<i64> = None;
        for (index, projection) in source.sources.iter().flatten().enumerate() {
            if let Some(source) = &projection.config_map {
                let selection = Selection {
                    volume: name,
                    name: &source.name,
                    items: source.items.as_ref(),
                    default_mode,
                    optional: source.optional.unwrap_or(false),
                };
                let files = self.config_map(&selection, &mut making.uses).await?;
                making.payload.extend(files);
            } else if let Some(source) = &projection.secret {
                let selection = Selection {
                    volume: name,
                    name: &source.name,
                    items: source.items.as_ref(),
                    default_mode,
                    optional: source.optional.unwrap_or(false),
                };
                let files = self.secret(&selection, &mut making.uses).await?;
                making.payload.extend(files);
            } else if let Some(source) = &projection.downward_api {
                let items = source.items.as_deref().unwrap_or_default();
                let files = downward_api::payload(self.pod, name, items, default_mode, self.node)?;
                making.payload.extend(files);
            } else if let Some(source) = &projection.service_account_token {
                let payload = &mut making.payload;
                let renew = self.token(name, source, default_mode, earlier, payload).await?;
                due = [due, Some(renew)].into_iter().flatten().min();
            } else if let Some(source) = &projection.cluster_trust_bundle {
                self.trust_bundle(source, &mut making).await?;
            } else if let Some(source) = &projection.pod_certificate {
                let renew = self.certificate(index, source, earlier, &mut making).await?;
                due = [due, renew].into_iter().flatten().min();
            } else {
                let fields = serde_json::to_value(projection).ok();
                let kind = fields.and_then(|f| f.as_object()?.keys().next().cloned());
                let kind = format!("projected.{}", kind.as_deref().unwrap_or("(empty)"));
                return Err(VolumeError::Unsupported { volume: name.into(), kind });
            }
        }
        let Making { payload, uses, .. } = making;
        Ok(Wanted::Files { plugin: Plugin::Projected, payload, uses, due })
    }

    /// Puts the token into `payload`; when it must be looked at again.
    async fn token(
        &self,
        volume: &str,
        source: &ServiceAccountTokenProjection,
        default_mode: u32,
        earlier: &dyn Earlier,
        payload: &mut Payload,
    ) -> Result<i64, VolumeError> {
        let now = self.now.as_second();
        let held = earlier.read(&source.path);
        let held = held.and_then(|token| Some((Lifetime::of(&token)?, token)));
        let mut insert = |token: Vec<u8>| {
            payload
                .insert(&source.path, self.token_file(token, default_mode))
                .map_err(|reason| VolumeError::Invalid { volume: volume.into(), reason })
        };
        if let Some((life, token)) = &held
            && now < life.renew_at()
        {
            insert(token.clone())?;
            return Ok(life.renew_at());
        }
        let request = TokenRequestSpec {
            audiences: Some(source.audience.iter().filter(|a| !a.is_empty()).cloned().collect()),
            expiration_seconds: Some(source.expiration_seconds.unwrap_or(3600)),
            bound_object_ref: Some(k8s_openapi::api::authentication::v1::BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: self.pod.metadata.name.clone(),
                uid: self.pod.metadata.uid.clone(),
            }),
        };
        let key = self.key(account_of(self.pod));
        let answer = self.objects.service_account_token(&key, request).await.and_then(|issued| {
            issued
                .token
                .filter(|token| !token.is_empty())
                .map(|t| (t, issued.expiration_timestamp))
                .ok_or(ObjectError::Unavailable {
                    kind: "ServiceAccount token",
                    key: key.clone(),
                    cause: "the answer holds no token".into(),
                })
        });
        match answer {
            Ok((token, expires)) => {
                let hour = Timestamp::from_second(now + 3600).unwrap_or(self.now);
                let expires = expires.map_or(hour, |expires| expires.0);
                insert(token.into_bytes())?;
                Ok(Lifetime::new(self.now, expires).renew_at())
            }
            // The old one still serves; ask again soon.
            Err(error) if held.as_ref().is_some_and(|(life, _)| life.is_valid(now)) => {
                tracing::warn!(volume, %error, "cannot renew the service account token yet");
                if let Some((_, token)) = held {
                    insert(token)?;
                }
                Ok(now + 30)
            }
            // After a reboot with the control plane away: the pod ran before, and shall run again.
            Err(error @ ObjectError::Unavailable { .. }) if earlier.existed() => {
                tracing::warn!(volume, %error, "the pod starts without its service account token");
                Ok(now + 5)
            }
            Err(error) => Err(object_error(volume)(error)),
        }
    }

    /// Readable only by the pod: by its group where it has one, else by its one user (KEP-1205).
    fn token_file(&self, data: Vec<u8>, default_mode: u32) -> File {
        let group = fs_group(self.pod);
        let user = common_user(self.pod);
        let mode = if group.is_some() || user.is_some() { 0o600 } else { default_mode };
        File { data, mode, uid: if group.is_some() { 0 } else { user.unwrap_or(0) } }
    }
}

fn object_error(volume: &str) -> impl FnOnce(ObjectError) -> VolumeError + use<'_> {
    move |source| VolumeError::Object { volume: volume.into(), source }
}

/// The pod's `fsGroup`, and how it is applied to volumes that hold files already.
pub(super) fn group(pod: &Pod) -> Option<Group> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    let on_root_mismatch = context.fs_group_change_policy.as_deref() == Some("OnRootMismatch");
    fs_group(pod).map(|id| Group { id, on_root_mismatch })
}

/// The pod's `fsGroup`.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

/// The user that all containers run as, if the pod says so for each and it is the same.
fn common_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users =
        spec.init_containers.iter().flatten().chain(&spec.containers).map(|container| {
            container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod)
        });
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}
