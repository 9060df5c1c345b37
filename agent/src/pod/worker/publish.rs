//! What a worker tells of its pod: the status, and Events about what waits.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;

use super::{State, Worker};
use crate::pod::allocation::Allocation;
use crate::pod::facts::Step;
use crate::pod::spec::{find_container, spec_of};
use crate::pod::status::{Ending, PULL_ERROR_SHOWN_SECONDS, StatusInput, pod_label, pod_status};
use crate::pod::table::PodView;
use crate::report::EventType;

impl Worker {
    /// Computes the status and tells it where it is news.
    pub(super) fn publish(&mut self, now: Timestamp, ending: Ending) -> PodStatus {
        let devices = self.device_statuses();
        let status = pod_status(StatusInput {
            devices: &devices,
            pod: &self.pod,
            observed: &self.observed,
            facts: &self.facts,
            backing_off: &self.backing_off,
            previous: self.previous.as_ref(),
            ending,
            verdict: self.verdict.as_ref(),
            node: &self.deps.node,
            runtime_name: &self.deps.runtime_name,
            start_time: self.start_time,
            now,
        });
        let view = PodView {
            pod: self.pod.clone(),
            status: status.clone(),
            source: self.source,
            containers: self
                .observed
                .containers
                .iter()
                .rev()
                .map(|c| (c.name.to_string(), c.id.to_string()))
                .collect(),
            sandbox: self.observed.sandboxes.first().map(|s| s.id.to_string()),
            finished: self.state == State::Finished,
        };
        self.deps.table.set(&self.uid, view);
        if !self.told || self.previous.as_ref() != Some(&status) {
            self.told = true;
            if self.source.is_some() {
                self.deps.statuses.publish(&self.pod, status.clone());
                self.deps.store.save(&self.uid, &status, Allocation::asked(&self.pod));
            }
            self.previous = Some(status.clone());
        }
        status
    }

    /// An Event for each container that has begun to wait.
    pub(super) fn tell_backing_off(&mut self) {
        for waiting in &self.backing_off {
            let latest = self.observed.latest(&waiting.name);
            let attempt = latest.map_or(0, |i| u64::from(i.attempt) + 1);
            if self.shown_backing_off.insert(waiting.name.clone(), attempt) == Some(attempt) {
                continue;
            }
            let Some((_, kind)) = find_container(spec_of(&self.pod), &waiting.name) else {
                continue;
            };
            let message = format!(
                "Back-off restarting failed container {} in pod {}",
                waiting.name,
                pod_label(&self.pod)
            );
            let whom = (kind, waiting.name.as_str());
            self.deps.container_event(&self.pod, whom, EventType::Warning, "BackOff", message);
        }
    }

    /// The same for images, once the status has turned from the error to the wait.
    pub(super) fn tell_pulls_backing_off(&mut self, now: Timestamp) {
        for (name, (step, _)) in &self.facts.images {
            let Step::Failed(failure) = step else { continue };
            let shown = now.duration_since(failure.since).as_secs();
            if failure.reason != "ErrImagePull" || shown < PULL_ERROR_SHOWN_SECONDS {
                continue;
            }
            let count = u64::from(failure.count);
            let key = format!("pull of {name}");
            if self.shown_backing_off.insert(key, count) == Some(count) {
                continue;
            }
            let Some((container, kind)) = find_container(spec_of(&self.pod), name) else {
                continue;
            };
            let image = container.image.unwrap_or_default();
            let whom = (kind, name.as_str());
            for (event, reason, message) in [
                (EventType::Normal, "BackOff", format!("Back-off pulling image \"{image}\"")),
                (EventType::Warning, "Failed", "Error: ImagePullBackOff".to_owned()),
            ] {
                self.deps.container_event(&self.pod, whom, event, reason, message);
            }
        }
    }
}
