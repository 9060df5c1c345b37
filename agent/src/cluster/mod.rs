//! A node in a cluster: everything that comes from the API server and goes to it, composed.
//!
//! `start` gives the sync loop its pods, the proxy its Services and slices, and takes statuses and
//! Events; the node object and its Lease are kept by a task of their own. Nothing here waits for the
//! control plane before it returns: with the control plane away the last known pods and Services
//! are told from disk.

pub mod bootstrap;
pub mod event_sink;
pub mod mirror;
pub mod objects;
mod one;
pub mod references;
mod set;
pub mod status_sink;
mod storage;
pub mod store;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use proxy::object::Change;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::event_sink::ClusterEvents;
use self::mirror::MirrorLoop;
use self::objects::{ClusterObjects, Services};
pub use self::one::Look;
use self::status_sink::ClusterStatuses;
use self::store::Store;
use crate::api::{Api, ApiError};
use crate::csi::InUse;
use crate::node::conditions::Pressure;
use crate::node::{DevicesSeen, NodeLoop, Seen, Told, lease, rotate, serving};
use crate::objects::Objects;
use crate::report::{EventSink, StatusSink};
use crate::runtime::Runtime;
use crate::source::PodChange;
use crate::source::cluster::{
    Deleting, Errors, PodLoop, ServiceLoops, run_node, run_service_cidrs,
};

/// What a node must know to take part in a cluster.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Name of the Node object.
    pub node_name: String,
    /// Value of the label `kubernetes.io/hostname`.
    pub hostname: String,
    /// `--node-ip`: addresses to report, at most one of each family; empty asks the kernel which
    /// address the default route uses.
    pub node_ips: Vec<IpAddr>,
    /// `--kubeconfig`, normally `/etc/kubernetes/kubelet.conf`.
    pub kubeconfig: PathBuf,
    /// `--bootstrap-kubeconfig`, normally `/etc/kubernetes/bootstrap-kubelet.conf`; used while
    /// `kubeconfig` does not exist or its certificate has expired.
    pub bootstrap_kubeconfig: PathBuf,
    /// `--cert-dir`, normally `<root-dir>/pki`.
    pub cert_dir: PathBuf,
    /// `--root-dir`. Its file system is what DiskPressure looks at.
    pub root_dir: PathBuf,
    /// Where the last known pods and Services are kept, normally `<root-dir>/longshore`.
    pub state_dir: PathBuf,
    /// Port of the node API (10250) as told in `status.daemonEndpoints`; 0 leaves it out.
    pub node_api_port: u16,
    /// `serverTLSBootstrap`: the node API's certificate is asked for by CSR.
    pub server_tls_bootstrap: bool,
    /// Features that the API server counts on (`status.declaredFeatures`), in order.
    pub declared_features: Vec<String>,
    /// Whether the client certificate is renewed before it expires (`rotateCertificates`).
    pub rotate_certificates: bool,
    /// How changes of ConfigMaps and Secrets are noticed.
    pub look: Look,
    /// `--register-node`.
    pub register_node: bool,
    /// `--node-labels`.
    pub node_labels: BTreeMap<String, String>,
    /// `registerWithTaints`.
    pub register_with_taints: Vec<Taint>,
    /// `maxPods`.
    pub max_pods: u32,
    /// `localStorageCapacityIsolation`: whether the node tells of its `ephemeral-storage`.
    pub local_storage_isolation: bool,
    /// `kubeReserved` and `systemReserved`, resource name to quantity.
    pub reserved: Vec<(String, String)>,
    /// The cgroup of all pods, relative to the hierarchies; `None` where pods have none.
    pub pods_cgroup: Option<String>,
    /// When the node is under pressure.
    pub eviction: crate::eviction::EvictionConfig,
    /// `--provider-id`.
    pub provider_id: Option<String>,
    /// `--cloud-provider=external`: somebody else knows the node's addresses and says when pods may
    /// come.
    pub external_cloud_provider: bool,
    /// `nodeStatusMaxImages`; `None` is no limit.
    pub max_images: Option<usize>,
    /// `nodeStatusUpdateFrequency`: how often measurements are taken (10 s).
    pub status_update_frequency: Duration,
    /// `nodeStatusReportFrequency`: how often an unchanged status is patched (5 min).
    pub status_report_frequency: Duration,
    /// `nodeLeaseDurationSeconds` (40); renewed every quarter of it.
    pub lease_duration_seconds: u32,
    /// `eventRecordQPS`; 0 is no limit.
    pub event_qps: u32,
    /// `eventBurst`.
    pub event_burst: u32,
    /// Whether this process runs pods (pods, node, Lease, ConfigMaps, ...).
    pub agent: bool,
    /// Whether this process serves Services (EndpointSlices).
    pub proxy: bool,
}

