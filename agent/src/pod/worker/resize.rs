//! Resources changed in place (KEP-1287): what the pod has been given is put into effect in its
//! cgroup and its running containers, or a container restarted where its `resizePolicy` asks for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use cri_shim::api::LinuxContainerResources;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as SpecContainer, Pod, ResourceRequirements};

use super::{Done, Step, Worker};
use crate::ids::PodUid;
use crate::pod::allocation::{Progress, summary};
use crate::pod::config::resources::PodLimits;
use crate::pod::config::sandbox;
use crate::pod::deps::Deps;
use crate::pod::observed::{ContainerId, ContainerState, SandboxId};
use crate::pod::plan::{KillCause, usable_sandbox};
use crate::pod::qos::qos_class;
use crate::pod::spec::{init_containers, spec_of};
use crate::report::EventType;
use crate::runtime::RuntimeErrorKind;

/// First and longest wait before a resize that failed is tried again, in seconds.
const RETRY: (i64, i64) = (5, 60);

/// What one container has: in the kernel's numbers, and as its spec said it.
#[derive(Clone, Debug, PartialEq)]
struct Share {
    linux: LinuxContainerResources,
    spec: Option<ResourceRequirements>,
}

impl Share {
    fn of(pod: &Pod, container: &SpecContainer, deps: &Deps) -> Self {
        Self { linux: deps.container_resources(pod, container), spec: container.resources.clone() }
    }
}

/// What the pod's cgroup and its instances were last given.
#[derive(Debug)]
pub(super) struct Given {
    /// By instance; `None` is not known.
    instances: HashMap<ContainerId, Option<Share>>,
    /// What the instance of this container is made with that is being started.
    made: HashMap<String, Share>,
    pod: Option<PodLimits>,
    /// An earlier agent was in the midst of a resize: what was there before us is not known.
    midst: bool,
}

impl Given {
    pub(super) fn new(midst: bool) -> Self {
        Self { instances: HashMap::new(), made: HashMap::new(), pod: None, midst }
    }

    /// Notes what `container` is made with.
    pub(super) fn made(&mut self, pod: &Pod, container: &SpecContainer, deps: &Deps) {
        self.made.insert(container.name.clone(), Share::of(pod, container, deps));
    }
}

/// What is to be put into effect.
#[derive(Debug, Default)]
pub(super) struct Job {
    /// Of the pod's cgroup: what it has, if that is known, and what it is to have.
    pod: Option<(Option<PodLimits>, PodLimits)>,
    instances: Vec<Change>,
}

#[derive(Debug)]
struct Change {
    id: ContainerId,
    name: String,
    from: Option<Share>,
    to: Share,
}

/// Whether a change from `old` to `new` restarts the container.
fn restarts(
    container: &SpecContainer,
    old: &LinuxContainerResources,
    new: &LinuxContainerResources,
) -> bool {
    let asks = |resource: &str| {
        let policies = container.resize_policy.iter().flatten();
        policies
            .into_iter()
            .any(|p| p.resource_name == resource && p.restart_policy == "RestartContainer")
    };
    let cpu = (old.cpu_shares, old.cpu_quota) != (new.cpu_shares, new.cpu_quota);
    let memory = old.memory_limit_in_bytes != new.memory_limit_in_bytes;
    (cpu && asks("cpu")) || (memory && asks("memory"))
}

impl Worker {
    /// The pod has been given other resources.
    pub(super) fn resized(&mut self, generation: Option<i64>) {
        let resize = &mut self.facts.resize;
        resize.progress = Some(Progress { generation, error: None });
        if matches!(resize.step, Step::Failed(_)) {
            resize.step = Step::Wanted;
        }
    }

