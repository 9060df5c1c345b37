//! Pod conditions, their reasons and transition times.

use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodStatus};

use super::{Ending, StatusInput, initialized, time};
use crate::pod::allocation::{IN_PROGRESS, PENDING};
use crate::pod::facts::ResizeFacts;
use crate::pod::plan::restart_all_causes;
use crate::pod::spec::{init_containers, is_sidecar, may_restart_all, spec_of};

/// Conditions that the node sets; all others belong to their owners and are kept.
pub(super) const OWNED: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// Condition of pods whose containers may all be started again by the end of one.
const RESTARTING_ALL: &str = "AllContainersRestarting";

/// Condition of pods that something else than themselves ends; others set it too.
const DISRUPTED: &str = "DisruptionTarget";

fn owned(kind: &str) -> bool {
    OWNED.contains(&kind) || [PENDING, IN_PROGRESS, RESTARTING_ALL].contains(&kind)
}

/// Status, reason and message of a condition.
type Verdict = (bool, Option<&'static str>, Option<String>);

fn holds() -> Verdict {
    (true, None, None)
}

/// All conditions of the pod.
pub(super) fn conditions(
    input: StatusInput<'_>,
    status: &PodStatus,
    sandbox_up: bool,
) -> Vec<PodCondition> {
    let phase = status.phase.as_deref().unwrap_or_default();
    let containers_ready = containers_ready(input, status, phase);
    let found = [
        (OWNED[0], (sandbox_up, None, None)),
        (OWNED[1], is_initialized(input, status, phase)),
        (OWNED[2], ready(input, &containers_ready)),
        (OWNED[3], containers_ready),
        (OWNED[4], holds()),
    ];
    let before = |kind: &str| {
        let published = input.previous.and_then(|p| p.conditions.as_ref());
        let from_api = input.pod.status.as_ref().and_then(|p| p.conditions.as_ref());
        published
            .into_iter()
            .flatten()
            .chain(from_api.into_iter().flatten())
            .find(|c| c.type_ == kind)
            .cloned()
    };
    let mut all: Vec<PodCondition> = found
        .into_iter()
        .map(|(kind, (holds, reason, message))| {
            let status = if holds { "True" } else { "False" };
            let old = before(kind);
            let since = old
                .as_ref()
                .filter(|c| c.status == status)
                .and_then(|c| c.last_transition_time.clone());
            PodCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: reason.map(str::to_owned),
                message,
                last_transition_time: Some(since.unwrap_or_else(|| time(input.now))),
                last_probe_time: None,
                observed_generation: input.pod.metadata.generation,
            }
        })
        .collect();
    let since = |kind: &str, status: &str| {
        let old = before(kind).filter(|c| c.status == status);
        old.and_then(|c| c.last_transition_time).unwrap_or_else(|| time(input.now))
    };
    if may_restart_all(spec_of(input.pod)) {
        let (on, reason, message) = restarting_all(input, phase);
        let status = if on { "True" } else { "False" };
        all.push(PodCondition {
            type_: RESTARTING_ALL.to_owned(),
            status: status.to_owned(),
            reason: reason.map(str::to_owned),
            message,
            last_transition_time: Some(since(RESTARTING_ALL, status)),
            ..PodCondition::default()
        });
    }
    if phase != "Succeeded" && phase != "Failed" && input.ending != Ending::Terminated {
        all.extend(resize(input, before));
    }
    if let Some(verdict) = input.verdict.filter(|verdict| verdict.disrupts) {
        all.push(PodCondition {
            type_: DISRUPTED.to_owned(),
            status: "True".to_owned(),
            reason: Some("TerminationByKubelet".to_owned()),
            message: Some(verdict.message.clone()),
            last_transition_time: Some(since(DISRUPTED, "True")),
            last_probe_time: None,
            observed_generation: input.pod.metadata.generation,
        });
    }
    let ours: Vec<String> = all.iter().map(|c| c.type_.clone()).collect();
    let foreign = input.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    all.extend(
        foreign
            .into_iter()
            .flatten()
            .filter(|c| !owned(&c.type_) && !ours.contains(&c.type_))
            .cloned(),
    );
    all
}

