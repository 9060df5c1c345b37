//! What comes back from work in flight, and what it means.

use cri_shim::api;

use super::sandbox::{Made, SandboxFailure};
use super::{Worker, placement, resize};
use crate::dra::DraError;
use crate::numa::Refusal;
use crate::pod::facts::{ReadyImage, Step};
use crate::pod::images::ImageFailure;
use crate::pod::observed::{Container, ContainerId, Sandbox, SandboxId};
use crate::pod::plan::Start;
use crate::report::EventType;
use crate::volume::VolumeError;

/// Longest wait between tries of a pull, and of everything else, in seconds.
const MAX_PULL_WAIT: i64 = 300;
pub(super) const MAX_WAIT: i64 = 60;

/// Why a container did not start, in kubelet's words.
#[derive(Clone, Debug)]
pub(super) struct StartFailure {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// Work that has ended.
#[derive(Debug)]
pub(super) enum Done {
    /// The pod's containers have their devices, or not.
    Devices(Result<(), Refusal>),
    /// Volumes are in place, or not; with the number of earlier failures.
    Volumes(u32, Result<(), VolumeError>),
    /// A sandbox was made, or not; with the number of earlier failures.
    Sandbox(u32, Result<Box<Made>, SandboxFailure>),
    /// The pod's claims were given back, or not; with the number of earlier failures.
    Claims(u32, Result<(), DraError>),
    /// An image is there, or not; with the number of earlier failures.
    Image(String, u32, Result<ReadyImage, ImageFailure>),
    /// A container was started, or not; what the runtime says of it, if it was made.
    Started(Start, Option<Box<api::ContainerStatus>>, Result<(), StartFailure>),
    /// An instance was ended, or not.
    Killed(ContainerId, Result<(), String>),
    /// Resources were put into effect, or not; with the number of earlier failures.
    Resized(u32, resize::Job, Result<(), String>),
    /// Instances were moved to other CPUs, or not.
    Moved(Vec<placement::Moved>),
    /// Instances were removed to start the pod again, all of them or not.
    Reset(u32, Vec<ContainerId>, Result<(), String>),
    /// Work that the pod does not wait for.
    Nothing,
    /// Dead instances and old sandboxes were removed.
    Collected(Vec<ContainerId>, Vec<SandboxId>),
    /// What is left of the pod was taken away, or not.
    TornDown { everything: bool, result: Result<(), String> },
}

impl Worker {
    pub(super) fn done(&mut self, done: Done) {
        match done {
            Done::Devices(result) => self.devices_done(result),
            Done::Volumes(count, result) => self.volumes_done(count, result),
            Done::Sandbox(count, result) => self.sandbox_done(count, result),
            Done::Claims(count, result) => self.claims_done(count, result),
            Done::Image(name, count, result) => self.image_done(name, count, result),
            Done::Started(start, status, result) => self.started(start, status, result),
            Done::Killed(id, result) => self.killed(id, result),
            Done::Resized(count, job, result) => self.resize_done(count, job, result),
            Done::Moved(moved) => self.moved(moved),
            Done::Reset(count, removed, result) => self.reset_done(count, &removed, result),
            Done::Nothing => {}
            Done::Collected(containers, sandboxes) => {
                self.observed.containers.retain(|c| !containers.contains(&c.id));
                self.observed.sandboxes.retain(|s| !sandboxes.contains(&s.id));
            }
            Done::TornDown { everything, result } => self.torn_down(everything, result),
        }
    }

    fn volumes_done(&mut self, count: u32, result: Result<(), VolumeError>) {
        self.facts.volumes = match result {
            Ok(()) => {
                // It may have changed while they were made.
                self.deps.volumes.pod_changed(&self.pod);
                Step::Done
            }
            Err(error) if error.is_ending() => Step::Wanted,
            Err(error) => {
                let reason = error.reason();
                self.deps.pod_event(&self.pod, EventType::Warning, reason, error.event());
                Step::Failed(self.failure(reason, error.to_string(), count, 1, 2 * MAX_WAIT))
            }
        };
    }

