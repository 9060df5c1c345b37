//! Having a pod's claims prepared by their drivers, and taken back.
//!
//! What one pod does about a claim is over before another pod that shares it begins: who comes while the
//! last one leaves has it prepared anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::OwnedMutexGuard;

use super::claim_store::Device;
use super::claims::{Reference, check, drivers, references};
use super::error::DraError;
use super::wire::v1;
use super::{Dra, lock};
use crate::ids::{NamespacedName, PodUid};

const PREPARE: &str = "NodePrepareResources";
const UNPREPARE: &str = "NodeUnprepareResources";

/// Claims by driver, as drivers are asked for them.
type Batches = BTreeMap<String, BTreeMap<String, (NamespacedName, v1::Claim)>>;

/// A claim that was read and may be had.
struct Checked {
    key: NamespacedName,
    uid: String,
    drivers: BTreeSet<String>,
}

fn batch(batches: &mut Batches, driver: String, key: &NamespacedName, uid: &str) {
    let claim = v1::Claim {
        namespace: key.namespace.to_string(),
        uid: uid.to_owned(),
        name: key.name.to_string(),
    };
    batches.entry(driver).or_default().insert(uid.to_owned(), (key.clone(), claim));
}

/// Holds the answer of a driver to what it was asked: all claims, no others, none of them refused.
fn judge<'a>(
    call: &'static str,
    asked: &BTreeMap<String, (NamespacedName, v1::Claim)>,
    answered: impl ExactSizeIterator<Item = (&'a String, &'a str)>,
) -> Result<(), DraError> {
    let missing = asked.len().saturating_sub(answered.len());
    for (uid, error) in answered {
        let Some((key, _)) = asked.get(uid) else {
            return Err(DraError::Stranger { call, uid: uid.clone() });
        };
        if !error.is_empty() {
            let (claim, message) = (key.name.to_string(), error.to_owned());
            return Err(DraError::Refused { call, claim, message });
        }
    }
    match missing {
        0 => Ok(()),
        count => Err(DraError::Skipped { call, count }),
    }
}

fn device(told: v1::Device) -> Device {
    Device {
        pool: told.pool_name,
        device: told.device_name,
        share: told.share_id,
        requests: told.request_names,
        cdi: told.cdi_device_ids,
    }
}

impl Dra {
    pub(super) async fn prepare_claims(&self, pod: &Pod) -> Result<(), DraError> {
        let (uid, namespace) = (PodUid::of(pod), NamespacedName::of_pod(pod).namespace);
        let mut all = Vec::new();
        // All is looked at before anything is done, so that a pod that fails here can be deleted
        // without its drivers.
        for reference in references(pod)? {
            all.push(self.read(pod, &namespace, &reference).await?);
        }
        let _alone = self.alone(all.iter().map(|claim| claim.key.clone()).collect()).await;
        let mut batches = Batches::new();
        let mut asked = BTreeSet::new();
        {
            let mut store = lock(&self.store);
            for claim in &all {
                let Checked { key, uid: of, drivers } = claim;
                let before = store.get(key).is_some_and(|known| known.prepared);
                for driver in store.reserve(key, of, drivers, &uid)? {
                    batch(&mut batches, driver, key, of);
                }
                if !before {
                    asked.insert(key.clone());
                }
            }
        }
        // On disk before a driver hears of it: whatever happens, it will be taken back.
        self.save().await?;
        for (driver, claims) in batches {
            let client = self.drivers.client(&driver)?;
            let request = claims.values().map(|(_, claim)| claim.clone()).collect();
            let response = client.prepare(request).await;
            let mut told = response
                .map_err(|status| DraError::Rpc { call: PREPARE, status: Box::new(status) })?
                .claims;
            judge(PREPARE, &claims, told.iter().map(|(uid, own)| (uid, &*own.error)))?;
            let mut store = lock(&self.store);
            for (uid, (key, _)) in claims {
                let devices = told.remove(&uid).map(|own| own.devices).unwrap_or_default();
                store.put(&key, &driver, devices.into_iter().map(device).collect());
            }
        }
        {
            let mut store = lock(&self.store);
            asked.iter().for_each(|key| store.prepared(key));
        }
        self.save().await
    }

