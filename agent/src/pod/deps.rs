//! What all pod workers share: the effects, the node, the table of pods.

use std::sync::Arc;

use cri_shim::api::LinuxContainerResources;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod};
use tokio::sync::watch;

use super::cgroup::PodCgroups;
use super::clock::Clock;
use super::config::resources::{PodLimits, container_resources, pod_limits};
use super::images::Images;
use super::spec::{ContainerKind, field_path};
use super::store::StatusStore;
use super::table::PodTable;
use super::userns::UserNamespaces;
use crate::device::PodDevices;
use crate::dra::PodClaims;
use crate::ids::PodUid;
use crate::node_context::NodeContext;
use crate::numa::Numa;
use crate::objects::Objects;
use crate::report::{EventSink, EventType, StatusSink, pod_reference};
use crate::runtime::Runtime;
use crate::volume::Volumes;

/// Everything a worker needs besides its pod.
pub(crate) struct Deps {
    pub(crate) node: Arc<NodeContext>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) runtime_name: String,
    pub(crate) volumes: Arc<dyn Volumes>,
    pub(crate) devices: Arc<dyn PodDevices>,
    pub(crate) claims: Arc<dyn PodClaims>,
    /// CPUs and memory that containers have to themselves, where there are any.
    pub(crate) numa: Option<Arc<Numa>>,
    pub(crate) objects: Arc<dyn Objects>,
    pub(crate) statuses: Arc<dyn StatusSink>,
    pub(crate) events: Arc<dyn EventSink>,
    pub(crate) images: Images,
    pub(crate) cgroups: Arc<dyn PodCgroups>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) table: PodTable,
    pub(crate) store: StatusStore,
    pub(crate) userns: Arc<UserNamespaces>,
    /// Whether sandboxes may have addresses of the pod network by now.
    pub(crate) network: watch::Receiver<bool>,
    /// When this agent began: what ran before is adopted.
    pub(crate) began: Timestamp,
}

impl Deps {
    /// Whether the container, or any of the pod, has CPUs to itself and so needs no quota.
    fn is_free_of_quota(&self, pod: &Pod, container: Option<&str>) -> bool {
        let numa = self.numa.as_ref();
        numa.is_some_and(|numa| numa.frees_of_quota(&PodUid::of(pod), container))
    }

    /// Resources of one container, but for where it runs.
    pub(crate) fn container_resources(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> LinuxContainerResources {
        let unified = self.cgroups.unified();
        let mut linux = container_resources(pod, container, &self.node, unified);
        if linux.cpu_quota != 0 && self.is_free_of_quota(pod, Some(&container.name)) {
            linux.cpu_quota = -1;
        }
        linux
    }

    /// Limits of the pod's cgroup.
    pub(crate) fn pod_limits(&self, pod: &Pod) -> PodLimits {
        let mut limits = pod_limits(pod, &self.node);
        if self.is_free_of_quota(pod, None) {
            limits.cpu_quota = None;
        }
        limits
    }

    /// Waits until sandboxes may have addresses of the pod network.
    pub(crate) async fn network_ready(&self) {
        // Without anybody who could say so any more there is nothing to wait for.
        let _ = self.network.clone().wait_for(|ready| *ready).await;
    }

    /// Records an Event on the pod.
    pub(crate) fn pod_event(&self, pod: &Pod, kind: EventType, reason: &str, message: String) {
        self.events.record(pod_reference(pod, None), kind, reason, message);
    }

    /// Records an Event on one of its containers.
    pub(crate) fn container_event(
        &self,
        pod: &Pod,
        (kind, name): (ContainerKind, &str),
        event: EventType,
        reason: &str,
        message: String,
    ) {
        self.events.record(container_reference(pod, kind, name), event, reason, message);
    }
}

/// Whom Events about a container are about.
pub(crate) fn container_reference(pod: &Pod, kind: ContainerKind, name: &str) -> ObjectReference {
    pod_reference(pod, Some(field_path(kind, name)))
}
