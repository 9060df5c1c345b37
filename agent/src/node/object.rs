//! The Node object as this node wants it, and the patches that bring it about. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cri_shim::api as cri;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, NodeSwapStatus,
    NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use super::machine::{FileSystem, Machine};
use crate::cluster::ClusterConfig;
use crate::device::{Capacities, is_extended};
use crate::eviction::Signal;
use crate::pod::quantity;

/// API level that this node keeps to, in the form that other components parse.
pub const KUBELET_VERSION: &str = "v1.36.0";
/// Names told of one image at most.
const MAX_IMAGE_NAMES: usize = 5;
/// Tells an external cloud provider which addresses the operator gave.
const PROVIDED_IPS: &str = "alpha.kubernetes.io/provided-node-ip";
/// Keeps pods away until an external cloud provider has looked at the node.
const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
/// Tells the attach-detach controller that it does the attaching.
const CONTROLLED_ATTACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

/// What the node knows of its runtime.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuntimeFacts {
    /// `name://version`.
    pub version: String,
    /// RuntimeClass handlers.
    pub handlers: Vec<NodeRuntimeHandler>,
    /// Images, largest first.
    pub images: Vec<ContainerImage>,
    /// What it can do whatever the handler.
    pub features: Option<NodeFeatures>,
}

/// `name://version` of a CRI runtime.
pub fn runtime_version(version: &cri::VersionResponse) -> String {
    // containerd writes `v2.1.9`, kubelet tells `2.1.9`.
    let number = version.runtime_version.strip_prefix('v').unwrap_or(&version.runtime_version);
    format!("{}://{number}", version.runtime_name)
}

/// RuntimeClass handlers as the node tells them.
pub fn handlers(status: &cri::StatusResponse) -> Vec<NodeRuntimeHandler> {
    status
        .runtime_handlers
        .iter()
        .map(|handler| NodeRuntimeHandler {
            name: Some(handler.name.clone()),
            features: handler.features.as_ref().map(|f| NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(f.recursive_read_only_mounts),
                user_namespaces: Some(f.user_namespaces),
            }),
        })
        .collect()
}

/// What the runtime can do for every pod. A runtime that says nothing of it is older than all that
/// there is to say, which pods that ask for it must be told.
pub fn features(status: &cri::StatusResponse) -> Option<NodeFeatures> {
    let policy = status.features.as_ref().is_some_and(|f| f.supplemental_groups_policy);
    Some(NodeFeatures { supplemental_groups_policy: Some(policy) })
}

/// The `max` largest images, with a few of their names each.
pub fn images(images: &[cri::Image], max: usize) -> Vec<ContainerImage> {
    let mut images: Vec<&cri::Image> = images.iter().collect();
    images.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    images
        .into_iter()
        .take(max)
        .map(|image| ContainerImage {
            names: Some(
                image
                    .repo_digests
                    .iter()
                    .chain(&image.repo_tags)
                    .take(MAX_IMAGE_NAMES)
                    .cloned()
                    .collect(),
            ),
            size_bytes: i64::try_from(image.size).ok(),
        })
        .collect()
}

/// Why pods cannot run, from the runtime's conditions; empty if they can.
pub fn not_ready(status: &cri::StatusResponse) -> Vec<String> {
    let conditions = status.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
    let told = |kind: &str, words: &str| match conditions.iter().find(|c| c.r#type == kind) {
        Some(c) if c.status => None,
        Some(c) => Some(format!("{words}: {kind}=false reason:{} message:{}", c.reason, c.message)),
        None => Some(format!("{words}: {kind} condition not set")),
    };
    [
        told("RuntimeReady", "container runtime is not ready"),
        told("NetworkReady", "container runtime network not ready"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Labels that every node has.
pub fn labels(config: &ClusterConfig, machine: &Machine) -> BTreeMap<String, String> {
    let fixed = [
        ("kubernetes.io/hostname", config.hostname.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", machine.architecture),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", machine.architecture),
    ];
    let fixed = fixed.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned()));
    let configured = config.node_labels.iter().map(|(k, v)| (k.clone(), v.clone()));
    configured.chain(fixed).collect()
}

/// The object to create.
pub fn new_node(config: &ClusterConfig, machine: &Machine, status: NodeStatus) -> Node {
    let provided = provided_ips(config).map(|ips| (PROVIDED_IPS.to_owned(), ips));
    let annotations = [(CONTROLLED_ATTACH.to_owned(), "true".to_owned())].into_iter();
    let mut taints = config.register_with_taints.clone();
    if config.external_cloud_provider {
        taints.push(Taint {
            key: UNINITIALIZED.to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        });
    }
    let taints = (!taints.is_empty()).then_some(taints);
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config, machine)),
            annotations: Some(annotations.chain(provided).collect()),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            provider_id: config.provider_id.clone(),
            taints,
            ..NodeSpec::default()
        }),
        status: Some(status),
    }
}

