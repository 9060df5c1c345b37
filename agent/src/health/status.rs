//! What `longshore status` shows: plain data, gathered on demand, and its table.

use std::fmt::Write as _;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use serde::{Deserialize, Serialize};

use super::check::Watched;
use crate::config::Note;
use crate::ids::{NamespacedName, PodUid};
use crate::pod::spec::spec_of;

/// Everything, as told over the socket.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The node.
    pub node: NodeLine,
    /// The proxy, where it runs here.
    pub proxy: Option<ProxyLine>,
    /// Pods by namespace and name.
    pub pods: Vec<PodLine>,
    /// Services: all of a standalone node; of a cluster for `longshore top` only.
    pub services: Vec<ServiceLine>,
    /// What is wrong now.
    pub errors: Vec<String>,
    /// Recent Events; the newest last.
    pub events: Vec<EventLine>,
}

/// The node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names say it")]
pub struct NodeLine {
    pub name: String,
    pub addresses: Vec<String>,
    /// `standalone` or `cluster`.
    pub mode: String,
    pub version: String,
    pub healthy: bool,
    /// Condition Ready of the node's object, in a cluster.
    pub ready: Option<String>,
    pub runtime: String,
    pub manifests: Option<String>,
    pub uptime_seconds: i64,
    /// For `longshore top` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageLine>,
}

/// What is used now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageLine {
    /// Nanoseconds of CPU a second since the last look; `None` in the first one.
    pub cpu_nano_cores: Option<u64>,
    /// Working set.
    pub memory_bytes: u64,
}

/// The proxy.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names say it")]
pub struct ProxyLine {
    pub mode: String,
    pub synced: bool,
    pub services: usize,
    pub endpoints: usize,
    pub pending: usize,
    pub last_sync: Option<String>,
}

/// A pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names say it")]
pub struct PodLine {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// As `kubectl get pods` words it.
    pub status: String,
    pub phase: String,
    pub ready: usize,
    pub containers: usize,
    pub restarts: i32,
    pub ips: Vec<String>,
    /// Why a container waits or ended, with the message.
    pub message: Option<String>,
    pub started: Option<String>,
    /// Running containers with a startup or readiness probe.
    #[serde(default)]
    pub probed: usize,
    /// Those of them whose probe does not succeed now, as `container/readiness`.
    #[serde(default)]
    pub failing_probes: Vec<String>,
    /// For `longshore top` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<UsageLine>,
}

/// A Service.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names say it")]
pub struct ServiceLine {
    pub namespace: String,
    pub name: String,
    /// Empty where only the proxy knows the Service, which does not need it.
    #[serde(rename = "type", default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// The first of them.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// The NodePort of the first port, where there is one.
    pub node_port: Option<i32>,
    /// `80/TCP` or `80:30080/TCP`.
    pub ports: Vec<String>,
    pub ready_endpoints: usize,
    pub endpoints: usize,
}

/// An Event.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names say it")]
pub struct EventLine {
    pub last: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub object: String,
    pub reason: String,
    pub message: String,
    pub count: u64,
}

/// Gathers all of it.
pub(super) async fn of(watched: &Watched) -> Status {
    let mut errors = Vec::new();
    let healthy = match watched.check().await {
        Ok(()) => true,
        Err(failures) => {
            errors.extend(failures);
            false
        }
    };
    if let Some(manifests) = &watched.manifests {
        errors.extend(manifests.borrow().iter().map(|problem| format!("manifest {problem}")));
    }
    if let Some(cluster) = &watched.errors {
        errors.extend(cluster.borrow().iter().map(|(what, error)| format!("{what}: {error}")));
    }
    let mut services = Vec::new();
    let mut events = Vec::new();
    if let Some(store) = &watched.store {
        let served = store.served();
        let problems = served.problems.iter();
        errors.extend(problems.map(|(key, problem)| format!("Service {key}: {problem}")));
        services.extend(served.services.iter().map(|(key, service)| {
            let counts = served.endpoints.get(key).copied().unwrap_or_default();
            service_line(key, service, counts)
        }));
        events.extend(store.events().into_iter().map(|event| EventLine {
            last: event.last.to_string(),
            kind: event.kind.into(),
            object: event.object,
            reason: event.reason,
            message: event.message,
            count: event.count,
        }));
    }
    if let Some(recent) = &watched.recent {
        events.extend(recent.lines());
    }
    let proxy = watched.proxy.as_ref().map(|proxy| {
        let status = proxy.borrow();
        errors.extend(status.source_error.clone());
        errors.extend(status.errors.iter().map(|e| format!("proxy: {}: {}", e.object, e.message)));
        ProxyLine {
            mode: status.mode.to_string(),
            synced: status.synced,
            services: status.services,
            endpoints: status.endpoints,
            pending: status.pending,
            last_sync: status.last_sync.map(|at| at.to_string()),
        }
    });
    errors.extend(watched.notes.iter().filter_map(|note| match note {
        Note::NotBuilt { field, value } => {
            Some(format!("configuration: {field}: {value} is not implemented and has no effect"))
        }
        Note::Inert { .. } | Note::NoEffect { .. } => None,
    }));
    let mut pods: Vec<PodLine> = Vec::new();
    if let Some(sync) = &watched.sync {
        for view in sync.table().pods() {
            pods.push(pod_line(&NamespacedName::of_pod(&view.pod), &view.pod, &view.status));
        }
    }
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    let ready = watched.node.as_ref().and_then(|node| {
        let node = node.borrow();
        let conditions = node.as_ref()?.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().find(|c| c.type_ == "Ready").map(|c| c.status.clone())
    });
    Status {
        node: NodeLine {
            name: watched.node_name.clone(),
            addresses: watched.node_ips.iter().map(ToString::to_string).collect(),
            mode: if watched.standalone { "standalone" } else { "cluster" }.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            healthy,
            ready,
            runtime: watched.runtime_endpoint.clone(),
            manifests: watched.manifest_path.as_ref().map(|path| path.display().to_string()),
            uptime_seconds: Timestamp::now().as_second() - watched.started.as_second(),
            usage: None,
        },
        proxy,
        pods,
        services,
        errors,
        events,
    }
}

