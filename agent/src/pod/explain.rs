//! Why a pod does not run, or is not ready: what its worker knows and plans, in words. Pure; nothing
//! is decided anew here: the worker passes its own state, facts and plan.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container as SpecContainer, Pod, PodStatus};
use serde::{Deserialize, Serialize};

use super::backoff::go_duration;
use super::facts::{FAILED_CLAIMS, Facts, Failure, ProbeKind, Step};
use super::observed::{ContainerId, Observed};
use super::plan::{Action, KillCause, Plan, usable_sandbox};
use super::spec::{host_network, spec_of};
use super::status::Verdict;
use crate::ids::{NamespacedName, PodUid};
use crate::probe::Outcome;
use crate::source::PodSource;

mod containers;
mod ending;
mod render;

use ending::{finished, tearing_down, terminating};
pub use render::render;

/// Most of a probe's or the runtime's words that is passed on, in characters.
const MAX_WORDS: usize = 400;

/// The answer to `longshore explain pod`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// `manifest` or `API server`; none for an orphan that is being ended.
    pub source: Option<String>,
    /// Phase, as last published.
    pub phase: String,
    /// Whether condition Ready holds, as last published.
    pub ready: bool,
    /// Whether all is as it should be: ready, or its work is done.
    pub well: bool,
    /// What the pod's worker is at: `Running`, `Terminating`, `TearingDown`, `Finished`, `Held`.
    pub worker: String,
    /// What keeps it from running or being ready; the first ones hold back those that follow.
    pub reasons: Vec<Reason>,
    /// What is being done, and what is to be done next.
    pub planned: Vec<String>,
    /// When the worker plans again if nothing happens before.
    pub plans_again_at: Option<String>,
}

/// One reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    /// Whom it concerns.
    pub object: String,
    /// What is the matter.
    pub cause: String,
    /// What happens next, or what to do.
    pub next_step: String,
    /// When it is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<String>,
    /// The same, in seconds from now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_in_seconds: Option<i64>,
}

impl Reason {
    pub(super) fn new(
        object: impl Into<String>,
        cause: impl Into<String>,
        next_step: impl Into<String>,
    ) -> Self {
        Self {
            object: object.into(),
            cause: cause.into(),
            next_step: next_step.into(),
            retry_at: None,
            retry_in_seconds: None,
        }
    }

    fn again(mut self, at: Timestamp, now: Timestamp) -> Self {
        if at > now {
            self.retry_at = Some(whole(at).to_string());
            self.retry_in_seconds = Some(left(at, now));
        }
        self
    }
}

/// What the pod's worker is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage<'a> {
    /// Keeps the containers as the spec says.
    Running,
    /// Ends them.
    Terminating {
        /// When SIGKILL is due.
        kill_at: Option<Timestamp>,
        /// Instances that are to be ended next.
        next: Vec<ContainerId>,
    },
    /// Takes sandbox, volumes and cgroup away.
    TearingDown(&'a Step),
    /// Over.
    Finished,
}

/// One probe of a running instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probing {
    /// The instance.
    pub id: ContainerId,
    /// Which probe.
    pub kind: ProbeKind,
    /// What came of it last; `None` before the first time.
    pub last: Option<Checked>,
}

/// What came of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// When.
    pub at: Timestamp,
    /// What.
    pub outcome: Outcome,
    /// How often in a row it has failed by then; checks that could not be made do not count.
    pub failures: u32,
}

/// What an explanation is made from.
#[derive(Clone, Copy, Debug)]
pub struct ExplainInput<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Where it came from.
    pub source: Option<PodSource>,
    /// The status as last published.
    pub status: Option<&'a PodStatus>,
    /// What the runtime shows.
    pub observed: &'a Observed,
    /// What the worker knows beside it.
    pub facts: &'a Facts,
    /// What it would do now.
    pub plan: &'a Plan,
    /// What it is at.
    pub stage: &'a Stage<'a>,
    /// Why the pod was failed as a whole.
    pub verdict: Option<&'a Verdict>,
    /// Whether sandboxes may have addresses of the pod network.
    pub network_ready: bool,
    /// What the runtime said when it was last asked in vain.
    pub runtime_error: Option<&'a str>,
    /// Its probes.
    pub probes: &'a [Probing],
    /// When `activeDeadlineSeconds` ends it.
    pub deadline: Option<Timestamp>,
    /// Now.
    pub now: Timestamp,
}

