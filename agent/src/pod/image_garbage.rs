//! Images that no container uses: they go by age, and least recently used first where their file system
//! is full.
//!
//! The runtime does not say when an image was used, so what is known is since this agent began.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::deps::Deps;
use super::image_name::parse_image;
use super::spec::spec_of;
use crate::metrics::METRICS;
use crate::node::machine::{FileSystem, file_system};
use crate::node_context::GcLimits;
use crate::report::{EventType, node_reference};
use crate::runtime::{RuntimeError, image_dir};

/// How often the image file system is measured.
const PERIOD: Duration = Duration::from_secs(300);

/// When an image was first seen here, and when it was last seen in use.
type Times = (Timestamp, Option<Timestamp>);

/// An image that nobody uses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unused {
    id: String,
    size: u64,
    first_seen: Timestamp,
    last_used: Option<Timestamp>,
}

fn is_older(since: Timestamp, age: Duration, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(since)).unwrap_or_default() >= age
}

/// Takes out those that nobody has used for longer than `age`.
fn plan_stale(unused: &mut Vec<Unused>, age: Option<Duration>, now: Timestamp) -> Vec<Unused> {
    let Some(age) = age else { return Vec::new() };
    let stale = |image: &Unused| is_older(image.last_used.unwrap_or(image.first_seen), age, now);
    let (stale, rest) = std::mem::take(unused).into_iter().partition(stale);
    *unused = rest;
    stale
}

/// In the order in which they go for room: never used, least recently used. What has just come is about
/// to be used.
fn plan_order(mut unused: Vec<Unused>, min_age: Duration, now: Timestamp) -> Vec<Unused> {
    unused.retain(|image| is_older(image.first_seen, min_age, now));
    unused.sort_by_key(|image| (image.last_used, image.first_seen));
    unused
}