    async fn read(
        &self,
        pod: &Pod,
        namespace: &str,
        reference: &Reference,
    ) -> Result<Checked, DraError> {
        let name = reference.name.clone();
        let key = NamespacedName::new(namespace, &name);
        let claim = match self.objects.resource_claim(&key).await {
            Ok(Some(claim)) => claim,
            Ok(None) => return Err(DraError::NotFound(name)),
            Err(source) => return Err(DraError::Fetch { name, source }),
        };
        check(pod, reference, &claim)?;
        let drivers = drivers(&claim)?;
        for driver in &drivers {
            self.drivers.client(driver)?;
        }
        Ok(Checked { key, uid: claim.metadata.uid.clone().unwrap_or_default(), drivers })
    }

    pub(super) async fn unprepare_claims(&self, pod: &PodUid) -> Result<(), DraError> {
        let held = lock(&self.store).of_pod(pod);
        let _alone = self.alone(held.clone()).await;
        let mut batches = Batches::new();
        let mut last = Vec::new();
        {
            let mut store = lock(&self.store);
            for key in held {
                if !store.leave(&key, pod) {
                    continue;
                }
                if let Some(claim) = store.get(&key) {
                    for driver in claim.drivers.keys() {
                        batch(&mut batches, driver.clone(), &key, &claim.uid);
                    }
                }
                last.push(key);
            }
        }
        for (driver, claims) in batches {
            let client = self.drivers.client(&driver)?;
            let request = claims.values().map(|(_, claim)| claim.clone()).collect();
            let told = client
                .unprepare(request)
                .await
                .map_err(|status| DraError::Rpc { call: UNPREPARE, status: Box::new(status) })?
                .claims;
            judge(UNPREPARE, &claims, told.iter().map(|(uid, own)| (uid, &*own.error)))?;
        }
        {
            let mut store = lock(&self.store);
            last.iter().for_each(|key| store.remove(key));
        }
        self.save().await
    }

    /// Waits until nobody else does anything about these claims.
    async fn alone(&self, keys: BTreeSet<NamespacedName>) -> Vec<OwnedMutexGuard<()>> {
        let locks: Vec<_> = {
            let mut busy = lock(&self.busy);
            busy.retain(|_, used| Arc::strong_count(used) > 1);
            keys.into_iter().map(|key| busy.entry(key).or_default().clone()).collect()
        };
        let mut held = Vec::new();
        // In the order of their names, so that no two wait for each other.
        for one in locks {
            held.push(one.lock_owned().await);
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_answers_for_what_it_was_asked_for() {
        let mut batches = Batches::new();
        for (uid, name) in [("1", "a"), ("2", "b")] {
            batch(&mut batches, "d".into(), &NamespacedName::new("n", name), uid);
        }
        let answer = |list: &[(&str, &'static str)]| {
            let list: Vec<(String, &str)> = list.iter().map(|(u, e)| ((*u).into(), *e)).collect();
            judge(PREPARE, &batches["d"], list.iter().map(|(uid, error)| (uid, *error)))
                .map_err(|error| error.to_string())
        };
        assert_eq!(answer(&[("1", ""), ("2", "")]), Ok(()));
        for (list, expected) in [
            (&[("1", ""), ("2", "on fire")][..], "failed for ResourceClaim b: on fire"),
            (&[("1", "")], "skipped 1 ResourceClaims"),
            (&[("1", ""), ("3", "")], "returned result for unknown claim UID 3"),
        ] {
            assert_eq!(answer(list), Err(format!("NodePrepareResources {expected}")));
        }
    }
}
