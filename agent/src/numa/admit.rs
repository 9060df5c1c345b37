//! Letting a pod in: all that its containers ask for is brought onto the same NUMA nodes and given to
//! them, or nothing is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::core::v1::{Container, Pod};

use super::error::{NumaError, Refusal};
use super::hints::{Hint, Hints};
use super::options::Alignment;
use super::{Numa, State, lock, requests};
use crate::config::Scope;
use crate::device::{PodDevices, wanted};
use crate::ids::PodUid;
use crate::metrics::METRICS;

fn wants_devices(pod: &Pod) -> bool {
    requests::containers(pod).any(|container| !wanted(pod, container).is_empty())
}

impl Numa {
    /// Whether anything is decided for the pod here.
    pub fn concerns(&self, pod: &Pod) -> bool {
        let exclusive =
            (self.cpu.is_some() || self.memory.is_some()) && requests::is_exclusive(pod);
        exclusive || wants_devices(pod)
    }

    /// Gives each container of the pod its CPUs, memory and devices, and has that on disk; or gives none.
    ///
    /// # Errors
    /// They cannot be had, or not near enough to each other.
    pub async fn admit(
        self: &Arc<Self>,
        pod: &Pod,
        devices: &dyn PodDevices,
    ) -> Result<(), Refusal> {
        let began = Instant::now();
        let mut result = self.align(pod, devices).await;
        if result.is_ok() {
            let saved = self.save().await;
            result = saved.map_err(|error| NumaError::NotSaved(error).into());
        }
        if self.config.aligns() {
            METRICS.pod_aligned(began.elapsed(), result.is_err());
        }
        if result.is_err() {
            self.release(&PodUid::of(pod));
        }
        result
    }

    async fn align(&self, pod: &Pod, devices: &dyn PodDevices) -> Result<(), Refusal> {
        // Devices are given while nothing is held, and what is free of them would not be what it was.
        let _alone = match self.config.aligns() && wants_devices(pod) {
            true => Some(self.aligning.lock().await),
            false => None,
        };
        let nodes: BTreeSet<u32> = self.topology.nodes.keys().copied().collect();
        if self.config.scope == Scope::Container && self.config.aligns() {
            for container in requests::containers(pod) {
                let hints = devices.hints(pod, Some(container), &nodes);
                self.give(pod, Some(container), hints)?;
                let given = devices.allocate_container(pod, container).await;
                given.map_err(Refusal::unexpected)?;
            }
            return Ok(());
        }
        let hints = match self.config.aligns() {
            true => devices.hints(pod, None, &nodes),
            false => Hints::new(),
        };
        self.give(pod, None, hints)?;
        devices.allocate(pod).await.map_err(Refusal::unexpected)
    }

    /// Finds nodes for the container, or for the whole pod, and gives what is to be had there.
    fn give(
        &self,
        pod: &Pod,
        container: Option<&Container>,
        of_devices: Hints,
    ) -> Result<(), NumaError> {
        let uid = PodUid::of(pod);
        let mut state = lock(&self.state);
        let mut providers = vec![of_devices];
        if self.config.aligns() {
            let cpus = self.cpu.as_ref().map(|policy| policy.hints(&state.cpus, pod, container));
            let memory =
                self.memory.as_ref().map(|policy| policy.hints(&state.memory, pod, container));
            providers.extend([cpus, memory].map(Option::unwrap_or_default));
        }
        let (hint, good) = self.merger.merge(&providers);
        tracing::debug!(pod = %uid, container = container.map(|c| &*c.name), ?hint, good, "aligned");
        if self.config.alignment == Alignment::SingleNode {
            METRICS.aligned(container.is_none(), good);
        }
        if !good {
            return Err(NumaError::Affinity);
        }
        let before = state.cpus.shared.clone();
        let own = container.into_iter();
        let all = own.chain(requests::containers(pod).filter(|_| container.is_none()));
        let given = all.into_iter().try_for_each(|container| {
            self.affinities.set(&uid, &container.name, hint.nodes);
            self.give_cpus(&mut state, pod, container, hint)?;
            self.give_memory(&mut state, pod, container, hint)
        });
        let news = state.cpus.shared != before;
        drop(state);
        if news {
            self.tell();
        }
        given
    }

    fn give_cpus(
        &self,
        state: &mut State,
        pod: &Pod,
        container: &Container,
        hint: Hint,
    ) -> Result<(), NumaError> {
        let Some(policy) = &self.cpu else { return Ok(()) };
        if requests::cpus(pod, container) == 0 {
            return Ok(());
        }
        let given = policy.allocate(&mut state.cpus, pod, container, hint);
        METRICS.cpus_pinned(given.is_ok(), policy.gives_whole_cores());
        if let Some(cpus) = given? {
            METRICS.cpus_on_cache(policy.on_one_cache(&cpus));
            tracing::info!(pod = %PodUid::of(pod), container = container.name, %cpus, "exclusive CPUs");
        }
        Ok(())
    }

    fn give_memory(
        &self,
        state: &mut State,
        pod: &Pod,
        container: &Container,
        hint: Hint,
    ) -> Result<(), NumaError> {
        let Some(policy) = &self.memory else { return Ok(()) };
        if !requests::is_exclusive(pod) {
            return Ok(());
        }
        let given = policy.allocate(&mut state.memory, pod, container, hint);
        METRICS.memory_pinned(given.is_ok());
        given.map(drop)
    }
}
