//! Facts of the machine, and the plain data that each part is configured with.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cri_shim::api;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use crate::cluster::ClusterConfig;
use crate::config::{CgroupDriver, Host, NodeConfig, parse_bytes};
use crate::credential::{self, Exec, Loaded, Programs, Providers};
use crate::eviction::Signal;
use crate::metrics::METRICS;
use crate::node::{machine, object};
use crate::node_context::{self, NodeContext, PullLimits};
use crate::numa::{Kept, Numa, OpenError};
use crate::pod::cgroup::node::{Capacity, plan_node_limits};
use crate::pod::cgroup::{self, Group, GroupLimits, QosReserve};
use crate::runtime::Runtime;
use crate::user_ids::UserIds;

/// Facts that configuration depends on.
pub(crate) fn host() -> anyhow::Result<Host> {
    let hostname = nix::unistd::gethostname()?;
    Ok(Host {
        hostname: hostname.to_string_lossy().into_owned(),
        systemd_cgroups: cri_shim::systemd::usable(),
    })
}

/// What the agent must know of its node.
pub(super) fn node_context(config: &NodeConfig, standalone: bool) -> NodeContext {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let memory = total_memory().unwrap_or(u64::MAX);
    let reserved = |resource: &str| reserved(config, resource);
    let disk = nix::sys::statvfs::statvfs(existing(&config.root_dir))
        .map_or(0, |stat| stat.blocks() * stat.fragment_size());
    NodeContext {
        eviction: config.eviction.clone(),
        volumes: config.volumes,
        hostname: config.hostname.clone(),
        root_dir: config.root_dir.clone(),
        pod_logs_dir: config.pod_logs_dir.clone(),
        container_logs_dir: config.container_logs_dir.clone(),
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        resolv_conf: config.resolv_conf.clone(),
        cgroup_root: config.cgroup_root.clone(),
        cgroup_driver: driver(config),
        cgroups_per_qos: config.cgroups_per_qos,
        cpu_cfs_quota: config.cpu_cfs_quota,
        cpu_cfs_period_us: u64::try_from(config.cpu_cfs_period.as_micros()).unwrap_or(100_000),
        pod_pids_limit: config.pod_pids_limit.and_then(|limit| i64::try_from(limit).ok()),
        max_pods: max_pods(config, cpus),
        user_ids: UserIds::find(config.ids_per_pod, config.max_pods).map_err(|e| e.to_string()),
        allocatable_milli_cpu: (cpus * 1000).saturating_sub(reserved("cpu")),
        allocatable_memory: memory
            .saturating_sub(reserved("memory"))
            .saturating_sub(config.eviction.kept(Signal::Memory, memory)),
        capacity_memory: memory,
        allocatable_ephemeral: disk
            .saturating_sub(reserved("ephemeral-storage"))
            .saturating_sub(config.eviction.kept(Signal::NodeFs, disk))
            .saturating_mul(u64::from(!config.resources.no_storage_isolation)),
        local_storage_isolation: !config.resources.no_storage_isolation,
        node_limits: node_limits(config, cpus, memory),
        memory_qos: config.resources.memory_qos.map(|qos| node_context::MemoryQos {
            throttling: qos.throttling,
            reserve: qos.reserve,
            allocatable: i64::try_from(memory.saturating_sub(reserved("memory")))
                .unwrap_or(i64::MAX),
        }),
        cluster: !standalone,
        pull: PullLimits {
            serialize: config.serialize_image_pulls,
            max_parallel: config.max_parallel_image_pulls.and_then(|n| usize::try_from(n).ok()),
            registry_qps: config.registry_qps,
            registry_burst: config.registry_burst,
            verification: config.pull_verification.clone(),
        },
        gc: config.gc.clone(),
        qos_reserve: config.resources.qos_reserved.map(|percent| QosReserve {
            percent: percent.into(),
            allocatable: i64::try_from(memory.saturating_sub(reserved("memory")))
                .unwrap_or(i64::MAX),
        }),
        max_restart_backoff: config.max_container_restart_period,
        shutdown_grace: config.shutdown_grace.clone(),
        oom_group: config.resources.single_process_oom_kill != Some(true),
        swap: node_context::SwapUse {
            limited: config.resources.limited_swap,
            controller: machine::swap_controller(),
            capacity: machine::Machine::read().swap,
        },
        container_log_max_size: config.container_log_max_size,
        container_log_max_files: config.container_log_max_files,
        container_log_monitor_interval: config.container_log_monitor_interval,
        seccomp_default: config.seccomp_default,
        apparmor: cri_shim::apparmor::enabled(),
        allowed_unsafe_sysctls: config.allowed_unsafe_sysctls.clone(),
        runtime_request_timeout: config.runtime_request_timeout,
        ..NodeContext::new(config.node_name.clone(), node_ips(config, standalone))
    }
}

