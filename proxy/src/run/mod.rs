//! The loop: changes in, batches out. While a batch is in the kernel the next one is collected, so
//! that a lone change goes at once and a flood goes in few batches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::backend::{Backend, Concerns, Environment};
use crate::choose::{choose, sweep_other};
use crate::config::{Config, Mode};
use crate::job::{Done, Job, Worked, foreign, join, work};
use crate::metrics::Metrics;
use crate::model::{Model, PlanChange};
use crate::object::{Change, NamespacedName, NodeState};
use crate::question::{Describe, Question, Rules};
use crate::server::{HealthCheckPorts, Shared, serve_health, serve_metrics};
use crate::status::ProxyStatus;
use crate::sysctl;
use crate::{Error, Proxy};

mod done;
mod foreign;
mod publish;

/// The loop turns at least so often.
const TURN: Duration = Duration::from_secs(5);
/// After a failure the kernel is tried again after this, doubling up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Work on more Services than this uses much memory for a moment.
const MANY: usize = 2000;
/// After this a node that is not told is taken for one without addresses, as upstream takes it.
const NODE_AWAITED: Duration = Duration::from_secs(30);
/// At most so many waiting changes are taken in before a batch is made of them.
const COLLECT: usize = 100_000;

/// What the loop is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There is no backend yet: one is chosen, again and again if none works.
    Choosing,
    /// Rules of an earlier process serve; nothing is touched until everything has been told.
    Holding,
    /// Everything must be compared with the kernel.
    Repairing,
    /// The kernel is as desired, but for the changes that come.
    Serving,
}

struct Loop {
    config: Config,
    status: watch::Sender<ProxyStatus>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    model: Model,
    state: State,
    backend: Option<Box<dyn Backend>>,
    busy: Option<JoinHandle<Done>>,
    environment: Environment,
    monitor: Option<(nft::Monitor, Concerns)>,
    /// No repair before this.
    not_before: Option<Instant>,
    started: Instant,
    /// No change before this (`minSyncPeriod`).
    paced: Option<Instant>,
    retry: Duration,
    /// When the kernel is asked again for what it refused; other changes do not wait for it.
    recheck: Option<Instant>,
    recheck_wait: Duration,
    last_repair: Instant,
    /// The backend changes the kernel by programs of its own, whose changes are told as others'.
    programs: bool,
    /// When changes of endpoints happened that the kernel is to get, in milliseconds.
    triggers: Vec<i64>,
    /// Questions that wait for the backend.
    waiting: Vec<(Rules, oneshot::Sender<Result<String, String>>)>,
    /// Much memory has been used for a moment.
    trim: bool,
    /// The first repair finds what an earlier process left: its flows are not touched.
    taken_over: bool,
    /// Changes whose stale flows are still to be deleted, once the kernel has the changes.
    unclean: BTreeMap<NamespacedName, PlanChange>,
    ipv6: bool,
    /// The other backend's rules have been looked for, or are being.
    swept: bool,
    sweep: Option<JoinHandle<Option<String>>>,
    health_ports: HealthCheckPorts,
    /// Standing problems by object.
    errors: BTreeMap<String, String>,
    refused: BTreeMap<NamespacedName, String>,
    counted: (u64, u64),
    no_local: BTreeMap<NamespacedName, [i64; 4]>,
}

/// Runs until `shutdown`.
pub async fn run(
    proxy: Proxy,
    mut changes: mpsc::Receiver<Change>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), Error> {
    let Proxy { config, status, mut questions, port, .. } = proxy;
    let metrics = Metrics::new();
    let shared = Shared::new(metrics.clone());
    let mut servers = tokio::task::JoinSet::new();
    if let Some(address) = config.healthz_bind {
        servers.spawn(serve_health(shared.clone(), address, config.bind_hard_fail));
    }
    if let Some(address) = config.metrics_bind {
        servers.spawn(serve_metrics(shared.clone(), address, config.bind_hard_fail, port));
    }
    let mut this = Loop::start(config, status, shared.clone(), metrics);
    let mut open = true;
    let mut tick = tokio::time::interval(TURN);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !*shutdown.borrow() {
        this.begin_work();
        this.publish();
        let retry = this.retry_in();
        tokio::select! {
            change = changes.recv(), if open => match change {
                Some(change) => {
                    this.take_in(change);
                    for _ in 0..COLLECT {
                        let Ok(change) = changes.try_recv() else { break };
                        this.take_in(change);
                    }
                    this.told();
                }
                None => open = false,
            },
            done = join(&mut this.busy) => this.finish(done).await,
            Some(question) = questions.recv() => this.asked(question),
            swept = join(&mut this.sweep) => {
                this.sweep = None;
                if let Ok(Some(error)) = swept {
                    this.errors.insert("rules of the other mode".to_owned(), error);
                }
            }
            told = foreign(&mut this.monitor) => this.foreign_change(told),
            () = shared.errors_changed.notified() => {}
            Some(Ok(Err(error))) = servers.join_next() => {
                this.end().await;
                return Err(error);
            }
            () = tokio::time::sleep(retry.unwrap_or(TURN)), if retry.is_some() => {}
            _ = tick.tick() => this.periodic(),
            stopped = shutdown.changed() => if stopped.is_err() { break },
        }
    }
    this.end().await;
    Ok(())
}

