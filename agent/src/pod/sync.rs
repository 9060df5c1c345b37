//! The sync loop: hands every change to the worker of the pod that it concerns.
//!
//! Sources say what should run, the runtime's events say what happens; both are passed on by UID.
//! What no source names once all have spoken is an orphan and is cleaned up. Nothing here waits for
//! a pod.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::admit::{Share, Taken};
use super::cgroup::{KernelCgroups, NoCgroups, PodCgroups};
use super::clock::{Clock, SystemClock};
use super::deps::Deps;
use super::events::{News, watch_events};
use super::explain::{self, Explanation};
use super::images::Images;
use super::node_shutdown;
use super::store::StatusStore;
use super::table::PodTable;
use super::userns::UserNamespaces;
use super::worker::{Begin, Eviction, Message, Worker};
use crate::credential::Providers;
use crate::device::{NoDevices, PodDevices};
use crate::dra::{NoClaims, PodClaims};
use crate::ids::{NamespacedName, PodUid};
use crate::node::conditions::Pressure;
use crate::node::logind::Told;
use crate::node_context::NodeContext;
use crate::numa::Numa;
use crate::objects::Objects;
use crate::report::{EventSink, StatusSink};
use crate::runtime::Runtime;
use crate::source::{PodChange, PodSource};
use crate::volume::Volumes;

mod handle;
mod listing;
mod pods;
mod relist;
mod resize;

use handle::Question;
pub use handle::{ExplainError, PodQuery, SyncHandle};
use listing::{Snapshot, list};
use resize::Grant;

/// How often the runtime is listed while it sends no events.
const RELIST_WITHOUT_EVENTS: Duration = Duration::from_secs(1);
/// How long to wait before a runtime that does not answer is asked again, at first and at most.
const RUNTIME_RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How often resizes that wait are looked at again without a cause.
const RESIZE_RETRY: Duration = Duration::from_secs(180);

/// The sync loop and what it works with.
pub struct SyncLoop {
    node: Arc<NodeContext>,
    runtime: Arc<dyn Runtime>,
    volumes: Arc<dyn Volumes>,
    objects: Arc<dyn Objects>,
    statuses: Arc<dyn StatusSink>,
    events: Arc<dyn EventSink>,
    cgroups: Arc<dyn PodCgroups>,
    devices: Arc<dyn PodDevices>,
    claims: Arc<dyn PodClaims>,
    numa: Option<Arc<Numa>>,
    clock: Arc<dyn Clock>,
    sources: HashSet<PodSource>,
    network: watch::Receiver<bool>,
    pressure: watch::Receiver<Pressure>,
    shutdowns: Option<mpsc::Receiver<Told>>,
    shutting_down: watch::Sender<bool>,
    providers: Arc<Providers>,
    table: PodTable,
    questions: (mpsc::Sender<Question>, mpsc::Receiver<Question>),
}

impl SyncLoop {
    /// A loop over these effects. It expects `Synced` of the file source, and of the cluster
    /// source where the node has a cluster; see `with_sources`.
    pub fn new(
        node: Arc<NodeContext>,
        runtime: Arc<dyn Runtime>,
        volumes: Arc<dyn Volumes>,
        objects: Arc<dyn Objects>,
        statuses: Arc<dyn StatusSink>,
        events: Arc<dyn EventSink>,
    ) -> Self {
        let cgroups: Arc<dyn PodCgroups> = if node.cgroups_per_qos {
            Arc::new(KernelCgroups::new(&node))
        } else {
            Arc::new(NoCgroups)
        };
        let mut sources = HashSet::from([PodSource::File]);
        if node.cluster {
            sources.insert(PodSource::Cluster);
        }
        Self {
            node,
            runtime,
            volumes,
            objects,
            statuses,
            events,
            cgroups,
            devices: Arc::new(NoDevices::default()),
            claims: Arc::new(NoClaims::default()),
            numa: None,
            clock: Arc::new(SystemClock),
            sources,
            network: watch::channel(true).1,
            pressure: watch::channel(Pressure::default()).1,
            shutdowns: None,
            shutting_down: watch::Sender::new(false),
            providers: Arc::default(),
            table: PodTable::default(),
            questions: mpsc::channel(8),
        }
    }

