//! StopPodSandbox and RemovePodSandbox. Both may be called any number of times, in any state.

use std::sync::Arc;

use nix::mount::{MntFlags, umount2};
use tonic::Status;

use super::store::Sandbox;
use super::{PATIENCE, Shim, blocking, internal};
use crate::api::{self, ContainerEventType};
use crate::monitor::protocol::Request;
use crate::spec::cgroup_path;
use crate::state::{ignore_absent, remove_directory};

impl Shim {
    pub(super) async fn stop_pod_sandbox(
        self: &Arc<Self>,
        request: api::StopPodSandboxRequest,
    ) -> Result<api::StopPodSandboxResponse, Status> {
        if let Some(sandbox) = self.store.find_sandbox(&request.pod_sandbox_id) {
            let this = self.clone();
            tokio::spawn(async move { this.stop_sandbox(&sandbox).await })
                .await
                .map_err(|e| internal("stopping the sandbox", e))??;
        }
        Ok(api::StopPodSandboxResponse {})
    }

    pub(super) async fn stop_sandbox(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
    ) -> Result<(), Status> {
        let _changing = sandbox.changing.lock().await;
        if sandbox.record().stopped {
            return Ok(());
        }
        let was_ready = sandbox.is_ready();
        let containers = self.store.containers_of(&sandbox.id);
        let stops = containers.iter().map(|c| self.stop_now(c));
        for stopped in futures::future::join_all(stops).await {
            stopped?;
        }
        // From here on the monitor's end is expected.
        sandbox.set_not_ready();
        self.clear_runtime(&sandbox.id, Some(sandbox)).await?;
        let directory = self.layout.sandbox(&sandbox.id);
        {
            let mut record = sandbox.record();
            record.stopped = true;
            record.write(&directory).map_err(|e| internal("recording the sandbox's stop", e))?;
        }
        self.durability.sync(directory);
        if was_ready {
            self.emit(ContainerEventType::ContainerStoppedEvent, &sandbox.id, &sandbox.id);
        }
        Ok(())
    }

    /// Takes away what a sandbox has while it runs: its network, monitor, mounts, cgroup.
    async fn clear_runtime(&self, id: &str, sandbox: Option<&Sandbox>) -> Result<(), Status> {
        let (torn_down, ()) = tokio::join!(self.network.teardown(id), self.end_monitor(id));
        let (layout, cgroups, id) = (self.layout.clone(), self.cgroups.clone(), id.to_owned());
        let own = sandbox.map(|s| {
            let record = s.record();
            (record.cgroup.clone(), record.own_cgroup)
        });
        // Goes on after an error, so that as little as possible is left, and tells the first one.
        let cleared = blocking(move || {
            let unpinned = crate::network::netns::delete(&layout.netns(&id))
                .map_err(|e| internal("removing the network namespace", e))
                .and(
                    crate::network::netns::delete(&layout.userns(&id))
                        .map_err(|e| internal("removing the user namespace", e)),
                );
            let shm = layout.shm(&id);
            let _ = umount2(&shm, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let unmounted = ignore_absent(std::fs::remove_dir(&shm))
                .map_err(|e| internal("removing the sandbox's /dev/shm", e));
            if let Some((cgroup, own)) = own {
                cgroups.remove(&cgroup_path::monitor(&cgroup, &id));
                if own {
                    cgroups.remove(&cgroup);
                }
            }
            unpinned.and(unmounted)
        })
        .await?;
        torn_down.map_err(|e| internal("taking down the pod's network", e)).and(cleared)
    }

    /// Ends a monitor and waits until its process is gone, so that its cgroup can be removed.
    async fn end_monitor(&self, id: &str) {
        let client = crate::client::MonitorClient::new(self.layout.monitor(id));
        // That it is gone already is what is wanted, so nothing here is an error.
        let ended = async {
            let mut conversation = client.open(&Request::Exit, &[]).await?;
            while conversation.next().await?.is_some() {}
            Ok::<_, std::io::Error>(())
        };
        let _ = tokio::time::timeout(PATIENCE, ended).await;
        let _ = std::fs::remove_file(client.socket());
    }

    pub(super) async fn remove_pod_sandbox(
        self: &Arc<Self>,
        request: api::RemovePodSandboxRequest,
    ) -> Result<api::RemovePodSandboxResponse, Status> {
        if let Some(sandbox) = self.store.find_sandbox(&request.pod_sandbox_id) {
            let this = self.clone();
            tokio::spawn(async move { this.remove_sandbox(&sandbox).await })
                .await
                .map_err(|e| internal("removing the sandbox", e))??;
        }
        Ok(api::RemovePodSandboxResponse {})
    }

    async fn remove_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), Status> {
        self.stop_sandbox(sandbox).await?;
        for container in self.store.containers_of(&sandbox.id) {
            self.remove_one(&container).await?;
        }
        let directory = self.layout.sandbox(&sandbox.id);
        blocking(move || remove_directory(&directory))
            .await?
            .map_err(|e| internal("removing the sandbox's directory", e))?;
        if let (cgroup, true) = {
            let record = sandbox.record();
            (record.cgroup.clone(), record.own_cgroup)
        } {
            self.cgroups.remove(&cgroup);
        }
        self.store.drop_sandbox(&sandbox.id);
        self.emit_of(ContainerEventType::ContainerDeletedEvent, &sandbox.id, Some(sandbox));
        Ok(())
    }

    /// Takes away everything that may exist of a sandbox by its id alone: after a failed start, or
    /// what a crash left.
    pub(super) async fn clear_sandbox(&self, id: &str) {
        if let Err(error) = self.clear_runtime(id, None).await {
            tracing::warn!(sandbox = id, %error, "clearing a sandbox that did not start");
        }
        let directory = self.layout.sandbox(id);
        let own = std::path::Path::new(&self.config.default_cgroup_parent).join(id);
        self.cgroups.remove(&own);
        let _ = blocking(move || remove_directory(&directory)).await;
    }
}
