//! The machine's topology from sysfs: what is online, and where.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use super::hints::MAX_NODE;
use super::topology::{Node, Place, Topology};
use crate::node::cpu_set::CpuSet;

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// A file cannot be read.
    #[error("read the machine's topology from {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It says something else than it should.
    #[error("the machine's topology in {} is not as expected: {text:?}", path.display())]
    Unexpected {
        /// Which.
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// It does not add up.
    #[error("the machine's topology in {} does not add up: {what}", path.display())]
    Wrong {
        /// Root.
        path: PathBuf,
        /// How.
        what: String,
    },
}

type Result<T> = std::result::Result<T, SysfsError>;

fn text(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(SysfsError::Io { path: path.to_owned(), source }),
    }
}

fn number<T: std::str::FromStr>(path: &Path) -> Result<T> {
    let text = text(path)?;
    text.parse().map_err(|_| SysfsError::Unexpected { path: path.to_owned(), text })
}

fn list(path: &Path) -> Result<CpuSet> {
    number(path)
}

/// The number in a folder's name such as `node3`.
fn numbered(folder: &Path, prefix: &str) -> Vec<(u32, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            Some((name.to_str()?.strip_prefix(prefix)?.parse().ok()?, entry.path()))
        })
        .collect();
    all.sort();
    all
}

/// The topology below `root`, which is `/sys` but in tests.
///
/// # Errors
/// It cannot be read, or does not add up.
pub fn read(root: &Path) -> Result<Topology> {
    let cpu_folder = root.join("devices/system/cpu");
    let online = list(&cpu_folder.join("online"))?;
    let mut nodes = BTreeMap::new();
    let mut node_of = BTreeMap::new();
    for (id, folder) in numbered(&root.join("devices/system/node"), "node") {
        let cpus = list(&folder.join("cpulist"))?.intersection(&online);
        node_of.extend(cpus.iter().map(|cpu| (cpu, id)));
        nodes.insert(id, node(&folder)?);
    }
    let mut cores: BTreeMap<(u32, u32, u32), u32> = BTreeMap::new();
    let mut cpus = BTreeMap::new();
    for cpu in online.iter() {
        let folder = cpu_folder.join(format!("cpu{cpu}/topology"));
        // -1 where the firmware does not say.
        let socket: i64 = number(&folder.join("physical_package_id"))?;
        let socket = u32::try_from(socket).unwrap_or(0);
        let core: u32 = number(&folder.join("core_id"))?;
        // A kernel without NUMA has no nodes; each socket is one then.
        let node = node_of.get(&cpu).copied().unwrap_or(socket);
        nodes.entry(node).or_default();
        // Cores have numbers of their own on each socket only.
        let core = *cores.entry((node, socket, core)).or_insert(cpu);
        cpus.insert(cpu, Place { core, uncore: socket, socket, node });
    }
    let topology = Topology { cpus, nodes };
    check(root, &topology)?;
    with_caches(topology, &cpu_folder)
}

fn check(root: &Path, topology: &Topology) -> Result<()> {
    let wrong = |what: String| Err(SysfsError::Wrong { path: root.to_owned(), what });
    if topology.cpus.is_empty() {
        return wrong("no CPU is online".to_owned());
    }
    if let Some(node) = topology.nodes.keys().find(|node| **node >= MAX_NODE) {
        return wrong(format!("NUMA node {node} is beyond {}", MAX_NODE - 1));
    }
    for (id, node) in &topology.nodes {
        if node.huge_pages.values().sum::<u64>() > node.memory {
            return wrong(format!("NUMA node {id} has more huge pages than memory"));
        }
    }
    Ok(())
}

