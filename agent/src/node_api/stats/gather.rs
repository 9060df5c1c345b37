//! What the node, its pods and their containers use now: from their cgroups, and from the runtime
//! what cgroups do not say (networks, writable layers).

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use cri_shim::api;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};

use crate::ids::{NamespacedName, PodUid};
use crate::node::machine::{FileSystem, Machine, file_system};
use crate::node_context::NodeContext;
use crate::pod::cgroup::usage::{Mounts, Usage};
use crate::pod::cgroup::{folder, pod_path, pods_folder};
use crate::pod::qos::qos_class;
use crate::pod::table::PodTable;
use crate::runtime::Runtime;
use crate::volume::{NodeVolumes, VolumeUsage};

/// A usage with its time, and the rate since the one before.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) at: Timestamp,
    pub(super) usage: Usage,
    /// Nanoseconds of CPU a second; `None` until there are two samples.
    pub(super) nano_cores: Option<u64>,
}

/// A container.
#[derive(Clone, Debug, Default)]
pub(super) struct ContainerStats {
    pub(super) name: String,
    pub(super) id: String,
    pub(super) image: String,
    pub(super) started: Option<Timestamp>,
    /// Its cgroup; `None` where it has none now.
    pub(super) cgroup: Option<(String, Sample)>,
    /// Bytes and inodes of its writable layer.
    pub(super) layer: Option<(u64, u64)>,
    /// Bytes and files of its logs.
    pub(super) logs: (u64, u64),
}

/// A pod.
#[derive(Clone, Debug, Default)]
pub(super) struct PodStats {
    pub(super) key: (String, String),
    pub(super) uid: String,
    pub(super) started: Option<Timestamp>,
    pub(super) cgroup: Option<(String, Sample)>,
    pub(super) sandbox: String,
    pub(super) network: Vec<Interface>,
    pub(super) containers: Vec<ContainerStats>,
    /// Volumes that claims or drivers provide.
    pub(super) volumes: Vec<VolumeUsage>,
}

/// Counters of a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) received: [u64; 4],
    pub(super) sent: [u64; 4],
}

/// The node.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeStats {
    pub(super) sample: Sample,
    pub(super) started: Timestamp,
    pub(super) memory_available: u64,
    pub(super) swap_total: u64,
    pub(super) network: Vec<Interface>,
    pub(super) rootfs: Option<FileSystem>,
    pub(super) imagefs: Option<FileSystem>,
    pub(super) image_bytes: u64,
    pub(super) image_inodes: u64,
    pub(super) pids_max: u64,
    pub(super) pids: u64,
    /// QoS cgroups and this process's own, by name.
    pub(super) system: Vec<(&'static str, String, Sample)>,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    pub(super) node: NodeStats,
    pub(super) pods: Vec<PodStats>,
    /// The runtime did not say what was asked of it.
    pub(super) error: bool,
}

/// How much is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// CPU and memory.
    Usage,
    /// Networks and file systems as well, which the runtime is asked for.
    All,
}

/// When, CPU time then, rate then.
type Looked = (Timestamp, u64, Option<u64>);

/// Gathers.
pub(in crate::node_api) struct Gatherer {
    node: Arc<NodeContext>,
    table: PodTable,
    runtime: Arc<dyn Runtime>,
    volumes: Option<Arc<NodeVolumes>>,
    mounts: Mounts,
    pub(super) machine: Machine,
    booted: Timestamp,
    /// The CPU time of each cgroup when it was last looked at.
    before: Mutex<HashMap<String, Looked>>,
}

impl Gatherer {
    pub(in crate::node_api) fn new(
        node: Arc<NodeContext>,
        table: PodTable,
        runtime: Arc<dyn Runtime>,
        volumes: Option<Arc<NodeVolumes>>,
    ) -> Self {
        Self {
            node,
            table,
            runtime,
            volumes,
            mounts: Mounts::find(),
            machine: Machine::read(),
            booted: booted(),
            before: Mutex::default(),
        }
    }

