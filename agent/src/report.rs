//! Where the agent tells what it sees: pod statuses and Events.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, PodStatus};

/// Takes pod statuses. Never blocks: the latest status of a UID wins.
pub trait StatusSink: Send + Sync + 'static {
    /// The status of `pod` is now this.
    fn publish(&self, pod: &Arc<Pod>, status: PodStatus);

    /// Nothing of the pod is left on this node (containers, mounts, cgroups, network): its object
    /// may be removed from the API.
    fn gone(&self, pod: &Arc<Pod>);
}

/// Severity of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// Things as they should be.
    Normal,
    /// Somebody should look.
    Warning,
}

/// Records Events, with kubelet's reasons (`Pulled`, `Created`, `Started`, `Killing`, `BackOff`,
/// `Failed`, `Unhealthy`, `FailedMount`, `FailedCreatePodSandBox`, ...). Never blocks; repeats are
/// counted, and a flood is cut off by the implementation.
pub trait EventSink: Send + Sync + 'static {
    /// Records that `reason` happened to `regarding`.
    fn record(&self, regarding: ObjectReference, kind: EventType, reason: &str, message: String);

    /// As [`EventSink::record`], with annotations for programs that read Events.
    fn record_annotated(
        &self,
        regarding: ObjectReference,
        kind: EventType,
        reason: &str,
        message: String,
        _annotations: BTreeMap<String, String>,
    ) {
        self.record(regarding, kind, reason, message);
    }
}

/// A reference to the node, as Events carry it: kubelet knows no other UID than the name.
pub fn node_reference(name: &str) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".into()),
        name: Some(name.to_owned()),
        uid: Some(name.to_owned()),
        ..ObjectReference::default()
    }
}

/// A reference to `pod`, or to one of its containers by `field_path`
/// (`spec.containers{name}`), as Events carry it.
pub fn pod_reference(pod: &Pod, field_path: Option<String>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path,
    }
}
