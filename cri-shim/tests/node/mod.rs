//! A server of the tests' own with real containers: needs root and `busybox-static`.
//!
//! Each test has its server in a mount namespace and a cgroup of its own, with its state in a
//! temporary directory; pods use the node's network, so that no test touches it.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cri_shim::api::image_service_client::ImageServiceClient;
use cri_shim::api::runtime_service_client::RuntimeServiceClient;
use cri_shim::api::*;
use cri_shim::image::{ImageStore, ImportSource, StoreConfig};
use sha2::{Digest, Sha256};
use tonic::transport::{Channel, Endpoint, Uri};

pub const IMAGE: &str = "localhost/busybox:test";

/// A server and its client.
pub struct Node {
    pub root: tempfile::TempDir,
    name: String,
    pub server: Child,
    pub runtime: RuntimeServiceClient<Channel>,
    /// Keeps the namespaces over restarts of the server.
    pub namespace: Child,
    /// The server's program.
    pub program: PathBuf,
    pub setup: Setup,
}

/// What the server is told, of the node's directory.
pub type Arguments = Box<dyn Fn(&Path) -> Vec<String> + Send + Sync>;

/// How a node differs from the others.
#[derive(Default)]
pub struct Setup {
    /// A network namespace of its own, in which pods get their networks.
    pub own_network: bool,
    /// What the next server finds in its environment, but not the one after it.
    pub environment: Vec<(String, String)>,
    /// The size and number of log files, when the monitors are to rotate them.
    pub rotation: Option<(u32, u32)>,
    /// More arguments of the server, which are told the node's directory.
    pub arguments: Option<Arguments>,
}

impl Node {
    pub async fn start() -> anyhow::Result<Node> {
        Node::start_with(Setup::default()).await
    }

    /// A node with a network of its own, where pods can have theirs. From now on the calling thread
    /// is in it too.
    pub async fn start_networked() -> anyhow::Result<Node> {
        let setup = Setup { own_network: true, ..Setup::default() };
        let node = Self::start_with(setup).await?;
        let network = fs::File::open(format!("/proc/{}/ns/net", node.namespace.id()))?;
        nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(node)
    }

