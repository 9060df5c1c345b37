//! Which probes run now.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Container as SpecContainer;
use tokio::task::AbortHandle;

use super::{Message, Worker};
use crate::pod::deps::container_reference;
use crate::pod::facts::ProbeKind;
use crate::pod::observed::{Container, ContainerState};
use crate::pod::plan::usable_sandbox;
use crate::pod::spec::{ContainerKind, host_network, init_containers, is_sidecar, spec_of};
use crate::probe::{LastCheck, Place, ProbeTarget, run_probe};

/// A probe that is asked over and over.
pub(super) struct Running {
    task: AbortHandle,
    /// What came of it last.
    pub(super) last: Arc<LastCheck>,
}

impl Worker {
    /// Begins the probes that are due and ends those whose instance does not run any more.
    pub(super) fn reconcile_probes(&mut self) {
        let pod = self.pod.clone();
        let spec = spec_of(&pod);
        let running = |worker: &Self, c: &SpecContainer| {
            worker.observed.latest(&c.name).filter(|i| i.state == ContainerState::Running).cloned()
        };
        let mut wanted = Vec::new();
        let sidecars = init_containers(spec)
            .iter()
            .filter(|c| is_sidecar(c))
            .map(|c| (c, ContainerKind::Sidecar));
        for (c, kind) in sidecars.chain(spec.containers.iter().map(|c| (c, ContainerKind::Main))) {
            if c.startup_probe.is_none()
                && c.readiness_probe.is_none()
                && c.liveness_probe.is_none()
            {
                continue;
            }
            let Some(instance) = running(self, c) else { continue };
            let started =
                c.startup_probe.is_none() || self.facts.probes.started.contains(&instance.id);
            if started {
                wanted.push((c, kind, instance.clone(), ProbeKind::Readiness));
                wanted.push((c, kind, instance, ProbeKind::Liveness));
            } else {
                wanted.push((c, kind, instance, ProbeKind::Startup));
            }
        }
        self.probes.retain(|(id, kind), probe| {
            let keep = wanted.iter().any(|(_, _, i, k)| i.id == *id && k == kind);
            if !keep {
                probe.task.abort();
            }
            keep
        });
        for (container, kind, instance, probe) in wanted {
            self.begin_probe(container, kind, &instance, probe);
        }
    }

    fn begin_probe(
        &mut self,
        container: &SpecContainer,
        kind: ContainerKind,
        instance: &Container,
        probe_kind: ProbeKind,
    ) {
        let probe = match probe_kind {
            ProbeKind::Startup => &container.startup_probe,
            ProbeKind::Readiness => &container.readiness_probe,
            ProbeKind::Liveness => &container.liveness_probe,
        };
        let Some(probe) = probe else { return };
        let key = (instance.id.clone(), probe_kind);
        if self.probes.contains_key(&key) || self.facts.probes.failed.contains_key(&instance.id) {
            return;
        }
        let pod_ip = if host_network(spec_of(&self.pod)) {
            self.deps.node.node_ips.first().copied()
        } else {
            usable_sandbox(&self.pod, &self.observed)
                .and_then(|s| s.ips.first())
                .and_then(|ip| ip.parse().ok())
        };
        let now = self.deps.clock.now();
        let started = instance.started_at.unwrap_or(instance.created_at);
        let standing = match probe_kind {
            ProbeKind::Liveness => Some(true),
            ProbeKind::Readiness => Some(self.facts.probes.ready.contains(&instance.id)),
            ProbeKind::Startup => None,
        };
        let last = Arc::new(LastCheck::default());
        let target = ProbeTarget {
            place: Place {
                runtime: self.deps.runtime.clone(),
                container_id: instance.id.to_string(),
                pod_ip,
                ports: container.ports.clone().unwrap_or_default(),
            },
            probe: probe.clone(),
            kind: probe_kind,
            healthy: standing,
            regarding: container_reference(&self.pod, kind, &container.name),
            age: now.duration_since(started).try_into().unwrap_or_default(),
            adopted: started < self.deps.began,
            clock: self.deps.clock.clone(),
            last: last.clone(),
        };
        let outbox = self.outbox.clone();
        let id = instance.id.clone();
        let turned = move |healthy| {
            // The worker may have ended since.
            let _ = outbox.send(Message::Probe(id.clone(), probe_kind, healthy));
        };
        let task = tokio::spawn(run_probe(target, self.deps.events.clone(), turned));
        self.probes.insert(key, Running { task: task.abort_handle(), last });
    }

    /// Ends the probes of the kinds that `which` takes.
    pub(super) fn stop_probes(&mut self, which: impl Fn(ProbeKind) -> bool) {
        self.probes.retain(|(_, kind), probe| {
            if which(*kind) {
                probe.task.abort();
                return false;
            }
            true
        });
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop_probes(|_| true);
    }
}
