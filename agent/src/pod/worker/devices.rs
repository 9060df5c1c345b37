//! What the pod has to itself: CPUs, memory and devices of device plugins, allocated before anything
//! else is done for it; devices of its claims, prepared with its sandbox; all of it told with its status
//! and given back when nothing of it runs.

use jiff::Timestamp;

use super::done::MAX_WAIT;
use super::{Done, Worker};
use crate::device::{Statuses, wanted};
use crate::dra::DraError;
use crate::metrics::METRICS;
use crate::numa::Refusal;
use crate::pod::facts::Step;
use crate::pod::plan::usable_sandbox;
use crate::pod::spec::{init_containers, spec_of};
use crate::pod::status::{REJECTED, Verdict};
use crate::report::EventType;

impl Worker {
    fn wants_devices(&self) -> bool {
        let spec = spec_of(&self.pod);
        let mut all = spec.containers.iter().chain(init_containers(spec));
        all.any(|container| !wanted(&self.pod, container).is_empty())
    }

    /// Whether the pod's containers may be made, as far as devices go; begins to get them if not.
    pub(super) fn has_devices(&mut self) -> bool {
        if self.facts.devices == Step::Wanted {
            // Whose sandbox is there has been let in, by an earlier agent maybe, and in this boot.
            let here = usable_sandbox(&self.pod, &self.observed).is_some();
            let wants = match &self.deps.numa {
                Some(numa) => numa.concerns(&self.pod),
                None => self.wants_devices(),
            };
            if here || self.observed.any_alive() || !wants {
                self.facts.devices = Step::Done;
                return true;
            }
            self.facts.devices = Step::Busy;
            let (deps, pod) = (self.deps.clone(), self.pod.clone());
            let task = async move {
                let given = match &deps.numa {
                    Some(numa) => numa.admit(&pod, &*deps.devices).await,
                    None => deps.devices.allocate(&pod).await.map_err(Refusal::unexpected),
                };
                Done::Devices(given)
            };
            self.allocating = Some(self.begin_task(task));
        }
        self.facts.devices == Step::Done
    }

    pub(super) fn devices_done(&mut self, result: Result<(), Refusal>) {
        self.allocating = None;
        self.facts.devices = Step::Done;
        if let Err(Refusal { reason, message }) = result {
            METRICS.pod_rejected(reason);
            self.deps.pod_event(&self.pod, EventType::Warning, reason, message.clone());
            if self.verdict.is_none() {
                let message = format!("{REJECTED}{message}");
                self.verdict = Some(Verdict { message, ..Verdict::new(reason) });
            }
        }
    }

    /// Nothing runs, and nothing will: the status says so next, and then the scheduler counts on what
    /// the pod had, however long its volumes and its network take to go.
    pub(super) fn give_back(&mut self) {
        self.deps.devices.release(&self.uid);
        if let Some(numa) = &self.deps.numa {
            numa.release(&self.uid);
        }
        if let Some(over) = self.over.take() {
            let _ = over.send(self.uid.clone());
        }
    }

    /// Whether its claims are given back, as far as it has any; begins to give them back if not.
    pub(super) fn has_no_claims(&mut self, now: Timestamp) -> bool {
        if self.facts.claims == Step::Wanted && !self.deps.claims.holds(&self.uid) {
            return true;
        }
        if self.facts.claims.due(now) {
            let count = match &self.facts.claims {
                Step::Failed(failure) => failure.count,
                _ => 0,
            };
            self.facts.claims = Step::Busy;
            let (deps, uid) = (self.deps.clone(), self.uid.clone());
            self.begin_task(async move { Done::Claims(count, deps.claims.unprepare(&uid).await) });
        }
        false
    }

    pub(super) fn claims_done(&mut self, count: u32, result: Result<(), DraError>) {
        let Err(error) = result else {
            self.facts.claims = Step::Wanted;
            return;
        };
        let message = format!("unprepare dynamic resources: {error}");
        tracing::warn!(pod = %self.uid, message, "cannot give back the claims of a pod");
        self.deps.pod_event(
            &self.pod,
            EventType::Warning,
            "FailedKillPod",
            format!("error killing pod: {message}"),
        );
        let failure = self.failure("FailedKillPod", message, count, 2, MAX_WAIT);
        self.facts.claims = Step::Failed(failure);
    }

    /// The health of what its containers have.
    pub(super) fn device_statuses(&self) -> Statuses {
        let mut all = match self.wants_devices() {
            true => self.deps.devices.statuses(&self.uid),
            false => Statuses::default(),
        };
        if spec_of(&self.pod).resource_claims.is_some() {
            for (container, own) in self.deps.claims.statuses(&self.pod) {
                all.entry(container).or_default().extend(own);
            }
        }
        all
    }
}
