//! CPUs and memory that containers have to themselves, and all that a container has on NUMA nodes near to
//! each other: kubelet's CPU manager, memory manager and topology manager.
//!
//! What the machine is like is data (`topology`, read by `sysfs`); who gets which CPUs (`cpu`, `accumulate`,
//! `balance`), which memory (`memory`) and on which nodes (`hints`) is decided without effects. `Numa` keeps
//! what was decided, has it on disk (`checkpoint`) before a container is made with it, and tells when the
//! CPUs that all others share have changed. A node without any of it has no `Numa`.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{Notify, watch};

use crate::config::NumaConfig;
use crate::device::NumaAffinity;
use crate::ids::PodUid;
use crate::metrics::METRICS;
use crate::node::cpu_set::CpuSet;
use crate::pod_resources;

mod accumulate;
mod admit;
mod balance;
mod checkpoint;
mod cpu;
mod error;
pub mod hints;
mod memory;
pub mod options;
pub mod requests;
mod sysfs;
#[cfg(test)]
pub(crate) mod tests;
mod topology;

pub use error::Refusal;
pub use memory::Reserved;

use checkpoint::{CPU_FILE, CheckpointError, MEMORY_FILE};
use cpu::{CpuPolicy, Cpus};
use hints::{Mask, Merger};
use memory::{Memory, MemoryPolicy};
use requests::Amounts;
use topology::Topology;

/// What the node keeps for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// CPUs by name (`reservedSystemCPUs`); empty where only their number is given.
    pub cpus: CpuSet,
    /// `systemReserved` and `kubeReserved`, in milli-CPUs.
    pub milli_cpu: u64,
    /// The same of memory and huge pages, and what the hard eviction threshold keeps, in bytes.
    pub memory: Amounts,
}

/// Why the policies cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine cannot be told.
    #[error(transparent)]
    Sysfs(#[from] sysfs::SysfsError),
    /// It is not fit for what is asked for, or this for the machine.
    #[error("{field}: {cause}")]
    Unfit {
        /// Field of KubeletConfiguration.
        field: &'static str,
        /// Why.
        cause: String,
    },
    /// What an earlier agent knew is not to be taken.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// It cannot be written.
    #[error("{0}")]
    Write(String),
}

/// On which CPUs and memory nodes a container runs, as Linux lists them; empty is anywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// CPUs.
    pub cpus: String,
    /// Memory nodes.
    pub mems: String,
}

/// On which nodes containers' devices should be.
#[derive(Clone, Debug, Default)]
pub struct Affinities(Arc<Mutex<HashMap<PodUid, HashMap<String, Mask>>>>);

impl Affinities {
    fn set(&self, uid: &PodUid, container: &str, nodes: Option<Mask>) {
        if let Some(nodes) = nodes {
            let mut all = lock(&self.0);
            all.entry(uid.clone()).or_default().insert(container.to_owned(), nodes);
        }
    }
}

impl NumaAffinity for Affinities {
    fn nodes(&self, uid: &PodUid, container: &str) -> Option<BTreeSet<i64>> {
        let mask = *lock(&self.0).get(uid)?.get(container)?;
        Some(mask.nodes().map(i64::from).collect())
    }
}

#[derive(Debug, Default)]
struct State {
    cpus: Cpus,
    memory: Memory,
}

/// The files as they are.
#[derive(Debug, Default)]
struct Saved {
    cpus: Vec<u8>,
    memory: Vec<u8>,
}

/// Who has which CPUs and memory on this node.
pub struct Numa {
    folder: PathBuf,
    config: NumaConfig,
    topology: Topology,
    cpu: Option<CpuPolicy>,
    memory: Option<MemoryPolicy>,
    merger: Merger,
    state: Mutex<State>,
    affinities: Affinities,
    /// Held while a pod's devices are brought together with the rest of what it has.
    aligning: tokio::sync::Mutex<()>,
    saved: Arc<tokio::sync::Mutex<Saved>>,
    /// What is on disk is not what is so.
    changed: Notify,
    /// Counts changes of the shared CPUs.
    pool: watch::Sender<u64>,
}

