//! The node's configuration, resolved: every value decided.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;

use super::fields::{cidrs, ip_or, is_dns1123_subdomain, parse_port_range, parse_taint, period};
use super::quantity::parse_bytes;
use super::{
    ConfigError, Documents, NodeApiConfig, Note, ProxyPages, ResourceConfig, RuntimeHandler,
    VolumeGates, behaviour, configz, garbage, node_api, proxy, proxy_pages, pulls, resources,
    shutdown, volumes,
};
use crate::cli::{CgroupDriverFlag, NodeFlags, Part};
use crate::cluster::Look;
use crate::credential::Places;
use crate::eviction::{EvictionConfig, Settings, usual_hard};
use crate::node::housing::Housing;
use crate::node_context::{GcLimits, ShutdownGrace};
use crate::pod::sysctls;
use crate::pulled::decide::Policy;
use crate::source::url::PodUrl;

/// Where kubeadm and `longshore join` put the node's credentials.
const KUBECONFIG: &str = "/etc/kubernetes/kubelet.conf";
const BOOTSTRAP_KUBECONFIG: &str = "/etc/kubernetes/bootstrap-kubelet.conf";
const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// Facts of the machine that defaults depend on.
#[derive(Clone, Debug)]
pub struct Host {
    /// The kernel's hostname.
    pub hostname: String,
    /// systemd is PID 1 and makes the cgroups.
    pub systemd_cgroups: bool,
}

/// Which parts run in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The kubelet's work.
    pub agent: bool,
    /// The Service proxy.
    pub proxy: bool,
    /// The CRI shim.
    pub cri: bool,
}

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Directories in cgroupfs.
    Cgroupfs,
    /// Slices and scopes of systemd.
    Systemd,
}

/// Everything that `longshore run` needs to know.
#[derive(Clone, Debug)]
#[allow(
    missing_docs,
    reason = "each field is named as its flag, which is documented in cli::flags"
)]
pub struct NodeConfig {
    pub parts: Parts,
    pub standalone: bool,
    pub node_name: String,
    pub hostname: String,
    pub node_ips: Vec<IpAddr>,
    pub node_labels: Vec<(String, String)>,
    pub register_with_taints: Vec<Taint>,
    pub register_node: bool,
    pub provider_id: Option<String>,
    pub external_cloud_provider: bool,
    /// `nodeStatusMaxImages`; `None` is no limit.
    pub max_images: Option<usize>,
    pub kubeconfig: Option<PathBuf>,
    pub bootstrap_kubeconfig: Option<PathBuf>,
    pub cert_dir: PathBuf,
    pub root_dir: PathBuf,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub pod_logs_dir: PathBuf,
    pub container_logs_dir: PathBuf,
    /// `None`: the built-in shim.
    pub container_runtime_endpoint: Option<String>,
    pub image_service_endpoint: Option<String>,
    /// Where credential providers are configured, if any are.
    pub credential_providers: Option<Places>,
    /// Who may use images that are on the node; `None` is everybody.
    pub pull_verification: Option<Policy>,
    /// What of volumes feature gates decide.
    pub volumes: VolumeGates,
    pub pod_manifest_path: Option<PathBuf>,
    /// Where else static pods come from.
    pub static_pod_url: Option<PodUrl>,
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    pub resolv_conf: PathBuf,
    pub pod_cidrs: Vec<::proxy::object::Cidr>,
    pub service_cluster_ip_ranges: Vec<::proxy::object::Cidr>,
    /// Inclusive.
    pub service_node_port_range: (u16, u16),
    /// Everything that the proxy is told.
    pub proxy: ::proxy::Config,
    /// What its metrics port shows beside metrics.
    pub proxy_pages: ProxyPages,
    pub healthz: Option<SocketAddr>,
    pub node_api: NodeApiConfig,
    pub cgroup_root: String,
    pub cgroup_driver: CgroupDriver,
    pub cgroups_per_qos: bool,
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_period: Duration,
    pub allowed_unsafe_sysctls: Vec<String>,
    pub container_log_monitor_interval: Duration,
    pub max_pods: u32,
    pub ids_per_pod: Option<i64>,
    pub pod_pids_limit: Option<u64>,
    pub registry_qps: u32,
    pub registry_burst: u32,
    pub serialize_image_pulls: bool,
    pub max_parallel_image_pulls: Option<u32>,
    pub sync_frequency: Duration,
    pub runtime_request_timeout: Duration,
    pub max_container_restart_period: Duration,
    /// How long pods have when the node shuts down, by priority; none where it is not waited for.
    pub shutdown_grace: Vec<ShutdownGrace>,
    /// What pods get of the machine.
    pub resources: ResourceConfig,
    pub node_status_update_frequency: Duration,
    pub node_status_report_frequency: Duration,
    pub node_lease_duration: Duration,
    pub event_qps: u32,
    pub event_burst: u32,
    /// When unused images and dead containers go.
    pub gc: GcLimits,
    pub container_log_max_size: u64,
    pub container_log_max_files: u32,
    pub seccomp_default: bool,
    /// When pods must go for the node.
    pub eviction: EvictionConfig,
    /// Whether the client certificate is renewed.
    pub rotate_certificates: bool,
    /// Where this process and the machine's others belong.
    pub housing: Housing,
    /// How changes of ConfigMaps and Secrets are noticed.
    pub object_look: Look,
    pub cni_conf_dir: PathBuf,
    /// Folders with CDI files, where they are not the usual ones.
    pub cdi_spec_dirs: Option<Vec<PathBuf>>,
    /// Runtime handlers of the built-in runtime.
    pub runtime_handlers: BTreeMap<String, RuntimeHandler>,
    pub cni_bin_dir: PathBuf,
    /// Where the built-in shim streams exec, attach and port-forward.
    pub streaming: cri_shim::streaming::StreamConfig,
    /// Images that garbage collection leaves alone.
    pub pinned_images: Vec<String>,
    /// Where traces go, if anywhere.
    pub tracing: Option<super::tracing::Tracing>,
    pub log_filter: String,
    pub log_json: bool,
    pub notes: Vec<Note>,
}

