//! What to do next for one pod: spec + what the runtime shows + what the worker knows + the time
//! give a list of actions. Pure, and it can start from anything: a worker that died half-way is
//! continued from what it left in the runtime.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container as SpecContainer, Pod, PodSpec};

use super::backoff::{Restart, plan_restart};
use super::facts::Facts;
use super::observed::{Container, ContainerId, ContainerState, Observed, Sandbox, SandboxId};
use super::spec::{
    ContainerKind, RestartPolicy, container_policy, ephemeral_as_container, host_network,
    init_containers, init_kind, is_sidecar, restart_policy, restarts_after, restarts_all, spec_of,
};
use super::status::PULL_ERROR_SHOWN_SECONDS;

mod action;

pub use action::{Action, BackingOff, KillCause, Plan, Start};

/// A start that follows no crash.
const NO_WAIT: Restart = Restart { due: Timestamp::MIN, wait: 0, next: 0 };

/// The sandbox in which containers can run: the newest, if it is ready and has an address.
pub fn usable_sandbox<'a>(pod: &Pod, observed: &'a Observed) -> Option<&'a Sandbox> {
    let newest = observed.sandboxes.first()?;
    let addressed = host_network(spec_of(pod)) || !newest.ips.is_empty();
    (newest.ready && addressed).then_some(newest)
}

/// Whether `container` has yet to be started (again), were there nothing to wait for.
pub fn wants_start(
    spec: &PodSpec,
    container: &SpecContainer,
    kind: ContainerKind,
    latest: Option<&Container>,
    facts: &Facts,
) -> bool {
    let Some(latest) = latest else { return true };
    match latest.state {
        ContainerState::Running => false,
        ContainerState::Created | ContainerState::Unknown => true,
        ContainerState::Exited => {
            facts.restart_after_kill.contains(&latest.id)
                || restarts_after(spec, container, kind, latest.exit_code)
        }
    }
}

/// Whether a new sandbox may be made: not for a pod whose work is over.
fn sandbox_wanted(spec: &PodSpec, observed: &Observed, facts: &Facts) -> bool {
    if observed.containers.is_empty() {
        return true;
    }
    let pod_never = restart_policy(spec) == RestartPolicy::Never
        && spec.containers.iter().all(|c| container_policy(spec, c) == RestartPolicy::Never);
    if pod_never && !observed.sandboxes.is_empty() {
        return false;
    }
    // A failed init container that is not restarted has ended the pod.
    if init_failed(spec, observed) {
        return false;
    }
    let unfinished = spec
        .containers
        .iter()
        .any(|c| wants_start(spec, c, ContainerKind::Main, observed.latest(&c.name), facts));
    // Those of a lost sandbox that still run are killed and then want a start, or not.
    let running = spec.containers.iter().any(|c| {
        observed.latest(&c.name).is_some_and(|i| i.state == ContainerState::Running)
            && container_policy(spec, c) != RestartPolicy::Never
    });
    unfinished || running
}

/// The latest instances whose end starts the whole pod again; none where it goes on as it is.
pub fn restart_all_causes<'a>(spec: &PodSpec, observed: &'a Observed) -> Vec<&'a Container> {
    let all = spec.containers.iter().chain(init_containers(spec));
    all.filter_map(|c| {
        let latest = observed.latest(&c.name)?;
        let cause = latest.state == ContainerState::Exited && restarts_all(c, latest.exit_code);
        cause.then_some(latest)
    })
    .collect()
}

/// Whether an init container failed for good.
pub fn init_failed(spec: &PodSpec, observed: &Observed) -> bool {
    init_containers(spec).iter().filter(|c| !is_sidecar(c)).any(|c| {
        observed.latest(&c.name).is_some_and(|i| {
            i.state == ContainerState::Exited
                && i.exit_code != 0
                && !restarts_after(spec, c, ContainerKind::Init, i.exit_code)
        })
    })
}

