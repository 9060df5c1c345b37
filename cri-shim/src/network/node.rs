//! The node's network: CNI where a configuration is there, else the built-in bridge.
//!
//! Which of them connected a sandbox is in its record, so that a configuration that comes or goes
//! while sandboxes run leaves none behind. What could not be taken away is tried again until it is:
//! the caller may have forgotten the sandbox by then.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::StreamExt;
use tokio::{sync::Notify, task::JoinHandle};

use super::{
    Cidr, Description, Network, NetworkConfig, NetworkError, NetworkResult, SandboxNetwork,
    bridge::{Bridge, Shared},
    cni::Cni,
    keyed::Keyed,
    records::{Kind, Record, Records},
};

/// The longest pause between two tries of a teardown.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How many teardowns run at once when leftovers are cleared.
const AT_ONCE: usize = 16;

/// Opens the node's network in the calling thread's network namespace; called within a tokio
/// runtime.
///
/// # Errors
/// [`NetworkError::Io`] when its state can't be read.
pub fn open(config: NetworkConfig) -> Result<Arc<dyn Network>, NetworkError> {
    let (records, known) = Records::open(&config.state_dir)?;
    let shared = Arc::new(Shared { records, known: Mutex::new(known) });
    let bridge = Bridge::open(&config, Arc::clone(&shared))?;
    let cni = Cni::new(&config, Arc::clone(&shared));
    let inner = Arc::new(Inner {
        shared,
        bridge,
        cni,
        cidrs: Mutex::default(),
        sandboxes: Arc::default(),
        gone: Mutex::default(),
        collect: AtomicBool::default(),
        at_once: AtomicBool::default(),
        wake: Arc::default(),
    });
    let retries =
        tokio::spawn(retry(Arc::downgrade(&inner), Arc::clone(&inner.wake), config.retry_after));
    Ok(Arc::new(NodeNetwork { inner, retries }))
}

struct NodeNetwork {
    inner: Arc<Inner>,
    retries: JoinHandle<()>,
}

impl Drop for NodeNetwork {
    fn drop(&mut self) {
        self.retries.abort();
    }
}

struct Inner {
    shared: Arc<Shared>,
    bridge: Bridge,
    cni: Cni,
    /// Blocks that came since the last setup.
    cidrs: Mutex<Option<Vec<Cidr>>>,
    /// Setup and teardown of one sandbox never overlap.
    sandboxes: Arc<Keyed>,
    /// Sandboxes whose teardown failed.
    gone: Mutex<BTreeSet<String>>,
    /// The plugins are to collect garbage.
    collect: AtomicBool,
    /// The next try need not wait.
    at_once: AtomicBool,
    wake: Arc<Notify>,
}

impl Inner {
    async fn take_cidrs(&self) {
        let cidrs = self.cidrs.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(cidrs) = cidrs {
            self.bridge.set_pod_cidrs(cidrs).await;
        }
    }

    fn gone(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, id: &str) -> Option<Record> {
        self.shared.known().get(id).cloned()
    }

    async fn setup(&self, sandbox: &SandboxNetwork) -> Result<NetworkResult, NetworkError> {
        let by_cni = self.record(&sandbox.id).map(|r| matches!(r.kind, Kind::Cni(_)));
        let by_cni = match by_cni {
            Some(by_cni) => by_cni,
            None => self.cni.is_configured()?,
        };
        if by_cni { self.cni.setup(sandbox).await } else { self.bridge.setup(sandbox).await }
    }

    async fn undo(&self, record: &Record) -> Result<(), NetworkError> {
        match &record.kind {
            Kind::Bridge { .. } => self.bridge.teardown(record).await,
            Kind::Cni(_) => self.cni.teardown(record).await,
        }
    }

    /// Takes a sandbox's network away; a failure is remembered.
    async fn teardown(&self, id: &str) -> Result<(), NetworkError> {
        let done = match self.record(id) {
            Some(record) => self.undo(&record).await,
            None => Ok(()),
        };
        if done.is_ok() {
            self.gone().remove(id);
        } else if self.gone().insert(id.to_owned()) {
            self.wake.notify_one();
        }
        done
    }

    async fn undo_again(&self, id: &str) {
        let _alone = self.sandboxes.lock(id).await;
        // Another call may have done it, or connected the sandbox anew.
        if !self.gone().contains(id) {
            return;
        }
        match self.teardown(id).await {
            Ok(()) => tracing::info!(sandbox = id, "removed the network of a sandbox that is gone"),
            Err(error) => tracing::warn!(sandbox = id, %error,
                "removing a sandbox's network failed and is tried again"),
        }
    }

    /// Takes away the network of a sandbox that a restart found gone.
    async fn collect_one(&self, id: &str) -> Result<(), NetworkError> {
        tracing::info!(sandbox = id, "removing the network of a sandbox that is gone");
        let _alone = self.sandboxes.lock(id).await;
        self.teardown(id).await
    }