    /// Uses other cgroups than the kernel's.
    pub fn with_cgroups(mut self, cgroups: Arc<dyn PodCgroups>) -> Self {
        self.cgroups = cgroups;
        self
    }

    /// Gives pods these devices.
    pub fn with_devices(mut self, devices: Arc<dyn PodDevices>) -> Self {
        self.devices = devices;
        self
    }

    /// Gives pods their claims' devices.
    pub fn with_claims(mut self, claims: Arc<dyn PodClaims>) -> Self {
        self.claims = claims;
        self
    }

    /// Gives containers CPUs and memory to themselves.
    pub fn with_numa(mut self, numa: Option<Arc<Numa>>) -> Self {
        self.numa = numa;
        self
    }

    /// Uses another clock than the machine's.
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Sources that must have spoken before anything is taken for orphaned.
    pub fn with_sources(mut self, sources: impl IntoIterator<Item = PodSource>) -> Self {
        self.sources = sources.into_iter().collect();
        self
    }

    /// Makes no sandbox of the pod network before `ready` is true.
    pub fn with_network(mut self, ready: watch::Receiver<bool>) -> Self {
        self.network = ready;
        self
    }

    /// Refuses most new pods while the node is under pressure.
    pub fn with_pressure(mut self, pressure: watch::Receiver<Pressure>) -> Self {
        self.pressure = pressure;
        self
    }

    /// Asks these for credentials of registries.
    pub fn with_providers(mut self, providers: Arc<Providers>) -> Self {
        self.providers = providers;
        self
    }

    /// Ends all pods when `shutdowns` tells of one, and refuses new ones while `shutting_down`, which
    /// it keeps.
    pub(crate) fn with_shutdowns(
        mut self,
        shutdowns: mpsc::Receiver<Told>,
        shutting_down: watch::Sender<bool>,
    ) -> Self {
        self.shutdowns = Some(shutdowns);
        self.shutting_down = shutting_down;
        self
    }

    /// Read access, for health, `longshore status` and the node's status.
    pub fn handle(&self) -> SyncHandle {
        SyncHandle { table: self.table.clone(), questions: self.questions.0.clone() }
    }

    /// Runs until `shutdown` turns true (or its sender goes). Leaves all containers as they are.
    pub async fn run(
        self,
        mut changes: mpsc::Receiver<PodChange>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let Self { node, runtime, volumes, objects, statuses, events, .. } = self;
        let (table, (_, mut questions)) = (self.table, self.questions);
        let device_news = [self.devices.news(), self.claims.news()];
        let reached = tokio::select! {
            reached = reach(&runtime, &table, &mut questions) => reached,
            () = stopped(&mut shutdown) => return,
        };
        let (runtime_name, snapshot) = reached;
        let deps = Arc::new(Deps {
            images: Images::new(
                &node,
                runtime.clone(),
                objects.clone(),
                events.clone(),
                self.providers,
            ),
            network: self.network,
            userns: Arc::new(UserNamespaces::open(&node)),
            store: StatusStore::new(node.root_dir.join("longshore").join("pod-status")),
            began: self.clock.now(),
            clock: self.clock,
            cgroups: self.cgroups,
            devices: self.devices,
            claims: self.claims,
            numa: self.numa,
            table,
            node,
            runtime,
            runtime_name,
            volumes,
            objects,
            statuses,
            events,
        });
        deps.images.recover().await;
        let (news_in, news) = mpsc::channel(1024);
        let watching = tokio::spawn(watch_events(deps.runtime.clone(), news_in));
        let (evict, evictions) = mpsc::unbounded_channel();
        let mut caretakers = super::caretaker::spawn(&deps, evict.clone());
        if !deps.node.node_limits.is_empty() {
            caretakers.spawn(super::node_limits::enforce(deps.clone()));
        }
        let shutting_down = self.shutting_down.subscribe();
        if let Some(shutdowns) = self.shutdowns {
            let (deps, told) = (deps.clone(), self.shutting_down);
            caretakers.spawn(node_shutdown::watch(deps, shutdowns, told, evict));
        }
        let (over, overs) = mpsc::unbounded_channel();
        let state = Loop {
            shared_cpus: deps.numa.as_ref().map(|numa| numa.pool()),
            deps,
            workers: HashMap::new(),
            tasks: JoinSet::new(),
            known: snapshot,
            unsynced: self.sources,
            taken: Taken::default(),
            shares: HashMap::new(),
            grants: HashMap::new(),
            waiting: HashSet::new(),
            pressure: self.pressure,
            shutting_down,
            held: HashMap::new(),
            again: HashMap::new(),
            evictions,
            device_news,
            over,
            relist_every: RELIST_WITHOUT_EVENTS,
            relisted: None,
        };
        state.run(&mut changes, news, overs, &mut questions, &mut shutdown).await;
        watching.abort();
        drop(caretakers);
    }
}

