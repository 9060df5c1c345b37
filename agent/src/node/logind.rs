//! logind over D-Bus: learns of a shutdown before it happens and holds it up while pods end.
//!
//! The protocol is systemd's (org.freedesktop.login1(5), "Inhibitor Locks"): whoever holds a delay
//! lock is told `PrepareForShutdown(true)`, and the machine goes on once the lock's descriptor is
//! closed or `InhibitDelayMaxSec` has passed. That is raised to what pods need with a drop-in, as
//! kubelet does. A signal counts whoever sends it, as it does for kubelet: operators rehearse a
//! shutdown with `busctl emit`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::mpsc;
use zbus::zvariant::{OwnedValue, Type};
use zbus::{Connection, MatchRule, MessageStream, connection};

use crate::join::files::{FileError, write_atomic};

/// Where the bus listens.
const BUS: &str = "unix:path=/run/dbus/system_bus_socket";
/// Drop-ins of logind.
const DROP_INS: &str = "/etc/systemd/logind.conf.d";
/// The drop-in's name is kubelet's, so that there is one and not two that disagree.
const DROP_IN: &str = "99-kubelet.conf";

const LOGIN: &str = "org.freedesktop.login1";
const LOGIN_PATH: &str = "/org/freedesktop/login1";
const LOGIN_MANAGER: &str = "org.freedesktop.login1.Manager";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const SYSTEMD_MANAGER: &str = "org.freedesktop.systemd1.Manager";
const DBUS: &str = "org.freedesktop.DBus";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// Makes logind read its configuration again.
const SIGHUP: i32 = 1;

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(25);
/// Signals kept while an answer is awaited.
const QUEUE: usize = 64;
/// How long logind may take to have read its configuration: looks, and the first wait between two.
const LOOKS: u32 = 6;
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long to wait before a bus that is gone is tried again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Why the node cannot learn of shutdowns.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogindError {
    /// There is no bus, or no logind on it.
    #[error("connecting to the message bus at {bus} failed: {cause}")]
    Connect {
        /// Its address.
        bus: String,
        /// What was said.
        cause: zbus::Error,
    },
    /// logind or systemd refused a call.
    #[error("{operation} failed: {cause}")]
    Call {
        /// The method or property.
        operation: &'static str,
        /// What was said.
        cause: zbus::Error,
    },
    /// The drop-in cannot be written.
    #[error(transparent)]
    DropIn(#[from] FileError),
    /// logind keeps its own limit.
    #[error(
        "logind still delays a shutdown for {has:?} at most after {} asks for {wanted:?}; see \
         `systemd-analyze cat-config systemd/logind.conf`",
        path.display()
    )]
    Delay {
        /// What it has.
        has: Duration,
        /// What pods need.
        wanted: Duration,
        /// The drop-in.
        path: PathBuf,
    },
    /// The bus was restarted, or ended.
    #[error("the message bus has closed the connection")]
    Lost,
}

/// Holds the shutdown up until it is dropped. Empty where logind gave none, as in the middle of one.
#[derive(Debug, Default)]
pub(crate) struct Lock(#[allow(dead_code, reason = "its closing is its use")] Option<OwnedFd>);

#[cfg(test)]
impl Lock {
    /// One, and what ends when it is dropped.
    pub(crate) fn of_its_own() -> (Self, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        ours.set_nonblocking(true).expect("not to block");
        (Self(Some(theirs.into())), ours)
    }
}

/// What logind says.
#[derive(Debug)]
pub(crate) enum Told {
    /// The machine shuts down once this is dropped, or its time is over.
    Shutdown(Lock),
    /// It does not, after all.
    Cancelled,
}

/// Where logind is reached and configured.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Address of the bus.
    pub(crate) bus: String,
    /// Folder of its drop-ins.
    pub(crate) drop_ins: PathBuf,
}

impl Default for Place {
    fn default() -> Self {
        Self { bus: BUS.into(), drop_ins: DROP_INS.into() }
    }
}

