//! What the API server adds to and refuses of an object before it is stored: defaults, Service
//! addresses, the ServiceAccount's token volume, what a node may touch (NodeRestriction).

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::auth::User;
use super::error::ApiError;
use super::resources::{Resource, known};
use super::store::Store;

/// Range of `spec.clusterIP`.
pub const SERVICE_NETWORK: ([u8; 4], u8) = ([10, 96, 0, 0], 16);
/// Range of `spec.ports[].nodePort`.
pub const NODE_PORTS: std::ops::RangeInclusive<u64> = 30000..=32767;

/// A value of a Secret, from `data` or `stringData`.
pub fn secret_text(secret: &Value, key: &str) -> Option<String> {
    if let Some(text) = secret["stringData"][key].as_str() {
        return Some(text.into());
    }
    let bytes = STANDARD.decode(secret["data"][key].as_str()?).ok()?;
    String::from_utf8(bytes).ok()
}

fn default(object: &mut Value, key: &str, value: impl Into<Value>) {
    if object[key].is_null() {
        object[key] = value.into();
    }
}

fn each(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_array_mut().into_iter().flatten()
}

/// Fills in what a created or updated object leaves out, and refuses what is invalid.
///
/// # Errors
/// 422, 403 as the API server answers.
pub fn admit(
    store: &Store,
    resource: &'static Resource,
    object: &mut Value,
    old: Option<&Value>,
) -> Result<(), ApiError> {
    match resource.plural {
        "pods" => admit_pod(store, object, old),
        "services" => admit_service(store, object, old),
        "nodes" => {
            admit_node(store, object, old);
            Ok(())
        }
        "secrets" => {
            if let Value::Object(text) = object["stringData"].take() {
                for (key, value) in text {
                    let encoded = STANDARD.encode(value.as_str().unwrap_or_default());
                    object["data"][key] = encoded.into();
                }
            }
            if let Some(map) = object.as_object_mut() {
                map.remove("stringData");
            }
            default(object, "type", "Opaque");
            Ok(())
        }
        "namespaces" => {
            default(object, "spec", json!({"finalizers": ["kubernetes"]}));
            default(object, "status", json!({"phase": "Active"}));
            let name = object["metadata"]["name"].clone();
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
            Ok(())
        }
        _ => Ok(()),
    }
}

fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

fn admit_node(store: &Store, node: &mut Value, old: Option<&Value>) {
    default(node, "spec", json!({}));
    if old.is_some() || !node["spec"]["podCIDR"].is_null() {
        return;
    }
    let taken: BTreeSet<String> = store
        .all(known("nodes"), "")
        .iter()
        .filter_map(|n| n["spec"]["podCIDR"].as_str().map(str::to_owned))
        .collect();
    if let Some(free) = (0..=255).map(|i| format!("10.244.{i}.0/24")).find(|c| !taken.contains(c)) {
        node["spec"]["podCIDRs"] = json!([free]);
        node["spec"]["podCIDR"] = free.into();
    }
}