    /// Tries again what failed; whether something is left to be done.
    async fn try_again(&self) -> bool {
        let gone = self.gone().clone();
        let teardowns: Vec<_> = gone.iter().map(|id| self.undo_again(id)).collect();
        futures::stream::iter(teardowns).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
        if !gone.is_empty() || self.collect.load(Ordering::Relaxed) {
            let left = self.gone().clone();
            let done = self.cni.collect(&left).await;
            self.collect.store(!done, Ordering::Relaxed);
        }
        !self.gone().is_empty() || self.collect.load(Ordering::Relaxed)
    }
}

/// Waits until something is to be done, and does it, with growing pauses while it fails.
async fn retry(inner: Weak<Inner>, wake: Arc<Notify>, first: Duration) {
    let mut pause = None;
    loop {
        match pause {
            None => wake.notified().await,
            // What is new need not wait as long as what failed often.
            Some(wait) => tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = wake.notified() => pause = None,
            },
        }
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let at_once = inner.at_once.swap(false, Ordering::Relaxed);
        if pause.is_none() && !at_once {
            pause = Some(first);
            continue;
        }
        let left = inner.try_again().await;
        pause = left.then(|| pause.map_or(first, |pause| (pause * 2).min(LONGEST_PAUSE)));
    }
}

#[async_trait]
impl Network for NodeNetwork {
    async fn setup(&self, sandbox: &SandboxNetwork) -> Result<NetworkResult, NetworkError> {
        let inner = &self.inner;
        inner.take_cidrs().await;
        let _alone = inner.sandboxes.lock(&sandbox.id).await;
        let done = inner.setup(sandbox).await;
        let left = done.is_err() && inner.record(&sandbox.id).is_some();
        if !left {
            inner.gone().remove(&sandbox.id);
        } else if inner.gone().insert(sandbox.id.clone()) {
            inner.wake.notify_one();
        }
        done
    }

    async fn teardown(&self, id: &str) -> Result<(), NetworkError> {
        let alone = self.inner.sandboxes.lock(id).await;
        let record = self.inner.record(id);
        match record.filter(|record| matches!(record.kind, Kind::Bridge { .. })) {
            None => self.inner.teardown(id).await,
            Some(record) => {
                let done = self.inner.bridge.close(&record);
                let inner = Arc::clone(&self.inner);
                inner.bridge.leaving.fetch_add(1, Ordering::Relaxed);
                // Nobody needs to see the link go; until it has, its address is not given away.
                tokio::spawn(async move {
                    let _alone = alone;
                    if let Err(error) = inner.teardown(&record.id).await {
                        tracing::warn!(sandbox = record.id, %error,
                            "removing a sandbox's network failed and is tried again");
                    }
                    inner.bridge.leaving.fetch_sub(1, Ordering::Relaxed);
                });
                done
            }
        }
    }

    async fn status(&self) -> Result<(), String> {
        match self.inner.cni.is_configured() {
            Ok(true) => self.inner.cni.status().await.map_err(|error| error.to_string()),
            Ok(false) => self.inner.bridge.status(),
            Err(error) => Err(error.to_string()),
        }
    }

    fn describe(&self) -> Description {
        let (cni, last_load) = self.inner.cni.describe();
        Description { cni, last_load }
    }

    fn set_pod_cidrs(&self, cidrs: Vec<Cidr>) {
        *self.inner.cidrs.lock().unwrap_or_else(PoisonError::into_inner) = Some(cidrs);
    }

    async fn collect(&self, keep: &[String]) -> Result<(), NetworkError> {
        let inner = &self.inner;
        inner.take_cidrs().await;
        let keep: BTreeSet<&str> = keep.iter().map(String::as_str).collect();
        let gone: Vec<Record> = inner
            .shared
            .known()
            .values()
            .filter(|record| !keep.contains(record.id.as_str()))
            .cloned()
            .collect();
        let (ours, plugins): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(|record| matches!(record.kind, Kind::Bridge { .. }));
        // Plugins may take their time, and the caller has others to serve.
        inner.gone().extend(plugins.into_iter().map(|record| record.id));
        inner.collect.store(true, Ordering::Relaxed);
        inner.at_once.store(true, Ordering::Relaxed);
        inner.wake.notify_one();
        let teardowns: Vec<_> = ours.iter().map(|record| inner.collect_one(&record.id)).collect();
        let done: Vec<_> =
            futures::stream::iter(teardowns).buffer_unordered(AT_ONCE).collect().await;
        let mut failures: Vec<_> = done.into_iter().filter_map(Result::err).collect();
        failures.extend(inner.bridge.collect(&keep).await.err());
        if failures.is_empty() { Ok(()) } else { Err(NetworkError::Several(failures)) }
    }
}
