//! May a pod run here? What kubelet's admission refuses is refused in the same words; so is what
//! this node does not do, instead of being ignored.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
};

use super::config::resources::{PodSums, extended_requests, pod_requests};
use super::config::security::check_apparmor;
use super::qos::qos_class;
use super::quantity::amount;
use super::spec::{
    RESTART_ALL, has_critical_priority, host_network, init_containers, is_static, spec_of,
};
use super::status::Verdict;
use super::sysctls;
use crate::dra::may_be_claimed;
use crate::node::conditions::Pressure;
use crate::node_context::NodeContext;

/// A port of the node that a pod takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// Address; empty for all.
    pub ip: String,
    /// `TCP`, `UDP`, `SCTP`.
    pub protocol: String,
    /// Port number.
    pub port: i32,
}

impl HostPort {
    fn conflicts(&self, other: &Self) -> bool {
        let all = |ip: &str| matches!(ip, "" | "0.0.0.0" | "::");
        self.port == other.port
            && self.protocol == other.protocol
            && (all(&self.ip) || all(&other.ip) || self.ip == other.ip)
    }
}

/// What one pod takes of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Requests.
    pub sums: PodSums,
    /// Requests of extended resources.
    pub extended: BTreeMap<String, i64>,
    /// Ports of the node.
    pub ports: Vec<HostPort>,
}

/// What `pod` takes of the node.
pub fn share_of(pod: &Pod) -> Share {
    let spec = spec_of(pod);
    let all = spec.containers.iter().chain(init_containers(spec));
    let ports = all
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|p| {
            let own = if host_network(spec) { Some(p.container_port) } else { None };
            let port = p.host_port.filter(|n| *n > 0).or(own)?;
            Some(HostPort {
                ip: p.host_ip.clone().unwrap_or_default(),
                protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
                port,
            })
        })
        .collect();
    Share { sums: pod_requests(pod), extended: extended_requests(pod), ports }
}

/// What all admitted pods take together; kept up to date one pod at a time.
#[derive(Debug, Default)]
pub struct Taken {
    pods: u32,
    cpu: i64,
    memory: i64,
    ephemeral: i64,
    extended: BTreeMap<String, i64>,
    ports: BTreeMap<(i32, String), Vec<HostPort>>,
}

