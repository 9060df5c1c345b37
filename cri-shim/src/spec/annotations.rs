//! What a container's spec says of where it comes from, in containerd's words: OCI runtimes that put
//! pods into virtual machines go by them, and hooks read them.

use std::collections::HashMap;

use super::Inputs;

const PREFIX: &str = "io.kubernetes.cri";

/// The annotations of a container's spec.
pub(super) fn plan(inputs: &Inputs<'_>) -> HashMap<String, String> {
    let pod = &inputs.pod.metadata;
    let metadata = inputs.config.metadata.clone().unwrap_or_default();
    let image = inputs.config.image.clone().unwrap_or_default();
    let name = if image.user_specified_image.is_empty() {
        image.image
    } else {
        image.user_specified_image
    };
    [
        ("container-type", "container"),
        ("sandbox-id", &inputs.pod.id),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
        ("container-name", &metadata.name),
        ("image-name", &name),
    ]
    .into_iter()
    .map(|(key, value)| (format!("{PREFIX}.{key}"), value.to_owned()))
    .collect()
}
