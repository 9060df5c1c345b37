//! systemd's manager over D-Bus: slices and scopes for the cgroup driver `systemd`.
//!
//! Under systemd the cgroup tree has one writer. A cgroup that is no unit of it keeps its limits
//! only until systemd realizes a neighbour or reloads, so pods are slices and containers are scopes
//! with their limits as properties, as kubelet and runc make them (KEP-2254; systemd's
//! CGROUP_DELEGATION). Exact values are written to the files afterwards: systemd keeps a CPU quota
//! as whole percents.
//!
//! The library is zbus, which cgroups-rs brings along. Its own systemd client is not used, as it
//! blocks, waits for no job, and starts no slice.

mod properties;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::Mutex;
use zbus::zvariant::{OwnedObjectPath, Value};
use zbus::{Connection, MatchRule, MessageStream, connection};

pub use properties::{Limits, scope, slice};

/// A property of a unit, by its name on the bus.
pub type Property = (&'static str, Value<'static>);

/// The message bus. systemd's own socket would do without it, but speaks only nearly D-Bus: the
/// names in its messages are none that zbus takes.
const BUS: &str = "/run/dbus/system_bus_socket";
const DESTINATION: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
/// Longest wait for an answer and for a job: a machine that boots has many before ours.
const TIMEOUT: Duration = Duration::from_secs(25);
/// Signals kept while an answer is awaited.
const QUEUE: usize = 4096;

/// Why systemd did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// systemd takes no calls.
    #[error(
        "connecting to systemd over {BUS} failed: {0}; check that dbus is installed and runs, or \
         take the cgroup driver cgroupfs"
    )]
    Connect(zbus::Error),
    /// The call was refused or lost.
    #[error("systemd: {operation} of unit {unit} failed: {cause}")]
    Call {
        /// The method.
        operation: &'static str,
        /// The unit.
        unit: String,
        /// What systemd or the bus said.
        cause: Box<zbus::Error>,
    },
    /// The job ended otherwise than well.
    #[error("systemd: {operation} of unit {unit} ended as {result:?}; see `systemctl status`")]
    Job {
        /// The method.
        operation: &'static str,
        /// The unit.
        unit: String,
        /// `failed`, `canceled`, `timeout`, `dependency`, `skipped`.
        result: String,
    },
    /// No word of the job's end.
    #[error("systemd: {operation} of unit {unit} did not end within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// The method.
        operation: &'static str,
        /// The unit.
        unit: String,
    },
}

/// Whether systemd runs this machine (sd_booted(3)) and can be called.
pub fn usable() -> bool {
    Path::new("/run/systemd/system").is_dir() && Path::new(BUS).exists()
}

/// A client that connects when it is first used, and again when the bus was restarted.
#[derive(Clone, Debug, Default)]
pub struct Systemd(Arc<Mutex<Option<Connection>>>);