impl ClusterConfig {
    /// Upstream's defaults for node `node_name`.
    pub fn new(node_name: &str) -> Self {
        let root = PathBuf::from("/var/lib/kubelet");
        Self {
            node_name: node_name.to_owned(),
            hostname: node_name.to_owned(),
            node_ips: Vec::new(),
            kubeconfig: PathBuf::from("/etc/kubernetes/kubelet.conf"),
            bootstrap_kubeconfig: PathBuf::from("/etc/kubernetes/bootstrap-kubelet.conf"),
            cert_dir: root.join("pki"),
            state_dir: root.join("longshore"),
            root_dir: root,
            node_api_port: 10250,
            server_tls_bootstrap: false,
            declared_features: Vec::new(),
            register_node: true,
            node_labels: BTreeMap::new(),
            register_with_taints: Vec::new(),
            max_pods: 110,
            local_storage_isolation: true,
            reserved: Vec::new(),
            rotate_certificates: true,
            look: Look::Watch,
            pods_cgroup: None,
            eviction: crate::eviction::EvictionConfig::default(),
            provider_id: None,
            external_cloud_provider: false,
            max_images: Some(50),
            status_update_frequency: Duration::from_secs(10),
            status_report_frequency: Duration::from_secs(300),
            lease_duration_seconds: 40,
            event_qps: 50,
            event_burst: 100,
            agent: true,
            proxy: true,
        }
    }
}

/// Why a node cannot take part in its cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// There is neither a kubeconfig nor a way to get one.
    #[error(
        "neither {} nor {} exists: this node has not joined a cluster; run `longshore join`, or \
         `longshore run --standalone`", kubeconfig.display(), bootstrap.display()
    )]
    NotJoined {
        /// `--kubeconfig`.
        kubeconfig: PathBuf,
        /// `--bootstrap-kubeconfig`.
        bootstrap: PathBuf,
    },
    /// The kubeconfig or its certificates cannot be used.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// What a cluster gives to and takes from the rest of the node.
pub struct ClusterParts {
    /// The API server.
    pub api: Api,
    /// ConfigMaps, Secrets, tokens, Services, the node object.
    pub objects: Arc<dyn Objects>,
    /// Takes pod statuses.
    pub statuses: Arc<dyn StatusSink>,
    /// Takes Events.
    pub events: Arc<dyn EventSink>,
    /// Pods of the API server for the sync loop (never mirror pods).
    pub pods: mpsc::Receiver<PodChange>,
    /// Services, slices and node for the proxy.
    pub proxy: mpsc::Receiver<Change>,
    /// The composition root sends every `PodChange` of the file source here as well, so that static
    /// pods appear in the cluster as mirror pods.
    pub static_pods: mpsc::UnboundedSender<PodChange>,
    /// The node's own object as last seen.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// Whether the runtime knows the node's pod CIDRs, or was given up on: pods that start before
    /// get addresses that the rest of the cluster has no route to.
    pub network: watch::Receiver<bool>,
    /// The pressure that the node reports: most new pods are refused under it.
    pub pressure: watch::Receiver<Pressure>,
    /// Volumes that the Node says are in use.
    pub in_use: Arc<InUse>,
    /// Last errors by what they concern (`pods`, `services`, `endpointslices`, `node`, `lease`);
    /// empty while all is well.
    pub errors: watch::Receiver<BTreeMap<&'static str, String>>,
    /// Everything that runs for it; ends after `shutdown`.
    pub tasks: JoinSet<()>,
}

/// Changes that may wait for the sync loop or the proxy before their sources wait too.
const CHANNEL: usize = 256;

