//! The composition root of `longshore run`: makes the parts, joins them, and waits.
//!
//! Nothing is decided here; each part is given its plain configuration and its effects.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use proxy::Proxy;
use proxy::object::{Change, NodeState};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::api::Api;
use crate::cluster;
use crate::config::NodeConfig;
use crate::config::node_api::Authorization;
use crate::credential::{self, Loaded};
use crate::csi::{Csi, InUse};
use crate::device::{Devices, NumaAffinity, Unbound};
use crate::dra::{Dra, Slices};
use crate::health::{self, Watched};
use crate::node::DevicesSeen;
use crate::node::conditions::Pressure;
use crate::node::{housing, logind};
use crate::node_api::{ClusterReviews, LiveUsage, NodeApi, Reviews};
use crate::node_context::NodeContext;
use crate::objects::Objects;
use crate::plugins::{PluginHandler, Registry};
use crate::pod::{SyncLoop, node_shutdown};
use crate::pod_resources;
use crate::proxy_api;
use crate::report::{EventSink, StatusSink};
use crate::runtime::Runtime;
use crate::runtime::cri::CriRuntime;
use crate::source::file::{FileSource, ObjectSink};
use crate::source::url::{Said, UrlSide};
use crate::source::{self, PodChange, PodSource};
use crate::standalone::folder::Scope;
use crate::standalone::services::ServiceLoop;
use crate::standalone::store::Store;
use crate::traces::Traces;
use crate::volume::{self, NodeVolumes};

mod context;
mod preflight;

pub(crate) use context::host;

/// Changes that may wait for the sync loop or the proxy before their sources wait too.
const CHANNEL: usize = 256;
/// How long the parts have to end after the signal. Containers and rules stay as they are.
const DRAIN: Duration = Duration::from_secs(5);

/// What the world gives to this node and takes from it: a folder, or a cluster.
struct World {
    objects: Arc<dyn Objects>,
    statuses: Arc<dyn StatusSink>,
    events: Arc<dyn EventSink>,
    pods: mpsc::Receiver<PodChange>,
    proxy: mpsc::Receiver<Change>,
    sources: Vec<PodSource>,
    /// Whether pods may have addresses by now.
    network: watch::Receiver<bool>,
    /// Under which pressure the node is.
    pressure: watch::Receiver<Pressure>,
    /// Who can be asked about tokens and permissions.
    reviews: Option<Box<dyn Reviews>>,
    /// What CSI volumes need of a cluster.
    storage: Option<Storage>,
}

/// The API server, the node's object, and the volumes that it says are in use.
struct Storage {
    api: Api,
    node: watch::Receiver<Option<Arc<Node>>>,
    in_use: Arc<InUse>,
}

