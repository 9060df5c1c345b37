//! The static memory policy: memory of Guaranteed pods is counted node by node, and their containers are
//! bound to the nodes that have it. A node serves containers that it has enough for alone, or together with
//! the same other nodes: else neither could be sure of what it was promised. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use k8s_openapi::api::core::v1::{Container, Pod};
use serde::{Deserialize, Serialize};

use super::error::NumaError;
use super::hints::{Hint, Hints, Mask, hints_of, masks};
use super::requests::{self, Amounts, containers, ended_before};
use super::topology::Topology;
use crate::ids::PodUid;

/// Memory of one kind on a node, in bytes; as kubelet writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// All of it.
    pub total: u64,
    /// What pods may not have.
    #[serde(rename = "systemReserved")]
    pub system_reserved: u64,
    /// What they may.
    pub allocatable: u64,
    /// What they have.
    pub reserved: u64,
    /// What nobody has.
    pub free: u64,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeState {
    /// Blocks that are (partly) here.
    #[serde(rename = "numberOfAssignments")]
    pub assignments: i64,
    /// By kind.
    #[serde(rename = "memoryMap")]
    pub tables: BTreeMap<String, Table>,
    /// The nodes that it serves together with, and itself.
    pub cells: Vec<u32>,
}

impl NodeState {
    fn table(&self, kind: &str) -> Table {
        self.tables.get(kind).copied().unwrap_or_default()
    }
}

/// All nodes.
pub type Nodes = BTreeMap<u32, NodeState>;

/// What a container has of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// On these nodes.
    #[serde(rename = "numaAffinity")]
    pub nodes: Vec<u32>,
    /// `memory` or huge pages.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes.
    pub size: u64,
}

impl Block {
    fn mask(&self) -> Mask {
        self.nodes.iter().copied().collect()
    }
}

/// What containers have.
pub type Blocks = BTreeMap<PodUid, BTreeMap<String, Vec<Block>>>;

/// What is so now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The nodes.
    pub nodes: Nodes,
    /// Who has what.
    pub assigned: Blocks,
}

impl Memory {
    /// What the container has.
    pub fn of(&self, uid: &PodUid, container: &str) -> &[Block] {
        let own = self.assigned.get(uid).and_then(|own| own.get(container));
        own.map(Vec::as_slice).unwrap_or_default()
    }

    /// Takes back what the pod has; whether it had any.
    pub fn release(&mut self, uid: &PodUid) -> bool {
        let had = self.assigned.remove(uid);
        for block in had.iter().flat_map(BTreeMap::values).flatten() {
            give_back(&mut self.nodes, block);
        }
        had.is_some()
    }

    /// Takes back what pods have that are not among `pods`; whether there were any.
    pub fn retain(&mut self, pods: &HashSet<PodUid>) -> bool {
        let gone: Vec<PodUid> =
            self.assigned.keys().filter(|uid| !pods.contains(uid)).cloned().collect();
        for uid in &gone {
            self.release(uid);
        }
        !gone.is_empty()
    }

    /// Memory that init containers have had on exactly these nodes, and are done with when `container`
    /// begins.
    fn reusable(&self, pod: &Pod, container: &str, mask: Mask, kind: &str) -> u64 {
        let uid = PodUid::of(pod);
        let blocks = ended_before(pod, container).flat_map(|before| self.of(&uid, before));
        blocks.filter(|b| b.mask() == mask && b.kind == kind).map(|b| b.size).sum()
    }

    /// What `block` of `container` has of init containers' memory is no longer theirs, so that all blocks
    /// together are what the pod has.
    fn reuse(&mut self, pod: &Pod, container: &str, block: &Block) {
        let mut left = block.size;
        let Some(own) = self.assigned.get_mut(&PodUid::of(pod)) else { return };
        for before in ended_before(pod, container) {
            for old in own.get_mut(before).into_iter().flatten() {
                if old.kind == block.kind && old.mask() == block.mask() {
                    let reused = old.size.min(left);
                    old.size -= reused;
                    left -= reused;
                }
            }
        }
    }
}

