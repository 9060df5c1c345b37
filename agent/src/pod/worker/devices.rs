//! The pod's devices: allocated before anything else is done for it, told with its status, given back
//! when nothing of it runs.

use super::{Done, Worker};
use crate::device::{DeviceError, Statuses, wanted};
use crate::metrics::METRICS;
use crate::pod::facts::Step;
use crate::pod::plan::usable_sandbox;
use crate::pod::spec::{init_containers, spec_of};
use crate::pod::status::{REJECTED, Verdict};
use crate::report::EventType;

impl Worker {
    fn wants_devices(&self) -> bool {
        let spec = spec_of(&self.pod);
        let mut all = spec.containers.iter().chain(init_containers(spec));
        all.any(|container| !wanted(container).is_empty())
    }

    /// Whether the pod's containers may be made, as far as devices go; begins to get them if not.
    pub(super) fn has_devices(&mut self) -> bool {
        if self.facts.devices == Step::Wanted {
            // Whose sandbox is there has been let in, by an earlier agent maybe, and in this boot.
            let here = usable_sandbox(&self.pod, &self.observed).is_some();
            if here || self.observed.any_alive() || !self.wants_devices() {
                self.facts.devices = Step::Done;
                return true;
            }
            self.facts.devices = Step::Busy;
            let (deps, pod) = (self.deps.clone(), self.pod.clone());
            let task = async move { Done::Devices(deps.devices.allocate(&pod).await) };
            self.allocating = Some(self.begin_task(task));
        }
        self.facts.devices == Step::Done
    }

    pub(super) fn devices_done(&mut self, result: Result<(), DeviceError>) {
        self.allocating = None;
        self.facts.devices = Step::Done;
        if let Err(error) = result {
            let reason = "UnexpectedAdmissionError";
            let message = format!("Allocate failed due to {error}, which is unexpected");
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
        if let Some(over) = self.over.take() {
            let _ = over.send(self.uid.clone());
        }
    }

    /// The health of what its containers have.
    pub(super) fn device_statuses(&self) -> Statuses {
        if self.wants_devices() {
            self.deps.devices.statuses(&self.uid)
        } else {
            Statuses::default()
        }
    }
}
