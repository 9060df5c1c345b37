//! What this machine is and has left: read from /proc, /sys and statfs.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cri_shim::api::ImageFsInfoResponse;
use nix::sys::statvfs::statvfs;

use super::cpu_set::CpuSet;
use crate::eviction::Disks;
use crate::pod::cgroup::usage::Mounts;
use crate::runtime::{Runtime, image_dir, layer_dir};

/// What does not change while the machine runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Logical CPUs online.
    pub cpus: u64,
    /// Physical memory, bytes.
    pub memory: u64,
    /// Swap, bytes.
    pub swap: u64,
    /// Huge pages: page size in bytes to bytes set aside.
    pub hugepages: BTreeMap<u64, u64>,
    /// /etc/machine-id.
    pub machine_id: String,
    /// DMI product UUID.
    pub system_uuid: String,
    /// Identifies this boot.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel_version: String,
    /// PRETTY_NAME of os-release.
    pub os_image: String,
    /// Go's name of the architecture (`amd64`).
    pub architecture: &'static str,
}

/// Room on a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// Size, bytes.
    pub capacity: u64,
    /// Free for everybody, bytes.
    pub available: u64,
    /// Inodes; 0 where the file system has no fixed number.
    pub inodes: u64,
    /// Inodes free.
    pub inodes_free: u64,
}

/// What changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Memory that nobody uses or that could be dropped at once, bytes: what kubelet tells of a node.
    /// `None` where it cannot be read.
    pub memory_available: Option<u64>,
    /// Memory that all pods together may use still, and may use at all, bytes; `None` where nothing
    /// bounds them.
    pub pods_memory: Option<(u64, u64)>,
    /// File system of the root dir.
    pub nodefs: Option<FileSystem>,
    /// File system of images.
    pub imagefs: Option<FileSystem>,
    /// Most processes and threads at once.
    pub pid_max: Option<u64>,
    /// Processes and threads there are.
    pub pids: Option<u64>,
}

fn text(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Reads /proc/meminfo: field to bytes.
fn meminfo(text: &str) -> BTreeMap<&str, u64> {
    text.lines()
        .filter_map(|line| {
            let (field, rest) = line.split_once(':')?;
            let mut words = rest.split_whitespace();
            let number: u64 = words.next()?.parse().ok()?;
            let unit = if words.next() == Some("kB") { 1024 } else { 1 };
            Some((field, number * unit))
        })
        .collect()
}

/// What a node has left of its memory by kubelet's count, which takes files in use for used.
fn available(meminfo: &BTreeMap<&str, u64>) -> Option<u64> {
    Some(meminfo.get("MemFree")? + meminfo.get("Inactive(file)").copied().unwrap_or(0))
}

impl Machine {
    /// Reads it; what cannot be read is empty.
    pub fn read() -> Self {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = meminfo(&memory);
        let field = |name| memory.get(name).copied().unwrap_or(0);
        let release = fs::read_to_string("/etc/os-release")
            .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
            .unwrap_or_default();
        let machine_id = text("/etc/machine-id")
            .or_else(|| text("/var/lib/dbus/machine-id"))
            .unwrap_or_default();
        let system_uuid = text("/sys/class/dmi/id/product_uuid")
            .or_else(|| text("/proc/device-tree/vm,uuid"))
            .unwrap_or_else(|| machine_id.clone());
        Self {
            cpus: nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)
                .ok()
                .flatten()
                .and_then(|n| u64::try_from(n).ok())
                .unwrap_or(1),
            memory: field("MemTotal"),
            swap: field("SwapTotal"),
            hugepages: hugepages(Path::new("/sys/kernel/mm/hugepages")),
            machine_id,
            system_uuid,
            boot_id: text("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            kernel_version: text("/proc/sys/kernel/osrelease").unwrap_or_default(),
            os_image: pretty_name(&release),
            architecture: architecture(),
        }
    }
}

/// Go's name for the architecture that this was built for.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

fn pretty_name(release: &str) -> String {
    release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map(|name| name.trim_matches(['"', '\'']).to_owned())
        .unwrap_or_else(|| "Linux".to_owned())
}

fn hugepages(dir: &Path) -> BTreeMap<u64, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let size = name.to_string_lossy();
        let size = size.strip_prefix("hugepages-").and_then(|s| s.strip_suffix("kB"));
        let Some(size) = size.and_then(|s| s.parse::<u64>().ok()) else { continue };
        let count = fs::read_to_string(entry.path().join("nr_hugepages")).ok();
        let count: u64 = count.and_then(|c| c.trim().parse().ok()).unwrap_or(0);
        found.insert(size * 1024, size * 1024 * count);
    }
    found
}

/// Whether the node has swap that is on (/proc/swaps: a line for each, below the heading).
pub fn swap_is_on() -> bool {
    fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1)
}

/// The CPUs that are online; none where that cannot be read.
pub fn online_cpus() -> CpuSet {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}

/// Whether cgroup v2 has all controllers.
pub fn is_unified() -> bool {
    cgroups_rs::fs::hierarchies::is_cgroup2_unified_mode()
}