fn seconds(time: Timestamp) -> f64 {
    time.as_millisecond() as f64 / 1000.0
}

impl Loop {
    fn start(
        config: Config,
        status: watch::Sender<ProxyStatus>,
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
    ) -> Loop {
        let mut errors = BTreeMap::new();
        for error in sysctl::apply(&config) {
            tracing::warn!(object = error.object, "{}", error.message);
            errors.insert(error.object, error.message);
        }
        let node = config.own_node(NodeState::default());
        let mut environment = Environment {
            masquerade_bit: 1 << (config.masquerade_bit & 31),
            masquerade_all: config.masquerade_all,
            local: config.local_traffic(&node),
            service_cidrs: config.service_cidrs.clone(),
            node_ports: config.node_port_cidrs(&node),
            localhost: config.serves_loopback(),
            drop_invalid: !sysctl::tcp_is_liberal(),
            counters: config.mode != Mode::Nftables && crate::iptables::ensure_counters(),
        };
        if environment.localhost
            && let Err(error) = sysctl::route_localnet()
        {
            environment.localhost = false;
            errors.insert(error.object, error.message);
        }
        let mut model = Model::new(&config.node_name);
        model.note_triggers_since(Timestamp::now().as_millisecond());
        model.apply(Change::Node(node));
        let timeout = jiff::SignedDuration::try_from(config.health_timeout);
        shared.update_health(|health| {
            health.timeout = timeout.unwrap_or(jiff::SignedDuration::MAX);
        });
        let mut health_ports = HealthCheckPorts::new(shared.clone());
        health_ports.refresh(environment.node_ports.clone());
        Loop {
            health_ports,
            started: Instant::now(),
            paced: None,
            config,
            status,
            shared,
            metrics,
            model,
            state: State::Choosing,
            monitor: None,
            backend: None,
            busy: None,
            environment,
            not_before: None,
            retry: RETRY_MIN,
            recheck: None,
            recheck_wait: RETRY_MIN,
            last_repair: Instant::now(),
            programs: false,
            triggers: Vec::new(),
            waiting: Vec::new(),
            trim: false,
            taken_over: false,
            unclean: BTreeMap::new(),
            ipv6: false,
            swept: false,
            sweep: None,
            errors,
            refused: BTreeMap::new(),
            counted: (0, 0),
            no_local: BTreeMap::new(),
        }
    }

    /// Lets a job that runs come to its end.
    async fn end(&mut self) {
        if let Some(busy) = self.busy.take() {
            let _ = busy.await;
        }
    }

    fn take_in(&mut self, change: Change) {
        self.model.apply(match change {
            Change::Node(node) => Change::Node(self.config.own_node(node)),
            other => other,
        });
    }

    /// Chooses a backend, if there is none.
    fn begin_choosing(&mut self) {
        let (mode, environment) = (self.config.mode, self.environment.clone());
        self.busy = Some(tokio::task::spawn_blocking(move || {
            Done::Chosen(choose(mode, &environment).map(|mut backend| {
                let found = backend.take_over().unwrap_or_else(|error| {
                    tracing::warn!(%error, "cannot read what an earlier process left");
                    false
                });
                (backend, found)
            }))
        }));
    }

    /// Changes have been taken in.
    fn told(&mut self) {
        let node = self.model.node();
        let now = Timestamp::now();
        let (known, being_deleted) = (node.known, node.being_deleted);
        self.shared.update_health(|health| {
            health.node_known |= known;
            health.being_deleted = being_deleted;
        });
        if self.model.is_dirty() {
            self.metrics.queued(seconds(now));
            if self.state != State::Holding {
                self.shared.update_health(|health| {
                    health.pending_since.get_or_insert(now);
                });
            }
        }
        let (services, endpoints) = (self.model.service_changes, self.model.endpoint_changes);
        self.metrics.changes(
            services - self.counted.0,
            endpoints - self.counted.1,
            usize::from(self.model.is_dirty()),
        );
        self.counted = (services, endpoints);
        if self.state == State::Holding && self.model.synced {
            self.state = State::Repairing;
        }
        self.sweep_when_programmed();
    }

    /// Removes what another mode and upstream's proxy left, once: their rules serve until all that
    /// was told is in the kernel, and until then not all has been told.
    fn sweep_when_programmed(&mut self) {
        let programmed = self.state == State::Serving
            && self.busy.is_none()
            && self.model.synced
            && !self.model.is_dirty();
        if self.swept || !programmed {
            return;
        }
        self.swept = true;
        let mode = if self.programs { Mode::Iptables } else { Mode::Nftables };
        self.sweep = Some(tokio::task::spawn_blocking(move || sweep_other(mode)));
    }