    /// Begins what changed resources ask for; gives when to look again.
    pub(super) fn reconcile_resources(&mut self, now: Timestamp) -> Option<Timestamp> {
        let pod = self.pod.clone();
        let spec = spec_of(&pod);
        let mut job = Job::default();
        let mut has = BTreeMap::new();
        let mut restarting = false;
        for container in spec.containers.iter().chain(init_containers(spec)) {
            let latest = self.observed.latest(&container.name);
            let Some(instance) = latest.filter(|i| i.state == ContainerState::Running) else {
                continue;
            };
            let id = instance.id.clone();
            let to = Share::of(&pod, container, &self.deps);
            let given = &mut self.resources;
            let from = given
                .instances
                .entry(id.clone())
                .or_insert_with(|| match given.made.remove(&container.name) {
                    Some(made) => Some(made),
                    // What a container of an earlier agent was made with it has.
                    None => (!given.midst).then(|| to.clone()),
                })
                .clone();
            match from {
                Some(from) if from.linux == to.linux => {
                    self.resources.instances.insert(id, Some(to));
                }
                Some(from) if restarts(container, &from.linux, &to.linux) => {
                    has.insert(id.clone(), from.spec);
                    restarting = true;
                    if !self.facts.killing.contains(&id) {
                        self.kill(id, &container.name, KillCause::Resized);
                    }
                }
                from => {
                    if let Some(from) = &from {
                        has.insert(id.clone(), from.spec.clone());
                    }
                    job.instances.push(Change { id, name: container.name.clone(), from, to });
                }
            }
        }
        let observed = &self.observed;
        self.resources.instances.retain(|id, _| observed.container(id).is_some());
        let sandbox = usable_sandbox(&pod, observed).map(|s| s.id.clone());
        if sandbox.is_some() {
            let wanted = self.deps.pod_limits(&pod);
            if self.resources.pod.is_none() && !self.resources.midst {
                self.resources.pod = Some(wanted);
                self.deps.cgroups.known(&self.uid, qos_class(&pod), wanted);
            }
            let known = self.resources.pod;
            // What an instance has that is yet to end still needs its room.
            let to = known.filter(|_| restarting).map_or(wanted, |has| has.room_for(wanted));
            job.pod = (known != Some(to)).then_some((known, to));
        }
        self.facts.resize.has = has;
        let idle = job.instances.is_empty() && job.pod.is_none();
        if let (false, Some(sandbox)) = (idle, sandbox) {
            self.facts.resize.progress.get_or_insert_with(|| Progress {
                generation: pod.metadata.generation,
                error: None,
            });
            if self.facts.resize.step.due(now) {
                self.resize(job, sandbox);
            }
        } else if !restarting && self.facts.resize.step != Step::Busy {
            self.facts.resize.step = Step::Wanted;
            if let Some(progress) = self.facts.resize.progress.take() {
                let message = summary("Pod resize completed", &pod, progress.generation, "");
                self.deps.pod_event(&pod, EventType::Normal, "ResizeCompleted", message);
            }
        }
        self.facts.resize.step.retry_at()
    }

    fn resize(&mut self, job: Job, sandbox: SandboxId) {
        let count = match &self.facts.resize.step {
            Step::Failed(failure) => failure.count,
            _ => 0,
        };
        self.facts.resize.step = Step::Busy;
        let (deps, pod, uid) = (self.deps.clone(), self.pod.clone(), self.uid.clone());
        self.begin_task(async move {
            let result = apply_resize(&deps, &pod, &uid, &sandbox, &job).await;
            Done::Resized(count, job, result)
        });
    }

    pub(super) fn resize_done(&mut self, count: u32, job: Job, result: Result<(), String>) {
        match result {
            Ok(()) => {
                if let Some((_, limits)) = job.pod {
                    self.resources.pod = Some(limits);
                }
                for change in job.instances {
                    self.resources.instances.insert(change.id, Some(change.to));
                }
                self.facts.resize.step = Step::Wanted;
            }
            Err(message) => {
                // Part of it may be in effect: all of it is done again.
                let failure = self.failure("ResizeError", message.clone(), count, RETRY.0, RETRY.1);
                self.facts.resize.step = Step::Failed(failure);
                let Some(progress) = &mut self.facts.resize.progress else { return };
                if progress.error.as_ref() == Some(&message) {
                    return;
                }
                let text = summary("Pod resize error", &self.pod, progress.generation, &message);
                progress.error = Some(message);
                self.deps.pod_event(&self.pod, EventType::Warning, "ResizeError", text);
            }
        }
    }
}