/// Per cent in use, and the bytes to free where that is too much.
fn plan_room(fs: FileSystem, limits: &GcLimits) -> (u64, u64) {
    let available = fs.available.min(fs.capacity);
    let used = 100 - available * 100 / fs.capacity.max(1);
    if used < limits.image_high_percent.into() {
        return (used, 0);
    }
    let wanted = fs.capacity * (100 - u64::from(limits.image_low_percent)) / 100;
    (used, wanted.saturating_sub(available))
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

struct Collector {
    deps: Arc<Deps>,
    seen: HashMap<String, Times>,
    /// The images of the last look that are there still.
    left: HashSet<String>,
}

/// Removes images when it is time, and all that are unused when asked.
pub(super) async fn watch(deps: Arc<Deps>, mut reclaims: mpsc::Receiver<oneshot::Sender<()>>) {
    let mut collector = Collector { deps, seen: HashMap::new(), left: HashSet::new() };
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = false;
    loop {
        let asked = tokio::select! {
            _ = ticks.tick() => None,
            Some(done) = reclaims.recv() => Some(done),
        };
        let collected = collector.collect(asked.is_some()).await;
        if let Err(error) = &collected {
            tracing::warn!(error, "image garbage collection");
        }
        if let Some(done) = asked {
            // Who asked may wait no more.
            let _ = done.send(());
            continue;
        }
        // Once may be the runtime's start.
        if let Err(error) = &collected
            && failed
        {
            collector.warn("ImageGCFailed", error.clone());
        }
        failed = collected.is_err();
    }
}

impl Collector {
    fn warn(&self, reason: &str, message: String) {
        let node = node_reference(&self.deps.node.node_name);
        self.deps.events.record(node, EventType::Warning, reason, message);
    }

    async fn collect(&mut self, all: bool) -> Result<(), String> {
        // Records have the machine's time.
        let began = Timestamp::now();
        let mut unused = self.look().await.map_err(|error| error.to_string())?;
        let gc = self.deps.node.gc.clone();
        if gc.image_high_percent == 100 && gc.image_max_age.is_none() && !all {
            return Ok(());
        }
        let now = self.deps.clock.now();
        let stale = plan_stale(&mut unused, gc.image_max_age, now);
        let mut failed = self.remove(stale, None, "age").await.1;
        let wanted = if all { Ok((0, u64::MAX)) } else { self.room_wanted(&gc).await };
        let (used, to_free) = match wanted {
            Ok(wanted) => wanted,
            Err(error) => {
                failed.push(error);
                (0, 0)
            }
        };
        if to_free > 0 {
            let order = plan_order(unused, gc.image_min_age, now);
            let (freed, errors) = self.remove(order, Some(to_free), "space").await;
            if errors.is_empty() && freed < to_free && !all {
                let message = format!(
                    "The file system of the images is {used}% full, and removing unused images freed \
                     {freed} bytes of {to_free}; see what else fills it: images in use, logs, volumes"
                );
                self.warn("FreeDiskSpaceFailed", message.clone());
                failed.push(message);
            }
            failed.extend(errors);
        }
        self.deps.images.forget_all_but(self.left.clone(), began).await;
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    /// Notes which images are used; gives those that are not and may go.
    async fn look(&mut self) -> Result<Vec<Unused>, RuntimeError> {
        let runtime = &self.deps.runtime;
        let images = runtime.list_images().await?;
        let containers = runtime.list_containers(None).await?;
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
            self.deps.table.pods().iter().flat_map(|view| volume_images(&view.pod)).collect();
        let now = self.deps.clock.now();
        let mut unused = Vec::new();
        for image in &images {
            let times = self.seen.entry(image.id.clone()).or_insert((now, None));
            let mut names = image.repo_tags.iter().chain(&image.repo_digests).chain([&image.id]);
            if names.any(|name| used.contains(name.as_str()) || volumes.contains(name)) {
                times.1 = Some(now);
            } else if !image.pinned {
                let ((first_seen, last_used), size) = (*times, image.size);
                unused.push(Unused { id: image.id.clone(), size, first_seen, last_used });
            }
        }
        self.left = images.into_iter().map(|image| image.id).collect();
        self.seen.retain(|id, _| self.left.contains(id));
        Ok(unused)
    }

    /// Per cent of the images' file system in use, and bytes to free.
    async fn room_wanted(&self, limits: &GcLimits) -> Result<(u64, u64), String> {
        let info = self.deps.runtime.image_fs_info().await.map_err(|e| e.to_string())?;
        // A runtime that does not say where its images lie is its own collector.
        let Some(dir) = image_dir(&info) else { return Ok((0, 0)) };
        match file_system(Path::new(&dir)) {
            Some(fs) if fs.capacity > 0 => Ok(plan_room(fs, limits)),
            _ => {
                let error =
                    format!("the file system of the images ({}) has no size", dir.display());
                self.warn("InvalidDiskCapacity", error.clone());
                Err(error)
            }
        }
    }

    /// Removes `images`, no more than make `enough` room; gives the bytes freed and what failed.
    async fn remove(
        &mut self,
        images: Vec<Unused>,
        enough: Option<u64>,
        reason: &'static str,
    ) -> (u64, Vec<String>) {
        let (mut freed, mut failed) = (0, Vec::new());
        for image in images {
            if enough.is_some_and(|enough| freed >= enough) {
                break;
            }
            match self.deps.runtime.remove_image(&image.id).await {
                Ok(()) => {
                    tracing::info!(image = image.id, reason, "removed an unused image");
                    METRICS.images.image_collected(reason);
                    self.left.remove(&image.id);
                    self.seen.remove(&image.id);
                    freed += image.size;
                }
                Err(error) => failed.push(format!("remove image {}: {error}", image.id)),
            }
        }
        (freed, failed)
    }
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

    fn image(id: &str, seen: i64, used: Option<i64>) -> Unused {
        Unused { id: id.into(), size: 10, first_seen: at(seen), last_used: used.map(at) }
    }

    fn ids(images: &[Unused]) -> Vec<&str> {
        images.iter().map(|image| &*image.id).collect()
    }

    #[test]
    fn what_was_never_used_goes_first_then_the_least_recently_used() {
        let all = vec![
            image("new", 990, None),
            image("b", 0, Some(500)),
            image("a", 0, Some(100)),
            image("never", 600, None),
        ];
        let order = plan_order(all.clone(), Duration::from_secs(60), at(1000));
        assert_eq!(ids(&order), ["never", "a", "b"], "what is too young stays");
        let mut left = all.clone();
        assert_eq!(plan_stale(&mut left, None, at(1000)), []);
        let stale = plan_stale(&mut left, Some(Duration::from_secs(600)), at(1200));
        assert_eq!(ids(&stale), ["b", "a", "never"]);
        assert_eq!(ids(&left), ["new"]);
    }

    #[test]
    fn room_is_made_down_to_the_lower_mark() {
        let limits = GcLimits::default();
        for (available, expected) in [
            (1000, (0, 0)),
            (160, (84, 0)),
            // Anything above a whole per cent counts as the next.
            (159, (85, 41)),
            (150, (85, 50)),
            (0, (100, 200)),
            (2000, (0, 0)),
        ] {
            let fs = FileSystem { capacity: 1000, available, ..FileSystem::default() };
            assert_eq!(plan_room(fs, &limits), expected, "{available}");
        }
    }
}
