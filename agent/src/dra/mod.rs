//! Dynamic Resource Allocation (`resource.k8s.io/v1`): devices that the scheduler allocated to the
//! claims of a pod, and that their drivers make ready for it.
//!
//! Drivers make themselves known in the registry of plugins (`registration`, `drivers`). Before a pod's
//! sandbox is made its claims are read and checked (`claims`), and prepared by their drivers
//! (`prepare`); what these say goes into the containers by way of CDI. When nothing of the pod runs any
//! more, and before its status says so, claims that no other pod has are taken back. Which pods have
//! which claims (`claim_store`) is on disk before a driver hears of it, in kubelet's format
//! (`checkpoint`), so that neither a restart nor a crash leaves a claim prepared that nobody has.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::{Notify, broadcast};

use crate::device::Statuses;
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::METRICS;
use crate::objects::{ObjectError, Objects};
use crate::plugins::PluginHandler;

mod checkpoint;
mod claim_store;
mod claims;
mod client;
mod drivers;
mod error;
mod health;
mod hearing;
mod prepare;
mod registration;
mod slices;
mod statuses;
mod wire;

pub use claim_store::Device;
pub use claims::{is_claimed, may_be_claimed};
pub use error::DraError;
pub use slices::Slices;

use claim_store::ClaimStore;
use drivers::Drivers;
use hearing::{Ear, Heard};

/// Claims of pods that are gone are tried to be given back so often.
const RECONCILE: Duration = Duration::from_secs(60);

/// What pod workers and the sync loop ask of claims.
#[async_trait]
pub trait PodClaims: Send + Sync {
    /// Has the pod's claims ready for its containers. May be asked again, whatever became of it before.
    async fn prepare(&self, pod: &Pod) -> Result<(), DraError>;

    /// Nothing of the pod runs any more: gives its claims back.
    async fn unprepare(&self, pod: &PodUid) -> Result<(), DraError>;

    /// Whether the pod has claims to give back.
    fn holds(&self, pod: &PodUid) -> bool;

    /// The names in CDI of what the container gets.
    fn cdi_devices(&self, pod: &Pod, container: &Container) -> Result<Vec<String>, DraError>;

    /// There are no other pods than these.
    fn retain(&self, pods: &HashSet<PodUid>);

    /// The health of what the pod has.
    fn statuses(&self, pod: &Pod) -> Statuses;

    /// Pods whose devices' health changes, from now on.
    fn news(&self) -> broadcast::Receiver<PodUid>;
}

/// A node without claims.
#[derive(Debug)]
pub struct NoClaims(broadcast::Sender<PodUid>);

impl Default for NoClaims {
    fn default() -> Self {
        Self(broadcast::Sender::new(1))
    }
}

#[async_trait]
impl PodClaims for NoClaims {
    async fn prepare(&self, pod: &Pod) -> Result<(), DraError> {
        match claims::references(pod)?.into_iter().next() {
            None => Ok(()),
            Some(reference) => Err(DraError::Fetch {
                name: reference.name,
                source: ObjectError::Standalone { what: "a ResourceClaim" },
            }),
        }
    }

    async fn unprepare(&self, _: &PodUid) -> Result<(), DraError> {
        Ok(())
    }

    fn holds(&self, _: &PodUid) -> bool {
        false
    }

    fn cdi_devices(&self, _: &Pod, _: &Container) -> Result<Vec<String>, DraError> {
        Ok(Vec::new())
    }

    fn retain(&self, _: &HashSet<PodUid>) {}

    fn statuses(&self, _: &Pod) -> Statuses {
        Statuses::default()
    }

    fn news(&self) -> broadcast::Receiver<PodUid> {
        self.0.subscribe()
    }
}

/// The claims of this node.
pub struct Dra {
    root: PathBuf,
    objects: Arc<dyn Objects>,
    drivers: Arc<Drivers>,
    store: Mutex<ClaimStore>,
    /// Claims about which something is being done.
    busy: Mutex<HashMap<NamespacedName, Arc<tokio::sync::Mutex<()>>>>,
    heard: Arc<Heard>,
    /// What is on disk; held while it is written.
    saved: tokio::sync::Mutex<Vec<u8>>,
    /// Pods that are gone and have claims.
    strangers: Mutex<BTreeSet<PodUid>>,
    orphaned: Notify,
}

impl fmt::Debug for Dra {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dra").field("root", &self.root).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a container has of one claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfClaim {
    /// The claim.
    pub claim: NamespacedName,
    /// Its devices, all of them, by driver.
    pub devices: Vec<(String, Device)>,
}

impl Dra {
    /// Over `objects`, going on from what is on disk under `root`.
    ///
    /// # Errors
    /// If that cannot be read.
    pub fn open(root: &Path, objects: Arc<dyn Objects>) -> Result<Arc<Self>, DraError> {
        let error = |file: &str| {
            let path = root.join(file);
            move |source| DraError::Io { operation: "read", path, source }
        };
        let store = checkpoint::read(root).map_err(error(checkpoint::FILE))?;
        let heard = Arc::new(Heard::open(root).map_err(error(health::FILE))?);
        METRICS.dra_in_use(store.in_use());
        let drivers = Drivers::new(Box::new(Ear(heard.clone())));
        Ok(Arc::new(Self {
            root: root.to_owned(),
            objects,
            drivers: Arc::new(drivers),
            store: Mutex::new(store),
            busy: Mutex::default(),
            heard,
            saved: tokio::sync::Mutex::default(),
            strangers: Mutex::default(),
            orphaned: Notify::new(),
        }))
    }

