//! One task per pod UID: it looks at what is, asks `plan` what to do, does it, tells `status`.
//!
//! The task itself never waits for an effect other than a look at the runtime: whatever takes time
//! runs beside it and comes back as `Done`. So a pod can be deleted at any instant, and one that
//! hangs holds up nobody else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::allocation::{Allocation, Pending, Progress};
use super::deps::Deps;
use super::explain::Explanation;
use super::facts::{Facts, Failure, ProbeKind, Step};
use super::observed::{ContainerId, Observed};
use super::plan::{Action, BackingOff, deadline, plan};
use super::spec::{find_container, grace_seconds, spec_of};
use super::status::{Ending, Verdict, is_terminal};
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::{METRICS, VolumeWork, volume_plugin};
use crate::objects::ObjectRef;
use crate::report::EventType;
use crate::source::PodSource;
use crate::traces::{self, FutureExt};

mod devices;
mod done;
mod end;
mod explain;
mod kill;
mod observe;
mod placement;
mod probes;
mod publish;
mod resize;
mod sandbox;
mod start;
mod teardown;

use done::Done;

/// How long a pod whose teardown failed waits before it is tried again, in seconds.
const TEARDOWN_RETRY_SECONDS: i64 = 5;

/// How long the end of a pod waits for a sandbox that is being made.
const SANDBOX_PATIENCE: SignedDuration = SignedDuration::from_secs(5);

/// Why a pod must go, and how long it has at most.
#[derive(Clone, Debug)]
pub(crate) struct Eviction {
    /// What is told of it.
    pub(crate) verdict: Verdict,
    /// At most; the pod's own grace period may be shorter.
    pub(crate) grace: SignedDuration,
    /// The annotations of the Event that says so; `None` is no Event.
    pub(crate) event: Option<BTreeMap<String, String>>,
}

/// What a worker is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// The object changed.
    Pod(Arc<Pod>, Option<Pending>),
    /// The pod is no longer wanted: end it and leave nothing.
    Remove,
    /// Something happened to this sandbox or container of the pod.
    Look(String),
    /// Look at everything of the pod.
    LookAtAll,
    /// It uses more than it may, or than the node can spare: end it.
    Evict(Eviction),
    /// A probe's verdict.
    Probe(ContainerId, ProbeKind, bool),
    /// Its devices' health changed.
    Devices,
    /// The CPUs that containers share may have changed.
    Cpus,
    /// Somebody asks why the pod is as it is.
    Explain(oneshot::Sender<Explanation>),
}

/// Where the pod is in its life on this node.
///
/// `Running` -> `Terminating` -> `TearingDown` -> `Finished` -> `TearingDown` (everything) -> `Gone`;
/// a pod that is no longer wanted skips `Finished`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its containers are kept as the spec says.
    Running,
    /// Its containers are being ended.
    Terminating,
    /// Nothing runs; sandbox, volumes and cgroup are taken away, and all the rest if `everything`.
    TearingDown {
        /// Dead containers, sandboxes and logs go, too.
        everything: bool,
    },
    /// Over; its dead containers and logs are kept until the object goes.
    Finished,
    /// Nothing is left.
    Gone,
}

/// How a worker begins.
pub(crate) struct Begin {
    pub(crate) pod: Arc<Pod>,
    pub(crate) source: Option<PodSource>,
    /// The runtime may hold something of it already.
    pub(crate) adopt: bool,
    /// It is no longer wanted.
    pub(crate) remove: bool,
    /// Its status as an earlier agent saved it.
    pub(crate) saved: Option<PodStatus>,
    /// It is refused.
    pub(crate) verdict: Option<Verdict>,
    /// It asks for more than it has.
    pub(crate) pending: Option<Pending>,
    /// Told when the pod uses nothing of the node any more.
    pub(crate) over: mpsc::UnboundedSender<PodUid>,
}

/// What a worker has not looked at since it changed.
#[derive(Default)]
struct Stale {
    all: bool,
    ids: BTreeSet<String>,
    /// Of steps in flight that have not said yet what they made.
    early: BTreeSet<String>,
    retry_at: Option<Timestamp>,
}

