//! Attachable volumes that pods of this node use, or wait for: `status.volumesInUse` of the Node.
//!
//! The attach-detach controller detaches nothing that is listed. A volume is listed before it is
//! mounted and until its driver has taken it back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::ids::PodUid;

/// Volumes in use, by their unique names, and who uses them.
#[derive(Debug)]
pub struct InUse {
    users: Mutex<BTreeMap<String, BTreeSet<PodUid>>>,
    names: watch::Sender<BTreeSet<String>>,
}

impl Default for InUse {
    fn default() -> Self {
        Self { users: Mutex::default(), names: watch::Sender::new(BTreeSet::new()) }
    }
}

impl InUse {
    /// The names, as they change.
    pub fn names(&self) -> watch::Receiver<BTreeSet<String>> {
        self.names.subscribe()
    }

    fn users(&self) -> MutexGuard<'_, BTreeMap<String, BTreeSet<PodUid>>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, users: &BTreeMap<String, BTreeSet<PodUid>>) {
        let now: BTreeSet<String> = users.keys().cloned().collect();
        self.names.send_if_modified(|names| {
            let changed = *names != now;
            *names = now;
            changed
        });
    }

    /// `uid` uses the volume `name`.
    pub(super) fn add(&self, name: &str, uid: &PodUid) {
        let mut users = self.users();
        users.entry(name.to_owned()).or_default().insert(uid.clone());
        self.tell(&users);
    }

    /// It uses it no more.
    pub(super) fn remove(&self, name: &str, uid: &PodUid) {
        let mut users = self.users();
        if let Some(of) = users.get_mut(name) {
            of.remove(uid);
            if of.is_empty() {
                users.remove(name);
            }
        }
        self.tell(&users);
    }

    /// It uses none any more.
    pub(super) fn remove_pod(&self, uid: &PodUid) {
        let mut users = self.users();
        users.retain(|_, of| {
            of.remove(uid);
            !of.is_empty()
        });
        self.tell(&users);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_in_use_until_its_last_pod_is_gone() {
        let in_use = InUse::default();
        let names = in_use.names();
        let (a, b) = (PodUid::from("a"), PodUid::from("b"));
        let show = || names.borrow().iter().cloned().collect::<Vec<_>>().join(" ");
        in_use.add("v", &a);
        in_use.add("v", &b);
        in_use.add("w", &b);
        in_use.remove("v", &a);
        assert_eq!(show(), "v w");
        in_use.remove_pod(&b);
        assert_eq!(show(), "");
        in_use.remove("v", &a);
        assert_eq!(show(), "");
    }
}
