//! What of volumes feature gates decide. Pure.

use super::{ConfigError, KubeletConfiguration};

const BUNDLES: &str = "ClusterTrustBundle";
const PROJECTION: &str = "ClusterTrustBundleProjection";
const CERTIFICATES: &str = "PodCertificateRequest";
/// Kubernetes' feature gates that are read here; all are off unless they are set.
pub(super) const GATES: [&str; 3] = [BUNDLES, PROJECTION, CERTIFICATES];

/// Sources of projected volumes that are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeGates {
    /// `clusterTrustBundle`.
    pub trust_bundles: bool,
    /// `podCertificate`.
    pub certificates: bool,
}

pub(super) fn gates(kubelet: &KubeletConfiguration) -> Result<VolumeGates, ConfigError> {
    let on = |name: &str| {
        kubelet.feature_gates.as_ref().and_then(|gates| gates.get(name)).copied().unwrap_or(false)
    };
    if on(PROJECTION) && !on(BUNDLES) {
        return Err(ConfigError::invalid(
            "KubeletConfiguration.featureGates.ClusterTrustBundleProjection",
            "needs featureGates: {ClusterTrustBundle: true}",
        ));
    }
    Ok(VolumeGates { trust_bundles: on(PROJECTION), certificates: on(CERTIFICATES) })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn sources_are_given_where_their_gates_are_on() {
        let of = |on: Value| {
            let kubelet = serde_json::from_value(json!({"featureGates": on})).unwrap();
            gates(&kubelet).map_err(|error| error.to_string())
        };
        assert_eq!(of(json!({})), Ok(VolumeGates::default()));
        let both = json!({"ClusterTrustBundle": true, "ClusterTrustBundleProjection": true});
        assert_eq!(of(both), Ok(VolumeGates { trust_bundles: true, certificates: false }));
        let certificates = VolumeGates { trust_bundles: false, certificates: true };
        assert_eq!(of(json!({"PodCertificateRequest": true})), Ok(certificates));
        let error = of(json!({"ClusterTrustBundleProjection": true})).unwrap_err();
        assert!(error.contains("ClusterTrustBundle: true"), "{error}");
    }
}
