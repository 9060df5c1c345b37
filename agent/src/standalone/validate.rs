//! What the API server would refuse, for objects that never pass through one. Each failure names
//! its field.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    Container, HTTPGetAction, Pod, PodSpec, Probe, Service, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::config::{is_dns1123_label, is_dns1123_subdomain, parse_bytes};

/// A field that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {cause}")]
pub struct Invalid {
    /// Path of the field.
    pub field: String,
    /// What is wrong, and what is expected.
    pub cause: String,
}

/// Failures found so far, all of an object's at once.
#[derive(Default)]
struct Findings(Vec<Invalid>);

impl Findings {
    fn add(&mut self, field: impl fmt::Display, cause: impl fmt::Display) {
        self.0.push(Invalid { field: field.to_string(), cause: cause.to_string() });
    }

    fn one_of(&mut self, field: impl fmt::Display, value: Option<&str>, allowed: &[&str]) {
        if let Some(value) = value
            && !allowed.contains(&value)
        {
            self.add(field, format!("{value:?} is not one of {}", allowed.join(", ")));
        }
    }

    fn port(&mut self, field: impl fmt::Display, port: i32) {
        if !(1..=65535).contains(&port) {
            self.add(field, format!("{port} is not between 1 and 65535"));
        }
    }
}

/// Name and namespace of any object.
fn metadata(findings: &mut Findings, metadata: &ObjectMeta) {
    match metadata.name.as_deref().unwrap_or_default() {
        "" => findings.add("metadata.name", "required"),
        name if !is_dns1123_subdomain(name) => findings.add(
            "metadata.name",
            format!("{name:?} must be lower case letters, digits, '-' and '.', at most 253"),
        ),
        _ => {}
    }
    if let Some(namespace) = &metadata.namespace
        && !is_dns1123_label(namespace)
    {
        findings.add("metadata.namespace", format!("{namespace:?} is no DNS label"));
    }
}

/// A ConfigMap or Secret: name, namespace, keys.
pub fn keyed<'a>(
    object: &ObjectMeta,
    keys: impl Iterator<Item = &'a String>,
) -> Result<(), Vec<Invalid>> {
    let mut findings = Findings::default();
    metadata(&mut findings, object);
    for key in keys {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if key.is_empty()
            || key.len() > 253
            || !key.bytes().all(legal)
            || key == "."
            || key.starts_with("..")
        {
            findings.add(
                format!("data.{key}"),
                "a key is made of letters, digits, '-', '_' and '.', and does not start with '..'",
            );
        }
    }
    done(findings)
}

/// Any other object.
pub fn named(object: &ObjectMeta) -> Result<(), Vec<Invalid>> {
    let mut findings = Findings::default();
    metadata(&mut findings, object);
    done(findings)
}

fn done(findings: Findings) -> Result<(), Vec<Invalid>> {
    if findings.0.is_empty() { Ok(()) } else { Err(findings.0) }
}

/// A pod with defaults filled in.
pub fn pod(pod: &Pod) -> Result<(), Vec<Invalid>> {
    let mut findings = Findings::default();
    metadata(&mut findings, &pod.metadata);
    if let Some(spec) = &pod.spec {
        pod_spec(&mut findings, spec);
    }
    done(findings)
}

/// Objects of the API that a static pod of a cluster node must not refer to (KEP: a static pod is
/// not known to the API server's authorizer).
pub fn api_reference(spec: &PodSpec) -> Option<Invalid> {
    let refers = |field: String| Invalid {
        field,
        cause: "a static pod of a cluster cannot refer to objects of the API".into(),
    };
    if spec.service_account_name.as_ref().is_some_and(|name| !name.is_empty()) {
        return Some(refers("spec.serviceAccountName".into()));
    }
    for (i, volume) in spec.volumes.iter().flatten().enumerate() {
        let token = volume.projected.iter().flat_map(|p| p.sources.iter().flatten()).any(|s| {
            s.config_map.is_some() || s.secret.is_some() || s.service_account_token.is_some()
        });
        if volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.persistent_volume_claim.is_some()
            || token
        {
            return Some(refers(format!("spec.volumes[{i}]")));
        }
    }
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let from = container.env_from.as_ref().is_some_and(|from| !from.is_empty());
        let value = container.env.iter().flatten().any(|env| {
            env.value_from.as_ref().is_some_and(|from| {
                from.config_map_key_ref.is_some() || from.secret_key_ref.is_some()
            })
        });
        if from || value {
            return Some(refers(format!("env of container {:?}", container.name)));
        }
    }
    None
}

