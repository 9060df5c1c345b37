//! What the cluster keeps for its nodes: the ConfigMaps `kubeadm-config`, `kubelet-config` and
//! `kube-proxy` in `kube-system`, read with the bootstrap token and turned into this node's files.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use super::JoinError;
use super::kubeadm::{self, ClusterConfiguration};
use super::patches::{Patch, PatchError, plan_patched};
use super::proxy_config::plan_proxy_config;
use crate::api::backoff::Backoff;
use crate::api::{self, ApiError, REQUEST_TIMEOUT};
use crate::config;
use crate::node::object::KUBELET_VERSION;
use crate::standalone::yaml;

/// How long a failure that may pass is tried again.
const PATIENCE: Duration = Duration::from_secs(15);

/// Configuration documents of the node, as `--config` takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// KubeletConfiguration.
    pub kubelet: Option<String>,
    /// KubeProxyConfiguration.
    pub proxy: Option<String>,
}

/// The texts as the cluster has them; `Err` says why one cannot be had.
#[derive(Clone, Debug)]
pub struct Texts {
    /// `kubeadm-config`, key `ClusterConfiguration`.
    pub cluster: Result<Option<String>, String>,
    /// `kubelet-config`, key `kubelet`.
    pub kubelet: Result<Option<String>, String>,
    /// `kube-proxy`, key `config.conf`.
    pub proxy: Result<Option<String>, String>,
}

/// Reads them all; also what the operator should know of them.
///
/// # Errors
/// When the server fails for longer than patience lasts, and when what the cluster says cannot be
/// used by this version.
pub async fn of_cluster(
    client: &Client,
    ca: &Path,
    patches: &[Patch],
) -> Result<(Settings, Vec<String>), JoinError> {
    let texts = Texts {
        cluster: read(client, "kubeadm-config", "ClusterConfiguration").await?,
        kubelet: read(client, "kubelet-config", "kubelet").await?,
        proxy: read(client, "kube-proxy", "config.conf").await?,
    };
    let (mut settings, warnings) = plan_settings(texts, ca)?;
    if let Some(text) = settings.kubelet.take() {
        settings.kubelet = Some(plan_patched_kubelet(text, patches)?);
    }
    Ok((settings, warnings))
}

/// The node's KubeProxyConfiguration alone, as an adopted node reads it with its own credentials.
///
/// # Errors
/// When the server fails for longer than patience lasts.
pub async fn proxy_of_cluster(
    client: &Client,
    warnings: &mut Vec<String>,
) -> Result<Option<String>, JoinError> {
    let cluster = read(client, "kubeadm-config", "ClusterConfiguration").await?.ok().flatten();
    let cluster = cluster.and_then(|text| ClusterConfiguration::parse(&text).ok());
    let cluster = cluster.unwrap_or_default();
    warnings.extend(kubeadm::skew_warning(&cluster.kubernetes_version, KUBELET_VERSION));
    let proxy = read(client, "kube-proxy", "config.conf").await?;
    Ok(proxy_config(proxy, &cluster, warnings))
}

/// One key of a ConfigMap. The inner error is one that trying again does not help.
async fn read(
    client: &Client,
    name: &str,
    key: &str,
) -> Result<Result<Option<String>, String>, ApiError> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
    let what = format!("read kube-system/{name}");
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(300), Duration::from_secs(3));
    loop {
        match api::timed(&what, REQUEST_TIMEOUT, maps.get_opt(name)).await {
            Ok(map) => return Ok(Ok(map.and_then(|m| m.data).and_then(|mut d| d.remove(key)))),
            Err(error) if !error.is_retryable() => return Ok(Err(error.to_string())),
            Err(error) if started.elapsed() >= PATIENCE => return Err(error),
            Err(_) => tokio::time::sleep(backoff.next_delay()).await,
        }
    }
}

/// The node's files from the cluster's `texts`, and warnings. `ca` is where the cluster's CA is kept.
///
/// # Errors
/// When the cluster's KubeletConfiguration cannot be used.
pub fn plan_settings(
    texts: Texts,
    ca: &Path,
) -> Result<(Settings, Vec<String>), kubeadm::DocumentError> {
    let mut warnings = Vec::new();
    let cluster = match texts.cluster {
        Ok(Some(text)) => ClusterConfiguration::parse(&text).unwrap_or_else(|error| {
            warnings.push(format!("{error}: it is not used"));
            ClusterConfiguration::default()
        }),
        // A cluster that kubeadm did not make has none.
        Ok(None) | Err(_) => ClusterConfiguration::default(),
    };
    warnings.extend(kubeadm::skew_warning(&cluster.kubernetes_version, KUBELET_VERSION));
    let (kubelet, missing) = match texts.kubelet {
        Ok(Some(text)) => {
            config::parse(text.as_bytes()).map_err(|error| kubeadm::DocumentError {
                origin: "kube-system/kubelet-config".to_owned(),
                cause: format!("{error}; correct it there, or use a longshore that knows it"),
            })?;
            (Some(text), None)
        }
        Ok(None) => (
            Some(default_kubelet_config(&cluster, ca)),
            Some("the cluster has no ConfigMap kube-system/kubelet-config".to_owned()),
        ),
        Err(error) => (Some(default_kubelet_config(&cluster, ca)), Some(error)),
    };
    if let Some(missing) = missing {
        let dns = cluster.cluster_dns();
        warnings.push(match dns.first() {
            Some(dns) => {
                format!("{missing}: defaults are used, with the cluster's DNS taken to be at {dns}")
            }
            None => format!(
                "{missing}: defaults are used; pods get no clusterDNS unless --config says so"
            ),
        });
    }
    let proxy = proxy_config(texts.proxy, &cluster, &mut warnings);
    Ok((Settings { kubelet, proxy }, warnings))
}