/// Whether this node's cgroups bound the swap of containers.
pub fn swap_controller() -> bool {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("memory/memory.memsw.limit_in_bytes").exists() {
        return true;
    }
    // The root has no such file; with swap accounting every other cgroup has.
    let file = "memory.swap.max";
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).map(str::to_owned);
    let others = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    own.map(|own| root.join(own)).into_iter().chain(others).any(|dir| dir.join(file).exists())
}

/// Most processes and threads at once.
pub fn pid_max() -> Option<u64> {
    let number = |path| text(path).and_then(|t| t.parse::<u64>().ok());
    let most = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].map(number);
    most.into_iter().flatten().min()
}

/// Room on the file system that holds `path`, or its nearest existing parent.
pub fn file_system(path: &Path) -> Option<FileSystem> {
    let stat = path.ancestors().find_map(|p| statvfs(p).ok())?;
    let block = stat.fragment_size();
    Some(FileSystem {
        capacity: stat.blocks() * block,
        available: stat.blocks_available() * block,
        inodes: stat.files(),
        inodes_free: stat.files_free(),
    })
}

/// Where to measure.
#[derive(Clone, Debug)]
pub struct Places {
    root_dir: PathBuf,
    /// The cgroup of all pods, relative to the hierarchies.
    pods: Option<(Mounts, String)>,
    /// Where the runtime keeps images.
    image_dir: Option<PathBuf>,
    /// Where the runtime keeps the containers' writable layers, if it says.
    layer_dir: Option<PathBuf>,
}

impl Places {
    /// The root directory, and the cgroup of all pods where there is one.
    pub fn new(root_dir: &Path, pods: Option<String>) -> Self {
        let pods = pods.map(|folder| (Mounts::find(), folder));
        Self { root_dir: root_dir.to_owned(), pods, image_dir: None, layer_dir: None }
    }

    /// Learns of `runtime` where it keeps images and layers, once.
    pub async fn find(&mut self, runtime: &dyn Runtime) {
        if self.image_dir.is_none()
            && let Ok(info) = runtime.image_fs_info().await
        {
            self.learn(&info);
        }
    }

    /// Takes what the runtime says of where it keeps images and layers.
    pub fn learn(&mut self, info: &ImageFsInfoResponse) {
        (self.image_dir, self.layer_dir) = (image_dir(info), layer_dir(info));
    }

    /// On which file systems what lies, by their devices.
    pub fn disks(&self) -> Disks {
        let device = |path: &Path| path.metadata().ok().map(|meta| meta.dev());
        let node = device(&self.root_dir);
        let Some(images) = self.image_dir.as_deref().and_then(device) else { return Disks::One };
        let layers = self.layer_dir.as_deref().and_then(device).unwrap_or(images);
        match (Some(images) == node, images == layers) {
            (true, _) => Disks::One,
            (false, true) => Disks::ImagesApart,
            (false, false) => Disks::ImagesAlone,
        }
    }
}

impl Measured {
    /// Measures now.
    pub fn read(places: &Places) -> Self {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            memory_available: available(&meminfo(&memory)),
            pods_memory: places.pods.as_ref().and_then(|(mounts, folder)| {
                let usage = mounts.read(folder)?;
                let limit = usage.memory_limit?;
                Some((limit.saturating_sub(usage.working_set()), limit))
            }),
            nodefs: file_system(&places.root_dir),
            imagefs: places.image_dir.as_deref().and_then(file_system),
            pid_max: pid_max(),
            pids: load
                .split_whitespace()
                .nth(3)
                .and_then(|tasks| tasks.split_once('/')?.1.parse().ok()),
        }
    }
}

/// The addresses that the default routes leave from, IPv4 first; no packet is sent.
pub fn default_addresses() -> Vec<IpAddr> {
    // Documentation addresses (RFC 5737, RFC 3849): only the routing table is asked.
    [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")]
        .into_iter()
        .filter_map(|(from, to)| {
            let socket = UdpSocket::bind(from).ok()?;
            socket.connect(to).ok()?;
            Some(socket.local_addr().ok()?.ip())
        })
        .filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_what_every_machine_has() {
        let machine = Machine::read();
        assert!(machine.cpus > 0 && machine.memory > 1 << 20, "{machine:?}");
        assert!(!machine.kernel_version.is_empty() && !machine.boot_id.is_empty());
        let measured = Measured::read(&Places::new(Path::new("/no/such/folder"), None));
        assert!(measured.memory_available.is_some_and(|m| m < machine.memory));
        assert!(measured.nodefs.is_some_and(|fs| fs.capacity > 0));
        assert!(measured.pids.is_some() && measured.pid_max.is_some());
    }

    #[test]
    fn release_names_are_read_with_any_quotes() {
        assert_eq!(pretty_name("ID=x\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
        assert_eq!(pretty_name("PRETTY_NAME='A'"), "A");
        assert_eq!(pretty_name(""), "Linux");
    }
}
