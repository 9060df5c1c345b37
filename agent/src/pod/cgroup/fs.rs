//! Pod cgroups in the kernel's file system, by cgroups-rs: v2, v1, and both at once.
//!
//! With the systemd driver the folders are slices, which systemd makes with their limits; the exact
//! values are written over what it rounded.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cgroups_rs::fs::hierarchies::{V1, V2, is_cgroup2_unified_mode};
use cgroups_rs::fs::{Cgroup, Controllers, Hierarchy, MaxValue, Resources};

use super::reserve::{QosReserve, Requests};
use super::slices::Slices;
use super::{
    CgroupError, Group, GroupLimits, PodCgroups, cpu_weight, folder, parent_name, pod_path,
    pods_folder, slice_folders,
};
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::node_context::{CgroupDriver, NodeContext};
use crate::pod::config::resources::PodLimits;

/// Controllers whose folders a pod has.
const CONTROLLERS: [Controllers; 13] = [
    Controllers::Mem,
    Controllers::Cpu,
    Controllers::CpuAcct,
    Controllers::CpuSet,
    Controllers::Pids,
    Controllers::BlkIo,
    Controllers::Devices,
    Controllers::Freezer,
    Controllers::NetCls,
    Controllers::NetPrio,
    Controllers::PerfEvent,
    Controllers::HugeTlb,
    Controllers::Systemd,
];

/// The node's cgroups.
#[derive(Clone)]
pub struct KernelCgroups(pub(super) Arc<Inner>);

pub(super) struct Inner {
    driver: CgroupDriver,
    root: String,
    period_us: u64,
    pids: Option<i64>,
    /// `None` is cgroup v2. Read once: the mount table of a busy node is long.
    v1: Option<V1>,
    /// Roots of all hierarchies that pods have folders in.
    mounts: Vec<PathBuf>,
    /// CPU shares by burstable pod: their class gets the sum.
    burstable: Mutex<HashMap<PodUid, i64>>,
    /// Memory that pods are spared, by pod: never reclaimed, reclaimed last.
    spared: Mutex<HashMap<PodUid, Spared>>,
    /// With the systemd driver.
    pub(super) slices: Option<Slices>,
    /// What is kept from lower classes, and of what.
    pub(super) reserve: Option<QosReserve>,
    pub(super) requests: Mutex<Requests>,
}

/// Memory that a pod, or all below a cgroup, is spared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spared {
    /// `memory.min`, bytes.
    pub(super) min: i64,
    /// `memory.low`, bytes.
    pub(super) low: i64,
}

impl KernelCgroups {
    /// Looks at how this node's cgroups are mounted.
    pub fn new(node: &NodeContext) -> Self {
        let v1 = (!is_cgroup2_unified_mode()).then(V1::new);
        let mounts = mounts(v1.as_ref());
        let pids = node.pod_pids_limit.filter(|n| *n > 0);
        let period_us = node.cpu_cfs_period_us;
        let slices = (node.cgroup_driver == CgroupDriver::Systemd)
            .then(|| Slices::new(&node.cgroup_root, period_us, pids));
        Self(Arc::new(Inner {
            driver: node.cgroup_driver,
            root: node.cgroup_root.clone(),
            period_us,
            pids,
            v1,
            mounts,
            burstable: Mutex::default(),
            spared: Mutex::default(),
            slices,
            reserve: node.qos_reserve,
            requests: Mutex::default(),
        }))
    }
}

/// Where all hierarchies of this machine are mounted.
pub fn hierarchies() -> Vec<PathBuf> {
    mounts((!is_cgroup2_unified_mode()).then(V1::new).as_ref())
}

fn mounts(v1: Option<&V1>) -> Vec<PathBuf> {
    let Some(v1) = v1 else { return vec![V2::new().root()] };
    let found = CONTROLLERS.into_iter().filter_map(|c| v1.get_mount_point(c));
    // Runtimes make folders in hierarchies without a controller, too.
    let unique: BTreeSet<PathBuf> = found.map(|(point, _)| point).chain(all_mounts()).collect();
    unique.into_iter().collect()
}

impl Inner {
    pub(super) fn hierarchy(&self) -> Box<dyn Hierarchy> {
        match &self.v1 {
            Some(v1) => Box::new(v1.clone()),
            None => Box::new(V2::new()),
        }
    }