/// Returns once `shutdown` is true or nobody holds its sender any more.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Returns when there is news; never without anybody who could tell.
async fn changed(news: &mut Option<watch::Receiver<u64>>) {
    let told = match news {
        Some(news) => news.changed().await.is_ok(),
        None => false,
    };
    if !told {
        std::future::pending::<()>().await;
    }
}

/// Asks the runtime who it is and what it holds, until it answers.
async fn reach(
    runtime: &Arc<dyn Runtime>,
    table: &PodTable,
    questions: &mut mpsc::Receiver<Question>,
) -> (String, Snapshot) {
    let mut wait = RUNTIME_RETRY.0;
    loop {
        let asked = async { Ok((runtime.version().await?, list(runtime).await?)) };
        tokio::pin!(asked);
        let answer: crate::runtime::Result<_> = loop {
            tokio::select! {
                answer = &mut asked => break answer,
                Some(question) = questions.recv() => {
                    if let Question::Ping(reply) = question {
                        let _ = reply.send(());
                    }
                }
            }
        };
        match answer {
            Ok((version, snapshot)) => {
                table.update_health(|h| h.runtime_error = None);
                return (version.runtime_name, snapshot);
            }
            Err(error) => {
                tracing::warn!(%error, "container runtime does not answer yet");
                table.update_health(|h| h.runtime_error = Some(error.to_string()));
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RUNTIME_RETRY.1);
            }
        }
    }
}

struct Handle {
    inbox: mpsc::UnboundedSender<Message>,
    source: Option<PodSource>,
    key: NamespacedName,
    /// It was told to end and leave nothing.
    removing: bool,
}

struct Loop {
    deps: Arc<Deps>,
    workers: HashMap<PodUid, Handle>,
    tasks: JoinSet<PodUid>,
    known: Snapshot,
    unsynced: HashSet<PodSource>,
    taken: Taken,
    shares: HashMap<PodUid, Share>,
    /// What pods may use, and what they ask for.
    grants: HashMap<PodUid, Grant>,
    /// Those that ask for more than they have.
    waiting: HashSet<PodUid>,
    pressure: watch::Receiver<Pressure>,
    shutting_down: watch::Receiver<bool>,
    /// Static pods that wait for one of the same name to be gone.
    held: HashMap<NamespacedName, Arc<Pod>>,
    /// Pods that came back while they were being removed.
    again: HashMap<PodUid, (PodSource, Arc<Pod>)>,
    /// Pods that use more of the node than they may.
    evictions: mpsc::UnboundedReceiver<(PodUid, Eviction)>,
    /// Pods whose devices' health changed.
    device_news: [broadcast::Receiver<PodUid>; 2],
    /// Turns when the CPUs that containers share change.
    shared_cpus: Option<watch::Receiver<u64>>,
    over: mpsc::UnboundedSender<PodUid>,
    relist_every: Duration,
    relisted: Option<Instant>,
}

