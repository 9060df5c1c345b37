//! What earlier pods left on disk: taken away once it is known which pods there are.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::deps::Deps;
use super::logs::remove_dangling_links;
use crate::ids::PodUid;

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
        for uid in left {
            tracing::info!(%uid, "cleaning up after a pod that is gone");
            let (volumes, cgroups) =
                tokio::join!(deps.volumes.unmount(&uid), deps.cgroups.remove(&uid));
            if let Err(error) = volumes {
                tracing::warn!(%uid, %error, "cannot take away an earlier pod's volumes");
                continue;
            }
            if let Err(error) = cgroups {
                tracing::warn!(%uid, %error, "cannot take away an earlier pod's cgroup");
                continue;
            }
            deps.userns.release(&uid);
            deps.store.remove(&uid);
        }
        remove_logs(&deps, &kept).await;
    });
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