fn driver(config: &NodeConfig) -> node_context::CgroupDriver {
    match config.cgroup_driver {
        CgroupDriver::Cgroupfs => node_context::CgroupDriver::Cgroupfs,
        CgroupDriver::Systemd => node_context::CgroupDriver::Systemd,
    }
}

/// What is reserved for the system: milli-CPUs, or bytes.
fn reserved(config: &NodeConfig, resource: &str) -> u64 {
    let lists = [&config.resources.system_reserved, &config.resources.kube_reserved];
    let of = |list: &Vec<(String, String)>| {
        let found = list.iter().find(|(name, _)| name == resource)?;
        match found.1.strip_suffix('m') {
            Some(milli) if resource == "cpu" => milli.parse().ok(),
            _ if resource == "cpu" => parse_bytes(&format!("{}e3", found.1)),
            _ => parse_bytes(&found.1),
        }
    };
    lists.into_iter().filter_map(of).sum()
}

/// CPUs and memory that containers have to themselves, where that is asked for.
pub(super) fn numa(config: &NodeConfig, root: &Path) -> Result<Option<Arc<Numa>>, OpenError> {
    let resources = &config.resources;
    let lists = resources.system_reserved.iter().chain(&resources.kube_reserved);
    let huge = lists.map(|(name, _)| name).filter(|name| name.starts_with("hugepages-"));
    let mut memory: BTreeMap<String, u64> =
        huge.map(|name| (name.clone(), reserved(config, name))).collect();
    let evicted = config.eviction.kept(Signal::Memory, total_memory().unwrap_or(u64::MAX));
    memory.insert("memory".to_owned(), reserved(config, "memory").saturating_add(evicted));
    let cpus = resources.reserved_cpus.clone();
    let kept = Kept { cpus, milli_cpu: reserved(config, "cpu"), memory };
    Numa::open(root, Path::new("/sys"), &resources.numa, &kept)
}

fn max_pods(config: &NodeConfig, cpus: u64) -> u32 {
    plan_max_pods(config.max_pods, config.resources.pods_per_core, cpus)
}

/// Most pods at once: `maxPods`, or fewer by `podsPerCore`.
fn plan_max_pods(max: u32, per_core: Option<u32>, cpus: u64) -> u32 {
    let by_core = per_core.map(|pods| u64::from(pods).saturating_mul(cpus));
    by_core.and_then(|pods| u32::try_from(pods).ok()).map_or(max, |pods| pods.min(max))
}

/// What the node's groups may use.
fn node_limits(config: &NodeConfig, cpus: u64, memory: u64) -> Vec<(Group, GroupLimits)> {
    if !config.cgroups_per_qos {
        return Vec::new();
    }
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let capacity = Capacity {
        cpu: number(cpus.saturating_mul(1000)),
        memory: number(memory),
        pids: machine::pid_max().map(number),
    };
    let resources = &config.resources;
    let (system, kube) = (&resources.system_reserved, &resources.kube_reserved);
    plan_node_limits(&resources.enforced, capacity, system, kube)
}