fn count_in(nodes: &mut Nodes, block: &Block, mut size: u64) {
    for id in &block.nodes {
        let Some(node) = nodes.get_mut(id) else { continue };
        node.assignments += 1;
        node.cells.clone_from(&block.nodes);
        let Some(table) = node.tables.get_mut(&block.kind) else { continue };
        let taken = table.free.min(size);
        table.free -= taken;
        table.reserved += taken;
        size -= taken;
    }
}

fn give_back(nodes: &mut Nodes, block: &Block) {
    let mut size = block.size;
    for id in &block.nodes {
        let Some(node) = nodes.get_mut(id) else { continue };
        node.assignments -= 1;
        if node.assignments == 0 {
            node.cells = vec![*id];
        }
        let Some(table) = node.tables.get_mut(&block.kind) else { continue };
        let given = table.reserved.min(size);
        table.reserved -= given;
        table.free += given;
        size -= given;
    }
}

fn same_nodes(one: &[u32], other: &[u32]) -> bool {
    let mask = |nodes: &[u32]| nodes.iter().copied().collect::<Mask>();
    mask(one) == mask(other)
}

/// What is reserved on each node, by kind.
pub type Reserved = BTreeMap<u32, Amounts>;

/// The policy, on its machine.
#[derive(Clone, Debug)]
pub struct MemoryPolicy {
    initial: Nodes,
}

impl MemoryPolicy {
    /// Of the machine, but for what is reserved; that must come to what the node keeps for itself
    /// (`kept`), kind by kind.
    ///
    /// # Errors
    /// It does not.
    pub fn new(topology: &Topology, reserved: &Reserved, kept: &Amounts) -> Result<Self, String> {
        let mut sums = Amounts::new();
        for (node, amounts) in reserved {
            if !topology.nodes.contains_key(node) {
                return Err(format!(
                    "the reserved memory configuration references a NUMA node {node} that does not \
                     exist on this machine"
                ));
            }
            for (kind, bytes) in amounts {
                *sums.entry(kind.clone()).or_default() += bytes;
            }
        }
        for kind in sums.keys().chain(kept.keys()) {
            let of = |amounts: &Amounts| amounts.get(kind).copied().unwrap_or(0);
            let (sum, kept) = (of(&sums), of(kept));
            if sum != kept {
                return Err(format!(
                    "the total amount \"{sum}\" of type {kind:?} is not equal to the value \
                     \"{kept}\" determined by Node Allocatable feature; reservedMemory must come to \
                     systemReserved, kubeReserved and the hard eviction threshold together"
                ));
            }
        }
        if sums.get("memory").copied().unwrap_or(0) == 0 {
            return Err("[memorymanager] you should specify the system reserved memory".into());
        }
        let mut initial = Nodes::new();
        for (id, node) in &topology.nodes {
            let own = reserved.get(id);
            let table = |kind: &str, total: u64, others: u64| {
                let system_reserved = own.and_then(|own| own.get(kind)).copied().unwrap_or(0);
                let rest = total.checked_sub(system_reserved).and_then(|n| n.checked_sub(others));
                let allocatable = rest.ok_or_else(|| {
                    format!(
                        "reservedMemory keeps {system_reserved} bytes of {kind} on NUMA node {id}, \
                         which has {}",
                        total.saturating_sub(others)
                    )
                })?;
                Ok::<_, String>(Table {
                    total,
                    system_reserved,
                    allocatable,
                    reserved: 0,
                    free: allocatable,
                })
            };
            let mut tables = BTreeMap::new();
            for (kind, bytes) in &node.huge_pages {
                tables.insert(kind.clone(), table(kind, *bytes, 0)?);
            }
            let huge = node.huge_pages.values().sum();
            tables.insert("memory".to_owned(), table("memory", node.memory, huge)?);
            initial.insert(*id, NodeState { assignments: 0, tables, cells: vec![*id] });
        }
        Ok(Self { initial })
    }

    /// What is so before any container has memory of its own.
    pub fn initial(&self) -> Memory {
        Memory { nodes: self.initial.clone(), assigned: Blocks::new() }
    }