    /// Who takes drivers of the registry.
    pub fn handler(&self) -> Arc<dyn PluginHandler> {
        Arc::new(registration::Registered(self.drivers.clone()))
    }

    /// Gives back what pods have that are gone, tells of health, and has ResourceSlices of drivers
    /// deleted that are gone where there is a cluster. Runs for ever.
    pub async fn run(self: Arc<Self>, slices: Option<Slices>) {
        let slices = async {
            match slices {
                Some(slices) => slices.run(self.drivers.clone()).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(slices, self.tell(), self.give_back());
    }

    async fn give_back(&self) {
        let mut told = BTreeSet::new();
        loop {
            let strangers = lock(&self.strangers).clone();
            for pod in strangers {
                match self.timed("UnprepareResources", self.unprepare_claims(&pod)).await {
                    Ok(()) => {
                        lock(&self.strangers).remove(&pod);
                        tracing::info!(%pod, "gave back the claims of a pod that is gone");
                    }
                    Err(error) if told.insert(pod.clone()) => {
                        tracing::warn!(%pod, %error,
                            "cannot give back the claims of a pod that is gone; trying on");
                    }
                    Err(_) => {}
                }
            }
            let empty = lock(&self.strangers).is_empty();
            tokio::select! {
                () = self.orphaned.notified() => {}
                () = tokio::time::sleep(RECONCILE), if !empty => {}
            }
        }
    }

    async fn timed(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<(), DraError>>,
    ) -> Result<(), DraError> {
        let began = std::time::Instant::now();
        let result = work.await;
        METRICS.dra_operation(operation, began.elapsed(), result.is_err());
        METRICS.dra_in_use(lock(&self.store).in_use());
        result
    }

    /// Has what is known on disk.
    async fn save(&self) -> Result<(), DraError> {
        let mut saved = self.saved.lock().await;
        let text = checkpoint::encode(&lock(&self.store));
        if *saved == text {
            return Ok(());
        }
        let (root, writing) = (self.root.clone(), text.clone());
        match tokio::task::spawn_blocking(move || checkpoint::write(&root, &writing)).await {
            Ok(written) => written?,
            Err(cause) => {
                return Err(DraError::Io {
                    operation: "write",
                    path: self.root.join(checkpoint::FILE),
                    source: std::io::Error::other(cause),
                });
            }
        }
        *saved = text;
        Ok(())
    }

    /// What the container has of each claim, for whoever monitors devices.
    pub fn of_container(&self, pod: &Pod, container: &Container) -> Vec<OfClaim> {
        let namespace = NamespacedName::of_pod(pod).namespace;
        let wanted = claims::wanted(pod, container).unwrap_or_default();
        let store = lock(&self.store);
        let of = |name: String| {
            let claim = NamespacedName::new(&namespace, &name);
            let own = store.get(&claim)?.drivers.iter();
            let devices = own.flat_map(|(driver, devices)| {
                devices.iter().map(|device| (driver.clone(), device.clone()))
            });
            Some(OfClaim { devices: devices.collect(), claim })
        };
        wanted.into_keys().filter_map(of).collect()
    }
}

#[async_trait]
impl PodClaims for Dra {
    async fn prepare(&self, pod: &Pod) -> Result<(), DraError> {
        if claims::references(pod).is_ok_and(|all| all.is_empty()) {
            return Ok(());
        }
        self.timed("PrepareResources", self.prepare_claims(pod)).await
    }

    async fn unprepare(&self, pod: &PodUid) -> Result<(), DraError> {
        self.timed("UnprepareResources", self.unprepare_claims(pod)).await
    }

    fn holds(&self, pod: &PodUid) -> bool {
        lock(&self.store).holds(pod)
    }

    fn cdi_devices(&self, pod: &Pod, container: &Container) -> Result<Vec<String>, DraError> {
        let namespace = NamespacedName::of_pod(pod).namespace;
        let wanted = claims::wanted(pod, container)?;
        let store = lock(&self.store);
        let (mut seen, mut all) = (BTreeSet::new(), Vec::new());
        for (name, wanted) in wanted {
            let key = NamespacedName::new(&namespace, &name);
            let Some(names) = store.cdi(&key, &wanted) else {
                let (claim, namespace) = (name, namespace.to_string());
                return Err(DraError::Unprepared { claim, namespace });
            };
            all.extend(names.into_iter().filter(|name| seen.insert(name.clone())));
        }
        Ok(all)
    }

    fn retain(&self, pods: &HashSet<PodUid>) {
        let gone = lock(&self.store).strangers(pods);
        if !gone.is_empty() {
            *lock(&self.strangers) = gone;
            self.orphaned.notify_one();
        }
    }

    fn statuses(&self, pod: &Pod) -> Statuses {
        self.heard
            .with(|health| statuses::statuses(pod, &lock(&self.store), health, Timestamp::now()))
    }

    fn news(&self) -> broadcast::Receiver<PodUid> {
        self.heard.pods()
    }
}

#[cfg(test)]
mod tests;
