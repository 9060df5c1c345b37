//! What outlives what: containers the shim, its upgrades and its unreadable records; nothing a
//! reboot.
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod node;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cri_shim::api::*;
use cri_shim::monitor::frame::{self, Inbox};
use cri_shim::monitor::protocol::Reply;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use node::{Node, Setup};

/// A container that runs, in a pod with its own network.
struct Running {
    node: Node,
    pod: (String, PodSandboxConfig),
    container: String,
    pid: i32,
}

impl Running {
    async fn start() -> anyhow::Result<Self> {
        let mut node = Node::start_with(Setup { own_network: true, ..Setup::default() }).await?;
        let pod = node.networked("pod").await?;
        let container = node.run(&pod, "runs", "exec sleep 1000").await?;
        let pid = pid(&mut node, &container).await?;
        Ok(Running { node, pod, container, pid })
    }

    fn record(&self) -> PathBuf {
        self.state("sandboxes", &self.pod.0).join("sandbox.json")
    }

    fn container_record(&self, name: &str) -> PathBuf {
        self.state("containers", &self.container).join(name)
    }

    fn state(&self, of: &str, id: &str) -> PathBuf {
        self.node.root.path().join("state").join(of).join(id)
    }

    fn lives(&self) -> bool {
        Path::new("/proc").join(self.pid.to_string()).join("exe").exists()
    }

    async fn pods(&mut self) -> anyhow::Result<Vec<PodSandbox>> {
        let listed = self.node.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?;
        Ok(listed.into_inner().items)
    }

    async fn remove_pod(&mut self) -> anyhow::Result<()> {
        let remove = RemovePodSandboxRequest { pod_sandbox_id: self.pod.0.clone() };
        self.node.runtime.remove_pod_sandbox(remove).await?;
        Ok(())
    }