    pub async fn start_with(setup: Setup) -> anyhow::Result<Node> {
        let root = tempfile::Builder::new().prefix("ls").tempdir_in("/tmp")?;
        // As a node's directories are: what is in them is closed, they can be passed.
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o711))?;
        let store = ImageStore::open_shared(StoreConfig::new(root.path().join("state")))?;
        let archive = root.path().join("busybox.tar");
        write_image(&archive)?;
        store.import(ImportSource::File(archive)).await?;
        let script = if setup.own_network {
            "ip link set lo up; echo; exec sleep 1000"
        } else {
            "echo; exec sleep 1000"
        };
        let mut namespace = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .args(setup.own_network.then_some("--net"))
            .args(["sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()?;
        if let Some(stdout) = namespace.stdout.as_mut() {
            std::io::Read::read_exact(stdout, &mut [0u8; 1])?;
        }
        // For figures: a program that was built otherwise.
        let program = std::env::var_os("LONGSHORE_CRI")
            .map_or_else(|| env!("CARGO_BIN_EXE_longshore-cri").into(), PathBuf::from);
        let mut setup = setup;
        let server = serve(&program, root.path(), &namespace, &setup)?;
        setup.environment.clear();
        let name = root.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Nobody listens yet; `connected` waits for that.
        let runtime = RuntimeServiceClient::new(lazily(root.path()));
        let mut node = Node { root, name, server, runtime, namespace, program, setup };
        node.connected().await?;
        Ok(node)
    }

    /// Kills the server without warning and starts another.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.server.kill()?;
        self.server.wait()?;
        self.serve_again().await
    }

    /// Starts a server in the place of one that has ended.
    pub async fn serve_again(&mut self) -> anyhow::Result<()> {
        self.server = serve(&self.program, self.root.path(), &self.namespace, &self.setup)?;
        self.setup.environment.clear();
        self.connected().await
    }

    /// Waits until the server answers; starts another in the place of one that ends before.
    async fn connected(&mut self) -> anyhow::Result<()> {
        for _ in 0..3 {
            let server = &mut self.server;
            let gone = async {
                while matches!(server.try_wait(), Ok(None)) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let connected = tokio::select! {
                connected = connect(self.root.path()) => Some(connected?),
                () = gone => None,
            };
            if let Some(channel) = connected {
                self.runtime =
                    RuntimeServiceClient::new(channel).max_decoding_message_size(64 << 20);
                return Ok(());
            }
            self.server = serve(&self.program, self.root.path(), &self.namespace, &self.setup)?;
        }
        anyhow::bail!("the server ends before it answers")
    }

    /// Runs a shell command in the node's mount namespace.
    pub fn shell(&self, script: &str) -> anyhow::Result<String> {
        let pid = self.namespace.id().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--mount", "--", "sh", "-ec", script]);
        let output = command.output()?;
        anyhow::ensure!(output.status.success(), "{script}: {output:?}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Puts an image on the node: busybox with one more layer for each list of entries.
    pub async fn add_image(&self, name: &str, layers: &[Vec<Entry<'_>>]) -> anyhow::Result<()> {
        self.add_declaring(name, layers, &[]).await
    }

    /// The same, with volumes that the image declares.
    pub async fn add_declaring(
        &self,
        name: &str,
        layers: &[Vec<Entry<'_>>],
        volumes: &[&str],
    ) -> anyhow::Result<()> {
        let store = ImageStore::open_shared(StoreConfig::new(self.root.path().join("state")))?;
        let archive = self.root.path().join("more.tar");
        write_layers(&archive, name, layers, volumes)?;
        store.import(ImportSource::File(archive)).await?;
        Ok(())
    }

    pub fn cgroup(&self) -> String {
        format!("/{}", self.name)
    }

    pub async fn sandbox(
        &mut self,
        pid: NamespaceMode,
    ) -> anyhow::Result<(String, PodSandboxConfig)> {
        self.sandbox_with(pid, "").await
    }

    /// A sandbox of a runtime handler.
    pub async fn sandbox_with(
        &mut self,
        pid: NamespaceMode,
        handler: &str,
    ) -> anyhow::Result<(String, PodSandboxConfig)> {
        let options = NamespaceOption {
            network: NamespaceMode::Node as i32,
            pid: pid as i32,
            ..Default::default()
        };
        self.sandbox_of("pod", options, handler, |_| {}).await
    }

    /// A sandbox whose config `change` has the last word about.
    pub async fn sandbox_of(
        &mut self,
        name: &str,
        options: NamespaceOption,
        handler: &str,
        change: impl FnOnce(&mut LinuxPodSandboxConfig),
    ) -> anyhow::Result<(String, PodSandboxConfig)> {
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                namespace: "default".into(),
                uid: "uid".into(),
                attempt: 0,
            }),
            log_directory: self.root.path().join("logs").display().to_string(),
            labels: [("app".to_owned(), "test".to_owned())].into(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        config.linux.as_mut().map(change);
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        Ok((id, config))
    }

    /// A sandbox with a network of its own.
    pub async fn networked(&mut self, name: &str) -> anyhow::Result<(String, PodSandboxConfig)> {
        let config = networked_config(name, &self.root.path().join("logs"), self.cgroup());
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let id = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        Ok((id, config))
    }

    /// Kills all monitors.
    pub fn end_monitors(&self) {
        for entry in fs::read_dir(self.root.path().join("run/m")).into_iter().flatten().flatten() {
            end_monitor(&entry.path());
        }
    }

    /// Takes away what a reboot takes: everything below the run directory.
    pub fn forget_run_directory(&self) -> anyhow::Result<()> {
        let script = "for m in $(cut -d' ' -f5 /proc/self/mountinfo | grep \"^$0/\" | sort -r); \
                      do umount -l $m; done; rm -rf $0";
        let status = Command::new("nsenter")
            .args(["--target", &self.namespace.id().to_string(), "--mount", "sh", "-ec", script])
            .arg(self.root.path().join("run"))
            .status()?;
        anyhow::ensure!(status.success(), "taking the run directory away: {status}");
        Ok(())
    }

    pub async fn create(
        &mut self,
        sandbox: &(String, PodSandboxConfig),
        name: &str,
        script: &str,
    ) -> anyhow::Result<String> {
        self.create_with(sandbox, name, script, |_| {}).await
    }

    /// Creates a container whose config `change` has the last word about.
    pub async fn create_with(
        &mut self,
        sandbox: &(String, PodSandboxConfig),
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> anyhow::Result<String> {
        let pod = sandbox.1.linux.clone().and_then(|l| l.security_context);
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: vec!["sh".into(), "-c".into(), script.into()],
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: pod.and_then(|p| p.namespace_options),
                    seccomp: Some(SecurityProfile::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.0.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.1.clone()),
        };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    pub async fn run(
        &mut self,
        sandbox: &(String, PodSandboxConfig),
        name: &str,
        script: &str,
    ) -> anyhow::Result<String> {
        let id = self.create(sandbox, name, script).await?;
        let request = StartContainerRequest { container_id: id.clone() };
        self.runtime.start_container(request).await?;
        Ok(id)
    }

    pub async fn status(&mut self, id: &str) -> anyhow::Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: false };
        let response = self.runtime.container_status(request).await?.into_inner();
        Ok(response.status.unwrap_or_default())
    }

    pub async fn exited(&mut self, id: &str) -> anyhow::Result<ContainerStatus> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let status = self.status(id).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            anyhow::ensure!(Instant::now() < deadline, "container {id} does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn exec(
        &mut self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<ExecSyncResponse, tonic::Status> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|s| (*s).to_owned()).collect(),
            timeout,
        };
        Ok(self.runtime.exec_sync(request).await?.into_inner())
    }

    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.root.path().join("logs").join(format!("{name}.log")))
            .unwrap_or_default()
    }

    /// Names left in the directories of sandboxes, containers, snapshots, monitors and bundles.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let directories = [
            "state/sandboxes",
            "state/containers",
            "state/snapshots",
            "run/m",
            "run/c",
            "run/netns",
            "run/userns",
        ];
        directories
            .iter()
            .filter_map(|d| fs::read_dir(self.root.path().join(d)).ok())
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = self.namespace.kill();
        let _ = self.namespace.wait();
        self.end_monitors();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let procs = hierarchy.path().join(&self.name);
            kill_and_remove(&procs);
        }
        kill_and_remove(&Path::new("/sys/fs/cgroup").join(&self.name));
    }
}

