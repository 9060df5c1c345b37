//! Questions about a pod's spec that several decisions ask, answered once.

use k8s_openapi::api::core::v1::{
    Container, ContainerRestartRule, EphemeralContainer, Pod, PodSpec,
};

/// Whether a finished container is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Always.
    Always,
    /// When it failed.
    OnFailure,
    /// Never.
    Never,
}

impl RestartPolicy {
    fn parse(text: &str) -> Self {
        match text {
            "OnFailure" => Self::OnFailure,
            "Never" => Self::Never,
            _ => Self::Always,
        }
    }
}

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContainerKind {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: runs beside the pod's containers (KEP-753).
    Sidecar,
    /// One of `spec.containers`.
    Main,
    /// Added to a running pod for debugging; never restarted.
    Ephemeral,
}

/// The pod's spec; an empty one where the object has none.
pub fn spec_of(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&EMPTY)
}

/// The pod's restart policy.
pub fn restart_policy(spec: &PodSpec) -> RestartPolicy {
    RestartPolicy::parse(spec.restart_policy.as_deref().unwrap_or("Always"))
}

/// Whether `container`, one of `spec.initContainers`, is a sidecar.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Init containers of the pod.
pub fn init_containers(spec: &PodSpec) -> &[Container] {
    spec.init_containers.as_deref().unwrap_or_default()
}

/// Kind of init container `container`.
pub fn init_kind(container: &Container) -> ContainerKind {
    if is_sidecar(container) { ContainerKind::Sidecar } else { ContainerKind::Init }
}

/// The policy that holds for one container: its own, or the pod's.
pub fn container_policy(spec: &PodSpec, container: &Container) -> RestartPolicy {
    match container.restart_policy.as_deref() {
        Some(own) => RestartPolicy::parse(own),
        None => restart_policy(spec),
    }
}

/// The action of a rule that starts the whole pod again (KEP-5532).
pub const RESTART_ALL: &str = "RestartAllContainers";

/// The first of the container's rules that is about this exit code (KEP-5307).
fn rule_for(container: &Container, exit_code: i32) -> Option<&ContainerRestartRule> {
    container.restart_policy_rules.iter().flatten().find(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
            if codes.operator == "NotIn" { !listed } else { listed }
        })
    })
}

/// Whether all containers of the pod are started again after `container` ended with `exit_code`.
pub fn restarts_all(container: &Container, exit_code: i32) -> bool {
    rule_for(container, exit_code).is_some_and(|rule| rule.action == RESTART_ALL)
}

/// Whether the end of a container may start all of the pod's again.
pub fn may_restart_all(spec: &PodSpec) -> bool {
    let all = spec.containers.iter().chain(init_containers(spec));
    let mut rules = all.flat_map(|c| c.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == RESTART_ALL)
}

/// Whether `container` is started again after it ended with `exit_code`. The container's rules
/// come first, then its policy, then the pod's (KEP-5307).
pub fn restarts_after(
    spec: &PodSpec,
    container: &Container,
    kind: ContainerKind,
    exit_code: i32,
) -> bool {
    if kind == ContainerKind::Ephemeral {
        return false;
    }
    let again = |rule: &ContainerRestartRule| matches!(&*rule.action, "Restart" | RESTART_ALL);
    if rule_for(container, exit_code).is_some_and(again) {
        return true;
    }
    match container_policy(spec, container) {
        RestartPolicy::Always if kind == ContainerKind::Init => exit_code != 0,
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => exit_code != 0,
        RestartPolicy::Never => false,
    }
}

/// An ephemeral container in the shape of any other; what it cannot have stays empty.
pub fn ephemeral_as_container(ephemeral: &EphemeralContainer) -> Container {
    let e = ephemeral.clone();
    Container {
        args: e.args,
        command: e.command,
        env: e.env,
        env_from: e.env_from,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        name: e.name,
        resources: e.resources,
        security_context: e.security_context,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        tty: e.tty,
        volume_devices: e.volume_devices,
        volume_mounts: e.volume_mounts,
        working_dir: e.working_dir,
        ..Default::default()
    }
}

/// Container `name` of the pod with its kind, of whichever list it is in.
pub fn find_container(spec: &PodSpec, name: &str) -> Option<(Container, ContainerKind)> {
    if let Some(c) = spec.containers.iter().find(|c| c.name == name) {
        return Some((c.clone(), ContainerKind::Main));
    }
    if let Some(c) = init_containers(spec).iter().find(|c| c.name == name) {
        return Some((c.clone(), init_kind(c)));
    }
    let ephemeral = spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)?;
    Some((ephemeral_as_container(ephemeral), ContainerKind::Ephemeral))
}

/// How Events name a container of the pod (`spec.initContainers{setup}`).
pub fn field_path(kind: ContainerKind, name: &str) -> String {
    let list = match kind {
        ContainerKind::Init | ContainerKind::Sidecar => "initContainers",
        ContainerKind::Main => "containers",
        ContainerKind::Ephemeral => "ephemeralContainers",
    };
    format!("spec.{list}{{{name}}}")
}

/// Seconds the pod gets to end: what the deletion says, else what the spec says, else 30.
pub fn grace_seconds(pod: &Pod) -> i64 {
    let spec = spec_of(pod).termination_grace_period_seconds.unwrap_or(30);
    if pod.metadata.deletion_timestamp.is_some() {
        pod.metadata.deletion_grace_period_seconds.unwrap_or(spec).max(0)
    } else {
        spec.max(0)
    }
}

/// Whether the pod uses the node's network.
pub fn host_network(spec: &PodSpec) -> bool {
    spec.host_network.unwrap_or(false)
}

/// Priority of `system-cluster-critical`: what has it or more keeps the cluster itself going.
pub(crate) const SYSTEM_CRITICAL: i32 = 2_000_000_000;

/// Whether the pod's priority is one of the system's own.
pub fn has_critical_priority(spec: &PodSpec) -> bool {
    spec.priority.is_some_and(|priority| priority >= SYSTEM_CRITICAL)
}

/// Whether the object was made from a file on this node (it has no API object of its own).
pub fn is_static(pod: &Pod) -> bool {
    pod.metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get("kubernetes.io/config.source"))
        .is_some_and(|source| source != "api")
}