    /// How full the volumes of pods are that claims or drivers provide.
    pub(in crate::node_api) async fn volumes(&self) -> HashMap<PodUid, Vec<VolumeUsage>> {
        match &self.volumes {
            Some(volumes) => volumes.usage().await,
            None => HashMap::new(),
        }
    }

    /// What is used now.
    pub(super) async fn gather(self: &Arc<Self>, depth: Depth) -> Snapshot {
        let mut volumes = HashMap::new();
        let (sandboxes, images, error) = match depth {
            Depth::Usage => (Vec::new(), None, false),
            Depth::All => {
                let (stats, info, usage) = tokio::join!(
                    self.runtime.list_pod_sandbox_stats(),
                    self.runtime.image_fs_info(),
                    self.volumes(),
                );
                volumes = usage;
                let failed = stats.is_err();
                if let Err(error) = &stats {
                    tracing::warn!(%error, "statistics lack what the runtime knows");
                }
                let image = info.ok().and_then(|info| info.image_filesystems.into_iter().next());
                (stats.unwrap_or_default(), image, failed)
            }
        };
        let this = self.clone();
        let work =
            tokio::task::spawn_blocking(move || this.look(depth, sandboxes, images, error)).await;
        let mut snapshot = work.unwrap_or(Snapshot { error: true, ..Snapshot::default() });
        for pod in &mut snapshot.pods {
            pod.volumes = volumes.remove(&PodUid::from(&*pod.uid)).unwrap_or_default();
        }
        snapshot
    }

    fn look(
        &self,
        depth: Depth,
        sandboxes: Vec<api::PodSandboxStats>,
        images: Option<api::FilesystemUsage>,
        error: bool,
    ) -> Snapshot {
        let by_sandbox: HashMap<String, api::LinuxPodSandboxStats> = sandboxes
            .into_iter()
            .filter_map(|stats| Some((stats.attributes?.id, stats.linux?)))
            .collect();
        let mut pods: Vec<PodStats> = Vec::new();
        for view in self.table.pods() {
            let folder = self.folder(&pod_path(qos_class(&view.pod), &PodUid::of(&view.pod)));
            let Some(sandbox) = view.sandbox else { continue };
            let told = by_sandbox.get(&sandbox);
            let children = self.mounts.children(&folder);
            let logs = self.node.pod_log_dir(&view.pod);
            let containers = running(&view.status)
                .map(|status| self.container(status, &folder, &children, told, depth, &logs))
                .collect();
            let key = NamespacedName::of_pod(&view.pod);
            pods.push(PodStats {
                key: (key.namespace.to_string(), key.name.to_string()),
                uid: PodUid::of(&view.pod).to_string(),
                started: view.status.start_time.as_ref().map(|time| time.0),
                cgroup: self.sample(&folder).map(|sample| (folder, sample)),
                network: told.map(interfaces).unwrap_or_default(),
                sandbox,
                containers,
                volumes: Vec::new(),
            });
        }
        pods.sort_by(|a, b| a.key.cmp(&b.key));
        let node = self.node_stats(depth, images);
        let now = node.sample.at;
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        before.retain(|_, (at, ..)| now.duration_since(*at).as_secs() < 600);
        Snapshot { node, pods, error }
    }

