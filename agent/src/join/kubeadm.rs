//! kubeadm's own documents: a `JoinConfiguration` instead of flags, and what the cluster's
//! `ClusterConfiguration` (ConfigMap `kube-system/kubeadm-config`) says to a node. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Taint;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::standalone::yaml;

/// Kinds that kubeadm takes in the same file and does not look at when it joins.
const OTHER_KINDS: [&str; 7] = [
    "ClusterConfiguration",
    "InitConfiguration",
    "ResetConfiguration",
    "UpgradeConfiguration",
    "ClusterStatus",
    "KubeletConfiguration",
    "KubeProxyConfiguration",
];

/// What is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {cause}")]
pub struct DocumentError {
    /// The file, or the ConfigMap.
    pub origin: String,
    /// In words.
    pub cause: String,
}

/// `JoinConfiguration` (kubeadm.k8s.io/v1beta3 and v1beta4) as far as it concerns a worker.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct JoinConfiguration {
    #[serde(default)]
    pub node_registration: NodeRegistration,
    pub ca_cert_path: Option<PathBuf>,
    #[serde(default)]
    pub discovery: DiscoveryField,
    /// Another machine's business: refused.
    pub control_plane: Option<Value>,
    pub skip_phases: Option<Vec<String>>,
    pub patches: Option<Patches>,
    pub timeouts: Option<Timeouts>,
    pub dry_run: Option<bool>,
}

/// `patches`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Patches {
    pub directory: Option<PathBuf>,
}

/// `nodeRegistration`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct NodeRegistration {
    pub name: Option<String>,
    pub cri_socket: Option<String>,
    pub taints: Option<Vec<Taint>>,
    #[serde(default)]
    pub kubelet_extra_args: ExtraArgs,
    pub ignore_preflight_errors: Option<Vec<String>>,
    pub image_pull_policy: Option<String>,
    pub image_pull_serial: Option<bool>,
}

/// v1beta3 has a map, v1beta4 a list.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub enum ExtraArgs {
    Map(BTreeMap<String, String>),
    List(Vec<ExtraArg>),
}

/// One flag.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct ExtraArg {
    pub name: String,
    #[serde(default)]
    pub value: String,
}

impl Default for ExtraArgs {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

/// `discovery`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct DiscoveryField {
    pub bootstrap_token: Option<BootstrapTokenField>,
    pub file: Option<FileField>,
    pub tls_bootstrap_token: Option<String>,
    pub timeout: Option<kube::core::Duration>,
}

/// `discovery.bootstrapToken`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct BootstrapTokenField {
    pub token: Option<String>,
    pub api_server_endpoint: Option<String>,
    #[serde(default)]
    pub ca_cert_hashes: Vec<String>,
    #[serde(default, rename = "unsafeSkipCAVerification")]
    pub unsafe_skip_ca_verification: bool,
}

/// `discovery.file`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct FileField {
    pub kube_config_path: String,
}

/// `timeouts`; those of the control plane's phases mean nothing here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[allow(missing_docs, reason = "the field documentation is upstream's")]
pub struct Timeouts {
    pub discovery: Option<kube::core::Duration>,
    #[serde(rename = "tlsBootstrap")]
    pub tls_bootstrap: Option<kube::core::Duration>,
    pub control_plane_component_health_check: Option<kube::core::Duration>,
    pub kubelet_health_check: Option<kube::core::Duration>,
    #[serde(rename = "kubernetesAPICall")]
    pub kubernetes_api_call: Option<kube::core::Duration>,
    #[serde(rename = "etcdAPICall")]
    pub etcd_api_call: Option<kube::core::Duration>,
    pub upgrade_manifests: Option<kube::core::Duration>,
}

impl JoinConfiguration {
    /// The one `JoinConfiguration` in `text`.
    ///
    /// # Errors
    /// What is wrong with it, by document and field.
    pub fn parse(text: &[u8], origin: &str) -> Result<Self, DocumentError> {
        let wrong = |cause: String| DocumentError { origin: origin.to_owned(), cause };
        let mut found = None;
        for document in yaml::documents(text) {
            let number = document.number;
            let value = document.value.map_err(|e| wrong(format!("document {number}: {e}")))?;
            let field = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
            let (version, kind) = (field("apiVersion").to_owned(), field("kind").to_owned());
            if OTHER_KINDS.contains(&kind.as_str()) {
                continue;
            }
            if kind != "JoinConfiguration" {
                return Err(wrong(format!(
                    "document {number}: kind {kind:?} is unknown; expected JoinConfiguration"
                )));
            }
            if !["kubeadm.k8s.io/v1beta3", "kubeadm.k8s.io/v1beta4"].contains(&version.as_str()) {
                return Err(wrong(format!(
                    "document {number}: apiVersion {version:?} is not supported; write it as \
                     kubeadm.k8s.io/v1beta4 (`kubeadm config migrate` does)"
                )));
            }
            if found.is_some() {
                return Err(wrong(format!("document {number}: a second JoinConfiguration")));
            }
            found =
                Some(typed::<Self>(value).map_err(|e| wrong(format!("JoinConfiguration.{e}")))?);
        }
        let found = found.ok_or_else(|| wrong("it holds no JoinConfiguration".to_owned()))?;
        if found.control_plane.is_some() {
            return Err(wrong(
                "JoinConfiguration.controlPlane: Longshore nodes are workers; leave it out"
                    .to_owned(),
            ));
        }
        Ok(found)
    }

