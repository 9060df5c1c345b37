//! `LongshoreConfiguration` (longshore.io/v1alpha1): what neither kubelet nor kube-proxy has.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::documents::{Fields, Treatment};

/// The fields; each is also a flag of the same meaning, which wins.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LongshoreConfiguration {
    /// Run without a control plane.
    pub standalone: Option<bool>,
    /// Folder of the CRI shim's state.
    pub state_dir: Option<String>,
    /// Folder of sockets and network namespaces.
    pub run_dir: Option<String>,
    /// Folder of links to container logs.
    pub container_logs_dir: Option<String>,
    /// Folder of CNI network configurations.
    pub cni_conf_dir: Option<String>,
    /// Folder of CNI plugins.
    pub cni_bin_dir: Option<String>,
    /// Folders with CDI files; devices of later folders replace those of earlier ones.
    pub cdi_spec_dirs: Option<Vec<String>>,
    /// Runtime handlers of the built-in CRI runtime, besides runc and crun where they are installed;
    /// the empty name is the default one.
    #[serde(default)]
    pub runtime_handlers: BTreeMap<String, RuntimeHandler>,
    /// Address that the container runtime streams exec, attach and port-forward on.
    pub stream_server_address: Option<String>,
    pub stream_server_port: Option<u16>,
    /// PEM files for streaming over HTTPS.
    pub stream_tls_cert_file: Option<String>,
    pub stream_tls_key_file: Option<String>,
    /// Images that garbage collection leaves alone, by tag, digest or id.
    pub pinned_images: Option<Vec<String>>,
    /// Ranges that standalone Services get a clusterIP from, one of each family.
    #[serde(rename = "serviceClusterIPRange")]
    pub service_cluster_ip_range: Option<String>,
    /// `first-last`.
    pub service_node_port_range: Option<String>,
}

/// How the containers of a RuntimeClass handler are made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuntimeHandler {
    /// The program of an OCI runtime; the built-in one without.
    pub path: Option<PathBuf>,
    /// An OCI spec that its containers start from.
    pub base_spec: Option<PathBuf>,
}

use Treatment::Used;

/// All fields of the kind.
pub(super) const FIELDS: Fields = &[
    ("standalone", Used),
    ("stateDir", Used),
    ("runDir", Used),
    ("containerLogsDir", Used),
    ("cniConfDir", Used),
    ("cniBinDir", Used),
    ("cdiSpecDirs", Used),
    ("runtimeHandlers", Used),
    ("streamServerAddress", Used),
    ("streamServerPort", Used),
    ("streamTlsCertFile", Used),
    ("streamTlsKeyFile", Used),
    ("pinnedImages", Used),
    ("serviceClusterIPRange", Used),
    ("serviceNodePortRange", Used),
];