/// Flags over documents over defaults.
pub fn resolve(
    flags: &NodeFlags,
    documents: Documents,
    host: &Host,
) -> Result<NodeConfig, ConfigError> {
    let Documents { kubelet, kubelet_written, mut kube_proxy, longshore, mut notes } = documents;
    flags.kube_proxy.over(&mut kube_proxy);
    let parts = Parts {
        agent: flags.only.is_empty() || flags.only.contains(&Part::Agent),
        proxy: flags.only.is_empty() || flags.only.contains(&Part::Proxy),
        cri: flags.only.contains(&Part::Cri)
            || (flags.only.is_empty()
                && flags.container_runtime_endpoint.is_none()
                && kubelet.container_runtime_endpoint.as_deref().unwrap_or_default().is_empty()),
    };
    let of_agent = proxy::logging("KubeletConfiguration", &kubelet.logging)?;
    let of_proxy = proxy::logging("KubeProxyConfiguration", &kube_proxy.logging)?;
    let (verbosity, log_json) = (of_agent.0.or(of_proxy.0), of_agent.1 || of_proxy.1);
    behaviour::check(&kubelet, &mut notes)?;
    let root = flags.cgroup_root.as_deref().or(kubelet.cgroup_root.as_deref());
    let housing = behaviour::housing(&kubelet, root)?;
    let (rotate_certificates, object_look) =
        (kubelet.rotate_certificates != Some(false), behaviour::object_look(&kubelet)?);
    let path = |flag: &Option<PathBuf>, file: Option<String>, default: &str| -> PathBuf {
        let file = file.filter(|file| !file.is_empty()).map(PathBuf::from);
        flag.clone().or(file).unwrap_or_else(|| PathBuf::from(default))
    };
    let cgroup_driver = match flags.cgroup_driver {
        Some(CgroupDriverFlag::Cgroupfs) => CgroupDriver::Cgroupfs,
        Some(CgroupDriverFlag::Systemd) => CgroupDriver::Systemd,
        None => match kubelet.cgroup_driver.as_deref().unwrap_or_default() {
            "" if host.systemd_cgroups => CgroupDriver::Systemd,
            "" | "cgroupfs" => CgroupDriver::Cgroupfs,
            "systemd" => CgroupDriver::Systemd,
            other => {
                return Err(ConfigError::invalid(
                    "KubeletConfiguration.cgroupDriver",
                    format!("{other:?} is unknown; use cgroupfs or systemd"),
                ));
            }
        },
    };
    let node_api_address = SocketAddr::new(
        match flags.address {
            Some(ip) => ip,
            None => ip_or("KubeletConfiguration.address", kubelet.address.as_deref(), "0.0.0.0")?,
        },
        flags.port.or(kubelet.port).filter(|port| *port != 0).unwrap_or(10250),
    );
    let shown = configz::shown(kubelet_written, node_api_address, cgroup_driver);
    let node_api_config = node_api::resolve(&kubelet, node_api_address, shown)?;
    let shutdown_grace = shutdown::resolve(&kubelet)?;
    let resources = resources::resolve(&kubelet)?;
    let gc = garbage::resolve(flags, &kubelet)?;
    let static_pod_url = static_pod_url(&kubelet)?;
    let credential_providers = pulls::credential_providers(flags, &kubelet)?;
    let pull_verification = pulls::verification(&kubelet)?;
    let volumes = volumes::gates(&kubelet)?;
    let gates = kubelet.feature_gates.iter().flatten();
    notes.extend(gates.filter(|(gate, _)| !resources::reads_gate(gate)).map(|(gate, on)| {
        let field = format!("KubeletConfiguration.featureGates.{gate}");
        Note::NotBuilt { field, value: on.to_string() }
    }));
    let standalone = flags.standalone || longshore.standalone.unwrap_or(false);
    let node_name = flags
        .hostname_override
        .clone()
        .or(kube_proxy.hostname_override.clone().filter(|name| !name.is_empty()))
        .unwrap_or_else(|| host.hostname.clone())
        .trim()
        .to_lowercase();
    if !is_dns1123_subdomain(&node_name) {
        return Err(ConfigError::invalid(
            "--hostname-override",
            format!("node name {node_name:?} must be a DNS subdomain (a-z, 0-9, '-', '.')"),
        ));
    }
    let root_dir = path(&flags.root_dir, None, "/var/lib/kubelet");
    for (flag, dir) in [("--root-dir", &root_dir)] {
        if !dir.is_absolute() {
            return Err(ConfigError::invalid(flag, "must be an absolute path"));
        }
    }
    let manifests = flags
        .pod_manifest_path
        .clone()
        .or(kubelet.static_pod_path.filter(|path| !path.is_empty()).map(PathBuf::from))
        .or_else(|| Some(PathBuf::from(MANIFESTS)));
    let kubeconfig = flags
        .kubeconfig
        .clone()
        .or(kube_proxy
            .client_connection
            .as_ref()
            // kube-proxy's account may not do what the agent does.
            .filter(|_| !parts.agent)
            .and_then(|client| client.kubeconfig.clone())
            .filter(|path| !path.is_empty())
            .map(PathBuf::from))
        .unwrap_or_else(|| KUBECONFIG.into());
    let bootstrap = flags.bootstrap_kubeconfig.clone().unwrap_or(BOOTSTRAP_KUBECONFIG.into());

    let pod_cidrs = cidrs("--pod-cidr", &flags.pod_cidr, kubelet.pod_cidr.as_deref())?;
    let cluster_cidrs =
        cidrs("--cluster-cidr", &flags.cluster_cidr, kube_proxy.cluster_cidr.as_deref())?;
    let service_ranges = cidrs(
        "--service-cluster-ip-range",
        &flags.service_cluster_ip_range,
        Some(longshore.service_cluster_ip_range.as_deref().unwrap_or("10.96.0.0/16")),
    )?;
    let port_range = flags
        .service_node_port_range
        .clone()
        .or(longshore.service_node_port_range)
        .unwrap_or_else(|| "30000-32767".into());

    let proxy_document = kube_proxy.clone();
    let proxy_config = proxy::resolve(
        kube_proxy,
        proxy::Around {
            flags,
            with_agent: parts.agent,
            standalone,
            node_name: &node_name,
            // Standalone, this node's pods are all there are.
            cluster_cidrs: if standalone && cluster_cidrs.is_empty() {
                pod_cidrs.clone()
            } else {
                cluster_cidrs
            },
            // In a cluster the range is the API server's to know.
            service_cidrs: if standalone { service_ranges.clone() } else { Vec::new() },
        },
        &mut notes,
    )?;

    let log_size = kubelet.container_log_max_size.unwrap_or_else(|| "10Mi".into());
    // What is given replaces the defaults as a whole, unless it is to join them.
    let joins = kubelet.merge_default_eviction_settings == Some(true);
    let usual = joins || kubelet.eviction_hard.is_none();
    let mut hard = if usual { usual_hard() } else { BTreeMap::new() };
    hard.extend(kubelet.eviction_hard.unwrap_or_default());
    let settings = Settings {
        hard,
        soft: kubelet.eviction_soft.unwrap_or_default(),
        grace: kubelet.eviction_soft_grace_period.unwrap_or_default(),
        reclaim: kubelet.eviction_minimum_reclaim.unwrap_or_default(),
        pods_bounded: resources.enforced.pods,
    };
    let eviction = EvictionConfig {
        thresholds: settings.thresholds().map_err(|(field, reason)| {
            ConfigError::invalid(format!("KubeletConfiguration.{field}"), reason)
        })?,
        max_pod_grace: kubelet.eviction_max_pod_grace_period.unwrap_or(0).into(),
        transition: period(kubelet.eviction_pressure_transition_period, 300),
    };
    let mut taints = kubelet.register_with_taints.unwrap_or_default();
    if !flags.register_with_taints.is_empty() {
        taints = flags
            .register_with_taints
            .iter()
            .map(|text| parse_taint(text))
            .collect::<Result<_, _>>()?;
    }
    let node_labels = flags
        .node_labels
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(ConfigError::invalid("--node-labels", format!("{label:?} is no key=value"))),
        })
        .collect::<Result<Vec<_>, _>>()?;

    check_labels(&node_labels)?;
    let external_cloud_provider = match flags.cloud_provider.as_deref().unwrap_or_default() {
        "" => false,
        "external" => true,
        other => {
            return Err(ConfigError::invalid(
                "--cloud-provider",
                format!("{other:?} is not provided; use external or leave it empty"),
            ));
        }
    };
    let serialize = kubelet.serialize_image_pulls;
    let parallel = kubelet.max_parallel_image_pulls.filter(|n| *n > 0);
    if serialize == Some(true) && parallel.is_some_and(|n| n > 1) {
        return Err(ConfigError::invalid(
            "KubeletConfiguration.maxParallelImagePulls",
            "needs serializeImagePulls: false",
        ));
    }
    Ok(NodeConfig {
        parts,
        standalone,
        node_name: node_name.clone(),
        hostname: flags.hostname_override.as_ref().map_or(&host.hostname, |_| &node_name).clone(),
        external_cloud_provider,
        max_images: match kubelet.node_status_max_images.unwrap_or(50) {
            ..0 => None,
            max => usize::try_from(max).ok(),
        },
        node_ips: flags.node_ip.clone(),
        node_labels,
        register_with_taints: taints,
        register_node: flags.register_node.or(kubelet.register_node).unwrap_or(true),
        provider_id: flags.provider_id.clone().or(kubelet.provider_id).filter(|id| !id.is_empty()),
        kubeconfig: (!standalone).then_some(kubeconfig),
        bootstrap_kubeconfig: (!standalone).then_some(bootstrap),
        cert_dir: flags.cert_dir.clone().unwrap_or_else(|| root_dir.join("pki")),
        state_dir: path(&flags.state_dir, longshore.state_dir, "/var/lib/longshore"),
        run_dir: path(&flags.run_dir, longshore.run_dir, "/run/longshore"),
        pod_logs_dir: path(&flags.pod_logs_dir, kubelet.pod_logs_dir, "/var/log/pods"),
        container_logs_dir: path(
            &flags.container_logs_dir,
            longshore.container_logs_dir,
            "/var/log/containers",
        ),
        root_dir,
        container_runtime_endpoint: flags
            .container_runtime_endpoint
            .clone()
            .or(kubelet.container_runtime_endpoint)
            .filter(|endpoint| !endpoint.is_empty()),
        image_service_endpoint: flags
            .image_service_endpoint
            .clone()
            .or(kubelet.image_service_endpoint)
            .filter(|endpoint| !endpoint.is_empty()),
        credential_providers,
        pull_verification,
        volumes,
        pod_manifest_path: manifests,
        static_pod_url,
        cluster_dns: if flags.cluster_dns.is_empty() {
            kubelet.cluster_dns.unwrap_or_default()
        } else {
            flags.cluster_dns.clone()
        },
        cluster_domain: flags
            .cluster_domain
            .clone()
            .or(kubelet.cluster_domain)
            .filter(|domain| !domain.is_empty())
            .unwrap_or_else(|| "cluster.local".into()),
        resolv_conf: path(&flags.resolv_conf, kubelet.resolv_conf, "/etc/resolv.conf"),
        pod_cidrs,
        service_cluster_ip_ranges: service_ranges,
        service_node_port_range: parse_port_range(&port_range)?,
        proxy_pages: proxy_pages::pages(&proxy_document, &proxy_config),
        proxy: proxy_config,
        healthz: {
            let ip = match &flags.healthz_bind_address {
                Some(text) => proxy::agents_healthz(text)?,
                None => ip_or(
                    "KubeletConfiguration.healthzBindAddress",
                    kubelet.healthz_bind_address.as_deref(),
                    "127.0.0.1",
                )?,
            };
            let port = flags.healthz_port.or(kubelet.healthz_port).unwrap_or(10248);
            (port != 0).then_some(SocketAddr::new(ip, port))
        },
        node_api: node_api_config,
        cgroup_root: flags
            .cgroup_root
            .clone()
            .or(kubelet.cgroup_root)
            .filter(|root| !root.is_empty())
            .unwrap_or_else(|| "/".into()),
        cgroup_driver,
        cgroups_per_qos: kubelet.cgroups_per_qos.unwrap_or(true),
        cpu_cfs_quota: kubelet.cpu_cfs_quota.unwrap_or(true),
        cpu_cfs_period: kubelet
            .cpu_cfs_quota_period
            .map(Duration::from)
            .filter(|period| !period.is_zero())
            .unwrap_or(Duration::from_millis(100)),
        allowed_unsafe_sysctls: unsafe_sysctls(kubelet.allowed_unsafe_sysctls)?,
        container_log_monitor_interval: period(kubelet.container_log_monitor_interval, 10),
        max_pods: flags.max_pods.or(kubelet.max_pods).filter(|pods| *pods > 0).unwrap_or(110),
        ids_per_pod: ids_per_pod(kubelet.user_namespaces)?,
        pod_pids_limit: kubelet.pod_pids_limit.and_then(|limit| u64::try_from(limit).ok()),
        registry_qps: kubelet.registry_pull_qps.unwrap_or(5),
        registry_burst: kubelet.registry_burst.filter(|n| *n > 0).unwrap_or(10),
        serialize_image_pulls: serialize.unwrap_or(parallel.is_none_or(|n| n == 1)),
        max_parallel_image_pulls: parallel,
        sync_frequency: period(kubelet.sync_frequency, 60),
        runtime_request_timeout: period(kubelet.runtime_request_timeout, 120),
        max_container_restart_period: period(
            kubelet.crash_loop_back_off.and_then(|backoff| backoff.max_container_restart_period),
            300,
        ),
        shutdown_grace,
        resources,
        node_status_update_frequency: period(kubelet.node_status_update_frequency, 10),
        // Whoever sets only how often it is measured means both.
        node_status_report_frequency: period(
            kubelet.node_status_report_frequency,
            match kubelet.node_status_update_frequency.filter(|d| !d.is_negative()) {
                Some(update) if !Duration::from(update).is_zero() => {
                    Duration::from(update).as_secs().max(1)
                }
                _ => 300,
            },
        ),
        node_lease_duration: Duration::from_secs(
            kubelet.node_lease_duration_seconds.filter(|s| *s > 0).unwrap_or(40).into(),
        ),
        event_qps: kubelet.event_record_qps.unwrap_or(50),
        event_burst: kubelet.event_burst.filter(|n| *n > 0).unwrap_or(100),
        gc,
        container_log_max_size: parse_bytes(&log_size).ok_or_else(|| {
            ConfigError::invalid(
                "KubeletConfiguration.containerLogMaxSize",
                format!("{log_size:?} is no quantity"),
            )
        })?,
        container_log_max_files: kubelet.container_log_max_files.unwrap_or(5).max(2),
        seccomp_default: kubelet.seccomp_default.unwrap_or(false),
        eviction,
        rotate_certificates,
        object_look,
        housing,
        cni_conf_dir: path(&flags.cni_conf_dir, longshore.cni_conf_dir, "/etc/cni/net.d"),
        cni_bin_dir: path(&flags.cni_bin_dir, longshore.cni_bin_dir, "/opt/cni/bin"),
        pinned_images: flags.pinned_images.clone().or(longshore.pinned_images).unwrap_or_default(),
        cdi_spec_dirs: longshore
            .cdi_spec_dirs
            .map(|dirs| dirs.into_iter().map(PathBuf::from).collect()),
        runtime_handlers: longshore.runtime_handlers,
        streaming: cri_shim::streaming::StreamConfig {
            address: flags
                .stream_server_address
                .clone()
                .or(longshore.stream_server_address)
                .unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: flags.stream_server_port.or(longshore.stream_server_port).unwrap_or(0),
            idle_timeout: period(kubelet.streaming_connection_idle_timeout, 4 * 60 * 60),
            tls: flags
                .stream_tls_cert_file
                .clone()
                .or(longshore.stream_tls_cert_file.map(PathBuf::from))
                .zip(
                    flags
                        .stream_tls_key_file
                        .clone()
                        .or(longshore.stream_tls_key_file.map(PathBuf::from)),
                ),
            ..Default::default()
        },
        tracing: kubelet.tracing.as_ref().map(super::tracing::resolve).transpose()?,
        log_filter: flags.log_level.clone().unwrap_or_else(|| {
            crate::logging::filter_of(flags.verbosity.or(verbosity).unwrap_or(2)).into()
        }),
        log_json: match flags.logging_format.as_deref() {
            Some(format) => format == "json",
            None => log_json,
        },
        notes,
    })
}