fn pod_spec(findings: &mut Findings, spec: &PodSpec) {
    findings.one_of(
        "spec.restartPolicy",
        spec.restart_policy.as_deref(),
        &["Always", "OnFailure", "Never"],
    );
    findings.one_of(
        "spec.dnsPolicy",
        spec.dns_policy.as_deref(),
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    );
    let servers = spec.dns_config.as_ref().and_then(|dns| dns.nameservers.as_ref());
    if spec.dns_policy.as_deref() == Some("None") && servers.is_none_or(Vec::is_empty) {
        findings.add("spec.dnsConfig.nameservers", "required with dnsPolicy None");
    }
    if spec.termination_grace_period_seconds.is_some_and(|seconds| seconds < 0) {
        findings.add("spec.terminationGracePeriodSeconds", "must not be negative");
    }
    if spec.active_deadline_seconds.is_some_and(|seconds| seconds < 1) {
        findings.add("spec.activeDeadlineSeconds", "must be at least 1");
    }
    if let Some(hostname) = spec.hostname.as_deref().filter(|name| !name.is_empty())
        && !is_dns1123_label(hostname)
    {
        findings.add("spec.hostname", format!("{hostname:?} is no DNS label"));
    }
    let mut volumes = HashSet::new();
    for (i, volume) in spec.volumes.iter().flatten().enumerate() {
        self::volume(findings, &format!("spec.volumes[{i}]"), volume);
        if !volumes.insert(volume.name.as_str()) {
            findings.add(format!("spec.volumes[{i}].name"), format!("{:?} twice", volume.name));
        }
    }
    if spec.containers.is_empty() {
        findings.add("spec.containers", "required");
    }
    let mut names = HashSet::new();
    let mut host_ports = HashSet::new();
    let init = spec.init_containers.iter().flatten().enumerate();
    let init = init.map(|(i, container)| (format!("spec.initContainers[{i}]"), container, true));
    let main = spec.containers.iter().enumerate();
    let main = main.map(|(i, container)| (format!("spec.containers[{i}]"), container, false));
    for (path, container, is_init) in init.chain(main) {
        self::container(findings, &path, container, is_init, &volumes);
        if !names.insert(container.name.as_str()) {
            findings.add(format!("{path}.name"), format!("{:?} twice", container.name));
        }
        for (i, port) in container.ports.iter().flatten().enumerate() {
            let path = format!("{path}.ports[{i}]");
            findings.port(format!("{path}.containerPort"), port.container_port);
            findings.one_of(
                format!("{path}.protocol"),
                port.protocol.as_deref(),
                &["TCP", "UDP", "SCTP"],
            );
            if let Some(host_port) = port.host_port.filter(|port| *port != 0) {
                findings.port(format!("{path}.hostPort"), host_port);
                let key = (host_port, port.protocol.as_deref(), port.host_ip.as_deref());
                if !is_init && !host_ports.insert(key) {
                    findings.add(format!("{path}.hostPort"), format!("{host_port} twice"));
                }
                if spec.host_network == Some(true) && host_port != port.container_port {
                    findings.add(
                        format!("{path}.hostPort"),
                        "must be the containerPort on the host network",
                    );
                }
            }
            if let Some(ip) = port.host_ip.as_deref().filter(|ip| !ip.is_empty())
                && ip.parse::<IpAddr>().is_err()
            {
                findings.add(format!("{path}.hostIP"), format!("{ip:?} is no IP address"));
            }
        }
    }
}

