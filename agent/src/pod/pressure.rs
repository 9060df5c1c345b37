//! Ends pods where the node is short of memory, disk or process ids.
//!
//! It looks at the node by itself, so that a control plane that is away delays nothing. What is unused
//! goes before pods do (without a control plane it is all that goes: static pods stay), pods go one at
//! a time, and the next look waits until the last one holds nothing.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cri_shim::api::{LinuxPodSandboxStats, MemoryUsage};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::admit::share_of;
use super::cgroup::pods_folder;
use super::deps::Deps;
use super::garbage;
use super::spec::grace_seconds;
use super::status::{Verdict, is_terminal};
use super::storage::{self, may_be_evicted};
use super::table::PodView;
use super::worker::Eviction;
use crate::eviction::{
    Candidate, ContainerUsage, EvictionThreshold, Leftovers, PodUsage, Resource, Signal, Tracker,
    Words, observe, plan_victims, words,
};
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::node::machine::{Measured, Places};
use crate::report::{EventType, node_reference};

/// How often the node is looked at: kubelet's monitoring interval.
const PERIOD: Duration = Duration::from_secs(10);
/// How long an evicted pod may take beyond its grace period before the next one goes.
const CLEANUP: Duration = Duration::from_secs(30);
/// Seconds that a pod has where a hard threshold is crossed.
const HARD_GRACE: i64 = 1;

/// Asks for all unused images to be removed; answered when that is done.
pub(super) type Reclaim = mpsc::Sender<oneshot::Sender<()>>;

/// Seconds that `pod` has to end for `threshold`.
fn plan_grace(threshold: &EvictionThreshold, max: i64, pod: &Pod) -> i64 {
    if threshold.grace.is_zero() {
        return HARD_GRACE;
    }
    match u32::try_from(max) {
        Ok(max) => i64::from(max).min(grace_seconds(pod)),
        Err(_) => grace_seconds(pod),
    }
}

/// Whether the pod may go: it holds something, and it would come back elsewhere. One that ends already
/// is given less time, so that no other goes in its place.
fn is_candidate(view: &PodView) -> bool {
    may_be_evicted(&view.pod, view.source) && !is_terminal(view.status.phase.as_deref())
}

struct Watch {
    deps: Arc<Deps>,
    tracker: Tracker,
    reclaim: Reclaim,
    places: Places,
    /// Told to go already.
    told: HashSet<PodUid>,
}

/// Looks at the node for ever, and tells which pods must go.
pub(super) async fn watch(
    deps: Arc<Deps>,
    reclaim: Reclaim,
    evictions: mpsc::UnboundedSender<(PodUid, Eviction)>,
) {
    if deps.node.eviction.thresholds.is_empty() {
        return;
    }
    let tracker = Tracker::new(deps.node.eviction.clone());
    let node = &deps.node;
    let pods = node.cgroups_per_qos.then(|| pods_folder(node.cgroup_driver, &node.cgroup_root));
    let places = Places::new(&node.root_dir, pods);
    let mut watch = Watch { deps, tracker, reclaim, places, told: HashSet::new() };
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some((uid, eviction)) = watch.look().await else { continue };
        let patience = CLEANUP + Duration::from_secs(eviction.grace.as_secs().unsigned_abs());
        watch.told.insert(uid.clone());
        if evictions.send((uid.clone(), eviction)).is_err() {
            return;
        }
        if tokio::time::timeout(patience, watch.gone(&uid)).await.is_err() {
            tracing::warn!(uid = %uid, "an evicted pod does not end; looking for another");
        }
        // What it held is free by now, or will not be soon.
        ticks.reset_immediately();
    }
}

impl Watch {
    /// One look; the pod that goes, if one must.
    async fn look(&mut self) -> Option<(PodUid, Eviction)> {
        self.places.find(&*self.deps.runtime).await;
        let memory = self.deps.node.capacity_memory;
        let measure = |watch: &Self| observe(&Measured::read(&watch.places), memory);
        let (mut observed, observed_at) = (measure(self), Instant::now());
        let turn = self.tracker.look(&observed, self.deps.clock.now());
        let threshold = *turn.starved.first()?;
        let resource = threshold.signal.resource();
        let disks = self.places.disks();
        self.say(resource);
        if self.remove_leftovers(threshold.signal.leftovers(disks)).await {
            observed = measure(self);
            if self.tracker.relieved(&observed) {
                let resource = resource.name();
                tracing::info!(resource, "dead containers and unused images made room enough");
                return None;
            }
        }
        let mut candidates = self.candidates(threshold.signal).await;
        plan_victims(resource, &mut candidates);
        let Some(victim) = candidates.first() else {
            tracing::warn!(resource = resource.name(), "no pod may be evicted to make room");
            return None;
        };
        for starved in &turn.starved {
            METRICS.eviction_stats_aged(starved.signal.name(), observed_at.elapsed());
        }
        METRICS.evicted(threshold.signal.name());
        let Words { message, annotations } = words(&threshold, &observed, victim);
        let grace = plan_grace(&threshold, self.deps.node.eviction.max_pod_grace, &victim.pod);
        let verdict = Verdict { reason: "Evicted".to_owned(), message, disrupts: true };
        let grace = SignedDuration::from_secs(grace);
        Some((PodUid::of(&victim.pod), Eviction { verdict, grace, event: Some(annotations) }))
    }

