//! `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1): every field of 1.36 by name.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::core::Duration;
use serde::Deserialize;

use super::documents::{Fields, Treatment};
use super::kube_proxy::Logging;
use super::tracing::TracingConfiguration;

/// The fields that this node reads. What is not given is `None`; defaults are applied by `resolve`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct KubeletConfiguration {
    pub static_pod_path: Option<String>,
    #[serde(rename = "staticPodURL")]
    pub static_pod_url: Option<String>,
    #[serde(rename = "staticPodURLHeader")]
    pub static_pod_url_header: Option<BTreeMap<String, Vec<String>>>,
    pub http_check_frequency: Option<Duration>,
    pub pod_logs_dir: Option<String>,
    pub sync_frequency: Option<Duration>,
    pub address: Option<String>,
    pub port: Option<u16>,
    pub tls_cert_file: Option<String>,
    pub tls_private_key_file: Option<String>,
    pub enable_server: Option<bool>,
    pub read_only_port: Option<u16>,
    pub tls_cipher_suites: Option<Vec<String>>,
    pub tls_curve_preferences: Option<Vec<i32>>,
    pub tls_min_version: Option<String>,
    pub rotate_certificates: Option<bool>,
    #[serde(rename = "serverTLSBootstrap")]
    pub server_tls_bootstrap: Option<bool>,
    pub enable_debugging_handlers: Option<bool>,
    pub enable_system_log_handler: Option<bool>,
    pub enable_system_log_query: Option<bool>,
    pub enable_profiling_handler: Option<bool>,
    pub enable_debug_flags_handler: Option<bool>,
    pub authentication: Option<Authentication>,
    pub authorization: Option<Authorization>,
    #[serde(rename = "registryPullQPS")]
    pub registry_pull_qps: Option<u32>,
    pub registry_burst: Option<u32>,
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: Option<u32>,
    pub event_burst: Option<u32>,
    pub healthz_port: Option<u16>,
    pub healthz_bind_address: Option<String>,
    pub cluster_domain: Option<String>,
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Option<Vec<IpAddr>>,
    pub node_status_update_frequency: Option<Duration>,
    pub node_status_report_frequency: Option<Duration>,
    pub node_lease_duration_seconds: Option<u32>,
    #[serde(rename = "imageMinimumGCAge")]
    pub image_minimum_gc_age: Option<Duration>,
    #[serde(rename = "imageMaximumGCAge")]
    pub image_maximum_gc_age: Option<Duration>,
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: Option<u8>,
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: Option<u8>,
    pub cgroup_root: Option<String>,
    pub system_cgroups: Option<String>,
    pub kubelet_cgroups: Option<String>,
    pub cgroup_driver: Option<String>,
    #[serde(rename = "cgroupsPerQOS")]
    pub cgroups_per_qos: Option<bool>,
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: Option<bool>,
    #[serde(rename = "cpuCFSQuotaPeriod")]
    pub cpu_cfs_quota_period: Option<Duration>,
    pub allowed_unsafe_sysctls: Option<Vec<String>>,
    pub container_log_monitor_interval: Option<Duration>,
    pub runtime_request_timeout: Option<Duration>,
    pub streaming_connection_idle_timeout: Option<Duration>,
    pub max_pods: Option<u32>,
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    pub pod_pids_limit: Option<i64>,
    pub resolv_conf: Option<String>,
    pub serialize_image_pulls: Option<bool>,
    pub max_parallel_image_pulls: Option<u32>,
    pub image_pull_credentials_verification_policy: Option<String>,
    pub preloaded_images_verification_allowlist: Option<Vec<String>>,
    #[serde(rename = "kubeAPIQPS")]
    pub kube_api_qps: Option<u32>,
    #[serde(rename = "kubeAPIBurst")]
    pub kube_api_burst: Option<u32>,
    pub eviction_hard: Option<BTreeMap<String, String>>,
    pub eviction_soft: Option<BTreeMap<String, String>>,
    pub eviction_soft_grace_period: Option<BTreeMap<String, String>>,
    pub eviction_minimum_reclaim: Option<BTreeMap<String, String>>,
    pub eviction_max_pod_grace_period: Option<i32>,
    pub merge_default_eviction_settings: Option<bool>,
    pub eviction_pressure_transition_period: Option<Duration>,
    pub container_log_max_size: Option<String>,
    pub container_log_max_files: Option<u32>,
    pub system_reserved: Option<BTreeMap<String, String>>,
    pub kube_reserved: Option<BTreeMap<String, String>>,
    #[serde(rename = "providerID")]
    pub provider_id: Option<String>,
    pub feature_gates: Option<BTreeMap<String, bool>>,
    pub memory_throttling_factor: Option<f64>,
    pub memory_reservation_policy: Option<String>,
    pub fail_swap_on: Option<bool>,
    pub fail_cgroup_v1: Option<bool>,
    #[serde(rename = "singleProcessOOMKill")]
    pub single_process_oom_kill: Option<bool>,
    pub protect_kernel_defaults: Option<bool>,
    pub pods_per_core: Option<u32>,
    pub cpu_manager_policy: Option<String>,
    pub cpu_manager_policy_options: Option<BTreeMap<String, String>>,
    pub cpu_manager_reconcile_period: Option<Duration>,
    pub memory_manager_policy: Option<String>,
    pub reserved_memory: Option<Vec<MemoryReservation>>,
    pub topology_manager_policy: Option<String>,
    pub topology_manager_policy_options: Option<BTreeMap<String, String>>,
    pub topology_manager_scope: Option<String>,
    #[serde(rename = "reservedSystemCPUs")]
    pub reserved_system_cpus: Option<String>,
    pub local_storage_capacity_isolation: Option<bool>,
    pub enforce_node_allocatable: Option<Vec<String>>,
    pub system_reserved_cgroup: Option<String>,
    pub kube_reserved_cgroup: Option<String>,
    pub memory_swap: Option<MemorySwap>,
    pub shutdown_grace_period: Option<Duration>,
    pub shutdown_grace_period_critical_pods: Option<Duration>,
    pub shutdown_grace_period_by_pod_priority: Option<Vec<ShutdownGracePeriodByPodPriority>>,
    pub crash_loop_back_off: Option<CrashLoopBackOff>,
    pub register_with_taints: Option<Vec<Taint>>,
    pub register_node: Option<bool>,
    pub node_status_max_images: Option<i32>,
    pub seccomp_default: Option<bool>,
    pub container_runtime_endpoint: Option<String>,
    pub image_service_endpoint: Option<String>,
    pub user_namespaces: Option<UserNamespaces>,
    pub tracing: Option<TracingConfiguration>,
    pub qos_reserved: Option<BTreeMap<String, String>>,
    pub run_once: Option<bool>,
    pub config_map_and_secret_change_detection_strategy: Option<String>,
    pub logging: Option<Logging>,
}