/// All of it, with CPU and memory and at most `services` Services of a cluster, the worst first.
pub(super) async fn with_usage(watched: &Watched, services: usize) -> Status {
    let mut status = of(watched).await;
    if let Some(usage) = &watched.usage {
        let (node, pods) = usage.now().await;
        status.node.usage = Some(node);
        for pod in &mut status.pods {
            pod.usage = pods.get(&PodUid::from(pod.uid.as_str())).copied();
        }
    }
    if watched.store.is_none()
        && let Some(asker) = &watched.asker
    {
        match asker.services(services).await {
            Ok(told) => status.services = told.iter().map(proxied_line).collect(),
            Err(error) => status.errors.push(error),
        }
    }
    status
}

/// A Service as the proxy knows it.
fn proxied_line(health: &proxy::question::ServiceHealth) -> ServiceLine {
    let service = &health.service;
    let port = |port: &proxy::object::ServicePort| {
        let protocol = port.protocol.to_string().to_uppercase();
        match port.node_port {
            0 => format!("{}/{protocol}", port.port),
            node_port => format!("{}:{node_port}/{protocol}", port.port),
        }
    };
    let node_port = service.ports.iter().map(|port| port.node_port).find(|port| *port != 0);
    ServiceLine {
        namespace: service.key.namespace.to_string(),
        name: service.key.name.to_string(),
        kind: String::new(),
        cluster_ips: service.cluster_ips.iter().map(ToString::to_string).collect(),
        cluster_ip: service.cluster_ips.first().map(ToString::to_string),
        node_port: node_port.map(i32::from),
        ports: service.ports.iter().map(port).collect(),
        ready_endpoints: health.ready,
        endpoints: health.endpoints,
    }
}

fn service_line(
    key: &NamespacedName,
    service: &k8s_openapi::api::core::v1::Service,
    (ready, all): (usize, usize),
) -> ServiceLine {
    let spec = service.spec.clone().unwrap_or_default();
    let port = |port: &k8s_openapi::api::core::v1::ServicePort| {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        match port.node_port.filter(|port| *port != 0) {
            Some(node_port) => format!("{}:{node_port}/{protocol}", port.port),
            None => format!("{}/{protocol}", port.port),
        }
    };
    let cluster_ips = spec.cluster_ips.or(spec.cluster_ip.map(|ip| vec![ip])).unwrap_or_default();
    ServiceLine {
        cluster_ip: cluster_ips.first().cloned(),
        node_port: spec.ports.iter().flatten().find_map(|port| port.node_port),
        cluster_ips,
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
        kind: spec.type_.unwrap_or_else(|| "ClusterIP".into()),
        ports: spec.ports.iter().flatten().map(port).collect(),
        ready_endpoints: ready,
        endpoints: all,
    }
}

fn pod_line(
    key: &NamespacedName,
    pod: &k8s_openapi::api::core::v1::Pod,
    status: &PodStatus,
) -> PodLine {
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let all: Vec<&ContainerStatus> = all.collect();
    let main = status.container_statuses.as_deref().unwrap_or_default();
    let phase = status.phase.clone().unwrap_or_else(|| "Pending".into());
    // A container that waits or has failed says more than the phase.
    let told = all.iter().find_map(|container| {
        let state = container.state.as_ref()?;
        if let Some(waiting) = &state.waiting {
            let reason = waiting.reason.clone()?;
            return (reason != "PodInitializing" && reason != "ContainerCreating")
                .then(|| (reason, waiting.message.clone()));
        }
        let terminated = state.terminated.as_ref().filter(|ended| ended.exit_code != 0)?;
        Some((terminated.reason.clone()?, terminated.message.clone()))
    });
    let (probed, failing_probes) = probes(pod, &all);
    let own = status.reason.clone().map(|reason| (reason, status.message.clone()));
    let (reason, message) = own.or(told).unzip();
    PodLine {
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
        uid: PodUid::of(pod).to_string(),
        status: reason.unwrap_or_else(|| phase.clone()),
        phase,
        ready: main.iter().filter(|container| container.ready).count(),
        containers: pod.spec.as_ref().map_or(main.len(), |spec| spec.containers.len()),
        restarts: all.iter().map(|container| container.restart_count).sum(),
        ips: status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect(),
        message: message.flatten(),
        started: status.start_time.as_ref().map(|time| time.0.to_string()),
        probed,
        failing_probes,
        usage: None,
    }
}