fn container(
    findings: &mut Findings,
    path: &str,
    container: &Container,
    is_init: bool,
    volumes: &HashSet<&str>,
) {
    if !is_dns1123_label(&container.name) {
        findings.add(format!("{path}.name"), format!("{:?} is no DNS label", container.name));
    }
    let image = container.image.as_deref().unwrap_or_default();
    if image.trim().is_empty() {
        findings.add(format!("{path}.image"), "required");
    } else if image != image.trim() {
        findings.add(format!("{path}.image"), "must not begin or end with blanks");
    }
    findings.one_of(
        format!("{path}.imagePullPolicy"),
        container.image_pull_policy.as_deref(),
        &["Always", "IfNotPresent", "Never"],
    );
    findings.one_of(
        format!("{path}.terminationMessagePolicy"),
        container.termination_message_policy.as_deref(),
        &["File", "FallbackToLogsOnError"],
    );
    let sidecar = is_init && container.restart_policy.as_deref() == Some("Always");
    for (name, probe) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        let Some(probe) = probe else { continue };
        let path = format!("{path}.{name}");
        if is_init && !sidecar {
            findings.add(&path, "an init container has no probes");
        }
        self::probe(findings, &path, probe, name != "readinessProbe");
    }
    for (i, env) in container.env.iter().flatten().enumerate() {
        let path = format!("{path}.env[{i}]");
        if env.name.is_empty() || env.name.contains('=') {
            findings.add(format!("{path}.name"), format!("{:?} is no variable name", env.name));
        }
        if let Some(from) = &env.value_from {
            if env.value.as_ref().is_some_and(|value| !value.is_empty()) {
                findings.add(format!("{path}.valueFrom"), "not together with value");
            }
            let sources = [
                from.config_map_key_ref.is_some(),
                from.secret_key_ref.is_some(),
                from.field_ref.is_some(),
                from.resource_field_ref.is_some(),
                from.file_key_ref.is_some(),
            ];
            if sources.iter().filter(|given| **given).count() != 1 {
                findings.add(format!("{path}.valueFrom"), "must name exactly one source");
            }
        }
    }
    if let Some(resources) = &container.resources {
        for (kind, list) in [("limits", &resources.limits), ("requests", &resources.requests)] {
            for (name, quantity) in list.iter().flatten() {
                if parse_bytes(&quantity.0).is_none() {
                    findings.add(
                        format!("{path}.resources.{kind}.{name}"),
                        format!("{:?} is no quantity", quantity.0),
                    );
                }
            }
        }
        for (name, request) in resources.requests.iter().flatten() {
            let limit = resources.limits.as_ref().and_then(|limits| limits.get(name));
            if let Some(limit) = limit
                && milli(&request.0) > milli(&limit.0)
            {
                findings.add(
                    format!("{path}.resources.requests.{name}"),
                    format!("{} is more than the limit of {}", request.0, limit.0),
                );
            }
        }
    }
    let mut mount_paths = HashSet::new();
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let path = format!("{path}.volumeMounts[{i}]");
        volume_mount(findings, &path, mount, volumes);
        if !mount_paths.insert(mount.mount_path.as_str()) {
            findings.add(format!("{path}.mountPath"), format!("{:?} twice", mount.mount_path));
        }
    }
}

/// A quantity in thousandths, for comparison.
fn milli(text: &str) -> Option<u64> {
    match text.strip_suffix('m') {
        Some(milli) => parse_bytes(milli),
        None => parse_bytes(&format!("{text}e3"))
            .or_else(|| parse_bytes(text).and_then(|value| value.checked_mul(1000))),
    }
}

fn volume(findings: &mut Findings, path: &str, volume: &Volume) {
    if !is_dns1123_label(&volume.name) {
        findings.add(format!("{path}.name"), format!("{:?} is no DNS label", volume.name));
    }
    if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(volume) {
        let sources: Vec<&String> = fields.keys().filter(|field| *field != "name").collect();
        if sources.len() > 1 {
            findings.add(path, format!("more than one kind: {sources:?}"));
        }
    }
    if let Some(host_path) = &volume.host_path {
        if !host_path.path.starts_with('/') {
            findings.add(format!("{path}.hostPath.path"), "must be absolute");
        }
        if host_path.path.split('/').any(|part| part == "..") {
            findings.add(format!("{path}.hostPath.path"), "must not contain '..'");
        }
        let types = [
            "",
            "DirectoryOrCreate",
            "Directory",
            "FileOrCreate",
            "File",
            "Socket",
            "CharDevice",
            "BlockDevice",
        ];
        findings.one_of(format!("{path}.hostPath.type"), host_path.type_.as_deref(), &types);
    }
    if let Some(limit) = volume.empty_dir.as_ref().and_then(|source| source.size_limit.as_ref())
        && parse_bytes(&limit.0).is_none()
    {
        findings.add(format!("{path}.emptyDir.sizeLimit"), format!("{:?} is no quantity", limit.0));
    }
    if let Some(source) = &volume.config_map
        && source.name.is_empty()
    {
        findings.add(format!("{path}.configMap.name"), "required");
    }
    if let Some(source) = &volume.secret
        && source.secret_name.as_deref().unwrap_or_default().is_empty()
    {
        findings.add(format!("{path}.secret.secretName"), "required");
    }
}

fn volume_mount(findings: &mut Findings, path: &str, mount: &VolumeMount, volumes: &HashSet<&str>) {
    if !volumes.contains(mount.name.as_str()) {
        findings.add(format!("{path}.name"), format!("the pod has no volume {:?}", mount.name));
    }
    if mount.mount_path.is_empty() {
        findings.add(format!("{path}.mountPath"), "required");
    }
    let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if given(&mount.sub_path) && given(&mount.sub_path_expr) {
        findings.add(format!("{path}.subPathExpr"), "not together with subPath");
    }
    for (name, value) in [("subPath", &mount.sub_path), ("subPathExpr", &mount.sub_path_expr)] {
        let value = value.as_deref().unwrap_or_default();
        if value.starts_with('/') || value.split('/').any(|part| part == "..") {
            findings.add(format!("{path}.{name}"), "must be relative, without '..'");
        }
    }
    findings.one_of(
        format!("{path}.mountPropagation"),
        mount.mount_propagation.as_deref(),
        &["None", "HostToContainer", "Bidirectional"],
    );
}