impl Systemd {
    /// Starts a transient unit and waits until it is there. One that exists gets those of
    /// `properties` that can be changed, and is started if it had been stopped.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub async fn start(&self, unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
        match self.start_transient(unit, &properties.iter().collect::<Vec<_>>()).await {
            Err(error) if error.is(UNIT_EXISTS) => {
                let lasting = |p: &&Property| properties::is_lasting(p.0);
                let lasting: Vec<_> = properties.iter().filter(lasting).collect();
                self.set_properties(unit, &lasting).await?;
                self.job("StartUnit", unit, &(unit, "replace")).await
            }
            Err(error) if error.to_string().contains(properties::OOM_POLICY) => {
                let known = |p: &&Property| p.0 != properties::OOM_POLICY;
                let known: Vec<_> = properties.iter().filter(known).collect();
                self.start_transient(unit, &known).await
            }
            started => started,
        }
    }

    async fn start_transient(
        &self,
        unit: &str,
        properties: &[&Property],
    ) -> Result<(), SystemdError> {
        let auxiliary: [(&str, Vec<(&str, Value<'_>)>); 0] = [];
        let body = (unit, "replace", properties, auxiliary.as_slice());
        self.job("StartTransientUnit", unit, &body).await
    }

    /// Changes properties of a unit until the next boot.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub async fn set(&self, unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
        self.set_properties(unit, &properties.iter().collect::<Vec<_>>()).await
    }

    async fn set_properties(
        &self,
        unit: &str,
        properties: &[&Property],
    ) -> Result<(), SystemdError> {
        if properties.is_empty() {
            return Ok(());
        }
        self.call("SetUnitProperties", unit, &(unit, true, properties)).await.map(drop)
    }

    /// Stops a unit with everything in it, and forgets it if it failed. No such unit is a success.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub async fn stop(&self, unit: &str) -> Result<(), SystemdError> {
        let absent = |result: Result<(), SystemdError>| match result {
            Err(error) if error.is(NO_SUCH_UNIT) => Ok(()),
            other => other,
        };
        absent(self.job("StopUnit", unit, &(unit, "replace")).await)?;
        absent(self.call("ResetFailedUnit", unit, &(unit,)).await.map(drop))
    }

    /// The names of loaded units that are active and match one of `patterns` (shell globs).
    ///
    /// # Errors
    /// [`SystemdError`].
    pub async fn active(&self, patterns: &[&str]) -> Result<HashSet<String>, SystemdError> {
        type Unit = (
            String,
            String,
            String,
            String,
            String,
            String,
            OwnedObjectPath,
            u32,
            String,
            OwnedObjectPath,
        );
        let (operation, unit) = ("ListUnitsByPatterns", patterns.join(" "));
        let reply = self.call(operation, &unit, &(["active"].as_slice(), patterns)).await?;
        let units: Vec<Unit> = reply.body().deserialize().map_err(|cause| SystemdError::Call {
            operation,
            unit,
            cause: cause.into(),
        })?;
        Ok(units.into_iter().map(|unit| unit.0).collect())
    }

    /// Calls a method that enqueues a job, and waits for the job's end.
    async fn job<B>(
        &self,
        operation: &'static str,
        unit: &str,
        body: &B,
    ) -> Result<(), SystemdError>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType + Sync,
    {
        let unit = unit.to_owned();
        let timeout = SystemdError::Timeout { operation, unit: unit.clone() };
        let job = async {
            let failed = |cause: zbus::Error| SystemdError::Call {
                operation,
                unit: unit.clone(),
                cause: cause.into(),
            };
            let connection = self.connection().await?;
            let mut ended = MessageStream::for_match_rule(job_removed(), &connection, Some(QUEUE))
                .await
                .map_err(failed)?;
            let reply = self.call(operation, &unit, body).await?;
            let job: OwnedObjectPath = reply.body().deserialize().map_err(failed)?;
            while let Some(message) = ended.next().await {
                let message = message.map_err(failed)?;
                let body = message.body();
                let (_, path, _, result): (u32, OwnedObjectPath, &str, &str) =
                    body.deserialize().map_err(failed)?;
                if path == job {
                    if result == "done" {
                        return Ok(());
                    }
                    let (unit, result) = (unit.clone(), result.to_owned());
                    return Err(SystemdError::Job { operation, unit, result });
                }
            }
            let lost = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
            Err(failed(zbus::Error::InputOutput(Arc::new(lost))))
        };
        tokio::time::timeout(TIMEOUT, job).await.unwrap_or(Err(timeout))
    }

    async fn call<B>(
        &self,
        operation: &'static str,
        unit: &str,
        body: &B,
    ) -> Result<zbus::Message, SystemdError>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType + Sync,
    {
        let mut again = true;
        loop {
            let connection = self.connection().await?;
            let destination = Some(DESTINATION);
            match connection.call_method(destination, PATH, Some(MANAGER), operation, body).await {
                Ok(reply) => return Ok(reply),
                // The bus was restarted, as at its upgrade.
                Err(zbus::Error::InputOutput(_)) if again => {
                    again = false;
                    *self.0.lock().await = None;
                }
                Err(cause) => {
                    let (unit, cause) = (unit.to_owned(), cause.into());
                    return Err(SystemdError::Call { operation, unit, cause });
                }
            }
        }
    }

    async fn connection(&self) -> Result<Connection, SystemdError> {
        let mut kept = self.0.lock().await;
        if let Some(connection) = &*kept {
            return Ok(connection.clone());
        }
        let connection = bus().await.map_err(SystemdError::Connect)?;
        *kept = Some(connection.clone());
        Ok(connection)
    }
}

async fn bus() -> zbus::Result<Connection> {
    let connect = async {
        let connection = connection::Builder::system()?.method_timeout(TIMEOUT).build().await?;
        // Only a subscriber is told of jobs.
        connection
            .call_method(Some(DESTINATION), PATH, Some(MANAGER), "Subscribe", &())
            .await
            .map(|_| connection)
    };
    tokio::time::timeout(TIMEOUT, connect).await.map_err(|_| timed_out())?
}

fn timed_out() -> zbus::Error {
    zbus::Error::InputOutput(Arc::new(std::io::ErrorKind::TimedOut.into()))
}

fn job_removed() -> MatchRule<'static> {
    MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .interface(MANAGER)
        .and_then(|rule| rule.member("JobRemoved"))
        .map(|rule| rule.build())
        .unwrap_or_else(|_| MatchRule::builder().build())
}

impl SystemdError {
    fn is(&self, name: &str) -> bool {
        match self {
            SystemdError::Call { cause, .. } => {
                matches!(&**cause, zbus::Error::MethodError(error, _, _) if error.as_str() == name)
            }
            _ => false,
        }
    }
}
