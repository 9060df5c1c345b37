//! Pod networks: network namespaces, the built-in bridge, and CNI plugins where they are configured.
//!
//! The kubelet's network duties are the runtime's, so they live with the shim: a sandbox gets its
//! namespace, addresses and host ports here, and loses them here.

mod allocate;
mod bandwidth;
mod bridge;
mod cidr;
mod cleanup;
mod cni;
mod error;
mod forward;
mod keyed;
mod links;
pub mod netns;
mod node;
mod ports;
mod records;
mod rtnl;
mod shape;
mod sys;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use async_trait::async_trait;

pub use cidr::Cidr;
pub use cleanup::cleanup;
pub use error::{HostPort, NetworkError};
pub use node::open;

/// Where the network keeps its state and finds its plugins.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Reservations and sandbox records; survives a reboot. Usually `/var/lib/longshore/network`.
    pub state_dir: PathBuf,
    /// Where CNI network configurations are looked for.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugins are looked for, first match first.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// The blocks pods get addresses from, at most one per family; a private default when empty.
    pub pod_cidrs: Vec<Cidr>,
    /// The bridge's name.
    pub bridge: String,
    /// MTU of the pods' links; that of the host's default route when absent.
    pub mtu: Option<u32>,
    /// Where CNI's library keeps results of ADD, for others to read. Usually `/var/lib/cni`.
    pub cni_cache_dir: PathBuf,
    /// How long a CNI plugin may take: IPAM over DHCP is slow, a hung plugin must not hold a pod
    /// for ever.
    pub cni_timeout: Duration,
    /// After what time a teardown that failed is first tried again.
    pub retry_after: Duration,
}

impl NetworkConfig {
    /// The defaults, with reservations kept under `state` (such as `/var/lib/longshore`).
    pub fn new(state: impl Into<PathBuf>) -> Self {
        let state = state.into();
        Self {
            cni_cache_dir: state.join("cni"),
            state_dir: state.join("network"),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .iter()
                .map(PathBuf::from)
                .collect(),
            pod_cidrs: Vec::new(),
            bridge: "longshore0".to_owned(),
            mtu: None,
            cni_timeout: Duration::from_secs(90),
            retry_after: Duration::from_secs(5),
        }
    }
}

/// Transport protocol of a host port.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Protocol {
    /// IANA's protocol number.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// One host port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct PortMapping {
    /// Transport protocol.
    pub protocol: Protocol,
    /// The host address to listen on; all of them when absent.
    pub host_ip: Option<IpAddr>,
    /// Port on the host; never 0 (the caller leaves out ports without a host port).
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
}

/// A resolver's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Options of resolv.conf(5).
    pub options: Vec<String>,
}

/// What the network needs to know of a sandbox.
#[derive(Debug, Clone, Default)]
pub struct SandboxNetwork {
    /// The sandbox's id.
    pub id: String,
    /// The pinned namespace.
    pub netns: PathBuf,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// The cgroup of its containers as the kubelet names it; empty when it names none.
    pub cgroup_parent: String,
    /// The resolver's configuration, if the sandbox has its own.
    pub dns: Option<Dns>,
    /// Its host ports.
    pub port_mappings: Vec<PortMapping>,
    /// The sandbox's annotations.
    pub annotations: BTreeMap<String, String>,
}

/// What a sandbox got.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkResult {
    /// The pod's addresses, the primary one first.
    pub ips: Vec<IpAddr>,
    /// The resolver's configuration that comes with the network, if one does.
    pub dns: Option<Dns>,
    /// Interfaces, addresses and routes in the form in which containerd shows them (`cniResult`).
    pub shown: serde_json::Value,
}

/// The network's configuration, for people and their tools.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// CNI's configuration in the form in which containerd shows it (`cniconfig`).
    pub cni: serde_json::Value,
    /// What is wrong with the files it was read from.
    pub last_load: Result<(), String>,
}

/// A way to connect sandboxes.
#[async_trait]
pub trait Network: Send + Sync {
    /// Connects a sandbox. Calling it again for the same sandbox gives the same addresses.
    async fn setup(&self, sandbox: &SandboxNetwork) -> Result<NetworkResult, NetworkError>;
    /// Takes away all that `setup` made for sandbox `id`; nothing to do is a success. The netns
    /// itself is the caller's ([`netns::delete`]) and may be gone already. After a failure it is
    /// tried again by itself, until it is done or `setup` is called for the sandbox. The built-in
    /// network's link may go a little later; its address and its record stay until it has.
    async fn teardown(&self, id: &str) -> Result<(), NetworkError>;
    /// Whether a sandbox could be connected now; the text is the CRI's `NetworkReady` message.
    async fn status(&self) -> Result<(), String>;
    /// How the network is configured.
    fn describe(&self) -> Description;
    /// The node's pod CIDRs, as the control plane assigned them. Running sandboxes keep their addresses.
    fn set_pod_cidrs(&self, cidrs: Vec<Cidr>);
    /// Removes what belongs to no sandbox in `keep`: links, addresses, host ports, CNI attachments.
    async fn collect(&self, keep: &[String]) -> Result<(), NetworkError>;
}
