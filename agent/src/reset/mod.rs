//! `longshore reset`: takes everything away that Longshore put on this machine.
//!
//! Every step is tried whatever became of the one before, is harmless where there is nothing to do,
//! and says what it could not do.

mod cgroups;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::oneshot;

use crate::join::files::{NodeFile, Paths};
use crate::join::systemd::{self, UnitOutcome};
use crate::runtime::Runtime;
use crate::runtime::cri::CriRuntime;

/// Sandboxes removed at once.
const PARALLEL: usize = 16;
/// How long the embedded runtime may take to answer.
const RUNTIME_START: Duration = Duration::from_secs(20);
/// Longest time for one sandbox.
const SANDBOX_TIMEOUT: Duration = Duration::from_secs(60);

/// Where things are.
#[derive(Clone, Debug)]
pub struct ResetRequest {
    /// kubelet.conf and `--root-dir`.
    pub paths: Paths,
    /// State of the CRI shim.
    pub state_dir: PathBuf,
    /// Sockets and namespaces of the CRI shim.
    pub run_dir: PathBuf,
    /// Logs of pods.
    pub pod_logs_dir: PathBuf,
    /// Links to logs of containers.
    pub container_logs_dir: PathBuf,
    /// Another runtime than the embedded one.
    pub container_runtime_endpoint: Option<String>,
    /// Cgroup that `kubepods` is in.
    pub cgroup_root: String,
    /// Bridge of the built-in network.
    pub bridge: String,
}

/// What one step came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What was to be done.
    pub name: &'static str,
    /// What was found and done, in words.
    pub done: String,
    /// What could not be done; empty if all went well.
    pub failures: Vec<String>,
}

/// Does everything; `progress` is told of each step as it ends.
pub async fn reset(request: &ResetRequest, progress: &(dyn Fn(&Step) + Send + Sync)) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut note = |step: Step| {
        progress(&step);
        steps.push(step);
    };
    note(stop_unit().await);
    let (pods, uids) = remove_pods(request).await;
    note(pods);
    note(remove_rules().await);
    let failures =
        cri_shim::network::cleanup(&request.bridge, &request.run_dir.join("netns")).await;
    note(Step { name: "network", done: "bridge and namespaces are gone".to_owned(), failures });
    note(
        blocking("cgroups", {
            let root = request.cgroup_root.clone();
            move || cgroups::remove_pods(&root, &uids)
        })
        .await,
    );
    note(stop_slices().await);
    note(
        blocking("mounts", {
            let dirs = owned_dirs(request);
            move || tree::unmount_below(&dirs)
        })
        .await,
    );
    note(
        blocking("state", {
            let dirs = owned_dirs(request);
            let logs = (request.pod_logs_dir.clone(), request.container_logs_dir.clone());
            move || remove_state(&dirs, &logs.0, &logs.1)
        })
        .await,
    );
    note(
        blocking("credentials", {
            let paths = request.paths.clone();
            move || remove_credentials(&paths)
        })
        .await,
    );
    steps
}

fn owned_dirs(request: &ResetRequest) -> Vec<PathBuf> {
    vec![request.paths.root_dir.clone(), request.state_dir.clone(), request.run_dir.clone()]
}

async fn blocking(
    name: &'static str,
    work: impl FnOnce() -> (String, Vec<String>) + Send + 'static,
) -> Step {
    match tokio::task::spawn_blocking(work).await {
        Ok((done, failures)) => Step { name, done, failures },
        Err(error) => Step { name, done: String::new(), failures: vec![error.to_string()] },
    }
}

async fn stop_unit() -> Step {
    let (done, failures) = match systemd::stop_and_disable().await {
        UnitOutcome::Done => ("stopped and disabled".to_owned(), Vec::new()),
        UnitOutcome::NoSystemd => ("systemd does not run here".to_owned(), Vec::new()),
        UnitOutcome::NoUnit => ("no unit is installed".to_owned(), Vec::new()),
        UnitOutcome::Failed(cause) => (String::new(), vec![cause]),
    };
    Step { name: "service", done, failures }
}

/// systemd's slices that no pod is in any more: their folders are gone, the units are not.
async fn stop_slices() -> Step {
    let name = "slices";
    if !cri_shim::systemd::usable() {
        let done = "systemd keeps none here".to_owned();
        return Step { name, done, failures: Vec::new() };
    }
    let systemd = cri_shim::systemd::Systemd::default();
    let slices = match systemd.active(&["kubepods.slice", "kubepods-*.slice"]).await {
        Ok(slices) => cgroups::empty_slices(slices.into_iter().collect()),
        Err(error) => return Step { name, done: String::new(), failures: vec![error.to_string()] },
    };
    let mut failures = Vec::new();
    for slice in &slices {
        if let Err(error) = systemd.stop(slice).await {
            failures.push(error.to_string());
        }
    }
    let done = format!("{} of {} stopped", slices.len() - failures.len(), slices.len());
    Step { name, done, failures }
}