/// Who may talk to the node API.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Authentication {
    pub x509: Option<X509>,
    pub webhook: Option<WebhookAuthentication>,
    pub anonymous: Option<Anonymous>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct X509 {
    #[serde(rename = "clientCAFile")]
    pub client_ca_file: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct WebhookAuthentication {
    pub enabled: Option<bool>,
    #[serde(rename = "cacheTTL")]
    pub cache_ttl: Option<Duration>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Anonymous {
    pub enabled: Option<bool>,
}

/// What who may talk to the node API may do.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Authorization {
    pub mode: Option<String>,
    pub webhook: Option<WebhookAuthorization>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct WebhookAuthorization {
    #[serde(rename = "cacheAuthorizedTTL")]
    pub cache_authorized_ttl: Option<Duration>,
    #[serde(rename = "cacheUnauthorizedTTL")]
    pub cache_unauthorized_ttl: Option<Duration>,
}

/// KEP-1769.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct MemoryReservation {
    #[serde(default)]
    pub numa_node: u32,
    #[serde(default)]
    pub limits: BTreeMap<String, Quantity>,
}

/// KEP-2400.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct MemorySwap {
    pub swap_behavior: Option<String>,
}

/// KEP-2712.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct ShutdownGracePeriodByPodPriority {
    #[serde(default)]
    pub priority: i32,
    #[serde(default)]
    pub shutdown_grace_period_seconds: i64,
}

/// KEP-4603.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct CrashLoopBackOff {
    pub max_container_restart_period: Option<Duration>,
}

/// KEP-127.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct UserNamespaces {
    pub ids_per_pod: Option<i64>,
}

use Treatment::{Inert, NotBuilt, Used};