    fn container(
        &self,
        status: &ContainerStatus,
        folder: &str,
        children: &[String],
        told: Option<&api::LinuxPodSandboxStats>,
        depth: Depth,
        logs: &Path,
    ) -> ContainerStats {
        let id = status.container_id.as_deref().unwrap_or_default();
        let id = id.split_once("://").map_or(id, |(_, id)| id);
        let cgroup = children.iter().find(|child| !id.is_empty() && child.contains(id));
        let cgroup = cgroup.and_then(|child| {
            let path = format!("{folder}/{child}");
            self.sample(&path).map(|sample| (path, sample))
        });
        let theirs = told.and_then(|told| {
            told.containers.iter().find(|c| c.attributes.as_ref().is_some_and(|a| a.id == id))
        });
        let layer = theirs.and_then(|stats| stats.writable_layer.as_ref());
        let value = |v: &Option<api::UInt64Value>| v.as_ref().map_or(0, |v| v.value);
        let running = status.state.as_ref().and_then(|state| state.running.as_ref());
        ContainerStats {
            name: status.name.clone(),
            id: id.to_owned(),
            image: status.image.clone(),
            started: running.and_then(|r| r.started_at.as_ref()).map(|time| time.0),
            cgroup,
            layer: layer.map(|layer| (value(&layer.used_bytes), value(&layer.inodes_used))),
            logs: match depth {
                Depth::All => folder_size(&logs.join(&status.name)),
                Depth::Usage => (0, 0),
            },
        }
    }

    fn node_stats(&self, depth: Depth, images: Option<api::FilesystemUsage>) -> NodeStats {
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let found = memory.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = found.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            kib.unwrap_or(0) * 1024
        };
        let now = Timestamp::now();
        let mut sample = self.sample("").unwrap_or(Sample { at: now, ..Sample::default() });
        // The root cgroup does not say everything, and not the same by version.
        sample.usage.cpu = node_cpu().unwrap_or(sample.usage.cpu);
        sample.usage.memory = field("MemTotal").saturating_sub(field("MemFree"));
        sample.usage.inactive_file = field("Inactive(file)");
        sample.usage.anon = field("AnonPages");
        sample.usage.cache = field("Cached");
        sample.usage.swap = field("SwapTotal").saturating_sub(field("SwapFree"));
        self.rate("", &mut sample);
        let all = depth == Depth::All;
        let value = |v: &Option<api::UInt64Value>| v.as_ref().map_or(0, |v| v.value);
        let image_dir = images.as_ref().and_then(|i| i.fs_id.as_ref()).map(|id| &id.mountpoint);
        let number = |path: &str| {
            let text = std::fs::read_to_string(path).ok();
            text.and_then(|text| text.trim().parse::<u64>().ok())
        };
        let pids = std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| text.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok());
        let own = own_cgroup();
        let pods = pods_folder(self.node.cgroup_driver, &self.node.cgroup_root);
        let system = [("pods", pods), ("kubelet", own.clone()), ("runtime", own)];
        NodeStats {
            started: self.booted,
            memory_available: field("MemTotal").saturating_sub(sample.usage.working_set()),
            swap_total: field("SwapTotal"),
            sample,
            network: if all {
                parse_net_dev(&std::fs::read_to_string("/proc/net/dev").unwrap_or_default())
            } else {
                Vec::new()
            },
            rootfs: all.then(|| file_system(&self.node.root_dir)).flatten(),
            imagefs: image_dir.and_then(|dir| file_system(Path::new(dir))),
            image_bytes: images.as_ref().map_or(0, |i| value(&i.used_bytes)),
            image_inodes: images.as_ref().map_or(0, |i| value(&i.inodes_used)),
            pids_max: number("/proc/sys/kernel/pid_max").unwrap_or(0),
            pids: pids.unwrap_or(0),
            system: system
                .into_iter()
                .filter_map(|(name, path)| self.sample(&path).map(|s| (name, path, s)))
                .collect(),
        }
    }

    /// The cgroup of `path` below the cgroup root, relative to the mounts.
    pub(super) fn folder(&self, path: &[String]) -> String {
        folder(self.node.cgroup_driver, &self.node.cgroup_root, path)
    }

    /// The QoS classes' cgroups.
    pub(super) fn classes(&self) -> Vec<(String, Sample)> {
        let paths: [&[&str]; 3] =
            [&["kubepods"], &["kubepods", "burstable"], &["kubepods", "besteffort"]];
        let paths = paths.map(|path| {
            self.folder(&path.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>())
        });
        paths.into_iter().filter_map(|p| self.sample(&p).map(|sample| (p, sample))).collect()
    }

    fn sample(&self, cgroup: &str) -> Option<Sample> {
        let usage = self.mounts.read(cgroup)?;
        let mut sample = Sample { at: Timestamp::now(), usage, nano_cores: None };
        if !cgroup.is_empty() {
            self.rate(cgroup, &mut sample);
        }
        Some(sample)
    }

    fn rate(&self, cgroup: &str, sample: &mut Sample) {
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, cpu) = (sample.at, sample.usage.cpu);
        let rate = before.get(cgroup).and_then(|(then, used, rate)| {
            let nanos = at.duration_since(*then).as_nanos();
            if nanos < 1_000_000_000 {
                // Too close to say anything new.
                return *rate;
            }
            let used = u128::from(cpu.saturating_sub(*used)) * 1_000_000_000;
            u64::try_from(used / nanos.unsigned_abs()).ok()
        });
        let recent = before
            .get(cgroup)
            .is_some_and(|(then, ..)| at.duration_since(*then).as_millis() < 1000);
        if !recent {
            before.insert(cgroup.to_owned(), (at, cpu, rate));
        }
        sample.nano_cores = rate;
    }
}

