//! Ending containers: the preStop hook, SIGTERM, and SIGKILL when the time is up.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container as SpecContainer, LifecycleHandler, Pod};
use tokio::time::Instant;

use super::{Done, Worker};
use crate::pod::deps::Deps;
use crate::pod::facts::ProbeKind;
use crate::pod::hooks::{HookPlace, run_hook};
use crate::pod::observed::{ContainerId, names};
use crate::pod::plan::{KillCause, usable_sandbox};
use crate::pod::spec::{ContainerKind, RestartPolicy, container_policy, find_container, spec_of};
use crate::report::EventType;

/// Every container gets so long, whatever hooks have used up.
const LEAST_GRACE: Duration = Duration::from_secs(2);

impl Worker {
    /// Begins to end an instance.
    pub(super) fn kill(&mut self, id: ContainerId, name: &str, cause: KillCause) {
        let found = find_container(spec_of(&self.pod), name);
        let again = found.as_ref().is_some_and(|(container, kind)| {
            *kind == ContainerKind::Sidecar
                || container_policy(spec_of(&self.pod), container) != RestartPolicy::Never
        });
        let (message, restart) = message(name, cause, again);
        let whom = (found.as_ref().map_or(ContainerKind::Main, |(_, kind)| *kind), name);
        self.deps.container_event(&self.pod, whom, EventType::Normal, "Killing", message);
        if restart {
            self.facts.restart_after_kill.insert(id.clone());
        }
        self.facts.killing.insert(id.clone());
        let grace = self.grace(cause, found.as_ref().map(|(c, _)| c), &id);
        let container = found.map(|(c, _)| c);
        let hook = self.pre_stop(container.as_ref(), &id);
        let place = self.hook_place(&id, container.as_ref());
        let (deps, pod) = (self.deps.clone(), self.pod.clone());
        let kind = whom.0;
        let name = name.to_owned();
        self.begin_task(async move {
            let begun = Instant::now();
            if let Some(hook) = hook
                && !grace.is_zero()
            {
                pre_stop(&deps, &pod, (kind, &name), &hook, &place, grace).await;
            }
            let rest = grace.saturating_sub(begun.elapsed()).max(LEAST_GRACE);
            let result = deps.runtime.stop_container(id.as_str(), rest).await;
            Done::Killed(id, result.map_err(|e| e.to_string()))
        });
    }

    /// Stops an instance that is being ended with what is left of a shortened time.
    pub(super) fn hasten(&mut self, id: ContainerId) {
        let left = self.left().max(LEAST_GRACE);
        let deps = self.deps.clone();
        self.begin_task(async move {
            if let Err(error) = deps.runtime.stop_container(id.as_str(), left).await {
                tracing::warn!(container = %id, %error, "cannot hasten the end of a container");
            }
            Done::Nothing
        });
    }

    fn left(&self) -> Duration {
        let now = self.deps.clock.now();
        self.kill_at
            .map_or(Duration::ZERO, |at| at.duration_since(now).try_into().unwrap_or_default())
    }

    fn grace(
        &self,
        cause: KillCause,
        container: Option<&SpecContainer>,
        id: &ContainerId,
    ) -> Duration {
        let spec = spec_of(&self.pod).termination_grace_period_seconds.or_else(|| {
            // An orphan has no spec; its containers remember.
            self.observed.container(id)?.annotations.get(names::POD_GRACE)?.parse().ok()
        });
        let seconds = match cause {
            // Nobody is to have finished anything: the pod begins anew.
            KillCause::RestartAll => return Duration::ZERO,
            KillCause::PodEnds if self.kill_at.is_some() && container.is_some() => {
                return self.left();
            }
            KillCause::Probe(kind) => container
                .and_then(|c| match kind {
                    ProbeKind::Liveness => c.liveness_probe.as_ref(),
                    ProbeKind::Startup => c.startup_probe.as_ref(),
                    ProbeKind::Readiness => None,
                })
                .and_then(|p| p.termination_grace_period_seconds)
                .or(spec),
            _ => spec,
        };
        Duration::from_secs(u64::try_from(seconds.unwrap_or(30)).unwrap_or(0))
    }

    fn pre_stop(
        &self,
        container: Option<&SpecContainer>,
        id: &ContainerId,
    ) -> Option<LifecycleHandler> {
        match container {
            Some(container) => container.lifecycle.as_ref()?.pre_stop.clone(),
            None => {
                let text = self.observed.container(id)?.annotations.get(names::PRE_STOP)?;
                serde_json::from_str(text).ok()
            }
        }
    }

    fn hook_place(&self, id: &ContainerId, container: Option<&SpecContainer>) -> HookPlace {
        let ip = usable_sandbox(&self.pod, &self.observed).and_then(|s| s.ips.first());
        HookPlace {
            runtime: self.deps.runtime.clone(),
            container_id: id.to_string(),
            pod_ip: ip
                .and_then(|ip| ip.parse().ok())
                .or_else(|| self.deps.node.node_ips.first().copied()),
            ports: container.and_then(|c| c.ports.clone()).unwrap_or_default(),
        }
    }
}

/// Kubelet's words, and whether the container is started again whatever its exit code.
fn message(name: &str, cause: KillCause, again: bool) -> (String, bool) {
    let restarts = |text: String| {
        if again { (format!("{text}, will be restarted"), true) } else { (text, false) }
    };
    match cause {
        KillCause::PodEnds => (format!("Stopping container {name}"), false),
        KillCause::SandboxChanged => (format!("Stopping container {name}"), again),
        KillCause::Unknown => {
            ("Container is in \"unknown\" state, try killing it before restart".to_string(), false)
        }
        KillCause::Changed => {
            (format!("Container {name} definition changed, will be restarted"), true)
        }
        KillCause::RestartAll => (
            format!("Stopping container {name}, as all are restarted (RestartAllContainers)"),
            false,
        ),
        KillCause::Resized => (format!("Container {name} resize requires restart"), true),
        KillCause::Probe(ProbeKind::Startup) => {
            restarts(format!("Container {name} failed startup probe"))
        }
        KillCause::Probe(_) => restarts(format!("Container {name} failed liveness probe")),
    }
}

async fn pre_stop(
    deps: &Deps,
    pod: &Arc<Pod>,
    whom: (ContainerKind, &str),
    hook: &LifecycleHandler,
    place: &HookPlace,
    grace: Duration,
) {
    let result = match tokio::time::timeout(grace, run_hook(hook, place)).await {
        Ok(result) => result,
        Err(_) => Err(format!("not done after the grace period of {}s", grace.as_secs())),
    };
    if let Err(error) = result {
        tracing::warn!(pod = %pod_name(pod), container = whom.1, error, "preStop hook");
        let text = "PreStopHook failed".to_owned();
        deps.container_event(pod, whom, EventType::Warning, "FailedPreStopHook", text);
    }
}

fn pod_name(pod: &Pod) -> crate::ids::NamespacedName {
    crate::ids::NamespacedName::of_pod(pod)
}