/// All fields of the kind.
pub(super) const FIELDS: Fields = &[
    ("enableServer", Used),
    ("staticPodPath", Used),
    ("podLogsDir", Used),
    ("syncFrequency", Used),
    ("fileCheckFrequency", Inert), // manifests are watched with inotify
    ("httpCheckFrequency", Used),
    ("staticPodURL", Used),
    ("staticPodURLHeader", Used),
    ("address", Used),
    ("port", Used),
    ("readOnlyPort", Used),
    ("tlsCertFile", Used),
    ("tlsPrivateKeyFile", Used),
    ("tlsCipherSuites", Used),
    ("tlsCurvePreferences", Used),
    ("tlsMinVersion", Used),
    ("rotateCertificates", Used),
    ("serverTLSBootstrap", Used),
    ("authentication", Used),
    ("authorization", Used),
    ("registryPullQPS", Used),
    ("registryBurst", Used),
    ("imagePullCredentialsVerificationPolicy", Used),
    ("preloadedImagesVerificationAllowlist", Used),
    ("eventRecordQPS", Used),
    ("eventBurst", Used),
    ("enableDebuggingHandlers", Used),
    ("enableContentionProfiling", Inert),
    ("healthzPort", Used),
    ("healthzBindAddress", Used),
    ("oomScoreAdj", Inert), // the unit's OOMScoreAdjust
    ("clusterDomain", Used),
    ("clusterDNS", Used),
    ("streamingConnectionIdleTimeout", Used),
    ("nodeStatusUpdateFrequency", Used),
    ("nodeStatusReportFrequency", Used),
    ("nodeLeaseDurationSeconds", Used),
    ("imageMinimumGCAge", Used),
    ("imageMaximumGCAge", Used),
    ("imageGCHighThresholdPercent", Used),
    ("imageGCLowThresholdPercent", Used),
    ("volumeStatsAggPeriod", Inert),
    ("kubeletCgroups", Used),
    ("systemCgroups", Used),
    ("cgroupRoot", Used),
    ("cgroupsPerQOS", Used),
    ("cgroupDriver", Used),
    ("cpuManagerPolicy", Used),
    ("singleProcessOOMKill", Used),
    ("cpuManagerPolicyOptions", Used),
    ("cpuManagerReconcilePeriod", Used),
    ("memoryManagerPolicy", Used),
    ("topologyManagerPolicy", Used),
    ("topologyManagerScope", Used),
    ("topologyManagerPolicyOptions", Used),
    ("qosReserved", Used),
    ("runtimeRequestTimeout", Used),
    ("hairpinMode", Inert), // the network plugin's; kubelet has no use for it either
    ("maxPods", Used),
    ("podCIDR", Used),
    ("podPidsLimit", Used),
    ("resolvConf", Used),
    ("runOnce", Used),
    ("cpuCFSQuota", Used),
    ("cpuCFSQuotaPeriod", Used),
    ("nodeStatusMaxImages", Used),
    ("maxOpenFiles", Inert), // the unit's LimitNOFILE
    ("contentType", Inert),
    ("kubeAPIQPS", Used),
    ("kubeAPIBurst", Used),
    ("serializeImagePulls", Used),
    ("maxParallelImagePulls", Used),
    ("evictionHard", Used),
    ("evictionSoft", Used),
    ("evictionSoftGracePeriod", Used),
    ("evictionPressureTransitionPeriod", Used),
    ("evictionMaxPodGracePeriod", Used),
    ("evictionMinimumReclaim", Used),
    ("mergeDefaultEvictionSettings", Used),
    ("podsPerCore", Used),
    ("enableControllerAttachDetach", NotBuilt(&["true"])),
    ("protectKernelDefaults", Used),
    ("makeIPTablesUtilChains", Inert),
    ("iptablesMasqueradeBit", Inert),
    ("iptablesDropBit", Inert),
    ("featureGates", Used),
    ("failSwapOn", Used),
    ("memorySwap", Used),
    ("containerLogMaxSize", Used),
    ("containerLogMaxFiles", Used),
    ("containerLogMaxWorkers", Inert), // each monitor rotates its own
    ("containerLogMonitorInterval", Used),
    ("configMapAndSecretChangeDetectionStrategy", Used),
    ("systemReserved", Used),
    ("kubeReserved", Used),
    ("reservedSystemCPUs", Used),
    ("showHiddenMetricsForVersion", Inert),
    ("systemReservedCgroup", Used),
    ("kubeReservedCgroup", Used),
    ("enforceNodeAllocatable", Used),
    ("allowedUnsafeSysctls", Used),
    ("volumePluginDir", Inert), // flexVolume is refused by name
    ("providerID", Used),
    ("kernelMemcgNotification", Inert),
    ("logging", Used),
    ("enableSystemLogHandler", Used),
    ("enableSystemLogQuery", Used),
    ("shutdownGracePeriod", Used),
    ("shutdownGracePeriodCriticalPods", Used),
    ("shutdownGracePeriodByPodPriority", Used),
    ("crashLoopBackOff", Used),
    ("reservedMemory", Used),
    ("enableProfilingHandler", Used),
    ("enableDebugFlagsHandler", Used),
    ("seccompDefault", Used),
    ("memoryThrottlingFactor", Used),
    ("memoryReservationPolicy", Used),
    ("registerWithTaints", Used),
    ("registerNode", Used),
    ("tracing", Used),
    ("localStorageCapacityIsolation", Used),
    ("containerRuntimeEndpoint", Used),
    ("imageServiceEndpoint", Used),
    ("failCgroupV1", Used),
    ("userNamespaces", Used),
];
