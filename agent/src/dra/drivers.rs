//! The DRA drivers that are registered on this node, with the instances of each.
//!
//! While a driver is replaced there may be two of it (a rolling update): the last one that registered
//! and is connected is asked. Each instance's connection is kept up, so that a driver that went away is
//! missed at once: after a time of grace its ResourceSlices are deleted (`slices`), as pods would
//! otherwise be sent here in vain.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::transport::Channel;

use super::client::{Client, Service};
use super::error::DraError;
use crate::api::backoff::Backoff;
use crate::plugins::connect_watched;

/// How long a driver may be away before it counts as gone, as under kubelet.
pub const GRACE: Duration = Duration::from_secs(30);
/// A connection that broke is tried again after the first, and at last each time the second passed.
const RECONNECT: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

struct Instance {
    number: u64,
    /// The socket in the registry that it came by.
    registration: PathBuf,
    client: Client,
    keeper: AbortHandle,
}

#[derive(Default)]
struct State {
    instances: BTreeMap<String, Vec<Instance>>,
    last: u64,
}

/// When drivers that are away count as gone.
pub type Away = BTreeMap<String, Instant>;

/// The drivers.
pub struct Drivers {
    state: Mutex<State>,
    away: watch::Sender<Away>,
    hearing: Box<dyn Hearing>,
}

/// Who hears what drivers tell by themselves.
pub trait Hearing: Send + Sync {
    /// Hears the driver over a connection, until it is aborted.
    fn begin(&self, driver: &str, channel: Channel) -> AbortHandle;

    /// Nobody of the driver is here any more.
    fn end(&self, driver: &str);
}