    /// The folder of `path`, relative to a hierarchy's mount point.
    pub(super) fn folder(&self, path: &[String]) -> String {
        folder(self.driver, &self.root, path)
    }

    fn ensure(&self, uid: &PodUid, qos: &str, limits: PodLimits) -> Result<String, CgroupError> {
        let path = pod_path(qos, uid);
        let folder = self.folder(&path);
        let error = |operation, cause: &dyn std::fmt::Display| CgroupError {
            operation,
            path: folder.clone(),
            cause: cause.to_string(),
        };
        let cgroup =
            Cgroup::new(self.hierarchy(), &folder).map_err(|e| error("create", &Chain(&e)))?;
        cgroup.apply(&self.resources(limits)).map_err(|e| error("set limits of", &Chain(&e)))?;
        self.spare(&folder, limits.memory_min, limits.memory_low)?;
        if let Some(shares) = self.class_shares(qos) {
            self.set_shares(&path[..path.len() - 1], shares)?;
        }
        Ok(parent_name(self.driver, &self.root, &path))
    }

    /// CPU shares of a QoS class of its own; `None` for Guaranteed, whose pods stand beside the classes.
    fn class_shares(&self, qos: &str) -> Option<i64> {
        match qos {
            "BestEffort" => Some(2),
            "Burstable" => {
                let all = self.burstable.lock().unwrap_or_else(PoisonError::into_inner);
                Some(all.values().sum())
            }
            _ => None,
        }
    }

    /// Counts a pod's shares into its class, or takes them out.
    fn count(&self, uid: &PodUid, shares: Option<i64>) -> bool {
        let mut all = self.burstable.lock().unwrap_or_else(PoisonError::into_inner);
        match shares {
            Some(shares) => all.insert(uid.clone(), shares) != Some(shares),
            None => all.remove(uid).is_some(),
        }
    }

    /// Writes what the memory below a folder is spared; v1 has no such files.
    fn spare(&self, folder: &str, min: Option<i64>, low: Option<i64>) -> Result<(), CgroupError> {
        if self.v1.is_some() {
            return Ok(());
        }
        for (file, bytes) in [("memory.min", min), ("memory.low", low)] {
            let Some(bytes) = bytes else { continue };
            let path = V2::new().root().join(folder).join(file);
            std::fs::write(&path, bytes.to_string()).map_err(|error| CgroupError {
                operation: "spare memory of",
                path: path.display().to_string(),
                cause: error.to_string(),
            })?;
        }
        Ok(())
    }

    /// Counts what a pod is spared, or takes it out. What all pods and the burstable ones are spared
    /// together, where that changed: a cgroup's memory is spared no more than its parent's.
    fn count_spared(&self, uid: &PodUid, limits: Option<PodLimits>) -> Option<(Spared, Spared)> {
        let mut all = self.spared.lock().unwrap_or_else(PoisonError::into_inner);
        let spared = limits.map(|limits| Spared {
            min: limits.memory_min.unwrap_or(0),
            low: limits.memory_low.unwrap_or(0),
        });
        match spared.filter(|spared| *spared != Spared::default()) {
            Some(spared) if all.insert(uid.clone(), spared) == Some(spared) => return None,
            Some(_) => {}
            None => {
                all.remove(uid)?;
            }
        }
        let min: i64 = all.values().map(|spared| spared.min).sum();
        let low: i64 = all.values().map(|spared| spared.low).sum();
        Some((Spared { min: min.saturating_add(low), low: 0 }, Spared { min: 0, low }))
    }