    fn asked(&mut self, question: Question) {
        match question {
            Question::Explain(service, question, answer) => {
                // Who asked may be gone.
                let _ = answer.send(self.model.explain(&service, &question, &self.environment));
            }
            Question::Services(limit, answer) => {
                let _ = answer.send(self.model.health(limit));
            }
            Question::Rules(rules, answer) => self.waiting.push((rules, answer)),
        }
    }

    /// Lets the backend answer a question, if one waits; whether it does.
    fn begin_describing(&mut self) -> bool {
        let Some((rules, answer)) = self.waiting.pop() else { return false };
        let Some(mut backend) = self.backend.take() else { return false };
        let what = match rules {
            Rules::Desired => Describe::Desired,
            Rules::Difference => Describe::Difference,
            Rules::Changes(changes) => {
                let mut model = self.model.clone();
                changes.into_iter().for_each(|change| model.apply(change));
                Describe::Changes(model.take_changes())
            }
        };
        self.trim = true;
        self.busy = Some(tokio::task::spawn_blocking(move || {
            let _ = answer.send(backend.describe(&what).map_err(|error| error.to_string()));
            Done::Described(backend)
        }));
        true
    }

    fn retry_in(&self) -> Option<Duration> {
        let paced = self.paced.filter(|_| self.state == State::Serving && self.model.is_dirty());
        let at = [self.not_before, self.recheck, paced].into_iter().flatten().min();
        let at = at.filter(|_| self.busy.is_none() && self.state != State::Holding)?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    fn environment_wanted(&self) -> Environment {
        let mut node = self.model.node().clone();
        node.known |= self.started.elapsed() >= NODE_AWAITED;
        let node = &node;
        Environment {
            local: self.config.local_traffic(node),
            node_ports: self.config.node_port_cidrs(node),
            service_cidrs: match &self.model.service_cidrs {
                // iptables has no rule for them.
                Some(told) if !self.programs => told.clone(),
                _ => self.config.service_cidrs.clone(),
            },
            ..self.environment.clone()
        }
    }

    /// Gives the backend its next job, if there is one and it is idle.
    fn begin_work(&mut self) {
        if self.state == State::Holding || self.busy.is_some() {
            return;
        }
        if self.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        self.not_before = None;
        if self.recheck.is_some_and(|at| Instant::now() >= at) {
            self.recheck = None;
            if self.state == State::Serving {
                self.state = State::Repairing;
            }
        }
        if self.backend.is_none() {
            self.begin_choosing();
            return;
        }
        if self.state == State::Serving && self.paced.is_some_and(|at| Instant::now() < at) {
            self.begin_describing();
            return;
        }
        self.paced = None;
        let environment = self.environment_wanted();
        let configure = (environment != self.environment).then(|| environment.clone());
        let changes = self.model.take_changes();
        self.triggers.extend(self.model.take_triggers());
        if self.state == State::Serving && changes.is_empty() && configure.is_none() {
            if !self.model.is_dirty() {
                self.shared.update_health(|health| health.pending_since = None);
            }
            if !self.begin_describing() && std::mem::take(&mut self.trim) {
                self.busy = Some(tokio::task::spawn_blocking(|| {
                    crate::sys::give_back_memory();
                    Done::Trimmed
                }));
            }
            return;
        }
        self.trim |= self.state == State::Repairing || changes.len() > MANY;
        let Some(mut backend) = self.backend.take() else { return };
        if self.environment.node_ports != environment.node_ports {
            self.health_ports.refresh(environment.node_ports.clone());
        }
        self.environment = environment;
        for change in &changes {
            self.note(change);
        }
        let job = if self.state == State::Repairing {
            // Told of each element, the kernel would take twice as long. What others do meanwhile
            // shows in the generation afterwards.
            self.monitor = None;
            Job::Repair(self.model.plans().map(|(n, p)| (n.clone(), p.clone())).collect())
        } else {
            Job::Change
        };
        self.state = State::Serving;
        self.busy = Some(tokio::task::spawn_blocking(move || {
            let begin = Instant::now();
            let full = matches!(job, Job::Repair(_));
            let result = work(backend.as_mut(), configure.as_ref(), &job, &changes);
            Done::Worked(Worked { backend, result, changes, full, took: begin.elapsed() })
        }));
    }

    fn periodic(&mut self) {
        let period = if self.monitor.is_none() {
            // Nobody tells of foreign changes.
            self.config.sync_period.min(Duration::from_secs(30))
        } else {
            self.config.sync_period
        };
        if self.state == State::Serving && self.last_repair.elapsed() >= period {
            self.state = State::Repairing;
        }
        // Addresses come and go without anybody telling.
        self.health_ports.refresh(self.environment.node_ports.clone());
    }
}
