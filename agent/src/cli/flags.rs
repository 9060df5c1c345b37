//! The flags that configure a node, under the names that kubelet and kube-proxy use.
//!
//! Every one is optional: what is not given comes from `--config`, then from the defaults
//! (`config::NodeConfig::resolve`).

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, ValueEnum};

use super::kubelet_flags::KubeletFlags;
use super::proxy_flags::ProxyFlags;

/// Which parts run in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// The kubelet's work.
    Agent,
    /// The Service proxy.
    Proxy,
    /// The CRI shim.
    Cri,
}

/// How Services are programmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ProxyModeFlag {
    /// nftables where the kernel has it, else iptables.
    Auto,
    /// Own nftables table.
    Nftables,
    /// Own iptables chains.
    Iptables,
}

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CgroupDriverFlag {
    /// Directories in cgroupfs.
    Cgroupfs,
    /// Slices and scopes of systemd.
    Systemd,
}

/// Flags of `longshore run`.
#[derive(Clone, Debug, Default, Args)]
pub struct NodeFlags {
    /// File with KubeletConfiguration, KubeProxyConfiguration and LongshoreConfiguration documents
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of files (*.conf) with KubeletConfiguration that go over it one after the other, by name
    #[arg(long, value_name = "DIR")]
    pub config_dir: Option<PathBuf>,
    /// Credentials for the API server [default: /etc/kubernetes/kubelet.conf unless --standalone]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Credentials to ask for a certificate with, used while --kubeconfig does not exist
    #[arg(long, value_name = "FILE")]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Directory of this node's certificates [default: <root-dir>/pki]
    #[arg(long, value_name = "DIR")]
    pub cert_dir: Option<PathBuf>,
    /// Address (or one of each family) that this node is known by
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Name of this node, instead of the hostname
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// Labels to register the node with
    #[arg(long, value_name = "KEY=VALUE,...", value_delimiter = ',')]
    pub node_labels: Vec<String>,
    /// Taints to register the node with
    #[arg(long, value_name = "KEY=VALUE:EFFECT,...", value_delimiter = ',')]
    pub register_with_taints: Vec<String>,
    /// Register the node with the API server [default: true]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub register_node: Option<bool>,
    /// `external`: a cloud controller manager tells the node's addresses and lets pods come
    #[arg(long, value_name = "PROVIDER")]
    pub cloud_provider: Option<String>,
    /// Unique id of this machine at its cloud provider
    #[arg(long, value_name = "ID")]
    pub provider_id: Option<String>,
    /// Directory of pods and plugins [default: /var/lib/kubelet]
    #[arg(long, value_name = "DIR")]
    pub root_dir: Option<PathBuf>,
    /// State of the CRI shim [default: /var/lib/longshore]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Sockets and network namespaces [default: /run/longshore]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Logs of containers [default: /var/log/pods]
    #[arg(long, value_name = "DIR")]
    pub pod_logs_dir: Option<PathBuf>,
    /// Links to the logs of containers [default: /var/log/containers]
    #[arg(long, value_name = "DIR")]
    pub container_logs_dir: Option<PathBuf>,
    /// CRI socket of another runtime; without it the built-in one is used
    #[arg(long, value_name = "unix://PATH")]
    pub container_runtime_endpoint: Option<String>,
    /// CRI socket for images, where it is not the runtime's
    #[arg(long, value_name = "unix://PATH")]
    pub image_service_endpoint: Option<String>,
    /// CredentialProviderConfig: which programs know credentials for registries (a file, or a folder of
    /// YAML and JSON files)
    #[arg(long, value_name = "PATH")]
    pub image_credential_provider_config: Option<PathBuf>,
    /// Folder of the programs that --image-credential-provider-config names
    #[arg(long, value_name = "DIR")]
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    /// Folder of manifests [default: /etc/kubernetes/manifests]
    #[arg(long, alias = "manifests", value_name = "DIR")]
    pub pod_manifest_path: Option<PathBuf>,
    /// Run without a control plane: pods and Services from manifests only
    #[arg(long)]
    pub standalone: bool,
    /// Run only this part (may be repeated)
    #[arg(long, value_enum, value_name = "PART")]
    pub only: Vec<Part>,
    /// DNS servers of pods with dnsPolicy ClusterFirst
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster
    #[arg(long, value_name = "DOMAIN")]
    pub cluster_domain: Option<String>,
    /// The host's resolver configuration, for pods [default: /etc/resolv.conf]
    #[arg(long, value_name = "FILE")]
    pub resolv_conf: Option<PathBuf>,
    /// Range of pod addresses on this node, where no control plane hands one out (one of each family)
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub pod_cidr: Vec<String>,
    /// Ranges of all pods of the cluster; traffic from elsewhere to a Service is masqueraded
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,
    /// Ranges that Services without clusterIP get one from, standalone [default: 10.96.0.0/16]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub service_cluster_ip_range: Vec<String>,
    /// Ports that Services without nodePort get one from, standalone [default: 30000-32767]
    #[arg(long, value_name = "FIRST-LAST")]
    pub service_node_port_range: Option<String>,
    /// How Services are programmed [default: auto]
    #[arg(long, value_enum, value_name = "MODE")]
    pub proxy_mode: Option<ProxyModeFlag>,
    /// Masquerade all Service traffic
    #[arg(long)]
    pub masquerade_all: bool,
    /// Node addresses that serve NodePorts
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// Parent cgroup of all pods
    #[arg(long, value_name = "CGROUP")]
    pub cgroup_root: Option<String>,
    /// Who makes cgroups
    #[arg(long, value_enum, value_name = "DRIVER")]
    pub cgroup_driver: Option<CgroupDriverFlag>,
    /// Pods that may run here at once
    #[arg(long, value_name = "N")]
    pub max_pods: Option<u32>,
    /// Dead instances of each container that are kept, no limit if negative [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub maximum_dead_containers_per_container: Option<i32>,
    /// Dead instances of all containers together that are kept, no limit if negative [default: -1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub maximum_dead_containers: Option<i32>,
    /// Age before which a dead container is kept [default: 0s]
    #[arg(long, value_name = "TIME")]
    pub minimum_container_ttl_duration: Option<kube::core::Duration>,
    /// Address of the agent's /healthz; with --only proxy, address and port of the proxy's
    #[arg(long, value_name = "IP[:PORT]")]
    pub healthz_bind_address: Option<String>,
    /// Port of the agent's /healthz, 0 for none [default: 10248]
    #[arg(long, value_name = "PORT")]
    pub healthz_port: Option<u16>,
    /// Address of the node API [default: all]
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
    /// Port of the node API [default: 10250]
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Address and port of the proxy's /healthz and /livez, empty for none [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT")]
    pub proxy_healthz_bind_address: Option<String>,
    /// Address and port of the proxy's metrics, empty for none [default: 127.0.0.1:10249]
    #[arg(long, alias = "metrics-bind-address", value_name = "IP:PORT")]
    pub proxy_metrics_bind_address: Option<String>,
    /// Folder of CNI network configurations [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Folder of CNI plugins [default: /opt/cni/bin]
    #[arg(long, value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Address that the container runtime streams exec, attach and port-forward on [default: 127.0.0.1]
    #[arg(long, value_name = "IP")]
    pub stream_server_address: Option<String>,
    /// Port of it, 0 for any free one [default: 0]
    #[arg(long, value_name = "PORT")]
    pub stream_server_port: Option<u16>,
    /// Certificate chain for streaming over HTTPS, a PEM file
    #[arg(long, value_name = "FILE", requires = "stream_tls_key_file")]
    pub stream_tls_cert_file: Option<PathBuf>,
    /// Private key of it, a PEM file
    #[arg(long, value_name = "FILE", requires = "stream_tls_cert_file")]
    pub stream_tls_key_file: Option<PathBuf>,
    /// Images that garbage collection leaves alone, by tag, digest or id, separated by commas
    #[arg(long, value_name = "IMAGES", value_delimiter = ',')]
    pub pinned_images: Option<Vec<String>>,
    /// Verbosity, 0 to 10 as Kubernetes counts it
    #[arg(short, long = "v", value_name = "LEVEL")]
    pub verbosity: Option<u8>,
    /// Filter of log lines (error, warn, info, debug, trace, or target=level,...)
    #[arg(long, value_name = "FILTER", env = "LONGSHORE_LOG")]
    pub log_level: Option<String>,
    /// Shape of log lines
    #[arg(long, value_name = "text|json", value_parser = ["text", "json"])]
    pub logging_format: Option<String>,
    /// Of KubeletConfiguration.
    #[command(flatten)]
    pub kubelet: KubeletFlags,
    /// Of kube-proxy.
    #[command(flatten)]
    pub kube_proxy: ProxyFlags,
}

