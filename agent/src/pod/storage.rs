//! Limits on local storage: `emptyDir.sizeLimit` and the containers' `ephemeral-storage` limits.
//!
//! No file system quota keeps them, so what is used is measured now and then, as kubelet does, and a
//! pod that uses more is evicted at once. Only pods that have such a limit are measured. Static and
//! critical pods are never evicted: nobody would bring them back.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::config::resources::ephemeral_limit;
use super::deps::Deps;
use super::quantity::{Notation, amount};
use super::spec::{has_critical_priority, spec_of};
use super::status::Verdict;
use super::table::PodView;
use super::worker::Eviction;
use crate::eviction::{ContainerUsage, Disks, PodUsage, Signal};
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::node::machine::Places;
use crate::source::PodSource;

/// How often usage is measured: kubelet's monitoring interval of evictions.
const PERIOD: Duration = Duration::from_secs(10);
/// What a pod that is over its limit has to end.
const GRACE: SignedDuration = SignedDuration::from_secs(1);
const RESOURCE: &str = "ephemeral-storage";

/// Bytes on disk of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// By volume: emptyDirs that are not in memory.
    empty_dirs: BTreeMap<String, u64>,
    /// By container: its logs and its writable layer.
    containers: BTreeMap<String, u64>,
    /// By container: its writable layer alone.
    layers: BTreeMap<String, u64>,
    /// What else the kubelet keeps for the pod (its hosts file).
    other: u64,
    /// Inodes of volumes and logs.
    inodes: u64,
    /// Inodes of writable layers.
    layer_inodes: u64,
}

impl Usage {
    /// What lies on the file system of `signal`.
    pub(super) fn on(&self, signal: Signal, disks: Disks) -> PodUsage {
        let layers: u64 = self.layers.values().sum();
        let all: u64 = self.empty_dirs.values().chain(self.containers.values()).sum();
        let all = all + self.other;
        let (disk, inodes) = match (disks, signal.is_of_images()) {
            (Disks::One, _) | (Disks::ImagesAlone, false) => (all, self.inodes + self.layer_inodes),
            (Disks::ImagesApart, true) => (layers, self.layer_inodes),
            (Disks::ImagesApart, false) => (all.saturating_sub(layers), self.inodes),
            (Disks::ImagesAlone, true) => (0, 0),
        };
        let container = |disk: &u64| ContainerUsage { memory: 0, disk: *disk };
        let containers = self.containers.iter().map(|(name, disk)| (name.clone(), container(disk)));
        PodUsage { disk, inodes, containers: containers.collect(), ..PodUsage::default() }
    }
}

/// The emptyDirs of `pod` that lie on disk, with their limits in bytes.
fn empty_dirs(pod: &Pod) -> impl Iterator<Item = (&str, Option<(u64, &str)>)> {
    spec_of(pod).volumes.iter().flatten().filter_map(|volume| {
        let source = volume.empty_dir.as_ref()?;
        if source.medium.as_deref().is_some_and(|medium| !medium.is_empty()) {
            return None;
        }
        let limit = source.size_limit.as_ref();
        let limit = limit.and_then(|l| Some((super::quantity::parse_bytes(&l.0)?, l.0.as_str())));
        Some((volume.name.as_str(), limit.filter(|(bytes, _)| *bytes > 0)))
    })
}

/// A container's limit with how it is written.
fn limit_of(container: &Container) -> Option<(u64, Notation)> {
    let limits = container.resources.as_ref()?.limits.as_ref();
    let bytes = u64::try_from(amount(limits, RESOURCE)?).ok().filter(|bytes| *bytes > 0)?;
    Some((bytes, Notation::of(&limits?.get(RESOURCE)?.0)))
}

/// Whether usage of the pod matters.
fn has_limits(pod: &Pod) -> bool {
    empty_dirs(pod).any(|(_, limit)| limit.is_some()) || ephemeral_limit(pod).is_some()
}

/// Whether the pod may be evicted at all.
pub(super) fn may_be_evicted(pod: &Pod, source: Option<PodSource>) -> bool {
    source == Some(PodSource::Cluster) && !has_critical_priority(spec_of(pod))
}

