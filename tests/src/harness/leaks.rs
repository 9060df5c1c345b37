//! What a node must not leave behind: mounts, network namespaces, links, cgroups, processes,
//! packet filter tables.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::command::{command_line, parent_of, processes_of, run};

/// The cgroup hierarchies of this machine: one for v2, one for each v1 controller.
pub fn hierarchies() -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
            kind.starts_with("cgroup").then(|| PathBuf::from(path))
        })
        .collect()
}

/// Makes `name` in every hierarchy; a cpuset is given all CPUs.
pub fn create_cgroups(name: &str) -> std::io::Result<()> {
    for hierarchy in hierarchies() {
        let path = hierarchy.join(name);
        std::fs::create_dir_all(&path)?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if path.join(file).exists() && hierarchy.join(file).exists() {
                let all = std::fs::read_to_string(hierarchy.join(file))?;
                std::fs::write(path.join(file), all)?;
            }
        }
    }
    Ok(())
}

/// Removes every cgroup whose name starts with `prefix`, deepest first.
pub fn remove_cgroups(prefix: &str) {
    for hierarchy in hierarchies() {
        for entry in std::fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                remove_tree(&entry.path());
            }
        }
    }
}

/// Loop devices over files of the lab `id`, which have its name before a dot.
pub fn loops(id: &str) -> Vec<PathBuf> {
    let of_lab = |entry: std::fs::DirEntry| {
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        file.contains(&format!("{id}.")).then(|| Path::new("/dev").join(entry.file_name()))
    };
    std::fs::read_dir("/sys/block").into_iter().flatten().flatten().filter_map(of_lab).collect()
}

/// Detaches them: they would outlive all else of a test.
pub fn detach_loops(id: &str) {
    for device in loops(id) {
        let _ = run(&format!("losetup --detach {}", device.display()));
    }
}

fn remove_tree(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // A process that is just dying holds it for an instant.
    for _ in 0..50 {
        if std::fs::remove_dir(path).is_ok() || !path.exists() {
            return;
        }
        std::thread::park_timeout(std::time::Duration::from_millis(10));
    }
}

/// A snapshot of what exists in a node's namespaces, as sorted lines that a test can compare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// One line per thing: `mount /x`, `link veth1`, `cgroup kubepods/pod1`, ...
    pub things: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at the namespaces of `init` (PID 1 of a node), its network namespace `netns` and the
    /// cgroup `cgroup`.
    pub fn take(init: u32, netns: &str, cgroup: &str) -> Self {
        let mut things = BTreeSet::new();
        let mounts = std::fs::read_to_string(format!("/proc/{init}/mounts")).unwrap_or_default();
        for line in mounts.lines() {
            things.insert(format!("mount {}", line.split(' ').nth(1).unwrap_or_default()));
        }
        let links = run(&format!("ip -n {netns} -o link")).unwrap_or_default();
        for line in links.lines() {
            let name = line.split(": ").nth(1).unwrap_or_default();
            things.insert(format!("link {}", name.split('@').next().unwrap_or_default()));
        }
        for hierarchy in hierarchies() {
            walk_cgroups(&hierarchy.join(cgroup), "", &mut things);
        }
        for pid in processes_of(init) {
            let line = command_line(pid);
            let parent = parent_of(pid).map(command_line).unwrap_or_default();
            // The node's own: longshore with the process that it starts monitors from, or others'
            // daemons, and what the harness runs.
            let own = |line: &str| {
                line.contains(" run --hostname-override")
                    || line == "containerd"
                    || ["/kubelet ", "/kube-proxy "].iter().any(|p| line.contains(p))
            };
            let zygote = line == "longshore monitor" && own(&parent);
            if !(line.is_empty() || line == "sleep 100000" || own(&line) || zygote) {
                things.insert(format!("process {line}"));
            }
        }
        let tables = run(&format!("ip netns exec {netns} nft list tables")).unwrap_or_default();
        things.extend(tables.lines().map(|t| format!("nft {t}")));
        let root = format!("/proc/{init}/root");
        for folder in ["run/longshore/netns", "var/lib/kubelet/pods"] {
            let path = Path::new(&root).join(folder);
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                things.insert(format!("file /{folder}/{}", entry.file_name().to_string_lossy()));
            }
        }
        Self { things }
    }

    /// What is there now and was not in `before`. Only things that belong to pods: the node's own
    /// (its bridge, its tables, the QoS cgroups) stay as long as it runs.
    pub fn left_by_pods(&self, before: &Self) -> Vec<String> {
        self.things
            .difference(&before.things)
            .filter(|thing| {
                let own_link = thing.starts_with("link ") && !thing.starts_with("link veth");
                let own_cgroup = thing.starts_with("cgroup ") && !thing.contains("pod");
                let qos =
                    ["cgroup kubepods", "cgroup kubepods/burstable", "cgroup kubepods/besteffort"]
                        .contains(&thing.as_str());
                let own_mount = thing.starts_with("mount ")
                    && !["/pods/", "/netns/", "/containers/", "/snapshots/", "/overlay"]
                        .iter()
                        .any(|p| thing.contains(p));
                !(own_link || own_cgroup || qos || own_mount || thing.starts_with("nft "))
            })
            .cloned()
            .collect()
    }

    /// What is there now and was not in `before`.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        self.things.difference(&before.things).cloned().collect()
    }
}

fn walk_cgroups(path: &Path, name: &str, things: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            let child = entry.file_name().to_string_lossy().into_owned();
            let name = if name.is_empty() { child } else { format!("{name}/{child}") };
            walk_cgroups(&entry.path(), &name, things);
            things.insert(format!("cgroup {name}"));
        }
    }
}
