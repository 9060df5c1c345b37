//! A node in a cluster: everything that comes from the API server and goes to it, composed.
//!
//! `start` gives the sync loop its pods, the proxy its Services and slices, and takes statuses and
//! Events; the node object and its Lease are kept by a task of their own. Nothing here waits for the
//! control plane before it returns: with the control plane away the last known pods and Services
//! are told from disk.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use proxy::object::Change;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::api::ApiError;
use crate::objects::Objects;
use crate::report::{EventSink, StatusSink};
use crate::source::PodChange;

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
    /// CRI endpoint (`unix:///run/longshore/cri.sock`): version, readiness, images, pod CIDR.
    pub runtime_endpoint: String,
    /// Port of the node API (10250) as told in `status.daemonEndpoints`; 0 leaves it out.
    pub node_api_port: u16,
    /// `--register-node`.
    pub register_node: bool,
    /// `--node-labels`.
    pub node_labels: BTreeMap<String, String>,
    /// `registerWithTaints`.
    pub register_with_taints: Vec<Taint>,
    /// `maxPods`.
    pub max_pods: u32,
    /// `kubeReserved` and `systemReserved`, resource name to quantity.
    pub reserved: Vec<BTreeMap<String, String>>,
    /// `evictionHard`, signal to quantity or percentage.
    pub eviction_hard: BTreeMap<String, String>,
    /// `nodeStatusUpdateFrequency`: how often measurements are taken (10 s).
    pub status_update_frequency: Duration,
    /// `nodeStatusReportFrequency`: how often an unchanged status is patched (5 min).
    pub status_report_frequency: Duration,
    /// `nodeLeaseDurationSeconds` (40); renewed every quarter of it.
    pub lease_duration_seconds: u32,
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
            runtime_endpoint: "unix:///run/longshore/cri.sock".to_owned(),
            node_api_port: 10250,
            register_node: true,
            node_labels: BTreeMap::new(),
            register_with_taints: Vec::new(),
            max_pods: 110,
            reserved: Vec::new(),
            eviction_hard: BTreeMap::new(),
            status_update_frequency: Duration::from_secs(10),
            status_report_frequency: Duration::from_secs(300),
            lease_duration_seconds: 40,
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
    /// Last errors by what they concern (`pods`, `services`, `endpointslices`, `node`, `lease`);
    /// empty while all is well.
    pub errors: watch::Receiver<BTreeMap<&'static str, String>>,
    /// Everything that runs for it; ends after `shutdown`.
    pub tasks: JoinSet<()>,
}
