//! Whether a volume is attached to this node.
//!
//! The attach-detach controller attaches, and says so in the Node's status; the VolumeAttachment has
//! what the driver told of it. Nothing is mounted before the Node also says that it uses the
//! volume, or the controller might detach it again in between.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::VolumeAttachment;

use super::{Csi, CsiError, CsiVolume};

/// How long a mount waits for the controller before it says so, as under kubelet.
const PATIENCE: Duration = Duration::from_secs(123);
/// How often an attachment that the Node already tells of is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What a VolumeAttachment says.
#[derive(Debug, PartialEq, Eq)]
enum Attachment {
    /// Attached, with what the driver told of it.
    Attached(BTreeMap<String, String>),
    NotYet(String),
    Failed(String),
}

fn judge(found: Option<&VolumeAttachment>, handle: &str, name: &str) -> Attachment {
    let Some(found) = found else {
        return Attachment::NotYet(format!("volume {handle} has no volume attachment {name}"));
    };
    if found.metadata.deletion_timestamp.is_some() {
        return Attachment::Failed("volume attachment is being deleted".into());
    }
    let status = found.status.clone().unwrap_or_default();
    if status.attached {
        return Attachment::Attached(status.attachment_metadata.unwrap_or_default());
    }
    match status.attach_error.and_then(|error| error.message) {
        Some(message) => Attachment::Failed(message),
        None => Attachment::NotYet(format!(
            "volume {handle} is not attached for volume attachment {name}"
        )),
    }
}

/// Whether the Node says that it uses `name`, and that it is attached.
fn node_says(node: Option<&Node>, name: &str) -> bool {
    let Some(status) = node.and_then(|node| node.status.as_ref()) else { return false };
    status.volumes_in_use.iter().flatten().any(|used| used == name)
        && status.volumes_attached.iter().flatten().any(|attached| attached.name == name)
}

impl Csi {
    /// Waits until the volume is attached; what the driver told of it.
    pub(super) async fn attached(
        &self,
        volume: &CsiVolume,
    ) -> Result<BTreeMap<String, String>, CsiError> {
        let (name, attachment) = (volume.unique_name(), volume.attachment(&self.node_name));
        let mut why = format!("{name} is not in volumesAttached of the node's status");
        let wait = async {
            let mut node = self.node.clone();
            // Without anybody who could say so any more this ends by the patience.
            if node.wait_for(|node| node_says(node.as_deref(), &name)).await.is_err() {
                std::future::pending::<()>().await;
            }
            loop {
                let found = self.objects.volume_attachment(&attachment).await?;
                match judge(found.as_deref(), &volume.handle, &attachment) {
                    Attachment::Attached(told) => return Ok(told),
                    Attachment::Failed(message) => return Err(CsiError::NotAttached(message)),
                    Attachment::NotYet(message) => why = message,
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(result) => result,
            Err(_) => Err(CsiError::AttachTimeout(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_attachment_counts_once_it_is_attached_and_while_it_stays() {
        let judge = |value: serde_json::Value| {
            let found: VolumeAttachment = serde_json::from_value(value).unwrap();
            judge(Some(&found), "h", "csi-1")
        };
        let spec = json!({"attacher": "d", "nodeName": "n", "source": {}});
        let with =
            |status: serde_json::Value| json!({"metadata": {}, "spec": spec, "status": status});
        let told = with(json!({"attached": true, "attachmentMetadata": {"dev": "sda"}}));
        let metadata = [("dev".to_owned(), "sda".to_owned())].into();
        assert_eq!(judge(told.clone()), Attachment::Attached(metadata));
        let mut leaving = told;
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(matches!(judge(leaving), Attachment::Failed(_)));
        let failed = with(json!({"attached": false, "attachError": {"message": "no"}}));
        assert_eq!(judge(failed), Attachment::Failed("no".into()));
        assert!(matches!(judge(with(json!({"attached": false}))), Attachment::NotYet(_)));
        assert!(matches!(super::judge(None, "h", "csi-1"), Attachment::NotYet(_)));
    }

    #[test]
    fn the_node_must_say_both() {
        let node = |status: serde_json::Value| {
            serde_json::from_value::<Node>(json!({"metadata": {}, "status": status})).unwrap()
        };
        let attached = json!([{"name": "v", "devicePath": ""}]);
        let both = node(json!({"volumesInUse": ["v"], "volumesAttached": attached}));
        assert!(node_says(Some(&both), "v") && !node_says(Some(&both), "w"));
        assert!(!node_says(Some(&node(json!({"volumesAttached": attached}))), "v"));
        assert!(!node_says(Some(&node(json!({"volumesInUse": ["v"]}))), "v"));
        assert!(!node_says(None, "v"));
    }
}
