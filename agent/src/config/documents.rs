//! The documents of one `--config` file, and the check of their field names.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    ConfigError, KubeProxyConfiguration, KubeletConfiguration, LongshoreConfiguration, Note,
};
use crate::standalone::yaml;

/// What a top-level field means to this node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Treatment {
    /// Read by us.
    Used,
    /// Accepted: it cannot change the behaviour of a pod or a Service here.
    Inert,
    /// Asks for something that is not built, unless its value is one of these (JSON), null or empty.
    NotBuilt(&'static [&'static str]),
}

/// A kind's fields by name.
pub(super) type Fields = &'static [(&'static str, Treatment)];

/// The documents of a configuration file, each at most once.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    /// `kubelet.config.k8s.io/v1beta1`.
    pub kubelet: KubeletConfiguration,
    /// The same as it was written, for `/configz`.
    pub kubelet_written: Map<String, Value>,
    /// `kubeproxy.config.k8s.io/v1alpha1`.
    pub kube_proxy: KubeProxyConfiguration,
    /// `longshore.io/v1alpha1`.
    pub longshore: LongshoreConfiguration,
    /// What was accepted and changes nothing, or is not built.
    pub notes: Vec<Note>,
}

const KUBELET: &str = "KubeletConfiguration";

/// Whether KubeletConfiguration has a field `name`.
#[cfg(test)]
pub(crate) fn has_kubelet_field(name: &str) -> bool {
    super::kubelet::FIELDS.iter().any(|(known, _)| *known == name)
}

impl Documents {
    /// The same with another KubeletConfiguration: what `change` makes of the one as it was written.
    pub fn with_kubelet(
        mut self,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<Self, ConfigError> {
        change(&mut self.kubelet_written);
        // They are of what it was before.
        self.notes.retain(|note| !note.field().starts_with("KubeletConfiguration."));
        let written = self.kubelet_written.clone();
        self.kubelet = read(KUBELET, written, super::kubelet::FIELDS, &mut self.notes)?;
        Ok(self)
    }
}

/// Puts a file of `--config-dir` over what was before it: fields in fields, anything else as a whole,
/// and null takes a field away (as kubelet's strategic merge, in whose types no list has a key).
pub fn merge(fields: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (name, value) in over {
        match (fields.get_mut(name), value) {
            (_, Value::Null) => {
                fields.remove(name);
            }
            (Some(Value::Object(inner)), Value::Object(over)) => merge(inner, over),
            _ => {
                fields.insert(name.clone(), value.clone());
            }
        }
    }
}

/// Parses the text of a `--config` file.
pub fn parse(text: &[u8]) -> Result<Documents, ConfigError> {
    let mut documents = Documents::default();
    let mut seen: Vec<&'static str> = Vec::new();
    for document in yaml::documents(text) {
        let number = document.number;
        let value = document
            .value
            .map_err(|cause| ConfigError::Syntax { document: number, cause: cause.to_string() })?;
        let text_of = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
        let (kind, api_version) = (text_of("kind").to_owned(), text_of("apiVersion").to_owned());
        let name = match (kind.as_str(), api_version.as_str()) {
            (KUBELET, "kubelet.config.k8s.io/v1beta1") => KUBELET,
            ("KubeProxyConfiguration", "kubeproxy.config.k8s.io/v1alpha1") => {
                "KubeProxyConfiguration"
            }
            ("LongshoreConfiguration", "longshore.io/v1alpha1") => "LongshoreConfiguration",
            _ => return Err(ConfigError::UnknownKind { document: number, kind, api_version }),
        };
        if seen.contains(&name) {
            return Err(ConfigError::Repeated { document: number, kind: name });
        }
        seen.push(name);
        let Value::Object(fields) = value else { continue };
        match name {
            KUBELET => {
                documents.kubelet_written = fields.clone();
                documents.kubelet =
                    read(name, fields, super::kubelet::FIELDS, &mut documents.notes)?;
            }
            "KubeProxyConfiguration" => {
                documents.kube_proxy =
                    read(name, fields, super::kube_proxy::FIELDS, &mut documents.notes)?;
            }
            _ => {
                documents.longshore =
                    read(name, fields, super::longshore::FIELDS, &mut documents.notes)?;
            }
        }
    }
    Ok(documents)
}

/// Checks the names of `fields` and reads the used ones.
fn read<T: DeserializeOwned>(
    kind: &'static str,
    fields: Map<String, Value>,
    known: Fields,
    notes: &mut Vec<Note>,
) -> Result<T, ConfigError> {
    let mut used = Map::new();
    for (name, value) in fields {
        if name == "kind" || name == "apiVersion" {
            continue;
        }
        let Some((_, treatment)) = known.iter().find(|(known, _)| *known == name) else {
            let suggestion = closest(&name, known);
            return Err(ConfigError::UnknownField { kind, field: name, suggestion });
        };
        match treatment {
            Treatment::Used if value.is_null() => {}
            Treatment::Used => {
                used.insert(name, value);
            }
            Treatment::Inert => notes.push(Note::Inert { field: format!("{kind}.{name}") }),
            Treatment::NotBuilt(defaults) => {
                if !is_default(&value, defaults) {
                    notes.push(Note::NotBuilt {
                        field: format!("{kind}.{name}"),
                        value: value.to_string(),
                    });
                }
            }
        }
    }
    // Field by field where it fails, so that the message names the field.
    T::deserialize(Value::Object(used.clone())).map_err(|whole| {
        for (name, value) in used {
            let alone = Value::Object(Map::from_iter([(name.clone(), value)]));
            if let Err(cause) = T::deserialize(alone) {
                return ConfigError::invalid(format!("{kind}.{name}"), cause);
            }
        }
        ConfigError::invalid(kind, whole)
    })
}

/// Whether `value` asks for nothing beyond the default.
fn is_default(value: &Value, defaults: &[&str]) -> bool {
    let listed = defaults.iter().any(|default| {
        serde_json::from_str::<Value>(default).is_ok_and(|default| default == *value)
    });
    listed
        || match value {
            Value::Null => true,
            Value::Bool(set) => !set && defaults.is_empty(),
            Value::Number(number) => defaults.is_empty() && number.as_f64() == Some(0.0),
            Value::String(text) => matches!(text.as_str(), "" | "0s"),
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
        }
}

/// The known field whose name is nearest to `name`, if any is near.
fn closest(name: &str, known: Fields) -> Option<&'static str> {
    known
        .iter()
        .map(|(known, _)| (distance(&name.to_lowercase(), &known.to_lowercase()), *known))
        .filter(|(distance, known)| *distance <= 1 + known.len() / 5)
        .min()
        .map(|(_, known)| known)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kubeadm 1.36 writes to /var/lib/kubelet/config.yaml.
    const KUBEADM: &str = r#"
apiVersion: kubelet.config.k8s.io/v1beta1
authentication:
  anonymous: {enabled: false}
  webhook: {cacheTTL: 0s, enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}
cgroupDriver: systemd
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: ""
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
fileCheckFrequency: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
httpCheckFrequency: 0s
imageMaximumGCAge: 0s
imageMinimumGCAge: 0s
kind: KubeletConfiguration
logging:
  flushFrequency: 0
  options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}
  verbosity: 0