impl Taken {
    /// Counts a pod in.
    pub fn add(&mut self, share: &Share) {
        self.pods += 1;
        self.cpu = self.cpu.saturating_add(share.sums.cpu);
        self.memory = self.memory.saturating_add(share.sums.memory);
        self.ephemeral = self.ephemeral.saturating_add(share.sums.ephemeral);
        for (name, count) in &share.extended {
            let sum = self.extended.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        for port in &share.ports {
            let key = (port.port, port.protocol.clone());
            self.ports.entry(key).or_default().push(port.clone());
        }
    }

    /// Counts a pod out.
    pub fn subtract(&mut self, share: &Share) {
        self.pods = self.pods.saturating_sub(1);
        self.cpu = self.cpu.saturating_sub(share.sums.cpu);
        self.memory = self.memory.saturating_sub(share.sums.memory);
        self.ephemeral = self.ephemeral.saturating_sub(share.sums.ephemeral);
        for (name, count) in &share.extended {
            if let Some(sum) = self.extended.get_mut(name) {
                *sum = sum.saturating_sub(*count);
                if *sum == 0 {
                    self.extended.remove(name);
                }
            }
        }
        for port in &share.ports {
            let key = (port.port, port.protocol.clone());
            if let Some(list) = self.ports.get_mut(&key) {
                if let Some(at) = list.iter().position(|p| p == port) {
                    list.swap_remove(at);
                }
                if list.is_empty() {
                    self.ports.remove(&key);
                }
            }
        }
    }

    fn port_taken(&self, port: &HostPort) -> bool {
        let list = self.ports.get(&(port.port, port.protocol.clone()));
        list.is_some_and(|l| l.iter().any(|p| p.conflicts(port)))
    }
}

fn refuse(reason: &str, message: String) -> Verdict {
    Verdict { message, ..Verdict::new(reason) }
}

/// Refuses what asks for more of an extended resource than there is. Devices are known by
/// `allocatable`; what the Node's status has beside them somebody else put there. What neither knows is
/// the cluster's, and its scheduler's to count.
pub fn admit_extended(
    share: &Share,
    taken: &Taken,
    allocatable: impl Fn(&str) -> Option<i64>,
    node_object: Option<&Node>,
) -> Result<(), Verdict> {
    let told = node_object.and_then(|n| n.status.as_ref()).and_then(|s| s.allocatable.as_ref());
    for (name, asked) in &share.extended {
        let Some(capacity) = allocatable(name).or_else(|| amount(told, name)) else { continue };
        let used = taken.extended.get(name).copied().unwrap_or(0);
        if asked.saturating_add(used) > capacity {
            return Err(short(name, *asked, used, capacity));
        }
    }
    Ok(())
}

/// Refuses what must not run here; `node_object` is the API's view of this node, where there is one.
pub fn admit(
    pod: &Pod,
    share: &Share,
    taken: &Taken,
    node: &NodeContext,
    node_object: Option<&Node>,
) -> Result<(), Verdict> {
    check_os(pod)?;
    check_groups_policy(pod, node_object)?;
    if let Some(field) = unsupported(pod, node) {
        return Err(refuse(
            "UnsupportedField",
            format!("{field} is not supported by this node; take it out of the pod"),
        ));
    }
    if let Err(forbidden) = sysctls::check(pod, &node.allowed_unsafe_sysctls) {
        return Err(refuse("SysctlForbidden", format!("forbidden sysctl: {forbidden}")));
    }
    if taken.pods >= node.max_pods {
        return Err(short("pods", 1, i64::from(taken.pods), i64::from(node.max_pods)));
    }
    let sums = share.sums;
    for (name, asked, used, capacity) in [
        ("cpu", sums.cpu, taken.cpu, node.allocatable_milli_cpu),
        ("memory", sums.memory, taken.memory, node.allocatable_memory),
        ("ephemeral-storage", sums.ephemeral, taken.ephemeral, node.allocatable_ephemeral),
    ] {
        let capacity = i64::try_from(capacity).unwrap_or(i64::MAX);
        let unknown = name == "ephemeral-storage" && capacity == 0;
        if asked > 0 && !unknown && asked.saturating_add(used) > capacity {
            return Err(short(name, asked, used, capacity));
        }
    }
    if share.ports.iter().any(|p| taken.port_taken(p)) {
        return Err(refuse(
            "NodePorts",
            "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"
                .into(),
        ));
    }
    // What runs already is not stopped for it.
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Pending");
    if phase == "Pending" {
        check_apparmor(pod, node.apparmor)
            .map_err(|e| refuse("AppArmor", format!("Cannot enforce AppArmor: {e}")))?;
    }
    let Some(object) = node_object else { return Ok(()) };
    if !matches_node(spec_of(pod), object) {
        return Err(refuse(
            "NodeAffinity",
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"
                .into(),
        ));
    }
    let taints = object.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    let tolerations = spec_of(pod).tolerations.as_deref().unwrap_or_default();
    let untolerated = taints
        .iter()
        .filter(|t| t.effect == "NoExecute")
        .find(|t| !tolerations.iter().any(|toleration| tolerates(toleration, t)));
    if let Some(taint) = untolerated
        && !is_static(pod)
    {
        return Err(refuse(
            "TaintToleration",
            format!(
                "Predicate TaintToleration failed: node(s) had untolerated taint {{{}: {}}}",
                taint.key,
                taint.value.as_deref().unwrap_or_default()
            ),
        ));
    }
    Ok(())
}

/// Refuses what is for another operating system, by its label or its field.
fn check_os(pod: &Pod) -> Result<(), Verdict> {
    let label = pod.metadata.labels.as_ref().and_then(|l| l.get("kubernetes.io/os"));
    if label.is_some_and(|os| os != "linux") {
        return Err(refuse(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label".into(),
        ));
    }
    if spec_of(pod).os.as_ref().is_some_and(|os| os.name != "linux") {
        return Err(refuse(
            "PodOSNotSupported",
            "Failed to admit pod as the OS field doesn't match node OS".into(),
        ));
    }
    Ok(())
}

/// Refuses groups by the pod's word alone where the runtime would add those of the image.
fn check_groups_policy(pod: &Pod, node: Option<&Node>) -> Result<(), Verdict> {
    let security = spec_of(pod).security_context.as_ref();
    let policy = security.and_then(|s| s.supplemental_groups_policy.as_deref());
    // Not said yet: the node's object is new, or of another agent.
    let features = node.and_then(|n| n.status.as_ref()).and_then(|s| s.features.as_ref());
    let can = features.and_then(|f| f.supplemental_groups_policy).unwrap_or(true);
    if policy == Some("Strict") && !can {
        return Err(refuse(
            "SupplementalGroupsPolicyNotSupported",
            "SupplementalGroupsPolicy=Strict is not supported in this node".into(),
        ));
    }
    Ok(())
}

/// Refuses what would make the node's shortage worse, as kubelet's eviction does: nearly all pods,
/// and the ones of class BestEffort where only memory is short. What the system needs runs all the same.
pub fn admit_under(pod: &Pod, pressure: Pressure) -> Result<(), Verdict> {
    let (spec, on) = (spec_of(pod), pressure.names().collect::<Vec<_>>());
    if on.is_empty() || is_static(pod) || has_critical_priority(spec) {
        return Ok(());
    }
    let taint = Taint {
        key: "node.kubernetes.io/memory-pressure".into(),
        effect: "NoSchedule".into(),
        ..Taint::default()
    };
    let prepared = || {
        qos_class(pod) != "BestEffort"
            || spec.tolerations.iter().flatten().any(|t| tolerates(t, &taint))
    };
    if on == ["MemoryPressure"] && prepared() {
        return Ok(());
    }
    Err(refuse("Evicted", format!("The node had condition: [{}]. ", on.join(" "))))
}

fn short(resource: &str, requested: i64, used: i64, capacity: i64) -> Verdict {
    refuse(
        &format!("OutOf{resource}"),
        format!(
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        ),
    )
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let same = |own: &Option<String>, other: &str| own.as_deref().unwrap_or_default() == other;
    let effect = toleration.effect.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    let key = toleration.key.as_deref().unwrap_or_default();
    if !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        _ => !key.is_empty() && same(&toleration.value, taint.value.as_deref().unwrap_or_default()),
    }
}