fn admit_service(store: &Store, service: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
    let resource = known("services");
    let name = name_of(service);
    let invalid = |field: &str, why: String| ApiError::invalid(resource, &name, field, why);
    default(service, "spec", json!({}));
    default(service, "status", json!({"loadBalancer": {}}));
    let spec = &mut service["spec"];
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    default(spec, "internalTrafficPolicy", "Cluster");
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    if spec["sessionAffinity"] == "ClientIP" && spec["sessionAffinityConfig"].is_null() {
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10800}});
    }
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    if external {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
    }
    if let Some(old) = old {
        for field in ["clusterIP", "clusterIPs"] {
            default(spec, field, old["spec"][field].clone());
        }
    }
    let mut names = BTreeSet::new();
    let several = spec["ports"].as_array().is_some_and(|p| p.len() > 1);
    if kind != "ExternalName"
        && spec["clusterIP"] != "None"
        && spec["ports"].as_array().is_none_or(Vec::is_empty)
    {
        return Err(invalid("spec.ports", "Required value".into()));
    }
    for (i, port) in each(&mut spec["ports"]).enumerate() {
        default(port, "protocol", "TCP");
        let number = port["port"].as_u64().unwrap_or(0);
        if !(1..=65535).contains(&number) {
            return Err(invalid(
                &format!("spec.ports[{i}].port"),
                format!("Invalid value: {}: must be between 1 and 65535, inclusive", port["port"]),
            ));
        }
        default(port, "targetPort", number);
        let port_name = port["name"].as_str().unwrap_or_default().to_owned();
        if several && port_name.is_empty() {
            return Err(invalid(&format!("spec.ports[{i}].name"), "Required value".into()));
        }
        if !names.insert(port_name.clone()) {
            return Err(invalid(
                &format!("spec.ports[{i}].name"),
                format!("Duplicate value: \"{port_name}\""),
            ));
        }
    }
    let key = super::store::key_of(service);
    let others: Vec<_> = store
        .all(resource, "")
        .into_iter()
        .filter(|other| super::store::key_of(other) != key)
        .collect();
    let spec = &mut service["spec"];
    if kind != "ExternalName" {
        allocate_ip(spec, &others).map_err(|why| invalid("spec.clusterIPs[0]", why))?;
    }
    if external {
        allocate_node_ports(spec, &others, old).map_err(|(field, why)| invalid(&field, why))?;
    }
    prune_null(spec);
    Ok(())
}

fn allocate_ip(spec: &mut Value, others: &[std::sync::Arc<Value>]) -> Result<(), String> {
    let asked = spec["clusterIP"].as_str().unwrap_or_default().to_owned();
    if asked != "None" {
        let taken: BTreeSet<String> = others
            .iter()
            .filter_map(|o| o["spec"]["clusterIP"].as_str().map(str::to_owned))
            .collect();
        let (base, prefix) = SERVICE_NETWORK;
        let first = u32::from(Ipv4Addr::from(base));
        let size = 1u32 << (32 - prefix);
        if asked.is_empty() {
            // .1 is default/kubernetes and the first 256 are left to explicit requests, as upstream does.
            let free = (256..size - 1)
                .map(|i| Ipv4Addr::from(first + i).to_string())
                .find(|ip| !taken.contains(ip))
                .ok_or("range is full")?;
            spec["clusterIP"] = free.into();
        } else {
            if taken.contains(&asked) {
                return Err(format!(
                    "Invalid value: [\"{asked}\"]: failed to allocate IP {asked}: provided IP is already allocated"
                ));
            }
            let inside = asked
                .parse::<Ipv4Addr>()
                .map(|ip| u32::from(ip).wrapping_sub(first) < size)
                .unwrap_or(asked.contains(':'));
            if !inside {
                return Err(format!(
                    "Invalid value: [\"{asked}\"]: failed to allocate IP {asked}: the provided IP is not in the valid range"
                ));
            }
        }
    }
    let ip = spec["clusterIP"].clone();
    default(spec, "clusterIPs", json!([ip]));
    default(spec, "ipFamilyPolicy", "SingleStack");
    let family = if ip.as_str().is_some_and(|ip| ip.contains(':')) { "IPv6" } else { "IPv4" };
    default(spec, "ipFamilies", json!([family]));
    Ok(())
}

