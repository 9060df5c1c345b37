//! What each container waits for, in the order in which they start.

use k8s_openapi::api::core::v1::Container as SpecContainer;

use super::{ExplainInput, Reason, ago, failure, left, span, title, words};
use crate::pod::facts::{ProbeKind, Step};
use crate::pod::observed::{Container, ContainerState};
use crate::pod::plan::wants_start;
use crate::pod::spec::{
    ContainerKind, ephemeral_as_container, init_containers, init_kind, spec_of,
};
use crate::probe::Outcome;

/// Adds the reasons of all containers.
pub(super) fn explain(input: &ExplainInput<'_>, reasons: &mut Vec<Reason>) {
    let spec = spec_of(input.pod);
    let inits = init_containers(spec);
    let ephemerals: Vec<SpecContainer> =
        spec.ephemeral_containers.iter().flatten().map(ephemeral_as_container).collect();
    let mut waiting: Vec<String> = Vec::new();
    // What the containers that follow wait for.
    let mut behind = (!reasons.is_empty()).then(|| "what is named above".to_owned());
    let mains_made = spec.containers.iter().any(|c| input.observed.latest(&c.name).is_some());
    let all = inits
        .iter()
        .map(|c| (c, init_kind(c)))
        .chain(spec.containers.iter().map(|c| (c, ContainerKind::Main)))
        .chain(ephemerals.iter().map(|c| (c, ContainerKind::Ephemeral)));
    for (n, (container, kind)) in all.enumerate() {
        let latest = input.observed.latest(&container.name);
        let found = of(input, container, kind, latest, mains_made);
        let held_up =
            found.is_some() || (latest.is_none() && !(kind == ContainerKind::Init && mains_made));
        match found {
            Some(mut reason) => {
                if n < inits.len() && inits.len() > 1 && !mains_made {
                    reason.object = format!("{} ({} of {})", reason.object, n + 1, inits.len());
                }
                reasons.push(reason);
            }
            None if held_up => waiting.push(container.name.clone()),
            None => {}
        }
        let holds_back = n < inits.len() && held_up && !mains_made;
        if holds_back && behind.is_none() {
            behind = Some(title(container, kind));
        }
    }
    if waiting.is_empty() {
        return;
    }
    let object =
        format!("container{} {}", if waiting.len() == 1 { "" } else { "s" }, waiting.join(", "));
    reasons.push(match behind {
        Some(behind) => Reason::new(
            object,
            format!("not made yet, waits for {behind}"),
            "starts by itself, in the order of the spec",
        ),
        None => Reason::new(object, "not made yet", "starts next, in the order of the spec"),
    });
}

fn of(
    input: &ExplainInput<'_>,
    container: &SpecContainer,
    kind: ContainerKind,
    latest: Option<&Container>,
    mains_made: bool,
) -> Option<Reason> {
    let name = &container.name;
    let facts = input.facts;
    let object = title(container, kind);
    if let Some(instance) = latest
        && facts.killing.contains(&instance.id)
    {
        let why = match facts.probes.failed.get(&instance.id) {
            Some(kind) => format!("is being ended: its {} probe failed", lower(*kind)),
            None => "is being ended".to_owned(),
        };
        let next = "it gets its grace period, then SIGKILL; then it is started again as its \
                    restart policy says";
        return Some(Reason::new(object, why, next));
    }
    if facts.starting.contains(name) {
        let (cause, next) = match &container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref())
        {
            Some(_) if latest.is_some_and(|i| i.state == ContainerState::Running) => {
                ("its postStart hook runs", "it counts as started when the hook is done")
            }
            _ => ("is being made and started", "wait"),
        };
        return Some(Reason::new(object, cause, next));
    }
    if latest.is_some_and(|i| i.state == ContainerState::Running) {
        return latest.and_then(|instance| probes(input, container, object, instance));
    }
    let done = kind == ContainerKind::Init
        && latest.map_or(mains_made, |instance| {
            mains_made || (instance.succeeded() && !facts.restart_after_kill.contains(&instance.id))
        });
    let again = kind != ContainerKind::Ephemeral
        && wants_start(spec_of(input.pod), container, kind, latest, facts);
    if done {
        return None;
    }
    if latest.is_some() && !again {
        // One that is over and was meant to be holds nothing up.
        if kind == ContainerKind::Ephemeral {
            return None;
        }
        return Some(Reason::new(
            object,
            format!("{}, and its restart policy does not start it again", last_end(input, latest)),
            "as the spec says; `kubectl logs` shows its last words",
        ));
    }
    if let Some(wait) = input.plan.backing_off.iter().find(|b| b.name == *name) {
        let cause = format!(
            "CrashLoopBackOff: {}; waits {} between restarts, {} left",
            last_end(input, latest),
            span(i64::try_from(wait.wait).unwrap_or(i64::MAX)),
            span(left(wait.until, input.now))
        );
        let next = match latest.map(|instance| &*instance.reason) {
            Some("StartError") => start_remedy("RunContainerError").to_owned(),
            Some("OOMKilled") => "raise its memory limit, or have it use less".to_owned(),
            _ => format!("find out why it ends: `kubectl logs --previous -c {name}`"),
        };
        return Some(Reason::new(object, cause, next).again(wait.until, input.now));
    }
    if let Some(failed) = facts.failures.get(name).filter(|f| f.retry_at > input.now) {
        return Some(failure(object, failed, start_remedy(&failed.reason), input.now));
    }
    match facts.images.get(name) {
        Some((Step::Failed(failed), _)) => {
            let image = container.image.as_deref().unwrap_or_default();
            let object = format!("{object}, image {image}");
            Some(failure(object, failed, image_remedy(&failed.reason), input.now))
        }
        Some((Step::Busy, _)) => {
            let image = container.image.as_deref().unwrap_or_default();
            Some(Reason::new(
                format!("{object}, image {image}"),
                format!(
                    "is looked for or pulled (imagePullPolicy {})",
                    container.image_pull_policy.as_deref().unwrap_or("IfNotPresent")
                ),
                "wait; `longshore image pull IMAGE` shows the progress of the same pull",
            ))
        }
        _ => latest.map(|_| {
            Reason::new(object, last_end(input, latest), "it is started again, as its policy says")
        }),
    }
}