/// How many running containers have a startup or readiness probe, and which of these probes do not
/// succeed. A liveness probe shows in restarts: until it restarts its container it says nothing.
fn probes(
    pod: &k8s_openapi::api::core::v1::Pod,
    statuses: &[&ContainerStatus],
) -> (usize, Vec<String>) {
    let spec = spec_of(pod);
    let mut probed = 0;
    let mut failing = Vec::new();
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        let runs = |s: &&&ContainerStatus| {
            s.name == container.name
                && s.state.as_ref().is_some_and(|state| state.running.is_some())
        };
        let Some(status) = statuses.iter().find(runs) else { continue };
        if container.startup_probe.is_none() && container.readiness_probe.is_none() {
            continue;
        }
        probed += 1;
        if container.startup_probe.is_some() && status.started != Some(true) {
            failing.push(format!("{}/startup", container.name));
        } else if container.readiness_probe.is_some() && !status.ready {
            failing.push(format!("{}/readiness", container.name));
        }
    }
    (probed, failing)
}

/// The table for people.
pub fn render(status: &Status) -> String {
    let mut out = String::new();
    let node = &status.node;
    let health = if node.healthy { "healthy" } else { "NOT HEALTHY" };
    let ready = node.ready.as_ref().map(|ready| format!(", Ready={ready}")).unwrap_or_default();
    let _ = writeln!(
        out,
        "NODE  {} ({}), {health}{ready}, {}, longshore {}, up {}",
        node.name,
        node.mode,
        node.addresses.join(" "),
        node.version,
        age(node.uptime_seconds)
    );
    if !node.runtime.is_empty() {
        let _ = writeln!(out, "      runtime {}", node.runtime);
    }
    if let Some(manifests) = &node.manifests {
        let _ = writeln!(out, "      manifests {manifests}");
    }
    if let Some(proxy) = &status.proxy {
        let synced = if proxy.synced { "in sync" } else { "not in sync yet" };
        let _ = writeln!(
            out,
            "PROXY {}, {synced}, {} services, {} endpoints",
            proxy.mode, proxy.services, proxy.endpoints
        );
    }
    let mut rows =
        vec![["NAMESPACE", "POD", "READY", "STATUS", "RESTARTS", "IP"].map(String::from)];
    rows.extend(status.pods.iter().map(|pod| {
        [
            pod.namespace.clone(),
            pod.name.clone(),
            format!("{}/{}", pod.ready, pod.containers),
            pod.status.clone(),
            pod.restarts.to_string(),
            dash(pod.ips.join(",")),
        ]
    }));
    let _ = write!(out, "\n{}", table(&rows));
    if !status.services.is_empty() {
        let head = ["NAMESPACE", "SERVICE", "TYPE", "CLUSTER-IP", "PORTS", "ENDPOINTS"];
        let mut rows = vec![head.map(String::from)];
        rows.extend(status.services.iter().map(|service| {
            [
                service.namespace.clone(),
                service.name.clone(),
                service.kind.clone(),
                dash(service.cluster_ips.join(",")),
                service.ports.join(","),
                format!("{}/{}", service.ready_endpoints, service.endpoints),
            ]
        }));
        let _ = write!(out, "\n{}", table(&rows));
    }
    let mut errors = status.errors.clone();
    for pod in &status.pods {
        if let Some(message) = &pod.message {
            errors.push(format!("pod {}/{}: {}: {message}", pod.namespace, pod.name, pod.status));
        }
    }
    if !errors.is_empty() {
        let _ = writeln!(out, "\nERRORS");
        for error in errors {
            let _ = writeln!(out, "  {error}");
        }
    }
    let warnings: Vec<_> = status.events.iter().filter(|event| event.kind == "Warning").collect();
    if !warnings.is_empty() {
        let _ = writeln!(out, "\nLAST WARNINGS");
        for event in warnings.iter().rev().take(10).rev() {
            let _ = writeln!(
                out,
                "  {} {} {} (x{}): {}",
                event.last, event.object, event.reason, event.count, event.message
            );
        }
    }
    out
}

/// `-` for nothing.
pub fn dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// A time span in its largest fitting unit.
pub fn age(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Columns as wide as their widest cell.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}   ");
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}
