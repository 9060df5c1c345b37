//! The resources that the control plane serves, as discovery tells them. Data only, so that a new
//! kind is one line.

/// One served resource.
#[derive(Debug, PartialEq, Eq)]
pub struct Resource {
    /// API group, empty for core.
    pub group: &'static str,
    /// The one served version.
    pub version: &'static str,
    /// Name in paths.
    pub plural: &'static str,
    /// Kind of its objects.
    pub kind: &'static str,
    /// Short names for kubectl.
    pub short: &'static [&'static str],
    /// Whether its objects live in namespaces.
    pub namespaced: bool,
    /// Whether `status` is a subresource: writes to the object then leave it alone.
    pub status: bool,
    /// Whether `metadata.generation` counts changes of the spec.
    pub generation: bool,
}

impl Resource {
    /// `v1` or `group/version`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.into()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `pods` or `leases.coordination.k8s.io`, as error messages name it.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.into()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }
}

const fn res(
    group: &'static str,
    plural: &'static str,
    kind: &'static str,
    short: &'static [&'static str],
    namespaced: bool,
) -> Resource {
    Resource {
        group,
        version: "v1",
        plural,
        kind,
        short,
        namespaced,
        status: false,
        generation: false,
    }
}

const fn with_status(mut resource: Resource, generation: bool) -> Resource {
    resource.status = true;
    resource.generation = generation;
    resource
}

const DRA: &str = "resource.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";

/// Every stored resource.
pub static RESOURCES: &[Resource] = &[
    with_status(res("", "namespaces", "Namespace", &["ns"], false), false),
    with_status(res("", "nodes", "Node", &["no"], false), false),
    with_status(res("", "pods", "Pod", &["po"], true), true),
    with_status(res("", "services", "Service", &["svc"], true), false),
    res("", "endpoints", "Endpoints", &["ep"], true),
    res("", "configmaps", "ConfigMap", &["cm"], true),
    res("", "secrets", "Secret", &[], true),
    res("", "serviceaccounts", "ServiceAccount", &["sa"], true),
    res("", "events", "Event", &["ev"], true),
    with_status(res("", "persistentvolumes", "PersistentVolume", &["pv"], false), false),
    with_status(res("", "persistentvolumeclaims", "PersistentVolumeClaim", &["pvc"], true), false),
    with_status(
        res(
            "certificates.k8s.io",
            "certificatesigningrequests",
            "CertificateSigningRequest",
            &["csr"],
            false,
        ),
        false,
    ),
    Resource {
        version: "v1beta1",
        ..res("certificates.k8s.io", "clustertrustbundles", "ClusterTrustBundle", &[], false)
    },
    Resource {
        version: "v1beta1",
        status: true,
        ..res("certificates.k8s.io", "podcertificaterequests", "PodCertificateRequest", &[], true)
    },
    res("coordination.k8s.io", "leases", "Lease", &[], true),
    Resource {
        generation: true,
        ..res("discovery.k8s.io", "endpointslices", "EndpointSlice", &[], true)
    },
    with_status(res("networking.k8s.io", "servicecidrs", "ServiceCIDR", &[], false), false),
    res("node.k8s.io", "runtimeclasses", "RuntimeClass", &[], false),
    with_status(res(DRA, "resourceclaims", "ResourceClaim", &[], true), false),
    res(DRA, "resourceslices", "ResourceSlice", &[], false),
    res(RBAC, "clusterroles", "ClusterRole", &[], false),
    res(RBAC, "clusterrolebindings", "ClusterRoleBinding", &[], false),
    res(RBAC, "roles", "Role", &[], true),
    res(RBAC, "rolebindings", "RoleBinding", &[], true),
    res("scheduling.k8s.io", "priorityclasses", "PriorityClass", &["pc"], false),
    res("storage.k8s.io", "csidrivers", "CSIDriver", &[], false),
    res("storage.k8s.io", "csinodes", "CSINode", &[], false),
    res("storage.k8s.io", "storageclasses", "StorageClass", &["sc"], false),
    with_status(res("storage.k8s.io", "volumeattachments", "VolumeAttachment", &[], false), false),
];

/// The resource of that path element, if it is served.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|r| r.group == group && r.version == version && r.plural == plural)
}

/// The core resource `plural`.
///
/// # Panics
/// When it is not in the table: a mistake in a test.
pub fn known(plural: &str) -> &'static Resource {
    RESOURCES.iter().find(|r| r.plural == plural).expect("a resource of the table")
}