/// Seconds from `now` to `at`, rounded up.
fn left(at: Timestamp, now: Timestamp) -> i64 {
    let left = at.duration_since(now);
    left.as_secs() + i64::from(left.subsec_nanos() > 0)
}

fn whole(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// `23s`, `1m5s`.
fn span(seconds: i64) -> String {
    go_duration(u64::try_from(seconds).unwrap_or(0))
}

/// The beginning of somebody else's words, on one line.
fn words(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_WORDS) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}

/// A static pod that waits for an older one of its name.
pub fn held(pod: &Pod) -> Explanation {
    let reason = Reason::new(
        "pod",
        "another pod of the same name from an earlier manifest is still being ended",
        "this one starts when the other is gone; `longshore explain pod UID` tells of the other",
    );
    Explanation {
        worker: "Held".into(),
        phase: "Pending".into(),
        reasons: vec![reason],
        ..named(pod, Some(PodSource::File))
    }
}

fn named(pod: &Pod, source: Option<PodSource>) -> Explanation {
    let key = NamespacedName::of_pod(pod);
    let source = source.map(|source| match source {
        PodSource::File => "manifest".to_owned(),
        PodSource::Cluster => "API server".to_owned(),
    });
    Explanation {
        namespace: key.namespace.to_string(),
        name: key.name.to_string(),
        uid: PodUid::of(pod).to_string(),
        source,
        ..Default::default()
    }
}

/// Explains a pod.
pub fn explain(input: ExplainInput<'_>) -> Explanation {
    let condition =
        |kind: &str| input.status?.conditions.iter().flatten().find(|c| c.type_ == kind);
    let phase = input.status.and_then(|s| s.phase.clone()).unwrap_or_else(|| "Pending".into());
    let ready = condition("Ready").is_some_and(|c| c.status == "True");
    let mut reasons = Vec::new();
    if let Some(error) = input.runtime_error {
        reasons.push(Reason::new(
            "container runtime",
            format!("does not answer: {}", words(error)),
            "nothing is decided for the pod until it does; `longshore status` names its endpoint",
        ));
    }
    if let Some(verdict) = input.verdict {
        reasons.push(failed_whole(verdict));
    }
    match input.stage {
        Stage::Running => running(&input, &mut reasons),
        Stage::Terminating { kill_at, .. } => reasons.push(terminating(&input, *kill_at)),
        Stage::TearingDown(step) => reasons.push(tearing_down(&input, step)),
        Stage::Finished => reasons.extend(finished(&input, &phase)),
    }
    let gates = condition("Ready").filter(|c| {
        *input.stage == Stage::Running && c.reason.as_deref() == Some("ReadinessGatesNotReady")
    });
    if let Some(gates) = gates {
        reasons.push(Reason::new(
            "readiness gates",
            gates.message.clone().unwrap_or_default(),
            "whoever owns the condition (a load balancer's controller, say) must set it to True in \
             the pod's status",
        ));
    }
    let stage = match input.stage {
        Stage::Running => "Running",
        Stage::Terminating { .. } => "Terminating",
        Stage::TearingDown(_) => "TearingDown",
        Stage::Finished => "Finished",
    };
    let well = match input.stage {
        Stage::Running => ready && input.runtime_error.is_none(),
        _ => phase == "Succeeded",
    };
    let again = (*input.stage == Stage::Running).then_some(input.plan.wake_at).flatten();
    Explanation {
        phase,
        ready,
        well,
        worker: stage.into(),
        reasons,
        planned: planned(&input),
        plans_again_at: again.map(|at| whole(at).to_string()),
        ..named(input.pod, input.source)
    }
}

/// The pod was refused, evicted, or outlived its deadline.
fn failed_whole(verdict: &Verdict) -> Reason {
    let next = match &*verdict.reason {
        "Evicted" if verdict.message.contains("node had condition") => {
            "free what the node is short of (`kubectl describe node` says since when); its \
             controller makes another meanwhile"
        }
        "Evicted" => "its controller makes another; raise the limit it was over, or use less",
        "Terminated" | "NodeShutdown" => {
            "the machine was shutting down: its controller makes another; a static pod runs again at \
             the next start"
        }
        "DeadlineExceeded" => "raise activeDeadlineSeconds, or leave it out",
        "NodeAffinity" | "NodeName" | "Taints" => {
            "the node's labels or taints do not let it run here: change them, or the pod; then make \
             it anew"
        }
        reason if reason.starts_with("OutOf") => {
            "free resources of the node, or ask for less; then make the pod anew"
        }
        _ => "the pod is not tried again: remove the cause, then make it anew",
    };
    Reason::new("pod", format!("{}: {}", verdict.reason, words(&verdict.message)), next)
}

