//! Whether a pod may have what its spec asks for by now (KEP-1287): what fits beside all other pods
//! is taken up at once, what does not waits until somebody gives room back.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::{Loop, Message};
use crate::ids::PodUid;
use crate::pod::admit::{admit, admit_under, share_of};
use crate::pod::allocation::{Allocation, Pending, rank, summary};
use crate::pod::qos::qos_class;
use crate::pod::status::Verdict;
use crate::pod::store::Kept;
use crate::report::EventType;

/// What one pod may use.
pub(super) struct Grant {
    /// The pod as its source says it.
    asked: Arc<Pod>,
    /// What it has.
    allocation: Allocation,
    /// Why it does not have what it asks for.
    pending: Option<Pending>,
}

impl Grant {
    fn given(&self) -> (Arc<Pod>, Option<Pending>) {
        (self.allocation.in_place_of(&self.asked), self.pending.clone())
    }
}

impl Loop {
    /// Notes what a new pod, or one of an earlier agent, has.
    pub(super) fn grant(
        &mut self,
        uid: &PodUid,
        asked: Arc<Pod>,
        allocation: Allocation,
        kept: Option<&Kept>,
    ) -> (Arc<Pod>, Option<Pending>) {
        if !self.shares.contains_key(uid) {
            // Refused, or over.
            return (asked, None);
        }
        let waits = !allocation.is_asked_by(&asked);
        let told = kept.and_then(|kept| Pending::of(kept.status.conditions.as_ref()));
        let grant = Grant { asked, allocation, pending: told.filter(|_| waits) };
        let given = grant.given();
        self.grants.insert(uid.clone(), grant);
        if waits && self.decide(uid) {
            return self.grants.get(uid).map_or(given, Grant::given);
        }
        given
    }

    /// Takes in what the source says of a pod that has a worker.
    pub(super) fn changed(&mut self, uid: &PodUid, pod: Arc<Pod>) {
        if let Some(grant) = self.grants.get_mut(uid) {
            grant.asked = pod.clone();
            let had = grant.allocation.clone();
            self.decide(uid);
            self.tell(uid);
            let shrunk = self.grants.get(uid).is_some_and(|grant| grant.allocation != had);
            if shrunk {
                self.retry_resizes();
            }
        } else if let Some(worker) = self.workers.get(uid) {
            let _ = worker.inbox.send(Message::Pod(pod, None));
        }
    }

    fn tell(&self, uid: &PodUid) {
        if let (Some(grant), Some(worker)) = (self.grants.get(uid), self.workers.get(uid)) {
            let (pod, pending) = grant.given();
            let _ = worker.inbox.send(Message::Pod(pod, pending));
        }
    }

    /// Looks again at what waits, the ones that need least or matter most first.
    pub(super) fn retry_resizes(&mut self) {
        let mut waiting: Vec<_> = self
            .waiting
            .iter()
            .filter_map(|uid| {
                let grant = self.grants.get(uid)?;
                let guaranteed = qos_class(&grant.asked) == "Guaranteed";
                let (has, asks) = (self.shares.get(uid)?.sums, share_of(&grant.asked).sums);
                Some((rank(&grant.asked, has, asks, guaranteed), uid.clone()))
            })
            .collect();
        waiting.sort_by(|a, b| a.0.cmp(&b.0));
        for (_, uid) in waiting {
            if self.decide(&uid) {
                self.tell(&uid);
            }
        }
    }

    /// Gives the pod what it asks for, or notes why not; whether anything is other than before.
    fn decide(&mut self, uid: &PodUid) -> bool {
        let Some(grant) = self.grants.get_mut(uid) else { return false };
        if grant.allocation.is_asked_by(&grant.asked) {
            self.waiting.remove(uid);
            return grant.pending.take().is_some();
        }
        let Some(had) = self.shares.get(uid).cloned() else { return false };
        self.waiting.insert(uid.clone());
        if !self.unsynced.is_empty() {
            // Others may have the room.
            return false;
        }
        let (asked, generation) = (grant.asked.clone(), grant.asked.metadata.generation);
        let share = share_of(&asked);
        self.taken.subtract(&had);
        let object = self.deps.objects.node();
        let pressure = *self.pressure.borrow();
        let given = grant.allocation.in_place_of(&asked);
        let numa = self.deps.numa.as_ref();
        let never = numa.and_then(|numa| numa.refuses_resize(&given, &asked));
        let fits = match &never {
            Some(why) => Err(Verdict { message: why.clone(), ..Verdict::new("Infeasible") }),
            None => admit_under(&asked, pressure),
        };
        let fits = fits
            .and_then(|()| admit(&asked, &share, &self.taken, &self.deps.node, object.as_deref()));
        match fits {
            Ok(()) => {
                self.taken.add(&share);
                self.shares.insert(uid.clone(), share);
                grant.allocation = Allocation::asked(&asked);
                grant.pending = None;
                self.waiting.remove(uid);
                let message = summary("Pod resize started", &asked, generation, "");
                self.deps.pod_event(&asked, EventType::Normal, "ResizeStarted", message);
                true
            }
            Err(verdict) => {
                self.taken.add(&had);
                let reason = if never.is_some() { "Infeasible" } else { "Deferred" };
                let reason = reason.to_owned();
                let now = Pending { reason, message: verdict.message, generation };
                let before = grant.pending.replace(now.clone());
                let told = before.as_ref().is_some_and(|b| b.generation == now.generation);
                if !told {
                    let what = format!("Pod resize {}", now.reason);
                    let message = summary(&what, &asked, generation, &now.message);
                    let event = format!("Resize{}", now.reason);
                    self.deps.pod_event(&asked, EventType::Warning, &event, message);
                }
                before != Some(now)
            }
        }
    }
}