/// The node's KubeletConfiguration with its own `patches`.
///
/// # Errors
/// When a patch does not fit, or makes something of it that the node could not start with.
pub fn plan_patched_kubelet(text: String, patches: &[Patch]) -> Result<String, PatchError> {
    let Some(last) = patches.last() else { return Ok(text) };
    let wrong = |cause: String| PatchError { path: last.path.clone(), cause };
    let document = yaml::documents(text.as_bytes()).into_iter().next();
    let document = document.and_then(|document| document.value.ok());
    let document = document.ok_or_else(|| wrong("there is nothing to patch".to_owned()))?;
    let patched = format!("{:#}\n", plan_patched(document, patches)?);
    config::parse(patched.as_bytes()).map_err(|error| {
        wrong(format!("the KubeletConfiguration with all patches cannot be used: {error}"))
    })?;
    Ok(patched)
}

fn proxy_config(
    text: Result<Option<String>, String>,
    cluster: &ClusterConfiguration,
    warnings: &mut Vec<String>,
) -> Option<String> {
    // A cluster without kube-proxy has none, and not everybody may read it.
    let text = text.ok().flatten();
    plan_proxy_config(text.as_deref(), cluster.pod_subnet.as_deref()).unwrap_or_else(|why| {
        warnings.push(format!(
            "config.conf of kube-system/kube-proxy is not used: {why}; say --cluster-cidr to \
             `longshore run` if Services are to tell pods' traffic from other traffic"
        ));
        None
    })
}

/// What kubeadm would have written for such a cluster.
fn default_kubelet_config(cluster: &ClusterConfiguration, ca: &Path) -> String {
    let mut document = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": ca},
        },
        "authorization": {"mode": "Webhook"},
        "rotateCertificates": true,
        "staticPodPath": "/etc/kubernetes/manifests",
    });
    let dns = cluster.cluster_dns();
    if !dns.is_empty() {
        document["clusterDNS"] = json!(dns);
        document["clusterDomain"] = json!(cluster.dns_domain.as_deref().unwrap_or("cluster.local"));
    }
    format!("{document:#}\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::join::patches::PatchKind;

    const CLUSTER: &str = "kind: ClusterConfiguration\nkubernetesVersion: v1.36.1\nnetworking: \
                           {dnsDomain: c.local, podSubnet: 10.244.0.0/16, serviceSubnet: 10.96.0.0/12}\n";
    const KUBELET: &str =
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPods: 7\n";

    fn plan(
        cluster: Option<&str>,
        kubelet: Option<&str>,
        proxy: Option<&str>,
    ) -> Result<(Settings, Vec<String>), kubeadm::DocumentError> {
        let text = |text: Option<&str>| Ok(text.map(str::to_owned));
        let texts = Texts { cluster: text(cluster), kubelet: text(kubelet), proxy: text(proxy) };
        plan_settings(texts, Path::new("/etc/kubernetes/pki/ca.crt"))
    }

    #[test]
    fn a_kubeadm_clusters_documents_are_taken() {
        let (settings, warnings) = plan(Some(CLUSTER), Some(KUBELET), None).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(settings.kubelet.as_deref(), Some(KUBELET));
        assert!(settings.proxy.unwrap().contains("10.244.0.0/16"));
    }

    #[test]
    fn without_a_kubelet_configuration_the_cluster_says_where_its_dns_is() {
        let (settings, warnings) = plan(Some(CLUSTER), None, None).unwrap();
        let read = config::parse(settings.kubelet.unwrap().as_bytes()).unwrap().kubelet;
        assert_eq!(read.cluster_domain.as_deref(), Some("c.local"));
        assert!(warnings[0].contains("10.96.0.10"), "{warnings:?}");
        let (settings, warnings) = plan(None, None, None).unwrap();
        assert!(settings.proxy.is_none() && warnings[0].contains("no clusterDNS"), "{warnings:?}");
    }

    #[test]
    fn a_nodes_own_patches_change_it_and_are_checked() {
        let patch = |value| Patch {
            path: "/p/kubeletconfiguration.yaml".into(),
            kind: PatchKind::Strategic,
            value,
        };
        let patched = plan_patched_kubelet(KUBELET.to_owned(), &[patch(json!({"maxPods": 9}))]);
        let read = config::parse(patched.unwrap().as_bytes()).unwrap().kubelet;
        assert_eq!(read.max_pods, Some(9));
        let error = plan_patched_kubelet(KUBELET.to_owned(), &[patch(json!({"maxPodz": 9}))]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("maxPodz") && error.contains("/p/kubelet"), "{error}");
        assert_eq!(plan_patched_kubelet(KUBELET.to_owned(), &[]).unwrap(), KUBELET);
    }

    #[test]
    fn what_a_node_could_not_start_with_is_refused_at_the_join() {
        let error = plan(None, Some(&format!("{KUBELET}fromTheFuture: 1\n")), None).unwrap_err();
        assert!(error.to_string().contains("fromTheFuture"), "{error}");
        let old = CLUSTER.replace("v1.36.1", "v1.35.0");
        let (_, warnings) = plan(Some(&old), Some(KUBELET), None).unwrap();
        assert!(warnings[0].contains("v1.35.0"), "{warnings:?}");
    }
}