    fn say(&self, resource: Resource) {
        let node = node_reference(&self.deps.node.node_name);
        let message = format!("Attempting to reclaim {}", resource.name());
        self.deps.events.record(node, EventType::Warning, "EvictionThresholdMet", message);
    }

    /// Removes what nobody needs; whether anything was to be.
    async fn remove_leftovers(&self, leftovers: Leftovers) -> bool {
        if leftovers.containers
            && let Err(error) = garbage::collect_all(&self.deps).await
        {
            tracing::warn!(error, "dead containers make no room");
        }
        if leftovers.images {
            let (done, over) = oneshot::channel();
            if self.reclaim.send(done).await.is_ok() {
                // An answer that never comes is no room either.
                let _ = over.await;
            }
        }
        leftovers != Leftovers::default()
    }

    async fn candidates(&mut self, signal: Signal) -> Vec<Candidate> {
        let views = self.deps.table.pods();
        self.told.retain(|uid| views.iter().any(|view| PodUid::of(&view.pod) == *uid));
        let views: Vec<_> = views
            .into_iter()
            .filter(|view| is_candidate(view) && !self.told.contains(&PodUid::of(&view.pod)))
            .collect();
        let resource = signal.resource();
        let mut all = Vec::new();
        let stats = match resource {
            Resource::Memory | Resource::Pids => {
                self.deps.runtime.list_pod_sandbox_stats().await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "no statistics of pods; their priority decides");
                    Vec::new()
                })
            }
            Resource::Disk | Resource::Inodes => Vec::new(),
        };
        let disks = self.places.disks();
        for view in views {
            let sums = share_of(&view.pod).sums;
            let (request, usage) = match resource {
                Resource::Disk | Resource::Inodes => {
                    let usage = storage::measure(&self.deps, &view).await;
                    let usage = usage.on(signal, disks);
                    (if resource == Resource::Disk { sums.ephemeral } else { 0 }, Some(usage))
                }
                Resource::Memory | Resource::Pids => {
                    let of_pod = stats.iter().find(|stat| {
                        let id = stat.attributes.as_ref().map(|a| a.id.as_str());
                        id.is_some() && id == view.sandbox.as_deref()
                    });
                    let linux = of_pod.and_then(|stat| stat.linux.as_ref());
                    let request = if resource == Resource::Memory { sums.memory } else { 0 };
                    (request, linux.map(usage_of))
                }
            };
            all.push(Candidate { pod: view.pod, request, disk_request: sums.ephemeral, usage });
        }
        all
    }

    /// Waits until a pod holds nothing any more.
    async fn gone(&self, uid: &PodUid) {
        let mut changes = self.deps.table.changes();
        loop {
            changes.borrow_and_update();
            if self.deps.table.pod(uid).is_none_or(|view| view.finished) {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

fn usage_of(stats: &LinuxPodSandboxStats) -> PodUsage {
    let memory = |usage: Option<&MemoryUsage>| {
        usage.and_then(|m| m.working_set_bytes).map_or(0, |bytes| bytes.value)
    };
    let containers = stats.containers.iter().filter_map(|stat| {
        let name = stat.attributes.as_ref()?.metadata.as_ref()?.name.clone();
        Some((name, ContainerUsage { memory: memory(stat.memory.as_ref()), disk: 0 }))
    });
    PodUsage {
        memory: memory(stats.memory.as_ref()),
        processes: stats.process.and_then(|p| p.process_count).map_or(0, |count| count.value),
        containers: containers.collect(),
        ..PodUsage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Threshold;
    use crate::pod::quantity::Notation;
    use crate::pod::testing::pod;

    #[test]
    fn a_soft_threshold_leaves_a_pod_its_time_up_to_the_limit() {
        let soft = EvictionThreshold {
            signal: Signal::Memory,
            value: Threshold::Absolute(1),
            grace: Duration::from_secs(5),
            min_reclaim: None,
            notation: Notation::Binary,
        };
        let hard = EvictionThreshold { grace: Duration::ZERO, ..soft };
        let pod = pod(r#"{"terminationGracePeriodSeconds":20,"containers":[]}"#);
        for (threshold, max, seconds) in [
            (hard, 60, 1),
            (hard, -1, 1),
            (soft, 60, 20),
            (soft, 7, 7),
            (soft, 0, 0),
            (soft, -1, 20),
        ] {
            assert_eq!(plan_grace(&threshold, max, &pod), seconds, "{threshold:?} {max}");
        }
    }
}
