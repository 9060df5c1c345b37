//! What the runtime has, as a listing shows it.

use std::collections::HashMap;
use std::sync::Arc;

use crate::ids::{NamespacedName, PodUid};
use crate::pod::observed::names;
use crate::runtime::Runtime;

/// One sandbox or container in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) uid: PodUid,
    pub(super) key: NamespacedName,
    pub(super) state: i32,
}

/// What a listing showed, by id. Only what carries a pod's UID is ours.
#[derive(Debug, Default)]
pub(super) struct Snapshot(pub(super) HashMap<String, Seen>);

impl Snapshot {
    pub(super) fn add(&mut self, id: String, labels: &HashMap<String, String>, state: i32) {
        let label = |name: &str| labels.get(name).map(String::as_str);
        let Some(uid) = label(names::POD_UID) else { return };
        let key = NamespacedName::new(
            label(names::POD_NAMESPACE).unwrap_or("default"),
            label(names::POD_NAME).unwrap_or_default(),
        );
        self.0.insert(id, Seen { uid: PodUid::from(uid), key, state });
    }

    pub(super) fn has(&self, uid: &PodUid) -> bool {
        self.0.values().any(|seen| seen.uid == *uid)
    }
}

/// All that the runtime has.
pub(super) async fn list(runtime: &Arc<dyn Runtime>) -> crate::runtime::Result<Snapshot> {
    let (sandboxes, containers) =
        tokio::try_join!(runtime.list_pod_sandboxes(None), runtime.list_containers(None))?;
    let mut snapshot = Snapshot::default();
    for s in sandboxes {
        snapshot.add(s.id, &s.labels, s.state);
    }
    for c in containers {
        // Apart from the sandboxes' states.
        snapshot.add(c.id, &c.labels, 100 + c.state);
    }
    Ok(snapshot)
}
