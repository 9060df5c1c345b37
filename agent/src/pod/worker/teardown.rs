//! Taking away what is left of a pod that does not run any more.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::{Done, State, Step, Worker};
use crate::ids::PodUid;
use crate::metrics::{METRICS, VolumeWork, volume_plugin};
use crate::pod::backoff::Restart;
use crate::pod::deps::Deps;
use crate::pod::logs::{remove_container_logs, remove_instance_logs, remove_pod_logs};
use crate::pod::observed::{Container, ContainerId, ContainerState, SandboxId, names};
use crate::pod::spec::spec_of;

impl Worker {
    /// Begins the teardown where it is due.
    pub(super) fn tear_down(&mut self, now: Timestamp) {
        let State::TearingDown { everything } = self.state else { return };
        if !self.teardown.due(now) {
            return;
        }
        self.teardown = Step::Busy;
        let (deps, pod, uid) = (self.deps.clone(), self.pod.clone(), self.uid.clone());
        let sandboxes: Vec<_> = self.observed.sandboxes.iter().map(|s| s.id.clone()).collect();
        let containers: Vec<_> = self.observed.containers.iter().map(|c| c.id.clone()).collect();
        self.begin_task(async move {
            let result = take_away(&deps, &pod, &uid, &sandboxes, &containers, everything).await;
            Done::TornDown { everything, result }
        });
    }

    pub(super) fn torn_down_well(&mut self, everything: bool) {
        self.teardown = Step::Done;
        self.give_back();
        if !everything {
            self.state = State::Finished;
            for sandbox in &mut self.observed.sandboxes {
                sandbox.ready = false;
            }
            return;
        }
        self.deps.store.remove(&self.uid);
        self.deps.objects.release(&self.uid);
        self.deps.table.remove(&self.uid);
        if self.source.is_some() {
            self.deps.statuses.gone(&self.pod);
        }
        self.state = State::Gone;
    }

    /// Removes all instances, so that the pod starts again in the same sandbox.
    pub(super) fn reset(&mut self, ids: &[ContainerId], waits: Vec<(String, Restart)>) {
        let count = match &self.facts.reset {
            Step::Failed(failure) => failure.count,
            _ => 0,
        };
        self.facts.reset = Step::Busy;
        self.facts.waits.extend(waits);
        let gone = ids.iter().filter_map(|id| self.observed.container(id)).cloned();
        let gone: Vec<Container> = gone.collect();
        let (deps, pod) = (self.deps.clone(), self.pod.clone());
        self.begin_task(async move {
            let mut removed = Vec::new();
            for instance in gone {
                match deps.runtime.remove_container(instance.id.as_str()).await {
                    Ok(()) => {}
                    Err(error) if error.is_not_found() => {}
                    Err(error) => {
                        let text = format!("remove container {}: {error}", instance.name);
                        return Done::Reset(count, removed, Err(text));
                    }
                }
                // The log of the last instance of each is kept, for whoever asks what happened.
                let kept = u32::try_from(deps.node.gc.dead_per_container).unwrap_or(u32::MAX);
                if let Some(old) = instance.attempt.checked_sub(kept.max(1)) {
                    let name = &instance.name;
                    remove_instance_logs(&deps.node, &pod, name, old, &instance.id).await;
                }
                if let Some(words) = instance.annotations.get(names::MESSAGE_FILE) {
                    let _ = tokio::fs::remove_file(words).await;
                }
                removed.push(instance.id);
            }
            Done::Reset(count, removed, Ok(()))
        });
    }

    pub(super) fn reset_done(
        &mut self,
        count: u32,
        removed: &[ContainerId],
        result: Result<(), String>,
    ) {
        for id in removed {
            let Some(instance) = self.observed.container(id) else { continue };
            let (name, next) = (instance.name.to_string(), instance.attempt + 1);
            let known = self.facts.known_restarts.entry(name.clone()).or_default();
            *known = (*known).max(next);
            self.facts.was_reset.insert(name);
        }
        self.observed.containers.retain(|c| !removed.contains(&c.id));
        self.facts.reset = match result {
            Ok(()) => {
                self.facts.failures.clear();
                Step::Wanted
            }
            Err(message) => {
                tracing::warn!(pod = %self.uid, error = message, "cannot restart all containers");
                Step::Failed(self.failure("RestartAllContainers", message, count, 1, 60))
            }
        };
    }