fn static_pod_url(kubelet: &super::KubeletConfiguration) -> Result<Option<PodUrl>, ConfigError> {
    let Some(url) = kubelet.static_pod_url.as_deref().filter(|url| !url.is_empty()) else {
        return Ok(None);
    };
    let headers = kubelet.static_pod_url_header.iter().flatten();
    let headers = headers.flat_map(|(name, values)| values.iter().map(|v| (&**name, &**v)));
    PodUrl::new(url, headers, period(kubelet.http_check_frequency, 20))
        .map(Some)
        .map_err(|error| ConfigError::invalid("KubeletConfiguration.staticPodURL", error))
}

fn ids_per_pod(userns: Option<super::kubelet::UserNamespaces>) -> Result<Option<i64>, ConfigError> {
    let asked = userns.and_then(|userns| userns.ids_per_pod);
    match crate::user_ids::check_per_pod(asked) {
        Ok(_) => Ok(asked),
        Err(error) => Err(ConfigError::invalid("KubeletConfiguration", error)),
    }
}

/// The sysctls of `allowedUnsafeSysctls`, which must all be of a pod's own namespaces: any other would
/// be set for the whole node.
fn unsafe_sysctls(patterns: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let patterns = patterns.unwrap_or_default();
    match patterns.iter().find(|pattern| sysctls::namespace(pattern).is_none()) {
        None => Ok(patterns),
        Some(other) => Err(ConfigError::invalid(
            "KubeletConfiguration.allowedUnsafeSysctls",
            format!("{other:?} is not known to be of a pod's own namespaces; take it out"),
        )),
    }
}