/// Joins the loops of a node in a cluster. Returns at once, but where there is no kubeconfig yet:
/// then when the bootstrap kubeconfig has given one. Everything ends when the returned `tasks` are
/// dropped or aborted. The node is not ready while `shutting_down`.
pub async fn start(
    config: ClusterConfig,
    runtime: Arc<dyn Runtime>,
    shutting_down: watch::Receiver<bool>,
    devices: DevicesSeen,
) -> Result<ClusterParts, ClusterError> {
    bootstrap::ensure_kubeconfig(&config).await?;
    let api = Api::from_kubeconfig(&config.kubeconfig)?;
    let (errors, error_rx) = Errors::new();
    let (pod_tx, pods) = mpsc::channel(CHANNEL);
    let (proxy_tx, proxy) = mpsc::channel(CHANNEL);
    let (static_pods, statics) = mpsc::unbounded_channel();
    let (mirror_tx, mirrors) = mpsc::unbounded_channel();
    let (deletion_tx, deletions) = mpsc::unbounded_channel();
    let (node_tx, node) = watch::channel(None);
    let (network_tx, network) = watch::channel(false);
    let (pressure_tx, pressure) = watch::channel(Pressure::default());
    let (services, deleting) = (Arc::new(Services::default()), Arc::new(Deleting::default()));
    let store = |kind: &str| Store::new(&config.state_dir, kind);
    let kinds = [
        "pods",
        "services",
        "endpointslices",
        "node",
        "configmaps",
        "secrets",
        "tokens",
        "runtimeclasses",
        "storage",
        "trustbundles",
    ];
    let [
        pod_store,
        service_store,
        slice_store,
        node_store,
        maps,
        secrets,
        tokens,
        handlers,
        storage,
        bundles,
    ] = kinds.map(store);

    let in_use = Arc::new(InUse::default());
    let events: Arc<dyn EventSink> = Arc::new(ClusterEvents::new(
        api.main.clone(),
        &config.node_name,
        config.event_qps,
        config.event_burst,
    ));
    let statuses = ClusterStatuses::new(api.main.clone(), deleting.clone(), deletions);
    let mut tasks = JoinSet::new();
    let stores = [
        &pod_store,
        &service_store,
        &slice_store,
        &node_store,
        &maps,
        &secrets,
        &tokens,
        &handlers,
        &storage,
        &bundles,
    ];
    for store in stores {
        tasks.spawn(store.clone().run());
    }
    let objects = ClusterObjects::new(
        api.clone(),
        node.clone(),
        services.clone(),
        [maps, secrets, tokens, handlers, storage, bundles],
        config.look,
    );

    let name = config.node_name.clone();
    let loops = ServiceLoops {
        proxy: proxy_tx.clone(),
        services: config.agent.then_some(services),
        node_name: name.clone(),
        serve: config.proxy,
        errors: errors.clone(),
        synced: Arc::default(),
    };
    tasks.spawn(loops.clone().run_services(api.main.clone(), service_store));
    let service_cidrs = proxy_tx.clone();
    let proxy_node = config.proxy.then_some(proxy_tx);
    if config.proxy {
        tasks.spawn(loops.run_slices(api.main.clone(), slice_store));
        tasks.spawn(run_service_cidrs(api.main.clone(), service_cidrs));
    }
    tasks.spawn(run_node(
        api.main.clone(),
        name.clone(),
        node_tx,
        proxy_node,
        node_store,
        errors.clone(),
    ));
    if config.agent {
        let pods = PodLoop {
            pods: pod_tx,
            mirrors: mirror_tx,
            deletions: deletion_tx,
            deleting,
            store: pod_store,
            errors: errors.clone(),
        };
        tasks.spawn(pods.run(api.main.clone(), name.clone()));
        let mirror = MirrorLoop {
            client: api.main.clone(),
            statics,
            mirrors,
            node: node.clone(),
            statuses: statuses.clone(),
        };
        tasks.spawn(mirror.run());
        tasks.spawn(lease::run(
            api.heartbeat.clone(),
            name,
            config.lease_duration_seconds,
            node.clone(),
            errors.clone(),
            events.clone(),
        ));
        let node_loop = NodeLoop::new(
            config.clone(),
            api.heartbeat.clone(),
            runtime,
            events.clone(),
            errors.clone(),
            Seen { node: node.clone(), in_use: in_use.names(), devices, shutting_down },
            Told { network: network_tx, pressure: pressure_tx },
        );
        tasks.spawn(node_loop.run());
        if config.server_tls_bootstrap {
            let client = api.main.clone();
            tasks.spawn(serving::run(client, config.clone(), node.clone(), errors.clone()));
        }
        tasks.spawn(rotate::run(api.clone(), config, errors));
    }
    Ok(ClusterParts {
        api,
        objects,
        statuses,
        events,
        pods,
        proxy,
        static_pods,
        node,
        network,
        pressure,
        in_use,
        errors: error_rx,
        tasks,
    })
}
