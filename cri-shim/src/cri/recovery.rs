//! Finding again what an earlier shim left: sandboxes whose monitors live, containers that run or
//! ended meanwhile, and the leftovers of whatever was interrupted.
//!
//! Level-triggered: the records on disk say what should be there, the monitors what is, and what
//! neither knows is taken away. A record that cannot be read says nothing, so what may belong to it
//! is left alone for as long as anything of it runs.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::store::{Container, ContainerStatus, Sandbox};
use super::{PATIENCE, Shim};
use crate::client::{Greeting, MonitorClient};
use crate::crash::point;
use crate::monitor::protocol::Started;
use crate::monitor::record;
use crate::state::{ContainerRecord, Found, SandboxRecord, keep_unreadable, names};

/// What has to be left alone, by id.
#[derive(Default)]
struct Unmanaged {
    sandboxes: HashSet<String>,
    containers: HashSet<String>,
}

impl Shim {
    /// Rebuilds the store and clears leftovers. Errors of single sandboxes and containers are
    /// logged; they never stop the rest.
    pub async fn recover(self: &Arc<Self>) {
        let mut unmanaged = Unmanaged::default();
        for id in listed(&self.layout.sandboxes()) {
            match SandboxRecord::find(&self.layout.sandbox(&id)) {
                Found::Record(record, config) => self.recover_sandbox(*record, config).await,
                Found::Nothing => self.clear_sandbox(&id).await,
                Found::Unreadable(error) => {
                    if self.leave_sandbox(&id, &error).await {
                        unmanaged.sandboxes.insert(id);
                    }
                }
            }
        }
        point("recovery: sandboxes found");
        for id in listed(&self.layout.containers()) {
            match ContainerRecord::find(&self.layout.container(&id)) {
                Found::Record(record, _) if unmanaged.sandboxes.contains(&record.sandbox) => {
                    unmanaged.containers.insert(id);
                }
                Found::Record(record, config) => {
                    match self.store.find_sandbox(&record.sandbox) {
                        Some(sandbox) => self.recover_container(*record, config, sandbox),
                        None => {
                            // Its sandbox was removed, and the removal interrupted.
                            self.cgroups.kill(&record.cgroup);
                            self.remove_cgroup(&record.cgroup).await;
                            self.clear_container(&id).await;
                        }
                    }
                }
                Found::Nothing => self.clear_container(&id).await,
                Found::Unreadable(error) => {
                    if self.leave_container(&id, &error).await {
                        unmanaged.containers.insert(id);
                    }
                }
            }
        }
        point("recovery: containers found");
        // Subscribed before the exit records are read again, so that no exit falls between.
        for sandbox in self.store.sandboxes() {
            if sandbox.is_ready() && self.watch_monitor(&sandbox).await.is_err() {
                self.monitor_died(&sandbox).await;
            }
            self.refresh(&sandbox);
        }
        point("recovery: monitors followed");
        self.clear_unknown(&unmanaged).await;
        point("recovery: leftovers cleared");
        let this = self.clone();
        tokio::spawn(async move { this.recover_scopes().await });
    }

    async fn recover_sandbox(
        self: &Arc<Self>,
        record: SandboxRecord,
        config: crate::api::PodSandboxConfig,
    ) {
        let monitor = MonitorClient::new(self.layout.monitor(&record.id));
        let mut ready = !record.stopped && record.boot_id == self.boot_id;
        let mut shared_init = None;
        if ready {
            match greet(&monitor).await {
                Some(greeting) => shared_init = greeting.init,
                None => {
                    tracing::warn!(sandbox = record.id, "the pod's monitor is gone");
                    ready = false;
                }
            }
        }
        let sandbox = Sandbox::new(record, config, monitor, shared_init, ready);
        self.store.add_sandbox(Arc::new(sandbox));
    }

    /// A sandbox whose record cannot be read: whether it has to be left alone.
    async fn leave_sandbox(
        self: &Arc<Self>,
        id: &str,
        error: &(dyn std::fmt::Display + Sync),
    ) -> bool {
        let Some(greeting) = greet(&MonitorClient::new(self.layout.monitor(id))).await else {
            tracing::error!(sandbox = id, %error, "nothing of it runs any more; it is taken away");
            keep_unreadable(&self.layout, &self.layout.sandbox(id), id);
            self.clear_sandbox(id).await;
            return false;
        };
        tracing::error!(
            sandbox = id, %error, monitor = greeting.pid,
            "its containers run on and are not managed: put a readable record back, or end its \
             monitor, and restart"
        );
        true
    }

