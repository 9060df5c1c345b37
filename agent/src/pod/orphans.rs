//! What earlier pods left on disk: taken away once it is known which pods there are.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::deps::Deps;
use super::logs::remove_dangling_links;
use crate::ids::PodUid;

/// How soon what could not be taken away is tried again, at first and at last.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Cleans up, beside everything else, after all pods but `kept`.
pub(super) fn clean(deps: Arc<Deps>, kept: HashSet<PodUid>) {
    tokio::spawn(async move {
        let mut left: BTreeSet<PodUid> = BTreeSet::new();
        match deps.volumes.on_disk().await {
            Ok(found) => left.extend(found),
            Err(error) => tracing::warn!(%error, "cannot tell what earlier pods left on disk"),
        }
        match deps.cgroups.list().await {
            Ok(found) => left.extend(found),
            Err(error) => tracing::warn!(%error, "cannot tell which pod cgroups there are"),
        }
        left.extend(deps.store.saved());
        // A pod that came meanwhile is not left over.
        left.retain(|uid| !kept.contains(uid) && deps.table.pod(uid).is_none());
        for uid in &left {
            tracing::info!(%uid, "cleaning up after a pod that is gone");
        }
        let mut told = BTreeSet::new();
        let mut stay = take_away(&deps, left, &mut told).await;
        remove_logs(&deps, &kept).await;
        // A driver that has a volume may come only now: after a reboot its pod is started first.
        let mut wait = FIRST_RETRY;
        while !stay.is_empty() {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LONGEST_RETRY);
            stay.retain(|uid| deps.table.pod(uid).is_none());
            stay = take_away(&deps, stay, &mut told).await;
        }
    });
}

/// Takes away what these pods left; those that still have something. What stands in the way is `told`
/// once for each.
async fn take_away(
    deps: &Deps,
    left: BTreeSet<PodUid>,
    told: &mut BTreeSet<PodUid>,
) -> BTreeSet<PodUid> {
    let mut stay = BTreeSet::new();
    for uid in left {
        let (volumes, cgroups) =
            tokio::join!(deps.volumes.unmount(&uid), deps.cgroups.remove(&uid));
        let failure = match (volumes, cgroups) {
            (Err(error), _) => Some(("volumes", error.to_string())),
            (Ok(()), Err(error)) => Some(("cgroup", error.to_string())),
            (Ok(()), Ok(())) => None,
        };
        match failure {
            None => {
                deps.userns.release(&uid);
                deps.store.remove(&uid);
            }
            Some((what, error)) => {
                if told.insert(uid.clone()) {
                    tracing::warn!(%uid, what, error, "cannot take away yet what an earlier pod left");
                }
                stay.insert(uid);
            }
        }
    }
    stay
}

async fn remove_logs(deps: &Arc<Deps>, kept: &HashSet<PodUid>) {
    let (deps, kept) = (deps.clone(), kept.clone());
    let work = tokio::task::spawn_blocking(move || {
        let Ok(entries) = std::fs::read_dir(&deps.node.pod_logs_dir) else { return };
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            // <namespace>_<name>_<uid>, and nothing else that may lie there.
            let parts: Vec<&str> = name.split('_').collect();
            let [_, _, uid] = parts[..] else { continue };
            let uid = PodUid::from(uid);
            if kept.contains(&uid) || deps.table.pod(&uid).is_some() {
                continue;
            }
            if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "cannot remove old logs");
            }
        }
        remove_dangling_links(&deps.node);
    });
    if let Err(error) = work.await {
        tracing::warn!(%error, "cleaning up logs");
    }
}
