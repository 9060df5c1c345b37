//! Metrics of device plugins.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::{Histograms, Metrics, histogram};

/// Label `resource_name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource_name: String,
}

/// The metrics.
pub(super) struct DeviceMetrics {
    registrations: Family<Resource, Counter>,
    allocations: Histograms<Resource>,
}

impl Default for DeviceMetrics {
    fn default() -> Self {
        Self {
            registrations: Family::default(),
            allocations: Family::new_with_constructor(histogram),
        }
    }
}

impl DeviceMetrics {
    pub(super) fn register(&self, all: &mut Registry) {
        all.register(
            "kubelet_device_plugin_registration",
            "Cumulative number of device plugin registrations. Broken down by resource name",
            self.registrations.clone(),
        );
        all.register(
            "kubelet_device_plugin_alloc_duration_seconds",
            "Duration in seconds to serve a device plugin Allocation request. Broken down by resource name",
            self.allocations.clone(),
        );
    }
}

impl Metrics {
    /// A device plugin has called to register.
    pub fn device_plugin_registered(&self, resource: &str) {
        let resource = Resource { resource_name: resource.to_owned() };
        self.devices.registrations.get_or_create(&resource).inc();
    }

    /// A plugin has answered Allocate, well or not.
    pub fn devices_allocated(&self, resource: &str, took: Duration) {
        let resource = Resource { resource_name: resource.to_owned() };
        self.devices.allocations.get_or_create(&resource).observe(took.as_secs_f64());
    }
}