/// A number of bytes with the largest binary suffix that keeps it whole, as Kubernetes writes it.
fn bytes(mut number: u64) -> Quantity {
    let mut suffix = "";
    for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
        if number == 0 || !number.is_multiple_of(1024) {
            break;
        }
        (number, suffix) = (number / 1024, next);
    }
    Quantity(format!("{number}{suffix}"))
}

fn milli(number: u64) -> Quantity {
    if number.is_multiple_of(1000) {
        Quantity((number / 1000).to_string())
    } else {
        Quantity(format!("{number}m"))
    }
}

/// Amounts by name.
pub type Resources = BTreeMap<String, Quantity>;

/// Capacity and allocatable: capacity less what is reserved and less the hard eviction thresholds.
pub fn resources(
    config: &ClusterConfig,
    machine: &Machine,
    nodefs: Option<FileSystem>,
) -> (Resources, Resources) {
    let reserved = |resource: &str, milli: bool| -> u64 {
        config
            .reserved
            .iter()
            .filter(|(name, _)| name == resource)
            .filter_map(|(_, text)| {
                let text = Quantity(text.clone());
                if milli { quantity::milli_value(&text) } else { quantity::value(&text) }
            })
            .filter_map(|n| u64::try_from(n).ok())
            .sum()
    };
    let (mut capacity, mut allocatable) = (Resources::new(), Resources::new());
    let mut put = |name: &str, total: Quantity, left: Quantity| {
        capacity.insert(name.to_owned(), total);
        allocatable.insert(name.to_owned(), left);
    };
    let cpu = machine.cpus * 1000;
    put("cpu", milli(cpu), milli(cpu.saturating_sub(reserved("cpu", true))));
    let huge: u64 = machine.hugepages.values().sum();
    let memory = machine.memory;
    let left = memory
        .saturating_sub(huge)
        .saturating_sub(reserved("memory", false))
        .saturating_sub(config.eviction.kept(Signal::Memory, memory));
    put("memory", bytes(memory), bytes(left));
    let pods = Quantity(config.max_pods.to_string());
    put("pods", pods.clone(), pods);
    if let Some(fs) = nodefs.filter(|_| config.local_storage_isolation) {
        let left = fs
            .capacity
            .saturating_sub(reserved("ephemeral-storage", false))
            .saturating_sub(config.eviction.kept(Signal::NodeFs, fs.capacity));
        put("ephemeral-storage", bytes(fs.capacity), Quantity(left.to_string()));
    }
    for (size, total) in &machine.hugepages {
        let name = format!("hugepages-{}", bytes(*size).0);
        put(&name, bytes(*total), bytes(*total));
    }
    (capacity, allocatable)
}

/// Adds what plugins offer.
pub fn add_devices(devices: &Capacities, capacity: &mut Resources, allocatable: &mut Resources) {
    for (name, count) in devices {
        capacity.insert(name.clone(), Quantity(count.capacity.to_string()));
        allocatable.insert(name.clone(), Quantity(count.allocatable.to_string()));
    }
}