/// Why the pod must go, by kubelet's name of the signal and in its words. A container is held to what
/// lies on the node's file system: its layer counts for the pod where it lies elsewhere.
fn plan_eviction(pod: &Pod, usage: &Usage, disks: Disks) -> Option<(&'static str, Verdict)> {
    let evicted =
        |signal, message: String| Some((signal, Verdict { message, ..Verdict::new("Evicted") }));
    for (name, limit) in empty_dirs(pod) {
        let Some((bytes, text)) = limit else { continue };
        if usage.empty_dirs.get(name).is_some_and(|used| *used > bytes) {
            let limit = Notation::of(text).text(bytes);
            return evicted(
                "emptydirfs.limit",
                format!("Usage of EmptyDir volume {name:?} exceeds the limit {limit:?}. "),
            );
        }
    }
    let volumes: u64 = usage.empty_dirs.values().sum();
    let containers: u64 = usage.containers.values().sum();
    if let Some((limit, notation)) = ephemeral_limit(pod)
        && i128::from(usage.other + volumes + containers) > i128::from(limit)
    {
        let limit = notation.text(limit.unsigned_abs());
        return evicted(
            "ephemeralpodfs.limit",
            format!(
                "Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "
            ),
        );
    }
    for container in &spec_of(pod).containers {
        let layer = usage.layers.get(&container.name).copied().unwrap_or_default();
        let elsewhere = if disks == Disks::One { 0 } else { layer };
        let used = usage.containers.get(&container.name).copied().unwrap_or_default();
        if let Some((limit, notation)) = limit_of(container)
            && used.saturating_sub(elsewhere) > limit
        {
            let limit = notation.text(limit);
            return evicted(
                "ephemeralcontainerfs.limit",
                format!(
                    "Container {} exceeded its local ephemeral storage limit {limit:?}. ",
                    container.name
                ),
            );
        }
    }
    None
}

/// Measures pods with limits for ever, and tells which must go.
pub(super) async fn watch(deps: Arc<Deps>, evictions: mpsc::UnboundedSender<(PodUid, Eviction)>) {
    if !deps.node.local_storage_isolation {
        return;
    }
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut places = Places::new(&deps.node.root_dir, None);
    loop {
        ticks.tick().await;
        for view in deps.table.pods() {
            if !may_be_evicted(&view.pod, view.source) || !has_limits(&view.pod) {
                continue;
            }
            places.find(&*deps.runtime).await;
            let usage = measure(&deps, &view).await;
            let plan = plan_eviction(&view.pod, &usage, places.disks());
            let Some((signal, verdict)) = plan else { continue };
            METRICS.evicted(signal);
            let eviction = Eviction { verdict, grace: GRACE, event: Some(BTreeMap::new()) };
            if evictions.send((PodUid::of(&view.pod), eviction)).is_err() {
                return;
            }
        }
    }
}

pub(super) async fn measure(deps: &Deps, view: &PodView) -> Usage {
    let uid = PodUid::of(&view.pod);
    let (dir, logs) = (deps.node.pod_dir(&uid), deps.node.pod_log_dir(&view.pod));
    let volumes: Vec<String> = empty_dirs(&view.pod).map(|(name, _)| name.to_owned()).collect();
    let names: Vec<String> = view.containers.keys().cloned().collect();
    let on_disk = tokio::task::spawn_blocking(move || {
        let mut usage = Usage::default();
        for name in volumes {
            let (bytes, inodes) = disk_usage(&crate::volume::empty_dir_path(&dir, &name));
            usage.inodes += inodes;
            usage.empty_dirs.insert(name, bytes);
        }
        for name in names {
            let (bytes, inodes) = disk_usage(&logs.join(&name));
            usage.inodes += inodes;
            usage.containers.insert(name, bytes);
        }
        usage.other = disk_usage(&dir.join("etc-hosts")).0;
        usage
    });
    let mut usage = on_disk.await.unwrap_or_default();
    let Some(sandbox) = &view.sandbox else { return usage };
    match deps.runtime.list_container_stats(Some(sandbox)).await {
        Ok(stats) => {
            for stat in stats {
                let name = stat.attributes.and_then(|a| a.metadata).map(|m| m.name);
                let layer = stat.writable_layer.unwrap_or_default();
                let inodes = layer.inodes_used.map_or(0, |n| n.value);
                let layer = layer.used_bytes.map_or(0, |b| b.value);
                usage.layer_inodes += inodes;
                let name = name.unwrap_or_default();
                *usage.containers.entry(name.clone()).or_default() += layer;
                *usage.layers.entry(name).or_default() += layer;
            }
        }
        Err(error) => tracing::debug!(%error, sandbox, "no statistics of writable layers"),
    }
    usage
}