/// How the newest instance ended.
fn last_end(input: &ExplainInput<'_>, latest: Option<&Container>) -> String {
    let Some(latest) = latest else { return "has not run yet".into() };
    match latest.state {
        ContainerState::Exited => {
            let reason = match &*latest.reason {
                "" | "Error" | "Completed" => String::new(),
                reason => format!(" ({reason})"),
            };
            let when = latest.finished_at.map(|at| format!(" {}", ago(at, input.now)));
            let said = [latest.termination_message.as_deref().unwrap_or_default(), &latest.message]
                .into_iter()
                .find(|text| !text.is_empty())
                .map(|text| format!(": {}", words(text)));
            format!(
                "ended with exit code {}{reason}{}{}",
                latest.exit_code,
                when.unwrap_or_default(),
                said.unwrap_or_default()
            )
        }
        ContainerState::Created => "was made but never started".into(),
        ContainerState::Unknown => "the runtime lost track of it".into(),
        ContainerState::Running => "runs".into(),
    }
}

/// `; a (exit code 1), b (exit code 137, OOMKilled)`: who ended with another code than 0.
pub(super) fn ended_badly(input: &ExplainInput<'_>) -> String {
    let spec = spec_of(input.pod);
    let all = init_containers(spec).iter().chain(&spec.containers);
    let bad: Vec<String> = all
        .filter_map(|c| input.observed.latest(&c.name))
        .filter(|i| i.state == ContainerState::Exited && i.exit_code != 0)
        .map(|i| format!("container {} {}", i.name, last_end(input, Some(i))))
        .collect();
    if bad.is_empty() { String::new() } else { format!(": {}", bad.join("; ")) }
}

fn lower(kind: ProbeKind) -> String {
    kind.title().to_lowercase()
}

/// A running container: which probe keeps it from being ready, or threatens it.
fn probes(
    input: &ExplainInput<'_>,
    container: &SpecContainer,
    object: String,
    instance: &Container,
) -> Option<Reason> {
    let facts = &input.facts.probes;
    let last = |kind: ProbeKind| {
        input.probes.iter().find(|p| p.id == instance.id && p.kind == kind)?.last.as_ref()
    };
    let said = |kind: ProbeKind| match last(kind) {
        None => "it has not been asked yet".to_owned(),
        Some(checked) => {
            let what = match &checked.outcome {
                Outcome::Success => "succeeded".to_owned(),
                Outcome::Warning(text) => format!("succeeded with a warning: {}", words(text)),
                Outcome::Failure(text) => {
                    format!("failed ({} in a row): {}", checked.failures, words(text))
                }
                Outcome::Unknown(text) => format!("could not be asked: {}", words(text)),
            };
            format!("last, {}, it {what}", ago(checked.at, input.now))
        }
    };
    if container.startup_probe.is_some() && !facts.started.contains(&instance.id) {
        let cause = format!("startup probe has not succeeded yet; {}", said(ProbeKind::Startup));
        let limit = threshold(container.startup_probe.as_ref());
        let next = format!("after {limit} failures in a row it is restarted");
        return Some(Reason::new(object, cause, next));
    }
    let liveness = last(ProbeKind::Liveness)
        .filter(|c| c.failures > 0 && matches!(c.outcome, Outcome::Failure(_)));
    if container.readiness_probe.is_some() && !facts.ready.contains(&instance.id) {
        let cause = format!("readiness probe does not succeed; {}", said(ProbeKind::Readiness));
        let next = "Services send it nothing until the probe succeeds; see what the container \
                    says: `kubectl logs`";
        return Some(Reason::new(object, cause, next));
    }
    liveness?;
    let limit = threshold(container.liveness_probe.as_ref());
    Some(Reason::new(
        object,
        format!("liveness probe fails; {}", said(ProbeKind::Liveness)),
        format!("after {limit} failures in a row it is restarted"),
    ))
}

fn threshold(probe: Option<&k8s_openapi::api::core::v1::Probe>) -> i32 {
    probe.and_then(|p| p.failure_threshold).filter(|n| *n > 0).unwrap_or(3)
}

fn image_remedy(reason: &str) -> &'static str {
    match reason {
        "ErrImageNeverPull" => {
            "imagePullPolicy is Never and the image is not on the node: `longshore image import`, \
             or another policy"
        }
        "InvalidImageName" => "correct the image's name in the pod",
        "SignatureValidationFailed" => "sign the image, or change the signature policy",
        _ => {
            "check the name, the registry and imagePullSecrets; `longshore image pull IMAGE` (with \
             another runtime `crictl pull`) shows the registry's answer"
        }
    }
}

fn start_remedy(reason: &str) -> &'static str {
    match reason {
        "CreateContainerConfigError" => {
            "make what it names; a ConfigMap or Secret is taken up when it appears"
        }
        "RunContainerError" => "correct command, args, workingDir or securityContext in the pod",
        "PostStartHookError" => "correct the postStart hook",
        _ => "the runtime's words name the cause: remove it",
    }
}
