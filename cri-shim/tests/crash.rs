//! The shim, a zygote, a monitor or the maker of a container dies between any two steps: nothing is
//! lost, nothing is there twice, nothing is left. Debug builds only (`cri_shim::crash`).
#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod node;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cri_shim::api::*;
use futures::StreamExt;
use node::{IMAGE, Node, Setup};

/// How many nodes are tried at once.
const AT_ONCE: usize = 3;

/// Every point of the source, so that none is forgotten here.
fn points() -> Vec<String> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut points = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(path).unwrap();
                let named = text.split("point(\"").skip(1).filter_map(|rest| rest.split_once('"'));
                points.extend(named.map(|(name, _)| name.to_owned()));
            }
        }
    }
    points.sort();
    points
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_any_two_steps_loses_doubles_and_leaves_nothing() {
    let points = points();
    let distinct: BTreeSet<&String> = points.iter().collect();
    assert!(distinct.len() > 40, "the points are not found: {points:?}");
    assert_eq!(distinct.len(), points.len(), "a name is used twice: {points:?}");
    let only = std::env::var("LONGSHORE_CRASH_ONLY").unwrap_or_default();
    let tries = points.into_iter().filter(|p| p.contains(&only)).map(|point| async move {
        let tried = Trial::run(&point).await;
        tried.err().map(|error| format!("{point}: {error:#}"))
    });
    let failures: Vec<String> = futures::stream::iter(tries)
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// Why a scenario stopped.
enum Stop {
    /// The process that died took the pod with it.
    PodLost,
    Error(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Stop::Error(error.into())
    }
}

struct Trial {
    node: Node,
    point: String,
    /// Made by the process that dies.
    mark: PathBuf,
    restarted: bool,
    /// The pod was lost with its monitor, which has been seen to.
    lost: bool,
    /// What the client was told exists: a name and an id.
    sandbox: Option<String>,
    containers: Vec<(String, String)>,
    /// Running by all that the client was told, with their processes.
    running: Vec<(String, i64)>,
}

impl Trial {
    async fn run(point: &str) -> anyhow::Result<()> {
        let marks = tempfile::tempdir()?;
        let mark = marks.path().join("died");
        let environment =
            vec![("LONGSHORE_CRASH_AT".to_owned(), format!("{point}={}", mark.display()))];
        let node =
            Node::start_with(Setup { own_network: true, environment, ..Setup::default() }).await?;
        let mut trial = Trial {
            node,
            point: point.to_owned(),
            mark,
            restarted: false,
            lost: false,
            sandbox: None,
            containers: Vec::new(),
            running: Vec::new(),
        };
        match trial.scenario().await {
            Ok(()) => {}
            Err(Stop::PodLost) => {
                trial.after_the_pods_loss().await.context("after the pod was lost")?;
                match trial.scenario().await {
                    Ok(()) => {}
                    Err(Stop::PodLost) => bail!("a second pod was lost"),
                    Err(Stop::Error(error)) => return Err(error.context("with the second pod")),
                }
            }
            Err(Stop::Error(error)) => return Err(error),
        }
        ensure!(trial.mark.exists(), "the scenario does not come by this point");
        trial.nothing_left().await
    }

    /// Whether the process died whose end takes the pod, or a start, with it, and nobody has seen
    /// to that yet.
    fn may_be_lost(&self) -> bool {
        let of_a_pod = ["monitor: ", "maker: "].iter().any(|of| self.point.starts_with(of));
        of_a_pod && self.mark.exists() && !self.lost
    }

    /// Every verb with an effect, each repeated after a crash as a kubelet would.
    async fn scenario(&mut self) -> Result<(), Stop> {
        let config = self.pod();
        let sandbox = loop {
            let request =
                RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
            let ran = self.node.runtime.run_pod_sandbox(request).await;
            if let Some(ran) = self.or_crash(ran).await? {
                break ran.pod_sandbox_id;
            }
        };
        self.sandbox = Some(sandbox.clone());
        let pod = (sandbox.clone(), config);
        let polite = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.05; done";
        let polite = self.create(&pod, "polite", polite, |_| {}).await?;
        let pid = self.start(&polite).await?;
        self.running.push((polite.clone(), pid));
        let brief = self.create(&pod, "brief", "echo brief; exit 3", |_| {}).await?;
        self.start(&brief).await?;
        let code = self.exit_code(&brief).await?;
        self.expect(code == 3, &format!("brief ended with {code}"))?;
        let missing = |config: &mut ContainerConfig| config.command = vec!["no-such".into()];
        let broken = self.create(&pod, "broken", "", missing).await?;
        self.start_in_vain(&broken).await?;
        let deaf = self.create(&pod, "deaf", "exec sleep 1000", |_| {}).await?;
        let pid = self.start(&deaf).await?;
        self.running.push((deaf.clone(), pid));
        if self.may_be_lost() {
            return Err(Stop::PodLost);
        }
        self.consistent().await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.node.log("polite").contains("ready") {
            self.expect(Instant::now() < deadline, "polite says nothing")?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.running.clear();
        for (id, timeout) in [(&polite, 60), (&deaf, 0)] {
            loop {
                let request = StopContainerRequest { container_id: id.clone(), timeout };
                let stopped = self.node.runtime.stop_container(request).await;
                if self.or_crash(stopped).await?.is_some() {
                    break;
                }
            }
        }
        let codes = (self.exit_code(&polite).await?, self.exit_code(&deaf).await?);
        self.expect(codes == (7, 137), &format!("polite and deaf ended with {codes:?}"))?;
        let code = self.exit_code(&brief).await?;
        self.expect(code == 3, &format!("brief, earlier 3, now ended with {code}"))?;
        for id in [&polite, &brief] {
            self.containers.retain(|(_, other)| other != id);
            loop {
                let request = RemoveContainerRequest { container_id: id.clone() };
                let removed = self.node.runtime.remove_container(request).await;
                if self.or_crash(removed).await?.is_some() {
                    break;
                }
            }
        }
        // A restart comes by the points of recovery, with a pod that runs.
        if !self.restarted && self.point.starts_with("recovery: ") {
            self.restart_with_the_point().await?;
        }
        self.consistent().await?;
        self.remove_pod(&sandbox).await
    }

    async fn remove_pod(&mut self, sandbox: &str) -> Result<(), Stop> {
        loop {
            let request = StopPodSandboxRequest { pod_sandbox_id: sandbox.to_owned() };
            let stopped = self.node.runtime.stop_pod_sandbox(request).await;
            if self.or_crash(stopped).await?.is_some() {
                break;
            }
        }
        self.sandbox = None;
        self.containers.clear();
        loop {
            let request = RemovePodSandboxRequest { pod_sandbox_id: sandbox.to_owned() };
            let removed = self.node.runtime.remove_pod_sandbox(request).await;
            if self.or_crash(removed).await?.is_some() {
                return Ok(());
            }
        }
    }

    fn pod(&self) -> PodSandboxConfig {
        let options =
            NamespaceOption { pid: NamespaceMode::Container as i32, ..Default::default() };
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "pod".into(),
                namespace: "default".into(),
                uid: "uid".into(),
                attempt: 0,
            }),
            hostname: "pod".into(),
            log_directory: self.node.root.path().join("logs").display().to_string(),
            port_mappings: vec![PortMapping {
                protocol: Protocol::Tcp as i32,
                container_port: 80,
                host_port: 18_080,
                host_ip: String::new(),
            }],
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.node.cgroup(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    async fn create(
        &mut self,
        pod: &(String, PodSandboxConfig),
        name: &str,
        script: &str,
        change: impl Fn(&mut ContainerConfig),
    ) -> Result<String, Stop> {
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: vec!["sh".into(), "-c".into(), script.into()],
            log_path: format!("{name}.log"),
            ..Default::default()
        };
        change(&mut config);
        loop {
            let request = CreateContainerRequest {
                pod_sandbox_id: pod.0.clone(),
                config: Some(config.clone()),
                sandbox_config: Some(pod.1.clone()),
            };
            let created = self.node.runtime.create_container(request).await;
            if let Some(created) = self.or_crash(created).await? {
                let id = created.container_id;
                self.containers.push((name.to_owned(), id.clone()));
                return Ok(id);
            }
        }
    }

    /// Starts a container; its process.
    async fn start(&mut self, id: &str) -> Result<i64, Stop> {
        loop {
            let request = StartContainerRequest { container_id: id.to_owned() };
            let started = self.node.runtime.start_container(request).await;
            // What ended meanwhile was started before the crash.
            if let Err(error) = &started
                && self.restarted
                && error.code() == tonic::Code::FailedPrecondition
                && self.node.status(id).await?.exit_code == 3
            {
                return Ok(0);
            }
            if self.or_crash(started).await?.is_some() {
                let status = self.verbose(id).await?;
                return Ok(status.1);
            }
        }
    }

    async fn start_in_vain(&mut self, id: &str) -> Result<(), Stop> {
        loop {
            let request = StartContainerRequest { container_id: id.to_owned() };
            match self.node.runtime.start_container(request).await {
                Ok(_) => return Err(anyhow::anyhow!("started a program that is not there").into()),
                Err(error) if is_of_the_container(&error) && !self.mark_is_new() => break,
                Err(error) => {
                    if self.or_crash::<()>(Err(error)).await?.is_some() {
                        break;
                    }
                }
            }
        }
        let status = self.node.status(id).await?;
        let said = (status.exit_code, status.reason.as_str());
        self.expect(said == (128, "StartError"), &format!("the broken container says {said:?}"))
    }

    /// The server is dead, and nobody has looked yet.
    fn mark_is_new(&mut self) -> bool {
        self.mark.exists() && !matches!(self.node.server.try_wait(), Ok(None))
    }

    async fn verbose(&mut self, id: &str) -> Result<(ContainerStatus, i64), Stop> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        let answer = self.node.runtime.container_status(request).await?.into_inner();
        let info: serde_json::Value =
            serde_json::from_str(answer.info.get("info").map_or("{}", String::as_str))?;
        Ok((answer.status.unwrap_or_default(), info["pid"].as_i64().unwrap_or_default()))
    }

    async fn exit_code(&mut self, id: &str) -> Result<i32, Stop> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match self.node.status(id).await {
                Ok(status) if status.state() == ContainerState::ContainerExited => {
                    return Ok(status.exit_code);
                }
                Ok(_) => {}
                Err(error) => self.survive(error).await?,
            }
            self.expect(Instant::now() < deadline, "a container does not end")?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What a verb answered, or nothing when it has to be asked again after a crash.
    async fn or_crash<T>(
        &mut self,
        answer: Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<Option<T>, Stop> {
        match answer {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(error) => self.survive(error.into()).await.map(|()| None),
        }
    }

    /// After an error: restarts a server that died as it should, and looks at what it finds.
    async fn survive(&mut self, error: anyhow::Error) -> Result<(), Stop> {
        if self.may_be_lost() {
            return Err(Stop::PodLost);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.restarted && matches!(self.node.server.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                return Err(Stop::Error(error));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if self.restarted || !self.mark.exists() {
            return Err(Stop::Error(error.context("not by the crash that was asked for")));
        }
        self.restarted = true;
        self.node.serve_again().await?;
        self.consistent().await
    }

    /// Restarts a server whose successor is to die in recovery.
    async fn restart_with_the_point(&mut self) -> Result<(), Stop> {
        self.restarted = true;
        fs::remove_file(&self.mark).ok();
        self.node.setup.environment =
            vec![("LONGSHORE_CRASH_AT".into(), format!("{}={}", self.point, self.mark.display()))];
        self.node.restart().await?;
        Ok(())
    }

    /// Whether exactly what the client was told exists, and runs as it did.
    async fn consistent(&mut self) -> Result<(), Stop> {
        let sandboxes = self.node.runtime.list_pod_sandbox(ListPodSandboxRequest::default());
        let sandboxes = sandboxes.await?.into_inner().items;
        let ids: Vec<&str> = sandboxes.iter().map(|s| s.id.as_str()).collect();
        self.expect(ids.len() <= 1, &format!("sandboxes {ids:?}"))?;
        if let Some(id) = &self.sandbox {
            self.expect(ids == [id], &format!("sandboxes {ids:?} instead of {id}"))?;
            let ready = sandboxes[0].state() == PodSandboxState::SandboxReady;
            let stopping = ["stop sandbox", "clear sandbox", "network: ports", "network: link"];
            let stopping = stopping.iter().any(|of| self.point.starts_with(of));
            self.expect(ready || stopping, "the sandbox is not ready")?;
        }
        let containers = self.node.runtime.list_containers(ListContainersRequest::default());
        let containers = containers.await?.into_inner().containers;
        for (name, id) in self.containers.clone() {
            let named = |c: &&Container| c.metadata.as_ref().is_some_and(|m| m.name == name);
            let found: Vec<&str> = containers.iter().filter(named).map(|c| c.id.as_str()).collect();
            self.expect(found == [id.as_str()], &format!("{name} {id} is listed as {found:?}"))?;
        }
        for (id, pid) in self.running.clone() {
            let (status, now) = self.verbose(&id).await?;
            let runs = status.state() == ContainerState::ContainerRunning && now == pid;
            self.expect(runs, &format!("{id} ran as {pid}, now {now}: {status:?}"))?;
            let answer = self.node.exec(&id, &["echo", "here"], 0).await?;
            self.expect(answer.stdout == b"here\n", "an exec says nothing")?;
        }
        Ok(())
    }

    /// A monitor or maker died: what it had is gone or has ended, says so, and can be removed.
    async fn after_the_pods_loss(&mut self) -> anyhow::Result<()> {
        self.lost = true;
        ensure!(matches!(self.node.server.try_wait(), Ok(None)), "the shim died with it");
        let sandboxes = self.node.runtime.list_pod_sandbox(ListPodSandboxRequest::default());
        let sandboxes = sandboxes.await?.into_inner().items;
        if self.point.starts_with("maker: ") {
            let ready = sandboxes.first().map(|s| s.state());
            ensure!(ready == Some(PodSandboxState::SandboxReady), "the monitor died with it");
        }
        // What the monitor saw end before it died keeps its exit code.
        if self.point == "monitor: exit recorded"
            && let Some((_, brief)) = self.containers.iter().find(|(name, _)| name == "brief")
        {
            let brief = brief.clone();
            ensure!(self.node.exited(&brief).await?.exit_code == 3, "the exit code was lost");
        }
        for sandbox in sandboxes {
            let request = RemovePodSandboxRequest { pod_sandbox_id: sandbox.id };
            self.node.runtime.remove_pod_sandbox(request).await?;
        }
        (self.sandbox, self.containers, self.running) = Default::default();
        self.nothing_left().await
    }

    fn expect(&self, holds: bool, otherwise: &str) -> Result<(), Stop> {
        match holds {
            true => Ok(()),
            false if self.may_be_lost() => Err(Stop::PodLost),
            false => Err(anyhow::anyhow!("{otherwise}").into()),
        }
    }

    /// Nothing of any pod is anywhere on the node.
    async fn nothing_left(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let left = self.left()?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "left over: {left:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn left(&self) -> anyhow::Result<Vec<String>> {
        let mut left: Vec<String> =
            self.node.leftovers().iter().map(|path| path.display().to_string()).collect();
        let root = self.node.root.path().display().to_string();
        let holder = self.node.namespace.id();
        let inside = PathBuf::from(format!("/proc/{holder}/root"));
        let names = |path: PathBuf| -> Vec<String> {
            let entries = fs::read_dir(&path).into_iter().flatten().flatten();
            entries.map(|e| e.path().display().to_string()).collect()
        };
        let below = |path: &str| inside.join(root.trim_start_matches('/')).join(path);
        left.extend(names(below("run/mnt/shm")));
        left.extend(names(below("state/network/sandboxes")));
        let mounts = fs::read_to_string(format!("/proc/{holder}/mountinfo"))?;
        let own = format!("{root}/run/mnt");
        let mount_points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        left.extend(mount_points.filter(|m| m.starts_with(&root) && *m != own).map(str::to_owned));
        let enter = |program: &[&str]| -> anyhow::Result<String> {
            let target = holder.to_string();
            let output = Command::new("nsenter")
                .args(["--target", &target, "--net"])
                .args(program)
                .output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let links = enter(&["ip", "-o", "link"])?;
        left.extend(links.lines().filter(|l| l.contains('@')).map(str::to_owned));
        let rules = enter(&["nft", "list", "ruleset"])?;
        left.extend(rules.lines().filter(|l| l.contains("18080")).map(str::to_owned));
        let name = self.node.cgroup();
        for hierarchy in fs::read_dir("/sys/fs/cgroup")?.flatten() {
            let own = hierarchy.path().join(name.trim_start_matches('/'));
            let below = fs::read_dir(own).into_iter().flatten().flatten();
            left.extend(
                below.filter(|e| e.path().is_dir()).map(|e| e.path().display().to_string()),
            );
        }
        // Whoever is in the node's mount namespace: its holder, the server and the zygote are to be.
        let namespace = fs::read_link(format!("/proc/{holder}/ns/mnt"))?;
        for entry in fs::read_dir("/proc")?.flatten() {
            let process = entry.path();
            if fs::read_link(process.join("ns/mnt")).is_ok_and(|ns| ns == namespace) {
                let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
                if !matches!(name.trim(), "sleep" | "longshore-cri" | "longshore-zygot") {
                    left.push(format!("{} {}", process.display(), name.trim()));
                }
            }
        }
        Ok(left)
    }
}

/// Whether a start failed for what the container is, not for what the server is.
fn is_of_the_container(error: &tonic::Status) -> bool {
    error.message().contains("not found") || error.code() == tonic::Code::FailedPrecondition
}
