//! `configMap`: the keys of a ConfigMap as files.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, KeyToPath};

use super::VolumeError;
use super::payload::Payload;
use super::secret::keyed_payload;

/// What a projection of a ConfigMap selects.
pub(super) struct Selection<'a> {
    pub(super) volume: &'a str,
    /// Name of the object.
    pub(super) name: &'a str,
    pub(super) items: Option<&'a Vec<KeyToPath>>,
    pub(super) default_mode: u32,
    pub(super) optional: bool,
}

/// The files of a ConfigMap, `None` if it does not exist.
pub(super) fn payload(
    object: Option<&ConfigMap>,
    selection: &Selection<'_>,
) -> Result<Payload, VolumeError> {
    let entries: Option<BTreeMap<&str, &[u8]>> = object.map(|object| {
        let text = object.data.iter().flatten().map(|(k, v)| (k.as_str(), v.as_bytes()));
        let bytes = object.binary_data.iter().flatten().map(|(k, v)| (k.as_str(), &v.0[..]));
        text.chain(bytes).collect()
    });
    keyed_payload("configmap", entries, selection)
}
