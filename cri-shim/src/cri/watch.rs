//! Following a monitor: its exits become statuses and events, its own end the end of the sandbox.

use std::sync::Arc;

use tonic::Status;

use super::store::{Container, Sandbox};
use super::{PATIENCE, Shim, internal};
use crate::api::ContainerEventType;
use crate::client::Conversation;
use crate::monitor::protocol::{Exited, Reply, Request};
use crate::monitor::record;

impl Shim {
    /// Subscribes to a sandbox's monitor and follows it from then on.
    pub(super) async fn watch_monitor(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
    ) -> Result<(), Status> {
        let conversation = subscribe(sandbox).await?;
        let (this, sandbox) = (self.clone(), sandbox.clone());
        tokio::spawn(async move { this.follow(&sandbox, conversation).await });
        Ok(())
    }

    async fn follow(&self, sandbox: &Sandbox, mut conversation: Conversation) {
        loop {
            match conversation.next().await {
                Ok(Some(Reply::Exited { container, exit })) => {
                    if let Some(container) = self.store.find_container(&container) {
                        // A short life may end before its start has been told.
                        self.settle(&container).await;
                        self.exited(&container, exit);
                    }
                    continue;
                }
                Ok(Some(_)) => continue,
                Ok(None) => {}
                Err(error) => tracing::warn!(sandbox = sandbox.id, %error, "lost a monitor"),
            }
            if !sandbox.is_ready() {
                return;
            }
            // Dropped for being slow, or dead: its death is believed only when it cannot be asked.
            match subscribe(sandbox).await {
                Ok(again) => {
                    conversation = again;
                    self.refresh(sandbox);
                }
                Err(_) => return self.monitor_died(sandbox).await,
            }
        }
    }

    /// Takes an exit into the status; the first one counts.
    pub(super) fn exited(&self, container: &Arc<Container>, exit: Exited) {
        let changed = container.status.send_if_modified(|status| {
            if status.exited.is_some() {
                return false;
            }
            status.exited = Some(exit);
            status.starting = false;
            true
        });
        if changed {
            self.durability.sync(self.layout.container(&container.id));
            let id = &container.id;
            self.emit(ContainerEventType::ContainerStoppedEvent, id, &container.sandbox.id);
            container.status.send_modify(|status| status.end_told = true);
            tokio::spawn(super::poststop::run(self.layout.clone(), container.clone()));
        }
    }

    /// Reads from disk what a broken subscription may have missed.
    pub(super) fn refresh(&self, sandbox: &Sandbox) {
        for container in self.store.containers_of(&sandbox.id) {
            let directory = self.layout.container(&container.id);
            if let Ok(Some(exit)) = record::read(&directory, record::EXITED) {
                self.exited(&container, exit);
            }
        }
    }

    /// Ends a sandbox whose monitor is gone: nobody would see its containers' exits any more.
    pub(super) async fn monitor_died(&self, sandbox: &Sandbox) {
        tracing::error!(sandbox = sandbox.id, "the pod's monitor died; stopping its containers");
        sandbox.set_not_ready();
        self.refresh(sandbox);
        let containers = self.store.containers_of(&sandbox.id);
        for container in &containers {
            let cgroup = container.record().cgroup.clone();
            self.cgroups.kill(&cgroup);
        }
        for container in &containers {
            // A start whose answer came just before the death may not have been noted yet.
            self.settle(container).await;
            if container.status.borrow().started.is_some() {
                self.lost(container);
            }
        }
        self.emit(ContainerEventType::ContainerStoppedEvent, &sandbox.id, &sandbox.id);
    }

    /// Records the end of a container whose exit code nobody saw.
    pub(super) fn lost(&self, container: &Arc<Container>) {
        if container.status.borrow().exited.is_some() {
            return;
        }
        let exit = Exited {
            code: 255,
            at: record::now(),
            reason: "Unknown".to_owned(),
            message: "the container ended without its monitor seeing it".to_owned(),
            ..Exited::default()
        };
        let _ = record::write(&self.layout.container(&container.id), record::EXITED, &exit);
        self.exited(container, exit);
    }
}

async fn subscribe(sandbox: &Sandbox) -> Result<Conversation, Status> {
    let subscribe = async {
        let mut conversation = sandbox.monitor.open(&Request::Subscribe, &[]).await?;
        conversation.next().await?.ok_or_else(|| std::io::Error::other("the monitor is gone"))?;
        Ok::<_, std::io::Error>(conversation)
    };
    tokio::time::timeout(PATIENCE, subscribe)
        .await
        .map_err(|_| Status::deadline_exceeded("the pod's monitor does not answer"))?
        .map_err(|e| internal("following the pod's monitor", e))
}