/// Kubelet's flags that are not noted: places that `longshore run` has by itself, and what belongs to
/// runtimes of the past.
const WITHOUT_MEANING: [&str; 8] = [
    "bootstrap-kubeconfig",
    "cloud-config",
    "config",
    "container-runtime",
    "kubeconfig",
    "log-file",
    "network-plugin",
    "v",
];

#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    flags: NodeFlags,
}

/// Of a kubelet's `arguments` (`--name=value`) those that `longshore run` has too; and a warning for
/// each that asks for something it has not.
pub fn of_kubelet(arguments: &[String]) -> (Vec<String>, Vec<String>) {
    let command = Line::command();
    // A kubelet's flag is not the proxy's of the same name.
    let of_proxy = ProxyFlags::augment_args(clap::Command::new("proxy"));
    let has = |command: &clap::Command, name: &str| {
        command.get_arguments().any(|a| a.get_long() == Some(name))
    };
    let known = |name: &str| has(&command, name) && !has(&of_proxy, name);
    let (mut taken, mut warnings) = (Vec::new(), Vec::new());
    for argument in arguments {
        let name = argument.trim_start_matches('-').split('=').next().unwrap_or_default();
        if WITHOUT_MEANING.contains(&name) {
            continue;
        }
        if !known(name) {
            warnings.push(format!("kubelet's flag --{name} is not known here and has no effect"));
        } else if let Err(error) = Line::try_parse_from([argument]) {
            let said = error.to_string();
            let said = said.lines().next().unwrap_or_default().trim_start_matches("error: ");
            warnings.push(format!("kubelet's flag {argument} has no effect: {said}"));
        } else {
            taken.push(argument.clone());
        }
    }
    (taken, warnings)
}