impl Node {
    /// What is mounted where the server is, as in `/proc/<pid>/mountinfo`.
    pub fn mounts(&self) -> String {
        let path = format!("/proc/{}/mountinfo", self.namespace.id());
        fs::read_to_string(path).unwrap_or_default()
    }
}

/// A pod with a network of its own.
pub fn networked_config(name: &str, logs: &Path, cgroup_parent: String) -> PodSandboxConfig {
    let options = NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            namespace: "default".into(),
            uid: name.into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: logs.display().to_string(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Ends the monitor of a sandbox that a test did not remove.
fn end_monitor(socket: &Path) {
    if let Some(pid) = monitor_pid(socket) {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

/// The process behind a monitor's socket.
pub fn monitor_pid(socket: &Path) -> Option<nix::unistd::Pid> {
    use cri_shim::monitor::frame;
    use cri_shim::monitor::protocol::{Reply, Request, VERSION};
    let stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
    frame::send(&stream, &Request::Hello { version: VERSION }, &[]).ok()?;
    match frame::receive(&stream) {
        Ok(Some(Reply::Hello { pid, .. })) => Some(nix::unistd::Pid::from_raw(pid)),
        _ => None,
    }
}

/// Ends what a failed test left in its own cgroup.
fn kill_and_remove(cgroup: &Path) {
    for child in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            kill_and_remove(&child.path());
        }
    }
    for pid in fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(pid) = pid.parse() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
    // The dying are in it for a moment more, on a busy machine for some.
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(3);
    while std::time::Instant::now() < patience {
        match fs::remove_dir(cgroup) {
            Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => std::thread::yield_now(),
            _ => break,
        }
    }
}

fn serve(program: &Path, root: &Path, namespace: &Child, setup: &Setup) -> anyhow::Result<Child> {
    let pid = namespace.id().to_string();
    let rotation = setup.rotation.map(|(size, files)| [size.to_string(), files.to_string()]);
    Ok(Command::new("nsenter")
        .args(["--target", &pid, "--mount"])
        .args(setup.own_network.then_some("--net"))
        .arg("--")
        .arg(program)
        .args([root.join("state"), root.join("run")])
        .args(rotation.iter().flatten())
        .args(setup.arguments.as_ref().map(|arguments| arguments(root)).unwrap_or_default())
        .envs(setup.environment.iter().map(|(name, value)| (name, value)))
        .spawn()?)
}

/// A channel that connects when it is used.
fn lazily(root: &Path) -> Channel {
    let socket = root.join("run/cri.sock");
    let connector = tower::service_fn(move |_: Uri| {
        let path = socket.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://cri.local").connect_with_connector_lazy(connector)
}

pub async fn connect(root: &Path) -> anyhow::Result<Channel> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let channel = lazily(root);
        let mut images = ImageServiceClient::new(channel.clone());
        if images.list_images(ListImagesRequest::default()).await.is_ok() {
            return Ok(channel);
        }
        anyhow::ensure!(Instant::now() < deadline, "the server does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a layer has: a file with its text, or a symbolic link.
#[derive(Clone, Copy)]
pub enum Entry<'a> {
    File(&'a str, &'a str),
    Link(&'a str, &'a str),
}

/// A docker-archive with busybox alone.
fn write_image(path: &Path) -> anyhow::Result<()> {
    write_layers(path, IMAGE, &[], &[])
}

fn layer_of(entries: &[Entry<'_>]) -> anyhow::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match entry {
            Entry::File(path, text) => {
                header.set_size(text.len() as u64);
                layer.append_data(&mut header, path, text.as_bytes())?;
            }
            Entry::Link(path, target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                layer.append_link(&mut header, path, target)?;
            }
        }
    }
    Ok(layer.into_inner()?)
}

fn write_layers(
    path: &Path,
    name: &str,
    more: &[Vec<Entry<'_>>],
    volumes: &[&str],
) -> anyhow::Result<()> {
    let mut layer = tar::Builder::new(Vec::new());
    layer.append_path_with_name("/bin/busybox", "bin/busybox")?;
    for applet in [
        "sh",
        "sleep",
        "echo",
        "id",
        "cat",
        "true",
        "ps",
        "kill",
        "grep",
        "mkdir",
        "dd",
        "tty",
        "stty",
        "sha256sum",
        "nc",
        "wc",
        "head",
        "tr",
        "setsid",
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let mut layers = vec![layer.into_inner()?];
    for entries in more {
        layers.push(layer_of(entries)?);
    }
    let digest = |layer: &Vec<u8>| -> String {
        let hex = Sha256::digest(layer).iter().map(|b| format!("{b:02x}")).collect::<String>();
        format!("sha256:{hex}")
    };
    let digests: Vec<String> = layers.iter().map(digest).collect();
    let names: Vec<String> = (0..layers.len()).map(|at| format!("layer{at}.tar")).collect();
    let declared: std::collections::HashMap<_, _> =
        volumes.iter().map(|volume| (*volume, serde_json::json!({}))).collect();
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"], "WorkingDir": "/work/here", "Volumes": declared},
        "rootfs": {"type": "layers", "diff_ids": digests},
        "history": [],
    });
    let manifest = serde_json::json!([{
        "Config": "config.json", "RepoTags": [name], "Layers": names,
    }]);
    let mut archive = tar::Builder::new(fs::File::create(path)?);
    let mut files = vec![
        ("config.json".to_owned(), config.to_string().into_bytes()),
        ("manifest.json".to_owned(), manifest.to_string().into_bytes()),
    ];
    files.extend(names.into_iter().zip(layers));
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice())?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}
