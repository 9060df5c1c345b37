//! What a pod's status says of its claims' devices. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, ResourceHealth, ResourceStatus};

use super::claim_store::ClaimStore;
use super::claims;
use super::health::Health;
use crate::device::Statuses;
use crate::ids::NamespacedName;
use crate::pod::spec::spec_of;

/// The health of what each container has of its claims (KEP-4680). Pure.
pub(super) fn statuses(pod: &Pod, store: &ClaimStore, health: &Health, now: Timestamp) -> Statuses {
    let (mut all, spec) = (Statuses::new(), spec_of(pod));
    let namespace = NamespacedName::of_pod(pod).namespace;
    for container in &spec.containers {
        let asked = container.resources.as_ref().and_then(|r| r.claims.as_ref());
        let mut own: BTreeMap<String, Vec<ResourceHealth>> = BTreeMap::new();
        for asked in asked.into_iter().flatten() {
            let mut named = spec.resource_claims.iter().flatten().filter(|c| c.name == asked.name);
            let reference =
                named.next().and_then(|claim| claims::resolve(pod, claim).ok().flatten());
            let key = reference.map(|r| NamespacedName::new(&namespace, &r.name));
            let Some(claim) = key.and_then(|key| store.get(&key)) else { continue };
            let request = asked.request.as_deref().filter(|request| !request.is_empty());
            let name = match request {
                Some(request) => format!("claim:{}/{request}", asked.name),
                None => format!("claim:{}", asked.name),
            };
            let told = own.entry(name).or_default();
            for (driver, devices) in &claim.drivers {
                for device in devices {
                    let requests = &device.requests;
                    let of = |request: &str| {
                        let request = claims::base(request);
                        requests.is_empty() || requests.iter().any(|r| claims::base(r) == request)
                    };
                    if !request.is_none_or(of) {
                        continue;
                    }
                    let (pool, name) = (&device.pool, &device.device);
                    let (state, message) = health.of(driver, pool, name, now);
                    let id = device.cdi.first().cloned();
                    let id = id.unwrap_or_else(|| format!("{driver}/{pool}/{name}"));
                    if told.iter().all(|known| known.resource_id != id) {
                        told.push(ResourceHealth {
                            resource_id: id,
                            health: Some(state.into()),
                            message: (!message.is_empty()).then(|| message.to_owned()),
                        });
                    }
                }
            }
        }
        let own = own.into_iter().filter(|(_, told)| !told.is_empty());
        let own: Vec<_> =
            own.map(|(name, told)| ResourceStatus { name, resources: Some(told) }).collect();
        if !own.is_empty() {
            all.insert(container.name.clone(), own);
        }
    }
    all
}