/// Has nothing of the extended resources that the object tells of: they are those of another machine
/// of this name, or of one that lost its disk, until a plugin tells of them again.
pub fn reset_extended(before: &NodeStatus, status: &mut NodeStatus) {
    let names = before.capacity.iter().flatten().map(|(name, _)| name);
    for name in names.filter(|name| is_extended(name)) {
        for list in [&mut status.capacity, &mut status.allocatable] {
            let list = list.get_or_insert_default();
            list.entry(name.clone()).or_insert_with(|| Quantity("0".into()));
        }
    }
}

/// The addresses that an external cloud provider is told of.
fn provided_ips(config: &ClusterConfig) -> Option<String> {
    let first = config.node_ips.first().filter(|ip| !ip.is_unspecified())?;
    let second = config.node_ips.get(1).filter(|ip| !ip.is_unspecified());
    let text = std::iter::once(first).chain(second).map(ToString::to_string);
    config.external_cloud_provider.then(|| text.collect::<Vec<_>>().join(","))
}

/// The node's addresses: those of `--node-ip`; an unspecified one (`0.0.0.0`, `::`) asks for the
/// address of the default route in its family, none at all for the first of `routes`. What an
/// external cloud provider has told stays.
pub fn plan_addresses(
    config: &ClusterConfig,
    routes: &[IpAddr],
    before: &[NodeAddress],
) -> Vec<NodeAddress> {
    if config.external_cloud_provider {
        if !before.is_empty() {
            return before.to_vec();
        }
        if config.node_ips.is_empty() {
            return addresses(&[], &config.hostname);
        }
    }
    let route = |family: Option<&IpAddr>| {
        let wanted = |ip: &&IpAddr| family.is_none_or(|f| f.is_ipv4() == ip.is_ipv4());
        routes.iter().find(wanted).or(routes.first()).copied()
    };
    let mut ips: Vec<IpAddr> = match config.node_ips.as_slice() {
        [] => route(None).into_iter().collect(),
        given => given
            .iter()
            .filter_map(|ip| if ip.is_unspecified() { route(Some(ip)) } else { Some(*ip) })
            .collect(),
    };
    ips.dedup();
    addresses(&ips, &config.hostname)
}

/// Addresses as told: InternalIPs, then the host name.
pub fn addresses(ips: &[IpAddr], hostname: &str) -> Vec<NodeAddress> {
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    let internal = ips.iter().map(|ip| address("InternalIP", ip.to_string()));
    internal.chain([address("Hostname", hostname.to_owned())]).collect()
}

/// What is told of the system.
pub fn system_info(machine: &Machine, runtime: &RuntimeFacts) -> NodeSystemInfo {
    NodeSystemInfo {
        architecture: machine.architecture.to_owned(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: runtime.version.clone(),
        kernel_version: machine.kernel_version.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        swap: (machine.swap > 0)
            .then(|| NodeSwapStatus { capacity: i64::try_from(machine.swap).ok() }),
        system_uuid: machine.system_uuid.clone(),
    }
}

/// Ports of the node's servers.
pub fn daemon_endpoints(port: u16) -> Option<NodeDaemonEndpoints> {
    (port != 0).then(|| NodeDaemonEndpoints {
        kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(port) }),
    })
}