/// A part that ended, with why it could not go on.
type Ended = (&'static str, anyhow::Result<()>);

/// The node, its runtime and volumes, and who can be asked about tokens and permissions.
type Serves = (Arc<NodeContext>, Arc<dyn Runtime>, Arc<NodeVolumes>, Option<Box<dyn Reviews>>);

/// The parts as they are put together.
struct Parts {
    config: NodeConfig,
    shutdown: watch::Receiver<bool>,
    tasks: JoinSet<Ended>,
    watched: Watched,
    /// Whether the machine shuts down; the sync loop's to say.
    shutting_down: watch::Sender<bool>,
    /// What the node API needs of an agent that runs here.
    serves: Option<Serves>,
    /// The programs that know credentials for registries, as configured.
    providers: Option<Loaded>,
}

/// Runs the node until a signal ends it or a part cannot go on.
pub(crate) async fn run(config: NodeConfig) -> anyhow::Result<()> {
    let mut providers = None;
    if config.parts.agent {
        preflight::check(&config.resources)?;
        providers = config.credential_providers.as_ref().map(credential::load).transpose()?;
    }
    let _lock = lock(&config)?;
    let traces = match &config.tracing {
        Some(tracing) => Some(Traces::start(tracing, &config.hostname)?),
        None => None,
    };
    let (stop, shutdown) = watch::channel(false);
    let mut parts = Parts {
        watched: Watched::new(&config),
        tasks: JoinSet::new(),
        shutdown: shutdown.clone(),
        serves: None,
        providers,
        shutting_down: watch::Sender::new(false),
        config,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let built = tokio::select! {
        built = parts.build() => built,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let outcome = match built {
        Err(error) => Err(error),
        Ok(()) => tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            Some(ended) = parts.tasks.join_next() => match ended {
                Ok((name, Ok(()))) => Err(anyhow::anyhow!("{name} ended")),
                Ok((name, Err(error))) => Err(error.context(name)),
                Err(error) => Err(error.into()),
            },
        },
    };
    health::notify::stopping();
    tracing::info!("stopping; containers and rules stay as they are");
    let _ = stop.send(true);
    let drain = async { while parts.tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, drain).await.is_err() {
        tracing::warn!("not every part ended in time");
    }
    if let Some(traces) = traces {
        // It waits for the collector, which is spoken to on this runtime.
        let _ = tokio::task::spawn_blocking(move || traces.end()).await;
    }
    outcome
}

impl Parts {
    fn spawn(
        &mut self,
        name: &'static str,
        part: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.tasks.spawn(async move { (name, part.await) });
    }

    async fn build(&mut self) -> anyhow::Result<()> {
        if self.config.parts.cri {
            let shim = context::shim(&self.config);
            let mut shutdown = self.shutdown.clone();
            let end = async move {
                crate::shutdown::requested(&mut shutdown).await;
            };
            self.spawn("the CRI shim", async move { Ok(cri_shim::serve(shim, end).await?) });
        }
        if self.config.parts.agent || self.config.parts.proxy {
            self.agent_and_proxy().await?;
        }
        let watched = Arc::new(std::mem::replace(&mut self.watched, Watched::new(&self.config)));
        // The agent's: a proxy or a shim in a process of its own leaves them alone.
        let agent = self.config.parts.agent;
        if let Some(address) = self.config.healthz.filter(|_| agent) {
            let listener = tokio::net::TcpListener::bind(address)
                .await
                .with_context(|| format!("listen on {address} for /healthz (--healthz-port)"))?;
            let serving = health::serve_healthz(listener, watched.clone(), self.shutdown.clone());
            self.spawn("healthz", serving);
        }
        self.node_api(&watched).await?;
        if agent {
            let socket = health::bind_socket(&self.config.run_dir, health::STATUS_SOCKET)?;
            let serving = health::serve_status(socket, watched.clone(), self.shutdown.clone());
            self.spawn("the status socket", serving);
        }
        self.spawn("sd_notify", health::notify::run(watched, self.shutdown.clone()));
        Ok(())
    }

    async fn agent_and_proxy(&mut self) -> anyhow::Result<()> {
        let endpoint = self.config.container_runtime_endpoint.clone().unwrap_or_else(|| {
            format!("unix://{}", self.config.run_dir.join("cri.sock").display())
        });
        let runtime: Arc<dyn Runtime> =
            Arc::new(CriRuntime::new(&endpoint, self.config.runtime_request_timeout)?);
        self.watched.runtime_endpoint = endpoint.clone();
        if self.config.container_runtime_endpoint.is_some() && self.config.parts.agent {
            self.config.cgroup_driver =
                context::driver_of(&*runtime, self.config.cgroup_driver).await;
        }
        if self.config.housing != housing::Housing::default() && self.config.parts.agent {
            tokio::spawn(housing::keep(self.config.housing.clone()));
        }
        let node = Arc::new(context::node_context(&self.config, self.config.standalone));
        let numa = match self.config.parts.agent {
            true => context::numa(&self.config, &node.root_dir)?,
            false => None,
        };
        let affinity: Box<dyn NumaAffinity> = match &numa {
            Some(numa) => Box::new(numa.affinities()),
            None => Box::new(Unbound),
        };
        let devices = match self.config.parts.agent {
            true => Some(Devices::open(&node.root_dir, affinity)?),
            false => None,
        };
        self.watched.node_ips = node.node_ips.clone();
        let mut world = if self.config.standalone {
            self.standalone(&node)?
        } else {
            let seen = devices.as_ref().map_or_else(DevicesSeen::none, |devices| DevicesSeen {
                capacities: devices.capacities(),
                first: devices.is_first(),
            });
            self.cluster(runtime.clone(), seen).await?
        };
        if self.config.parts.proxy {
            let pages = std::mem::take(&mut self.config.proxy_pages);
            let port = crate::node_api::proxy_port(pages, self.watched.started);
            let proxy = Proxy::new(self.config.proxy.clone()).with_port(port);
            self.watched.proxy = Some(proxy.status());
            let socket = health::bind_socket(&self.config.run_dir, proxy_api::PROXY_SOCKET)?;
            self.watched.asker = Some(proxy.asker());
            let (asker, name) = (proxy.asker(), self.config.node_name.clone());
            let answering = proxy_api::serve(socket, asker, name, self.shutdown.clone());
            self.spawn("the proxy's socket", answering);
            let (changes, shutdown) = (world.proxy, self.shutdown.clone());
            self.spawn("the proxy", async move { Ok(proxy.run(changes, shutdown).await?) });
        } else {
            self.spawn("the drain of Services", drain(world.proxy, self.shutdown.clone()));
        }
        let Some(devices) = devices else {
            // Only the proxy: pods are somebody else's.
            let (_, none) = mpsc::channel(1);
            let pods = std::mem::replace(&mut world.pods, none);
            self.spawn("the drain of pods", drain(pods, self.shutdown.clone()));
            return Ok(());
        };
        for dir in [&node.root_dir, &node.pod_logs_dir, &node.container_logs_dir] {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let providers = context::providers(&self.config, self.providers.take())?;
        let mut handlers: Vec<Arc<dyn PluginHandler>> = Vec::new();
        let claims = Dra::open(&node.root_dir, world.objects.clone())?;
        handlers.push(claims.handler());
        let slices = world.storage.as_ref().map(|storage| {
            Slices::new(storage.api.main.clone(), &node.node_name, storage.node.clone())
        });
        let (running, mut shutdown) = (claims.clone().run(slices), self.shutdown.clone());
        self.spawn("resource claims", async move {
            tokio::select! {
                () = running => {}
                () = crate::shutdown::requested(&mut shutdown) => {}
            }
            Ok(())
        });
        let csi = world.storage.map(|Storage { api, node: object, in_use }| {
            let csi = Csi::new(&node, world.objects.clone(), object, in_use);
            handlers.push(csi.handler());
            let running = csi.clone().run(api.main, self.shutdown.clone());
            self.spawn("CSI drivers", async move {
                running.await;
                Ok(())
            });
            csi
        });
        handlers.push(devices.handler());
        let registrations = devices.listen()?;
        let running = devices.clone().run(registrations, self.shutdown.clone());
        self.spawn("device plugins", running);
        let asked = pod_resources::listen(&node.root_dir)?;
        let known = devices.clone();
        let plugins = Registry::new(&node.root_dir, handlers).run(self.shutdown.clone());
        self.spawn("the registry of plugins", async move {
            plugins.await;
            Ok(())
        });
        let volumes = NodeVolumes::new(node.clone(), world.objects.clone(), csi);
        let refresh = volume::run_refresh(volumes.clone(), self.shutdown.clone());
        self.spawn("the refresh of volumes", async move {
            refresh.await;
            Ok(())
        });
        self.serves = Some((node.clone(), runtime.clone(), volumes.clone(), world.reviews));
        let mut events = world.events;
        if self.watched.store.is_none() {
            let recent = Arc::new(health::RecentEvents::new(events));
            self.watched.recent = Some(recent.clone());
            events = recent;
        }
        let (context, cri) = (node.clone(), runtime.clone());
        let mut sync = SyncLoop::new(node, runtime, volumes, world.objects, world.statuses, events)
            .with_devices(devices)
            .with_claims(claims.clone())
            .with_numa(numa.clone())
            .with_sources(world.sources)
            .with_network(world.network)
            .with_pressure(world.pressure)
            .with_providers(providers);
        if !self.config.shutdown_grace.is_empty() {
            let (told, shutdowns) = mpsc::channel(1);
            sync = sync.with_shutdowns(shutdowns, self.shutting_down.clone());
            let wanted = node_shutdown::longest(&self.config.shutdown_grace);
            let mut shutdown = self.shutdown.clone();
            self.spawn("the watch for shutdowns", async move {
                tokio::select! {
                    () = logind::watch(logind::Place::default(), wanted, told) => {}
                    () = crate::shutdown::requested(&mut shutdown) => {}
                }
                Ok(())
            });
        }
        let exclusive: Arc<dyn pod_resources::Exclusive> = match numa {
            Some(numa) => {
                let (saving, shutdown) = (numa.clone(), self.shutdown.clone());
                self.spawn("CPUs and memory", async move {
                    saving.run(shutdown).await;
                    Ok(())
                });
                numa
            }
            None => Arc::new(pod_resources::Shared),
        };
        let handle = sync.handle();
        let answering = pod_resources::serve(
            asked,
            handle.table().clone(),
            known,
            claims,
            exclusive,
            self.shutdown.clone(),
        );
        self.spawn("the PodResources API", answering);
        self.watched.usage = Some(LiveUsage::new(context, handle.table().clone(), cri));
        self.watched.sync = Some(handle);
        let (pods, shutdown) = (world.pods, self.shutdown.clone());
        self.spawn("the sync loop", async move {
            sync.run(pods, shutdown).await;
            Ok(())
        });
        Ok(())
    }

    /// Serves port 10250, where an agent runs here and somebody could be let in.
    async fn node_api(&mut self, watched: &Arc<Watched>) -> anyhow::Result<()> {
        let (Some((node, runtime, volumes, reviews)), Some(sync)) =
            (self.serves.take(), &watched.sync)
        else {
            return Ok(());
        };
        let config = self.config.node_api.clone();
        if !config.enabled {
            return Ok(());
        }
        if reviews.is_none() && config.authorization != Authorization::AlwaysAllow {
            tracing::info!(
                "the node API is not served: without a control plane nobody says who may ask; \
                 KubeletConfiguration.authorization.mode AlwaysAllow lets those in who are known"
            );
            return Ok(());
        }
        let mut names = vec![self.config.hostname.to_lowercase()];
        if self.config.node_name != names[0] {
            names.push(self.config.node_name.clone());
        }
        names.extend(watched.node_ips.iter().map(ToString::to_string));
        let api = NodeApi {
            node,
            names,
            config,
            cert_dir: self.config.cert_dir.clone(),
            sync: sync.clone(),
            runtime,
            volumes: Some(volumes),
            watched: watched.clone(),
        };
        let listening = api.listen(reviews).await?;
        let shutdown = self.shutdown.clone();
        self.spawn("the node API", async move {
            listening.serve(shutdown).await;
            Ok(())
        });
        Ok(())
    }

    /// Everything from a folder.
    fn standalone(&mut self, node: &NodeContext) -> anyhow::Result<World> {
        let config = &self.config;
        let (proxy_tx, proxy) = mpsc::channel(CHANNEL);
        let (tell, told) = mpsc::unbounded_channel();
        let services = ServiceLoop::new(
            &config.node_name,
            config.service_cluster_ip_ranges.clone(),
            config.service_node_port_range,
            config.state_dir.join("standalone-services.json"),
            proxy_tx,
        );
        let store = Store::new(services.served(), tell);
        self.watched.store = Some(store.clone());
        let state = NodeState {
            known: true,
            addresses: node.node_ips.clone(),
            pod_cidrs: config.pod_cidrs.clone(),
            zone: None,
            being_deleted: false,
        };
        let (pods_tx, pods) = mpsc::channel(CHANNEL);
        let sink: Arc<dyn ObjectSink> = store.clone();
        self.file_source(Scope::Standalone, Some(sink), pods_tx);
        let shutdown = self.shutdown.clone();
        self.spawn("Services", async move {
            services.run(state, told, shutdown).await;
            Ok(())
        });
        Ok(World {
            objects: store.clone(),
            statuses: store.clone(),
            events: store,
            pods,
            proxy,
            sources: vec![PodSource::File],
            network: watch::channel(true).1,
            // A folder's pods are static: no pressure keeps them out.
            pressure: watch::channel(Pressure::default()).1,
            reviews: None,
            storage: None,
        })
    }

    fn file_source(
        &mut self,
        scope: Scope,
        sink: Option<Arc<dyn ObjectSink>>,
        pods: mpsc::Sender<PodChange>,
    ) {
        let Some(folder) = self.config.pod_manifest_path.clone() else { return };
        let mut source = FileSource::new(folder, &self.config.node_name, scope, sink);
        if let Some(url) = self.config.static_pod_url.clone() {
            let (tell, said) = watch::channel(Said::Nothing);
            let kept = self.config.root_dir.join("longshore/static-pod-url");
            let taken = Said::Nothing;
            source = source.with_url(UrlSide { name: url.shown(), said, kept, taken });
            let mut shutdown = self.shutdown.clone();
            self.spawn("the static pod URL", async move {
                tokio::select! {
                    () = source::url::poll(url, tell) => {}
                    () = crate::shutdown::requested(&mut shutdown) => {}
                }
                Ok(())
            });
        }
        self.watched.manifests = Some(source.problems());
        let shutdown = self.shutdown.clone();
        self.spawn("the folder of manifests", async move {
            source.run(pods, shutdown).await;
            Ok(())
        });
    }

    /// Everything from an API server, and static pods from a folder if there is one.
    async fn cluster(
        &mut self,
        runtime: Arc<dyn Runtime>,
        devices: DevicesSeen,
    ) -> anyhow::Result<World> {
        let config = context::cluster(&self.config);
        let mut parts =
            cluster::start(config, runtime, self.shutting_down.subscribe(), devices).await?;
        self.watched.errors = Some(parts.errors);
        self.watched.node = Some(parts.node.clone());
        let mut shutdown = self.shutdown.clone();
        // Held for as long as the loops run: without a folder of manifests nobody else does, and a
        // loop whose input is closed ends.
        let static_pods = parts.static_pods.clone();
        self.spawn("the cluster", async move {
            let _static_pods = static_pods;
            tokio::select! {
                ended = parts.tasks.join_next() => match ended {
                    Some(Err(error)) => return Err(error.into()),
                    Some(Ok(())) => anyhow::bail!("a loop of it ended"),
                    None => {}
                },
                () = crate::shutdown::requested(&mut shutdown) => {}
            }
            parts.tasks.shutdown().await;
            Ok(())
        });
        let mut sources = vec![PodSource::Cluster];
        let (merged, pods) = mpsc::channel(CHANNEL);
        if self.config.parts.agent && self.config.pod_manifest_path.is_some() {
            sources.push(PodSource::File);
            let (files_tx, files) = mpsc::channel(CHANNEL);
            self.file_source(Scope::StaticPods, None, files_tx);
            // Static pods show in the cluster as mirror pods.
            let (to, mirror) = (merged.clone(), parts.static_pods);
            let forwarding = forward(files, to, self.shutdown.clone(), move |change| {
                let _ = mirror.send(change.clone());
            });
            self.spawn("static pods", forwarding);
        }
        let forwarding = forward(parts.pods, merged, self.shutdown.clone(), |_| {});
        self.spawn("pods of the cluster", forwarding);
        Ok(World {
            objects: parts.objects,
            statuses: parts.statuses,
            events: parts.events,
            pods,
            proxy: parts.proxy,
            sources,
            network: parts.network,
            pressure: parts.pressure,
            reviews: Some(Box::new(ClusterReviews::new(parts.api.main.clone()))),
            storage: Some(Storage { api: parts.api, node: parts.node, in_use: parts.in_use }),
        })
    }
}

/// Passes changes on, showing each to `seen`.
async fn forward<T>(
    mut from: mpsc::Receiver<T>,
    to: mpsc::Sender<T>,
    mut shutdown: watch::Receiver<bool>,
    seen: impl Fn(&T),
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            item = from.recv() => {
                let Some(item) = item else {
                    crate::shutdown::requested(&mut shutdown).await;
                    return Ok(());
                };
                seen(&item);
                if to.send(item).await.is_err() {
                    return Ok(());
                }
            }
            () = crate::shutdown::requested(&mut shutdown) => return Ok(()),
        }
    }
}

/// Reads and forgets, so that the sender never waits.
async fn drain<T>(
    mut from: mpsc::Receiver<T>,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            item = from.recv() => if item.is_none() {
                crate::shutdown::requested(&mut shutdown).await;
                return Ok(());
            },
            () = crate::shutdown::requested(&mut shutdown) => return Ok(()),
        }
    }
}

/// One node for one run directory: a second one would fight over the same pods.
fn lock(config: &NodeConfig) -> anyhow::Result<nix::fcntl::Flock<File>> {
    let dir = &config.run_dir;
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let name = match (config.parts.agent, config.parts.proxy, config.parts.cri) {
        (true, ..) => "agent.lock",
        (false, true, _) => "proxy.lock",
        _ => "cri.lock",
    };
    let path: &Path = &dir.join(name);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(
        |(_, errno)| {
            anyhow::anyhow!(
                "{} is held ({}): another longshore runs with --run-dir {}",
                path.display(),
                errno.desc(),
                dir.display()
            )
        },
    )
}
