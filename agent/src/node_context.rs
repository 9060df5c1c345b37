//! What every part of the agent must know of the node it works for: names, addresses, folders,
//! and the limits that `KubeletConfiguration` sets. Plain data, made once by the composition root.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::pod::cgroup::{Group, GroupLimits, QosReserve};
use crate::user_ids::UserIds;

/// Who makes the cgroups of pods: the kernel's file system, or systemd's slices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Folders such as `/kubepods/burstable/pod<uid>`.
    #[default]
    Cgroupfs,
    /// Slices such as `kubepods-burstable-pod<uid>.slice`.
    Systemd,
}

/// How images are pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullLimits {
    /// One pull at a time (`serializeImagePulls`).
    pub serialize: bool,
    /// At most this many at once (`maxParallelImagePulls`); `None` is no limit.
    pub max_parallel: Option<usize>,
    /// Pulls started per second (`registryPullQPS`); 0 is no limit.
    pub registry_qps: u32,
    /// Pulls that may start at once before `registry_qps` counts (`registryBurst`).
    pub registry_burst: u32,
    /// Who may use images that are on the node; `None` is everybody, and nothing is recorded
    /// (feature gate `KubeletEnsureSecretPulledImages`).
    pub verification: Option<crate::pulled::decide::Policy>,
}

impl Default for PullLimits {
    fn default() -> Self {
        Self {
            serialize: false,
            max_parallel: None,
            registry_qps: 0,
            registry_burst: 10,
            verification: Some(crate::pulled::decide::Policy::default()),
        }
    }
}

/// How containers are slowed down and spared by memory (KEP-2570).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryQos {
    /// How far between request and limit a container is slowed down (`memoryThrottlingFactor`).
    pub throttling: f64,
    /// Whether what is requested is not reclaimed (`memoryReservationPolicy`).
    pub reserve: bool,
    /// What a container without a limit could have, bytes: the node's memory but for what is reserved.
    pub allocatable: i64,
}

/// What containers may have of the node's swap (KEP-2400).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapUse {
    /// Burstable containers get a share by their memory request (`LimitedSwap`); else none has any.
    pub limited: bool,
    /// Whether the node's cgroups bound swap at all.
    pub controller: bool,
    /// Swap of the node, bytes.
    pub capacity: u64,
}

/// How long pods of a priority have to end when the node shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownGrace {
    /// Pods from this priority up to the next one's.
    pub priority: i32,
    /// Seconds.
    pub seconds: u32,
}

/// When images and dead containers are removed (`imageGC*`, `imageMinimumGCAge`, ...).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GcLimits {
    /// Per cent of the image file system in use above which images are removed.
    pub image_high_percent: u8,
    /// Per cent in use down to which they are removed.
    pub image_low_percent: u8,
    /// An unused image younger than this stays.
    pub image_min_age: Duration,
    /// An image unused for longer than this goes, whatever the disk says; `None` is never.
    pub image_max_age: Option<Duration>,
    /// Dead instances kept for each container, for `lastState` and `kubectl logs --previous`.
    pub dead_per_container: usize,
    /// Dead instances kept of all containers together; `None` is no limit.
    pub dead_in_all: Option<usize>,
    /// A dead instance that was made later than this ago stays.
    pub dead_min_age: Duration,
}

impl Default for GcLimits {
    fn default() -> Self {
        Self {
            image_high_percent: 85,
            image_low_percent: 80,
            image_min_age: Duration::from_secs(120),
            image_max_age: None,
            dead_per_container: 1,
            dead_in_all: None,
            dead_min_age: Duration::ZERO,
        }
    }
}