impl fmt::Debug for Numa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Numa").field("config", &self.config).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Numa {
    /// The policies of `config`, if there are any, on the machine that `sysfs` tells of, going on from
    /// what is on disk in `folder`.
    ///
    /// # Errors
    /// The machine is not fit for them, or what is on disk is another policy's.
    pub fn open(
        folder: &Path,
        sysfs: &Path,
        config: &NumaConfig,
        kept: &Kept,
    ) -> Result<Option<Arc<Self>>, OpenError> {
        let topology = if config.is_off() { Topology::default() } else { sysfs::read(sysfs)? };
        let mut numa = Self::on(folder, topology, config, kept)?;
        let there = |name| std::fs::read(folder.join(name)).unwrap_or_default();
        let mut saved = Saved { cpus: there(CPU_FILE), memory: there(MEMORY_FILE) };
        numa.write(&mut saved).map_err(OpenError::Write)?;
        numa.saved = Arc::new(tokio::sync::Mutex::new(saved));
        if config.is_off() {
            return Ok(None);
        }
        numa.tell();
        tracing::info!(config = ?numa.config, cpus = %numa.topology.all(), "NUMA policies");
        Ok(Some(Arc::new(numa)))
    }

    fn on(
        folder: &Path,
        topology: Topology,
        config: &NumaConfig,
        kept: &Kept,
    ) -> Result<Self, OpenError> {
        let unfit = |field| move |cause| OpenError::Unfit { field, cause };
        if config.aligns() && topology.nodes.len() > config.alignment_options.max_nodes {
            let most = config.alignment_options.max_nodes;
            let cause = format!(
                "unsupported on machines with more than {most} NUMA Nodes; topologyManagerPolicyOptions: \
                 {{max-allowable-numa-nodes: \"{}\"}} allows these",
                topology.nodes.len()
            );
            return Err(unfit("topologyManagerPolicy")(cause));
        }
        if config.alignment_options.closest
            && topology.nodes.values().any(|node| node.distances.len() != topology.nodes.len())
        {
            let cause = "the kernel does not tell the distances between NUMA nodes, which \
                         prefer-closest-numa-nodes needs";
            return Err(unfit("topologyManagerPolicyOptions")(cause.to_owned()));
        }
        let cpu = config.cpu.map(|options| {
            options.check(&topology, config.alignment).map_err(unfit("cpuManagerPolicyOptions"))?;
            CpuPolicy::new(topology.clone(), options, &kept.cpus, kept.milli_cpu)
                .map_err(unfit("cpuManagerPolicy"))
        });
        let cpu = cpu.transpose()?;
        let memory = config.memory.as_ref().map(|reserved| {
            MemoryPolicy::new(&topology, reserved, &kept.memory).map_err(unfit("reservedMemory"))
        });
        let memory = memory.transpose()?;
        let known = checkpoint::read_cpus(folder, config.cpu_policy(), |cpus| {
            cpu.as_ref().map_or(Ok(()), |policy| policy.check(cpus))
        })?;
        let cpus = known.or_else(|| cpu.as_ref().map(CpuPolicy::initial)).unwrap_or_default();
        let known = checkpoint::read_memory(folder, config.memory_policy(), |known| {
            memory.as_ref().map_or(Ok(()), |policy| policy.check(known))
        })?;
        let blocks = known.or_else(|| memory.as_ref().map(MemoryPolicy::initial));
        let nodes = topology.nodes.iter().map(|(id, node)| (*id, node.distances.clone()));
        Ok(Self {
            folder: folder.to_owned(),
            config: config.clone(),
            merger: Merger {
                policy: config.alignment,
                options: config.alignment_options,
                nodes: nodes.collect(),
            },
            topology,
            cpu,
            memory,
            state: Mutex::new(State { cpus, memory: blocks.unwrap_or_default() }),
            affinities: Affinities::default(),
            aligning: tokio::sync::Mutex::default(),
            saved: Arc::default(),
            changed: Notify::new(),
            pool: watch::Sender::new(0),
        })
    }

    /// For whoever gives containers devices.
    pub fn affinities(&self) -> Affinities {
        self.affinities.clone()
    }

    /// How often what containers run on is looked at without a cause.
    pub fn reconcile_period(&self) -> Duration {
        self.config.reconcile_period
    }

    /// Turns when the shared CPUs have changed.
    pub fn pool(&self) -> watch::Receiver<u64> {
        self.pool.subscribe()
    }

    /// Where the container is to run, now.
    pub fn placement(&self, uid: &PodUid, container: &str) -> Placement {
        let state = lock(&self.state);
        let cpus = self
            .cpu
            .as_ref()
            .map(|_| state.cpus.of(uid, container).unwrap_or(&state.cpus.shared).to_string());
        let nodes = state.memory.of(uid, container).iter().flat_map(|block| &block.nodes);
        let mems: CpuSet = nodes.copied().collect();
        Placement { cpus: cpus.unwrap_or_default(), mems: mems.to_string() }
    }

    /// Whether the container, or any of the pod, is freed of its CPU quota: its CPUs are nobody else's.
    pub fn frees_of_quota(&self, uid: &PodUid, container: Option<&str>) -> bool {
        let state = lock(&self.state);
        let own = state.cpus.assigned.get(uid);
        let has = own.is_some_and(|own| container.is_none_or(|name| own.contains_key(name)));
        has && !self.config.keeps_quota
    }

    /// Nothing of the pod runs any more.
    pub fn release(&self, uid: &PodUid) {
        lock(&self.affinities.0).remove(uid);
        let had = {
            let mut state = lock(&self.state);
            let (cpus, memory) = (state.cpus.release(uid), state.memory.release(uid));
            (cpus, memory)
        };
        self.given_back(had);
    }

    /// There are no other pods than these.
    pub fn retain(&self, pods: &HashSet<PodUid>) {
        lock(&self.affinities.0).retain(|uid, _| pods.contains(uid));
        let had = {
            let mut state = lock(&self.state);
            let (cpus, memory) = (state.cpus.retain(pods), state.memory.retain(pods));
            (cpus, memory)
        };
        self.given_back(had);
    }

    fn given_back(&self, (cpus, memory): (bool, bool)) {
        if cpus {
            self.tell();
        }
        if cpus || memory {
            self.changed.notify_one();
        }
    }

    /// Why the pod cannot be resized from `has` to `asks`, if it cannot.
    pub fn refuses_resize(&self, has: &Pod, asks: &Pod) -> Option<String> {
        let changed = |of: fn(&Pod) -> Vec<i64>| of(has) != of(asks);
        let (what, policy) = if self.cpu.is_some() && changed(requests::milli_cpus) {
            ("CPU", self.config.cpu_policy())
        } else if self.memory.is_some() && changed(requests::bytes) {
            ("Memory", self.config.memory_policy())
        } else {
            return None;
        };
        let guaranteed = crate::pod::qos::qos_class(asks) == "Guaranteed";
        guaranteed.then(|| {
            format!("Resize is infeasible for Guaranteed Pods alongside {what} Manager policy \"{policy}\"")
        })
    }

    /// Tells whoever shares CPUs, and the metrics, how many there are.
    fn tell(&self) {
        let Some(policy) = &self.cpu else { return };
        {
            let state = lock(&self.state);
            let shared = policy.available(&state.cpus).len();
            METRICS.cpus_assigned(
                shared,
                state.cpus.exclusive().len(),
                &policy.by_node(&state.cpus),
            );
        }
        self.pool.send_modify(|count| *count += 1);
    }

    fn write(&self, saved: &mut Saved) -> Result<(), String> {
        let (cpus, memory) = {
            let state = lock(&self.state);
            (
                checkpoint::encode_cpus(self.config.cpu_policy(), &state.cpus),
                checkpoint::encode_memory(self.config.memory_policy(), &state.memory),
            )
        };
        checkpoint::write(&self.folder, CPU_FILE, &cpus, &mut saved.cpus)?;
        checkpoint::write(&self.folder, MEMORY_FILE, &memory, &mut saved.memory)
    }

    /// Has what is so on disk.
    async fn save(self: &Arc<Self>) -> Result<(), String> {
        let mut saved = self.saved.clone().lock_owned().await;
        let numa = self.clone();
        let written = tokio::task::spawn_blocking(move || numa.write(&mut saved)).await;
        written.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Keeps what is on disk up to date, until `shutdown` turns true.
    pub async fn run(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = self.changed.notified() => {}
                () = crate::shutdown::requested(&mut shutdown) => return,
            }
            if let Err(error) = self.save().await {
                tracing::error!(error, "that CPUs or memory are free again is not on disk");
            }
        }
    }
}

impl pod_resources::Exclusive for Numa {
    fn cpu_ids(&self, uid: &PodUid, container: &str) -> Vec<i64> {
        let state = lock(&self.state);
        let own = state.cpus.of(uid, container).into_iter();
        own.flat_map(CpuSet::iter).map(i64::from).collect()
    }

    fn memory(&self, uid: &PodUid, container: &str) -> Vec<pod_resources::Memory> {
        told(lock(&self.state).memory.of(uid, container))
    }

    fn allocatable_cpu_ids(&self) -> Vec<i64> {
        let all = self.cpu.as_ref().map(CpuPolicy::allocatable).unwrap_or_default();
        all.iter().map(i64::from).collect()
    }

    fn allocatable_memory(&self) -> Vec<pod_resources::Memory> {
        self.memory.as_ref().map(|policy| told(&policy.allocatable())).unwrap_or_default()
    }
}

fn told(blocks: &[memory::Block]) -> Vec<pod_resources::Memory> {
    let told = |block: &memory::Block| pod_resources::Memory {
        kind: block.kind.clone(),
        bytes: block.size,
        numa: block.nodes.iter().copied().map(i64::from).collect(),
    };
    blocks.iter().map(told).collect()
}