/// Tells of shutdowns, each of which can be held up for `wanted`, until nobody listens any more.
pub(crate) async fn watch(place: Place, wanted: Duration, told: mpsc::Sender<Told>) {
    let mut watch = Watch { place, wanted, told, lock: Lock::default(), shutting_down: false };
    let (mut wait, mut last) = (RETRY.0, String::new());
    loop {
        let ended = watch.session().await;
        if watch.told.is_closed() {
            return;
        }
        match &ended {
            LogindError::Lost => (wait, last) = (RETRY.0, String::new()),
            // Said once, not at every try.
            error if error.to_string() != last => {
                last = error.to_string();
                tracing::error!(%error,
                    "pods are not ended gracefully when the node shuts down (shutdownGracePeriod): \
                     this needs systemd-logind and dbus; trying again");
            }
            _ => {}
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RETRY.1);
    }
}

struct Watch {
    place: Place,
    wanted: Duration,
    told: mpsc::Sender<Told>,
    /// Kept over a restart of the bus until there is another.
    lock: Lock,
    /// What was last told.
    shutting_down: bool,
}

impl Watch {
    /// One connection, for as long as it lasts or somebody listens.
    async fn session(&mut self) -> LogindError {
        match self.listen().await {
            Err(error) => error,
            Ok(()) => LogindError::Lost,
        }
    }

    async fn listen(&mut self) -> Result<(), LogindError> {
        let bus = Bus::connect(&self.place.bus).await?;
        // Listening comes before the lock, so that no signal is lost between the two.
        let mut shutdowns = bus.stream(shutdown_rule()).await?;
        let mut owners = bus.stream(owner_rule()).await?;
        self.prepare(&bus).await?;
        tracing::info!(wanted = ?self.wanted, "a shutdown of the node waits for its pods");
        loop {
            tokio::select! {
                () = self.told.closed() => return Ok(()),
                message = shutdowns.next() => {
                    let Some(Ok(message)) = message else { return Ok(()) };
                    match message.body().deserialize::<bool>() {
                        Ok(begins) => self.signalled(&bus, begins).await?,
                        Err(error) => tracing::warn!(%error, "a PrepareForShutdown that says nothing"),
                    }
                }
                message = owners.next() => {
                    let Some(Ok(message)) = message else { return Ok(()) };
                    let body = message.body();
                    let owner = body.deserialize::<(&str, &str, &str)>();
                    if owner.is_ok_and(|(_, _, now)| !now.is_empty()) {
                        tracing::info!("logind was started anew");
                        self.prepare(&bus).await?;
                    }
                }
            }
        }
    }

    /// Makes sure that a shutdown waits, and of how things stand.
    async fn prepare(&mut self, bus: &Bus) -> Result<(), LogindError> {
        if let Err(error) = bus.raise_delay(self.wanted, &self.place.drop_ins).await {
            match error {
                LogindError::DropIn { .. } | LogindError::Delay { .. } => {
                    tracing::warn!(%error, "pods may have less time to end than they should");
                }
                other => return Err(other),
            }
        }
        let preparing: bool = bus.login_property("PreparingForShutdown").await?;
        if preparing {
            // It gives no more locks then.
            if !self.shutting_down {
                self.tell_shutdown().await;
            }
            return Ok(());
        }
        self.lock = bus.inhibit().await?;
        if std::mem::take(&mut self.shutting_down) {
            let _ = self.told.send(Told::Cancelled).await;
        }
        Ok(())
    }

    async fn signalled(&mut self, bus: &Bus, begins: bool) -> Result<(), LogindError> {
        if begins {
            self.tell_shutdown().await;
            return Ok(());
        }
        self.lock = bus.inhibit().await?;
        self.shutting_down = false;
        let _ = self.told.send(Told::Cancelled).await;
        Ok(())
    }

    async fn tell_shutdown(&mut self) {
        self.shutting_down = true;
        // Without a listener the lock goes with the message.
        let _ = self.told.send(Told::Shutdown(std::mem::take(&mut self.lock))).await;
    }
}

/// The message bus.
struct Bus(Connection);

