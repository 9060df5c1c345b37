//! Metrics of claims and their drivers.

use std::collections::BTreeMap;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets_range};
use prometheus_client::registry::Registry;

use super::{Histograms, Metrics};

/// In the place of a driver: any of them.
const ANY: &str = "<any>";

/// Labels `operation_name`, `is_error`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Operation {
    operation_name: &'static str,
    is_error: &'static str,
}

/// Labels of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    driver_name: String,
    method_name: String,
    grpc_status_code: String,
}

/// Label `driver_name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Driver {
    driver_name: String,
}

fn histogram() -> Histogram {
    Histogram::new(exponential_buckets_range(0.1, 40.0, 15))
}

/// The metrics.
pub(super) struct DraMetrics {
    operations: Histograms<Operation>,
    calls: Histograms<Call>,
    in_use: Family<Driver, Gauge>,
}

impl Default for DraMetrics {
    fn default() -> Self {
        Self {
            operations: Family::new_with_constructor(histogram),
            calls: Family::new_with_constructor(histogram),
            in_use: Family::default(),
        }
    }
}

impl DraMetrics {
    pub(super) fn register(&self, all: &mut Registry) {
        all.register(
            "dra_operations_duration_seconds",
            "Latency histogram in seconds for the duration of handling all ResourceClaims referenced by a pod when the pod starts or stops. Broken down by operation and its success",
            self.operations.clone(),
        );
        all.register(
            "dra_grpc_operations_duration_seconds",
            "Duration in seconds of the DRA gRPC operations",
            self.calls.clone(),
        );
        all.register(
            "dra_resource_claims_in_use",
            "The number of ResourceClaims that are currently in use on the node, by driver name and across all drivers (<any>)",
            self.in_use.clone(),
        );
    }
}

impl Metrics {
    /// A pod's claims were prepared or taken back, or not.
    pub fn dra_operation(&self, operation: &'static str, took: Duration, failed: bool) {
        let is_error = if failed { "true" } else { "false" };
        let labels = Operation { operation_name: operation, is_error };
        self.dra.operations.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A driver has answered.
    pub fn dra_called(&self, driver: &str, method: String, code: String, took: Duration) {
        let labels =
            Call { driver_name: driver.to_owned(), method_name: method, grpc_status_code: code };
        self.dra.calls.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// How many claims are prepared, by driver and in all.
    pub fn dra_in_use(&self, (by_driver, all): (BTreeMap<String, i64>, i64)) {
        // A driver that has none any more is told of no more.
        self.dra.in_use.clear();
        for (driver_name, count) in by_driver.into_iter().chain([(ANY.to_owned(), all)]) {
            self.dra.in_use.get_or_create(&Driver { driver_name }).set(count);
        }
    }
}
