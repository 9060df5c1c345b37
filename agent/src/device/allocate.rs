//! Giving devices to containers: choose, ask the plugin, remember, have it on disk.
//!
//! Plugins are asked without anything being held: devices that are asked for are reserved meanwhile,
//! and free again when the one who asks gives up.

use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::broadcast;
use tonic::Status;

use super::assignments::{Assigned, Statuses};
use super::plan::{Choice, Question, plan_devices, wanted};
use super::run_options::{RunOptions, run_options};
use super::{DeviceError, Devices, PodDevices, State, lock};
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::numa::hints::Hints;
use crate::pod::spec::{init_containers, spec_of};

/// Devices that nobody else is given meanwhile.
struct Reservation<'a> {
    devices: &'a Devices,
    resource: &'a str,
    ids: BTreeSet<String>,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if let Some(reserved) = lock(&self.devices.state).reserved.get_mut(self.resource) {
            reserved.retain(|id| !self.ids.contains(id));
        }
    }
}

fn rpc(what: &'static str) -> impl Fn(Status) -> DeviceError {
    move |status| DeviceError::Rpc { what, status: Box::new(status) }
}

impl State {
    /// Whether devices of `resource` are a plugin's, or were when they were given.
    pub(super) fn manages(&self, resource: &str) -> bool {
        self.inventory.registered(resource) || self.assignments.uses(resource)
    }
}

impl Devices {
    /// Gives one container its devices; whether there were any to give.
    async fn give(&self, pod: &Pod, container: &Container) -> Result<bool, DeviceError> {
        let mut any = false;
        for (resource, asked) in wanted(pod, container) {
            any |= self.allocate_resource(pod, &container.name, resource, asked).await?;
        }
        Ok(any)
    }

    async fn allocate_resource(
        &self,
        pod: &Pod,
        container: &str,
        resource: &str,
        asked: usize,
    ) -> Result<bool, DeviceError> {
        let uid = PodUid::of(pod);
        let Some(reservation) = self.choose(pod, container, resource, asked).await? else {
            return Ok(false);
        };
        let Some(client) = self.client(resource) else {
            return Err(DeviceError::Stopped(resource.to_owned()));
        };
        tracing::debug!(pod = %uid, container, resource, devices = ?reservation.ids, "allocate");
        let began = Instant::now();
        let answer = client.allocate(&reservation.ids).await;
        METRICS.devices_allocated(resource, began.elapsed());
        let response = answer.map_err(rpc(""))?;
        let response = response.ok_or_else(|| DeviceError::NoResponse(resource.to_owned()))?;
        let mut state = lock(&self.state);
        let own = Assigned::new(&state.inventory, resource, &reservation.ids, response);
        state.assignments.insert(&uid, container, resource, own);
        Ok(true)
    }