fn allocate_node_ports(
    spec: &mut Value,
    others: &[std::sync::Arc<Value>],
    old: Option<&Value>,
) -> Result<(), (String, String)> {
    let mut taken: BTreeSet<(String, u64)> = BTreeSet::new();
    for port in others.iter().flat_map(|o| o["spec"]["ports"].as_array().into_iter().flatten()) {
        if let Some(number) = port["nodePort"].as_u64() {
            taken.insert((port["protocol"].as_str().unwrap_or("TCP").into(), number));
        }
    }
    for (i, port) in each(&mut spec["ports"]).enumerate() {
        let protocol = port["protocol"].as_str().unwrap_or("TCP").to_owned();
        let kept = old.and_then(|old| {
            old["spec"]["ports"].as_array()?.iter().find(|p| {
                p["port"] == port["port"] && p["protocol"] == port["protocol"]
            })?["nodePort"]
                .as_u64()
        });
        let number = match port["nodePort"].as_u64().filter(|n| *n != 0).or(kept) {
            Some(asked) if !NODE_PORTS.contains(&asked) => {
                return Err((
                    format!("spec.ports[{i}].nodePort"),
                    format!(
                        "Invalid value: {asked}: provided port is not in the valid range. The range of valid ports is 30000-32767"
                    ),
                ));
            }
            Some(asked) if taken.contains(&(protocol.clone(), asked)) => {
                return Err((
                    format!("spec.ports[{i}].nodePort"),
                    format!("Invalid value: {asked}: provided port is already allocated"),
                ));
            }
            Some(asked) => asked,
            None => NODE_PORTS
                .clone()
                .find(|n| !taken.contains(&(protocol.clone(), *n)))
                .ok_or((format!("spec.ports[{i}].nodePort"), "range is full".to_owned()))?,
        };
        taken.insert((protocol, number));
        port["nodePort"] = number.into();
    }
    Ok(())
}

fn admit_pod(store: &Store, pod: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
    let resource = known("pods");
    let name = name_of(pod);
    if pod["spec"]["containers"].as_array().is_none_or(Vec::is_empty) {
        return Err(ApiError::invalid(resource, &name, "spec.containers", "Required value"));
    }
    let mut names = BTreeSet::new();
    for kind in ["initContainers", "containers"] {
        for (i, container) in pod["spec"][kind].as_array().into_iter().flatten().enumerate() {
            let field = format!("spec.{kind}[{i}]");
            let Some(container_name) = container["name"].as_str().filter(|n| !n.is_empty()) else {
                return Err(ApiError::invalid(
                    resource,
                    &name,
                    &format!("{field}.name"),
                    "Required value",
                ));
            };
            if !names.insert(container_name.to_owned()) {
                let why = format!("Duplicate value: \"{container_name}\"");
                return Err(ApiError::invalid(resource, &name, &format!("{field}.name"), why));
            }
            if container["image"].as_str().is_none_or(str::is_empty) {
                return Err(ApiError::invalid(
                    resource,
                    &name,
                    &format!("{field}.image"),
                    "Required value",
                ));
            }
        }
    }
    if let Some(old) = old {
        return allow_pod_update(pod, old);
    }
    let mirror = !pod["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null();
    if !mirror {
        mount_token(store, pod)?;
    }
    default_pod(pod);
    let class = qos_class(pod);
    pod["status"] = json!({"phase": "Pending", "qosClass": class});
    Ok(())
}

/// Only these fields of a pod's spec may change.
fn allow_pod_update(pod: &Value, old: &Value) -> Result<(), ApiError> {
    let masked = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        for kind in ["initContainers", "containers"] {
            for container in each(&mut spec[kind]) {
                container["image"] = Value::Null;
            }
        }
        for field in
            ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "nodeName"]
        {
            spec[field] = Value::Null;
        }
        spec
    };
    let bound = &old["spec"]["nodeName"];
    if masked(pod) == masked(old) && (bound.is_null() || *bound == pod["spec"]["nodeName"]) {
        return Ok(());
    }
    Err(ApiError::invalid(
        known("pods"),
        &name_of(pod),
        "spec",
        "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
    ))
}