    fn sandbox_done(&mut self, count: u32, result: Result<Box<Made>, SandboxFailure>) {
        match result {
            Ok(made) => {
                self.facts.sandbox = Step::Wanted;
                let sandbox = Sandbox::from_cri(&made.status);
                self.known(sandbox.id.as_str());
                self.sandbox_config = Some((sandbox.attempt, made.config));
                self.observed.sandboxes.retain(|s| s.id != sandbox.id);
                self.observed.sandboxes.push(sandbox);
                self.observed.sort();
            }
            Err(SandboxFailure { reason, what, message }) => {
                let told = format!("Failed to {what}: {message}");
                self.deps.pod_event(&self.pod, EventType::Warning, reason, told);
                let failure = self.failure(reason, message, count, 2, MAX_WAIT);
                self.facts.sandbox = Step::Failed(failure);
                // The runtime may have got half-way.
                self.stale.all = true;
            }
        }
    }

    fn image_done(&mut self, name: String, count: u32, result: Result<ReadyImage, ImageFailure>) {
        self.pulls.remove(&name);
        let entry = match result {
            Ok(image) => (Step::Done, Some(image)),
            Err(error) => {
                let failure = self.failure(error.reason, error.message, count, 10, MAX_PULL_WAIT);
                (Step::Failed(failure), None)
            }
        };
        self.facts.images.insert(name, entry);
    }

    fn started(
        &mut self,
        start: Start,
        status: Option<Box<api::ContainerStatus>>,
        result: Result<(), StartFailure>,
    ) {
        let name = start.name.clone();
        self.facts.starting.remove(&name);
        // The next start asks for the image anew, as its pull policy says.
        self.facts.images.remove(&name);
        self.observed.containers.retain(|c| !start.leftovers.contains(&c.id));
        match status {
            Some(status) => {
                let instance = Container::from_cri(*status, start.sandbox.clone());
                self.known(instance.id.as_str());
                self.observed.containers.retain(|c| c.id != instance.id);
                self.observed.containers.push(instance);
                self.observed.sort();
            }
            None if result.is_ok() => self.stale.all = true,
            None => {}
        }
        match result {
            Ok(()) => {
                self.facts.failures.remove(&name);
                self.facts.known_restarts.remove(&name);
                self.facts.was_reset.remove(&name);
                self.facts.waits.remove(&name);
                self.collect(&name);
            }
            Err(failure) => {
                let count = self.facts.failures.get(&name).map_or(0, |f| f.count);
                // What was made and ended waits as any other that crashed.
                let seconds = match failure.reason {
                    "RunContainerError" | "PostStartHookError" => 0,
                    _ => 10,
                };
                let failure =
                    self.failure(failure.reason, failure.message, count, seconds, MAX_WAIT);
                self.facts.failures.insert(name, failure);
                self.stale.all = true;
            }
        }
    }

    fn killed(&mut self, id: ContainerId, result: Result<(), String>) {
        self.facts.killing.remove(&id);
        self.stale.ids.insert(id.to_string());
        if let Err(message) = result {
            let name = self.observed.container(&id).map(|c| c.name.to_string());
            tracing::warn!(pod = %self.uid, container = ?name, message, "cannot end a container");
            self.deps.pod_event(
                &self.pod,
                EventType::Warning,
                "FailedKillPod",
                format!("error killing container {}: {message}", name.unwrap_or_default()),
            );
        }
    }

    fn torn_down(&mut self, everything: bool, result: Result<(), String>) {
        match result {
            Ok(()) => self.torn_down_well(everything),
            Err(message) => {
                let count = match &self.teardown {
                    Step::Failed(failure) => failure.count,
                    _ => 0,
                };
                tracing::warn!(pod = %self.uid, message, "cannot clean up after a pod");
                self.deps.pod_event(
                    &self.pod,
                    EventType::Warning,
                    "FailedKillPod",
                    format!("error cleaning up after the pod: {message}"),
                );
                let seconds = super::TEARDOWN_RETRY_SECONDS;
                let failure = self.failure("FailedKillPod", message, count, seconds, MAX_WAIT);
                self.teardown = Step::Failed(failure);
                self.stale.all = true;
            }
        }
    }
}
