//! What sources say: pods are let in, counted, handed to their workers, and given back.

use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::Loop;
use crate::ids::{NamespacedName, PodUid};
use crate::metrics::METRICS;
use crate::node::conditions::Pressure;
use crate::pod::admit::{admit, admit_extended, admit_under, share_of};
use crate::pod::allocation::Allocation;
use crate::pod::status::{REJECTED, Verdict, is_terminal};
use crate::pod::worker::{Begin, Message};
use crate::pod::{node_shutdown, orphans};
use crate::report::EventType;
use crate::source::{PodChange, PodSource};

impl Loop {
    pub(super) async fn change(&mut self, change: PodChange) {
        match change {
            PodChange::Set(source, pod) => self.set(source, pod),
            PodChange::Removed(_, uid) => {
                self.again.remove(&uid);
                self.held.retain(|_, pod| PodUid::of(pod) != uid);
                if let Some(worker) = self.workers.get_mut(&uid) {
                    worker.removing = true;
                    let _ = worker.inbox.send(Message::Remove);
                }
            }
            PodChange::Synced(source) => {
                if self.unsynced.remove(&source) && self.unsynced.is_empty() {
                    self.relist().await;
                    let kept: HashSet<PodUid> = self.workers.keys().cloned().collect();
                    self.deps.devices.retain(&kept);
                    if let Some(numa) = &self.deps.numa {
                        numa.retain(&kept);
                    }
                    orphans::clean(self.deps.clone(), kept);
                    // Only now is known what all pods take together.
                    self.retry_resizes();
                    self.deps.table.update_health(|h| h.synced = true);
                }
            }
        }
    }

    pub(super) fn set(&mut self, source: PodSource, pod: Arc<Pod>) {
        let uid = PodUid::of(&pod);
        if let Some(worker) = self.workers.get(&uid) {
            if worker.removing {
                self.again.insert(uid, (source, pod));
            } else {
                self.deps.objects.retain(&pod);
                self.changed(&uid, pod);
            }
            return;
        }
        let key = NamespacedName::of_pod(&pod);
        if source == PodSource::File
            && self.workers.values().any(|w| w.source == Some(source) && w.key == key)
        {
            // The older one of this name goes first.
            self.held.insert(key, pod);
            return;
        }
        self.deps.objects.retain(&pod);
        METRICS.pod_came(pod.spec.as_ref().map_or(0, |spec| spec.containers.len()));
        let mut kept = self.deps.store.kept(&uid);
        let allocation = kept.as_ref().and_then(|kept| kept.allocation.clone());
        let allocation = allocation.unwrap_or_else(|| Allocation::asked(&pod));
        let given = allocation.in_place_of(&pod);
        let adopt = self.known.has(&uid);
        let verdict = if adopt { self.count(&uid, &given) } else { self.admit(&uid, &given) };
        if source == PodSource::File
            && kept.as_ref().is_some_and(|kept| node_shutdown::ended_by(&kept.status))
        {
            kept = None;
        }
        let (given, pending) = self.grant(&uid, pod, allocation, kept.as_ref());
        let begin = Begin {
            pod: given,
            source: Some(source),
            adopt: adopt || kept.is_some(),
            remove: false,
            saved: kept.map(|kept| kept.status),
            verdict,
            pending,
            over: self.over.clone(),
        };
        self.spawn(uid, key, begin);
    }

    /// Counts in a pod that runs here already.
    pub(super) fn count(&mut self, uid: &PodUid, pod: &Pod) -> Option<Verdict> {
        let share = share_of(pod);
        self.taken.add(&share);
        self.shares.insert(uid.clone(), share);
        None
    }

    /// Counts in a new pod, or says why not.
    pub(super) fn admit(&mut self, uid: &PodUid, pod: &Pod) -> Option<Verdict> {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if is_terminal(phase) || pod.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let share = share_of(pod);
        let object = self.deps.objects.node();
        // Who was let in before stays, whatever became of the node since.
        let new = !self.deps.store.exists(uid)
            && pod.status.as_ref().is_none_or(|s| s.start_time.is_none());
        let pressure = if new { *self.pressure.borrow() } else { Pressure::default() };
        let leaving = *self.shutting_down.borrow();
        let fits = if leaving { Err(node_shutdown::refusal()) } else { Ok(()) }
            .and_then(|()| admit_under(pod, pressure))
            .and_then(|()| admit(pod, &share, &self.taken, &self.deps.node, object.as_deref()))
            .and_then(|()| {
                let allocatable = |name: &str| self.deps.devices.allocatable(uid, name);
                admit_extended(&share, &self.taken, allocatable, object.as_deref())
            });
        match fits {
            Ok(()) => {
                self.taken.add(&share);
                self.shares.insert(uid.clone(), share);
                None
            }
            Err(verdict) => {
                METRICS.pod_rejected(&verdict.reason);
                let (reason, message) = (&verdict.reason, verdict.message.clone());
                self.deps.pod_event(pod, EventType::Warning, reason, message);
                let message = format!("{REJECTED}{}", verdict.message);
                Some(Verdict { message, ..verdict })
            }
        }
    }

    pub(super) fn give_back(&mut self, uid: &PodUid) {
        self.grants.remove(uid);
        self.waiting.remove(uid);
        if let Some(share) = self.shares.remove(uid) {
            self.taken.subtract(&share);
            self.retry_resizes();
        }
    }

    pub(super) fn worker_ended(&mut self, ended: Result<PodUid, tokio::task::JoinError>) {
        let uid = match ended {
            Ok(uid) => uid,
            Err(error) => {
                // Its handle stays; the process is not worth more than an error in the log.
                tracing::error!(%error, "a pod worker ended badly");
                return;
            }
        };
        self.give_back(&uid);
        self.known.0.retain(|_, seen| seen.uid != uid);
        let Some(handle) = self.workers.remove(&uid) else { return };
        if let Some((source, pod)) = self.again.remove(&uid) {
            METRICS.pod_restarted(source == PodSource::File);
            self.set(source, pod);
        } else if handle.source == Some(PodSource::File)
            && let Some(pod) = self.held.remove(&handle.key)
        {
            self.set(PodSource::File, pod);
        }
    }
}
