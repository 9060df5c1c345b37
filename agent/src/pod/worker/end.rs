//! The end of a pod: from the last word about it until nothing of it runs.

use jiff::{SignedDuration, Timestamp};

use super::{Eviction, SANDBOX_PATIENCE, State, Worker};
use crate::pod::facts::{ProbeKind, Step};
use crate::pod::plan::{KillCause, plan_end};
use crate::pod::spec::grace_seconds;
use crate::pod::status::Ending;
use crate::report::{EventType, pod_reference};

impl Worker {
    pub(super) fn evict(&mut self, Eviction { verdict, grace, event }: Eviction) {
        if self.state == State::Terminating {
            self.kill_within(grace);
        }
        if self.state != State::Running || self.verdict.is_some() {
            return;
        }
        if let Some(annotations) = event {
            let (whom, message) = (pod_reference(&self.pod, None), verdict.message.clone());
            let (kind, reason) = (EventType::Warning, &verdict.reason);
            self.deps.events.record_annotated(whom, kind, reason, message, annotations);
        }
        self.grace_limit = Some(grace);
        self.verdict = Some(verdict);
    }

    /// Leaves a pod that ends no more than `grace` from now on.
    pub(super) fn kill_within(&mut self, grace: SignedDuration) {
        let sooner = self.deps.clock.now() + grace;
        if self.kill_at.is_some_and(|at| sooner < at) {
            self.kill_at = Some(sooner);
            for id in self.facts.killing.clone() {
                self.hasten(id);
            }
        }
    }

    /// Turns to ending the pod.
    pub(super) fn begin_end(&mut self, now: Timestamp) {
        self.state = State::Terminating;
        let grace = SignedDuration::from_secs(grace_seconds(&self.pod));
        let grace = self.grace_limit.map_or(grace, |limit| grace.min(limit));
        self.kill_at = now.checked_add(grace).ok();
        self.ends_since = Some(now);
        self.ending.send_replace(true);
        self.deps.volumes.pod_ends(&self.uid);
        for (_, pull) in self.pulls.drain() {
            pull.abort();
        }
        if let Some(allocating) = &self.allocating {
            allocating.abort();
        }
        self.stop_probes(|kind| kind != ProbeKind::Readiness);
        self.backing_off.clear();
    }

    /// One step of the end: kills what is next, and goes on once nothing runs.
    pub(super) fn end(&mut self, now: Timestamp) -> Option<Timestamp> {
        for id in plan_end(&self.pod, &self.observed, &self.facts) {
            let name = self.observed.container(&id).map(|c| c.name.to_string());
            self.kill(id, &name.unwrap_or_default(), KillCause::PodEnds);
        }
        let patience = self.ends_since.and_then(|t| t.checked_add(SANDBOX_PATIENCE).ok());
        if self.facts.sandbox == Step::Busy
            && patience.is_some_and(|until| until <= now)
            && let Some(making) = self.making.take()
        {
            // A network plugin that hangs does not keep the pod; what it left is looked for.
            making.abort();
            self.facts.sandbox = Step::Wanted;
            self.stale.all = true;
            return Some(now);
        }
        let busy = !self.facts.killing.is_empty()
            || !self.facts.starting.is_empty()
            || self.facts.sandbox == Step::Busy
            || self.facts.volumes == Step::Busy
            || self.facts.devices == Step::Busy
            || self.observed.any_alive();
        if busy {
            // What takes its time to end must leave CPUs that are somebody's own by now.
            let move_at = self.reconcile_placement(now);
            self.publish(now, Ending::Terminating);
            let patience = patience.filter(|_| self.facts.sandbox == Step::Busy);
            return [patience, move_at].into_iter().flatten().min();
        }
        // Before the status says that the pod is over: the scheduler gives its devices to others then.
        if !self.has_no_claims(now) {
            self.publish(now, Ending::Terminating);
            return self.facts.claims.retry_at();
        }
        self.stop_probes(|_| true);
        self.give_back();
        self.publish(now, Ending::Terminated);
        self.state = State::TearingDown { everything: self.deleted() };
        self.teardown = Step::Wanted;
        None
    }
}