    async fn ends(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.lives() {
            ensure!(Instant::now() < deadline, "the container lives on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

async fn pid(node: &mut Node, container: &str) -> anyhow::Result<i32> {
    let request = ContainerStatusRequest { container_id: container.into(), verbose: true };
    let answer = node.runtime.container_status(request).await?.into_inner();
    let info: serde_json::Value =
        serde_json::from_str(answer.info.get("info").context("no info")?)?;
    Ok(i32::try_from(info["pid"].as_i64().context("no pid")?)?)
}

#[tokio::test]
async fn an_unreadable_sandbox_record_stops_nothing() -> anyhow::Result<()> {
    let mut it = Running::start().await?;
    let record = it.record();
    let good = fs::read(&record)?;
    let newer = String::from_utf8(good.clone())?.replacen("\"version\":1", "\"version\":99", 1);
    for bad in [&b"{\"version\":1,\"id\":"[..], newer.as_bytes()] {
        fs::write(&record, bad)?;
        // The second start finds what the first has set aside.
        for _ in 0..2 {
            it.node.restart().await?;
            assert!(it.pods().await?.is_empty());
            assert!(it.lives(), "the container was stopped");
        }
        let _ = fs::remove_file(record.with_extension("json.bad"));
        if bad.ends_with(b"}") {
            assert_eq!(fs::read(&record)?, bad, "what a newer version wrote was touched");
        }
        fs::write(&record, &good)?;
        it.node.restart().await?;
        assert_eq!(pid(&mut it.node, &it.container).await?, it.pid);
        let answer = it.node.exec(&it.container.clone(), &["cat", "/proc/net/dev"], 0).await?;
        assert!(String::from_utf8_lossy(&answer.stdout).contains("eth0"), "the network is gone");
    }
    // Once nothing of it runs, it is taken away, and the record kept for who wants to know.
    fs::write(&record, "")?;
    let socket = it.node.root.path().join("run/m").join(&it.pod.0[..24]);
    let monitor = node::monitor_pid(&socket).context("no monitor")?;
    kill(monitor, Signal::SIGKILL)?;
    it.node.restart().await?;
    it.ends().await?;
    assert_eq!(it.node.leftovers(), Vec::<PathBuf>::new());
    let kept = format!("state/unreadable/{}-sandbox.json.bad", it.pod.0);
    assert!(it.node.root.path().join(kept).exists());
    Ok(())
}

#[tokio::test]
async fn an_unreadable_container_record_stops_nothing_until_its_pod_ends() -> anyhow::Result<()> {
    let mut it = Running::start().await?;
    fs::write(it.container_record("container.json"), "[]")?;
    for _ in 0..2 {
        it.node.restart().await?;
        assert_eq!(it.pods().await?.len(), 1);
        assert!(it.node.status(&it.container.clone()).await.is_err());
        assert!(it.lives(), "the container was stopped");
    }
    it.remove_pod().await?;
    it.ends().await?;
    it.node.restart().await?;
    assert_eq!(it.node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn torn_records_of_starts_and_ends_are_seen_through() -> anyhow::Result<()> {
    let mut it = Running::start().await?;
    fs::write(it.container_record("started.json"), "{\"pid\":")?;
    it.node.restart().await?;
    let status = it.node.status(&it.container.clone()).await?;
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    assert_eq!(pid(&mut it.node, &it.container).await?, it.pid);
    let ended = it.node.run(&it.pod, "ends", "exit 4").await?;
    it.node.exited(&ended).await?;
    fs::write(it.state("containers", &ended).join("exited.json"), "")?;
    it.node.restart().await?;
    let status = it.node.exited(&ended).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    assert!(it.lives());
    Ok(())
}

/// What a reboot leaves: the state directory, with records of another boot.
#[tokio::test]
async fn after_a_reboot_nothing_runs_and_everything_can_be_removed() -> anyhow::Result<()> {
    let mut it = Running::start().await?;
    let ended = it.node.run(&it.pod, "ended", "exit 4").await?;
    assert_eq!(it.node.exited(&ended).await?.exit_code, 4);
    let created = it.node.create(&it.pod, "created", "exit 5").await?;
    it.node.server.kill()?;
    it.node.server.wait()?;
    it.node.end_monitors();
    kill(Pid::from_raw(it.pid), Signal::SIGKILL)?;
    it.ends().await?;
    it.node.forget_run_directory()?;
    let record = fs::read_to_string(it.record())?;
    let mut value: serde_json::Value = serde_json::from_str(&record)?;
    value["boot_id"] = "another".into();
    fs::write(it.record(), value.to_string())?;
    it.node.serve_again().await?;
    let pods = it.pods().await?;
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0].state(), PodSandboxState::SandboxNotready);
    let status = it.node.exited(&it.container.clone()).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    assert!(status.finished_at >= status.started_at);
    assert_eq!(it.node.status(&ended).await?.exit_code, 4);
    assert_eq!(it.node.status(&created).await?.state(), ContainerState::ContainerCreated);
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", it.node.namespace.id()))?;
    assert!(!mounts.contains(&it.pod.0), "{mounts}");
    // The kubelet makes the pod's next sandbox and removes the old one, in any order.
    let (_, mut config) = it.pod.clone();
    if let Some(metadata) = config.metadata.as_mut() {
        metadata.attempt = 1;
    }
    let next = RunPodSandboxRequest { config: Some(config), ..Default::default() };
    let next = it.node.runtime.run_pod_sandbox(next).await?.into_inner().pod_sandbox_id;
    it.remove_pod().await?;
    let pods = it.pods().await?;
    assert_eq!(pods.iter().map(|p| p.id.as_str()).collect::<Vec<_>>(), [next.as_str()]);
    let remove = RemovePodSandboxRequest { pod_sandbox_id: next };
    it.node.runtime.remove_pod_sandbox(remove).await?;
    assert_eq!(it.node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

/// The monitor's program is removed under it, as a package upgrade does, and another takes over.
#[tokio::test]
async fn an_upgraded_shim_manages_the_monitors_of_the_old_one() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let copies = tempfile::tempdir()?;
    let copy = |name: &str| -> anyhow::Result<PathBuf> {
        let path = copies.path().join(name);
        fs::copy(env!("CARGO_BIN_EXE_longshore-cri"), &path)?;
        Ok(path)
    };
    node.program = copy("old")?;
    node.restart().await?;
    let pod = node.sandbox(NamespaceMode::Pod).await?;
    let first = node.run(&pod, "first", "exec sleep 1000").await?;
    node.program = copy("new")?;
    fs::remove_file(copies.path().join("old"))?;
    node.restart().await?;
    assert_eq!(node.exec(&first, &["true"], 0).await?.exit_code, 0);
    let second = node.run(&pod, "second", "echo second; exit 6").await?;
    assert_eq!(node.exited(&second).await?.exit_code, 6);
    assert!(node.log("second").contains("F second"));
    let stop = StopContainerRequest { container_id: first.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    assert_eq!(node.exited(&first).await?.exit_code, 137);
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

/// A monitor of protocol 1, by a relay that takes from both sides what came later.
#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_of_the_first_protocol_is_managed() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let runs = node.run(&pod, "runs", "exec sleep 1000").await?;
    node.server.kill()?;
    node.server.wait()?;
    let socket = node.root.path().join("run/m").join(&pod.0[..24]);
    let real = node.root.path().join("real");
    fs::rename(&socket, &real)?;
    let listener = std::os::unix::net::UnixListener::bind(&socket)?;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(monitor) = std::os::unix::net::UnixStream::connect(&real) else { return };
            std::thread::spawn(move || relay(client, monitor));
        }
    });
    node.serve_again().await?;
    assert_eq!(node.status(&runs).await?.state(), ContainerState::ContainerRunning);
    let answer = node.exec(&runs, &["echo", "hello"], 0).await?;
    assert_eq!(answer.stdout, b"hello\n");
    let brief = node.run(&pod, "brief", "exit 8").await?;
    assert_eq!(node.exited(&brief).await?.exit_code, 8);
    let reopen = ReopenContainerLogRequest { container_id: runs.clone() };
    node.runtime.reopen_container_log(reopen).await?;
    let stop = StopContainerRequest { container_id: runs.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    assert_eq!(node.exited(&runs).await?.exit_code, 137);
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

/// One conversation. Requests lose what version 1 did not know, and what it refused is refused.
fn relay(client: std::os::unix::net::UnixStream, monitor: std::os::unix::net::UnixStream) {
    use std::os::fd::AsRawFd;
    let (answers, back) = (monitor.try_clone().unwrap(), client.try_clone().unwrap());
    let answering = std::thread::spawn(move || {
        let mut inbox = Inbox::default();
        while let Ok(true) = inbox.fill(&answers) {
            while let Ok(Some(mut reply)) = inbox.take_frame::<serde_json::Value>() {
                if reply["reply"] == "hello" {
                    reply["version"] = 1.into();
                }
                if frame::send(&back, &reply, &[]).is_err() {
                    return;
                }
            }
        }
        let _ = back.shutdown(std::net::Shutdown::Both);
    });
    let mut inbox = Inbox::default();
    while let Ok(true) = inbox.fill(&client) {
        while let Ok(Some(mut request)) = inbox.take_frame::<serde_json::Value>() {
            let op = request["op"].as_str().unwrap_or_default().to_owned();
            if matches!(op.as_str(), "attach" | "close_stdin") {
                let message = format!("not understood: unknown variant `{op}`");
                let _ = frame::send(&client, &Reply::Failed { message }, &[]);
                let _ = client.shutdown(std::net::Shutdown::Both);
                return;
            }
            if let Some(fields) = request.as_object_mut() {
                for later in ["tty", "runtime", "rotation", "force"] {
                    // The terminal of a container was there from the beginning.
                    if later != "tty" || op == "exec" {
                        fields.remove(later);
                    }
                }
            }
            let fds: Vec<_> = inbox.fds.iter().map(AsRawFd::as_raw_fd).collect();
            if frame::send(&monitor, &request, &fds).is_err() {
                return;
            }
            inbox.fds.clear();
        }
    }
    let _ = monitor.shutdown(std::net::Shutdown::Both);
    let _ = answering.join();
}

#[tokio::test]
async fn events_are_told_in_order_with_what_is_left_and_after_a_restart() -> anyhow::Result<()> {
    use ContainerEventType::*;
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let stays = node.run(&pod, "stays", "exec sleep 1000").await?;
    node.restart().await?;
    let mut events = node.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
    let stop = StopContainerRequest { container_id: stays.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    let other = node.run(&pod, "other", "exit 5").await?;
    node.exited(&other).await?;
    for id in [&other, &stays] {
        let remove = RemoveContainerRequest { container_id: id.clone() };
        node.runtime.remove_container(remove).await?;
    }
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    let expected = [
        (&stays, ContainerStoppedEvent),
        (&other, ContainerCreatedEvent),
        (&other, ContainerStartedEvent),
        (&other, ContainerStoppedEvent),
        (&other, ContainerDeletedEvent),
        (&stays, ContainerDeletedEvent),
        (&pod.0, ContainerStoppedEvent),
        (&pod.0, ContainerDeletedEvent),
    ];
    for (id, kind) in expected {
        let next = tokio::time::timeout(Duration::from_secs(20), events.message()).await??;
        let event = next.context("the stream ended")?;
        assert_eq!((&event.container_id, event.container_event_type()), (id, kind));
        let status = event.pod_sandbox_status.as_ref().context("no sandbox status")?;
        assert_eq!(status.id, pod.0);
        let listed = event.containers_statuses.iter().any(|c| c.id == *id);
        let is_there = kind != ContainerDeletedEvent && *id != pod.0;
        assert_eq!(listed, is_there, "{kind:?} of {id}");
        if kind == ContainerStoppedEvent && *id == other {
            let told = event.containers_statuses.iter().find(|c| c.id == other);
            assert_eq!(told.map(|c| c.exit_code), Some(5));
        }
    }
    Ok(())
}

#[tokio::test]
async fn only_an_end_for_want_of_memory_is_called_so() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let limited = |config: &mut ContainerConfig| {
        if let Some(linux) = config.linux.as_mut() {
            linux.resources = Some(LinuxContainerResources {
                memory_limit_in_bytes: 24 << 20,
                memory_swap_limit_in_bytes: 24 << 20,
                ..Default::default()
            });
        }
    };
    let eat = "dd if=/dev/zero of=/dev/null bs=200M count=1";
    let cases = [
        ("itself", format!("exec {eat}"), (137, "OOMKilled")),
        ("child", format!("{eat}; echo survived; exit 0"), (0, "Completed")),
        ("passed-on", eat.to_owned() + "; exit $?", (137, "OOMKilled")),
        ("plain", "kill -9 $$; sleep 1; exit 137".to_owned(), (137, "Error")),
    ];
    for (name, script, expected) in cases {
        let id = node.create_with(&pod, name, &script, limited).await?;
        node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
        let status = node.exited(&id).await?;
        assert_eq!((status.exit_code, status.reason.as_str()), expected, "{name}");
    }
    assert!(node.log("child").contains("survived"));
    // A process of an exec goes alone, and its loss is not the container's when that is stopped.
    let id = node.create_with(&pod, "entered", "exec sleep 1000", limited).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let command: Vec<&str> = eat.split(' ').collect();
    assert_eq!(node.exec(&id, &command, 0).await?.exit_code, 137);
    assert_eq!(node.status(&id).await?.state(), ContainerState::ContainerRunning);
    let stop = StopContainerRequest { container_id: id.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    let status = node.exited(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    Ok(())
}

#[tokio::test]
async fn a_stop_takes_the_shortest_grace_and_ends_what_is_frozen() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let deaf = node.run(&pod, "deaf", "trap '' TERM; sleep 1000").await?;
    let mut other = node.runtime.clone();
    let patient = StopContainerRequest { container_id: deaf.clone(), timeout: 1000 };
    let patient = tokio::spawn(async move { other.stop_container(patient).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node.status(&deaf).await?.state(), ContainerState::ContainerRunning);
    let hasty = StopContainerRequest { container_id: deaf.clone(), timeout: 1 };
    node.runtime.stop_container(hasty.clone()).await?;
    tokio::time::timeout(Duration::from_secs(60), patient).await???;
    assert_eq!(node.status(&deaf).await?.exit_code, 137);
    // Again, and of what is not there.
    node.runtime.stop_container(hasty).await?;
    let nobody = StopContainerRequest { container_id: "0".repeat(64), timeout: 1 };
    node.runtime.stop_container(nobody).await?;

    let frozen = node.run(&pod, "frozen", "sleep 1000 & exec sleep 1000").await?;
    let cgroup = node.cgroup().trim_start_matches('/').to_owned() + "/" + &frozen;
    let v1 = Path::new("/sys/fs/cgroup/freezer").join(&cgroup).join("freezer.state");
    let v2 = Path::new("/sys/fs/cgroup").join(&cgroup).join("cgroup.freeze");
    match v1.exists() {
        true => fs::write(v1, "FROZEN")?,
        false => fs::write(v2, "1")?,
    }
    let stop = StopContainerRequest { container_id: frozen.clone(), timeout: 1 };
    node.runtime.stop_container(stop).await?;
    assert_eq!(node.status(&frozen).await?.exit_code, 137);
    Ok(())
}

#[tokio::test]
async fn an_exec_leaves_no_process_and_its_output_is_whole() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let id = node.run(&pod, "a", "exec sleep 1000").await?;
    // What stays behind holds the streams.
    let answer = node.exec(&id, &["sh", "-c", "echo said; sleep 555 & exit 3"], 0).await?;
    assert_eq!((answer.stdout.as_slice(), answer.exit_code), (&b"said\n"[..], 3));
    let much = "head -c 17000000 /dev/zero | tr '\\0' x; echo end >&2";
    let answer = node.exec(&id, &["sh", "-c", much], 0).await?;
    assert_eq!((answer.stdout.len(), answer.stderr.as_slice()), (16 << 20, &b"end\n"[..]));
    // Timed out, with a process that left its session and its parent.
    let escape = "setsid sh -c 'sleep 666 & exit 0'; sleep 667";
    let late = node.exec(&id, &["sh", "-c", escape], 1).await.unwrap_err();
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded);
    gone(&mut node, &id, "66").await?;
    // A client that goes away.
    let mut client = node.runtime.clone();
    let request = ExecSyncRequest {
        container_id: id.clone(),
        cmd: ["sleep", "777"].map(str::to_owned).to_vec(),
        timeout: 0,
    };
    let asked = tokio::spawn(async move { client.exec_sync(request).await });
    let deadline = Instant::now() + Duration::from_secs(20);
    while !processes(&mut node, &id).await?.contains("sleep 777") {
        ensure!(Instant::now() < deadline, "the command does not run");
    }
    asked.abort();
    gone(&mut node, &id, "777").await
}

async fn processes(node: &mut Node, id: &str) -> anyhow::Result<String> {
    let answer = node.exec(id, &["ps"], 0).await?;
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

async fn gone(node: &mut Node, id: &str, what: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left = processes(node, id).await?;
        if !left.contains(&format!("sleep {what}")) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left: {left}");
    }
}

/// The kubelet's way to rotate, again and again, while the container writes as fast as it can.
#[tokio::test]
async fn a_log_renamed_and_reopened_at_full_speed_loses_nothing() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let script = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); echo $i; done";
    let id = node.run(&pod, "fast", script).await?;
    let logs = node.root.path().join("logs");
    let mut rotated = 0;
    while node.status(&id).await?.state() == ContainerState::ContainerRunning {
        fs::rename(logs.join("fast.log"), logs.join(format!("fast.log.{rotated:05}")))?;
        rotated += 1;
        let reopen = ReopenContainerLogRequest { container_id: id.clone() };
        match node.runtime.reopen_container_log(reopen).await {
            Ok(_) => {}
            // It ended meanwhile.
            Err(_) if node.exited(&id).await.is_ok() => break,
            Err(error) => return Err(error.into()),
        }
        if rotated % 10 == 0 {
            node.restart().await?;
        }
    }
    assert!(rotated > 2, "it was too fast to be rotated");
    let mut files: Vec<PathBuf> = fs::read_dir(&logs)?.flatten().map(|e| e.path()).collect();
    files.sort();
    // The youngest has the shortest name.
    if files.first().is_some_and(|f| f.ends_with("fast.log")) {
        files.rotate_left(1);
    }
    let mut expected = 0;
    for file in files {
        for line in fs::read_to_string(&file)?.lines() {
            expected += 1;
            let number = line.split_once(" stdout F ").map(|(_, n)| n);
            assert_eq!(number, Some(expected.to_string().as_str()), "in {}", file.display());
        }
    }
    assert_eq!(expected, 30_000);
    Ok(())
}

/// The monitor rotates, while the container writes and the shim is killed again and again.
#[tokio::test]
async fn a_log_rotated_by_the_monitor_has_every_line_in_files_of_the_size() -> anyhow::Result<()> {
    let max_size = 20_000;
    let rotation = Some((max_size, 1000));
    let mut node = Node::start_with(Setup { rotation, ..Setup::default() }).await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo $i; done";
    let id = node.run(&pod, "fast", script).await?;
    while node.status(&id).await?.state() == ContainerState::ContainerRunning {
        node.restart().await?;
    }
    let logs = node.root.path().join("logs");
    let mut files: Vec<PathBuf> = fs::read_dir(&logs)?.flatten().map(|e| e.path()).collect();
    files.sort();
    // The youngest has the shortest name.
    files.rotate_left(1);
    assert!(files.len() > 20, "{} files", files.len());
    let longest = "2026-11-27T15:33:16.123456789Z stdout F 20000\n".len() as u64;
    let mut expected = 0;
    for (at, file) in files.iter().enumerate() {
        let length = fs::metadata(file)?.len();
        assert!(length <= u64::from(max_size), "{} is too long", file.display());
        // Not a byte earlier than it must.
        let full = length + longest > u64::from(max_size);
        assert!(full || at == files.len() - 1, "{} has {length}", file.display());
        for line in fs::read_to_string(file)?.lines() {
            expected += 1;
            let number = line.split_once(" stdout F ").map(|(_, n)| n);
            assert_eq!(number, Some(expected.to_string().as_str()), "in {}", file.display());
        }
    }
    assert_eq!(expected, 20_000);
    Ok(())
}

#[tokio::test]
async fn a_monitor_that_dies_unseen_ends_its_pod() -> anyhow::Result<()> {
    let mut it = Running::start().await?;
    let created = it.node.create(&it.pod, "created", "exit 5").await?;
    it.node.server.kill()?;
    it.node.server.wait()?;
    it.node.end_monitors();
    assert!(it.lives(), "the container died with its monitor");
    it.node.serve_again().await?;
    it.ends().await?;
    let status = it.node.exited(&it.container.clone()).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    let pods = it.pods().await?;
    assert_eq!(pods.first().map(PodSandbox::state), Some(PodSandboxState::SandboxNotready));
    let start = StartContainerRequest { container_id: created };
    assert!(it.node.runtime.start_container(start).await.is_err());
    it.remove_pod().await?;
    assert_eq!(it.node.leftovers(), Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn a_stop_that_meets_a_dying_monitor_ends_the_container() -> anyhow::Result<()> {
    let mut it = Running::start().await?;
    let socket = it.node.root.path().join("run/m").join(&it.pod.0[..24]);
    let monitor = node::monitor_pid(&socket).context("no monitor")?;
    let stops = (0..20).map(|_| {
        let mut runtime = it.node.runtime.clone();
        let stop = StopContainerRequest { container_id: it.container.clone(), timeout: 5 };
        tokio::spawn(async move { runtime.stop_container(stop).await })
    });
    // Some of them come while it dies, and before that is known.
    kill(monitor, Signal::SIGKILL)?;
    for stop in stops.collect::<Vec<_>>() {
        stop.await??;
    }
    it.ends().await?;
    assert_eq!(it.node.status(&it.container.clone()).await?.exit_code, 255);
    Ok(())
}
