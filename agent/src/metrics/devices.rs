//! Metrics of device plugins, and of who asks which resources pods have.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{Histograms, Metrics, histogram};

/// Label `resource_name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource_name: String,
}

/// Label `server_api_version`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Version {
    server_api_version: &'static str,
}

/// What the PodResources API is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodResourcesCall {
    /// All pods.
    List,
    /// What there is.
    Allocatable,
    /// One pod.
    Get,
}

/// The metrics.
pub(super) struct DeviceMetrics {
    pod_resources: Family<Version, Counter>,
    /// Requests and errors by call.
    pod_resources_calls: [(Family<Version, Gauge>, Family<Version, Gauge>); 3],
    registrations: Family<Resource, Counter>,
    allocations: Histograms<Resource>,
}

impl Default for DeviceMetrics {
    fn default() -> Self {
        Self {
            pod_resources: Family::default(),
            pod_resources_calls: Default::default(),
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
        all.register(
            "kubelet_pod_resources_endpoint_requests",
            "Cumulative number of requests to the PodResource endpoint. Broken down by server api version",
            self.pod_resources.clone(),
        );
        // Gauges, as the encoder would have their names end in `_total`, which upstream's do not.
        let names =
            [("list", "List"), ("get_allocatable", "GetAllocatableResources"), ("get", "Get")];
        for ((name, verb), (requests, errors)) in names.into_iter().zip(&self.pod_resources_calls) {
            all.register(
                format!("kubelet_pod_resources_endpoint_requests_{name}"),
                format!("Number of requests to the PodResource {verb} endpoint. Broken down by server api version"),
                requests.clone(),
            );
            all.register(
                format!("kubelet_pod_resources_endpoint_errors_{name}"),
                format!("Number of requests to the PodResource {verb} endpoint which returned error. Broken down by server api version"),
                errors.clone(),
            );
        }
    }
}

impl Metrics {
    /// The PodResources API was asked.
    pub fn pod_resources_asked(&self, call: PodResourcesCall, failed: bool) {
        let version = Version { server_api_version: "v1" };
        self.devices.pod_resources.get_or_create(&version).inc();
        let (requests, errors) = &self.devices.pod_resources_calls[call as usize];
        requests.get_or_create(&version).inc();
        if failed {
            errors.get_or_create(&version).inc();
        }
    }

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