    /// Removes older dead instances of a container that was just started, and sandboxes that
    /// nothing is in any more.
    pub(super) fn collect(&mut self, name: &str) {
        let gc = &self.deps.node.gc;
        let (keep, now) = (gc.dead_per_container, self.deps.clock.now());
        let old = |instance: &&Container| {
            let age = std::time::Duration::try_from(now.duration_since(instance.created_at));
            age.unwrap_or_default() >= gc.dead_min_age
        };
        let dead: Vec<Container> = self
            .observed
            .instances(name)
            .into_iter()
            .skip(1)
            .filter(|c| c.state == ContainerState::Exited)
            .skip(keep)
            .filter(old)
            .cloned()
            .collect();
        let current = self.observed.sandboxes.first().map(|s| s.id.clone());
        let old: Vec<SandboxId> = self
            .observed
            .sandboxes
            .iter()
            .filter(|s| Some(&s.id) != current.as_ref())
            .filter(|s| {
                !self
                    .observed
                    .containers
                    .iter()
                    .any(|c| c.sandbox == s.id && !dead.iter().any(|d| d.id == c.id))
            })
            .map(|s| s.id.clone())
            .collect();
        if dead.is_empty() && old.is_empty() {
            return;
        }
        let (deps, pod) = (self.deps.clone(), self.pod.clone());
        self.begin_task(async move {
            let (mut containers, mut sandboxes) = (Vec::new(), Vec::new());
            for instance in dead {
                match deps.runtime.remove_container(instance.id.as_str()).await {
                    Ok(()) => {
                        remove_container_logs(&deps.node, &pod, &instance).await;
                        if let Some(words) = instance.annotations.get(names::MESSAGE_FILE) {
                            // Gone already, or gone with the pod.
                            let _ = tokio::fs::remove_file(words).await;
                        }
                        containers.push(instance.id);
                    }
                    Err(error) => {
                        tracing::warn!(container = %instance.id, %error, "cannot remove a dead container");
                    }
                }
            }
            for id in old {
                match deps.runtime.remove_pod_sandbox(id.as_str()).await {
                    Ok(()) => sandboxes.push(id),
                    Err(error) => {
                        tracing::warn!(sandbox = %id, %error, "cannot remove an old sandbox");
                    }
                }
            }
            Done::Collected(containers, sandboxes)
        });
    }
}

/// Everything that can go at once goes at once; all failures are told together.
async fn take_away(
    deps: &Arc<Deps>,
    pod: &Arc<Pod>,
    uid: &PodUid,
    sandboxes: &[SandboxId],
    containers: &[ContainerId],
    everything: bool,
) -> Result<(), String> {
    let runtime = async {
        for id in sandboxes {
            deps.runtime.stop_pod_sandbox(id.as_str()).await.map_err(|e| e.to_string())?;
        }
        if everything {
            let removals = containers.iter().map(|id| deps.runtime.remove_container(id.as_str()));
            for result in futures::future::join_all(removals).await {
                result.map_err(|e| e.to_string())?;
            }
            for id in sandboxes {
                deps.runtime.remove_pod_sandbox(id.as_str()).await.map_err(|e| e.to_string())?;
            }
        }
        deps.cgroups.remove(uid).await.map_err(|e| e.to_string())
    };
    let volumes = async {
        let dir = deps.node.pod_dir(uid);
        let dir_was_there = tokio::fs::try_exists(&dir).await.unwrap_or(false);
        // Ours: the hosts file and the containers' last words. The rest is the volumes'.
        for own in ["etc-hosts", "containers"] {
            let path = dir.join(own);
            let removed = match tokio::fs::symlink_metadata(&path).await {
                Ok(found) if found.is_dir() => tokio::fs::remove_dir_all(&path).await,
                Ok(_) => tokio::fs::remove_file(&path).await,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            };
            removed.map_err(|e| format!("remove {}: {e}", path.display()))?;
        }
        let began = std::time::Instant::now();
        let unmounted = deps.volumes.unmount(uid).await.map_err(|e| e.to_string());
        if dir_was_there || unmounted.is_err() {
            let plugins = spec_of(pod).volumes.iter().flatten().map(volume_plugin);
            let (took, failed) = (began.elapsed(), unmounted.is_err());
            METRICS.volumes_done(VolumeWork::Unmount, plugins, took, failed);
        }
        unmounted
    };
    // Which ids it has lies with its volumes, and is known until nothing runs with them any more.
    let (runtime, volumes) = if deps.userns.has(uid) {
        let runtime = runtime.await;
        let volumes = if runtime.is_ok() { volumes.await } else { Ok(()) };
        (runtime, volumes)
    } else {
        tokio::join!(runtime, volumes)
    };
    if runtime.is_ok() && volumes.is_ok() {
        deps.userns.release(uid);
    }
    let mut failures: Vec<String> =
        [runtime, volumes].into_iter().filter_map(Result::err).collect();
    if everything
        && failures.is_empty()
        && let Err(error) = remove_pod_logs(&deps.node, pod).await
    {
        failures.push(error);
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}