fn running(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    let all = [
        &status.container_statuses,
        &status.init_container_statuses,
        &status.ephemeral_container_statuses,
    ];
    all.into_iter()
        .flatten()
        .flatten()
        .filter(|status| status.state.as_ref().is_some_and(|state| state.running.is_some()))
}

fn interfaces(told: &api::LinuxPodSandboxStats) -> Vec<Interface> {
    let value = |v: &Option<api::UInt64Value>| v.as_ref().map_or(0, |v| v.value);
    let Some(network) = &told.network else { return Vec::new() };
    let mut all: Vec<&api::NetworkInterfaceUsage> = network.default_interface.iter().collect();
    let default = all.first().map(|i| i.name.clone()).unwrap_or_default();
    all.extend(network.interfaces.iter().filter(|i| i.name != default));
    all.into_iter()
        .map(|i| Interface {
            name: i.name.clone(),
            received: [value(&i.rx_bytes), 0, value(&i.rx_errors), 0],
            sent: [value(&i.tx_bytes), 0, value(&i.tx_errors), 0],
        })
        .collect()
}

/// Interfaces of `/proc/net/dev` but the loopback: bytes, packets, errors, drops.
fn parse_net_dev(text: &str) -> Vec<Interface> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let c: Vec<u64> = counters.split_whitespace().filter_map(|c| c.parse().ok()).collect();
            let name = name.trim();
            // Ends of pods' links are the pods' own business.
            (name != "lo" && !name.starts_with("veth") && c.len() >= 16).then(|| Interface {
                name: name.to_owned(),
                received: [c[0], c[1], c[2], c[3]],
                sent: [c[8], c[9], c[10], c[11]],
            })
        })
        .collect()
}

/// Bytes on disk and number of the files in `folder`.
fn folder_size(folder: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .filter(std::fs::Metadata::is_file)
        .fold((0, 0), |(bytes, files), meta| (bytes + meta.blocks() * 512, files + 1))
}

/// CPU time of the machine, nanoseconds: all but idle and waiting for I/O.
fn node_cpu() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|t| t.parse().ok()).collect();
    let busy: u64 = ticks.iter().take(8).sum::<u64>() - ticks.get(3)? - ticks.get(4)?;
    Some(busy * 10_000_000)
}

fn booted() -> Timestamp {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let seconds = text.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok());
    seconds.and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or_default()
}

/// The cgroup of this process: agent, proxy and runtime in one.
fn own_cgroup() -> String {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let ours = controllers.is_empty() || controllers.split(',').any(|c| c == "memory");
        ours.then(|| path.trim_start_matches('/').to_owned())
    };
    let mut found: Vec<String> = text.lines().filter_map(of).collect();
    found.sort_by_key(String::len);
    found.pop().unwrap_or_default()
}
