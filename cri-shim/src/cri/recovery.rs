//! Finding again what an earlier shim left: sandboxes whose monitors live, containers that run or
//! ended meanwhile, and the leftovers of whatever was interrupted.
//!
//! Level-triggered: the records on disk say what should be there, the monitors what is, and what
//! neither knows is taken away.

use std::collections::HashSet;
use std::sync::Arc;

use super::store::{Container, ContainerStatus, Sandbox};
use super::{PATIENCE, Shim};
use crate::client::MonitorClient;
use crate::monitor::protocol::{Reply, Request, VERSION};
use crate::monitor::record;
use crate::state::{ContainerRecord, SandboxRecord, names};

impl Shim {
    /// Rebuilds the store and clears leftovers. Errors of single sandboxes and containers are
    /// logged; they never stop the rest.
    pub async fn recover(self: &Arc<Self>) {
        for id in listed(&self.layout.sandboxes()) {
            match SandboxRecord::read(&self.layout.sandbox(&id)) {
                Ok(Some(record)) => self.recover_sandbox(record).await,
                Ok(None) => self.clear_sandbox(&id).await,
                // Set aside by the read; what runs of it is not touched.
                Err(error) => tracing::error!(sandbox = id, %error, "unreadable sandbox record"),
            }
        }
        for id in listed(&self.layout.containers()) {
            match ContainerRecord::read(&self.layout.container(&id)) {
                Ok(Some(record)) => {
                    if !self.layout.sandbox(&record.sandbox).exists() {
                        // Its sandbox was removed, and the removal interrupted.
                        self.cgroups.kill(&record.cgroup);
                        self.cgroups.remove(&record.cgroup);
                        self.clear_container(&id).await;
                    } else {
                        self.recover_container(record);
                    }
                }
                Ok(None) => self.clear_container(&id).await,
                Err(error) => {
                    tracing::error!(container = id, %error, "unreadable container record")
                }
            }
        }
        // Subscribed before the exit records are read again, so that no exit falls between.
        for sandbox in self.store.sandboxes() {
            if sandbox.is_ready() && self.watch_monitor(&sandbox).await.is_err() {
                self.monitor_died(&sandbox);
            }
            self.refresh(&sandbox);
        }
        self.clear_unknown().await;
        let this = self.clone();
        tokio::spawn(async move { this.recover_scopes().await });
    }

    async fn recover_sandbox(self: &Arc<Self>, record: SandboxRecord) {
        let config = match record.config() {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(sandbox = record.id, %error, "unreadable sandbox config");
                return;
            }
        };
        let monitor = MonitorClient::new(self.layout.monitor(&record.id));
        let mut ready = !record.stopped && record.boot_id == self.boot_id;
        let mut shared_init = None;
        if ready {
            let call = monitor.call(&Request::Hello { version: VERSION });
            match tokio::time::timeout(PATIENCE, call).await {
                Ok(Ok(Reply::Hello { init, .. })) => shared_init = init,
                _ => {
                    tracing::warn!(sandbox = record.id, "the pod's monitor is gone");
                    ready = false;
                }
            }
        }
        let sandbox = Sandbox::new(record, config, monitor, shared_init, ready);
        self.store.add_sandbox(Arc::new(sandbox));
    }

    fn recover_container(self: &Arc<Self>, record: ContainerRecord) {
        let Some(sandbox) = self.store.find_sandbox(&record.sandbox) else {
            tracing::warn!(container = record.id, sandbox = record.sandbox, "its sandbox is gone");
            return;
        };
        let config = match record.config() {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(container = record.id, %error, "unreadable container config");
                return;
            }
        };
        let directory = self.layout.container(&record.id);
        let read_failed = |error| {
            tracing::error!(container = record.id, %error, "unreadable record");
            None
        };
        let exited = record::read(&directory, record::EXITED).unwrap_or_else(|error| {
            tracing::error!(container = record.id, %error, "unreadable record");
            None
        });
        let status = ContainerStatus {
            started: record::read(&directory, record::STARTED).unwrap_or_else(read_failed),
            // Nobody is subscribed yet.
            end_told: exited.is_some(),
            exited,
            starting: false,
        };
        let ended_unseen =
            status.started.is_some() && status.exited.is_none() && !sandbox.is_ready();
        let container = Arc::new(Container::new(record, config, sandbox, status));
        self.store.add_container(container.clone());
        if ended_unseen {
            let cgroup = container.record().cgroup.clone();
            self.cgroups.kill(&cgroup);
            self.lost(&container);
        }
    }

    /// Takes away what belongs to nobody: network attachments, namespaces, bundles, snapshots,
    /// monitors of sandboxes that were never recorded.
    async fn clear_unknown(&self) {
        let sandboxes = self.store.sandboxes();
        let keep: Vec<String> =
            sandboxes.iter().filter(|s| s.is_ready()).map(|s| s.id.clone()).collect();
        if let Err(error) = self.network.collect(&keep).await {
            tracing::warn!(%error, "collecting networks of sandboxes that are gone");
        }
        let known: HashSet<String> = sandboxes.iter().map(|s| s.id.clone()).collect();
        for kind in ["netns", "userns"] {
            for id in listed(&self.layout.run.join(kind)) {
                if !known.contains(&id) {
                    self.clear_sandbox(&id).await;
                }
            }
        }
        for id in listed(&self.layout.mounts().join("shm")) {
            if !known.contains(&id) {
                self.clear_sandbox(&id).await;
            }
        }
        let sockets: HashSet<_> = sandboxes.iter().map(|s| self.layout.monitor(&s.id)).collect();
        for name in listed(&self.layout.run.join("m")) {
            let socket = self.layout.run.join("m").join(&name);
            if !sockets.contains(&socket) {
                let client = MonitorClient::new(socket.clone());
                let _ = tokio::time::timeout(PATIENCE, client.call(&Request::Exit)).await;
                let _ = std::fs::remove_file(socket);
            }
        }
        let containers = self.store.containers();
        let bundles: HashSet<_> = containers.iter().map(|c| self.layout.bundle(&c.id)).collect();
        for name in listed(&self.layout.run.join("c")) {
            let bundle = self.layout.run.join("c").join(&name);
            if !bundles.contains(&bundle) {
                let _ = std::fs::remove_dir_all(bundle);
            }
        }
        let known: HashSet<_> = containers.iter().map(|c| c.id.as_str()).collect();
        for id in self.snapshots.list().unwrap_or_default() {
            // A container whose record could not be read keeps its files.
            if !known.contains(id.as_str()) && !self.layout.container(&id).exists() {
                self.clear_container(&id).await;
            }
        }
    }
}

fn listed(directory: &std::path::Path) -> Vec<String> {
    match names(directory) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::error!(directory = %directory.display(), %error, "unreadable directory");
            Vec::new()
        }
    }
}