pub(crate) struct Worker {
    deps: Arc<Deps>,
    uid: PodUid,
    pod: Arc<Pod>,
    source: Option<PodSource>,
    inbox: mpsc::UnboundedReceiver<Message>,
    outbox: mpsc::UnboundedSender<Message>,
    state: State,
    remove: bool,
    verdict: Option<Verdict>,
    observed: Observed,
    stale: Stale,
    facts: Facts,
    backing_off: Vec<BackingOff>,
    shown_backing_off: HashMap<String, u64>,
    previous: Option<PodStatus>,
    /// Whether this process has told a status: what an earlier one saved may not have arrived.
    told: bool,
    start_time: Timestamp,
    tasks: JoinSet<Done>,
    /// The span of this turn, once it has begun something; it ends with the last of what it began.
    turn: Option<traces::Context>,
    /// Image pulls, which an end of the pod does not wait for.
    pulls: HashMap<String, AbortHandle>,
    ending: watch::Sender<bool>,
    /// The sandbox being made.
    making: Option<AbortHandle>,
    /// Since when the pod ends.
    ends_since: Option<Timestamp>,
    /// Grace that an end on the node's own account leaves at most.
    grace_limit: Option<SignedDuration>,
    /// When SIGKILL is due for a pod that ends.
    kill_at: Option<Timestamp>,
    teardown: Step,
    /// What the sandbox of this number was made from.
    sandbox_config: Option<(u32, Arc<cri_shim::api::PodSandboxConfig>)>,
    /// Told when the pod uses nothing of the node any more.
    over: Option<mpsc::UnboundedSender<PodUid>>,
    /// Devices that are being allocated.
    allocating: Option<AbortHandle>,
    probes: HashMap<(ContainerId, ProbeKind), probes::Running>,
    objects: Option<broadcast::Receiver<ObjectRef>>,
    /// What the pod's cgroup and running instances have.
    resources: resize::Given,
    /// On which CPUs they run.
    placed: placement::Placed,
}

impl Worker {
    pub(crate) fn new(
        deps: Arc<Deps>,
        begin: Begin,
        inbox: mpsc::UnboundedReceiver<Message>,
        outbox: mpsc::UnboundedSender<Message>,
    ) -> Self {
        let uid = PodUid::of(&begin.pod);
        let previous = begin.saved.or_else(|| begin.pod.status.clone());
        let now = deps.clock.now();
        let conditions = previous.as_ref().and_then(|s| s.conditions.as_ref());
        // How far an earlier agent came is not known.
        let progress = Progress::of(conditions);
        let resources = resize::Given::new(progress.is_some());
        let mut facts = Facts::default();
        (facts.resize.pending, facts.resize.progress) = (begin.pending, progress);
        let start_time = previous.as_ref().and_then(|s| s.start_time.as_ref()).map_or(now, |t| t.0);
        Self {
            deps,
            uid,
            pod: begin.pod,
            source: begin.source,
            inbox,
            outbox,
            state: State::Running,
            remove: begin.remove,
            verdict: begin.verdict,
            observed: Observed::default(),
            stale: Stale { all: begin.adopt, ..Default::default() },
            facts,
            backing_off: Vec::new(),
            shown_backing_off: HashMap::new(),
            previous,
            told: false,
            start_time,
            tasks: JoinSet::new(),
            turn: None,
            pulls: HashMap::new(),
            ending: watch::Sender::new(false),
            making: None,
            ends_since: None,
            grace_limit: None,
            kill_at: None,
            teardown: Step::Wanted,
            sandbox_config: None,
            over: Some(begin.over),
            allocating: None,
            probes: HashMap::new(),
            objects: None,
            resources,
            placed: placement::Placed::default(),
        }
    }

    /// Runs until nothing of the pod is left.
    pub(crate) async fn run(mut self) {
        let adopted = self.stale.all;
        let mut seeded = false;
        loop {
            let looked = self.refresh().await;
            if looked && !seeded {
                seeded = true;
                if adopted {
                    self.seed().await;
                }
            }
            let began = std::time::Instant::now();
            let wake_at = if looked { self.reconcile() } else { self.stale.retry_at };
            self.turn = None;
            METRICS.worker_turned(began.elapsed());
            if self.state == State::Gone {
                return;
            }
            self.wait(wake_at).await;
        }
    }

