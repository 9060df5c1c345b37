//! The claims that pods of this node have, and the devices that drivers prepared for them. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::claims::Wanted;
use super::error::DraError;
use crate::ids::{NamespacedName, PodUid};

/// One prepared device, as its driver described it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// Its pool.
    pub pool: String,
    /// Its name in the pool.
    pub device: String,
    /// Which share of it.
    pub share: Option<String>,
    /// The requests that it is for; none is all.
    pub requests: Vec<String>,
    /// Its names in CDI.
    pub cdi: Vec<String>,
}

/// One claim.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The object's UID.
    pub uid: String,
    /// Pods that have it.
    pub pods: BTreeSet<PodUid>,
    /// What each driver prepared; a driver that has yet to be asked has an empty list.
    pub drivers: BTreeMap<String, Vec<Device>>,
    /// Whether this agent has had it prepared: what an earlier one had is asked for again, with the
    /// next sandbox, as the machine may have been restarted.
    pub prepared: bool,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClaimStore(BTreeMap<NamespacedName, Claim>);

impl ClaimStore {
    /// One that holds `claims`.
    pub fn of(claims: impl IntoIterator<Item = (NamespacedName, Claim)>) -> Self {
        Self(claims.into_iter().collect())
    }

    /// Every one.
    pub fn all(&self) -> impl Iterator<Item = (&NamespacedName, &Claim)> {
        self.0.iter()
    }

    /// The claim.
    pub fn get(&self, key: &NamespacedName) -> Option<&Claim> {
        self.0.get(key)
    }

    /// Notes that the pod has the claim; the drivers that have yet to prepare it.
    ///
    /// # Errors
    /// Another claim of this name is still prepared.
    pub fn reserve(
        &mut self,
        key: &NamespacedName,
        uid: &str,
        drivers: &BTreeSet<String>,
        pod: &PodUid,
    ) -> Result<BTreeSet<String>, DraError> {
        let claim = self.0.entry(key.clone()).or_insert_with(|| Claim {
            uid: uid.to_owned(),
            drivers: drivers.iter().map(|driver| (driver.clone(), Vec::new())).collect(),
            ..Claim::default()
        });
        if claim.uid != uid {
            let (name, uid) = (key.name.to_string(), claim.uid.clone());
            return Err(DraError::OldClaim { name, uid });
        }
        claim.pods.insert(pod.clone());
        if claim.prepared {
            return Ok(BTreeSet::new());
        }
        Ok(claim.drivers.keys().cloned().collect())
    }

    /// A driver has prepared the claim: these are its devices.
    pub fn put(&mut self, key: &NamespacedName, driver: &str, devices: Vec<Device>) {
        if let Some(claim) = self.0.get_mut(key) {
            claim.drivers.insert(driver.to_owned(), devices);
        }
    }

    /// All its drivers have.
    pub fn prepared(&mut self, key: &NamespacedName) {
        if let Some(claim) = self.0.get_mut(key) {
            claim.prepared = true;
        }
    }

    /// The claims that the pod has.
    pub fn of_pod(&self, pod: &PodUid) -> BTreeSet<NamespacedName> {
        let held = self.0.iter().filter(|(_, claim)| claim.pods.contains(pod));
        held.map(|(key, _)| key.clone()).collect()
    }

    /// Whether the pod has any.
    pub fn holds(&self, pod: &PodUid) -> bool {
        self.0.values().any(|claim| claim.pods.contains(pod))
    }

    /// Pods that have claims and are not among `known`.
    pub fn strangers(&self, known: &HashSet<PodUid>) -> BTreeSet<PodUid> {
        let all = self.0.values().flat_map(|claim| &claim.pods);
        all.filter(|pod| !known.contains(*pod)).cloned().collect()
    }

    /// Takes the claim from the pod where another pod has it, too; whether the pod was the last one, so
    /// that its drivers have to take it back.
    pub fn leave(&mut self, key: &NamespacedName, pod: &PodUid) -> bool {
        let Some(claim) = self.0.get_mut(key).filter(|claim| claim.pods.contains(pod)) else {
            return false;
        };
        if claim.pods.len() == 1 {
            return true;
        }
        claim.pods.remove(pod);
        false
    }

    /// The drivers have taken it back.
    pub fn remove(&mut self, key: &NamespacedName) {
        self.0.remove(key);
    }

