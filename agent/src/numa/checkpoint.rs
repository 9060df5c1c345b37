//! Who has which CPUs and memory, on disk: kubelet's own files and format (`cpu_manager_state`,
//! `memory_manager_state`), so that a node can change hands both ways.
//!
//! A file of another policy, or one that is broken, is not passed over: what runs may have been promised
//! CPUs that nobody would know of. The node does not start, and says which file to remove.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cpu::Cpus;
use super::memory::{Block, Memory, NodeState, Nodes};
use crate::device::checksum::of_text;
use crate::ids::PodUid;
use crate::join::files::write_atomic;
use crate::node::cpu_set::CpuSet;

/// Kubelet's names for them, in the agent's root.
pub const CPU_FILE: &str = "cpu_manager_state";
/// The other one.
pub const MEMORY_FILE: &str = "memory_manager_state";

/// Why a file is not taken.
#[derive(Debug, thiserror::Error)]
#[error(
    "could not restore state from checkpoint: {cause}, please drain this node and delete the {what} \
     manager checkpoint file {:?} before restarting",
    path
)]
pub struct CheckpointError {
    what: &'static str,
    path: PathBuf,
    cause: String,
}

type ByPod<T> = BTreeMap<String, BTreeMap<String, T>>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CpuFile {
    policy_name: String,
    default_cpu_set: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    entries: ByPod<String>,
    #[serde(default)]
    checksum: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MemoryFile {
    policy_name: String,
    #[serde(default)]
    machine_state: Nodes,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    entries: ByPod<Option<Vec<Block>>>,
    #[serde(default)]
    checksum: u64,
}

/// A map as Go prints it.
fn map<K: std::fmt::Display, V>(all: &BTreeMap<K, V>, value: impl Fn(&V) -> String) -> String {
    let entries: Vec<String> = all.iter().map(|(k, v)| format!("{k}:{}", value(v))).collect();
    format!("map[{}]", entries.join(" "))
}

fn numbers(all: &[u32]) -> String {
    let all: Vec<String> = all.iter().map(u32::to_string).collect();
    format!("([]int)[{}]", all.join(" "))
}

/// What a file says, but for how it is checked.
trait Checked {
    /// As kubelet prints it to compute the checksum.
    fn printed(&self) -> String;
    fn checksum(&self) -> u64;
    fn policy(&self) -> &str;
}

impl Checked for CpuFile {
    fn printed(&self) -> String {
        format!(
            "(*state.CPUManagerCheckpoint){{PolicyName:(string){} DefaultCPUSet:(string){} \
             Entries:(map[string]map[string]string){} Checksum:(checksum.Checksum)0}}",
            self.policy_name,
            self.default_cpu_set,
            map(&self.entries, |own| map(own, String::clone)),
        )
    }

    fn checksum(&self) -> u64 {
        self.checksum
    }

    fn policy(&self) -> &str {
        &self.policy_name
    }
}

impl Checked for MemoryFile {
    fn printed(&self) -> String {
        let node = |node: &NodeState| {
            let tables = map(&node.tables, |t| {
                format!(
                    "<*>{{TotalMemSize:(uint64){} SystemReserved:(uint64){} Allocatable:(uint64){} \
                     Reserved:(uint64){} Free:(uint64){}}}",
                    t.total, t.system_reserved, t.allocatable, t.reserved, t.free
                )
            });
            format!(
                "<*>{{NumberOfAssignments:(int){} \
                 MemoryMap:(map[v1.ResourceName]*state.MemoryTable){tables} Cells:{}}}",
                node.assignments,
                numbers(&node.cells)
            )
        };
        let blocks = |blocks: &Option<Vec<Block>>| {
            let Some(blocks) = blocks else { return "<nil>".to_owned() };
            let one = |b: &Block| {
                format!(
                    "{{NUMAAffinity:{} Type:(v1.ResourceName){} Size:(uint64){}}}",
                    numbers(&b.nodes),
                    b.kind,
                    b.size
                )
            };
            format!("[{}]", blocks.iter().map(one).collect::<Vec<_>>().join(" "))
        };
        format!(
            "(*state.MemoryManagerCheckpoint){{PolicyName:(string){} \
             MachineState:(state.NUMANodeMap){} Entries:(state.ContainerMemoryAssignments){} \
             Checksum:(checksum.Checksum)0}}",
            self.policy_name,
            map(&self.machine_state, node),
            map(&self.entries, |own| map(own, blocks)),
        )
    }

    fn checksum(&self) -> u64 {
        self.checksum
    }

    fn policy(&self) -> &str {
        &self.policy_name
    }
}

/// The text of the CPUs' file.
pub fn encode_cpus(policy: &str, cpus: &Cpus) -> Vec<u8> {
    let own = |own: &BTreeMap<String, CpuSet>| {
        own.iter().map(|(name, cpus)| (name.clone(), cpus.to_string())).collect()
    };
    let mut file = CpuFile {
        policy_name: policy.to_owned(),
        default_cpu_set: cpus.shared.to_string(),
        entries: cpus.assigned.iter().map(|(uid, of)| (uid.to_string(), own(of))).collect(),
        checksum: 0,
    };
    file.checksum = of_text(&file.printed());
    // Maps with text and numbers as keys always have a JSON form.
    serde_json::to_vec(&file).unwrap_or_default()
}

/// The text of the memory's file.
pub fn encode_memory(policy: &str, memory: &Memory) -> Vec<u8> {
    let own = |own: &BTreeMap<String, Vec<Block>>| {
        own.iter().map(|(name, blocks)| (name.clone(), Some(blocks.clone()))).collect()
    };
    let mut file = MemoryFile {
        policy_name: policy.to_owned(),
        machine_state: memory.nodes.clone(),
        entries: memory.assigned.iter().map(|(uid, of)| (uid.to_string(), own(of))).collect(),
        checksum: 0,
    };
    file.checksum = of_text(&file.printed());
    serde_json::to_vec(&file).unwrap_or_default()
}

fn read<T: Checked + DeserializeOwned>(path: &Path, policy: &str) -> Result<Option<T>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let file: T = serde_json::from_slice(&text)
        .map_err(|error| format!("checkpoint is corrupted: {error}"))?;
    if file.policy() != policy {
        return Err(format!(
            "configured policy {policy:?} differs from state checkpoint policy {:?}",
            file.policy()
        ));
    }
    // Files of old kubelets have none.
    if file.checksum() != 0 && file.checksum() != of_text(&file.printed()) {
        return Err("checkpoint is corrupted: its checksum is another".to_owned());
    }
    Ok(Some(file))
}