async fn remove_rules() -> Step {
    let failures = match proxy::cleanup().await {
        Ok(()) => Vec::new(),
        Err(error) => vec![error.to_string()],
    };
    Step { name: "service rules", done: "rules of the proxy are gone".to_owned(), failures }
}

/// Removes every sandbox through the runtime. Also returns the UIDs of the pods that were there or
/// have a folder.
async fn remove_pods(request: &ResetRequest) -> (Step, Vec<String>) {
    let name = "pods";
    let mut uids = pods_on_disk(&request.paths.root_dir);
    let endpoint = request.container_runtime_endpoint.clone();
    if endpoint.is_none() && !request.state_dir.exists() && !request.run_dir.exists() {
        let done = "the runtime was never used".to_owned();
        return (Step { name, done, failures: Vec::new() }, uids);
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let mut shim = None;
    let endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => {
            let socket = request.run_dir.join("cri.sock");
            if tokio::net::UnixStream::connect(&socket).await.is_err() {
                let config =
                    cri_shim::Config::at(request.state_dir.clone(), request.run_dir.clone());
                shim = Some(tokio::spawn(cri_shim::serve(config, async move {
                    // Either way the server is no longer needed.
                    let _ = stopped.await;
                })));
            }
            format!("unix://{}", socket.display())
        }
    };
    let (done, failures) = match CriRuntime::new(&endpoint, SANDBOX_TIMEOUT) {
        Ok(runtime) => remove_sandboxes(Arc::new(runtime), &mut uids).await,
        Err(error) => (String::new(), vec![error.to_string()]),
    };
    drop(stop);
    let mut failures = failures;
    if let Some(shim) = shim
        && let Ok(Ok(Err(error))) = tokio::time::timeout(RUNTIME_START, shim).await
    {
        failures.push(format!("the embedded runtime: {error}"));
    }
    (Step { name, done, failures }, uids)
}

async fn remove_sandboxes(
    runtime: Arc<dyn Runtime>,
    uids: &mut Vec<String>,
) -> (String, Vec<String>) {
    let started = Instant::now();
    let sandboxes = loop {
        match runtime.list_pod_sandboxes(None).await {
            Ok(sandboxes) => break sandboxes,
            Err(error) if started.elapsed() > RUNTIME_START => {
                return (String::new(), vec![format!("cannot list the pods: {error}")]);
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    let count = sandboxes.len();
    uids.extend(sandboxes.iter().filter_map(|s| s.metadata.as_ref().map(|m| m.uid.clone())));
    uids.sort();
    uids.dedup();
    let failures: Vec<String> = futures::stream::iter(sandboxes)
        .map(|sandbox| {
            let runtime = runtime.clone();
            async move {
                let outcome = async {
                    runtime.stop_pod_sandbox(&sandbox.id).await?;
                    runtime.remove_pod_sandbox(&sandbox.id).await
                };
                let pod = sandbox.metadata.map(|m| format!("{}/{}", m.namespace, m.name));
                outcome.await.err().map(|e| format!("pod {}: {e}", pod.unwrap_or(sandbox.id)))
            }
        })
        .buffer_unordered(PARALLEL)
        .filter_map(std::future::ready)
        .collect()
        .await;
    (format!("{} of {count} removed", count - failures.len()), failures)
}

fn pods_on_disk(root_dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root_dir.join("pods")).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn remove_state(dirs: &[PathBuf], pod_logs: &Path, links: &Path) -> (String, Vec<String>) {
    let mut failures = Vec::new();
    let mut removed = 0;
    for dir in dirs.iter().map(PathBuf::as_path).chain([pod_logs]) {
        match tree::remove(dir) {
            Ok(true) => removed += 1,
            Ok(false) => {}
            Err(failure) => failures.push(failure),
        }
    }
    // Other runtimes may keep logs there as well: only links into our own folder go.
    for entry in std::fs::read_dir(links).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = std::fs::read_link(&path).is_ok_and(|target| target.starts_with(pod_logs));
        if ours && let Err(error) = std::fs::remove_file(&path) {
            failures.push(format!("cannot remove {}: {error}", path.display()));
        }
    }
    // Left alone where something else is in it.
    let _ = std::fs::remove_dir(links);
    (format!("{removed} folders removed"), failures)
}

fn remove_credentials(paths: &Paths) -> (String, Vec<String>) {
    let mut failures = Vec::new();
    let mut removed = 0;
    for path in [paths.kubelet_conf(), paths.bootstrap_conf(), paths.ca(), paths.node_file()] {
        match std::fs::remove_file(&path) {
            Ok(()) => removed += 1,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => failures.push(format!("cannot remove {}: {error}", path.display())),
        }
    }
    let _ = std::fs::remove_dir(paths.kubernetes_dir.join("pki"));
    (format!("{removed} files removed"), failures)
}

/// What `longshore join` noted of the folders and the runtime; flags win over it.
pub fn noted(kubernetes_dir: &Path) -> Option<NodeFile> {
    NodeFile::load(kubernetes_dir).ok().flatten()
}