    fn recover_container(
        self: &Arc<Self>,
        record: ContainerRecord,
        config: crate::api::ContainerConfig,
        sandbox: Arc<Sandbox>,
    ) {
        let directory = self.layout.container(&record.id);
        let mut torn = false;
        let mut set_aside = |error: std::io::Error| {
            tracing::error!(container = record.id, %error, "unreadable record of a start or an end");
            torn = true;
        };
        let started = record::read(&directory, record::STARTED).map_err(&mut set_aside);
        let exited = record::read(&directory, record::EXITED).map_err(&mut set_aside);
        let (started, exited) = (started.unwrap_or_default(), exited.unwrap_or_default());
        let started = started.or_else(|| torn.then(|| self.running_process(&record)).flatten());
        let unseen = exited.is_none() && (started.is_some() || torn);
        let runs = || !self.cgroups.processes(&record.cgroup).is_empty();
        // Without its monitor, or a readable word of it, nobody knows the exit code.
        let ended_unseen = unseen && (!sandbox.is_ready() || (torn && !runs()));
        // Nobody is subscribed yet.
        let end_told = exited.is_some();
        let status = ContainerStatus { started, exited, end_told, starting: false };
        let container = Arc::new(Container::new(record, config, sandbox, status));
        self.store.add_container(container.clone());
        if ended_unseen {
            let cgroup = container.record().cgroup.clone();
            self.cgroups.kill(&cgroup);
            self.lost(&container);
        }
    }

    /// What is known of the start of a container that runs although the record of that is lost.
    fn running_process(&self, record: &ContainerRecord) -> Option<Started> {
        let pid = self.cgroups.processes(&record.cgroup).first()?.as_raw();
        let started = Started { pid, at: record.created_at, ..Started::default() };
        let directory = self.layout.container(&record.id);
        if let Err(error) = record::write(&directory, record::STARTED, &started) {
            tracing::warn!(container = record.id, %error, "recording its start again");
        }
        Some(started)
    }

    /// A container whose record cannot be read: whether it has to be left alone.
    async fn leave_container(
        self: &Arc<Self>,
        id: &str,
        error: &(dyn std::fmt::Display + Sync),
    ) -> bool {
        let runs = bundle_cgroup(&self.layout.bundle(id))
            .is_some_and(|cgroup| !self.cgroups.processes(Path::new(&cgroup)).is_empty());
        if runs {
            tracing::error!(
                container = id, %error,
                "it runs on and is not managed until its pod is stopped: put a readable record \
                 back and restart"
            );
        } else {
            tracing::error!(container = id, %error, "it does not run any more and is taken away");
            keep_unreadable(&self.layout, &self.layout.container(id), id);
            self.clear_container(id).await;
        }
        runs
    }

    /// Takes away what belongs to nobody: network attachments, namespaces, bundles, snapshots,
    /// monitors of sandboxes that were never recorded.
    async fn clear_unknown(&self, unmanaged: &Unmanaged) {
        let sandboxes = self.store.sandboxes();
        let ready = sandboxes.iter().filter(|s| s.is_ready()).map(|s| s.id.clone());
        let keep: Vec<String> = ready.chain(unmanaged.sandboxes.iter().cloned()).collect();
        if let Err(error) = self.network.collect(&keep).await {
            tracing::warn!(%error, "collecting networks of sandboxes that are gone");
        }
        let known = sandboxes.iter().map(|s| s.id.clone());
        let known: HashSet<String> = known.chain(unmanaged.sandboxes.iter().cloned()).collect();
        let run = &self.layout.run;
        for directory in [run.join("netns"), run.join("userns"), self.layout.mounts().join("shm")] {
            for id in listed(&directory) {
                if !known.contains(&id) {
                    self.clear_sandbox(&id).await;
                }
            }
        }
        let sockets: HashSet<_> = known.iter().map(|id| self.layout.monitor(id)).collect();
        for name in listed(&self.layout.run.join("m")) {
            let socket = self.layout.run.join("m").join(&name);
            if !sockets.contains(&socket) {
                self.end_monitor(&MonitorClient::new(socket)).await;
            }
        }
        let known = self.store.containers().into_iter().map(|c| c.id.clone());
        let known: HashSet<String> = known.chain(unmanaged.containers.iter().cloned()).collect();
        let bundles: HashSet<_> = known.iter().map(|id| self.layout.bundle(id)).collect();
        for name in listed(&self.layout.run.join("c")) {
            let bundle = self.layout.run.join("c").join(&name);
            if !bundles.contains(&bundle) {
                let _ = std::fs::remove_dir_all(bundle);
            }
        }
        for id in self.snapshots.list().unwrap_or_default() {
            if !known.contains(&id) {
                self.clear_container(&id).await;
            }
        }
    }
}

async fn greet(monitor: &MonitorClient) -> Option<Greeting> {
    tokio::time::timeout(PATIENCE, monitor.greet()).await.ok()?.ok()
}

/// The cgroup of the container whose bundle this is.
fn bundle_cgroup(bundle: &Path) -> Option<String> {
    let text = std::fs::read(bundle.join("config.json")).ok()?;
    let spec: serde_json::Value = serde_json::from_slice(&text).ok()?;
    Some(spec["linux"]["cgroupsPath"].as_str()?.to_owned())
}

fn listed(directory: &Path) -> Vec<String> {
    match names(directory) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::error!(directory = %directory.display(), %error, "unreadable directory");
            Vec::new()
        }
    }
}