fn matches_node(spec: &PodSpec, node: &Node) -> bool {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key).is_some_and(|v| v == value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|n| n.required_during_scheduling_ignored_during_execution.as_ref());
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let affine =
        required.is_none_or(|r| r.node_selector_terms.iter().any(|t| term(t, labels, name)));
    selected && affine
}

fn term(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, name: &str) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|e| requirement(e, labels.get(&e.key).map(String::as_str)))
        && fields.iter().all(|f| requirement(f, (f.key == "metadata.name").then_some(name)))
}

fn requirement(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = || value.is_some_and(|v| values.iter().any(|o| o == v));
    let number = |text: Option<&str>| text.and_then(|t| t.parse::<i64>().ok());
    let bound = || number(values.first().map(String::as_str));
    match &*requirement.operator {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => number(value).zip(bound()).is_some_and(|(v, b)| v > b),
        "Lt" => number(value).zip(bound()).is_some_and(|(v, b)| v < b),
        _ => false,
    }
}

/// The first field that asks for what this node does not do.
fn unsupported(pod: &Pod, node: &NodeContext) -> Option<String> {
    let spec = spec_of(pod);
    // Nobody allocates for a claim without a control plane.
    if !node.cluster && spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()) {
        return Some("spec.resourceClaims without a cluster".into());
    }
    if spec.host_users == Some(false) {
        // The API server refuses these; a manifest has nobody else to.
        let shared = [
            (spec.host_network, "hostNetwork"),
            (spec.host_pid, "hostPID"),
            (spec.host_ipc, "hostIPC"),
        ];
        if let Some((_, field)) = shared.iter().find(|(set, _)| *set == Some(true)) {
            return Some(format!("spec.hostUsers: false together with {field}"));
        }
    }
    let lists = [("containers", &spec.containers[..]), ("initContainers", init_containers(spec))];
    lists.into_iter().find_map(|(list, containers)| {
        containers
            .iter()
            .find_map(|c| unsupported_in(c).map(|f| format!("spec.{list}[{}].{f}", c.name)))
    })
}