/// What the agent knows of its node.
#[derive(Clone, Debug)]
pub struct NodeContext {
    /// The Node object's name.
    pub node_name: String,
    /// The node's addresses, the preferred family first; never empty.
    pub node_ips: Vec<IpAddr>,
    /// The machine's host name, for pods on the host network.
    pub hostname: String,
    /// Root of the agent's state: `/var/lib/kubelet`.
    pub root_dir: PathBuf,
    /// `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// `/var/log/containers`.
    pub container_logs_dir: PathBuf,
    /// Name servers for pods with dnsPolicy ClusterFirst; empty makes it act as `Default`.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster, such as `cluster.local`; empty adds no cluster search paths.
    pub cluster_domain: String,
    /// The node's resolver configuration, which pods inherit; empty path is none.
    pub resolv_conf: PathBuf,
    /// Cgroup under which `kubepods` lies; `/` unless told otherwise.
    pub cgroup_root: String,
    /// Who makes pod cgroups.
    pub cgroup_driver: CgroupDriver,
    /// Whether containers are put under QoS cgroups at all (`cgroupsPerQOS`).
    pub cgroups_per_qos: bool,
    /// Whether cpu limits become CFS quotas (`cpuCFSQuota`).
    pub cpu_cfs_quota: bool,
    /// CFS period in microseconds (`cpuCFSQuotaPeriod`).
    pub cpu_cfs_period_us: u64,
    /// Most processes in a pod (`podPidsLimit`); `None` is no limit.
    pub pod_pids_limit: Option<i64>,
    /// Most pods on this node (`maxPods`).
    pub max_pods: u32,
    /// The ids that user namespaces are made of, or why there are none.
    pub user_ids: Result<UserIds, String>,
    /// CPU that pods may request, in milli-CPUs.
    pub allocatable_milli_cpu: u64,
    /// Memory that pods may request, in bytes.
    pub allocatable_memory: u64,
    /// Physical memory of the node in bytes, for `oom_score_adj`.
    pub capacity_memory: u64,
    /// Local disk that pods may request (`ephemeral-storage`), in bytes; 0 is unknown.
    pub allocatable_ephemeral: u64,
    /// Whether there is a control plane.
    pub cluster: bool,
    /// Image pulls.
    pub pull: PullLimits,
    /// What of volumes feature gates decide.
    pub volumes: crate::config::VolumeGates,
    /// Garbage collection.
    pub gc: GcLimits,
    /// When pods must go for the node.
    pub eviction: crate::eviction::EvictionConfig,
    /// Longest wait between restarts of a crashing container
    /// (`crashLoopBackOff.maxContainerRestartPeriod`).
    pub max_restart_backoff: Duration,
    /// Memory QoS on cgroup v2, where it is asked for.
    pub memory_qos: Option<MemoryQos>,
    /// Memory that pods requested and others may not use (`qosReserved`).
    pub qos_reserve: Option<QosReserve>,
    /// What the node's groups may use (`enforceNodeAllocatable`); none where nothing is enforced.
    pub node_limits: Vec<(Group, GroupLimits)>,
    /// Whether pods are held to their local storage (`localStorageCapacityIsolation`).
    pub local_storage_isolation: bool,
    /// Whether a container on cgroup v2 is ended as a whole when one of its processes has no memory left
    /// (not `singleProcessOOMKill`).
    pub oom_group: bool,
    /// Swap in containers (`memorySwap`).
    pub swap: SwapUse,
    /// How long pods have when the node shuts down, the lowest priority first; empty where the node
    /// shuts down without waiting for them (`shutdownGracePeriod...`).
    pub shutdown_grace: Vec<ShutdownGrace>,
    /// Every pod is looked at again at least this often, as a safety net.
    pub relist_period: Duration,
    /// A container's log is rotated above this size in bytes (`containerLogMaxSize`).
    pub container_log_max_size: u64,
    /// Log files kept for each container (`containerLogMaxFiles`).
    pub container_log_max_files: u32,
    /// How often logs are measured (`containerLogMonitorInterval`).
    pub container_log_monitor_interval: Duration,
    /// Whether the runtime rotates logs itself (the shim's monitors do).
    pub runtime_rotates_logs: bool,
    /// Seccomp profile for containers that name none is RuntimeDefault (`seccompDefault`).
    pub seccomp_default: bool,
    /// Whether the node's kernel can confine containers with AppArmor.
    pub apparmor: bool,
    /// Sysctls outside the safe set that pods may use (`allowedUnsafeSysctls`); `prefix*` is allowed.
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Longest time for any CRI request that does not itself wait (`runtimeRequestTimeout`).
    pub runtime_request_timeout: Duration,
}

impl NodeContext {
    /// A context with upstream's defaults for everything but the node's name and addresses.
    pub fn new(node_name: impl Into<String>, node_ips: Vec<IpAddr>) -> Self {
        let node_name = node_name.into();
        Self {
            hostname: node_name.clone(),
            node_name,
            node_ips,
            root_dir: "/var/lib/kubelet".into(),
            pod_logs_dir: "/var/log/pods".into(),
            container_logs_dir: "/var/log/containers".into(),
            cluster_dns: Vec::new(),
            cluster_domain: String::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            cgroup_root: "/".into(),
            cgroup_driver: CgroupDriver::Cgroupfs,
            cgroups_per_qos: true,
            cpu_cfs_quota: true,
            cpu_cfs_period_us: 100_000,
            pod_pids_limit: None,
            max_pods: 110,
            user_ids: Ok(UserIds::default()),
            allocatable_milli_cpu: u64::MAX,
            allocatable_memory: u64::MAX,
            capacity_memory: 0,
            allocatable_ephemeral: 0,
            cluster: false,
            pull: PullLimits::default(),
            volumes: crate::config::VolumeGates::default(),
            gc: GcLimits::default(),
            eviction: crate::eviction::EvictionConfig::default(),
            max_restart_backoff: Duration::from_secs(300),
            memory_qos: None,
            qos_reserve: None,
            node_limits: Vec::new(),
            local_storage_isolation: true,
            oom_group: true,
            swap: SwapUse::default(),
            shutdown_grace: Vec::new(),
            relist_period: Duration::from_secs(300),
            container_log_max_size: 10 << 20,
            container_log_max_files: 5,
            container_log_monitor_interval: Duration::from_secs(10),
            runtime_rotates_logs: false,
            seccomp_default: false,
            apparmor: false,
            allowed_unsafe_sysctls: Vec::new(),
            runtime_request_timeout: Duration::from_secs(120),
        }
    }

    /// Folder of one pod: `<root>/pods/<uid>`.
    pub fn pod_dir(&self, uid: &crate::ids::PodUid) -> PathBuf {
        self.root_dir.join("pods").join(uid.as_str())
    }

    /// Log folder of one pod: `<pod logs>/<namespace>_<name>_<uid>`.
    pub fn pod_log_dir(&self, pod: &k8s_openapi::api::core::v1::Pod) -> PathBuf {
        let key = crate::ids::NamespacedName::of_pod(pod);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        self.pod_logs_dir.join(format!("{}_{}_{uid}", key.namespace, key.name))
    }
}
