//! Who may pull images, and with whose credentials. Pure.

use super::{ConfigError, KubeletConfiguration};
use crate::cli::NodeFlags;
use crate::credential::Places;

const TOKENS: &str = "KubeletServiceAccountTokenForCredentialProviders";
/// Kubernetes' feature gates that are read here.
pub(super) const GATES: [&str; 1] = [TOKENS];

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