fn unsupported_in(container: &Container) -> Option<String> {
    let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
    for name in limits.into_iter().flatten().map(|(name, _)| name) {
        let known = matches!(&**name, "cpu" | "memory" | "ephemeral-storage")
            || name.starts_with("hugepages-")
            || may_be_claimed(name);
        if !known {
            return Some(format!("resources.limits[{name}]"));
        }
    }
    let rules = container.restart_policy_rules.iter().flatten();
    if let Some(rule) = rules.into_iter().find(|r| !matches!(&*r.action, "Restart" | RESTART_ALL)) {
        return Some(format!("restartPolicyRules action {}", rule.action));
    }
    let from_file = container
        .env
        .iter()
        .flatten()
        .any(|e| e.value_from.as_ref().is_some_and(|v| v.file_key_ref.is_some()));
    from_file.then(|| "env[].valueFrom.fileKeyRef".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn pressure_keeps_out_what_is_not_critical() {
        let none = Pressure::default();
        let memory = Pressure { memory: true, ..none };
        let disk = Pressure { disk: true, ..none };
        let all = Pressure { memory: true, disk: true, pid: true };
        let plain = r#""containers":[{"name":"a"}]"#;
        let burstable = r#""containers":[{"name":"a","resources":{"requests":{"cpu":"1"}}}]"#;
        let tolerant =
            |key: &str| format!(r#"{plain},"tolerations":[{{"key":"{key}","operator":"Exists"}}]"#);
        let (of_memory, of_disk) = (
            tolerant("node.kubernetes.io/memory-pressure"),
            tolerant("node.kubernetes.io/disk-pressure"),
        );
        let critical = format!(r#"{plain},"priority":2000000000"#);
        let important = format!(r#"{plain},"priority":1000000000"#);
        for (spec, pressure, refused) in [
            (plain, none, None),
            (plain, memory, Some("[MemoryPressure]")),
            (plain, disk, Some("[DiskPressure]")),
            (plain, all, Some("[MemoryPressure DiskPressure PIDPressure]")),
            (burstable, memory, None),
            (burstable, disk, Some("[DiskPressure]")),
            (burstable, all, Some("[MemoryPressure DiskPressure PIDPressure]")),
            (&of_memory, memory, None),
            (&of_disk, memory, Some("[MemoryPressure]")),
            (&of_disk, disk, Some("[DiskPressure]")),
            (&critical, all, None),
            (&important, disk, Some("[DiskPressure]")),
        ] {
            let verdict = admit_under(&pod(&format!("{{{spec}}}")), pressure).err();
            let expected =
                refused.map(|on| refuse("Evicted", format!("The node had condition: {on}. ")));
            assert_eq!(verdict, expected, "{spec} under {pressure:?}");
        }
        let mut of_a_file = pod(&format!("{{{plain}}}"));
        let note = ("kubernetes.io/config.source".to_owned(), "file".to_owned());
        of_a_file.metadata.annotations = Some([note].into());
        assert_eq!(admit_under(&of_a_file, all), Ok(()));
    }

    fn reason(spec: &str, taken: &Taken) -> Option<String> {
        let node = NodeContext {
            allocatable_milli_cpu: 2000,
            allocatable_memory: 1 << 30,
            max_pods: 2,
            ..NodeContext::new("n", vec![])
        };
        let object: Node = serde_json::from_str(
            r#"{"metadata":{"name":"n","labels":{"disk":"ssd","n":"5"}},
                "spec":{"taints":[{"key":"k","value":"v","effect":"NoExecute"}]}}"#,
        )
        .unwrap();
        let pod = pod(spec);
        admit(&pod, &share_of(&pod), taken, &node, Some(&object)).err().map(|v| v.reason)
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let tolerant = r#""tolerations":[{"operator":"Exists"}]"#;
        let mut taken = Taken::default();
        let other = pod(
            r#"{"containers":[{"name":"o","ports":[{"containerPort":80,"hostPort":8080}],"resources":{"requests":{"cpu":"1500m"}}}]}"#,
        );
        taken.add(&share_of(&other));
        for (containers, extra, expected) in [
            (r#"[{"name":"a"}]"#, "", None),
            (r#"[{"name":"a","resources":{"requests":{"cpu":"600m"}}}]"#, "", Some("OutOfcpu")),
            (r#"[{"name":"a","resources":{"limits":{"memory":"2Gi"}}}]"#, "", Some("OutOfmemory")),
            (
                r#"[{"name":"a","ports":[{"containerPort":1,"hostPort":8080}]}]"#,
                "",
                Some("NodePorts"),
            ),
            (
                r#"[{"name":"a","ports":[{"containerPort":1,"hostPort":8080,"protocol":"UDP"}]}]"#,
                "",
                None,
            ),
            (r#"[{"name":"a"}]"#, r#","nodeSelector":{"disk":"hdd"}"#, Some("NodeAffinity")),
            (
                r#"[{"name":"a"}]"#,
                r#","affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"n","operator":"Gt","values":["4"]}]}]}}}"#,
                None,
            ),
            (r#"[{"name":"a","resources":{"limits":{"gpu":"1"}}}]"#, "", Some("UnsupportedField")),
            (
                r#"[{"name":"a","securityContext":{"appArmorProfile":{"type":"RuntimeDefault"}}}]"#,
                "",
                Some("AppArmor"),
            ),
            (
                r#"[{"name":"a"}]"#,
                r#","securityContext":{"sysctls":[{"name":"kernel.msgmax","value":"1"}]}"#,
                Some("SysctlForbidden"),
            ),
            (r#"[{"name":"a"}]"#, r#","os":{"name":"windows"}"#, Some("PodOSNotSupported")),
            (r#"[{"name":"a"}]"#, r#","os":{"name":"linux"}"#, None),
            (r#"[{"name":"a"}]"#, r#","hostUsers":false"#, None),
            (r#"[{"name":"a"}]"#, r#","hostUsers":false,"hostPID":true"#, Some("UnsupportedField")),
        ] {
            let spec = format!(r#"{{"containers":{containers},{tolerant}{extra}}}"#);
            assert_eq!(reason(&spec, &taken).as_deref(), expected, "{spec}");
        }
        assert_eq!(
            reason(r#"{"containers":[{"name":"a"}]}"#, &taken).as_deref(),
            Some("TaintToleration")
        );
        let strict: Pod = serde_json::from_str(
            r#"{"spec":{"containers":[],"securityContext":{"supplementalGroupsPolicy":"Strict"}}}"#,
        )
        .unwrap();
        for (status, expected) in [
            (r#"{"features":{"supplementalGroupsPolicy":true}}"#, true),
            (r#"{"features":{"supplementalGroupsPolicy":false}}"#, false),
            ("{}", true),
        ] {
            let node = format!(r#"{{"status":{status}}}"#);
            let node = serde_json::from_str(&node).unwrap();
            assert_eq!(check_groups_policy(&strict, Some(&node)).is_ok(), expected, "{status}");
            assert_eq!(check_groups_policy(&Pod::default(), Some(&node)), Ok(()));
        }
        assert_eq!(check_groups_policy(&strict, None), Ok(()));
        let mut labelled = Pod::default();
        for (os, expected) in [("linux", true), ("windows", false)] {
            labelled.metadata.labels = Some([("kubernetes.io/os".into(), os.into())].into());
            assert_eq!(check_os(&labelled).is_ok(), expected, "{os}");
        }
        taken.add(&Share::default());
        let spec = format!(r#"{{"containers":[{{"name":"a"}}],{tolerant}}}"#);
        assert_eq!(reason(&spec, &taken).as_deref(), Some("OutOfpods"));
        taken.subtract(&Share::default());
        taken.subtract(&share_of(&other));
        assert_eq!((taken.pods, taken.cpu, taken.ports.len()), (0, 0, 0));
    }
}
