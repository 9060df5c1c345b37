//! StopPodSandbox and RemovePodSandbox. Both may be called any number of times, in any state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tonic::Status;

use super::store::Sandbox;
use super::{PATIENCE, Shim, blocking, internal};
use crate::api::{self, ContainerEventType};
use crate::client::MonitorClient;
use crate::crash::point;
use crate::monitor::protocol::{Reply, Request};
use crate::spec::cgroup_path;
use crate::state::{ignore_absent, remove_directory};

/// The first pause between attempts to remove a cgroup; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// How often it is tried: the dying are in it for a moment more, two seconds in all.
const ATTEMPTS: usize = 12;

impl Shim {
    pub(super) async fn stop_pod_sandbox(
        self: &Arc<Self>,
        request: api::StopPodSandboxRequest,
    ) -> Result<api::StopPodSandboxResponse, Status> {
        if let Some(sandbox) = self.store.named_sandbox(&request.pod_sandbox_id)? {
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
        point("stop sandbox: containers stopped");
        // From here on the monitor's end is expected.
        sandbox.set_not_ready();
        self.clear_runtime(&sandbox.id, Some(sandbox)).await?;
        point("stop sandbox: cleared");
        let directory = self.layout.sandbox(&sandbox.id);
        {
            let mut record = sandbox.record();
            record.stopped = true;
            record.write(&directory).map_err(|e| internal("recording the sandbox's stop", e))?;
        }
        point("stop sandbox: recorded");
        self.durability.sync(directory);
        if was_ready {
            self.emit(ContainerEventType::ContainerStoppedEvent, &sandbox.id, &sandbox.id);
        }
        Ok(())
    }

    /// Takes away what a sandbox has while it runs: its network, monitor, mounts, cgroup.
    async fn clear_runtime(&self, id: &str, sandbox: Option<&Sandbox>) -> Result<(), Status> {
        let monitor = MonitorClient::new(self.layout.monitor(id));
        let network = async {
            let torn_down = self.network.teardown(id).await;
            point("clear sandbox: network torn down");
            torn_down
        };
        let (torn_down, ()) = tokio::join!(network, self.end_monitor(&monitor));
        point("clear sandbox: monitor ended");
        let (layout, name) = (self.layout.clone(), id.to_owned());
        // Goes on after an error, so that as little as possible is left, and tells the first one.
        let cleared = blocking(move || {
            let unpinned = crate::network::netns::delete(&layout.netns(&name))
                .map_err(|e| internal("removing the network namespace", e))
                .and(
                    crate::network::netns::delete(&layout.userns(&name))
                        .map_err(|e| internal("removing the user namespace", e)),
                );
            point("clear sandbox: netns unpinned");
            let shm = layout.shm(&name);
            let _ = umount2(&shm, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let unmounted = ignore_absent(std::fs::remove_dir(&shm))
                .map_err(|e| internal("removing the sandbox's /dev/shm", e));
            point("clear sandbox: shm unmounted");
            unpinned.and(unmounted)
        })
        .await?;
        if let Some(sandbox) = sandbox {
            let (cgroup, own) = {
                let record = sandbox.record();
                (record.cgroup.clone(), record.own_cgroup)
            };
            self.remove_cgroup(&cgroup_path::monitor(&cgroup, id)).await;
            if own {
                self.remove_cgroup(&cgroup).await;
            }
        }
        torn_down.map_err(|e| internal("taking down the pod's network", e)).and(cleared)
    }

    /// Removes a cgroup whose processes have ended or are about to.
    pub(super) async fn remove_cgroup(&self, cgroup: &Path) {
        let mut pause = FIRST_PAUSE;
        for _ in 0..ATTEMPTS {
            if self.cgroups.remove(cgroup) {
                return;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        tracing::warn!(cgroup = %cgroup.display(), "a cgroup is still in use and stays");
    }

    /// Ends a monitor, with all that is left under it, and waits until its process is gone, so that
    /// its cgroup can be removed.
    pub(super) async fn end_monitor(&self, client: &MonitorClient) {
        // That it is gone already is what is wanted, so nothing here is an error.
        let ended = async {
            let mut conversation = client.open(&Request::Exit { force: true }, &[]).await?;
            let mut refused = false;
            while let Some(reply) = conversation.next().await? {
                if matches!(reply, Reply::Failed { .. }) {
                    // It is too old to be told so.
                    refused = true;
                    break;
                }
            }
            if refused {
                kill_with_children(client.greet().await?.pid);
                while conversation.next().await?.is_some() {}
            }
            Ok::<_, std::io::Error>(())
        };
        let _ = tokio::time::timeout(PATIENCE, ended).await;
        let _ = std::fs::remove_file(client.socket());
    }

    pub(super) async fn remove_pod_sandbox(
        self: &Arc<Self>,
        request: api::RemovePodSandboxRequest,
    ) -> Result<api::RemovePodSandboxResponse, Status> {
        if let Some(sandbox) = self.store.named_sandbox(&request.pod_sandbox_id)? {
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
        point("remove sandbox: containers removed");
        // Its cgroup before its record, which alone knows where that is: a container that was
        // being removed may have been in it when the sandbox was stopped.
        let (cgroup, own) = {
            let record = sandbox.record();
            (record.cgroup.clone(), record.own_cgroup)
        };
        if own {
            self.remove_cgroup(&cgroup).await;
        }
        let directory = self.layout.sandbox(&sandbox.id);
        blocking(move || remove_directory(&directory))
            .await?
            .map_err(|e| internal("removing the sandbox's directory", e))?;
        point("remove sandbox: directory removed");
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
        let own = PathBuf::from(&self.config.default_cgroup_parent).join(id);
        self.remove_cgroup(&own).await;
        let directory = self.layout.sandbox(id);
        let _ = blocking(move || remove_directory(&directory)).await;
    }
}

/// Ends a monitor that does not end its containers itself: they are its children.
fn kill_with_children(monitor: i32) {
    let path = format!("/proc/{monitor}/task/{monitor}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    for pid in children.chain([monitor]) {
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
