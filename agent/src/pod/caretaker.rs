//! Slow housekeeping beside the pods: what is not used any more, pods that take too much, logs that
//! grow too long.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::deps::Deps;
use super::worker::Eviction;
use super::{garbage, image_garbage, pressure, storage};
use crate::ids::PodUid;

/// How often classes of pods are bounded anew, as under kubelet.
const KEEP_PERIOD: Duration = Duration::from_secs(60);

/// Starts the housekeeping; it ends when the set is dropped. Pods that must go are told to
/// `evictions`.
pub(super) fn spawn(
    deps: &Arc<Deps>,
    evictions: mpsc::UnboundedSender<(PodUid, Eviction)>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let (reclaim, reclaims) = mpsc::channel(1);
    tasks.spawn(storage::watch(deps.clone(), evictions.clone()));
    tasks.spawn(pressure::watch(deps.clone(), reclaim, evictions));
    tasks.spawn(image_garbage::watch(deps.clone(), reclaims));
    if deps.node.qos_reserve.is_some() {
        tasks.spawn(keep_requested(deps.clone()));
    }
    if garbage::is_due(&deps.node.gc) {
        tasks.spawn(garbage::watch(deps.clone()));
    }
    if !deps.node.runtime_rotates_logs && deps.node.container_log_max_size > 0 {
        tasks.spawn(rotate_logs(deps.clone()));
    }
    tasks
}

/// Bounds classes of pods that could not be bounded when pods came, for ever.
async fn keep_requested(deps: Arc<Deps>) {
    let mut ticks = tokio::time::interval(KEEP_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        deps.cgroups.keep_requested().await;
    }
}

async fn rotate_logs(deps: Arc<Deps>) {
    let mut ticks = tokio::time::interval(deps.node.container_log_monitor_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for view in deps.table.pods() {
            let dir = deps.node.pod_log_dir(&view.pod);
            let lists = [view.status.container_statuses, view.status.init_container_statuses];
            for status in lists.iter().flatten().flatten() {
                if status.state.as_ref().is_none_or(|s| s.running.is_none()) {
                    continue;
                }
                let Some(id) = view.containers.get(&status.name) else { continue };
                let log = dir.join(&status.name).join(format!("{}.log", status.restart_count));
                if let Err(error) = rotate_one(&deps, id, &log).await {
                    tracing::warn!(log = %log.display(), error, "cannot rotate a log");
                }
            }
        }
    }
}

/// Rotates one log if it is too long: it becomes `<n>.log.<time>`, the runtime opens a new one, and
/// the oldest are removed.
async fn rotate_one(deps: &Deps, id: &str, log: &Path) -> Result<(), String> {
    let length = match tokio::fs::metadata(log).await {
        Ok(found) => found.len(),
        Err(_) => return Ok(()),
    };
    if length < deps.node.container_log_max_size {
        return Ok(());
    }
    let stamp = deps.clock.now().strftime("%Y%m%d-%H%M%S").to_string();
    let mut rotated = log.as_os_str().to_owned();
    rotated.push(format!(".{stamp}"));
    let rotated = PathBuf::from(rotated);
    tokio::fs::rename(log, &rotated).await.map_err(|e| e.to_string())?;
    if let Err(error) = deps.runtime.reopen_container_log(id).await {
        // Back to where the runtime still writes.
        tokio::fs::rename(&rotated, log).await.map_err(|e| e.to_string())?;
        return Err(error.to_string());
    }
    let (Some(dir), Some(name)) = (log.parent(), log.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    let mut old = Vec::new();
    let mut entries = tokio::fs::read_dir(dir).await.map_err(|e| e.to_string())?;
    while let Ok(Some(entry)) = entries.next_entry().await {
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|n| n.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')));
        if ours {
            old.push(entry.path());
        }
    }
    old.sort();
    let keep = usize::try_from(deps.node.container_log_max_files.max(2)).unwrap_or(2) - 1;
    for path in old.iter().take(old.len().saturating_sub(keep)) {
        tokio::fs::remove_file(path).await.map_err(|e| e.to_string())?;
    }
    Ok(())
}
