//! What a container has of its pod's volumes: its mounts, with sub-paths opened below the volume.

use std::path::PathBuf;

use cri_shim::api;
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, Pod, VolumeMount};

use super::{NodeVolumes, blocking, check_uid, lock, plugin_of, volumes_of};
use crate::ids::{NamespacedName, PodUid};
use crate::pod::config::downward::Addresses;
use crate::pod::config::env::{EnvInput, Sources, environment, references};
use crate::pod::config::expand::expand;
use crate::volume::claim::BLOCK;
use crate::volume::layout::Plugin;
use crate::volume::{VolumeError, sub_path};

impl NodeVolumes {
    /// The mounts of `container`, in the order of its `volumeMounts`.
    pub(super) async fn mounts_of(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<Vec<api::Mount>, VolumeError> {
        let uid = PodUid::of(pod);
        check_uid(&uid)?;
        let places = lock(&self.slot(&uid).mounted).as_ref().map(|m| m.places.clone());
        let places = places.unwrap_or_default();
        let mut mounts = Vec::new();
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            let invalid =
                |reason: String| VolumeError::Invalid { volume: mount.name.clone(), reason };
            let volume = volumes_of(pod)
                .find(|volume| volume.name == mount.name)
                .ok_or_else(|| invalid("volumeMount names no volume of the pod".into()))?;
            if let Some(image) = &volume.image {
                let sub_path = self.sub_path(pod, container, mount).await?;
                mounts.push(image_mount(mount, image, sub_path));
                continue;
            }
            let plugin = plugin_of(volume);
            let place = places.get(&volume.name);
            if place.is_some_and(|place| place.device.is_some()) {
                let volume = mount.name.clone();
                return Err(VolumeError::Mode {
                    volume,
                    mode: BLOCK.into(),
                    field: "volumeMounts",
                });
            }
            let path = match (&volume.host_path, plugin, place) {
                (Some(host_path), ..) => PathBuf::from(&host_path.path),
                (None, Some(plugin), _) => self.layout.volume(&uid, plugin, &volume.name),
                (None, None, Some(place)) => place.path.clone(),
                (None, None, None) => return Err(invalid("volume is not in place yet".into())),
            };
            let path = match self.sub_path(pod, container, mount).await? {
                None => path,
                Some(sub) => {
                    let target = self.layout.sub_path(&uid, &volume.name, &container.name, index);
                    let bound = target.clone();
                    blocking(move || sub_path::bind(&path, &sub, &bound)).await?;
                    target
                }
            };
            let propagation = match mount.mount_propagation.as_deref().unwrap_or_default() {
                "" | "None" => api::MountPropagation::PropagationPrivate,
                "HostToContainer" => api::MountPropagation::PropagationHostToContainer,
                "Bidirectional" => api::MountPropagation::PropagationBidirectional,
                other => return Err(invalid(format!("mountPropagation {other:?} is unknown"))),
            };
            // Files made from objects are the agent's to change, never a container's.
            let ours = plugin.is_some_and(|plugin| plugin != Plugin::EmptyDir);
            let readonly = mount.read_only.unwrap_or(false)
                || ours
                || place.is_some_and(|place| place.read_only);
            let recursive = match mount.recursive_read_only.as_deref().unwrap_or_default() {
                "" | "Disabled" | "IfPossible" => false,
                "Enabled" if mount.read_only == Some(true) => true,
                _ => return Err(invalid("recursiveReadOnly needs readOnly: true".into())),
            };
            mounts.push(api::Mount {
                container_path: absolute(&mount.mount_path),
                host_path: path.to_string_lossy().into_owned(),
                readonly,
                propagation: propagation.into(),
                recursive_read_only: recursive,
                // What is the node's own keeps its labels.
                selinux_relabel: plugin.is_some() || place.is_some_and(|place| place.relabel),
                ..Default::default()
            });
        }
        Ok(mounts)
    }

    /// `subPath` of a mount, with `subPathExpr` expanded.
    async fn sub_path(
        &self,
        pod: &Pod,
        container: &Container,
        mount: &VolumeMount,
    ) -> Result<Option<String>, VolumeError> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(path) = given(&mount.sub_path) {
            return Ok(Some(path));
        }
        let Some(expression) = given(&mount.sub_path_expr) else { return Ok(None) };
        let invalid = |reason: String| VolumeError::Invalid { volume: mount.name.clone(), reason };
        let namespace = NamespacedName::of_pod(pod).namespace;
        let (maps, secrets) = references(container);
        let mut sources = Sources::default();
        let object = |source| VolumeError::Object { volume: mount.name.clone(), source };
        for name in maps {
            let key = NamespacedName::new(&namespace, &name);
            let found = self.objects.config_map(&key).await.map_err(object)?;
            sources.config_maps.insert(name, found);
        }
        for name in secrets {
            let key = NamespacedName::new(&namespace, &name);
            let found = self.objects.secret(&key).await.map_err(object)?;
            sources.secrets.insert(name, found);
        }
        let node_ips: Vec<String> = self.node.node_ips.iter().map(ToString::to_string).collect();
        let variables = environment(EnvInput {
            pod,
            container,
            sources: &sources,
            services: &[],
            addresses: Addresses { pod: &[], node: &node_ips },
            node: &self.node,
        })
        .map_err(|cause| invalid(format!("subPathExpr {expression:?}: {cause}")))?;
        let missing = std::cell::Cell::new(false);
        let expanded = expand(&expression, |name| {
            // Later entries win.
            let value = variables.iter().rev().find(|(key, _)| key == name);
            missing.set(missing.get() || value.is_none());
            value.map(|(_, value)| value.as_str())
        });
        if missing.get() || expanded.is_empty() {
            return Err(invalid(format!("subPathExpr {expression:?} names an unknown variable")));
        }
        if expanded.starts_with('/') || expanded.split('/').any(|part| part == "..") {
            return Err(invalid(format!(
                "subPathExpr {expression:?} gives {expanded:?}, which must be relative, without '..'"
            )));
        }
        Ok(Some(expanded))
    }
}

/// A mount of an image's files. Whoever starts the container puts in which image that is.
fn image_mount(
    mount: &VolumeMount,
    image: &ImageVolumeSource,
    sub_path: Option<String>,
) -> api::Mount {
    api::Mount {
        container_path: absolute(&mount.mount_path),
        readonly: true,
        image: Some(api::ImageSpec {
            user_specified_image: image.reference.clone().unwrap_or_default(),
            ..Default::default()
        }),
        image_sub_path: sub_path.unwrap_or_default(),
        ..Default::default()
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}