/// Which CPUs are whose, as an earlier agent or kubelet under `policy` left it in `folder`, if `check`
/// finds that it can be.
///
/// # Errors
/// The file is another policy's, or broken, or of another machine.
pub fn read_cpus(
    folder: &Path,
    policy: &str,
    check: impl FnOnce(&Cpus) -> Result<(), String>,
) -> Result<Option<Cpus>, CheckpointError> {
    let path = folder.join(CPU_FILE);
    let parse = |text: &str| -> Result<CpuSet, String> {
        text.parse().map_err(|error| format!("could not parse cpu set {text:?}: {error}"))
    };
    let known = || -> Result<Option<Cpus>, String> {
        let Some(file) = read::<CpuFile>(&path, policy)? else { return Ok(None) };
        let mut cpus = Cpus { shared: parse(&file.default_cpu_set)?, ..Cpus::default() };
        for (uid, own) in &file.entries {
            for (container, text) in own {
                let of = cpus.assigned.entry(PodUid::from(uid.as_str())).or_default();
                of.insert(container.clone(), parse(text)?);
            }
        }
        // As a kubelet leaves it that stopped before its policy began.
        if cpus == Cpus::default() {
            return Ok(None);
        }
        check(&cpus)?;
        Ok(Some(cpus))
    };
    known().map_err(|cause| CheckpointError { what: "CPU", path: path.clone(), cause })
}

/// The same of memory.
///
/// # Errors
/// As above.
pub fn read_memory(
    folder: &Path,
    policy: &str,
    check: impl FnOnce(&Memory) -> Result<(), String>,
) -> Result<Option<Memory>, CheckpointError> {
    let path = folder.join(MEMORY_FILE);
    let known = || -> Result<Option<Memory>, String> {
        let Some(file) = read::<MemoryFile>(&path, policy)? else { return Ok(None) };
        let mut memory = Memory { nodes: file.machine_state, ..Memory::default() };
        for (uid, own) in file.entries {
            let of = memory.assigned.entry(PodUid::from(uid.as_str())).or_default();
            of.extend(own.into_iter().filter_map(|(name, blocks)| Some((name, blocks?))));
        }
        if memory == Memory::default() {
            return Ok(None);
        }
        check(&memory)?;
        Ok(Some(memory))
    };
    known().map_err(|cause| CheckpointError { what: "memory", path: path.clone(), cause })
}