    /// `kubeletExtraArgs` and taints as arguments (`--name=value`) of `longshore run`.
    pub fn kubelet_arguments(&self) -> Vec<String> {
        let argument = |name: &str, value: &str| format!("--{}={value}", name.trim_matches('-'));
        let mut all: Vec<String> = match &self.node_registration.kubelet_extra_args {
            ExtraArgs::Map(map) => map.iter().map(|(n, v)| argument(n, v)).collect(),
            ExtraArgs::List(list) => list.iter().map(|a| argument(&a.name, &a.value)).collect(),
        };
        let taints: Vec<String> = self
            .node_registration
            .taints
            .iter()
            .flatten()
            .map(|t| format!("{}={}:{}", t.key, t.value.as_deref().unwrap_or_default(), t.effect))
            .collect();
        if !taints.is_empty() {
            all.push(argument("register-with-taints", &taints.join(",")));
        }
        all
    }
}

/// What a node takes from the cluster's `ClusterConfiguration`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterConfiguration {
    /// `v1.36.2`.
    pub kubernetes_version: String,
    /// Ranges of pods, comma separated.
    pub pod_subnet: Option<String>,
    /// Ranges of Services, comma separated.
    pub service_subnet: Option<String>,
    /// The cluster's domain.
    pub dns_domain: Option<String>,
}

impl ClusterConfiguration {
    /// From the key `ClusterConfiguration` of kubeadm-config. Unknown fields are newer kubeadm's.
    ///
    /// # Errors
    /// When it is no document at all.
    pub fn parse(text: &str) -> Result<Self, DocumentError> {
        let wrong = |cause: String| DocumentError {
            origin: "kube-system/kubeadm-config".to_owned(),
            cause,
        };
        let document = yaml::documents(text.as_bytes()).into_iter().next();
        let value = document
            .ok_or_else(|| wrong("it is empty".to_owned()))?
            .value
            .map_err(|e| wrong(e.to_string()))?;
        let text = |pointer: &str| {
            let text = value.pointer(pointer).and_then(Value::as_str).map(str::trim);
            text.filter(|text| !text.is_empty()).map(str::to_owned)
        };
        Ok(Self {
            kubernetes_version: text("/kubernetesVersion").unwrap_or_default(),
            pod_subnet: text("/networking/podSubnet"),
            service_subnet: text("/networking/serviceSubnet"),
            dns_domain: text("/networking/dnsDomain"),
        })
    }

    /// Where kubeadm puts the cluster's DNS: the tenth address of each range of Services.
    pub fn cluster_dns(&self) -> Vec<IpAddr> {
        let ranges = self.service_subnet.as_deref().unwrap_or_default();
        ranges
            .split(',')
            .filter_map(|range| {
                let (first, _) = range.trim().split_once('/')?;
                Some(match first.parse().ok()? {
                    IpAddr::V4(ip) => IpAddr::V4(u32::from(ip).checked_add(10)?.into()),
                    IpAddr::V6(ip) => IpAddr::V6(u128::from(ip).checked_add(10)?.into()),
                })
            })
            .collect()
    }
}

/// A warning if an API server of `version` (`v1.36.2`) does not go with a node of `node`
/// (Kubernetes' version skew policy: never newer than the API server, at most three minor versions
/// older).
pub fn skew_warning(version: &str, node: &str) -> Option<String> {
    let minor = |text: &str| -> Option<u32> {
        let mut parts = text.trim_start_matches('v').split('.');
        (parts.next()? == "1").then(|| parts.next()?.trim_end_matches('+').parse().ok())?
    };
    let (server, node_minor) = (minor(version)?, minor(node)?);
    if server < node_minor {
        return Some(format!(
            "the cluster runs Kubernetes {version}, older than this node's {node}: Kubernetes does \
             not support that; upgrade the control plane"
        ));
    }
    (server > node_minor + 3).then(|| {
        format!(
            "the cluster runs Kubernetes {version}, more than three minor versions newer than this \
             node's {node}: upgrade longshore"
        )
    })
}