/// Room in the pod's cgroup first; what shrinks below the containers' shrinks after them.
async fn apply_resize(
    deps: &Deps,
    pod: &Arc<Pod>,
    uid: &PodUid,
    sandbox: &SandboxId,
    job: &Job,
) -> Result<(), String> {
    check_memory(deps, sandbox, job).await?;
    let qos = qos_class(pod);
    let set = |limits| async move {
        let set = deps.cgroups.ensure(uid, qos, limits).await;
        set.map(drop).map_err(|e| e.to_string())
    };
    if job.pod.is_some() {
        tell_runtime(deps, pod, sandbox).await?;
    }
    let room = job.pod.map(|(has, wanted)| has.map_or(wanted, |has| has.room_for(wanted)));
    let has = job.pod.and_then(|(has, _)| has);
    if let Some(room) = room.filter(|room| Some(*room) != has) {
        set(room).await?;
    }
    for change in &job.instances {
        deps.runtime
            .update_container_resources(change.id.as_str(), change.to.linux.clone())
            .await
            .map_err(|error| format!("resize container {}: {error}", change.name))?;
    }
    match job.pod {
        Some((_, wanted)) if room != Some(wanted) => set(wanted).await,
        _ => Ok(()),
    }
}

/// Tells the runtime what the pod's cgroup will have, before it has it: a runtime that cannot follow
/// refuses the resize. Not every runtime knows the call.
async fn tell_runtime(deps: &Deps, pod: &Pod, sandbox: &SandboxId) -> Result<(), String> {
    let told = deps.runtime.update_pod_sandbox_resources(
        sandbox.as_str(),
        sandbox::overhead(pod),
        sandbox::resources(pod, deps.pod_limits(pod), &deps.node),
    );
    match told.await {
        // containerd 2.2 has no code for it.
        Err(error)
            if error.kind != RuntimeErrorKind::Unimplemented
                && !error.message.contains("not implemented") =>
        {
            Err(format!("resize the pod's sandbox: {error}"))
        }
        _ => Ok(()),
    }
}

/// Refuses limits below what is in use: the kernel would kill for them.
async fn check_memory(deps: &Deps, sandbox: &SandboxId, job: &Job) -> Result<(), String> {
    let shrinks = |from: i64, to: i64| to > 0 && (from <= 0 || to < from);
    let pod = job.pod.and_then(|(has, wanted)| {
        let (from, to) = (has?.memory.unwrap_or(0), wanted.memory.unwrap_or(0));
        shrinks(from, to).then_some(to)
    });
    let shrinking: Vec<(&Change, i64)> = job
        .instances
        .iter()
        .filter_map(|change| {
            let from = change.from.as_ref()?.linux.memory_limit_in_bytes;
            let to = change.to.linux.memory_limit_in_bytes;
            shrinks(from, to).then_some((change, to))
        })
        .collect();
    if pod.is_none() && shrinking.is_empty() {
        return Ok(());
    }
    let stats = deps
        .runtime
        .list_container_stats(Some(sandbox.as_str()))
        .await
        .map_err(|error| format!("unable to read memory usage: {error}"))?;
    let mut sum = 0u64;
    let mut used: HashMap<&str, u64> = HashMap::new();
    for of in &stats {
        let bytes = of.memory.as_ref().and_then(|m| m.usage_bytes.as_ref()).map(|v| v.value);
        if let (Some(attributes), Some(bytes)) = (&of.attributes, bytes) {
            sum = sum.saturating_add(bytes);
            used.insert(&attributes.id, bytes);
        }
    }
    let below = |used: u64, limit: i64| u64::try_from(limit).is_ok_and(|limit| used >= limit);
    let mut refused = Vec::new();
    if let Some(limit) = pod.filter(|limit| below(sum, *limit)) {
        refused.push(format!(
            "attempting to set pod memory limit ({limit}) below current usage ({sum})"
        ));
    }
    for (Change { id, name, .. }, limit) in shrinking {
        if let Some(used) = used.get(id.as_str()).filter(|used| below(**used, limit)) {
            refused.push(format!(
                "attempting to set container {name:?} memory limit ({limit}) below current usage ({used})"
            ));
        }
    }
    let text = match &refused[..] {
        [] => return Ok(()),
        [one] => one.clone(),
        several => format!("[{}]", several.join(", ")),
    };
    Err(format!("cannot decrease memory limits: {text}"))
}