impl Drivers {
    /// Without any.
    pub fn new(hearing: Box<dyn Hearing>) -> Self {
        Self { state: Mutex::default(), away: watch::Sender::default(), hearing }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which are away, as it changes.
    pub fn away(&self) -> watch::Receiver<Away> {
        self.away.subscribe()
    }

    /// Whom to ask of the driver.
    ///
    /// # Errors
    /// It is not registered.
    pub fn client(&self, driver: &str) -> Result<Client, DraError> {
        let state = self.lock();
        let all = state.instances.get(driver).map(Vec::as_slice).unwrap_or_default();
        let connected = all.iter().rev().find(|instance| instance.client.channel.is_some());
        match connected.or(all.last()) {
            Some(instance) => Ok(instance.client.clone()),
            None => Err(DraError::NotRegistered(driver.to_owned())),
        }
    }

    /// Takes an instance that made itself known by `registration`, in the place of what did before.
    ///
    /// # Errors
    /// Another instance answers at this endpoint.
    pub fn add(
        self: &Arc<Self>,
        driver: &str,
        registration: &Path,
        endpoint: &Path,
        service: Service,
    ) -> Result<(), String> {
        let mut state = self.lock();
        let all = state.instances.entry(driver.to_owned()).or_default();
        let same = |instance: &Instance| instance.registration == registration;
        if all.iter().any(|other| other.client.endpoint == endpoint && !same(other)) {
            let endpoint = endpoint.display();
            return Err(format!(
                "endpoint {endpoint} already registered for DRA driver plugin {driver}"
            ));
        }
        for before in all.extract_if(.., |instance| same(instance)) {
            before.keeper.abort();
        }
        state.last += 1;
        let number = state.last;
        let keeper = tokio::spawn(self.clone().keep(driver.to_owned(), number, endpoint.into()));
        let client =
            Client { driver: driver.into(), endpoint: endpoint.into(), service, channel: None };
        let (registration, keeper) = (registration.to_owned(), keeper.abort_handle());
        let all = state.instances.entry(driver.to_owned()).or_default();
        all.push(Instance { number, registration, client, keeper });
        tracing::info!(driver, endpoint = %endpoint.display(), ?service, instances = all.len(),
            "DRA driver registered");
        self.look(&state, driver);
        Ok(())
    }

    /// The instance is gone that made itself known by `registration`.
    pub fn remove(&self, driver: &str, registration: &Path) {
        let mut state = self.lock();
        let Some(all) = state.instances.get_mut(driver) else { return };
        for gone in all.extract_if(.., |instance| instance.registration == registration) {
            gone.keeper.abort();
            tracing::info!(driver, endpoint = %gone.client.endpoint.display(), "DRA driver is gone");
        }
        if all.is_empty() {
            state.instances.remove(driver);
        }
        self.lost(&state, driver);
    }

    /// Notes that the driver is away, which was not.
    fn lost(&self, state: &State, driver: &str) {
        self.look(state, driver);
        if !usable(state, driver) {
            self.hearing.end(driver);
        }
    }

    /// Notes since when the driver is away, or that it is not.
    fn look(&self, state: &State, driver: &str) {
        let usable = usable(state, driver);
        self.away.send_if_modified(|away| {
            if usable {
                return away.remove(driver).is_some();
            }
            if away.contains_key(driver) {
                return false;
            }
            away.insert(driver.to_owned(), Instant::now() + GRACE);
            true
        });
    }

    /// What it left behind is away, too.
    pub fn forget(&self, driver: &str) {
        self.away.send_if_modified(|away| away.remove(driver).is_some());
    }

    fn connected(&self, driver: &str, number: u64, channel: Option<Channel>) {
        let mut state = self.lock();
        let all = state.instances.get_mut(driver);
        if let Some(instance) = all.into_iter().flatten().find(|i| i.number == number) {
            instance.client.channel = channel;
        }
        match usable(&state, driver) {
            true => self.look(&state, driver),
            false => self.lost(&state, driver),
        }
    }

    /// Keeps an instance's connection up. Runs for ever.
    async fn keep(self: Arc<Self>, driver: String, number: u64, endpoint: PathBuf) {
        let mut backoff = Backoff::new(RECONNECT[0], RECONNECT[1]);
        loop {
            match connect_watched(&endpoint).await {
                Ok((channel, closed)) => {
                    backoff.reset();
                    self.connected(&driver, number, Some(channel.clone()));
                    let _hearing = Aborted(self.hearing.begin(&driver, channel));
                    closed.await;
                    tracing::warn!(driver, endpoint = %endpoint.display(),
                        "the connection to a DRA driver broke");
                    self.connected(&driver, number, None);
                }
                Err(error) => {
                    tracing::debug!(driver, %error, "cannot connect to a DRA driver yet");
                }
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }
}

fn usable(state: &State, driver: &str) -> bool {
    let all = state.instances.get(driver).into_iter().flatten();
    all.into_iter().any(|instance| instance.client.channel.is_some())
}

/// A task that ends with this.
struct Aborted(AbortHandle);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    struct Deaf;

    impl Hearing for Deaf {
        fn begin(&self, _: &str, _: Channel) -> AbortHandle {
            tokio::spawn(std::future::pending::<()>()).abort_handle()
        }

        fn end(&self, _: &str) {}
    }

    fn drivers() -> Arc<Drivers> {
        Arc::new(Drivers::new(Box::new(Deaf)))
    }

    /// Lets connections in and keeps them.
    fn answer(path: &Path) -> AbortHandle {
        let listener = UnixListener::bind(path).unwrap();
        let serving = tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                kept.push(stream);
            }
        });
        serving.abort_handle()
    }

    async fn until(drivers: &Drivers, here: bool) {
        for _ in 0..1000 {
            if usable(&drivers.lock(), "d") == here {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never usable: {here}");
    }

    #[tokio::test]
    async fn the_last_instance_that_is_connected_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let drivers = drivers();
        assert!(drivers.client("d").is_err());
        let first = answer(&path("1"));
        drivers.add("d", &path("r1"), &path("1"), Service::V1).unwrap();
        until(&drivers, true).await;
        drivers.add("d", &path("r2"), &path("2"), Service::V1Beta1).unwrap();
        assert_eq!(drivers.client("d").unwrap().endpoint, path("1"), "the second does not answer");
        let _second = answer(&path("2"));
        for _ in 0..1000 {
            if drivers.client("d").unwrap().endpoint == path("2") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(drivers.client("d").unwrap().endpoint, path("2"));
        let taken = drivers.add("d", &path("r3"), &path("2"), Service::V1).unwrap_err();
        assert!(taken.contains("already registered"), "{taken}");
        drivers.remove("d", &path("r2"));
        assert_eq!(drivers.client("d").unwrap().endpoint, path("1"));
        first.abort();
        until(&drivers, false).await;
        assert!(drivers.away().borrow().contains_key("d"));
        assert_eq!(drivers.client("d").unwrap().endpoint, path("1"), "it may come back");
        drivers.remove("d", &path("r1"));
        assert!(drivers.client("d").is_err());
    }

    #[tokio::test]
    async fn one_that_comes_back_is_not_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let drivers = drivers();
        drivers.add("d", &path("r"), &path("1"), Service::V1).unwrap();
        assert!(drivers.away().borrow().contains_key("d"));
        let _first = answer(&path("1"));
        until(&drivers, true).await;
        assert!(drivers.away().borrow().is_empty());
        // Registered anew by the same socket: it takes the place of what was.
        drivers.add("d", &path("r"), &path("1"), Service::V1).unwrap();
        until(&drivers, true).await;
        drivers.remove("d", &path("r"));
        assert!(drivers.client("d").is_err());
    }
}