/// A resize that waits or fails; the containers run on with what they have.
fn resize(input: &ExplainInput<'_>, reasons: &mut Vec<Reason>) {
    let resize = &input.facts.resize;
    if let Some(pending) = &resize.pending {
        reasons.push(Reason::new(
            "resize",
            format!("{}: {}", pending.reason, words(&pending.message)),
            "it runs on with what it has; the resize is taken up as soon as other pods leave room, \
             or ask for less",
        ));
    }
    match (&resize.step, &resize.progress) {
        (Step::Failed(failed), _) => reasons.push(failure(
            "resize",
            failed,
            "it runs on with what it has; use less, or ask for more",
            input.now,
        )),
        (_, Some(_)) => reasons.push(Reason::new(
            "resize",
            "is being put into effect",
            "Event ResizeCompleted says when it is",
        )),
        _ => {}
    }
}

/// A failed step with its words and the time of the next try.
fn failure(object: impl Into<String>, failure: &Failure, next: &str, now: Timestamp) -> Reason {
    let times = match failure.count {
        0 | 1 => String::new(),
        count => format!(" ({count} times in a row)"),
    };
    let cause = format!("{}: {}{times}", failure.reason, words(&failure.message));
    Reason::new(object, cause, next).again(failure.retry_at, now)
}

fn running(input: &ExplainInput<'_>, reasons: &mut Vec<Reason>) {
    if input.facts.devices == Step::Busy {
        reasons.push(Reason::new(
            "devices",
            "are being allocated by their device plugin",
            "it has two minutes; see the log of the plugin's pod if it does not answer",
        ));
        return;
    }
    sandbox(input, reasons);
    match &input.facts.volumes {
        Step::Failed(failed) => reasons.push(failure(
            "volumes",
            failed,
            "make what it names (a missing ConfigMap or Secret is taken up when it appears)",
            input.now,
        )),
        Step::Busy => reasons.push(Reason::new(
            "volumes",
            "are being put in place",
            "containers start when they are there",
        )),
        Step::Wanted | Step::Done => {}
    }
    containers::explain(input, reasons);
    resize(input, reasons);
    if let Some(at) = input.deadline.filter(|at| *at > input.now && left(*at, input.now) <= 60) {
        reasons.push(Reason::new(
            "pod",
            format!("activeDeadlineSeconds ends it in {}", span(left(at, input.now))),
            "raise activeDeadlineSeconds if it should go on",
        ));
    }
}

fn sandbox(input: &ExplainInput<'_>, reasons: &mut Vec<Reason>) {
    if usable_sandbox(input.pod, input.observed).is_some() {
        return;
    }
    let networked = !host_network(spec_of(input.pod));
    let reason = match &input.facts.sandbox {
        Step::Failed(failed) if failed.reason == FAILED_CLAIMS => failure(
            "resource claims",
            failed,
            "`kubectl describe resourceclaim` shows what is allocated and for whom; see the log of the \
             DRA driver's pod on this node",
            input.now,
        ),
        Step::Failed(failed) => failure(
            "sandbox",
            failed,
            "the runtime's words name the cause (a CNI plugin's error, a missing RuntimeClass \
             handler): remove it; `longshore doctor` checks the node's network",
            input.now,
        ),
        Step::Busy if claims(input.pod) => Reason::new(
            "resource claims",
            "are prepared by their DRA drivers, and the sandbox is made after that",
            "a driver has 45 s; see the log of its pod on this node if it does not answer",
        ),
        Step::Busy if networked && !input.network_ready => Reason::new(
            "pod network",
            "the node has no podCIDR yet, or its network is not ready, so that no sandbox is made",
            "the cluster's controller-manager assigns podCIDRs (--allocate-node-cidrs), the network \
             add-on its configuration in /etc/cni/net.d; it goes on at once when they are there",
        ),
        Step::Busy if networked => Reason::new(
            "sandbox",
            "is being made: its cgroup, namespaces and network (CNI plugins take the longest)",
            "wait; a plugin that hangs is ended and told as an Event",
        ),
        Step::Busy => Reason::new("sandbox", "is being made: its cgroup and namespaces", "wait"),
        Step::Wanted | Step::Done => match input.observed.sandboxes.first() {
            Some(newest) if newest.ready => Reason::new(
                format!("sandbox {}", newest.id),
                "is ready but has no address",
                "it is made anew",
            ),
            Some(newest) => Reason::new(
                format!("sandbox {}", newest.id),
                "is not ready: it has ended, or the node was restarted",
                "what still runs in it is ended, then another is made",
            ),
            None => Reason::new("sandbox", "is not made yet", "it is made next"),
        },
    };
    reasons.push(reason);
}

