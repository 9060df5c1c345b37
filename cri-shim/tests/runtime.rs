//! The shim as a CRI client sees it, with real containers: needs root and `busybox-static`.
//!
//! Each test has a server of its own, in a mount namespace and a cgroup of its own, with its state
//! in a temporary directory; pods use the node's network, so that no test touches it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cri_shim::api::image_service_client::ImageServiceClient;
use cri_shim::api::runtime_service_client::RuntimeServiceClient;
use cri_shim::api::*;
use cri_shim::image::{ImageStore, ImportSource, StoreConfig};
use sha2::{Digest, Sha256};
use tonic::transport::{Channel, Endpoint, Uri};

const IMAGE: &str = "localhost/busybox:test";

/// A server and its client.
struct Node {
    root: tempfile::TempDir,
    name: String,
    server: Child,
    runtime: RuntimeServiceClient<Channel>,
    /// Keeps the mount namespace over restarts of the server.
    namespace: Child,
}

impl Node {
    async fn start() -> anyhow::Result<Node> {
        let root = tempfile::Builder::new().prefix("ls").tempdir_in("/tmp")?;
        let store = ImageStore::open_shared(StoreConfig::new(root.path().join("state")))?;
        let archive = root.path().join("busybox.tar");
        write_image(&archive)?;
        store.import(ImportSource::File(archive)).await?;
        let namespace = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut namespace = namespace;
        if let Some(stdout) = namespace.stdout.as_mut() {
            std::io::Read::read_exact(stdout, &mut [0u8; 1])?;
        }
        let server = serve(root.path(), &namespace)?;
        let runtime = RuntimeServiceClient::new(connect(root.path()).await?);
        let name = root.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Node { root, name, server, runtime, namespace })
    }

    /// Kills the server without warning and starts another.
    async fn restart(&mut self) -> anyhow::Result<()> {
        self.server.kill()?;
        self.server.wait()?;
        self.server = serve(self.root.path(), &self.namespace)?;
        self.runtime = RuntimeServiceClient::new(connect(self.root.path()).await?);
        Ok(())
    }

    fn cgroup(&self) -> String {
        format!("/{}", self.name)
    }

    async fn sandbox(&mut self, pid: NamespaceMode) -> anyhow::Result<(String, PodSandboxConfig)> {
        let options = NamespaceOption {
            network: NamespaceMode::Node as i32,
            pid: pid as i32,
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "pod".into(),
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
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let id = self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        Ok((id, config))
    }

    async fn create(
        &mut self,
        sandbox: &(String, PodSandboxConfig),
        name: &str,
        script: &str,
    ) -> anyhow::Result<String> {
        let pod = sandbox.1.linux.clone().and_then(|l| l.security_context);
        let config = ContainerConfig {
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
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.0.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.1.clone()),
        };
        Ok(self.runtime.create_container(request).await?.into_inner().container_id)
    }

    async fn run(
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

    async fn status(&mut self, id: &str) -> anyhow::Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.into(), verbose: false };
        let response = self.runtime.container_status(request).await?.into_inner();
        Ok(response.status.unwrap_or_default())
    }

    async fn exited(&mut self, id: &str) -> anyhow::Result<ContainerStatus> {
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

    async fn exec(
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

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.root.path().join("logs").join(format!("{name}.log")))
            .unwrap_or_default()
    }

    /// Names left in the directories of sandboxes, containers, snapshots, monitors and bundles.
    fn leftovers(&self) -> Vec<PathBuf> {
        let directories = [
            "state/sandboxes",
            "state/containers",
            "state/snapshots",
            "run/m",
            "run/c",
            "run/netns",
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
        for entry in fs::read_dir(self.root.path().join("run/m")).into_iter().flatten().flatten() {
            end_monitor(&entry.path());
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let procs = hierarchy.path().join(&self.name);
            kill_and_remove(&procs);
        }
        kill_and_remove(&Path::new("/sys/fs/cgroup").join(&self.name));
    }
}

