//! What is counted of volumes: the work on them, what CSI drivers are asked, images as volumes.

use std::time::Duration;

use k8s_openapi::api::core::v1::Volume;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{Histograms, Metrics};

/// Labels of work on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StorageOperation {
    migrated: &'static str,
    operation_name: &'static str,
    status: &'static str,
    volume_plugin: String,
}

/// Labels of a volume's way into a pod, from its first sight on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WholeOperation {
    plugin_name: String,
    operation_name: &'static str,
}

/// Labels of a call to a CSI driver.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CsiCall {
    driver_name: String,
    method_name: String,
    grpc_status_code: String,
    migrated: &'static str,
}

/// Upstream's buckets of storage operations, seconds.
const STORAGE: [f64; 13] =
    [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 25.0, 50.0, 120.0, 300.0, 600.0];

fn histogram() -> Histogram {
    Histogram::new(STORAGE)
}

/// What is done with volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeWork {
    /// Brought about for a pod.
    Mount,
    /// Taken away after it.
    Unmount,
}

/// The metrics.
pub(super) struct VolumeMetrics {
    operations: Histograms<StorageOperation>,
    whole: Histograms<WholeOperation>,
    csi: Histograms<CsiCall>,
    images_requested: Counter,
    images_mounted: Counter,
    images_failed: Counter,
}

impl Default for VolumeMetrics {
    fn default() -> Self {
        Self {
            operations: Family::new_with_constructor(histogram),
            whole: Family::new_with_constructor(histogram),
            csi: Family::new_with_constructor(histogram),
            images_requested: Counter::default(),
            images_mounted: Counter::default(),
            images_failed: Counter::default(),
        }
    }
}

impl VolumeMetrics {
    pub(super) fn register(&self, all: &mut Registry) {
        all.register(
            "storage_operation_duration_seconds",
            "Storage operation duration",
            self.operations.clone(),
        );
        all.register(
            "volume_operation_total_seconds",
            "Storage operation end to end duration in seconds",
            self.whole.clone(),
        );
        all.register(
            "csi_operations_seconds",
            "Container Storage Interface operation duration with gRPC error code status total",
            self.csi.clone(),
        );
        all.register(
            "kubelet_image_volume_requested",
            "Number of requested image volumes",
            self.images_requested.clone(),
        );
        all.register(
            "kubelet_image_volume_mounted_succeed",
            "Number of successful image volume mounts",
            self.images_mounted.clone(),
        );
        all.register(
            "kubelet_image_volume_mounted_errors",
            "Number of failed image volume mounts",
            self.images_failed.clone(),
        );
    }
}

impl Metrics {
    /// The volumes of a pod were worked on, by these plugins. They are worked on together, so each is
    /// credited with the time of all.
    pub fn volumes_done(
        &self,
        work: VolumeWork,
        plugins: impl Iterator<Item = String>,
        took: Duration,
        failed: bool,
    ) {
        let status = if failed { "fail-unknown" } else { "success" };
        let operation_name = match work {
            VolumeWork::Mount => "volume_mount",
            VolumeWork::Unmount => "volume_unmount",
        };
        for plugin in plugins {
            let volume_plugin = plugin.clone();
            let labels =
                StorageOperation { migrated: "false", operation_name, status, volume_plugin };
            self.volumes.operations.get_or_create(&labels).observe(took.as_secs_f64());
            if work == VolumeWork::Mount && !failed {
                let operation_name = "overall_volume_mount";
                let labels = WholeOperation { plugin_name: plugin, operation_name };
                self.volumes.whole.get_or_create(&labels).observe(took.as_secs_f64());
            }
        }
    }

    /// A CSI driver was asked.
    pub fn csi_called(&self, driver: &str, method: String, code: String, took: Duration) {
        let labels = CsiCall {
            driver_name: driver.to_owned(),
            method_name: method,
            grpc_status_code: code,
            migrated: "false",
        };
        self.volumes.csi.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A container with so many images as volumes was made, or not.
    pub fn image_volumes_mounted(&self, count: usize, failed: bool) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.volumes.images_requested.inc_by(count);
        let outcome =
            if failed { &self.volumes.images_failed } else { &self.volumes.images_mounted };
        outcome.inc_by(count);
    }
}

/// The plugin that upstream has for a volume, with the driver where the pod names one.
pub fn volume_plugin(volume: &Volume) -> String {
    if let Some(csi) = &volume.csi {
        return format!("kubernetes.io/csi:{}", csi.driver);
    }
    let plugin = if volume.config_map.is_some() {
        "configmap"
    } else if volume.secret.is_some() {
        "secret"
    } else if volume.projected.is_some() {
        "projected"
    } else if volume.downward_api.is_some() {
        "downward-api"
    } else if volume.empty_dir.is_some() {
        "empty-dir"
    } else if volume.host_path.is_some() {
        "host-path"
    } else if volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some() {
        "csi"
    } else {
        "other"
    };
    format!("kubernetes.io/{plugin}")
}