/// Puts the text in place, whole or not at all, if it is another than there was.
///
/// # Errors
/// It cannot be written.
pub fn write(folder: &Path, name: &str, text: &[u8], before: &mut Vec<u8>) -> Result<(), String> {
    if text != before.as_slice() {
        write_atomic(&folder.join(name), 0o600, text).map_err(|error| error.to_string())?;
        *before = text.to_vec();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::memory::Table;
    use super::*;

    fn cpus() -> Cpus {
        let set = |text: &str| text.parse().unwrap();
        Cpus {
            shared: set("0,3-7"),
            assigned: [
                (PodUid::from("u-1"), [("c".into(), set("1")), ("a b".into(), set("2"))].into()),
                (PodUid::from("a-2"), [("x".into(), set("8-9"))].into()),
            ]
            .into(),
        }
    }

    fn memory() -> Memory {
        let table = |reserved| Table {
            total: 1000,
            system_reserved: 100,
            allocatable: 900,
            reserved,
            free: 900 - reserved,
        };
        let node = |assignments, reserved, cells: &[u32], huge: bool| NodeState {
            assignments,
            tables: [("memory".to_owned(), table(reserved))]
                .into_iter()
                .chain(huge.then(|| ("hugepages-2Mi".to_owned(), Table::default())))
                .collect(),
            cells: cells.into(),
        };
        let block = |nodes: &[u32], kind: &str, size| Block {
            nodes: nodes.into(),
            kind: kind.into(),
            size,
        };
        let blocks = vec![block(&[0, 1], "memory", 50), block(&[0], "hugepages-2Mi", 7)];
        Memory {
            nodes: [(0, node(2, 50, &[0, 1], true)), (1, node(0, 0, &[1], false))].into(),
            assigned: [(PodUid::from("u-1"), [("c".to_owned(), blocks)].into())].into(),
        }
    }

    #[test]
    fn kubelets_own_files_are_met() {
        // As `MarshalCheckpoint` of kubelet 1.36 writes them.
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert_eq!(
            text(encode_cpus("none", &Cpus::default())),
            r#"{"policyName":"none","defaultCpuSet":"","checksum":1353318690}"#
        );
        assert_eq!(
            text(encode_cpus("static", &cpus())),
            r#"{"policyName":"static","defaultCpuSet":"0,3-7","entries":{"a-2":{"x":"8-9"},"u-1":{"a b":"2","c":"1"}},"checksum":3366825141}"#
        );
        assert_eq!(
            text(encode_memory("None", &Memory::default())),
            r#"{"policyName":"None","machineState":{},"checksum":4236770233}"#
        );
        let written = text(encode_memory("Static", &memory()));
        assert!(
            written.starts_with(
                r#"{"policyName":"Static","machineState":{"0":{"numberOfAssignments":2,"memoryMap":{"hugepages-2Mi":{"total":0,"systemReserved":0,"allocatable":0,"reserved":0,"free":0},"memory":{"total":1000,"systemReserved":100,"allocatable":900,"reserved":50,"free":850}},"cells":[0,1]}"#
            ),
            "{written}"
        );
        // With a container that has none, as Go can write it.
        let theirs = r#"{"policyName":"Static","machineState":{"0":{"numberOfAssignments":2,"memoryMap":{"hugepages-2Mi":{"total":0,"systemReserved":0,"allocatable":0,"reserved":0,"free":0},"memory":{"total":1000,"systemReserved":100,"allocatable":900,"reserved":50,"free":850}},"cells":[0,1]},"1":{"numberOfAssignments":0,"memoryMap":{"memory":{"total":1000,"systemReserved":100,"allocatable":900,"reserved":0,"free":900}},"cells":[1]}},"entries":{"u-1":{"c":[{"numaAffinity":[0,1],"type":"memory","size":50},{"numaAffinity":[0],"type":"hugepages-2Mi","size":7}],"d":null}},"checksum":1146207430}"#;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MEMORY_FILE), theirs).unwrap();
        let read = read_memory(folder.path(), "Static", |_| Ok(())).unwrap();
        assert_eq!(read, Some(memory()));
    }

    #[test]
    fn what_is_written_is_read_and_what_is_not_ours_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let (place, file) = (folder.path(), folder.path().join(CPU_FILE));
        let read = |policy| read_cpus(place, policy, |_| Ok(())).map_err(|e| e.to_string());
        assert_eq!(read("static"), Ok(None));
        let mut before = Vec::new();
        let text = encode_cpus("static", &cpus());
        write(place, CPU_FILE, &text, &mut before).unwrap();
        assert_eq!(read("static"), Ok(Some(cpus())));
        let said = read("none").unwrap_err();
        assert_eq!(
            said,
            format!(
                "could not restore state from checkpoint: configured policy \"none\" differs from \
                 state checkpoint policy \"static\", please drain this node and delete the CPU \
                 manager checkpoint file {file:?} before restarting"
            )
        );
        let checked = read_cpus(place, "static", |_| Err("no such CPU".into())).unwrap_err();
        assert!(checked.to_string().contains("no such CPU"), "{checked}");
        for (old, new) in [("0,3-7", "0,3-6"), ("{", "["), ("\"0,3-7\"", "\"x\"")] {
            let text = String::from_utf8(text.clone()).unwrap().replacen(old, new, 1);
            std::fs::write(&file, text).unwrap();
            assert!(read("static").unwrap_err().contains("corrupted"), "{new}");
        }
        // Without a checksum, as an old kubelet, and before the policy began.
        std::fs::write(&file, r#"{"policyName":"static","defaultCpuSet":"0-1"}"#).unwrap();
        assert_eq!(read("static").unwrap().unwrap().shared.len(), 2);
        std::fs::write(&file, r#"{"policyName":"none","defaultCpuSet":"","checksum":1353318690}"#)
            .unwrap();
        assert_eq!(read("none"), Ok(None));
    }
}
