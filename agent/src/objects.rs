//! What pods refer to: ConfigMaps, Secrets, Services, tokens. One trait, so that volumes and
//! environment work the same from a folder of manifests and from an API server.

use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::certificates::v1beta1::{ClusterTrustBundle, PodCertificateRequest};
use k8s_openapi::api::core::v1::{
    ConfigMap, Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::resource::v1::ResourceClaim;
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use tokio::sync::broadcast;

use crate::ids::{NamespacedName, PodUid};

/// Why an object could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ObjectError {
    /// The control plane is away and no earlier copy is held. Try again later.
    #[error("cannot read {kind} {key}: {cause}")]
    Unavailable {
        /// `ConfigMap`, `Secret`, `ServiceAccount token`.
        kind: &'static str,
        /// Which object.
        key: NamespacedName,
        /// What the client said.
        cause: String,
    },
    /// The API server refused; retrying changes nothing until somebody grants it.
    #[error("not allowed to read {kind} {key}: {cause}")]
    Forbidden {
        /// As above.
        kind: &'static str,
        /// Which object.
        key: NamespacedName,
        /// What the API server said.
        cause: String,
    },
    /// There is no control plane that could do this (tokens in standalone mode).
    #[error("{what} needs a control plane: this node runs standalone")]
    Standalone {
        /// What was asked for.
        what: &'static str,
    },
}

/// An object that changed, appeared or went.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ObjectRef {
    /// A ConfigMap.
    ConfigMap(NamespacedName),
    /// A Secret.
    Secret(NamespacedName),
    /// A CSI driver of this node, by name: it can be asked for volumes now.
    CsiDriver(Arc<str>),
    /// Any ClusterTrustBundle.
    TrustBundles,
    /// Any PodCertificateRequest of this node.
    CertificateRequests,
}

/// Read access to the objects that this node's pods use.
#[async_trait]
pub trait Objects: Send + Sync + 'static {
    /// The ConfigMap, `None` if it does not exist. Served from a watch once `retain`ed.
    async fn config_map(&self, key: &NamespacedName)
    -> Result<Option<Arc<ConfigMap>>, ObjectError>;

    /// The Secret, `None` if it does not exist. Never logged.
    async fn secret(&self, key: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError>;

    /// The ServiceAccount as it is now, `None` if it does not exist.
    async fn service_account(
        &self,
        _key: &NamespacedName,
    ) -> Result<Option<Arc<ServiceAccount>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a service account" })
    }

    /// A bound token for `service_account` (namespace, name).
    async fn service_account_token(
        &self,
        service_account: &NamespacedName,
        spec: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError>;

    /// The runtime's handler that the RuntimeClass `class` names; `None` if there is no such class.
    /// Without a control plane a class is a handler's own name.
    async fn runtime_handler(&self, class: &str) -> Result<Option<String>, ObjectError> {
        Ok(Some(class.to_owned()))
    }

    /// The PersistentVolumeClaim, `None` if it does not exist. As it is now, or while the control plane
    /// is away as it last was; this holds for the other objects of storage as well.
    async fn claim(
        &self,
        _key: &NamespacedName,
    ) -> Result<Option<Arc<PersistentVolumeClaim>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a PersistentVolumeClaim" })
    }

    /// Changes the status of a claim by a merge patch.
    async fn patch_claim_status(
        &self,
        _key: &NamespacedName,
        _patch: serde_json::Value,
    ) -> Result<(), ObjectError> {
        Err(ObjectError::Standalone { what: "a PersistentVolumeClaim" })
    }

    /// The PersistentVolume `name`.
    async fn persistent_volume(
        &self,
        _name: &str,
    ) -> Result<Option<Arc<PersistentVolume>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a PersistentVolume" })
    }

    /// The VolumeAttachment `name`.
    async fn volume_attachment(
        &self,
        _name: &str,
    ) -> Result<Option<Arc<VolumeAttachment>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a VolumeAttachment" })
    }

    /// What the cluster says of the CSI driver `name`, which may be nothing.
    async fn csi_driver(&self, _name: &str) -> Result<Option<Arc<CSIDriver>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a CSI driver" })
    }

    /// The ResourceClaim, `None` if it does not exist; as it last was while the control plane is away.
    async fn resource_claim(
        &self,
        _key: &NamespacedName,
    ) -> Result<Option<Arc<ResourceClaim>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a ResourceClaim" })
    }

    /// All ClusterTrustBundles; as they last were while the control plane is away.
    async fn trust_bundles(&self) -> Result<Vec<Arc<ClusterTrustBundle>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a ClusterTrustBundle" })
    }

    /// Makes a PodCertificateRequest of this node; which one it is.
    async fn request_certificate(
        &self,
        _request: PodCertificateRequest,
    ) -> Result<NamespacedName, ObjectError> {
        Err(ObjectError::Standalone { what: "a pod's certificate" })
    }

    /// The PodCertificateRequest of `node`, `None` while it is not seen.
    async fn certificate_request(
        &self,
        _node: &str,
        _key: &NamespacedName,
    ) -> Result<Option<Arc<PodCertificateRequest>>, ObjectError> {
        Err(ObjectError::Standalone { what: "a pod's certificate" })
    }

    /// Services of `namespace` plus `default/kubernetes`, for the service environment variables.
    fn services(&self, namespace: &str) -> Vec<Arc<Service>>;

    /// This node's own object, where there is one.
    fn node(&self) -> Option<Arc<Node>>;

    /// Starts to hold (watch) what `pod` refers to.
    fn retain(&self, pod: &Pod);

    /// Lets go of what only this pod referred to.
    fn release(&self, uid: &PodUid);

    /// Wakes for each retained object that changes. A receiver that lagged must look at all it uses.
    fn changes(&self) -> broadcast::Receiver<ObjectRef>;

    /// Wakes them for something that somebody else saw change.
    fn announce(&self, _changed: ObjectRef) {}
}
