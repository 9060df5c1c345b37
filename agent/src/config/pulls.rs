//! Who may pull images, and with whose credentials. Pure.

use super::{ConfigError, KubeletConfiguration};
use crate::cli::NodeFlags;
use crate::credential::Places;
use crate::pulled::decide::Policy;

const TOKENS: &str = "KubeletServiceAccountTokenForCredentialProviders";
const VERIFICATION: &str = "KubeletEnsureSecretPulledImages";
/// Kubernetes' feature gates that are read here.
pub(super) const GATES: [&str; 2] = [TOKENS, VERIFICATION];

/// As the cluster's default is, unless it was set.
fn gate(kubelet: &KubeletConfiguration, name: &str) -> bool {
    kubelet.feature_gates.as_ref().and_then(|gates| gates.get(name)).copied().unwrap_or(true)
}

/// Where credential providers are configured.
pub(super) fn credential_providers(
    flags: &NodeFlags,
    kubelet: &KubeletConfiguration,
) -> Result<Option<Places>, ConfigError> {
    const CONFIG: &str = "--image-credential-provider-config";
    const PROGRAMS: &str = "--image-credential-provider-bin-dir";
    let given = |path: &Option<std::path::PathBuf>| {
        path.clone().filter(|path| !path.as_os_str().is_empty())
    };
    let config = given(&flags.image_credential_provider_config);
    let programs = given(&flags.image_credential_provider_bin_dir);
    match (config, programs) {
        (None, None) => Ok(None),
        (Some(config), Some(programs)) => {
            Ok(Some(Places { config, programs, tokens: gate(kubelet, TOKENS) }))
        }
        (Some(_), None) => Err(ConfigError::invalid(PROGRAMS, format!("required with {CONFIG}"))),
        (None, Some(_)) => Err(ConfigError::invalid(CONFIG, format!("required with {PROGRAMS}"))),
    }
}

/// Who may use images that are on the node; `None` where the feature gate is off.
pub(super) fn verification(kubelet: &KubeletConfiguration) -> Result<Option<Policy>, ConfigError> {
    const POLICY: &str = "KubeletConfiguration.imagePullCredentialsVerificationPolicy";
    const LIST: &str = "KubeletConfiguration.preloadedImagesVerificationAllowlist";
    let policy =
        kubelet.image_pull_credentials_verification_policy.as_deref().filter(|p| !p.is_empty());
    let list = kubelet.preloaded_images_verification_allowlist.as_deref().unwrap_or_default();
    if !gate(kubelet, VERIFICATION) {
        let off = || format!("must not be set: the feature gate {VERIFICATION} is false");
        return match (policy, list) {
            (Some(_), _) => Err(ConfigError::invalid(POLICY, off())),
            (None, [_, ..]) => Err(ConfigError::invalid(LIST, off())),
            (None, []) => Ok(None),
        };
    }
    let listed = || Policy::allowing(list).map_err(|error| ConfigError::invalid(LIST, error));
    let policy = match policy.unwrap_or("NeverVerifyPreloadedImages") {
        "NeverVerifyAllowlistedImages" => return listed().map(Some),
        "NeverVerify" => Policy::NeverVerify,
        "NeverVerifyPreloadedImages" => Policy::NeverVerifyPreloadedImages,
        "AlwaysVerify" => Policy::AlwaysVerify,
        other => {
            return Err(ConfigError::invalid(
                POLICY,
                format!(
                    "{other:?} is unknown; use NeverVerify, NeverVerifyPreloadedImages, \
                     NeverVerifyAllowlistedImages or AlwaysVerify"
                ),
            ));
        }
    };
    if !list.is_empty() {
        let reason = "needs imagePullCredentialsVerificationPolicy: NeverVerifyAllowlistedImages";
        return Err(ConfigError::invalid(LIST, reason));
    }
    Ok(Some(policy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fields: serde_json::Value) -> Result<Option<Policy>, String> {
        let kubelet = serde_json::from_value(fields).unwrap();
        verification(&kubelet).map_err(|error| error.to_string())
    }

    #[test]
    fn policies_are_read_or_refused_by_name() {
        use serde_json::json;
        let policy = "imagePullCredentialsVerificationPolicy";
        let list = "preloadedImagesVerificationAllowlist";
        let off = json!({VERIFICATION: false});
        assert_eq!(of(json!({})), Ok(Some(Policy::NeverVerifyPreloadedImages)));
        assert_eq!(of(json!({"featureGates": off})), Ok(None));
        assert_eq!(of(json!({policy: "AlwaysVerify"})), Ok(Some(Policy::AlwaysVerify)));
        assert_eq!(of(json!({policy: "NeverVerify"})), Ok(Some(Policy::NeverVerify)));
        let listed = of(json!({policy: "NeverVerifyAllowlistedImages", list: ["r.io/*"]}));
        assert!(matches!(listed, Ok(Some(Policy::NeverVerifyAllowlistedImages { .. }))));
        for (fields, said) in [
            (json!({policy: "Sometimes"}), "\"Sometimes\" is unknown"),
            (json!({list: ["r.io/*"]}), "needs imagePullCredentialsVerificationPolicy"),
            (json!({policy: "NeverVerifyAllowlistedImages", list: ["r.io/a:1"]}), "neither tag"),
            (json!({policy: "NeverVerify", "featureGates": off}), "must not be set"),
            (json!({list: ["r.io/*"], "featureGates": off}), "must not be set"),
        ] {
            let error = of(fields.clone()).unwrap_err();
            assert!(error.contains(said), "{fields}: {error}");
        }
    }
}
