//! What the shim is told from outside: where its socket and state are, and which of the node's
//! facilities it uses.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::streaming::StreamConfig;

pub use crate::monitor::protocol::LogRotation;

/// The node's own state.
const STATE_DIR: &str = "/var/lib/longshore";

/// The shim's configuration. [`Config::default`] is the layout of a node; several nodes on one
/// machine each take their own `state_dir` and `run_dir`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The unix socket the CRI is served on.
    pub socket: PathBuf,
    /// What outlives a reboot: images, snapshots, sandbox and container records.
    pub state_dir: PathBuf,
    /// What a reboot ends: monitor sockets, pinned namespaces, mounts.
    pub run_dir: PathBuf,
    /// Whether spans are made of calls; they go where this process's OpenTelemetry sends them.
    pub traces: bool,
    /// The program re-executed as `longshore monitor`; its `main` must call
    /// [`crate::monitor::main`] before it starts any thread.
    pub monitor_exe: PathBuf,
    /// Which cgroup driver the kubelet's `cgroup_parent` names follow.
    pub cgroup_driver: CgroupDriver,
    /// The parent of sandboxes whose caller gave no `cgroup_parent`.
    pub default_cgroup_parent: String,
    /// Where `Localhost` seccomp profiles are looked up when their name is relative.
    pub seccomp_profile_root: PathBuf,
    /// The addresses the built-in bridge network gives to pods, until `UpdateRuntimeConfig` or
    /// the node's `podCIDR` says otherwise. Textual CIDRs, at most one per family.
    pub pod_cidrs: Vec<String>,
    /// CNI network configurations; the built-in bridge is used when there is none.
    pub cni_conf_dir: PathBuf,
    /// CNI plugin binaries.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Where CNI's library keeps results, which tools and other runtimes read.
    pub cni_cache_dir: PathBuf,
    /// Registry configuration in containerd's `hosts.toml` layout, first existing directory wins.
    pub registry_config_dirs: Vec<PathBuf>,
    /// Images that garbage collection leaves alone: references by tag or digest, and ids.
    pub pinned_images: Vec<String>,
    /// How long a pull may make no progress.
    pub image_pull_progress_timeout: Duration,
    /// External OCI runtimes that pods may ask for by RuntimeClass: handler and program.
    pub runtime_handlers: BTreeMap<String, PathBuf>,
    /// OCI specs that containers of a runtime handler start from, by handler; the empty one is the
    /// default. A handler that is here alone is the built-in runtime with that spec.
    pub base_specs: BTreeMap<String, PathBuf>,
    /// CRIU's program, which checkpoints are made with; none where it is not installed.
    pub criu: Option<PathBuf>,
    /// AppArmor's `apparmor_parser`, which the default profile is loaded with; none where it is not
    /// installed.
    pub apparmor_parser: Option<PathBuf>,
    /// Folders with CDI files; devices of later folders replace those of earlier ones.
    pub cdi_dirs: Vec<PathBuf>,
    /// Where Exec, Attach and PortForward are served.
    pub streaming: StreamConfig,
    /// When the monitors rotate their containers' logs by themselves. Without it logs grow until
    /// the kubelet renames them and has them reopened.
    pub log_rotation: Option<LogRotation>,
}

/// How cgroup parents are named (KubeletConfiguration `cgroupDriver`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// Paths: `/kubepods/burstable/pod<uid>`.
    #[default]
    Cgroupfs,
    /// systemd slice names: `kubepods-burstable-pod<uid>.slice`.
    Systemd,
}

impl Default for Config {
    fn default() -> Self {
        Config::at(PathBuf::from(STATE_DIR), PathBuf::from("/run/longshore"))
    }
}

impl Config {
    /// The runtime handlers that pods may ask for besides the default.
    pub fn handlers(&self) -> impl Iterator<Item = &str> {
        let alone = self.base_specs.keys().filter(|h| !self.runtime_handlers.contains_key(*h));
        self.runtime_handlers.keys().chain(alone).map(String::as_str).filter(|h| !h.is_empty())
    }

    /// Whether pods may ask for a runtime handler; the empty one is the default.
    pub fn has_handler(&self, handler: &str) -> bool {
        handler.is_empty() || self.handlers().any(|known| known == handler)
    }

    /// The default configuration with its state and run directories elsewhere.
    pub fn at(state_dir: PathBuf, run_dir: PathBuf) -> Self {
        Config {
            socket: run_dir.join("cri.sock"),
            // The library's own place is the node's; several nodes on one machine each have theirs.
            cni_cache_dir: if state_dir == Path::new(STATE_DIR) {
                PathBuf::from("/var/lib/cni")
            } else {
                state_dir.join("cni")
            },
            state_dir,
            run_dir,
            traces: false,
            monitor_exe: PathBuf::from("/proc/self/exe"),
            cgroup_driver: CgroupDriver::default(),
            default_cgroup_parent: "/longshore".to_owned(),
            seccomp_profile_root: PathBuf::from("/var/lib/kubelet/seccomp"),
            pod_cidrs: Vec::new(),
            cni_conf_dir: PathBuf::from("/etc/cni/net.d"),
            cni_bin_dirs: vec![PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")],
            registry_config_dirs: vec![
                PathBuf::from("/etc/longshore/certs.d"),
                PathBuf::from("/etc/containerd/certs.d"),
            ],
            pinned_images: Vec::new(),
            image_pull_progress_timeout: Duration::from_secs(300),
            runtime_handlers: installed_runtimes(),
            criu: installed("criu"),
            apparmor_parser: installed("apparmor_parser"),
            base_specs: BTreeMap::new(),
            cdi_dirs: vec![PathBuf::from("/etc/cdi"), PathBuf::from("/var/run/cdi")],
            streaming: StreamConfig::default(),
            log_rotation: None,
        }
    }
}

/// The OCI runtimes that are handlers wherever they are installed.
fn installed_runtimes() -> BTreeMap<String, PathBuf> {
    let find = |name: &str| Some((name.to_owned(), installed(name)?));
    ["runc", "crun"].into_iter().filter_map(find).collect()
}

fn installed(name: &str) -> Option<PathBuf> {
    const DIRECTORIES: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];
    let mut places = DIRECTORIES.iter().map(|directory| Path::new(directory).join(name));
    places.find(|path| path.is_file())
}
