//! Hearing what drivers tell of their devices' health, as long as they are here: it is written down, and
//! told to the pods that have these devices.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;
use tonic::Code;
use tonic::transport::Channel;

use super::drivers::Hearing;
use super::health::{self, DeviceKey, Health};
use super::{Dra, checkpoint, client, lock};
use crate::ids::PodUid;
use crate::join::files::write_atomic;

/// How long a driver is left alone that ended its word on health.
const HEAR_AGAIN: Duration = Duration::from_secs(5);
/// Pods whose devices' health changed that may wait to be told.
const NEWS: usize = 1024;

/// What drivers tell of health.
pub(super) struct Heard {
    file: PathBuf,
    health: Mutex<Health>,
    news: watch::Sender<BTreeMap<String, BTreeSet<DeviceKey>>>,
    pods: broadcast::Sender<PodUid>,
}

impl Heard {
    /// Goes on from what is on disk under `root`.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let file = root.join(health::FILE);
        let lost = "devices are of unknown health until their drivers tell of it";
        let known = checkpoint::read_file(&file, lost, health::decode)?;
        Ok(Self {
            file,
            health: Mutex::new(known.unwrap_or_default()),
            news: watch::Sender::default(),
            pods: broadcast::Sender::new(NEWS),
        })
    }

    /// Asks about what is known.
    pub(super) fn with<T>(&self, ask: impl FnOnce(&Health) -> T) -> T {
        ask(&lock(&self.health))
    }

    /// Pods to which it is news, from now on.
    pub(super) fn pods(&self) -> broadcast::Receiver<PodUid> {
        self.pods.subscribe()
    }

    /// Takes in what the driver tells over the connection. Runs for ever.
    async fn hear(self: Arc<Self>, driver: String, channel: Channel) {
        loop {
            match client::watch_health(channel.clone()).await {
                Ok(mut stream) => {
                    loop {
                        let lapse = lock(&self.health).next_lapse(&driver);
                        let lapse = lapse.map(|at| at.duration_since(Timestamp::now()));
                        let lapse = async {
                            match lapse {
                                Some(left) => {
                                    let left = Duration::try_from(left).unwrap_or_default();
                                    tokio::time::sleep(left + Duration::from_millis(10)).await;
                                }
                                None => std::future::pending().await,
                            }
                        };
                        let news = tokio::select! {
                            told = stream.message() => match told {
                                Ok(Some(told)) => lock(&self.health).told(
                                    &driver, &told.devices, Timestamp::now()),
                                Ok(None) | Err(_) => break,
                            },
                            () = lapse => lock(&self.health).lapse(&driver, Timestamp::now()),
                        };
                        self.changed(&driver, news);
                    }
                    let news = lock(&self.health).clear(&driver);
                    self.changed(&driver, news);
                }
                // It does not tell, and will not as long as it is the same.
                Err(status) if status.code() == Code::Unimplemented => {
                    return std::future::pending().await;
                }
                Err(status) => {
                    tracing::debug!(driver, %status, "cannot hear of a driver's devices")
                }
            }
            tokio::time::sleep(HEAR_AGAIN).await;
        }
    }

    fn changed(&self, driver: &str, news: BTreeSet<DeviceKey>) {
        if news.is_empty() {
            return;
        }
        self.news.send_modify(|waiting| {
            waiting.entry(driver.to_owned()).or_default().extend(news);
        });
    }
}

/// Hears what drivers tell of health as long as they are here.
pub(super) struct Ear(pub(super) Arc<Heard>);

impl Hearing for Ear {
    fn begin(&self, driver: &str, channel: Channel) -> AbortHandle {
        tokio::spawn(self.0.clone().hear(driver.to_owned(), channel)).abort_handle()
    }

    fn end(&self, driver: &str) {
        let news = lock(&self.0.health).clear(driver);
        self.0.changed(driver, news);
    }
}

impl Dra {
    /// Writes down what drivers tell of health, and tells pods whose devices' health changes.
    pub(super) async fn tell(&self) {
        let mut news = self.heard.news.subscribe();
        loop {
            let mut told = BTreeMap::new();
            self.heard.news.send_if_modified(|waiting| {
                told = std::mem::take(waiting);
                false
            });
            if !told.is_empty() {
                let (file, text) =
                    (self.heard.file.clone(), health::encode(&lock(&self.heard.health)));
                let writing = move || write_atomic(&file, 0o600, &text);
                if let Ok(Err(error)) = tokio::task::spawn_blocking(writing).await {
                    tracing::warn!(%error, "the health of devices is not on disk");
                }
            }
            let pods: BTreeSet<PodUid> = {
                let store = lock(&self.store);
                told.iter().flat_map(|(driver, devices)| store.holders(driver, devices)).collect()
            };
            for pod in pods {
                // Nobody listens before the sync loop runs.
                let _ = self.heard.pods.send(pod);
            }
            if news.changed().await.is_err() {
                return;
            }
        }
    }
}