/// Whether all the pod's own containers have ended and none is started again.
pub fn work_done(spec: &PodSpec, observed: &Observed, facts: &Facts) -> bool {
    if init_failed(spec, observed) {
        return true;
    }
    spec.containers.iter().all(|c| {
        let latest = observed.latest(&c.name);
        latest.is_some_and(|i| i.state == ContainerState::Exited)
            && !wants_start(spec, c, ContainerKind::Main, latest, facts)
    })
}

/// Plans the next actions of a pod that should run.
pub fn plan(
    pod: &Pod,
    observed: &Observed,
    facts: &Facts,
    now: Timestamp,
    max_backoff: u64,
) -> Plan {
    let mut planner = Planner { pod, spec: spec_of(pod), observed, facts, now, max_backoff };
    planner.run()
}

struct Planner<'a> {
    pod: &'a Pod,
    spec: &'a PodSpec,
    observed: &'a Observed,
    facts: &'a Facts,
    now: Timestamp,
    max_backoff: u64,
}

impl Planner<'_> {
    fn run(&mut self) -> Plan {
        let mut plan = Plan::default();
        let causes = restart_all_causes(self.spec, self.observed);
        if !causes.is_empty() {
            if !self.first_starts(&mut plan) {
                self.restart_all(&mut plan, &causes);
            }
            return plan;
        }
        if work_done(self.spec, self.observed, self.facts) {
            self.end_sidecars(&mut plan);
            return plan;
        }
        let sandbox = usable_sandbox(self.pod, self.observed).map(|s| s.id.clone());
        match &sandbox {
            None => {
                self.replace_sandbox(&mut plan);
                if !sandbox_wanted(self.spec, self.observed, self.facts) {
                    return plan;
                }
            }
            Some(current) => self.end_strays(&mut plan, current),
        }
        self.volumes(&mut plan);
        if sandbox.is_some() {
            for ephemeral in self.spec.ephemeral_containers.iter().flatten() {
                if self.observed.latest(&ephemeral.name).is_none() {
                    let container = ephemeral_as_container(ephemeral);
                    self.start(&mut plan, &container, ContainerKind::Ephemeral, sandbox.as_ref());
                }
            }
        }
        if self.init(&mut plan, sandbox.as_ref()) {
            self.mains(&mut plan, sandbox.as_ref());
        }
        plan
    }

    /// Starts those of the pod's containers that were never started, once its first was; whether there
    /// are any. One that ends at once and wants all to start again then finds all there, and each
    /// counts a restart, as under kubelet, which starts all before it looks at ends. Nobody waits
    /// for one that cannot start.
    fn first_starts(&self, plan: &mut Plan) -> bool {
        let Some(sandbox) = usable_sandbox(self.pod, self.observed).map(|s| &s.id) else {
            return false;
        };
        let containers = &self.spec.containers;
        let here = |i: &Container| i.sandbox == *sandbox && i.state != ContainerState::Created;
        if !containers.iter().any(|c| self.observed.latest(&c.name).is_some_and(here)) {
            return false;
        }
        let never = |c: &&SpecContainer| {
            let latest = self.observed.latest(&c.name);
            latest.is_none_or(|i| i.state == ContainerState::Created)
                && !self.facts.known_restarts.contains_key(&c.name)
                && !self.failing(&c.name)
        };
        let waiting: Vec<_> = containers.iter().filter(never).collect();
        if !waiting.is_empty() {
            self.volumes(plan);
        }
        for container in &waiting {
            self.start(plan, container, ContainerKind::Main, Some(sandbox));
        }
        !waiting.is_empty()
    }

    fn volumes(&self, plan: &mut Plan) {
        if self.facts.volumes.due(self.now) {
            plan.actions.push(Action::MountVolumes);
        } else if let Some(at) = self.facts.volumes.retry_at() {
            plan.wake(at);
        }
    }

    /// Whether the last try to start a container, or to have its image, failed.
    fn failing(&self, name: &str) -> bool {
        self.facts.failures.contains_key(name)
            || matches!(self.facts.images.get(name), Some((super::facts::Step::Failed(_), _)))
    }

    /// Ends what still runs, then has all instances removed: without any the pod starts as a new one
    /// does, in the same sandbox and with the same volumes. Ephemeral containers are left alone.
    fn restart_all(&self, plan: &mut Plan, causes: &[&Container]) {
        let inits = init_containers(self.spec);
        let of = |containers: &[SpecContainer], instance: &Container| {
            containers.iter().any(|c| c.name == *instance.name)
        };
        let own = |i: &&Container| of(&self.spec.containers, i) || of(inits, i);
        let instances: Vec<&Container> = self.observed.containers.iter().filter(own).collect();
        let mut alive = !self.facts.starting.is_empty();
        for instance in &instances {
            if matches!(instance.state, ContainerState::Running | ContainerState::Unknown) {
                alive = true;
                self.kill(plan, instance, KillCause::RestartAll);
            }
        }
        if alive {
            return;
        }
        if !self.facts.reset.due(self.now) {
            if let Some(at) = self.facts.reset.retry_at() {
                plan.wake(at);
            }
            return;
        }
        let cause = |i: &Container| causes.iter().any(|c| c.id == i.id);
        let mut ids: Vec<_> = instances.iter().map(|i| ((cause(i), of(inits, i)), &i.id)).collect();
        ids.sort_by_key(|(rank, _)| *rank);
        let waits = causes.iter().map(|cause| {
            let wait = plan_restart(cause, cause.finished_at, self.max_backoff);
            (cause.name.to_string(), wait)
        });
        plan.actions.push(Action::Reset {
            ids: ids.into_iter().map(|(_, id)| id.clone()).collect(),
            waits: waits.collect(),
        });
    }

    /// The pod's work is over: end its sidecars, the last one first (KEP-753).
    fn end_sidecars(&self, plan: &mut Plan) {
        let alive =
            |c: &&Container| matches!(c.state, ContainerState::Running | ContainerState::Unknown);
        for container in init_containers(self.spec).iter().rev() {
            if let Some(instance) = self.observed.latest(&container.name).filter(alive) {
                self.kill(plan, instance, KillCause::PodEnds);
                return;
            }
        }
    }

    /// Containers that run in a sandbox other than the current one, or that the spec does not name.
    fn end_strays(&self, plan: &mut Plan, current: &SandboxId) {
        for instance in &self.observed.containers {
            if instance.sandbox != *current && instance.state == ContainerState::Running {
                self.kill(plan, instance, KillCause::SandboxChanged);
            }
        }
    }

    fn replace_sandbox(&self, plan: &mut Plan) {
        let mut alive = false;
        for instance in &self.observed.containers {
            if matches!(instance.state, ContainerState::Running | ContainerState::Unknown) {
                alive = true;
                self.kill(plan, instance, KillCause::SandboxChanged);
            }
        }
        if alive || !sandbox_wanted(self.spec, self.observed, self.facts) {
            return;
        }
        if self.facts.sandbox.due(self.now) {
            plan.actions.push(Action::CreateSandbox {
                attempt: self.observed.sandboxes.iter().map(|s| s.attempt + 1).max().unwrap_or(0),
                stop: self.observed.sandboxes.iter().map(|s| s.id.clone()).collect(),
            });
        } else if let Some(at) = self.facts.sandbox.retry_at() {
            plan.wake(at);
        }
    }

    /// Brings the init containers on; true once the pod's own containers may start.
    fn init(&self, plan: &mut Plan, sandbox: Option<&SandboxId>) -> bool {
        let inits = init_containers(self.spec);
        // Initialized once in this sandbox is initialized: finished init containers may have been
        // collected since. A new sandbox starts from the beginning.
        let here = |i: &Container| Some(&i.sandbox) == sandbox;
        let initialized =
            self.spec.containers.iter().any(|c| self.observed.latest(&c.name).is_some_and(here));
        let newest = inits
            .iter()
            .rposition(|c| self.observed.latest(&c.name).is_some_and(here))
            .unwrap_or(0);
        for (n, container) in inits.iter().enumerate() {
            let kind = init_kind(container);
            let latest = self.observed.latest(&container.name).filter(|i| here(i));
            let passed = initialized || n < newest;
            if kind == ContainerKind::Init {
                let done = match latest {
                    // One that was killed to be restarted may have ended well over it.
                    Some(instance) => {
                        instance.succeeded()
                            && !self.facts.restart_after_kill.contains(&instance.id)
                    }
                    None => passed,
                };
                if done || initialized {
                    continue;
                }
                if latest.is_none_or(|i| i.state != ContainerState::Running) {
                    self.start(plan, container, kind, sandbox);
                }
                return false;
            }
            let up = match latest {
                Some(instance) if instance.state == ContainerState::Running => {
                    if self.condemned(plan, container, instance) {
                        false
                    } else {
                        container.startup_probe.is_none()
                            || self.facts.probes.started.contains(&instance.id)
                    }
                }
                _ => {
                    self.start(plan, container, kind, sandbox);
                    false
                }
            };
            // A sidecar that started once holds nobody back while it restarts.
            let settled = up && !self.facts.starting.contains(&container.name);
            if !settled && !passed {
                return false;
            }
        }
        true
    }

    fn mains(&self, plan: &mut Plan, sandbox: Option<&SandboxId>) {
        for container in &self.spec.containers {
            let latest = self.observed.latest(&container.name);
            match latest {
                Some(instance) if instance.state == ContainerState::Running => {
                    self.condemned(plan, container, instance);
                }
                Some(instance) if instance.state == ContainerState::Unknown => {
                    self.kill(plan, instance, KillCause::Unknown);
                }
                _ => {
                    if wants_start(self.spec, container, ContainerKind::Main, latest, self.facts) {
                        self.start(plan, container, ContainerKind::Main, sandbox);
                    }
                }
            }
        }
    }

    /// Kills a running instance that must not go on; whether it is to go.
    fn condemned(&self, plan: &mut Plan, container: &SpecContainer, instance: &Container) -> bool {
        let cause = if image_changed(container, instance) {
            KillCause::Changed
        } else if let Some(kind) = self.facts.probes.failed.get(&instance.id) {
            KillCause::Probe(*kind)
        } else {
            return self.facts.killing.contains(&instance.id);
        };
        self.kill(plan, instance, cause);
        true
    }

    fn kill(&self, plan: &mut Plan, instance: &Container, cause: KillCause) {
        if !self.facts.killing.contains(&instance.id) {
            plan.actions.push(Action::Kill {
                id: instance.id.clone(),
                name: instance.name.to_string(),
                cause,
            });
        }
    }

    /// Plans what brings `container` nearer to running: its image, then its start. Containers of
    /// one list start in their order; a later one does not overtake an earlier one that was never
    /// started, unless that one is failing.
    fn start(
        &self,
        plan: &mut Plan,
        container: &SpecContainer,
        kind: ContainerKind,
        sandbox: Option<&SandboxId>,
    ) {
        let name = &container.name;
        if self.facts.starting.contains(name) {
            return;
        }
        let latest = self.observed.latest(name);
        if latest.is_some_and(|i| self.facts.killing.contains(&i.id)) {
            return;
        }
        let restart = match latest {
            Some(last) if last.state != ContainerState::Created => self.restart(last, kind),
            Some(_) => NO_WAIT,
            None => self.facts.waits.get(name).copied().unwrap_or(NO_WAIT),
        };
        if restart.due > self.now {
            plan.wake(restart.due);
            let (wait, until) = (restart.wait, restart.due);
            plan.backing_off.push(BackingOff { name: name.clone(), wait, until });
            return;
        }
        if let Some(failure) = self.facts.failures.get(name)
            && failure.retry_at > self.now
        {
            plan.wake(failure.retry_at);
            return;
        }
        let (image, ready) = match self.facts.images.get(name) {
            Some((step, ready)) => (step.clone(), ready.is_some()),
            None => Default::default(),
        };
        if !ready {
            if image.due(self.now) {
                plan.actions.push(Action::EnsureImage { name: name.clone() });
            } else if let super::facts::Step::Failed(failure) = &image {
                plan.wake(failure.retry_at);
                // The status changes from the error to the wait.
                let shown = SignedDuration::from_secs(PULL_ERROR_SHOWN_SECONDS);
                if let Ok(turn) = failure.since.checked_add(shown)
                    && turn > self.now
                {
                    plan.wake(turn);
                }
            }
            return;
        }
        let Some(sandbox) = sandbox else { return };
        if self.facts.volumes != super::facts::Step::Done || self.behind_an_earlier(name, kind) {
            return;
        }
        let never_started = latest.filter(|i| i.state == ContainerState::Created);
        let known = self.facts.known_restarts.get(name).copied().unwrap_or(0);
        let attempt = match (latest, never_started) {
            (_, Some(created)) => created.attempt,
            (Some(last), None) => (last.attempt + 1).max(known),
            (None, None) => known,
        };
        plan.actions.push(Action::Start(Start {
            name: name.clone(),
            kind,
            sandbox: sandbox.clone(),
            attempt,
            backoff: never_started.map_or(restart.next, Container::backoff_seconds),
            leftovers: self
                .observed
                .instances(name)
                .iter()
                .filter(|i| i.state == ContainerState::Created)
                .map(|i| i.id.clone())
                .collect(),
        }));
    }

    fn restart(&self, last: &Container, kind: ContainerKind) -> Restart {
        let since = if self.facts.restart_after_kill.contains(&last.id) {
            // Nothing crashed: the wait counts from the end of the instance before.
            let before = self.observed.instances(&last.name);
            before.iter().filter(|i| i.id != last.id).find_map(|i| i.finished_at)
        } else {
            last.finished_at
        };
        let restart = plan_restart(last, since, self.max_backoff);
        if kind == ContainerKind::Init && last.succeeded() {
            // Runs again for a new sandbox, not because it crashed.
            return NO_WAIT;
        }
        restart
    }

    fn behind_an_earlier(&self, name: &str, kind: ContainerKind) -> bool {
        if kind != ContainerKind::Main {
            return false;
        }
        self.spec.containers.iter().take_while(|c| c.name != name).any(|c| {
            if self.facts.starting.contains(&c.name) {
                return true;
            }
            let failing = self.failing(&c.name)
                || self.facts.waits.get(&c.name).is_some_and(|wait| wait.due > self.now);
            let never_made =
                self.observed.latest(&c.name).is_none_or(|i| i.state == ContainerState::Created);
            never_made && !failing
        })
    }
}