fn restarting_all(input: StatusInput<'_>, phase: &str) -> Verdict {
    match phase {
        "Succeeded" => return (false, Some("PodCompleted"), None),
        "Failed" => return (false, Some("PodFailed"), None),
        _ => {}
    }
    if restart_all_causes(spec_of(input.pod), input.observed).is_empty() {
        return (false, None, None);
    }
    let message = "container exited with restart policy rule".to_owned();
    (true, Some("RestartAllContainersStarted"), Some(message))
}

/// How far a resize has come; no condition where there is none.
fn resize(
    input: StatusInput<'_>,
    before: impl Fn(&str) -> Option<PodCondition>,
) -> impl Iterator<Item = PodCondition> {
    let ResizeFacts { pending, progress, .. } = &input.facts.resize;
    let condition = |kind: &str, reason: Option<&str>, message: Option<&String>, generation| {
        let since = before(kind)
            .filter(|old| old.reason.as_deref() == reason)
            .and_then(|old| old.last_transition_time);
        PodCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: reason.map(str::to_owned),
            message: message.cloned(),
            last_transition_time: Some(since.unwrap_or_else(|| time(input.now))),
            last_probe_time: None,
            observed_generation: generation,
        }
    };
    let pending = pending
        .as_ref()
        .map(|p| condition(PENDING, Some(&p.reason), Some(&p.message), p.generation));
    let progress = progress.as_ref().map(|p| {
        let reason = p.error.is_some().then_some("Error");
        condition(IN_PROGRESS, reason, p.error.as_ref(), p.generation)
    });
    [pending, progress].into_iter().flatten()
}

fn list(names: &[&str]) -> String {
    format!("[{}]", names.join(" "))
}

fn containers_ready(input: StatusInput<'_>, status: &PodStatus, phase: &str) -> Verdict {
    match phase {
        "Succeeded" => return (false, Some("PodCompleted"), None),
        "Failed" => return (false, Some("PodFailed"), None),
        _ => {}
    }
    let spec = spec_of(input.pod);
    let unready = |s: &&ContainerStatus| !s.ready;
    let mut names: Vec<&str> = init_containers(spec)
        .iter()
        .zip(status.init_container_statuses.iter().flatten())
        .filter(|(c, s)| is_sidecar(c) && !s.ready)
        .map(|(c, _)| &*c.name)
        .collect();
    for container in &spec.containers {
        let own = status.container_statuses.iter().flatten().find(|s| s.name == container.name);
        if own.as_ref().is_none_or(unready) {
            names.push(&container.name);
        }
    }
    if names.is_empty() {
        return holds();
    }
    let message = format!("containers with unready status: {}", list(&names));
    (false, Some("ContainersNotReady"), Some(message))
}

/// Ready is ContainersReady and every readiness gate.
fn ready(input: StatusInput<'_>, containers_ready: &Verdict) -> Verdict {
    if !containers_ready.0 {
        return containers_ready.clone();
    }
    let mut missing = Vec::new();
    let conditions = input.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    for gate in spec_of(input.pod).readiness_gates.iter().flatten() {
        let kind = &gate.condition_type;
        match conditions.into_iter().flatten().find(|c| c.type_ == *kind) {
            None => missing.push(format!(
                "corresponding condition of pod readiness gate \"{kind}\" does not exist."
            )),
            Some(c) if c.status != "True" => missing.push(format!(
                "the status of pod readiness gate \"{kind}\" is not \"True\", but {}",
                c.status
            )),
            Some(_) => {}
        }
    }
    if missing.is_empty() {
        holds()
    } else {
        (false, Some("ReadinessGatesNotReady"), Some(missing.join(", ")))
    }
}

fn is_initialized(input: StatusInput<'_>, status: &PodStatus, phase: &str) -> Verdict {
    if phase == "Succeeded" {
        return (true, Some("PodCompleted"), None);
    }
    if initialized(status) {
        return holds();
    }
    let names: Vec<&str> = init_containers(spec_of(input.pod))
        .iter()
        .zip(status.init_container_statuses.iter().flatten())
        .filter(|(c, s)| if is_sidecar(c) { s.started != Some(true) } else { !s.ready })
        .map(|(c, _)| &*c.name)
        .collect();
    let before = input.previous.and_then(|p| p.conditions.as_ref());
    let was = before.into_iter().flatten().any(|c| c.type_ == "Initialized" && c.status == "True");
    // Initialized once is initialized, though its init containers may run again.
    if names.is_empty() || was {
        return holds();
    }
    let message = format!("containers with incomplete status: {}", list(&names));
    (false, Some("ContainersNotInitialized"), Some(message))
}
