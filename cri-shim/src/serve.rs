//! The server: binds the CRI socket, recovers what an earlier shim left, and serves until told to
//! stop.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

use crate::Config;
use crate::api::image_service_server::ImageServiceServer;
use crate::api::runtime_service_server::RuntimeServiceServer;
use crate::apparmor::AppArmor;
use crate::cgroup::{Hierarchies, ROOT};
use crate::cri::{Events, Levels, Service, Shim, Store, UsernsSupport};
use crate::image::{ImageStore, StoreConfig};
use crate::network::{Network, NetworkConfig};
use crate::seccomp::Programs;
use crate::selinux::SeLinux;
use crate::snapshot::SnapshotStore;
use crate::spec::Host;
use crate::state::durability::Durability;
use crate::state::{Layout, boot_id};
use crate::streaming::{StreamError, Streaming, Urls};
use crate::systemd::Systemd;
use crate::traces::Traces;
use crate::zygote::Zygote;

/// The longest request or answer, in bytes: 16 MiB of each stream of an ExecSync, and room.
const MAX_MESSAGE: usize = 40 << 20;

/// How long verbs under way get to answer once the server is told to stop.
const LAST_ANSWERS: std::time::Duration = std::time::Duration::from_secs(1);

/// Why the server could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A directory of the shim could not be made or used.
    #[error(
        "preparing {path} failed: {source}; check that it is writable and on a local file system"
    )]
    Directory { path: PathBuf, source: io::Error },
    /// The machine has no cgroups where they are expected.
    #[error("reading the cgroup hierarchies at {ROOT} failed: {0}; mount cgroup2 there")]
    Cgroups(io::Error),
    /// The monitor program could not be started.
    #[error("starting {path} as monitor failed: {source}")]
    Zygote { path: PathBuf, source: io::Error },
    /// The image store could not be opened.
    #[error(transparent)]
    Images(#[from] crate::image::ImageError),
    /// The snapshots could not be opened.
    #[error(transparent)]
    Snapshots(#[from] crate::snapshot::SnapshotError),
    /// The pod network could not be set up.
    #[error(transparent)]
    Network(#[from] crate::network::NetworkError),
    /// A pod CIDR of the configuration is not one.
    #[error("pod CIDR {0:?} is not a CIDR such as 10.244.1.0/24")]
    PodCidr(String),
    /// The CRI socket could not be bound.
    #[error("binding the CRI socket {path} failed: {source}; is another shim running?")]
    Bind { path: PathBuf, source: io::Error },
    /// The streaming server could not be started.
    #[error(transparent)]
    Streaming(#[from] StreamError),
    /// The gRPC server ended with an error.
    #[error("serving the CRI failed: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves the CRI on `config.socket` until `shutdown` resolves. Containers are not touched by
/// its end: their monitors go on, and the next server finds them again.
pub async fn serve(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let (listener, traces) = (bind(&config.socket)?, config.traces);
    let streaming = Streaming::bind(config.streaming.clone()).await?;
    let shim = Arc::new(open(config, streaming.urls()).await?);
    shim.recover().await;
    let service = Service(shim.clone());
    let runtime = RuntimeServiceServer::new(service.clone())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let images = ImageServiceServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let asked = async move {
        shutdown.await;
        stop.send_replace(true);
    };
    let told = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        // A closed channel is as good as the word.
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let server = tonic::transport::Server::builder()
        .layer(Traces { on: traces })
        .add_service(runtime)
        .add_service(images)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), told(stopped.clone()));
    tokio::spawn(asked);
    tokio::spawn(streaming.serve(shim, told(stopped.clone())));
    tokio::select! {
        served = server => served?,
        // Event streams never end by themselves.
        () = async { told(stopped).await; tokio::time::sleep(LAST_ANSWERS).await } => {}
    }
    Ok(())
}

fn bind(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Bind { path: path.to_path_buf(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed(io::ErrorKind::AddrInUse.into()));
    }
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Whoever may talk to it is root on this node.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

async fn open(config: Config, urls: Arc<Urls>) -> Result<Shim, ServeError> {
    let layout = Layout { state: config.state_dir.clone(), run: config.run_dir.clone() };
    layout.create().map_err(|(path, source)| ServeError::Directory { path, source })?;
    let mounts = layout.mounts();
    private_mount(&mounts).map_err(|source| ServeError::Directory { path: mounts, source })?;
    let cgroups = Hierarchies::find().map_err(ServeError::Cgroups)?;
    let durability = Durability::start()
        .map_err(|source| ServeError::Directory { path: layout.state.clone(), source })?;
    let zygote = Zygote::start(config.monitor_exe.clone())
        .map_err(|source| ServeError::Zygote { path: config.monitor_exe.clone(), source })?;
    let folder = layout.run.join("seccomp");
    let programs = Programs::open(folder.clone())
        .map_err(|source| ServeError::Directory { path: folder, source })?;
    let mut store = StoreConfig::new(&config.state_dir);
    store.registry_dirs = config.registry_config_dirs.clone();
    store.pinned = config.pinned_images.clone();
    store.progress_timeout = config.image_pull_progress_timeout;
    let images = ImageStore::open(store)?;
    let snapshots = SnapshotStore::open(&config.state_dir)?;
    let network = open_network(&config).await?;
    let selinux = SeLinux::open();
    let layers = selinux.defaults.as_ref().and_then(|defaults| defaults.layers());
    if let Some(label) = layers.filter(|_| selinux.enabled)
        && let Err(error) = snapshots.label_layers(&label.to_string())
    {
        // A policy may let containers read them all the same.
        tracing::error!(%error, "labelling the images' layers; containers may not be able to run");
    }
    Ok(Shim {
        host: Host { selinux: selinux.enabled, ..look_at_host(&cgroups) },
        selinux,
        levels: Levels::default(),
        apparmor: AppArmor::open(config.apparmor_parser.clone()),
        layout,
        cgroups,
        boot_id: boot_id(),
        images,
        snapshots,
        network,
        zygote,
        store: Store::default(),
        events: Events::default(),
        durability,
        programs,
        urls,
        systemd: Systemd::default(),
        userns: UsernsSupport::default(),
        config,
    })
}

async fn open_network(config: &Config) -> Result<Arc<dyn Network>, ServeError> {
    let mut network = NetworkConfig::new(&config.state_dir);
    network.cni_conf_dir = config.cni_conf_dir.clone();
    network.cni_bin_dirs = config.cni_bin_dirs.clone();
    network.cni_cache_dir = config.cni_cache_dir.clone();
    network.pod_cidrs = config
        .pod_cidrs
        .iter()
        .map(|text| text.parse().map_err(|_| ServeError::PodCidr(text.clone())))
        .collect::<Result<_, _>>()?;
    Ok(crate::network::open(network)?)
}

/// Makes the directory a mount of its own, in which mounts do not propagate.
fn private_mount(path: &Path) -> io::Result<()> {
    if !crate::snapshot::is_mounted(path) {
        mount(
            Some("longshore"),
            path,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=0700,size=1m"),
        )?;
    }
    mount(None::<&str>, path, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    fs::create_dir_all(path.join("rootfs"))?;
    fs::create_dir_all(path.join("shm"))
}

/// Those that every cgroup2 mount of the node's cgroup namespace sets for all of them.
fn cgroup_v2_options() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let here = |line: &&str| line.split(' ').nth(1) == Some(ROOT);
    let options = mounts.lines().rfind(here).and_then(|line| line.split(' ').nth(3));
    let kept = |option: &&str| ["nsdelegate", "memory_recursiveprot"].contains(option);
    options.unwrap_or_default().split(',').filter(kept).map(str::to_owned).collect()
}

/// The kernel's version, as far as it says what there is.
fn kernel() -> (u32, u32) {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut parts = release.split(['.', '-']).map_while(|part| part.parse().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn look_at_host(cgroups: &Hierarchies) -> Host {
    let memory = cgroups.controller("memory", Path::new("/"));
    let swap_accounting = if cgroups.v2 {
        // The root has no such file; a kernel with swap accounting has it in every other cgroup.
        Path::new("/proc/swaps").exists()
    } else {
        memory.join("memory.memsw.limit_in_bytes").exists()
    };
    let hugetlb = if cgroups.v2 {
        fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"))
            .is_ok_and(|c| c.split_whitespace().any(|c| c == "hugetlb"))
    } else {
        Path::new(ROOT).join("hugetlb").exists()
    };
    let capabilities = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        })
        .unwrap_or(0);
    let max_open_files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(_, hard)| hard);
    Host {
        cgroup_v2_options: if cgroups.v2 { cgroup_v2_options() } else { Vec::new() },
        recursive_read_only: kernel() >= (5, 12),
        cgroup_v2: cgroups.v2,
        cgroup_v1: cgroups.v1_controllers(),
        swap_accounting,
        hugetlb,
        // The shim has looked at that.
        selinux: false,
        capabilities,
        max_open_files,
    }
}