    /// Chooses devices, and reserves them; `None` where the container needs none (more).
    async fn choose<'a>(
        &'a self,
        pod: &Pod,
        container: &str,
        resource: &'a str,
        asked: usize,
    ) -> Result<Option<Reservation<'a>>, DeviceError> {
        let uid = PodUid::of(pod);
        let nodes = self.affinity.nodes(&uid, container);
        let mut preferred = None;
        loop {
            let choice = {
                let mut state = lock(&self.state);
                if !state.manages(resource) {
                    // It is the cluster's, not the node's.
                    return Ok(None);
                }
                let reserved = state.reserved.get(resource).cloned().unwrap_or_default();
                let mut reusable = state.assignments.reusable(pod, container, resource);
                reusable.retain(|id| !reserved.contains(id));
                let mut in_use = state.assignments.in_use(resource);
                in_use.extend(reserved);
                let had = state.assignments.get(&uid, container, resource).map(Assigned::ids);
                let choice = plan_devices(Question {
                    whom: (uid.as_str(), container, resource),
                    asked,
                    had: had.as_ref(),
                    registered: state.inventory.registered(resource),
                    usable: &state.inventory.usable(resource),
                    in_use: &in_use,
                    reusable: &reusable,
                    nodes: nodes.as_ref(),
                    asks: state.inventory.plugin(resource).is_some_and(|(_, o)| o.preferred),
                    preferred: preferred.as_ref(),
                })?;
                if let Choice::Take(ids) = &choice {
                    let reserved = state.reserved.entry(resource.to_owned()).or_default();
                    reserved.extend(ids.iter().cloned());
                }
                choice
            };
            match choice {
                Choice::Nothing => return Ok(None),
                Choice::Take(ids) => {
                    return Ok(Some(Reservation { devices: self, resource, ids }));
                }
                Choice::Ask { available, must } => {
                    let Some(client) = self.client(resource) else {
                        return Err(DeviceError::Stopped(resource.to_owned()));
                    };
                    let told = client.preferred(&available, &must, asked).await;
                    let what = "device plugin GetPreferredAllocation rpc failed with err: ";
                    preferred = Some(told.map_err(rpc(what))?);
                }
            }
        }
    }

    /// Has the plugin make ready what the container has, where it wants to; whether the container has any.
    async fn pre_start(
        &self,
        uid: &PodUid,
        container: &str,
        resource: &str,
    ) -> Result<bool, DeviceError> {
        let (plugin, own) = {
            let state = lock(&self.state);
            let own = state.assignments.get(uid, container, resource).map(Assigned::ids);
            (state.inventory.plugin(resource), own)
        };
        let Some((_, options)) = plugin else {
            return Err(DeviceError::NoEndpoint(resource.to_owned()));
        };
        let Some(own) = own else { return Ok(false) };
        if options.pre_start {
            let Some(client) = self.client(resource) else {
                return Err(DeviceError::Stopped(resource.to_owned()));
            };
            let what = "device plugin PreStartContainer rpc failed with err: ";
            client.pre_start(&own).await.map_err(rpc(what))?;
        }
        Ok(true)
    }
}

#[async_trait]
impl PodDevices for Devices {
    fn allocatable(&self, uid: &PodUid, resource: &str) -> Option<i64> {
        let state = lock(&self.state);
        let told = state.inventory.capacities().get(resource).map(|c| c.allocatable);
        let used = (state.assignments.has(uid) && state.assignments.uses(resource))
            .then(|| state.assignments.in_use(resource).len());
        told.max(used).map(|count| i64::try_from(count).unwrap_or(i64::MAX))
    }

    async fn allocate(&self, pod: &Pod) -> Result<(), DeviceError> {
        let spec = spec_of(pod);
        let mut any = false;
        for container in init_containers(spec).iter().chain(&spec.containers) {
            any |= self.give(pod, container).await?;
        }
        if any { self.save().await } else { Ok(()) }
    }

    async fn allocate_container(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<(), DeviceError> {
        if self.give(pod, container).await? { self.save().await } else { Ok(()) }
    }

    fn hints(&self, pod: &Pod, container: Option<&Container>, nodes: &BTreeSet<u32>) -> Hints {
        lock(&self.state).hints(pod, container, nodes)
    }

    async fn run_options(
        &self,
        pod: &Pod,
        container: &Container,
    ) -> Result<RunOptions, DeviceError> {
        let uid = PodUid::of(pod);
        let mut any = false;
        for (resource, asked) in wanted(pod, container) {
            if asked == 0 || !lock(&self.state).manages(resource) {
                continue;
            }
            if self.pre_start(&uid, &container.name, resource).await? {
                continue;
            }
            // Its assignment was lost, or its plugin came after the pod.
            if self.allocate_resource(pod, &container.name, resource, asked).await? {
                any = true;
                self.pre_start(&uid, &container.name, resource).await?;
            }
        }
        if any {
            self.save().await?;
        }
        let state = lock(&self.state);
        Ok(state.assignments.of(&uid, &container.name).map(run_options).unwrap_or_default())
    }

    fn release(&self, uid: &PodUid) {
        if lock(&self.state).assignments.release(uid) {
            self.changed.notify_one();
        }
    }

    fn retain(&self, pods: &HashSet<PodUid>) {
        if lock(&self.state).assignments.retain(pods) {
            self.changed.notify_one();
        }
    }

    fn statuses(&self, uid: &PodUid) -> Statuses {
        let state = lock(&self.state);
        state.assignments.statuses(uid, &state.inventory)
    }

    fn news(&self) -> broadcast::Receiver<PodUid> {
        self.news.subscribe()
    }
}
