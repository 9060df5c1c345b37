//! The defaults that the API server fills in (`pkg/apis/core/v1/defaults.go`), for objects that
//! never pass through one.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, HTTPGetAction, LifecycleHandler, Pod, PodSecurityContext,
    PodSpec, Probe, Service, Toleration, Volume,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Mode of files in configMap, secret, downwardAPI and projected volumes.
const FILE_MODE: i32 = 0o644;

/// Annotation names that kubelet gives static pods.
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
/// Hash of the manifest.
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// When the manifest was first seen.
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

/// Where a static pod came from.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// `file` or `http`.
    pub source: &'a str,
    /// When it was first seen.
    pub seen: &'a str,
}

/// Makes a static pod of what a manifest says: name, namespace, UID, node, annotations, defaults.
pub fn static_pod(mut pod: Pod, node: &str, uid: String, from: Origin<'_>) -> Pod {
    let metadata = &mut pod.metadata;
    if let Some(name) = &mut metadata.name {
        *name = format!("{name}-{node}");
    }
    metadata.namespace.get_or_insert_with(|| "default".into());
    let annotations = metadata.annotations.get_or_insert_default();
    annotations.insert(CONFIG_SOURCE.into(), from.source.into());
    annotations.insert(CONFIG_HASH.into(), uid.clone());
    annotations.insert(CONFIG_SEEN.into(), from.seen.into());
    metadata.uid = Some(uid);
    let spec = pod.spec.get_or_insert_default();
    spec.node_name = Some(node.into());
    let tolerations = spec.tolerations.get_or_insert_default();
    let everything = Toleration {
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        ..Default::default()
    };
    if !tolerations.contains(&everything) {
        tolerations.push(everything);
    }
    pod_spec(spec);
    pod
}

/// Defaults of a pod's spec.
pub fn pod_spec(spec: &mut PodSpec) {
    spec.dns_policy.get_or_insert_with(|| "ClusterFirst".into());
    spec.restart_policy.get_or_insert_with(|| "Always".into());
    spec.security_context.get_or_insert_with(PodSecurityContext::default);
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.scheduler_name.get_or_insert_with(|| "default-scheduler".into());
    spec.enable_service_links.get_or_insert(true);
    let host_network = spec.host_network.unwrap_or(false);
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        self::container(container, host_network);
    }
    spec.volumes.iter_mut().flatten().for_each(volume);
}

fn container(container: &mut Container, host_network: bool) {
    let image = container.image.as_deref().unwrap_or_default();
    let policy = if is_latest(image) { "Always" } else { "IfNotPresent" };
    container.image_pull_policy.get_or_insert_with(|| policy.into());
    container.termination_message_path.get_or_insert_with(|| "/dev/termination-log".into());
    container.termination_message_policy.get_or_insert_with(|| "File".into());
    let resources = container.resources.get_or_insert_default();
    if let Some(limits) = &resources.limits {
        let requests = resources.requests.get_or_insert_with(BTreeMap::new);
        for (resource, limit) in limits {
            requests.entry(resource.clone()).or_insert_with(|| limit.clone());
        }
    }
    for port in container.ports.iter_mut().flatten() {
        port.protocol.get_or_insert_with(|| "TCP".into());
        if host_network && port.host_port.unwrap_or(0) == 0 {
            port.host_port = Some(port.container_port);
        }
    }
    for env in container.env.iter_mut().flatten() {
        if let Some(field) = env.value_from.as_mut().and_then(|from| from.field_ref.as_mut()) {
            field.api_version.get_or_insert_with(|| "v1".into());
        }
    }
    let probes = [
        &mut container.liveness_probe,
        &mut container.readiness_probe,
        &mut container.startup_probe,
    ];
    probes.into_iter().flatten().for_each(probe);
    if let Some(lifecycle) = &mut container.lifecycle {
        let handlers = [&mut lifecycle.post_start, &mut lifecycle.pre_stop];
        handlers.into_iter().flatten().for_each(handler);
    }
}

/// Whether a reference without digest names the tag `latest`, said or unsaid.
fn is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or_default();
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

fn probe(probe: &mut Probe) {
    // The API server takes 0 for "not given".
    let or = |value: &mut Option<i32>, default: i32| {
        if value.unwrap_or(0) == 0 {
            *value = Some(default);
        }
    };
    or(&mut probe.timeout_seconds, 1);
    or(&mut probe.period_seconds, 10);
    or(&mut probe.success_threshold, 1);
    or(&mut probe.failure_threshold, 3);
    if let Some(http) = &mut probe.http_get {
        http_get(http);
    }
    if let Some(grpc) = &mut probe.grpc {
        grpc.service.get_or_insert_with(String::new);
    }
}

fn handler(handler: &mut LifecycleHandler) {
    if let Some(http) = &mut handler.http_get {
        http_get(http);
    }
}

fn http_get(http: &mut HTTPGetAction) {
    if http.path.as_deref().unwrap_or_default().is_empty() {
        http.path = Some("/".into());
    }
    if http.scheme.as_deref().unwrap_or_default().is_empty() {
        http.scheme = Some("HTTP".into());
    }
}

fn volume(volume: &mut Volume) {
    let field_refs =
        |items: &mut Option<Vec<k8s_openapi::api::core::v1::DownwardAPIVolumeFile>>| {
            for item in items.iter_mut().flatten() {
                if let Some(field) = &mut item.field_ref {
                    field.api_version.get_or_insert_with(|| "v1".into());
                }
            }
        };
    if *volume == (Volume { name: volume.name.clone(), ..Default::default() }) {
        volume.empty_dir = Some(EmptyDirVolumeSource::default());
    }
    if let Some(source) = &mut volume.config_map {
        source.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.secret {
        source.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.downward_api {
        source.default_mode.get_or_insert(FILE_MODE);
        field_refs(&mut source.items);
    }
    if let Some(source) = &mut volume.host_path {
        source.type_.get_or_insert_with(String::new);
    }
    if let Some(source) = &mut volume.projected {
        source.default_mode.get_or_insert(FILE_MODE);
        for projection in source.sources.iter_mut().flatten() {
            if let Some(token) = &mut projection.service_account_token {
                token.expiration_seconds.get_or_insert(3600);
            }
            if let Some(downward) = &mut projection.downward_api {
                field_refs(&mut downward.items);
            }
        }
    }
}

/// Defaults of a Service. Addresses and NodePorts are `allocate`'s.
pub fn service(service: &mut Service) {
    service.metadata.namespace.get_or_insert_with(|| "default".into());
    let spec = service.spec.get_or_insert_default();
    let kind = spec.type_.get_or_insert_with(|| "ClusterIP".into()).clone();
    spec.session_affinity.get_or_insert_with(|| "None".into());
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        spec.session_affinity_config
            .get_or_insert_default()
            .client_ip
            .get_or_insert_default()
            .timeout_seconds
            .get_or_insert(10_800);
    }
    if kind != "ExternalName" {
        spec.internal_traffic_policy.get_or_insert_with(|| "Cluster".into());
    }
    if kind == "NodePort" || kind == "LoadBalancer" || spec.external_ips.is_some() {
        spec.external_traffic_policy.get_or_insert_with(|| "Cluster".into());
    }
    for port in spec.ports.iter_mut().flatten() {
        port.protocol.get_or_insert_with(|| "TCP".into());
        let unset = match &port.target_port {
            None => true,
            Some(IntOrString::Int(number)) => *number == 0,
            Some(IntOrString::String(name)) => name.is_empty(),
        };
        if unset {
            port.target_port = Some(IntOrString::Int(port.port));
        }
    }
}