/// `value` as a `T`; errors begin with the path of the field.
fn typed<T: DeserializeOwned>(mut value: Value) -> Result<T, String> {
    if let Some(fields) = value.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    serde_path_to_error::deserialize(value)
        .map_err(|error| format!("{}: {}", error.path(), error.inner()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const JOIN: &str = "apiVersion: kubeadm.k8s.io/v1beta4
kind: JoinConfiguration
caCertPath: /etc/kubernetes/pki/ca.crt
discovery:
  bootstrapToken:
    apiServerEndpoint: 10.0.0.1:6443
    token: abcdef.0123456789abcdef
    caCertHashes: [\"sha256:00\", \"sha256:11\"]
  tlsBootstrapToken: abcdef.0123456789abcdef
nodeRegistration:
  name: n1
  criSocket: unix:///run/containerd/containerd.sock
  imagePullPolicy: IfNotPresent
  imagePullSerial: true
  taints: [{key: a, value: b, effect: NoSchedule}]
  kubeletExtraArgs: [{name: node-labels, value: x=y}, {name: v, value: \"2\"}]
patches: {directory: /x}
timeouts: {discovery: 1m0s, tlsBootstrap: 2m0s, kubeletHealthCheck: 4m0s}
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
";

    #[test]
    fn kubeadms_file_is_taken_as_it_is() {
        let read = JoinConfiguration::parse(JOIN.as_bytes(), "f").unwrap();
        assert_eq!(read.node_registration.name.as_deref(), Some("n1"));
        let patches = read.patches.as_ref().and_then(|p| p.directory.as_deref());
        assert_eq!(patches, Some(std::path::Path::new("/x")));
        let token = read.discovery.bootstrap_token.as_ref().unwrap();
        assert_eq!(token.ca_cert_hashes.len(), 2);
        assert_eq!(
            read.kubelet_arguments(),
            ["--node-labels=x=y", "--v=2", "--register-with-taints=a=b:NoSchedule"]
        );
        let old = JOIN
            .replace("v1beta4", "v1beta3")
            .replace("[{name: node-labels, value: x=y}, {name: v, value: \"2\"}]", "{v: \"2\"}");
        let read = JoinConfiguration::parse(old.as_bytes(), "f").unwrap();
        assert_eq!(read.kubelet_arguments()[0], "--v=2");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (from, to, says) in [
            ("caCertPath", "caCertPaht", "unknown field `caCertPaht`"),
            ("name: n1", "name: 5", "JoinConfiguration.nodeRegistration.name"),
            ("v1beta4", "v1beta2", "v1beta2"),
            ("JoinConfiguration", "Pod", "kind \"Pod\""),
            ("JoinConfiguration", "InitConfiguration", "no JoinConfiguration"),
            ("caCertPath: /etc/kubernetes/pki/ca.crt", "controlPlane: {}", "workers"),
            ("patches: {directory: /x}", "patches: {folder: /x}", "folder"),
            ("discovery:", "discovery: [", "document 1"),
        ] {
            let text = JOIN.replacen(from, to, 1);
            let error =
                JoinConfiguration::parse(text.as_bytes(), "f.yaml").unwrap_err().to_string();
            assert!(error.contains(says) && error.starts_with("f.yaml"), "{to}: {error}");
        }
    }

    #[test]
    fn the_clusters_configuration_gives_ranges_domain_and_dns() {
        let text = "kind: ClusterConfiguration\nkubernetesVersion: v1.36.0\nnetworking:\n  \
                    dnsDomain: c.local\n  podSubnet: 10.244.0.0/16\n  serviceSubnet: \
                    10.96.0.0/12,fd00::/112\n";
        let read = ClusterConfiguration::parse(text).unwrap();
        assert_eq!(read.pod_subnet.as_deref(), Some("10.244.0.0/16"));
        assert_eq!(read.dns_domain.as_deref(), Some("c.local"));
        let dns: Vec<String> = read.cluster_dns().iter().map(ToString::to_string).collect();
        assert_eq!(dns, ["10.96.0.10", "fd00::a"]);
        assert!(ClusterConfiguration::parse("").is_err());
    }

    #[test]
    fn version_skew_follows_kubernetes_policy() {
        for (server, warned) in [
            ("v1.36.4", false),
            ("v1.39.0", false),
            ("v1.40.0", true),
            ("v1.35.9", true),
            ("", false),
            ("v2.0", false),
        ] {
            assert_eq!(skew_warning(server, "v1.36.0").is_some(), warned, "{server}");
        }
    }
}