memorySwap: {}
nodeStatusReportFrequency: 0s
nodeStatusUpdateFrequency: 0s
rotateCertificates: true
runtimeRequestTimeout: 0s
shutdownGracePeriod: 0s
shutdownGracePeriodCriticalPods: 0s
staticPodPath: /etc/kubernetes/manifests
streamingConnectionIdleTimeout: 0s
syncFrequency: 0s
volumeStatsAggPeriod: 0s
"#;

    #[test]
    fn kubeadms_kubelet_configuration_is_taken_as_it_is() {
        let documents = parse(KUBEADM.as_bytes()).unwrap();
        assert_eq!(documents.kubelet.cluster_domain.as_deref(), Some("cluster.local"));
        assert_eq!(documents.kubelet.static_pod_path.as_deref(), Some("/etc/kubernetes/manifests"));
        let alarming: Vec<_> =
            documents.notes.iter().filter(|note| matches!(note, Note::NotBuilt { .. })).collect();
        assert!(alarming.is_empty(), "{alarming:?}");
    }

    #[test]
    fn kubeadms_kube_proxy_configuration_is_taken_as_it_is() {
        let text = r#"
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
kind: KubeProxyConfiguration
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
metricsBindAddress: ""
mode: nftables
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
"#;
        let documents = parse(format!("{KUBEADM}---\n{text}").as_bytes()).unwrap();
        assert_eq!(documents.kube_proxy.mode.as_deref(), Some("nftables"));
        let alarming: Vec<_> =
            documents.notes.iter().filter(|note| matches!(note, Note::NotBuilt { .. })).collect();
        assert!(alarming.is_empty(), "{alarming:?}");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let kubelet = "kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\n";
        for (text, expected) in [
            ("maxPod: 5", "unknown field \"maxPod\"; did you mean \"maxPods\"?"),
            ("maxPods: many", "KubeletConfiguration.maxPods: "),
            (
                "authentication: {anonymus: {}}",
                "KubeletConfiguration.authentication: unknown field `anonymus`",
            ),
            ("syncFrequency: soon", "KubeletConfiguration.syncFrequency: "),
            ("a: [", "configuration document 1: line "),
            ("---\nkind: Pod\napiVersion: v1", "configuration document 2: kind \"Pod\""),
            (&format!("---\n{kubelet}"), "a second KubeletConfiguration"),
        ] {
            let error = parse(format!("{kubelet}{text}\n").as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn what_is_not_built_is_noted_unless_it_asks_for_nothing() {
        let noted = |text: &str| {
            let kubelet = "kind: KubeletConfiguration\napiVersion: kubelet.config.k8s.io/v1beta1\n";
            let documents = parse(format!("{kubelet}{text}\n").as_bytes()).unwrap();
            documents.notes.iter().any(|note| matches!(note, Note::NotBuilt { .. }))
        };
        assert!(noted("enableControllerAttachDetach: false"));
        assert!(!noted("enableControllerAttachDetach: true"));
    }
}