/// Whether DRA drivers come before the pod's sandbox.
fn claims(pod: &Pod) -> bool {
    let extended = pod.status.as_ref().and_then(|s| s.extended_resource_claim_status.as_ref());
    spec_of(pod).resource_claims.is_some() || extended.is_some()
}

/// What is in flight, and what the plan says to do now.
fn planned(input: &ExplainInput<'_>) -> Vec<String> {
    let facts = input.facts;
    let mut all = Vec::new();
    if facts.devices == Step::Busy {
        all.push("in progress: allocate devices".to_owned());
    }
    if facts.volumes == Step::Busy {
        all.push("in progress: put volumes in place".to_owned());
    }
    if facts.sandbox == Step::Busy {
        all.push("in progress: make the sandbox".to_owned());
    }
    for (name, (step, _)) in &facts.images {
        if *step == Step::Busy {
            all.push(format!("in progress: see that the image of container {name} is here"));
        }
    }
    let mut starting: Vec<&String> = facts.starting.iter().collect();
    starting.sort();
    all.extend(starting.into_iter().map(|name| format!("in progress: start container {name}")));
    let mut killing: Vec<&ContainerId> = facts.killing.iter().collect();
    killing.sort();
    let name_of = |id: &ContainerId| {
        input.observed.container(id).map_or_else(|| id.to_string(), |c| c.name.to_string())
    };
    all.extend(killing.into_iter().map(|id| format!("in progress: end container {}", name_of(id))));
    match input.stage {
        Stage::Running => {
            all.extend(input.plan.actions.iter().map(|a| format!("next: {}", action(a))))
        }
        Stage::Terminating { next, .. } => {
            all.extend(next.iter().map(|id| format!("next: end container {}", name_of(id))));
        }
        Stage::TearingDown(Step::Busy) => all.push("in progress: clean up after the pod".into()),
        Stage::TearingDown(_) => all.push("next: clean up after the pod".into()),
        Stage::Finished => {}
    }
    all
}

fn action(action: &Action) -> String {
    match action {
        Action::MountVolumes => "put volumes in place".to_owned(),
        Action::CreateSandbox { attempt: 0, .. } => "make the sandbox".to_owned(),
        Action::CreateSandbox { attempt, .. } => format!("make sandbox number {}", attempt + 1),
        Action::EnsureImage { name } => format!("see that the image of container {name} is here"),
        Action::Start(start) if start.attempt == 0 => format!("start container {}", start.name),
        Action::Start(start) => {
            format!("start container {} (restart {})", start.name, start.attempt)
        }
        Action::Reset { .. } => {
            "remove all containers, to start the pod again (RestartAllContainers)".to_owned()
        }
        Action::Kill { name, cause, .. } => {
            let why = match cause {
                KillCause::Probe(kind) => {
                    format!("its {} probe failed", kind.title().to_lowercase())
                }
                KillCause::Changed => "the pod names another image".to_owned(),
                KillCause::Resized => "its new resources need a restart (resizePolicy)".to_owned(),
                KillCause::RestartAll => {
                    "the end of another one restarts all (RestartAllContainers)".to_owned()
                }
                KillCause::Unknown => "the runtime lost track of it".to_owned(),
                KillCause::SandboxChanged => "its sandbox is gone".to_owned(),
                KillCause::PodEnds => "the pod's work is over".to_owned(),
            };
            format!("end container {name}: {why}")
        }
    }
}

/// How long ago, for people.
fn ago(at: Timestamp, now: Timestamp) -> String {
    format!("{} ago", span(now.duration_since(at).max(SignedDuration::ZERO).as_secs()))
}

/// A container by what it is to the pod.
fn title(container: &SpecContainer, kind: super::spec::ContainerKind) -> String {
    use super::spec::ContainerKind as Kind;
    let what = match kind {
        Kind::Main => "container",
        Kind::Init => "init container",
        Kind::Sidecar => "sidecar",
        Kind::Ephemeral => "ephemeral container",
    };
    format!("{what} {}", container.name)
}