impl Loop {
    async fn run(
        mut self,
        changes: &mut mpsc::Receiver<PodChange>,
        mut news: mpsc::Receiver<News>,
        mut overs: mpsc::UnboundedReceiver<PodUid>,
        questions: &mut mpsc::Receiver<Question>,
        shutdown: &mut watch::Receiver<bool>,
    ) {
        let mut relist = tokio::time::interval(self.relist_every);
        relist.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut retry = tokio::time::interval(RESIZE_RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let period = self.deps.numa.as_ref().map(|numa| numa.reconcile_period());
        let mut move_again = tokio::time::interval(period.unwrap_or(RESIZE_RETRY));
        move_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sources_open = true;
        loop {
            let [plugins, drivers] = &mut self.device_news;
            tokio::select! {
                () = stopped(shutdown) => return,
                change = changes.recv(), if sources_open => match change {
                    Some(change) => self.change(change).await,
                    None => sources_open = false,
                },
                Some(item) = news.recv() => {
                    let every = match item {
                        News::Event(event) => {
                            self.event(&event);
                            continue;
                        }
                        News::Connected => self.deps.node.relist_period,
                        News::Lost => RELIST_WITHOUT_EVENTS,
                    };
                    if every != self.relist_every {
                        self.relist_every = every;
                        // What happened before the stream opened shows in the next listing.
                        let first = Instant::now() + RELIST_WITHOUT_EVENTS.min(every);
                        relist = tokio::time::interval_at(first, every);
                        relist.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    }
                }
                Some(uid) = overs.recv() => self.give_back(&uid),
                news = plugins.recv() => self.tell_of_devices(news),
                news = drivers.recv() => self.tell_of_devices(news),
                () = changed(&mut self.shared_cpus) => self.tell_of_cpus(),
                _ = move_again.tick(), if period.is_some() => self.tell_of_cpus(),
                Some((uid, eviction)) = self.evictions.recv() => {
                    if let Some(worker) = self.workers.get(&uid) {
                        let _ = worker.inbox.send(Message::Evict(eviction));
                    }
                }
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    self.worker_ended(ended);
                }
                Some(question) = questions.recv() => match question {
                    Question::Ping(reply) => {
                        self.deps.table.update_health(|h| h.last_turn = Instant::now());
                        let _ = reply.send(());
                    }
                    Question::Explain(query, reply) => self.explain(&query, reply),
                },
                _ = relist.tick() => self.relist().await,
                _ = retry.tick() => self.retry_resizes(),
            }
        }
    }

    /// Passes the question on to the pod's worker. One that concerns nobody is let go.
    fn explain(&self, query: &PodQuery, reply: oneshot::Sender<Explanation>) {
        let named = || {
            let named = self.workers.values().filter(|worker| worker.key == query.key);
            // Of two of one name the one that is wanted.
            named.min_by_key(|worker| (worker.removing, worker.source.is_none()))
        };
        let worker = match &query.uid {
            Some(uid) => self.workers.get(uid),
            None => named(),
        };
        if let Some(worker) = worker {
            let _ = worker.inbox.send(Message::Explain(reply));
            return;
        }
        let held = self.held.values().find(|pod| match &query.uid {
            Some(uid) => PodUid::of(pod) == *uid,
            None => NamespacedName::of_pod(pod) == query.key,
        });
        if let Some(pod) = held {
            let _ = reply.send(explain::held(pod));
        }
    }

    fn tell_of_devices(&self, news: Result<PodUid, broadcast::error::RecvError>) {
        let tell = |worker: &Handle| {
            let _ = worker.inbox.send(Message::Devices);
        };
        match news {
            Ok(uid) => {
                self.workers.get(&uid).into_iter().for_each(tell);
            }
            // Whose news were lost is not known.
            Err(broadcast::error::RecvError::Lagged(_)) => self.workers.values().for_each(tell),
            Err(broadcast::error::RecvError::Closed) => {}
        }
    }

    fn tell_of_cpus(&self) {
        for worker in self.workers.values() {
            let _ = worker.inbox.send(Message::Cpus);
        }
    }

    fn spawn(&mut self, uid: PodUid, key: NamespacedName, begin: Begin) {
        let (inbox, receiver) = mpsc::unbounded_channel();
        let handle =
            Handle { inbox: inbox.clone(), source: begin.source, key, removing: begin.remove };
        let worker = Worker::new(self.deps.clone(), begin, receiver, inbox);
        self.workers.insert(uid.clone(), handle);
        self.tasks.spawn(async move {
            worker.run().await;
            uid
        });
    }
}