    /// Memory that can be a container's own.
    pub fn allocatable(&self) -> Vec<Block> {
        let of_node = |(id, node): (&u32, &NodeState)| -> Vec<Block> {
            let block = |(kind, table): (&String, &Table)| {
                (table.allocatable > 0).then(|| Block {
                    nodes: vec![*id],
                    kind: kind.clone(),
                    size: table.allocatable,
                })
            };
            node.tables.iter().filter_map(block).collect()
        };
        self.initial.iter().flat_map(of_node).collect()
    }

    /// Whether what an earlier agent knew can be so on this machine.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self, memory: &Memory) -> Result<(), String> {
        let mut expected = self.initial();
        for (pod, own) in &memory.assigned {
            for (container, blocks) in own {
                for block in blocks {
                    for id in &block.nodes {
                        let node = expected.nodes.get(id).ok_or_else(|| {
                            format!(
                                "[memorymanager] (pod: {pod}, container: {container}) the memory \
                                 assignment uses the NUMA that does not exist"
                            )
                        })?;
                        if !node.tables.contains_key(&block.kind) {
                            return Err(format!(
                                "[memorymanager] (pod: {pod}, container: {container}) the memory \
                                 assignment uses memory resource that does not exist"
                            ));
                        }
                    }
                    count_in(&mut expected.nodes, block, block.size);
                }
            }
        }
        let alike = expected.nodes.len() == memory.nodes.len()
            && expected.nodes.iter().all(|(id, one)| {
                memory.nodes.get(id).is_some_and(|other| {
                    one.assignments == other.assignments
                        && same_nodes(&one.cells, &other.cells)
                        && one.tables.len() == other.tables.len()
                        && one.tables.keys().all(|kind| {
                            let (a, b) = (one.table(kind), other.table(kind));
                            (a.total, a.system_reserved, a.allocatable)
                                == (b.total, b.system_reserved, b.allocatable)
                                && group(&expected.nodes, &one.cells, kind)
                                    == group(&memory.nodes, &one.cells, kind)
                        })
                })
            });
        // Within a group what was taken first may lie on another node than what is counted first.
        if alike {
            Ok(())
        } else {
            Err("[memorymanager] the expected machine state is different from the real one".into())
        }
    }

    /// Where the container's memory can be had, or where the pod's.
    pub fn hints(&self, memory: &Memory, pod: &Pod, container: Option<&Container>) -> Hints {
        let uid = PodUid::of(pod);
        let asked = match container {
            Some(container) => requests::memory(pod, container),
            None => requests::pod_memory(pod),
        };
        let one = container.into_iter().chain(containers(pod).filter(|_| container.is_none()));
        let had = one.map(|c| memory.of(&uid, &c.name)).find(|blocks| !blocks.is_empty());
        if let Some(blocks) = had {
            let same = blocks.len() == asked.len()
                && blocks.iter().all(|block| asked.get(&block.kind) == Some(&block.size));
            let again = |block: &Block| {
                let hint = Hint { nodes: Some(block.mask()), preferred: true };
                (block.kind.clone(), Some(vec![hint]))
            };
            return blocks.iter().filter(|_| same).map(again).collect();
        }
        let name = container.map_or("", |container| &container.name);
        let hints = places(memory, pod, name, &asked);
        if hints.is_empty() {
            // Nowhere, which kubelet tells as no preference: it fails when memory is given.
            return Hints::new();
        }
        asked.into_keys().map(|kind| (kind, Some(hints.clone()))).collect()
    }

    /// Gives the container its memory on the nodes of `hint`, and as few more as it takes; whether it
    /// asks for any.
    ///
    /// # Errors
    /// There is not as much, or not there.
    pub fn allocate(
        &self,
        memory: &mut Memory,
        pod: &Pod,
        container: &Container,
        hint: Hint,
    ) -> Result<bool, NumaError> {
        let (uid, name) = (PodUid::of(pod), container.name.as_str());
        let asked = requests::memory(pod, container);
        if asked.is_empty() || !memory.of(&uid, name).is_empty() {
            return Ok(!asked.is_empty());
        }
        let mut chosen = match hint.nodes {
            Some(nodes) => (nodes, hint.preferred),
            None => {
                let best =
                    narrowest(places(memory, pod, name, &asked)).ok_or(NumaError::NoMemory)?;
                if hint.preferred && !best.1 {
                    return Err(NumaError::NotPreferred("default"));
                }
                best
            }
        };
        let free = |mask: Mask, kind: &str| -> u64 {
            let tables = mask.nodes().filter_map(|node| memory.nodes.get(&node));
            tables.map(|node| node.table(kind).free).sum()
        };
        // A node that serves together with others cannot serve alone; kubelet would let it, and find at
        // its next start that its own file does not add up.
        let grouped = |id: u32| memory.nodes.get(&id).is_some_and(|node| node.cells.len() > 1);
        let torn = chosen.0.len() == 1 && chosen.0.nodes().any(grouped);
        if torn || asked.iter().any(|(kind, bytes)| free(chosen.0, kind) < *bytes) {
            let mut wider = places(memory, pod, name, &asked);
            wider.retain(|hint| hint.nodes.is_some_and(|nodes| nodes.includes(chosen.0)));
            let best = narrowest(wider).ok_or(NumaError::NotExtended)?;
            if chosen.1 && !best.1 {
                return Err(NumaError::NotPreferred("extended"));
            }
            chosen = best;
        }
        let mask = chosen.0;
        if mask.len() > 1 && !shares(&memory.nodes, mask) {
            return Err(NumaError::Violates);
        }
        let mut own = Vec::new();
        for (kind, size) in asked {
            let block = Block { nodes: mask.nodes().collect(), kind, size };
            let reused = memory.reusable(pod, name, mask, &block.kind);
            count_in(&mut memory.nodes, &block, size.saturating_sub(reused));
            memory.reuse(pod, name, &block);
            own.push(block);
        }
        memory.assigned.entry(uid).or_default().insert(name.to_owned(), own);
        Ok(true)
    }
}