/// Ends the monitor of a sandbox that a test did not remove.
fn end_monitor(socket: &Path) {
    use cri_shim::monitor::frame;
    use cri_shim::monitor::protocol::{Reply, Request, VERSION};
    let Ok(stream) = std::os::unix::net::UnixStream::connect(socket) else { return };
    let hello = frame::send(&stream, &Request::Hello { version: VERSION }, &[]);
    if hello.is_ok()
        && let Ok(Some(Reply::Hello { pid, .. })) = frame::receive(&stream)
    {
        let pid = nix::unistd::Pid::from_raw(pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
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
    // The dying are in it for a moment more.
    for _ in 0..10_000 {
        match fs::remove_dir(cgroup) {
            Err(e) if e.raw_os_error() == Some(nix::libc::EBUSY) => std::thread::yield_now(),
            _ => break,
        }
    }
}

fn serve(root: &Path, namespace: &Child) -> anyhow::Result<Child> {
    let pid = namespace.id().to_string();
    Ok(Command::new("nsenter")
        .args(["--target", &pid, "--mount", "--", env!("CARGO_BIN_EXE_longshore-cri")])
        .args([root.join("state"), root.join("run")])
        .spawn()?)
}

async fn connect(root: &Path) -> anyhow::Result<Channel> {
    let socket = root.join("run/cri.sock");
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let path = socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://cri.local");
        if let Ok(channel) = endpoint.connect_with_connector(connector).await {
            let mut images = ImageServiceClient::new(channel.clone());
            if images.list_images(ListImagesRequest::default()).await.is_ok() {
                return Ok(channel);
            }
        }
        anyhow::ensure!(Instant::now() < deadline, "the server does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A docker-archive with busybox alone.
fn write_image(path: &Path) -> anyhow::Result<()> {
    let mut layer = tar::Builder::new(Vec::new());
    layer.append_path_with_name("/bin/busybox", "bin/busybox")?;
    for applet in ["sh", "sleep", "echo", "id", "cat", "true", "ps", "kill", "grep", "mkdir"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    let layer = layer.into_inner()?;
    let digest: String = Sha256::digest(&layer).iter().map(|b| format!("{b:02x}")).collect();
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"], "WorkingDir": "/work/here"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        "history": [],
    });
    let manifest = serde_json::json!([{
        "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"],
    }]);
    let mut archive = tar::Builder::new(fs::File::create(path)?);
    for (name, bytes) in [
        ("config.json", config.to_string().into_bytes()),
        ("layer.tar", layer),
        ("manifest.json", manifest.to_string().into_bytes()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice())?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

#[tokio::test]
async fn a_container_from_start_to_removal() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "a", "echo out; pwd; echo err >&2; exit 3").await?;
    let status = node.exited(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at);
    let log = node.log("a");
    assert!(log.contains(" stdout F out\n"), "{log}");
    assert!(log.contains(" stdout F /work/here\n"), "{log}");
    assert!(log.contains(" stderr F err\n"), "{log}");
    // Both may be called again, and on what is gone.
    for _ in 0..2 {
        let stop = StopPodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.stop_pod_sandbox(stop).await?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
        node.runtime.remove_pod_sandbox(remove).await?;
    }
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn a_program_that_cannot_be_run_is_a_start_error() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.0.clone(),
        config: Some(ContainerConfig {
            metadata: Some(ContainerMetadata { name: "bad".into(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: vec!["no-such-program".into()],
            ..Default::default()
        }),
        sandbox_config: Some(pod.1.clone()),
    };
    let id = node.runtime.create_container(request).await?.into_inner().container_id;
    let start = StartContainerRequest { container_id: id.clone() };
    let refused = node.runtime.start_container(start).await.unwrap_err();
    assert!(refused.message().contains("executable file not found"), "{refused}");
    let status = node.status(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    Ok(())
}

#[tokio::test]
async fn exec_gives_output_and_code_and_its_timeout_kills_the_tree() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "a", "sleep 1000").await?;
    let answer = node.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 42"], 0).await?;
    assert_eq!(answer.exit_code, 42);
    assert_eq!(
        (answer.stdout.as_slice(), answer.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    let seccomp = node.exec(&id, &["grep", "Seccomp:", "/proc/self/status"], 0).await?;
    assert!(String::from_utf8_lossy(&seccomp.stdout).contains('2'), "exec runs without a filter");
    let late = node.exec(&id, &["sh", "-c", "sleep 777 & sleep 777"], 1).await.unwrap_err();
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let left = node.exec(&id, &["ps"], 0).await?;
        if !String::from_utf8_lossy(&left.stdout).contains("sleep 777") {
            break;
        }
        anyhow::ensure!(Instant::now() < deadline, "the tree lives on");
    }
    let missing = node.exec(&id, &["no-such-program"], 0).await.unwrap_err();
    assert!(missing.message().contains("not found"), "{missing}");
    Ok(())
}

#[tokio::test]
async fn a_killed_server_finds_its_containers_and_their_exit_codes_again() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let runs = node.run(&pod, "runs", "echo up; exec sleep 1000").await?;
    let ends = node.run(&pod, "ends", "sleep 0.3; exit 9").await?;
    let before = node.status(&runs).await?;
    node.server.kill()?;
    node.server.wait()?;
    let record = node.root.path().join("state/containers").join(&ends).join("exited.json");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !record.exists() {
        anyhow::ensure!(Instant::now() < deadline, "the monitor records no exit");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.restart().await?;
    let after = node.status(&runs).await?;
    assert_eq!(after.state(), ContainerState::ContainerRunning);
    assert_eq!(after.started_at, before.started_at);
    assert_eq!(node.exited(&ends).await?.exit_code, 9);
    // And it is still in charge.
    let answer = node.exec(&runs, &["true"], 0).await?;
    assert_eq!(answer.exit_code, 0);
    let stop = StopContainerRequest { container_id: runs.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    assert_eq!(node.status(&runs).await?.exit_code, 137);
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn leftovers_of_an_interrupted_start_are_cleared() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let root = node.root.path().to_path_buf();
    let id = "a".repeat(64);
    for directory in ["state/sandboxes", "state/containers", "state/snapshots"] {
        fs::create_dir_all(root.join(directory).join(&id))?;
    }
    fs::create_dir_all(root.join("run/c").join(&id[..24]))?;
    node.restart().await?;
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn a_shared_pid_namespace_shows_the_other_container() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Pod).await?;
    let first = node.run(&pod, "first", "exec sleep 4321").await?;
    let second = node.run(&pod, "second", "exec sleep 1234").await?;
    let seen = node.exec(&second, &["ps"], 0).await?;
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    assert!(seen.contains("sleep 4321") && seen.contains("sleep 1234"), "{seen}");
    let stop = StopContainerRequest { container_id: first.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    assert_eq!(node.status(&second).await?.state(), ContainerState::ContainerRunning);
    Ok(())
}

#[tokio::test]
async fn events_tell_what_happened_in_order() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let mut events = node.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "a", "exit 5").await?;
    let remove = async {
        node.exited(&id).await?;
        let remove = RemoveContainerRequest { container_id: id.clone() };
        node.runtime.remove_container(remove).await?;
        Ok::<_, anyhow::Error>(())
    };
    remove.await?;
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let next = tokio::time::timeout(Duration::from_secs(10), events.message()).await??;
        let Some(event) = next else { break };
        if event.container_id == id {
            seen.push(event.container_event_type());
        }
    }
    use ContainerEventType::*;
    assert_eq!(
        seen,
        [
            ContainerCreatedEvent,
            ContainerStartedEvent,
            ContainerStoppedEvent,
            ContainerDeletedEvent
        ]
    );
    Ok(())
}