/// Bytes and inodes that `path` and all below it take on its own file system. What goes away
/// meanwhile counts as nothing.
fn disk_usage(path: &Path) -> (u64, u64) {
    let Ok(top) = path.symlink_metadata() else { return (0, 0) };
    let (mut total, mut inodes) = (top.blocks() * 512, 1);
    let mut folders = if top.is_dir() { vec![path.to_owned()] } else { Vec::new() };
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != top.dev() {
                continue;
            }
            inodes += 1;
            // A file of several names counts by its share, as it may be linked within the volume.
            total += if meta.is_dir() {
                meta.blocks() * 512
            } else {
                meta.blocks() * 512 / meta.nlink().max(1)
            };
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    (total, inodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::testing::pod;

    #[test]
    fn what_uses_more_than_its_limit_goes() {
        let limited = pod(
            r#"{"volumes":[{"name":"disk","emptyDir":{"sizeLimit":"1Mi"}},{"name":"free","emptyDir":{}},
            {"name":"mem","emptyDir":{"medium":"Memory","sizeLimit":"1Ki"}}],
            "containers":[{"name":"a","image":"i","resources":{"limits":{"ephemeral-storage":"2Mi"}}},
            {"name":"b","image":"i","resources":{"limits":{"ephemeral-storage":"3Mi"}}}]}"#,
        );
        assert!(has_limits(&limited));
        let usage = |disk: u64, free: u64, a: u64, b: u64| Usage {
            empty_dirs: [("disk".to_owned(), disk), ("free".to_owned(), free)].into(),
            containers: [("a".to_owned(), a), ("b".to_owned(), b)].into(),
            ..Usage::default()
        };
        let on = |usage: &Usage, disks| {
            plan_eviction(&limited, usage, disks).map(|(_, v)| (v.reason, v.message))
        };
        let why = |usage| on(&usage, Disks::One);
        assert_eq!(why(usage(1 << 20, 1 << 20, 2 << 20, 0)), None);
        let evicted = |text: &str| Some(("Evicted".to_owned(), text.to_owned()));
        assert_eq!(
            why(usage((1 << 20) + 1, 0, 0, 0)),
            evicted("Usage of EmptyDir volume \"disk\" exceeds the limit \"1Mi\". ")
        );
        assert_eq!(
            why(usage(0, 6 << 20, 0, 0)),
            evicted(
                "Pod ephemeral local storage usage exceeds the total limit of containers 5Mi. "
            )
        );
        assert_eq!(
            why(usage(0, 0, (2 << 20) + 1, 0)),
            evicted("Container a exceeded its local ephemeral storage limit \"2Mi\". ")
        );
        let layer =
            Usage { layers: [("a".to_owned(), 1 << 20)].into(), ..usage(0, 0, (2 << 20) + 1, 0) };
        assert_eq!(on(&layer, Disks::ImagesApart), None, "the layer lies elsewhere");
        assert!(on(&layer, Disks::One).is_some());
        let plain = pod(
            r#"{"volumes":[{"name":"v","emptyDir":{}}],"containers":[{"name":"a","image":"i"}]}"#,
        );
        assert!(!has_limits(&plain));
        assert_eq!(plan_eviction(&plain, &usage(u64::MAX / 4, 0, 0, 0), Disks::One), None);
    }

    #[test]
    fn what_counts_is_what_lies_on_the_file_system_that_is_short() {
        let usage = Usage {
            empty_dirs: [("v".to_owned(), 100)].into(),
            containers: [("a".to_owned(), 30)].into(),
            layers: [("a".to_owned(), 20)].into(),
            other: 1,
            inodes: 5,
            layer_inodes: 7,
        };
        for (signal, disks, expected) in [
            (Signal::NodeFs, Disks::One, (131, 12)),
            (Signal::ImageFs, Disks::One, (131, 12)),
            (Signal::NodeFsInodes, Disks::ImagesApart, (111, 5)),
            (Signal::ImageFs, Disks::ImagesApart, (20, 7)),
            (Signal::NodeFs, Disks::ImagesAlone, (131, 12)),
            (Signal::ImageFs, Disks::ImagesAlone, (0, 0)),
        ] {
            let on = usage.on(signal, disks);
            assert_eq!((on.disk, on.inodes), expected, "{signal:?} {disks:?}");
            assert_eq!(on.containers["a"].disk, 30);
        }
    }

    #[test]
    fn static_and_critical_pods_stay() {
        let ordinary = pod(r#"{"priority":1000,"containers":[]}"#);
        assert!(may_be_evicted(&ordinary, Some(PodSource::Cluster)));
        assert!(!may_be_evicted(&ordinary, Some(PodSource::File)));
        let critical = pod(r#"{"priority":2000001000,"containers":[]}"#);
        assert!(!may_be_evicted(&critical, Some(PodSource::Cluster)));
    }

    #[test]
    fn usage_is_what_lies_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let (empty, one) = disk_usage(dir.path());
        std::fs::write(dir.path().join("sub/file"), vec![1; 300_000]).unwrap();
        std::fs::hard_link(dir.path().join("sub/file"), dir.path().join("again")).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("root")).unwrap();
        let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let (used, inodes) = disk_usage(dir.path());
        let (used, inodes) = (used - empty, inodes - one);
        assert_eq!(inodes, 4, "each name but that of what was there");
        assert!((300_000..400_000).contains(&used), "{used}");
        assert_eq!(disk_usage(&dir.path().join("nothing")), (0, 0));
    }
}