/// Labels of Kubernetes' own domains that a node may give itself (admission plugin NodeRestriction).
const OWN_LABELS: [&str; 13] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.kubernetes.io/region",
    "failure-domain.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];

/// Refuses what the API server would refuse, with which the node could never register.
fn check_labels(labels: &[(String, String)]) -> Result<(), ConfigError> {
    let within = |domain: &str, of: &str| {
        domain == of || domain.strip_suffix(of).is_some_and(|rest| rest.ends_with('.'))
    };
    let refused = |key: &str| {
        let domain = key.split_once('/').map_or("", |(domain, _)| domain);
        let reserved = within(domain, "kubernetes.io") || within(domain, "k8s.io");
        let free = within(domain, "kubelet.kubernetes.io") || within(domain, "node.kubernetes.io");
        reserved && !free && !OWN_LABELS.contains(&key)
    };
    match labels.iter().find(|(key, _)| refused(key)) {
        None => Ok(()),
        Some((key, _)) => Err(ConfigError::invalid(
            "--node-labels",
            format!(
                "{key}: a node may not give itself this label of Kubernetes' own (NodeRestriction); an \
                 administrator can: kubectl label node NAME {key}=..., or take a label under \
                 node.kubernetes.io/ or of a domain of your own"
            ),
        )),
    }
}

#[cfg(test)]
mod tests;
