//! `downwardAPI`: fields of the pod as files.

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, Pod};

use super::VolumeError;
use super::payload::{File, Payload};
use super::secret::mode_bits;
use crate::node_context::NodeContext;
use crate::pod::config::downward::{Addresses, field, resource_field};

/// The files of `items`.
pub(super) fn payload(
    pod: &Pod,
    volume: &str,
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
    node: &NodeContext,
) -> Result<Payload, VolumeError> {
    let invalid = |reason: String| VolumeError::Invalid { volume: volume.into(), reason };
    let mut payload = Payload::default();
    for item in items {
        let data = if let Some(reference) = &item.field_ref {
            let path = reference.field_path.as_str();
            // Addresses are not known yet; the API allows only metadata here.
            if !path.starts_with("metadata.") {
                return Err(invalid(format!("fieldPath {path:?} is not supported in a volume")));
            }
            field(pod, path, Addresses { pod: &[], node: &[] })
        } else if let Some(reference) = &item.resource_field_ref {
            resource_field(pod, None, reference, node)
        } else {
            return Err(invalid(format!(
                "item {:?} names neither fieldRef nor resourceFieldRef",
                item.path
            )));
        };
        let data = data.map_err(|cause| invalid(cause.to_string()))?.into_bytes();
        let mode = item.mode.map_or(default_mode, mode_bits);
        payload.insert(&item.path, File { data, mode, uid: 0 }).map_err(invalid)?;
    }
    Ok(payload)
}