/// Whether the pod names another image than the one this instance was made from. An instance that
/// another program made does not tell, and stays.
pub fn image_changed(container: &SpecContainer, instance: &Container) -> bool {
    match (instance.requested_image(), container.image.as_deref()) {
        (Some(was), Some(is)) => was != is,
        _ => false,
    }
}

/// What ends a pod: the instances to kill now. Empty while the kills in flight must finish first,
/// and once nothing runs. Main and init containers go together, then sidecars from the last to the
/// first (KEP-753).
pub fn plan_end(pod: &Pod, observed: &Observed, facts: &Facts) -> Vec<ContainerId> {
    let spec = spec_of(pod);
    let alive: Vec<&Container> = observed
        .containers
        .iter()
        .filter(|c| matches!(c.state, ContainerState::Running | ContainerState::Unknown))
        .collect();
    let sidecar_rank = |c: &Container| {
        init_containers(spec).iter().position(|i| i.name == *c.name && is_sidecar(i))
    };
    let (sidecars, others): (Vec<_>, Vec<_>) =
        alive.into_iter().partition(|c| sidecar_rank(c).is_some());
    let stage: Vec<&Container> = if others.is_empty() {
        let last = sidecars.iter().filter_map(|c| sidecar_rank(c)).max();
        sidecars.into_iter().filter(|c| sidecar_rank(c) == last).collect()
    } else {
        others
    };
    stage.iter().filter(|c| !facts.killing.contains(&c.id)).map(|c| c.id.clone()).collect()
}

/// When `activeDeadlineSeconds` ends the pod.
pub fn deadline(pod: &Pod, start_time: Option<Timestamp>) -> Option<Timestamp> {
    let seconds = spec_of(pod).active_deadline_seconds?;
    start_time?.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()
}