fn node(folder: &Path) -> Result<Node> {
    let mut huge_pages = BTreeMap::new();
    let sizes = folder.join("hugepages");
    for entry in std::fs::read_dir(&sizes).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let size =
            name.to_str().and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
        let Some(kib) = size.and_then(|size| size.parse::<u64>().ok()) else { continue };
        let count: u64 = number(&entry.path().join("nr_hugepages"))?;
        huge_pages.insert(huge_page_resource(kib), count * kib * 1024);
    }
    let path = folder.join("meminfo");
    let said = text(&path)?;
    let total = said.lines().find_map(|line| {
        let (_, rest) = line.split_once("MemTotal:")?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    let Some(total) = total else { return Err(SysfsError::Unexpected { path, text: said }) };
    let distances = text(&folder.join("distance")).unwrap_or_default();
    let distances = distances.split_whitespace().filter_map(|d| d.parse().ok()).collect();
    Ok(Node { memory: total * 1024, huge_pages, distances })
}

/// `hugepages-2Mi`, as Kubernetes writes 2048 KiB.
fn huge_page_resource(kib: u64) -> String {
    let (mut size, mut units) = (kib, ["Ki", "Mi", "Gi", "Ti"].iter());
    let mut unit = units.next();
    while size >= 1024 && size.is_multiple_of(1024) && units.len() > 0 {
        size /= 1024;
        unit = units.next();
    }
    format!("hugepages-{size}{}", unit.unwrap_or(&""))
}

/// Puts CPUs into their last-level caches, where a node has several.
fn with_caches(mut topology: Topology, folder: &Path) -> Result<Topology> {
    let mut on_node: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for (cpu, place) in &topology.cpus {
        on_node.entry(place.node).or_default().insert(*cpu);
    }
    for (cpu, place) in &mut topology.cpus {
        for (_, cache) in numbered(&folder.join(format!("cpu{cpu}/cache")), "index") {
            if number::<u32>(&cache.join("level"))? < 3 {
                continue;
            }
            let shared = list(&cache.join("shared_cpu_list"))?;
            let all = on_node.get(&place.node).map_or(0, BTreeSet::len);
            if shared.len() != all {
                // The file came with Linux 4.10; without it a cache is known by its first CPU.
                let first = shared.iter().next().unwrap_or(*cpu);
                place.uncore = number(&cache.join("id")).unwrap_or(first);
                break;
            }
        }
    }
    Ok(topology)
}

#[cfg(test)]
mod tests {
    use super::super::topology::{Level, tests::machine};
    use super::*;

    fn put(root: &Path, file: &str, text: impl std::fmt::Display) {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{text}\n")).unwrap();
    }

    /// Writes a machine as the kernel tells of it.
    fn write(root: &Path, topology: &Topology, with_nodes: bool) {
        put(root, "devices/system/cpu/online", topology.all());
        for (cpu, place) in &topology.cpus {
            let folder = format!("devices/system/cpu/cpu{cpu}");
            let first = topology.cpus_of(Level::Socket, place.socket).iter().next().unwrap();
            put(root, &format!("{folder}/topology/physical_package_id"), place.socket);
            put(root, &format!("{folder}/topology/core_id"), place.core - first);
            for (index, level, of) in [(0, 1, Level::Core), (3, 3, Level::Uncore)] {
                let unit = if of == Level::Core { place.core } else { place.uncore };
                put(root, &format!("{folder}/cache/index{index}/level"), level);
                put(root, &format!("{folder}/cache/index{index}/id"), unit);
                let shared = topology.cpus_of(of, unit);
                put(root, &format!("{folder}/cache/index{index}/shared_cpu_list"), shared);
            }
        }
        for (id, node) in topology.nodes.iter().filter(|_| with_nodes) {
            let folder = format!("devices/system/node/node{id}");
            put(root, &format!("{folder}/cpulist"), topology.cpus_of(Level::Node, *id));
            let kib = node.memory / 1024;
            put(
                root,
                &format!("{folder}/meminfo"),
                format!("Node {id} MemTotal: {kib} kB\nNode {id} MemFree: 1 kB"),
            );
            let distances: Vec<_> = node.distances.iter().map(u64::to_string).collect();
            put(root, &format!("{folder}/distance"), distances.join(" "));
            put(root, &format!("{folder}/hugepages/hugepages-2048kB/nr_hugepages"), 512);
        }
    }

    #[test]
    fn machines_are_read_as_they_are() {
        for (shape, caches) in [([1, 1, 2, 1], 1), ([2, 1, 4, 2], 1), ([2, 2, 4, 2], 2)] {
            let root = tempfile::tempdir().unwrap();
            let mut topology = machine(shape, caches);
            write(root.path(), &topology, true);
            if caches == 1 {
                // One that all of the node share says nothing.
                topology.cpus.values_mut().for_each(|place| place.uncore = place.socket);
            }
            assert_eq!(read(root.path()).unwrap(), topology, "{shape:?}");
        }
    }

    #[test]
    fn what_is_offline_is_not_there_and_sockets_are_nodes_without_numa() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &machine([2, 1, 2, 1], 1), false);
        put(root.path(), "devices/system/cpu/online", "0-2");
        let topology = read(root.path()).unwrap();
        assert_eq!(topology.all().to_string(), "0-2");
        assert_eq!(topology.cpus_of(Level::Node, 1).to_string(), "2");
        assert_eq!(topology.nodes[&1], Node::default());
    }

    #[test]
    fn what_does_not_add_up_is_refused() {
        for (file, text, said) in [
            ("devices/system/cpu/online", "", "no CPU is online"),
            ("devices/system/cpu/cpu0/topology/core_id", "x", "core_id is not as expected: \"x\""),
            ("devices/system/node/node0/meminfo", "nothing", "meminfo is not as expected"),
            ("devices/system/node/node0/meminfo", "Node 0 MemTotal: 1 kB", "more huge pages"),
        ] {
            let root = tempfile::tempdir().unwrap();
            write(root.path(), &machine([1, 1, 2, 1], 1), true);
            put(root.path(), file, text);
            let error = read(root.path()).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let nowhere = read(Path::new("/nonexistent")).unwrap_err();
        assert!(
            nowhere.to_string().contains("/nonexistent/devices/system/cpu/online"),
            "{nowhere}"
        );
    }

    #[test]
    fn huge_pages_are_named_as_kubernetes_names_them() {
        for (kib, name) in [(64, "64Ki"), (2048, "2Mi"), (1 << 20, "1Gi"), (16 << 20, "16Gi")] {
            assert_eq!(huge_page_resource(kib), format!("hugepages-{name}"));
        }
    }

    #[test]
    fn this_machine_has_a_topology() {
        let topology = read(Path::new("/sys")).unwrap();
        assert!(topology.cpus.len() >= topology.count(Level::Core));
    }
}