/// The strategic merge patch that turns status `old` into `new`, with what others own left alone
/// (extended resources, attached volumes, their conditions). `None` if they are the same but for heartbeats,
/// unless `heartbeat` asks for them.
pub fn plan_status_patch(old: &NodeStatus, new: &NodeStatus, heartbeat: bool) -> Option<Value> {
    let mut patch = Map::new();
    let mut differs = |field: &str, old: Value, new: Value| {
        if old != new {
            patch.insert(field.to_owned(), new);
        }
    };
    let value = |v: &dyn erased::Erased| v.value();
    differs("nodeInfo", value(&old.node_info), value(&new.node_info));
    differs("daemonEndpoints", value(&old.daemon_endpoints), value(&new.daemon_endpoints));
    differs("declaredFeatures", value(&old.declared_features), value(&new.declared_features));
    differs("features", value(&old.features), value(&new.features));
    differs("runtimeHandlers", value(&old.runtime_handlers), value(&new.runtime_handlers));
    differs(
        "images",
        value(&old.images.clone().unwrap_or_default()),
        value(&new.images.clone().unwrap_or_default()),
    );
    differs(
        "volumesInUse",
        value(&old.volumes_in_use.clone().unwrap_or_default()),
        value(&new.volumes_in_use.clone().unwrap_or_default()),
    );
    for (field, old, new) in [
        ("capacity", &old.capacity, &new.capacity),
        ("allocatable", &old.allocatable, &new.allocatable),
    ] {
        let old = old.clone().unwrap_or_default();
        let changed: Map<String, Value> = new
            .iter()
            .flatten()
            .filter(|(name, quantity)| !same_quantity(old.get(*name), quantity))
            .map(|(name, quantity)| (name.clone(), json!(quantity)))
            .collect();
        if !changed.is_empty() {
            patch.insert(field.to_owned(), Value::Object(changed));
        }
    }
    if old.addresses != new.addresses {
        // The merge key of addresses is their type, of which there may be two: replace all.
        let mut addresses: Vec<Value> = new.addresses.iter().flatten().map(|a| json!(a)).collect();
        addresses.push(json!({"$patch": "replace"}));
        patch.insert("addresses".to_owned(), Value::Array(addresses));
    }
    let before = old.conditions.as_deref().unwrap_or_default();
    let changed = new.conditions.iter().flatten().any(|c| {
        !before.iter().any(|b| {
            (&b.type_, &b.status, &b.reason, &b.message)
                == (&c.type_, &c.status, &c.reason, &c.message)
        })
    });
    if changed || heartbeat || !patch.is_empty() {
        patch.insert("conditions".to_owned(), json!(new.conditions));
        return Some(json!({"status": patch}));
    }
    None
}

/// Whether both are the same amount: the API server writes quantities its own way.
fn same_quantity(old: Option<&Quantity>, new: &Quantity) -> bool {
    old.is_some_and(|old| old == new || quantity::milli_value(old) == quantity::milli_value(new))
}

mod erased {
    use serde::Serialize;
    use serde_json::Value;

    /// Anything that has a JSON value.
    pub(super) trait Erased {
        fn value(&self) -> Value;
    }

    impl<T: Serialize> Erased for T {
        fn value(&self) -> Value {
            serde_json::to_value(self).unwrap_or_default()
        }
    }
}