/// How long another runtime may take to come up before the configuration is believed.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(10);

/// The cgroup driver of another runtime than our own, which wins over the configuration (KEP-4033):
/// two that differ would put a pod's limits and its containers in different places.
pub(super) async fn driver_of(runtime: &dyn Runtime, configured: CgroupDriver) -> CgroupDriver {
    let started = tokio::time::Instant::now();
    loop {
        match runtime.cgroup_driver().await {
            Ok(Some(api::CgroupDriver::Cgroupfs)) => return CgroupDriver::Cgroupfs,
            Ok(Some(api::CgroupDriver::Systemd)) => return CgroupDriver::Systemd,
            Ok(None) => return configured,
            Err(error) if started.elapsed() >= RUNTIME_PATIENCE => {
                tracing::warn!(%error, driver = ?configured,
                    "the runtime does not tell its cgroup driver; taking the configured one");
                return configured;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}

/// What the CRI shim is told.
pub(super) fn shim(config: &NodeConfig) -> cri_shim::Config {
    let defaults = cri_shim::Config::at(config.state_dir.clone(), config.run_dir.clone());
    let mut cni_bin_dirs = vec![config.cni_bin_dir.clone()];
    cni_bin_dirs
        .extend(defaults.cni_bin_dirs.iter().filter(|d| **d != config.cni_bin_dir).cloned());
    let mut runtime_handlers = defaults.runtime_handlers;
    runtime_handlers.extend(
        config
            .runtime_handlers
            .iter()
            .filter_map(|(name, handler)| Some((name.clone(), handler.path.clone()?))),
    );
    cri_shim::Config {
        cgroup_driver: match config.cgroup_driver {
            CgroupDriver::Cgroupfs => cri_shim::config::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => cri_shim::config::CgroupDriver::Systemd,
        },
        traces: config.tracing.is_some(),
        seccomp_profile_root: config.root_dir.join("seccomp"),
        pod_cidrs: config
            .pod_cidrs
            .iter()
            .map(|cidr| format!("{}/{}", cidr.address, cidr.prefix_len))
            .collect(),
        cni_conf_dir: config.cni_conf_dir.clone(),
        cni_bin_dirs,
        streaming: config.streaming.clone(),
        pinned_images: config.pinned_images.clone(),
        log_rotation: Some(cri_shim::config::LogRotation {
            max_size: config.container_log_max_size,
            max_files: config.container_log_max_files,
        }),
        cdi_dirs: config.cdi_spec_dirs.clone().unwrap_or(defaults.cdi_dirs),
        runtime_handlers,
        base_specs: config
            .runtime_handlers
            .iter()
            .filter_map(|(name, handler)| Some((name.clone(), handler.base_spec.clone()?)))
            .collect(),
        ..defaults
    }
}

/// The programs that know credentials for registries, once the root directory is there and this
/// agent's alone.
///
/// # Errors
/// The root directory cannot be looked at.
pub(super) fn providers(
    config: &NodeConfig,
    loaded: Option<Loaded>,
) -> anyhow::Result<Arc<Providers>> {
    let (Some(places), Some(loaded)) = (&config.credential_providers, loaded) else {
        return Ok(Arc::default());
    };
    METRICS.images.providers_configured(&loaded.hash);
    let root = &config.root_dir;
    let mark = credential::mark(root).with_context(|| format!("look at {}", root.display()))?;
    credential::end_leftovers(&mark);
    let programs: Arc<dyn Exec> = Arc::new(Programs { mark });
    Ok(Arc::new(Providers::new(loaded.providers, &places.programs, &programs)))
}

/// What the node's part in a cluster is told.
pub(super) fn cluster(config: &NodeConfig) -> ClusterConfig {
    let defaults = ClusterConfig::new(&config.node_name);
    ClusterConfig {
        hostname: config.hostname.clone(),
        node_ips: config.node_ips.clone(),
        kubeconfig: config.kubeconfig.clone().unwrap_or(defaults.kubeconfig),
        bootstrap_kubeconfig: config
            .bootstrap_kubeconfig
            .clone()
            .unwrap_or(defaults.bootstrap_kubeconfig),
        cert_dir: config.cert_dir.clone(),
        root_dir: config.root_dir.clone(),
        state_dir: config.root_dir.join("longshore"),
        node_api_port: config.node_api.address.port(),
        declared_features: declared_features(config.parts.cri && config.node_api.enabled),
        server_tls_bootstrap: config.node_api.enabled && config.node_api.tls.bootstrap,
        rotate_certificates: config.rotate_certificates,
        look: config.object_look,
        register_node: config.register_node,
        node_labels: config.node_labels.iter().cloned().collect(),
        register_with_taints: config.register_with_taints.clone(),
        max_pods: max_pods(config, machine::Machine::read().cpus),
        reserved: config
            .resources
            .system_reserved
            .iter()
            .chain(&config.resources.kube_reserved)
            .cloned()
            .collect(),
        local_storage_isolation: !config.resources.no_storage_isolation,
        pods_cgroup: config
            .cgroups_per_qos
            .then(|| cgroup::pods_folder(driver(config), &config.cgroup_root)),
        eviction: config.eviction.clone(),
        status_update_frequency: config.node_status_update_frequency,
        status_report_frequency: config.node_status_report_frequency,
        lease_duration_seconds: u32::try_from(config.node_lease_duration.as_secs()).unwrap_or(40),
        provider_id: config.provider_id.clone(),
        external_cloud_provider: config.external_cloud_provider,
        max_images: config.max_images,
        event_qps: config.event_qps,
        event_burst: config.event_burst,
        agent: config.parts.agent,
        proxy: config.parts.proxy,
        node_name: defaults.node_name,
    }
}

/// The node's addresses as its pods are told them. In a cluster those of the node object, so that a
/// pod's `hostIPs` say the same; alone, `--node-ip` or those of each family's default route. Else
/// any of the machine's.
fn node_ips(config: &NodeConfig, standalone: bool) -> Vec<IpAddr> {
    let routes = machine::default_addresses();
    let found = if !standalone {
        let planned = object::plan_addresses(&cluster(config), &routes, &[]);
        let internal = planned.iter().filter(|address| address.type_ == "InternalIP");
        internal.filter_map(|address| address.address.parse().ok()).collect()
    } else if config.node_ips.is_empty() {
        routes
    } else {
        config.node_ips.clone()
    };
    if !found.is_empty() {
        return found;
    }
    let interfaces = getifaddrs().into_iter().flatten();
    let up = interfaces.filter(|interface| {
        interface.flags.contains(InterfaceFlags::IFF_UP)
            && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
    });
    let address =
        up.filter_map(|interface| Some(IpAddr::V4(interface.address?.as_sockaddr_in()?.ip())));
    let first = address.into_iter().next();
    vec![first.unwrap_or(Ipv4Addr::LOCALHOST.into())]
}

fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The nearest folder of `path` that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}
/// The features that a kubelet 1.36 declares and that are here, in order.
fn declared_features(streams: bool) -> Vec<String> {
    // The built-in runtime's streaming server speaks what kubelet would have to translate.
    let streams = streams.then_some("ExtendWebSocketsToKubelet");
    streams
        .into_iter()
        .chain([
            "InPlacePodLevelResourcesVerticalScaling",
            "InPlacePodVerticalScalingInitContainers",
            "RestartAllContainersOnContainerExits",
        ])
        .map(String::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_limit_of_pods_counts() {
        for (per_core, cpus, pods) in [
            (None, 2, 110),
            (Some(10), 2, 20),
            (Some(100), 2, 110),
            (Some(u32::MAX), u64::MAX, 110),
        ] {
            assert_eq!(plan_max_pods(110, per_core, cpus), pods, "{per_core:?} {cpus}");
        }
    }
}