impl Bus {
    async fn connect(address: &str) -> Result<Self, LogindError> {
        let connect =
            async { connection::Builder::address(address)?.method_timeout(TIMEOUT).build().await };
        let timed_out = || std::io::Error::from(std::io::ErrorKind::TimedOut).into();
        tokio::time::timeout(TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| Err(timed_out()))
            .map(Self)
            .map_err(|cause| LogindError::Connect { bus: address.to_owned(), cause })
    }

    async fn stream(
        &self,
        rule: zbus::Result<MatchRule<'_>>,
    ) -> Result<MessageStream, LogindError> {
        let subscribed =
            async { MessageStream::for_match_rule(rule?.to_owned(), &self.0, Some(QUEUE)).await };
        subscribed.await.map_err(|cause| LogindError::Call { operation: "AddMatch", cause })
    }

    async fn call<B, R>(
        &self,
        [destination, path, interface, operation]: [&'static str; 4],
        body: &B,
    ) -> Result<R, LogindError>
    where
        B: serde::Serialize + Type + Sync,
        R: for<'a> serde::Deserialize<'a> + Type,
    {
        let called = async {
            let (to, by) = (Some(destination), Some(interface));
            let reply = self.0.call_method(to, path, by, operation, body).await?;
            reply.body().deserialize()
        };
        called.await.map_err(|cause| LogindError::Call { operation, cause })
    }

    async fn login_property<T>(&self, name: &'static str) -> Result<T, LogindError>
    where
        T: TryFrom<OwnedValue, Error = zbus::zvariant::Error>,
    {
        let get = [LOGIN, LOGIN_PATH, PROPERTIES, "Get"];
        let value: OwnedValue = self.call(get, &(LOGIN_MANAGER, name)).await?;
        T::try_from(value)
            .map_err(|cause| LogindError::Call { operation: name, cause: cause.into() })
    }

    async fn delay(&self) -> Result<Duration, LogindError> {
        Ok(Duration::from_micros(self.login_property("InhibitDelayMaxUSec").await?))
    }

    /// Takes a lock that delays shutdowns.
    async fn inhibit(&self) -> Result<Lock, LogindError> {
        let what = ("shutdown", "kubelet", "longshore: pods need time to end", "delay");
        let inhibit = [LOGIN, LOGIN_PATH, LOGIN_MANAGER, "Inhibit"];
        let lock: zbus::zvariant::OwnedFd = self.call(inhibit, &what).await?;
        Ok(Lock(Some(lock.into())))
    }

    /// Has logind delay shutdowns for `wanted`, unless it does already.
    async fn raise_delay(&self, wanted: Duration, drop_ins: &Path) -> Result<(), LogindError> {
        if self.delay().await? >= wanted {
            return Ok(());
        }
        let path = drop_ins.join(DROP_IN);
        let text = format!(
            "# Written by longshore for KubeletConfiguration.shutdownGracePeriod.\n\
             [Login]\nInhibitDelayMaxSec={}\n",
            wanted.as_secs()
        );
        write_atomic(&path, 0o644, text.as_bytes())?;
        let kill = [SYSTEMD, SYSTEMD_PATH, SYSTEMD_MANAGER, "KillUnit"];
        self.call::<_, ()>(kill, &("systemd-logind.service", "all", SIGHUP)).await?;
        let mut has = Duration::ZERO;
        for look in 0..LOOKS {
            tokio::time::sleep(LOOK_AGAIN * (1 << look)).await;
            has = self.delay().await?;
            if has >= wanted {
                return Ok(());
            }
        }
        Err(LogindError::Delay { has, wanted, path })
    }
}

fn shutdown_rule() -> zbus::Result<MatchRule<'static>> {
    Ok(MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .interface(LOGIN_MANAGER)?
        .member("PrepareForShutdown")?
        .path(LOGIN_PATH)?
        .build())
}

fn owner_rule() -> zbus::Result<MatchRule<'static>> {
    Ok(MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .sender(DBUS)?
        .interface(DBUS)?
        .member("NameOwnerChanged")?
        .arg(0, LOGIN)?
        .build())
}

#[cfg(test)]
mod tests;