/// The patch of labels and annotations that an existing node lacks; `None` if it lacks nothing.
pub fn plan_metadata_patch(
    node: &Node,
    config: &ClusterConfig,
    machine: &Machine,
) -> Option<Value> {
    let have = node.metadata.labels.clone().unwrap_or_default();
    let lacking: Map<String, Value> = labels(config, machine)
        .into_iter()
        .filter(|(label, value)| have.get(label) != Some(value))
        .map(|(label, value)| (label, Value::String(value)))
        .collect();
    let notes = node.metadata.annotations.clone().unwrap_or_default();
    let mut annotations = Map::new();
    if !notes.contains_key(CONTROLLED_ATTACH) {
        annotations.insert(CONTROLLED_ATTACH.to_owned(), json!("true"));
    }
    let provided = provided_ips(config);
    if notes.get(PROVIDED_IPS) != provided.as_ref() {
        annotations.insert(PROVIDED_IPS.to_owned(), json!(provided));
    }
    let mut metadata = Map::new();
    if !lacking.is_empty() {
        metadata.insert("labels".to_owned(), Value::Object(lacking));
    }
    if !annotations.is_empty() {
        metadata.insert("annotations".to_owned(), Value::Object(annotations));
    }
    (!metadata.is_empty()).then(|| json!({"metadata": metadata}))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::node::conditions::{Pressure, conditions};

    fn machine() -> Machine {
        Machine {
            cpus: 2,
            memory: 8 << 30,
            hugepages: [(2 << 20, 0)].into(),
            architecture: "amd64",
            ..Machine::default()
        }
    }

    #[test]
    fn devices_are_told_and_another_machines_are_not() {
        let mut status = NodeStatus::default();
        let count = |text: &str| Quantity(text.to_owned());
        let before = NodeStatus {
            capacity: Some(
                [("cpu", "2"), ("a.example/b", "4"), ("c.example/d", "5"), ("hugepages-2Mi", "0")]
                    .map(|(name, n)| (name.to_owned(), count(n)))
                    .into(),
            ),
            ..NodeStatus::default()
        };
        let (mut capacity, mut allocatable) = (Resources::new(), Resources::new());
        let told = crate::device::Capacity { capacity: 3, allocatable: 2 };
        let devices = [("a.example/b".to_owned(), told)].into();
        add_devices(&devices, &mut capacity, &mut allocatable);
        (status.capacity, status.allocatable) = (Some(capacity), Some(allocatable));
        reset_extended(&before, &mut status);
        let list = |list: Option<Resources>| {
            let all = list.unwrap_or_default().into_iter();
            all.map(|(name, n)| format!("{name}={}", n.0)).collect::<Vec<_>>()
        };
        assert_eq!(list(status.capacity), ["a.example/b=3", "c.example/d=0"]);
        assert_eq!(list(status.allocatable), ["a.example/b=2", "c.example/d=0"]);
    }

    #[test]
    fn allocatable_is_capacity_less_reservations_and_eviction() {
        let mut config = ClusterConfig::new("n");
        config.reserved = vec![
            ("cpu".to_owned(), "100m".to_owned()),
            ("memory".to_owned(), "1Gi".to_owned()),
            ("memory".to_owned(), "1Gi".to_owned()),
        ];
        let fs = FileSystem { capacity: 1000 << 20, ..FileSystem::default() };
        let (capacity, allocatable) = resources(&config, &machine(), Some(fs));
        let show = |r: &Resources| {
            r.iter().map(|(k, v)| format!("{k}={}", v.0)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            show(&capacity),
            "cpu=2 ephemeral-storage=1000Mi hugepages-2Mi=0 memory=8Gi pods=110"
        );
        assert_eq!(
            show(&allocatable),
            "cpu=1900m ephemeral-storage=943718399 hugepages-2Mi=0 memory=6044Mi pods=110"
        );
        let apart = ClusterConfig { local_storage_isolation: false, ..config };
        let (capacity, allocatable) = resources(&apart, &machine(), Some(fs));
        let told = |list: &Resources| list.contains_key("ephemeral-storage");
        assert!(!told(&capacity) && !told(&allocatable));
    }

    fn status(at: i64) -> NodeStatus {
        let config = ClusterConfig::new("n");
        let (capacity, allocatable) = resources(&config, &machine(), None);
        let now = jiff::Timestamp::from_second(at).unwrap();
        NodeStatus {
            capacity: Some(capacity),
            allocatable: Some(allocatable),
            addresses: Some(addresses(&["10.0.0.1".parse().unwrap()], "n")),
            conditions: Some(conditions(Pressure::default(), &[], &[], now)),
            node_info: Some(system_info(&machine(), &RuntimeFacts::default())),
            daemon_endpoints: daemon_endpoints(10250),
            ..NodeStatus::default()
        }
    }

    #[test]
    fn a_heartbeat_alone_is_patched_only_when_asked_for() {
        assert_eq!(plan_status_patch(&status(1), &status(2), false), None);
        let patch = plan_status_patch(&status(1), &status(2), true).unwrap();
        let fields: Vec<_> = patch["status"].as_object().unwrap().keys().collect();
        assert_eq!(fields, ["conditions"]);
    }

    #[test]
    fn only_what_differs_is_patched_and_what_others_own_stays() {
        let (mut old, mut new) = (status(1), status(1));
        let capacity = old.capacity.as_mut().unwrap();
        capacity.insert("example.com/gpu".to_owned(), Quantity("2".to_owned()));
        capacity.insert("cpu".to_owned(), Quantity("2000m".to_owned()));
        new.capacity.as_mut().unwrap().insert("pods".to_owned(), Quantity("50".to_owned()));
        new.addresses =
            Some(addresses(&["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()], "n"));
        let patch = plan_status_patch(&old, &new, false).unwrap();
        assert_eq!(patch["status"]["capacity"], json!({"pods": "50"}));
        let addresses = patch["status"]["addresses"].as_array().unwrap();
        assert_eq!(addresses.len(), 4);
        assert_eq!(addresses[3], json!({"$patch": "replace"}));
        assert!(patch["status"].get("allocatable").is_none());
    }

    #[test]
    fn an_existing_node_gets_the_labels_it_lacks() {
        let config = ClusterConfig::new("n");
        let mut node = new_node(&config, &machine(), NodeStatus::default());
        assert_eq!(plan_metadata_patch(&node, &config, &machine()), None);
        node.metadata.labels.as_mut().unwrap().remove("kubernetes.io/os");
        node.metadata.labels.as_mut().unwrap().insert("mine".to_owned(), "x".to_owned());
        assert_eq!(
            plan_metadata_patch(&node, &config, &machine()),
            Some(json!({"metadata": {"labels": {"kubernetes.io/os": "linux"}}}))
        );
    }

    #[test]
    fn the_runtimes_version_is_told_without_its_v() {
        for (said, told) in [("v2.1.9", "containerd://2.1.9"), ("0.1.0", "containerd://0.1.0")] {
            let version = cri::VersionResponse {
                runtime_name: "containerd".to_owned(),
                runtime_version: said.to_owned(),
                ..Default::default()
            };
            assert_eq!(runtime_version(&version), told);
        }
    }

    #[test]
    fn an_external_cloud_provider_has_the_last_word_on_addresses() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let routes = [ip("10.0.0.1"), ip("fd00::1")];
        let show = |config: &ClusterConfig, before: &[NodeAddress]| {
            let planned = plan_addresses(config, &routes, before);
            planned.into_iter().map(|a| a.address).collect::<Vec<_>>().join(" ")
        };
        let mut config = ClusterConfig::new("n");
        assert_eq!(show(&config, &[]), "10.0.0.1 n");
        config.node_ips = vec![ip("::")];
        assert_eq!(show(&config, &[]), "fd00::1 n");
        config.node_ips = vec![ip("192.0.2.7"), ip("::")];
        assert_eq!(show(&config, &[]), "192.0.2.7 fd00::1 n");
        config.external_cloud_provider = true;
        let told = addresses(&[ip("198.51.100.1")], "n");
        assert_eq!(show(&config, &told), "198.51.100.1 n");
        assert_eq!(show(&config, &[]), "192.0.2.7 fd00::1 n");
        let node = new_node(&config, &machine(), NodeStatus::default());
        assert_eq!(node.metadata.annotations.as_ref().unwrap()[PROVIDED_IPS], "192.0.2.7");
        assert_eq!(node.spec.as_ref().unwrap().taints.as_ref().unwrap()[0].key, UNINITIALIZED);
        config.node_ips.clear();
        assert_eq!(show(&config, &[]), "n");
        let patch = plan_metadata_patch(&node, &config, &machine()).unwrap();
        assert_eq!(patch, json!({"metadata": {"annotations": {PROVIDED_IPS: null}}}));
    }

    #[test]
    fn the_runtime_says_why_pods_cannot_run() {
        let condition = |kind: &str, status| cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status,
            reason: "R".to_owned(),
            message: "m".to_owned(),
        };
        let answer = |conditions| cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            ..Default::default()
        };
        let both = vec![condition("RuntimeReady", true), condition("NetworkReady", true)];
        assert!(not_ready(&answer(both)).is_empty());
        let one = vec![condition("RuntimeReady", true), condition("NetworkReady", false)];
        assert_eq!(
            not_ready(&answer(one)),
            ["container runtime network not ready: NetworkReady=false reason:R message:m"]
        );
        assert_eq!(not_ready(&answer(Vec::new())).len(), 2);
    }
}