    /// The QoS classes that a pod has a cgroup in: one, or more if its class ever changed.
    fn classes_of(&self, uid: &PodUid) -> Vec<&'static str> {
        let there = |qos: &&str| {
            let folder = self.folder(&pod_path(qos, uid));
            self.mounts.iter().any(|mount| mount.join(&folder).exists())
        };
        ["Guaranteed", "Burstable", "BestEffort"].into_iter().filter(there).collect()
    }

    fn set_shares(&self, path: &[String], shares: i64) -> Result<(), CgroupError> {
        let folder = self.folder(path);
        let cgroup = Cgroup::load(self.hierarchy(), &folder);
        let mut resources = Resources::default();
        resources.cpu.shares = Some(self.shares(shares));
        cgroup.apply(&resources).map_err(|e| CgroupError {
            operation: "set CPU shares of",
            path: folder,
            cause: Chain(&e).to_string(),
        })
    }

    fn shares(&self, shares: i64) -> u64 {
        let shares = shares.clamp(2, 262_144);
        let value = if self.v1.is_some() { shares } else { cpu_weight(shares) };
        u64::try_from(value).unwrap_or(2)
    }

    fn resources(&self, limits: PodLimits) -> Resources {
        let mut resources = Resources::default();
        resources.cpu.shares = Some(self.shares(limits.cpu_shares));
        if let Some(quota) = limits.cpu_quota {
            resources.cpu.period = Some(self.period_us);
            resources.cpu.quota = Some(quota);
        }
        resources.memory.memory_hard_limit = limits.memory;
        resources.pid.maximum_number_of_processes = self.pids.map(MaxValue::Value);
        resources
    }

    /// The folder of a group: as it is named where that is there, else as a slice.
    fn folder_of(&self, group: &Group) -> String {
        match group {
            Group::Pods => pods_folder(self.driver, &self.root),
            Group::Reserved { cgroup, .. } => {
                let named = cgroup.trim_matches('/');
                let there = self.mounts.iter().any(|mount| mount.join(named).is_dir());
                if there || self.driver == CgroupDriver::Cgroupfs {
                    return named.to_owned();
                }
                let name = named.rsplit('/').next().unwrap_or(named);
                slice_folders(&format!("{}.slice", name.trim_end_matches(".slice"))).join("/")
            }
        }
    }

    fn bound(&self, group: &Group, limits: GroupLimits) -> Result<(), CgroupError> {
        let folder = self.folder_of(group);
        let error =
            |operation, cause: String| CgroupError { operation, path: folder.clone(), cause };
        let cgroup = match group {
            Group::Pods => Cgroup::new(self.hierarchy(), &folder)
                .map_err(|e| error("create", Chain(&e).to_string()))?,
            Group::Reserved { .. } => {
                for (controller, used) in [
                    (Controllers::Cpu, limits.cpu_shares.is_some()),
                    (Controllers::Mem, limits.memory.is_some()),
                    (Controllers::Pids, limits.pids.is_some()),
                ] {
                    let mount = match &self.v1 {
                        Some(v1) => v1.get_mount_point(controller).map(|(point, _)| point),
                        None => Some(V2::new().root()),
                    };
                    let dir = mount.unwrap_or_default().join(&folder);
                    if used && !dir.is_dir() {
                        let cause = format!("there is no {}; make it first", dir.display());
                        return Err(error("find", cause));
                    }
                }
                Cgroup::load(self.hierarchy(), &folder)
            }
        };
        let mut resources = Resources::default();
        resources.cpu.shares = limits.cpu_shares.map(|shares| self.shares(shares));
        resources.memory.memory_hard_limit = limits.memory;
        resources.pid.maximum_number_of_processes = limits.pids.map(MaxValue::Value);
        cgroup.apply(&resources).map_err(|e| error("set limits of", Chain(&e).to_string()))
    }

    /// What is busy still is an error of its own, for which trying again helps.
    fn remove(&self, uid: &PodUid) -> Result<Result<(), CgroupError>, CgroupError> {
        let mut failure: Option<(bool, CgroupError)> = None;
        for qos in ["Guaranteed", "Burstable", "BestEffort"] {
            let folder = self.folder(&pod_path(qos, uid));
            for mount in &self.mounts {
                if let Err(cause) = remove_tree(&mount.join(&folder)) {
                    // The others go all the same.
                    let busy = cause.kind() == io::ErrorKind::ResourceBusy;
                    let error = CgroupError {
                        operation: "remove",
                        path: mount.join(&folder).display().to_string(),
                        cause: cause.to_string(),
                    };
                    if failure.as_ref().is_none_or(|(was_busy, _)| *was_busy) {
                        failure = Some((busy, error));
                    }
                }
            }
        }
        if self.count(uid, None)
            && let Some(shares) = self.class_shares("Burstable")
        {
            self.set_shares(&["kubepods".to_owned(), "burstable".to_owned()], shares)?;
        }
        match failure {
            Some((true, error)) => Ok(Err(error)),
            Some((false, error)) => Err(error),
            None => Ok(Ok(())),
        }
    }

    fn list(&self) -> Vec<PodUid> {
        let mut found = BTreeSet::new();
        let marker = match self.driver {
            CgroupDriver::Cgroupfs => "pod",
            CgroupDriver::Systemd => "-pod",
        };
        for class in [&["kubepods"][..], &["kubepods", "burstable"], &["kubepods", "besteffort"]] {
            let class: Vec<String> = class.iter().map(|s| (*s).to_owned()).collect();
            let folder = self.folder(&class);
            for mount in &self.mounts {
                let Ok(entries) = std::fs::read_dir(mount.join(&folder)) else { continue };
                for name in entries.flatten().filter_map(|e| e.file_name().into_string().ok()) {
                    let uid = match self.driver {
                        CgroupDriver::Cgroupfs => name.strip_prefix(marker).map(str::to_owned),
                        CgroupDriver::Systemd => name
                            .rsplit_once(marker)
                            .and_then(|(_, uid)| uid.strip_suffix(".slice"))
                            .map(|uid| uid.replace('_', "-")),
                    };
                    found.extend(uid.map(|uid| PodUid::from(uid.as_str())));
                }
            }
        }
        found.into_iter().collect()
    }
}

