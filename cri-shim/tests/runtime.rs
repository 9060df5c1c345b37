//! The shim as a CRI client sees it, with real containers.

mod node;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use cri_shim::api::*;
use node::{IMAGE, Node};

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

/// What systemd does when the machine shuts down: the agent is gone, every process gets SIGTERM.
#[tokio::test]
async fn a_shutdown_lets_containers_end_and_keeps_their_exit_codes() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    let pod = node.sandbox(NamespaceMode::Container).await?;
    let polite = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.1; done";
    let polite = node.run(&pod, "polite", polite).await?;
    let deaf = node.run(&pod, "deaf", "exec sleep 1000").await?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !node.log("polite").contains("ready") {
        anyhow::ensure!(Instant::now() < deadline, "the container says nothing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.server.kill()?;
    node.server.wait()?;
    let socket = fs::read_dir(node.root.path().join("run/m"))?.next().context("no monitor")??;
    let pid = node::monitor_pid(&socket.path()).context("the monitor does not answer")?;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let records = node.root.path().join("state/containers");
    // The first process of a PID namespace does not see signals it has no handler for.
    let deadline = Instant::now() + Duration::from_secs(60);
    for id in [&polite, &deaf] {
        while !records.join(id).join("exited.json").exists() {
            anyhow::ensure!(Instant::now() < deadline, "the monitor records no exit");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    while std::path::Path::new("/proc").join(pid.to_string()).exists() {
        anyhow::ensure!(Instant::now() < deadline, "the monitor does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.restart().await?;
    assert_eq!(node.exited(&polite).await?.exit_code, 7);
    assert_eq!(node.exited(&deaf).await?.exit_code, 137);
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
            let status = event.pod_sandbox_status.clone().context("no sandbox status")?;
            assert_eq!(status.state(), PodSandboxState::SandboxReady);
            let states = event.containers_statuses.iter().map(ContainerStatus::state);
            let states: Vec<_> = states.collect();
            seen.push((event.container_event_type(), states));
        }
    }
    use ContainerEventType::*;
    use ContainerState::*;
    assert_eq!(
        seen,
        [
            (ContainerCreatedEvent, vec![ContainerCreated]),
            (ContainerStartedEvent, vec![ContainerRunning]),
            (ContainerStoppedEvent, vec![ContainerExited]),
            (ContainerDeletedEvent, vec![]),
        ]
    );
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    for kind in [ContainerStoppedEvent, ContainerDeletedEvent] {
        let next = tokio::time::timeout(Duration::from_secs(10), events.message()).await??;
        let event = next.context("the stream ended")?;
        assert_eq!((event.container_id.as_str(), event.container_event_type()), (&*pod.0, kind));
        let status = event.pod_sandbox_status.context("no sandbox status")?;
        assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    }
    Ok(())
}

#[tokio::test]
async fn other_oci_runtimes_make_containers_that_are_served_alike() -> anyhow::Result<()> {
    let mut node = Node::start().await?;
    // Not crun too: it refuses machines whose cgroups are in hybrid mode, whoever calls it.
    let handler = "runc";
    let pod = node.sandbox_with(NamespaceMode::Container, handler).await?;
    let script = "echo out; echo err >&2; read line; echo got $line; exit 4";
    let stdin = |config: &mut ContainerConfig| (config.stdin, config.stdin_once) = (true, true);
    let id = node.create_with(&pod, handler, script, stdin).await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    let answer = node.exec(&id, &["sh", "-c", "echo in; exit 6"], 0).await?;
    assert_eq!((answer.stdout.as_slice(), answer.exit_code), (&b"in\n"[..], 6));
    let filter = node.exec(&id, &["grep", "Seccomp:", "/proc/1/status"], 0).await?;
    assert!(String::from_utf8_lossy(&filter.stdout).contains('2'), "no filter");
    node.restart().await?;
    assert_eq!(node.status(&id).await?.state(), ContainerState::ContainerRunning);
    let stop = StopContainerRequest { container_id: id.clone(), timeout: 0 };
    node.runtime.stop_container(stop).await?;
    assert_eq!(node.exited(&id).await?.exit_code, 137);
    let log = node.log(handler);
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F err\n"), "{log}");
    let id = node.create(&pod, "ends", "exit 9").await?;
    node.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
    assert_eq!(node.exited(&id).await?.exit_code, 9);
    let missing = |config: &mut ContainerConfig| config.command = vec!["no-such".into()];
    let id = node.create_with(&pod, "missing", "", missing).await?;
    let start = StartContainerRequest { container_id: id.clone() };
    let refused = node.runtime.start_container(start).await.unwrap_err();
    assert!(refused.message().contains("not found"), "{refused}");
    let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.0.clone() };
    node.runtime.remove_pod_sandbox(remove).await?;
    assert_eq!(node.leftovers(), Vec::<PathBuf>::new());
    let refused = node.sandbox_with(NamespaceMode::Container, "unheard-of").await.unwrap_err();
    assert!(refused.to_string().contains("unheard-of"), "{refused}");
    Ok(())
}