fn mount_token(store: &Store, pod: &mut Value) -> Result<(), ApiError> {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
    let spec = &mut pod["spec"];
    default(spec, "serviceAccountName", "default");
    let account_name = spec["serviceAccountName"].as_str().unwrap_or_default().to_owned();
    spec["serviceAccount"] = account_name.clone().into();
    let Some(account) = store.get(known("serviceaccounts"), &namespace, &account_name) else {
        return Err(ApiError::forbidden(
            known("pods"),
            pod["metadata"]["name"].as_str().unwrap_or_default(),
            format!(
                "error looking up service account {namespace}/{account_name}: serviceaccount \"{account_name}\" not found"
            ),
        ));
    };
    if spec["imagePullSecrets"].is_null() && !account["imagePullSecrets"].is_null() {
        spec["imagePullSecrets"] = account["imagePullSecrets"].clone();
    }
    let wanted = spec["automountServiceAccountToken"]
        .as_bool()
        .or(account["automountServiceAccountToken"].as_bool())
        .unwrap_or(true);
    if !wanted {
        return Ok(());
    }
    const PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    let volume = format!("kube-api-access-{}", random_suffix());
    let mut used = false;
    for kind in ["initContainers", "containers"] {
        for container in each(&mut spec[kind]) {
            let mounts = &mut container["volumeMounts"];
            if mounts.is_null() {
                *mounts = json!([]);
            }
            if let Some(list) = mounts.as_array_mut()
                && !list.iter().any(|m| m["mountPath"] == PATH)
            {
                list.push(json!({"name": volume, "readOnly": true, "mountPath": PATH}));
                used = true;
            }
        }
    }
    if used {
        if spec["volumes"].is_null() {
            spec["volumes"] = json!([]);
        }
        if let Some(volumes) = spec["volumes"].as_array_mut() {
            volumes.push(json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace",
                    "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
            ]}}));
        }
    }
    Ok(())
}

/// Five characters of the alphabet that generated names use.
pub fn random_suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..5).map(|_| char::from(ALPHABET[fastrand::usize(..ALPHABET.len())])).collect()
}

fn default_pod(pod: &mut Value) {
    let spec = &mut pod["spec"];
    for (field, value) in [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("securityContext", json!({})),
        ("schedulerName", json!("default-scheduler")),
        ("enableServiceLinks", json!(true)),
        ("preemptionPolicy", json!("PreemptLowerPriority")),
        ("priority", json!(0)),
    ] {
        default(spec, field, value);
    }
    let host_network = spec["hostNetwork"] == true;
    for kind in ["initContainers", "containers"] {
        for container in each(&mut spec[kind]) {
            default_container(container, host_network);
        }
    }
    for volume in each(&mut spec["volumes"]) {
        let sources = volume.as_object().map_or(0, serde_json::Map::len);
        if sources <= 1 {
            volume["emptyDir"] = json!({});
        }
        for kind in ["configMap", "secret", "downwardAPI", "projected"] {
            if volume[kind].is_object() {
                default(&mut volume[kind], "defaultMode", 420);
            }
        }
        if volume["hostPath"].is_object() {
            default(&mut volume["hostPath"], "type", "");
        }
        if volume["projected"].is_object() {
            for source in each(&mut volume["projected"]["sources"]) {
                if source["serviceAccountToken"].is_object() {
                    default(&mut source["serviceAccountToken"], "expirationSeconds", 3600);
                }
            }
        }
        // Indexing for writing made empty entries of what is not there.
        prune_null(volume);
    }
    prune_null(spec);
}

fn default_container(container: &mut Value, host_network: bool) {
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    default(container, "resources", json!({}));
    let image = container["image"].as_str().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    let latest = !last.contains('@') && (!last.contains(':') || last.ends_with(":latest"));
    default(container, "imagePullPolicy", if latest { "Always" } else { "IfNotPresent" });
    for port in each(&mut container["ports"]) {
        default(port, "protocol", "TCP");
        if host_network {
            default(port, "hostPort", port["containerPort"].clone());
        }
    }
    for env in each(&mut container["env"]) {
        if env["valueFrom"]["fieldRef"].is_object() {
            default(&mut env["valueFrom"]["fieldRef"], "apiVersion", "v1");
        }
        prune_null(env);
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = &mut container[probe];
        if !probe.is_object() {
            continue;
        }
        for (field, value) in [
            ("timeoutSeconds", 1),
            ("periodSeconds", 10),
            ("successThreshold", 1),
            ("failureThreshold", 3),
        ] {
            default(probe, field, value);
        }
        if probe["httpGet"].is_object() {
            default(&mut probe["httpGet"], "path", "/");
            default(&mut probe["httpGet"], "scheme", "HTTP");
        }
        if probe["grpc"].is_object() {
            default(&mut probe["grpc"], "service", "");
        }
        prune_null(probe);
    }
    let resources = &mut container["resources"];
    if let Some(limits) = resources["limits"].as_object().cloned() {
        for (name, limit) in limits {
            default(resources, "requests", json!({}));
            default(&mut resources["requests"], &name, limit);
        }
    }
    prune_null(&mut container["resources"]);
    prune_null(container);
}