impl NodeFlags {
    /// What `arguments` (as [`of_kubelet`] returns them) say.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(arguments: &[String]) -> Result<Self, String> {
        let parsed = Line::try_parse_from(arguments);
        parsed.map(|line| line.flags).map_err(|error| error.to_string())
    }

    /// These, and where they say nothing `other`.
    pub fn or(mut self, other: Self) -> Self {
        macro_rules! options {
            ($($field:ident),*) => { $(self.$field = self.$field.or(other.$field);)* };
        }
        macro_rules! lists {
            ($($field:ident),*) => { $(if self.$field.is_empty() { self.$field = other.$field; })* };
        }
        options!(
            register_node,
            cloud_provider,
            provider_id,
            config,
            config_dir,
            kubeconfig,
            bootstrap_kubeconfig,
            cert_dir,
            hostname_override,
            root_dir,
            state_dir,
            run_dir,
            pod_logs_dir,
            container_logs_dir,
            container_runtime_endpoint,
            image_service_endpoint,
            image_credential_provider_config,
            image_credential_provider_bin_dir,
            pod_manifest_path,
            cluster_domain,
            resolv_conf,
            service_node_port_range,
            proxy_mode,
            cgroup_root,
            cgroup_driver,
            max_pods,
            maximum_dead_containers_per_container,
            maximum_dead_containers,
            minimum_container_ttl_duration,
            healthz_bind_address,
            healthz_port,
            address,
            port,
            proxy_healthz_bind_address,
            proxy_metrics_bind_address,
            cni_conf_dir,
            cni_bin_dir,
            stream_server_address,
            stream_server_port,
            stream_tls_cert_file,
            stream_tls_key_file,
            pinned_images,
            verbosity,
            log_level,
            logging_format
        );
        lists!(
            node_ip,
            node_labels,
            register_with_taints,
            only,
            cluster_dns,
            pod_cidr,
            cluster_cidr,
            service_cluster_ip_range,
            nodeport_addresses
        );
        self.standalone |= other.standalone;
        self.masquerade_all |= other.masquerade_all;
        self.kubelet = self.kubelet.or(other.kubelet);
        self
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn kubelets_flags_are_taken_ignored_or_warned_of() {
        let given = [
            "--node-labels=a=b,c=d",
            "--pod-infra-container-image=registry.k8s.io/pause:3.10",
            "--node-ip=10.0.0.1",
            "--exit-on-lock-contention",
            "--eviction-hard=memory.available<5%",
            "--max-pods=many",
            "--image-credential-provider-config=/etc/providers.yaml",
        ];
        let (taken, warnings) = of_kubelet(&given.map(str::to_owned));
        let providers = "--image-credential-provider-config=/etc/providers.yaml";
        assert_eq!(
            taken,
            [
                "--node-labels=a=b,c=d",
                "--pod-infra-container-image=registry.k8s.io/pause:3.10",
                "--node-ip=10.0.0.1",
                "--eviction-hard=memory.available<5%",
                providers
            ]
        );
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("--exit-on-lock-contention"), "{warnings:?}");
        assert!(warnings[1].contains("--max-pods=many"), "{warnings:?}");
        let noted = NodeFlags::parse(&taken).unwrap();
        assert_eq!(noted.node_labels, ["a=b", "c=d"]);
        let own = NodeFlags { node_labels: vec!["x=y".to_owned()], ..NodeFlags::default() };
        let both = own.or(noted);
        assert_eq!(both.node_labels, ["x=y"]);
        assert_eq!(both.node_ip.len(), 1);
    }
}