    /// Waits for the first thing to happen, and takes in all that has happened.
    async fn wait(&mut self, wake_at: Option<Timestamp>) {
        let now = self.deps.clock.now();
        let sleep = wake_at.map(|at| {
            Duration::try_from(at.duration_since(now)).unwrap_or_default()
                // Timers fire on whole milliseconds; wake after, not before.
                + Duration::from_millis(1)
        });
        let timer = async {
            match sleep {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        let objects = async {
            match &mut self.objects {
                Some(objects) => {
                    // A lag is a change like any other.
                    if let Err(broadcast::error::RecvError::Closed) = objects.recv().await {
                        std::future::pending::<()>().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = self.inbox.recv() => {
                if let Some(message) = message {
                    self.take(message);
                }
            }
            Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                self.joined(done);
            }
            () = objects => self.objects_changed(),
            () = timer => {}
        }
        while let Ok(message) = self.inbox.try_recv() {
            self.take(message);
        }
        while let Some(done) = self.tasks.try_join_next() {
            self.joined(done);
        }
    }

    fn joined(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(done) => self.done(done),
            // What was called off: a pull, a sandbox, or devices.
            Err(error) if error.is_cancelled() => {
                if self.allocating.as_ref().is_some_and(|task| task.id() == error.id()) {
                    self.allocating = None;
                    self.facts.devices = Step::Wanted;
                }
            }
            Err(error) => {
                tracing::error!(pod = %NamespacedName::of_pod(&self.pod), %error, "pod task failed");
                self.stale.all = true;
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Pod(pod, pending) => self.pod_changed(pod, pending),
            Message::Remove => self.remove = true,
            Message::Look(id) => {
                self.stale.ids.insert(id);
            }
            Message::LookAtAll => self.stale.all = true,
            Message::Evict(eviction) => self.evict(eviction),
            // The next turn tells of it.
            Message::Devices | Message::Cpus => {}
            Message::Probe(id, kind, healthy) => self.probed(id, kind, healthy),
            Message::Explain(reply) => {
                // Whoever asked may not wait any more.
                let _ = reply.send(self.explanation());
            }
        }
    }

    fn pod_changed(&mut self, pod: Arc<Pod>, pending: Option<Pending>) {
        self.facts.resize.pending = pending;
        if !Allocation::asked(&self.pod).is_asked_by(&pod) {
            self.resized(pod.metadata.generation);
        }
        self.pod = pod;
        self.deps.volumes.pod_changed(&self.pod);
        if self.state == State::Terminating && self.pod.metadata.deletion_timestamp.is_some() {
            // A second deletion may shorten the time, never lengthen it.
            self.kill_within(SignedDuration::from_secs(grace_seconds(&self.pod)));
        }
    }

    /// Failures that a ConfigMap or Secret may have caused are tried again at once.
    fn objects_changed(&mut self) {
        if let Step::Failed(failure) = &mut self.facts.volumes {
            failure.retry_at = Timestamp::MIN;
        }
        for failure in self.facts.failures.values_mut() {
            if failure.reason == "CreateContainerConfigError" {
                failure.retry_at = Timestamp::MIN;
            }
        }
    }

    fn deleted(&self) -> bool {
        self.remove || self.pod.metadata.deletion_timestamp.is_some()
    }

    /// One step: from what is known to what is begun. Gives when to look again.
    fn reconcile(&mut self) -> Option<Timestamp> {
        let now = self.deps.clock.now();
        let mut wake_at = None;
        if self.state == State::Running {
            wake_at = self.keep(now);
        }
        if self.state == State::Terminating {
            wake_at = self.end(now);
        }
        if let State::TearingDown { everything } = self.state {
            if !everything && self.deleted() && self.teardown != Step::Busy {
                self.state = State::TearingDown { everything: true };
                self.teardown = Step::Wanted;
            }
            self.tear_down(now);
            wake_at = self.teardown.retry_at();
        }
        if self.state == State::Finished {
            if self.deleted() {
                self.state = State::TearingDown { everything: true };
                self.teardown = Step::Wanted;
                self.tear_down(now);
            } else {
                self.publish(now, Ending::Terminated);
            }
        }
        let failing = matches!(self.facts.volumes, Step::Failed(_))
            || self.facts.failures.values().any(|f| f.reason == "CreateContainerConfigError");
        if self.state == State::Running && failing {
            if self.objects.is_none() {
                self.objects = Some(self.deps.objects.changes());
            }
        } else {
            self.objects = None;
        }
        wake_at
    }

    /// Keeps a running pod as its spec says.
    fn keep(&mut self, now: Timestamp) -> Option<Timestamp> {
        let deadline = deadline(&self.pod, Some(self.start_time));
        if self.verdict.is_none() && deadline.is_some_and(|at| at <= now) {
            let message =
                "Pod was active on the node longer than the specified deadline".to_owned();
            let reason = "DeadlineExceeded".to_owned();
            self.deps.pod_event(&self.pod, EventType::Normal, &reason, message.clone());
            self.verdict = Some(Verdict { message, ..Verdict::new(&reason) });
        }
        let over = is_terminal(self.previous.as_ref().and_then(|s| s.phase.as_deref()));
        if self.deleted() || self.verdict.is_some() || over {
            self.begin_end(now);
            return None;
        }
        if !self.has_devices() {
            self.publish(now, Ending::Not);
            return deadline;
        }
        let max_backoff = self.deps.node.max_restart_backoff.as_secs();
        let plan = plan(&self.pod, &self.observed, &self.facts, now, max_backoff);
        self.backing_off = plan.backing_off;
        self.tell_backing_off();
        self.tell_pulls_backing_off(now);
        for action in plan.actions {
            self.begin(action);
        }
        let resize_at = self.reconcile_resources(now);
        let move_at = self.reconcile_placement(now);
        self.reconcile_probes();
        let status = self.publish(now, Ending::Not);
        if is_terminal(status.phase.as_deref()) {
            self.begin_end(now);
            return None;
        }
        [plan.wake_at, deadline, resize_at, move_at].into_iter().flatten().min()
    }

    fn begin(&mut self, action: Action) {
        tracing::debug!(pod = %NamespacedName::of_pod(&self.pod), ?action, "begin");
        match action {
            Action::MountVolumes => self.mount_volumes(),
            Action::CreateSandbox { attempt, stop } => self.create_sandbox(attempt, stop),
            Action::EnsureImage { name } => self.ensure_image(&name),
            Action::Start(start) => self.start(start),
            Action::Reset { ids, waits } => self.reset(&ids, waits),
            Action::Kill { id, name, cause } => self.kill(id, &name, cause),
        }
    }

    /// Runs an effect beside the worker, in the span of this turn.
    fn begin_task(&mut self, task: impl Future<Output = Done> + Send + 'static) -> AbortHandle {
        if self.turn.is_none() {
            let name = match self.state {
                State::Running => "syncPod",
                State::Terminating => "syncTerminatingPod",
                State::TearingDown { .. } | State::Finished | State::Gone => "syncTerminatedPod",
            };
            self.turn = traces::pod_span(name, &self.pod);
        }
        match &self.turn {
            Some(turn) => self.tasks.spawn(task.with_context(turn.clone())),
            None => self.tasks.spawn(task),
        }
    }

    fn mount_volumes(&mut self) {
        let failed = match &self.facts.volumes {
            Step::Failed(failure) => failure.count,
            _ => 0,
        };
        self.facts.volumes = Step::Busy;
        let (deps, pod) = (self.deps.clone(), self.pod.clone());
        self.begin_task(async move {
            let began = std::time::Instant::now();
            let mounted = deps.volumes.mount(&pod).await;
            let plugins = spec_of(&pod).volumes.iter().flatten().map(volume_plugin);
            let took = began.elapsed();
            METRICS.volumes_done(VolumeWork::Mount, plugins, took, mounted.is_err());
            Done::Volumes(failed, mounted)
        });
    }

    fn ensure_image(&mut self, name: &str) {
        let Some((container, kind)) = find_container(spec_of(&self.pod), name) else { return };
        let (deps, pod) = (self.deps.clone(), self.pod.clone());
        let count = match self.facts.images.get(name) {
            Some((Step::Failed(failure), _)) => failure.count,
            _ => 0,
        };
        self.facts.images.insert(name.to_owned(), (Step::Busy, None));
        let task = async move {
            let regarding = super::deps::container_reference(&pod, kind, &container.name);
            let result = deps.images.ensure(&pod, &container, &regarding).await;
            Done::Image(container.name, count, result)
        };
        let pull = self.begin_task(task);
        self.pulls.insert(name.to_owned(), pull);
    }

    /// A failure that is tried again after `seconds` times two to the power of earlier failures.
    fn failure(
        &self,
        reason: &str,
        message: String,
        count: u32,
        seconds: i64,
        max: i64,
    ) -> Failure {
        let now = self.deps.clock.now();
        let wait = seconds.saturating_mul(1 << count.min(16)).min(max);
        Failure {
            reason: reason.to_owned(),
            message,
            since: now,
            retry_at: now + SignedDuration::from_secs(wait),
            count: count + 1,
        }
    }
}
