//! Slow housekeeping beside the pods: images when the disk fills up, logs that grow too long, pods
//! that fill the disk.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::deps::Deps;
use super::image_name::parse_image;
use super::spec::spec_of;
use super::worker::Eviction;
use crate::ids::PodUid;
use crate::report::EventType;
use crate::runtime::image_dir;

/// How often the image file system is measured.
const IMAGE_PERIOD: Duration = Duration::from_secs(300);

/// Starts the housekeeping; it ends when the set is dropped. Pods that must go are told to
/// `evictions`.
pub(super) fn spawn(
    deps: &Arc<Deps>,
    evictions: mpsc::UnboundedSender<(PodUid, Eviction)>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let (reclaim, reclaims) = mpsc::channel(1);
    tasks.spawn(super::storage::watch(deps.clone(), evictions.clone()));
    tasks.spawn(super::pressure::watch(deps.clone(), reclaim, evictions));
    tasks.spawn(collect_images(deps.clone(), reclaims));
    if super::garbage::is_due(&deps.node.gc) {
        tasks.spawn(super::garbage::watch(deps.clone()));
    }
    if !deps.node.runtime_rotates_logs && deps.node.container_log_max_size > 0 {
        tasks.spawn(rotate_logs(deps.clone()));
    }
    tasks
}

/// An image as the collector sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    id: String,
    size: u64,
    first_seen: Timestamp,
    last_used: Timestamp,
}

/// Which images go: those unused for too long, and, least recently used first, as many as free
/// `to_free` bytes.
fn plan_removals(
    mut unused: Vec<Candidate>,
    to_free: u64,
    now: Timestamp,
    min_age: Duration,
    max_age: Option<Duration>,
) -> Vec<String> {
    unused.sort_by_key(|a| (a.last_used, a.first_seen));
    let older = |since: Timestamp, age: Duration| {
        Duration::try_from(now.duration_since(since)).unwrap_or_default() >= age
    };
    let mut freed = 0;
    let mut gone = Vec::new();
    for image in unused {
        let stale = max_age.is_some_and(|age| older(image.last_used, age));
        let wanted = freed < to_free && older(image.first_seen, min_age);
        if stale || wanted {
            freed += image.size;
            gone.push(image.id);
        }
    }
    gone
}

/// The images of a pod's volumes, by the names that runtimes list them by.
fn volume_images(pod: &Pod) -> Vec<String> {
    let listed = |reference: &str| {
        let name = parse_image(reference).ok()?;
        // From the tag or digest on; a colon further ahead is a registry's port.
        let last = name.full.rfind('/').map_or(0, |at| at + 1);
        let from = last + name.full[last..].find(['@', ':'])?;
        Some(format!("{}{}", name.repository, &name.full[from..]))
    };
    let volumes = spec_of(pod).volumes.iter().flatten();
    volumes.filter_map(|v| listed(v.image.as_ref()?.reference.as_deref()?)).collect()
}

/// Removes images when it is time, and all that are unused when asked.
async fn collect_images(deps: Arc<Deps>, mut reclaims: mpsc::Receiver<oneshot::Sender<()>>) {
    let mut seen: HashMap<String, (Timestamp, Timestamp)> = HashMap::new();
    let mut ticks = tokio::time::interval(IMAGE_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let asked = tokio::select! {
            _ = ticks.tick() => None,
            Some(done) = reclaims.recv() => Some(done),
        };
        let collected = collect_once(&deps, &mut seen, asked.is_some()).await;
        if let Some(done) = asked {
            // Who asked may wait no more.
            let _ = done.send(());
        }
        if let Err(error) = collected {
            tracing::warn!(%error, "image garbage collection");
            let node = ObjectReference {
                kind: Some("Node".into()),
                name: Some(deps.node.node_name.clone()),
                uid: Some(deps.node.node_name.clone()),
                ..Default::default()
            };
            deps.events.record(node, EventType::Warning, "ImageGCFailed", error);
        }
    }
}