fn probe(findings: &mut Findings, path: &str, probe: &Probe, success_is_one: bool) {
    let handlers = [
        probe.exec.is_some(),
        probe.http_get.is_some(),
        probe.tcp_socket.is_some(),
        probe.grpc.is_some(),
    ];
    if handlers.iter().filter(|given| **given).count() != 1 {
        findings.add(path, "must name exactly one of exec, httpGet, tcpSocket, grpc");
    }
    if let Some(HTTPGetAction { port, scheme, .. }) = &probe.http_get {
        port_of(findings, &format!("{path}.httpGet.port"), port);
        findings.one_of(format!("{path}.httpGet.scheme"), scheme.as_deref(), &["HTTP", "HTTPS"]);
    }
    if let Some(tcp) = &probe.tcp_socket {
        port_of(findings, &format!("{path}.tcpSocket.port"), &tcp.port);
    }
    if let Some(grpc) = &probe.grpc {
        findings.port(format!("{path}.grpc.port"), grpc.port);
    }
    for (name, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        if value.is_some_and(|value| value < 0) {
            findings.add(format!("{path}.{name}"), "must not be negative");
        }
    }
    if success_is_one && probe.success_threshold.is_some_and(|threshold| threshold > 1) {
        findings.add(format!("{path}.successThreshold"), "must be 1");
    }
}

fn port_of(findings: &mut Findings, path: &str, port: &IntOrString) {
    match port {
        IntOrString::Int(number) => findings.port(path, *number),
        IntOrString::String(name) if name.is_empty() => findings.add(path, "required"),
        IntOrString::String(_) => {}
    }
}

/// A Service with defaults filled in.
pub fn service(service: &Service) -> Result<(), Vec<Invalid>> {
    let mut findings = Findings::default();
    metadata(&mut findings, &service.metadata);
    let Some(spec) = &service.spec else { return done(findings) };
    findings.one_of(
        "spec.type",
        spec.type_.as_deref(),
        &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"],
    );
    findings.one_of(
        "spec.sessionAffinity",
        spec.session_affinity.as_deref(),
        &["None", "ClientIP"],
    );
    findings.one_of(
        "spec.externalTrafficPolicy",
        spec.external_traffic_policy.as_deref(),
        &["Cluster", "Local"],
    );
    findings.one_of(
        "spec.internalTrafficPolicy",
        spec.internal_traffic_policy.as_deref(),
        &["Cluster", "Local"],
    );
    let external_name = spec.type_.as_deref() == Some("ExternalName");
    let ports = spec.ports.as_deref().unwrap_or_default();
    let headless = spec.cluster_ip.as_deref() == Some("None");
    if ports.is_empty() && !external_name && !headless {
        findings.add("spec.ports", "required");
    }
    let mut seen = HashSet::new();
    for (i, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        findings.port(format!("{path}.port"), port.port);
        findings.one_of(
            format!("{path}.protocol"),
            port.protocol.as_deref(),
            &["TCP", "UDP", "SCTP"],
        );
        match port.name.as_deref().unwrap_or_default() {
            "" if ports.len() > 1 => {
                findings.add(format!("{path}.name"), "required where there are several ports");
            }
            "" => {}
            name if !is_dns1123_label(name) => {
                findings.add(format!("{path}.name"), format!("{name:?} is no DNS label"));
            }
            name if !seen.insert(name) => {
                findings.add(format!("{path}.name"), format!("{name:?} twice"));
            }
            _ => {}
        }
        if let Some(node_port) = port.node_port.filter(|port| *port != 0) {
            findings.port(format!("{path}.nodePort"), node_port);
            if spec.type_.as_deref() == Some("ClusterIP") {
                findings.add(format!("{path}.nodePort"), "not with type ClusterIP");
            }
        }
        if let Some(target) = &port.target_port {
            port_of(&mut findings, &format!("{path}.targetPort"), target);
        }
    }
    let ips = spec.cluster_ip.iter().chain(spec.cluster_ips.iter().flatten());
    for ip in ips.filter(|ip| !ip.is_empty() && *ip != "None") {
        if ip.parse::<IpAddr>().is_err() {
            findings.add("spec.clusterIP", format!("{ip:?} is no IP address"));
        }
    }
    for (i, ip) in spec.external_ips.iter().flatten().enumerate() {
        if ip.parse::<IpAddr>().is_err() {
            findings.add(format!("spec.externalIPs[{i}]"), format!("{ip:?} is no IP address"));
        }
    }
    done(findings)
}