/// Free and reserved memory of a group of nodes.
fn group(nodes: &Nodes, cells: &[u32], kind: &str) -> (u64, u64) {
    let tables = cells.iter().filter_map(|id| Some(nodes.get(id)?.table(kind)));
    tables.fold((0, 0), |sum, table| (sum.0 + table.free, sum.1 + table.reserved))
}

/// Whether these nodes serve nobody, or together and with no others.
fn shares(nodes: &Nodes, mask: Mask) -> bool {
    let ids: Vec<u32> = mask.nodes().collect();
    let mut used = ids.iter().filter_map(|id| nodes.get(id)).filter(|node| node.assignments > 0);
    used.all(|node| node.cells.len() > 1 && same_nodes(&node.cells, &ids))
}

/// Where `asked` can be had.
fn places(memory: &Memory, pod: &Pod, container: &str, asked: &Amounts) -> Vec<Hint> {
    let ids: BTreeSet<u32> = memory.nodes.keys().copied().collect();
    let mut fewest = ids.len();
    let mut found = Vec::new();
    for mask in masks(&ids) {
        let sum = |kind: &str, of: fn(Table) -> u64| -> u64 {
            let nodes = mask.nodes().filter_map(|id| memory.nodes.get(&id));
            nodes.map(|node| of(node.table(kind))).sum()
        };
        if asked.iter().any(|(kind, bytes)| sum(kind, |t| t.allocatable) < *bytes) {
            continue;
        }
        fewest = fewest.min(mask.len());
        let cells = |id: u32| memory.nodes.get(&id).map_or(0, |node| node.cells.len());
        let usable = if mask.len() == 1 {
            mask.nodes().all(|id| cells(id) <= 1)
        } else {
            shares(&memory.nodes, mask)
        };
        let enough = |(kind, bytes): (&String, &u64)| {
            sum(kind, |t| t.free) + memory.reusable(pod, container, mask, kind) >= *bytes
        };
        if usable && asked.iter().all(enough) {
            found.push(mask);
        }
    }
    hints_of(found, fewest)
}

/// The best of `hints`: preferred, and of few nodes.
fn narrowest(hints: Vec<Hint>) -> Option<(Mask, bool)> {
    let mut best: Option<(Mask, bool)> = None;
    for hint in hints {
        let Some(nodes) = hint.nodes else { continue };
        let better = best.is_none_or(|(mask, preferred)| {
            (hint.preferred && !preferred)
                || (hint.preferred == preferred && nodes.is_narrower(mask))
        });
        if better {
            best = Some((nodes, hint.preferred));
        }
    }
    best
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