async fn collect_once(
    deps: &Deps,
    seen: &mut HashMap<String, (Timestamp, Timestamp)>,
    all: bool,
) -> Result<(), String> {
    let gc = &deps.node.gc;
    let text = |e: crate::runtime::RuntimeError| e.to_string();
    // Records have the machine's time.
    let began = Timestamp::now();
    let images = deps.runtime.list_images().await.map_err(text)?;
    let containers = deps.runtime.list_containers(None).await.map_err(text)?;
    let used: HashSet<&str> = containers
        .iter()
        .flat_map(|c| {
            let named = c.image.as_ref().map(|i| i.image.as_str());
            [Some(c.image_ref.as_str()), Some(c.image_id.as_str()), named]
        })
        .flatten()
        .collect();
    // A container's listing does not say which images are its volumes.
    let volumes: HashSet<String> =
        deps.table.pods().iter().flat_map(|view| volume_images(&view.pod)).collect();
    let now = deps.clock.now();
    let mut unused = Vec::new();
    for image in &images {
        let times = seen.entry(image.id.clone()).or_insert((now, now));
        let names = image.repo_tags.iter().chain(&image.repo_digests).chain([&image.id]);
        if image.pinned
            || names.into_iter().any(|n| used.contains(n.as_str()) || volumes.contains(n))
        {
            times.1 = now;
            continue;
        }
        unused.push(Candidate {
            id: image.id.clone(),
            size: image.size,
            first_seen: times.0,
            last_used: times.1,
        });
    }
    seen.retain(|id, _| images.iter().any(|i| i.id == *id));
    let mut left: HashSet<String> = images.iter().map(|image| image.id.clone()).collect();
    let info = deps.runtime.image_fs_info().await.map_err(text)?;
    let to_free = match &image_dir(&info) {
        _ if all => u64::MAX,
        Some(path) => over_by(path, gc.image_high_percent, gc.image_low_percent)?,
        None => 0,
    };
    for id in plan_removals(unused, to_free, now, gc.image_min_age, gc.image_max_age) {
        match deps.runtime.remove_image(&id).await {
            Ok(()) => {
                tracing::info!(image = id, "removed an unused image");
                left.remove(&id);
            }
            Err(error) => tracing::warn!(image = id, %error, "cannot remove an unused image"),
        }
    }
    deps.images.forget_all_but(left, began).await;
    Ok(())
}

/// Bytes to free on the file system of `path`, where it is fuller than `high` per cent.
fn over_by(path: &Path, high: u8, low: u8) -> Result<u64, String> {
    let stat = nix::sys::statvfs::statvfs(path)
        .map_err(|e| format!("measure file system of {}: {e}", path.display()))?;
    let capacity = stat.blocks() * stat.fragment_size();
    let available = stat.blocks_available() * stat.fragment_size();
    let used = capacity.saturating_sub(available);
    if capacity == 0 || used * 100 < capacity * u64::from(high) {
        return Ok(0);
    }
    Ok(used.saturating_sub(capacity / 100 * u64::from(low)))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::at;

    #[test]
    fn images_of_volumes_are_known_by_their_whole_names() {
        let volumes = |references: &[&str]| {
            let volumes: Vec<_> = references
                .iter()
                .map(|r| serde_json::json!({"name": "v", "image": {"reference": r}}))
                .collect();
            let pod = serde_json::json!({"spec": {"containers": [], "volumes": volumes}});
            volume_images(&serde_json::from_value(pod).unwrap())
        };
        let digest = format!("quay.io/a/b@sha256:{}", "0".repeat(64));
        assert_eq!(
            volumes(&["busybox", "a/b:1", "localhost:5000/c", &digest, "not//a name"]),
            [
                "docker.io/library/busybox:latest",
                "docker.io/a/b:1",
                "localhost:5000/c:latest",
                &digest
            ]
        );
    }

    #[test]
    fn the_least_recently_used_images_go_first() {
        let image = |id: &str, seen: i64, used: i64| Candidate {
            id: id.into(),
            size: 10,
            first_seen: at(seen),
            last_used: at(used),
        };
        let all = vec![image("new", 990, 990), image("b", 0, 500), image("a", 0, 100)];
        let minute = Duration::from_secs(60);
        let plan = |to_free, max| plan_removals(all.clone(), to_free, at(1000), minute, max);
        assert!(plan(0, None).is_empty());
        assert_eq!(plan(5, None), ["a"]);
        assert_eq!(plan(11, None), ["a", "b"]);
        // Too young to go, however full the disk is.
        assert_eq!(plan(1000, None), ["a", "b"]);
        assert_eq!(plan(0, Some(Duration::from_secs(600))), ["a"]);
    }
}
