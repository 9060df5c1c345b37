//! On which CPUs the pod's containers run: those of their own, or those that all others share and that
//! change as containers with CPUs of their own come and go (cpuManagerPolicy static).

use std::collections::HashMap;

use cri_shim::api::LinuxContainerResources;
use jiff::Timestamp;

use super::{Done, Step, Worker};
use crate::numa::Placement;
use crate::pod::observed::{ContainerId, ContainerState};

/// Where the pod's containers run.
#[derive(Debug, Default)]
pub(super) struct Placed {
    /// CPUs by instance; one that an earlier agent made is not there.
    instances: HashMap<ContainerId, String>,
    /// What the instance of this container is made with that is being started.
    made: HashMap<String, String>,
    step: Step,
}

/// What became of an instance that was to run on these CPUs.
pub(super) type Moved = (ContainerId, String, Result<(), String>);

impl Worker {
    /// Where a container that is about to be made is to run.
    pub(super) fn place(&mut self, container: &str) -> Placement {
        let numa = self.deps.numa.as_ref();
        let placement = numa.map(|numa| numa.placement(&self.uid, container)).unwrap_or_default();
        self.placed.made.insert(container.to_owned(), placement.cpus.clone());
        placement
    }

    /// Moves running containers to the CPUs that are theirs by now; gives when to look again.
    pub(super) fn reconcile_placement(&mut self, now: Timestamp) -> Option<Timestamp> {
        let numa = self.deps.numa.clone()?;
        let mut moves = Vec::new();
        let running = self.observed.containers.iter();
        for instance in running.filter(|i| i.state == ContainerState::Running) {
            let wanted = numa.placement(&self.uid, &instance.name).cpus;
            let Placed { instances, made, .. } = &mut self.placed;
            if let Some(cpus) = made.remove(&*instance.name) {
                instances.insert(instance.id.clone(), cpus);
            }
            if !wanted.is_empty() && instances.get(&instance.id) != Some(&wanted) {
                moves.push((instance.id.clone(), wanted));
            }
        }
        let known = &self.observed;
        self.placed.instances.retain(|id, _| known.container(id).is_some());
        if moves.is_empty() {
            return None;
        }
        if self.placed.step.due(now) {
            self.placed.step = Step::Busy;
            let runtime = self.deps.runtime.clone();
            self.begin_task(async move {
                let mut moved = Vec::new();
                for (id, cpuset_cpus) in moves {
                    let resources = LinuxContainerResources {
                        cpuset_cpus: cpuset_cpus.clone(),
                        ..LinuxContainerResources::default()
                    };
                    let result = runtime.update_container_resources(id.as_str(), resources).await;
                    moved.push((id, cpuset_cpus, result.map_err(|error| error.to_string())));
                }
                Done::Moved(moved)
            });
        }
        self.placed.step.retry_at()
    }

    pub(super) fn moved(&mut self, moved: Vec<Moved>) {
        self.placed.step = Step::Wanted;
        for (id, cpus, result) in moved {
            match result {
                Ok(()) => {
                    self.placed.instances.insert(id, cpus);
                }
                Err(error) => {
                    tracing::warn!(pod = %self.uid, container = %id, %cpus, error, "cannot move a container");
                    let period = self.deps.numa.as_ref().map(|numa| numa.reconcile_period());
                    let seconds = period.map_or(1, |period| period.as_secs().max(1));
                    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
                    let failure = self.failure("CpusetError", error, 0, seconds, seconds);
                    self.placed.step = Step::Failed(failure);
                }
            }
        }
    }
}
