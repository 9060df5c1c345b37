//! What is counted of images: of the programs that know credentials, and of who may use what is here.

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
    pull_checks: Family<CheckResult, Counter>,
    pull_intents: Gauge,
    pulled_records: Gauge,
    image_requests: Family<ImageRequest, Counter>,
    collected: Family<Collected, Counter>,
}

/// An image was removed for its `age`, or for `space`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Collected {
    reason: &'static str,
}

/// What came of asking whether an image must be pulled again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckResult {
    result: &'static str,
}

/// A container's image was to be there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ImageRequest {
    pull_policy: String,
    present_locally: &'static str,
    pull_required: &'static str,
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
            pull_checks: Family::default(),
            pull_intents: Gauge::default(),
            pulled_records: Gauge::default(),
            image_requests: Family::default(),
            collected: Family::default(),
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
        all.register(
            "kubelet_imagemanager_image_mustpull_checks",
            "Counter for how many times kubelet checked whether credentials need to be re-verified to access an image",
            self.pull_checks.clone(),
        );
        all.register(
            "kubelet_imagemanager_ondisk_pullintents",
            "Number of ImagePullIntents stored on disk",
            self.pull_intents.clone(),
        );
        all.register(
            "kubelet_imagemanager_ondisk_pulledrecords",
            "Number of ImagePulledRecords stored on disk",
            self.pulled_records.clone(),
        );
        all.register(
            "kubelet_image_manager_ensure_image_requests",
            "Number of ensure-image requests processed by the kubelet",
            self.image_requests.clone(),
        );
        all.register(
            "kubelet_image_garbage_collected",
            "Total number of images garbage collected by the kubelet, whether through disk usage or image age",
            self.collected.clone(),
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

    /// Whether an image must be pulled again was asked.
    pub fn must_pull_checked(&self, result: &'static str) {
        self.pull_checks.get_or_create(&CheckResult { result }).inc();
    }

    /// An unused image was removed for its `age`, or for `space`.
    pub fn image_collected(&self, reason: &'static str) {
        self.collected.get_or_create(&Collected { reason }).inc();
    }

    /// So many records of pulls are on disk.
    pub fn pull_records(&self, intents: usize, pulled: usize) {
        self.pull_intents.set(i64::try_from(intents).unwrap_or(i64::MAX));
        self.pulled_records.set(i64::try_from(pulled).unwrap_or(i64::MAX));
    }

    /// A container's image was to be there; `None` is unknown.
    pub fn image_requested(&self, policy: &str, present: Option<bool>, pull: Option<bool>) {
        let text = |known| match known {
            Some(true) => "true",
            Some(false) => "false",
            None => "unknown",
        };
        let labels = ImageRequest {
            pull_policy: policy.to_lowercase(),
            present_locally: text(present),
            pull_required: text(pull),
        };
        self.image_requests.get_or_create(&labels).inc();
    }

    /// Credential providers are configured by files of this digest.
    pub fn providers_configured(&self, hash: &str) {
        self.provider_config.get_or_create(&ConfigHash { hash: hash.to_owned() }).set(1);
    }
}