/// Removes entries of an object that are null.
fn prune_null(value: &mut Value) {
    if let Some(map) = value.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
}

/// Guaranteed, Burstable or BestEffort.
fn qos_class(pod: &Value) -> &'static str {
    let spec = &pod["spec"];
    // Resources of the pod as a whole, where it has any, decide alone.
    let holders: Vec<&Value> = if spec["resources"].is_object() {
        vec![spec]
    } else {
        let lists = ["initContainers", "containers"];
        lists.iter().filter_map(|kind| spec[kind].as_array()).flatten().collect()
    };
    let (mut any, mut all) = (false, true);
    for holder in holders {
        for resource in ["cpu", "memory"] {
            let limit = &holder["resources"]["limits"][resource];
            let request = &holder["resources"]["requests"][resource];
            any |= !limit.is_null() || !request.is_null();
            all &= !limit.is_null() && limit == request;
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// The NodeRestriction plugin: a node writes its own Node and the pods bound to it.
///
/// # Errors
/// 403.
pub fn restrict_node(
    user: &User,
    resource: &'static Resource,
    verb: &str,
    subresource: &str,
    name: &str,
    object: &Value,
    old: Option<&Value>,
) -> Result<(), ApiError> {
    let Some(node) = user.node() else { return Ok(()) };
    let deny = |why: String| Err(ApiError::forbidden(resource, name, why));
    match resource.plural {
        "nodes" if name != node => {
            deny(format!("node \"{node}\" is not allowed to modify node \"{name}\""))
        }
        "nodes" => {
            let label = object["metadata"]["labels"]
                .as_object()
                .into_iter()
                .flatten()
                .find(|(k, v)| {
                    let restricted = k.contains("node-restriction.kubernetes.io/")
                        || (k.contains("kubernetes.io/") || k.contains("k8s.io/"))
                            && !allowed_label(k);
                    restricted && old.is_none_or(|old| &old["metadata"]["labels"][k.as_str()] != *v)
                })
                .map(|(k, _)| k.clone());
            match label {
                Some(label) => deny(format!("is not allowed to modify labels: {label}")),
                None => Ok(()),
            }
        }
        "pods" if verb == "create" && subresource.is_empty() => {
            if object["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_null() {
                return deny(format!(
                    "pod does not have \"kubernetes.io/config.mirror\" annotation, node \"{node}\" can only create mirror pods"
                ));
            }
            if object["spec"]["nodeName"] != node {
                return deny(format!(
                    "node \"{node}\" can only create pods with spec.nodeName set to itself"
                ));
            }
            let owner = &object["metadata"]["ownerReferences"][0];
            if owner["kind"] != "Node" || owner["name"] != node {
                return deny(format!(
                    "node \"{node}\" can only create pods with an owner reference set to itself"
                ));
            }
            Ok(())
        }
        "pods" => {
            let bound = old.unwrap_or(object);
            if bound["spec"]["nodeName"] == node {
                Ok(())
            } else {
                deny(format!(
                    "node \"{node}\" can only update pod status for pods with spec.nodeName set to itself"
                ))
            }
        }
        _ => Ok(()),
    }
}

fn allowed_label(label: &str) -> bool {
    matches!(
        label,
        "kubernetes.io/hostname"
            | "kubernetes.io/arch"
            | "kubernetes.io/os"
            | "beta.kubernetes.io/arch"
            | "beta.kubernetes.io/os"
            | "beta.kubernetes.io/instance-type"
            | "node.kubernetes.io/instance-type"
            | "topology.kubernetes.io/zone"
            | "topology.kubernetes.io/region"
            | "failure-domain.beta.kubernetes.io/zone"
            | "failure-domain.beta.kubernetes.io/region"
    ) || label.starts_with("kubelet.kubernetes.io/")
        || label.starts_with("node.kubernetes.io/")
}