/// Mount points of all hierarchies, v2 beside v1 and named ones (`name=systemd`) included.
fn all_mounts() -> Vec<PathBuf> {
    let mounts = procfs::process::Process::myself().and_then(|me| me.mountinfo());
    let all = mounts.into_iter().flat_map(|m| m.0);
    all.filter(|m| m.fs_type == "cgroup2" || m.fs_type == "cgroup").map(|m| m.mount_point).collect()
}

/// An error with its causes.
pub(super) struct Chain<'a>(pub(super) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// How long the last processes of a pod may take to be gone, as a large one does that was killed.
const LEAVING: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Removes a cgroup and those below it, the innermost first.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl KernelCgroups {
    /// Spares what all pods, and the burstable ones, are spared together.
    async fn spare_classes(&self, (pods, burstable): (Spared, Spared)) -> Result<(), CgroupError> {
        if let Some(slices) = &self.0.slices {
            slices.spare_classes(pods, burstable).await?;
        }
        blocking(&self.0, move |inner| {
            let folder = inner.folder(&["kubepods".to_owned()]);
            inner.spare(&folder, Some(pods.min), None)?;
            let folder = inner.folder(&["kubepods".to_owned(), "burstable".to_owned()]);
            if V2::new().root().join(&folder).is_dir() {
                inner.spare(&folder, None, Some(burstable.low))?;
            }
            Ok(())
        })
        .await
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    inner: &Arc<Inner>,
    work: impl FnOnce(&Inner) -> Result<T, CgroupError> + Send + 'static,
) -> Result<T, CgroupError> {
    let inner = inner.clone();
    tokio::task::spawn_blocking(move || work(&inner)).await.unwrap_or_else(|error| {
        Err(CgroupError { operation: "work on", path: String::new(), cause: error.to_string() })
    })
}

#[async_trait]
impl PodCgroups for KernelCgroups {
    async fn ensure(
        &self,
        uid: &PodUid,
        qos: &str,
        limits: PodLimits,
    ) -> Result<String, CgroupError> {
        let began = Instant::now();
        if qos == "Burstable" {
            self.0.count(uid, Some(limits.cpu_shares));
        }
        if let Some(slices) = &self.0.slices {
            slices.ensure(uid, qos, self.0.class_shares(qos), limits).await?;
        }
        let (of, class) = (uid.clone(), qos.to_owned());
        let made = blocking(&self.0, move |inner| inner.ensure(&of, &class, limits)).await;
        if made.is_ok()
            && let Some(sums) = self.0.count_spared(uid, Some(limits))
        {
            self.spare_classes(sums).await?;
        }
        self.count_request(uid, Some((qos, limits)));
        self.bound_classes().await;
        METRICS.cgroup_operation("create", began.elapsed());
        made
    }

    fn known(&self, uid: &PodUid, qos: &str, limits: PodLimits) {
        if qos == "Burstable" {
            self.0.count(uid, Some(limits.cpu_shares));
        }
        self.0.count_spared(uid, Some(limits));
        self.count_request(uid, Some((qos, limits)));
    }

    async fn remove(&self, uid: &PodUid) -> Result<(), CgroupError> {
        let began = Instant::now();
        let mut stopped = Ok(());
        if let Some(slices) = &self.0.slices {
            for qos in self.0.classes_of(uid) {
                let counted = qos == "Burstable" && self.0.count(uid, None);
                let shares = counted.then(|| self.0.class_shares(qos)).flatten();
                stopped = stopped.and(slices.remove(uid, qos, shares).await);
            }
        }
        let removed = loop {
            let uid = uid.clone();
            match blocking(&self.0, move |inner| inner.remove(&uid)).await {
                Ok(Err(_)) if began.elapsed() < LEAVING => tokio::time::sleep(LOOK_AGAIN).await,
                done => break done.flatten(),
            }
        };
        if let Some(sums) = self.0.count_spared(uid, None)
            && let Err(error) = self.spare_classes(sums).await
        {
            tracing::warn!(%error, "what all pods are spared is more than they request");
        }
        self.count_request(uid, None);
        self.bound_classes().await;
        METRICS.cgroup_operation("destroy", began.elapsed());
        removed.and(stopped)
    }

    async fn bound(&self, group: &Group, limits: GroupLimits) -> Result<(), CgroupError> {
        if let Some(slices) = &self.0.slices {
            let folder = self.0.folder_of(group);
            let unit = folder.rsplit('/').next().unwrap_or_default();
            slices.bound(group, unit, limits).await?;
        }
        let group = group.clone();
        blocking(&self.0, move |inner| inner.bound(&group, limits)).await
    }

    async fn list(&self) -> Result<Vec<PodUid>, CgroupError> {
        blocking(&self.0, |inner| Ok(inner.list())).await
    }

    async fn keep_requested(&self) {
        self.bound_classes().await;
    }

    fn unified(&self) -> bool {
        self.0.v1.is_none()
    }
}

#[cfg(test)]
impl KernelCgroups {
    /// Removes a root of a test's own.
    pub(super) fn remove_root(&self) {
        for mount in &self.0.mounts {
            remove_tree(&mount.join(self.0.root.trim_start_matches('/'))).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_spared_what_their_pods_are() {
        let cgroups = KernelCgroups::new(&NodeContext::new("n", vec![]));
        let count = |uid: &str, min, low| {
            let limits = PodLimits { memory_min: min, memory_low: low, ..PodLimits::default() };
            cgroups.0.count_spared(&PodUid::from(uid), Some(limits))
        };
        let sums = |all, low| Some((Spared { min: all, low: 0 }, Spared { min: 0, low }));
        assert_eq!(count("best-effort", None, None), None);
        assert_eq!(count("a", Some(5), None), sums(5, 0));
        assert_eq!(count("a", Some(5), None), None);
        assert_eq!(count("b", None, Some(3)), sums(8, 3));
        assert_eq!(count("b", None, Some(4)), sums(9, 4));
        assert_eq!(cgroups.0.count_spared(&PodUid::from("a"), None), sums(4, 4));
        assert_eq!(cgroups.0.count_spared(&PodUid::from("a"), None), None);
        assert_eq!(count("b", None, None), sums(0, 0));
        // Those of an earlier agent are among them.
        let limits = PodLimits { cpu_shares: 500, memory_low: Some(7), ..PodLimits::default() };
        cgroups.known(&PodUid::from("c"), "Burstable", limits);
        assert_eq!(cgroups.0.class_shares("Burstable"), Some(500));
        assert_eq!(count("d", Some(1), None), sums(8, 7));
    }

    /// Makes real cgroups, in a subtree of its own.
    #[tokio::test]
    async fn pods_have_cgroups_with_their_limits_until_they_go() {
        let root = format!("/longshore-test-{}", std::process::id());
        let node = NodeContext {
            cgroup_root: root.clone(),
            pod_pids_limit: Some(100),
            ..NodeContext::new("n", vec![])
        };
        let cgroups = KernelCgroups::new(&node);
        let uid = PodUid::from("1-2");
        let limits = PodLimits {
            cpu_shares: 512,
            cpu_quota: Some(50_000),
            memory: Some(64 << 20),
            memory_low: Some(32 << 20),
            ..PodLimits::default()
        };
        for _ in 0..2 {
            let parent = cgroups.ensure(&uid, "Burstable", limits).await.unwrap();
            assert_eq!(parent, format!("{root}/kubepods/burstable/pod1-2"));
        }
        assert_eq!(cgroups.list().await.unwrap(), std::slice::from_ref(&uid));
        let read = |controller: Controllers, file: &str| {
            let base = match &cgroups.0.v1 {
                Some(v1) => v1.get_mount_point(controller).unwrap().0,
                None => V2::new().root(),
            };
            let path = base.join(root.trim_start_matches('/')).join("kubepods/burstable/pod1-2");
            std::fs::read_to_string(path.join(file)).unwrap().trim().to_owned()
        };
        if cgroups.unified() {
            assert_eq!(read(Controllers::Cpu, "cpu.max"), "50000 100000");
            assert_eq!(read(Controllers::Mem, "memory.low"), (32 << 20).to_string());
        } else {
            assert_eq!(read(Controllers::Cpu, "cpu.shares"), "512");
            assert_eq!(read(Controllers::Cpu, "cpu.cfs_quota_us"), "50000");
            assert_eq!(read(Controllers::Mem, "memory.limit_in_bytes"), (64 << 20).to_string());
            assert_eq!(read(Controllers::Pids, "pids.max"), "100");
        }
        // All pods together, and a cgroup that was there before.
        let read_in = |controller: Controllers, folder: &str, file: &str| {
            let base = match &cgroups.0.v1 {
                Some(v1) => v1.get_mount_point(controller).unwrap().0,
                None => V2::new().root(),
            };
            let path = base.join(root.trim_start_matches('/')).join(folder).join(file);
            std::fs::read_to_string(path).unwrap().trim().to_owned()
        };
        let limits = GroupLimits { cpu_shares: Some(2048), memory: Some(1 << 30), pids: Some(500) };
        cgroups.bound(&Group::Pods, limits).await.unwrap();
        let own =
            |name: &str| Group::Reserved { whose: "system", cgroup: format!("{root}/{name}") };
        let missing = cgroups.bound(&own("missing"), limits).await.unwrap_err().to_string();
        assert!(missing.contains("missing; make it first"), "{missing}");
        Cgroup::new(cgroups.0.hierarchy(), format!("{}/own", root.trim_start_matches('/')))
            .unwrap();
        let limits = GroupLimits { memory: Some(2 << 30), ..GroupLimits::default() };
        cgroups.bound(&own("own"), limits).await.unwrap();
        if cgroups.unified() {
            assert_eq!(read_in(Controllers::Mem, "kubepods", "memory.max"), (1 << 30).to_string());
            assert_eq!(read_in(Controllers::Pids, "kubepods", "pids.max"), "500");
            assert_eq!(read_in(Controllers::Mem, "own", "memory.max"), (2u64 << 30).to_string());
        } else {
            let file = "memory.limit_in_bytes";
            assert_eq!(read_in(Controllers::Mem, "kubepods", file), (1 << 30).to_string());
            assert_eq!(read_in(Controllers::Cpu, "kubepods", "cpu.shares"), "2048");
            assert_eq!(read_in(Controllers::Pids, "kubepods", "pids.max"), "500");
            assert_eq!(read_in(Controllers::Mem, "own", file), (2u64 << 30).to_string());
            assert_eq!(read_in(Controllers::Cpu, "own", "cpu.shares"), "1024");
        }
        // Whoever is just leaving is waited for.
        let mut last = std::process::Command::new("sleep").arg("0.2").spawn().unwrap();
        let pod = cgroups.0.folder(&pod_path("Burstable", &uid));
        let procs = cgroups.0.mounts[0].join(&pod).join("cgroup.procs");
        std::fs::write(procs, last.id().to_string()).unwrap();
        let reaped = std::thread::spawn(move || last.wait());
        cgroups.remove(&uid).await.unwrap();
        reaped.join().unwrap().unwrap();
        cgroups.remove(&uid).await.unwrap();
        assert_eq!(cgroups.list().await.unwrap(), []);
        cgroups.remove_root();
    }
}