    /// Pods that have one of the driver's devices (pool and name).
    pub fn holders(&self, driver: &str, devices: &BTreeSet<(String, String)>) -> BTreeSet<PodUid> {
        let has = |claim: &&Claim| {
            let mut own = claim.drivers.get(driver).into_iter().flatten();
            own.any(|d| devices.contains(&(d.pool.clone(), d.device.clone())))
        };
        self.0.values().filter(has).flat_map(|claim| claim.pods.iter().cloned()).collect()
    }

    /// The names in CDI of what is wanted of the claim; `None` if nothing is known of it.
    pub fn cdi(&self, key: &NamespacedName, wanted: &Wanted) -> Option<Vec<String>> {
        let devices = self.0.get(key)?.drivers.values().flatten();
        let own = devices.filter(|device| wanted.takes(&device.requests));
        Some(own.flat_map(|device| device.cdi.iter().cloned()).collect())
    }

    /// How many claims are prepared by each driver, and how many in all.
    pub fn in_use(&self) -> (BTreeMap<String, i64>, i64) {
        let (mut by_driver, mut all) = (BTreeMap::new(), 0);
        for claim in self.0.values().filter(|claim| claim.prepared) {
            all += 1;
            for driver in claim.drivers.keys() {
                *by_driver.entry(driver.clone()).or_default() += 1;
            }
        }
        (by_driver, all)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A device of pool `p` for these requests, with these names in CDI.
    pub fn device(name: &str, requests: &[&str], cdi: &[&str]) -> Device {
        let list = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        Device {
            pool: "p".into(),
            device: name.into(),
            share: None,
            requests: list(requests),
            cdi: list(cdi),
        }
    }

    fn key(name: &str) -> NamespacedName {
        NamespacedName::new("n", name)
    }

    fn set(drivers: &[&str]) -> BTreeSet<String> {
        drivers.iter().map(|d| (*d).to_owned()).collect()
    }

    #[test]
    fn a_shared_claim_is_prepared_once_and_taken_back_with_its_last_pod() {
        let (one, two) = (PodUid::from("1"), PodUid::from("2"));
        let mut store = ClaimStore::default();
        let asked = store.reserve(&key("c"), "u", &set(&["a", "b"]), &one).unwrap();
        assert_eq!(asked, set(&["a", "b"]));
        // Not prepared yet: whoever comes next asks as well.
        assert_eq!(store.reserve(&key("c"), "u", &set(&["a", "b"]), &two).unwrap(), asked);
        store.put(&key("c"), "a", vec![device("d", &[], &["x"])]);
        assert_eq!(store.in_use().1, 0);
        store.prepared(&key("c"));
        assert_eq!(store.in_use(), ([("a".into(), 1), ("b".into(), 1)].into(), 1));
        assert_eq!(store.reserve(&key("c"), "u", &set(&["a", "b"]), &two).unwrap(), set(&[]));
        assert!(!store.leave(&key("c"), &one) && !store.holds(&one));
        assert!(!store.leave(&key("c"), &one), "it has left");
        assert!(store.leave(&key("c"), &two) && store.holds(&two), "until it is taken back");
        store.remove(&key("c"));
        assert!(!store.holds(&two));
    }

    #[test]
    fn another_claim_of_the_same_name_waits_for_the_first() {
        let mut store = ClaimStore::default();
        store.reserve(&key("c"), "u", &set(&["a"]), &PodUid::from("1")).unwrap();
        let error = store.reserve(&key("c"), "v", &set(&["a"]), &PodUid::from("2")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "old ResourceClaim with same name c and different UID u still exists (previous pod \
             force-deleted?!)"
        );
        assert!(!store.holds(&PodUid::from("2")));
    }

    #[test]
    fn pods_are_found_by_what_they_have() {
        let mut store = ClaimStore::default();
        for (claim, pod) in [("c", "1"), ("d", "2"), ("e", "1")] {
            store.reserve(&key(claim), "u", &set(&["a"]), &PodUid::from(pod)).unwrap();
            store.put(&key(claim), "a", vec![device(claim, &[], &[])]);
        }
        assert_eq!(store.of_pod(&PodUid::from("1")), [key("c"), key("e")].into());
        assert_eq!(store.strangers(&[PodUid::from("1")].into()), [PodUid::from("2")].into());
        let devices = [("p".to_owned(), "d".to_owned())].into();
        assert_eq!(store.holders("a", &devices), [PodUid::from("2")].into());
        assert!(store.holders("b", &devices).is_empty());
    }
}
