//! What is counted of images: of the programs that know credentials.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{Histograms, histogram};

/// The metrics.
pub struct ImageMetrics {
    providers: Histograms<PluginName>,
    providers_failed: Family<PluginName, Counter>,
    provider_config: Family<ConfigHash, Gauge>,
}

/// A credential provider.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PluginName {
    plugin_name: String,
}

/// The digest of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConfigHash {
    hash: String,
}

impl ImageMetrics {
    pub(super) fn new() -> Self {
        Self {
            providers: Family::new_with_constructor(histogram),
            providers_failed: Family::default(),
            provider_config: Family::default(),
        }
    }

    pub(super) fn register(&self, all: &mut Registry) {
        all.register(
            "kubelet_credential_provider_plugin_duration",
            "Duration of execution in seconds for credential provider plugin",
            self.providers.clone(),
        );
        all.register(
            "kubelet_credential_provider_plugin_errors",
            "Number of errors from credential provider plugin",
            self.providers_failed.clone(),
        );
        all.register(
            "kubelet_credential_provider_config_info",
            "Information about the last applied credential provider configuration with hash as label",
            self.provider_config.clone(),
        );
    }

    /// A credential provider's program ran.
    pub fn provider_ran(&self, plugin_name: &str, took: Duration, failed: bool) {
        let name = PluginName { plugin_name: plugin_name.to_owned() };
        self.providers.get_or_create(&name).observe(took.as_secs_f64());
        if failed {
            self.providers_failed.get_or_create(&name).inc();
        }
    }

    /// Credential providers are configured by files of this digest.
    pub fn providers_configured(&self, hash: &str) {
        self.provider_config.get_or_create(&ConfigHash { hash: hash.to_owned() }).set(1);
    }
}
