//! The pod half of the agent over Debian's containerd and runc, as the neighbours it must get along
//! with: the same code path as over our shim. Needs root. containerd keeps its state in a folder of
//! the test's own; pods are on the host network, so that no network is configured.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test: a failed step is a failed test")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent::ids::{NamespacedName, PodUid};
use agent::node_context::NodeContext;
use agent::objects::{ObjectError, ObjectRef, Objects};
use agent::pod::SyncLoop;
use agent::report::{EventSink, EventType, StatusSink};
use agent::runtime::Runtime;
use agent::runtime::cri::CriRuntime;
use agent::source::{PodChange, PodSource};
use agent::volume::{VolumeError, Volumes};
use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenRequestSpec, TokenRequestStatus};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Node, ObjectReference, Pod, PodStatus, Secret, Service,
};
use tokio::sync::{broadcast, mpsc, watch};

#[derive(Default)]
struct Told {
    statuses: Vec<(PodUid, PodStatus)>,
    gone: Vec<PodUid>,
    events: Vec<(String, String)>,
}

struct World(Mutex<Told>, broadcast::Sender<ObjectRef>);

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::default(), broadcast::Sender::new(4)))
    }

    fn status(&self, uid: &str) -> Option<PodStatus> {
        let told = self.0.lock().unwrap();
        told.statuses.iter().rev().find(|(u, _)| u.as_str() == uid).map(|(_, s)| s.clone())
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Duration {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            if holds(self) {
                return begun.elapsed();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let told = self.0.lock().unwrap();
        panic!("never: {what}\n{:#?}\n{:#?}", told.statuses.last(), told.events);
    }

    async fn until_ready(&self, uid: &str) -> Duration {
        self.until(&format!("{uid} ready"), |w| w.status(uid).is_some_and(|s| ready(&s))).await
    }
}

fn ready(status: &PodStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

impl StatusSink for World {
    fn publish(&self, pod: &Arc<Pod>, status: PodStatus) {
        self.0.lock().unwrap().statuses.push((PodUid::of(pod), status));
    }
    fn gone(&self, pod: &Arc<Pod>) {
        self.0.lock().unwrap().gone.push(PodUid::of(pod));
    }
}

impl EventSink for World {
    fn record(&self, _: ObjectReference, _: EventType, reason: &str, message: String) {
        self.0.lock().unwrap().events.push((reason.to_owned(), message));
    }
}

/// Pods of this test have no volumes.
#[async_trait]
impl Volumes for World {
    async fn mount(&self, _: &Arc<Pod>) -> Result<(), VolumeError> {
        Ok(())
    }
    async fn container_mounts(
        &self,
        _: &Pod,
        _: &Container,
        _: u32,
    ) -> Result<Vec<cri_shim::api::Mount>, VolumeError> {
        Ok(Vec::new())
    }
    fn container_devices(
        &self,
        _: &Pod,
        _: &Container,
    ) -> Result<Vec<cri_shim::api::Device>, VolumeError> {
        Ok(Vec::new())
    }
    async fn unmount(&self, _: &PodUid) -> Result<(), VolumeError> {
        Ok(())
    }
    async fn on_disk(&self) -> Result<Vec<PodUid>, VolumeError> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl Objects for World {
    async fn config_map(&self, _: &NamespacedName) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        Ok(None)
    }
    async fn secret(&self, _: &NamespacedName) -> Result<Option<Arc<Secret>>, ObjectError> {
        Ok(None)
    }
    async fn service_account_token(
        &self,
        _: &NamespacedName,
        _: TokenRequestSpec,
    ) -> Result<TokenRequestStatus, ObjectError> {
        Err(ObjectError::Standalone { what: "a token" })
    }
    fn services(&self, _: &str) -> Vec<Arc<Service>> {
        Vec::new()
    }
    fn node(&self) -> Option<Arc<Node>> {
        None
    }
    fn retain(&self, _: &Pod) {}
    fn release(&self, _: &PodUid) {}
    fn changes(&self) -> broadcast::Receiver<ObjectRef> {
        self.1.subscribe()
    }
}

/// A containerd of the test's own.
struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("c.sock")
    }

    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("ls-").tempdir_in("/tmp").unwrap();
        let path = dir.path();
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             [grpc]\naddress = {socket:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"localhost/pause:1\"\n\
             restrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n",
            root = path.join("root"),
            state = path.join("state"),
            socket = path.join("c.sock"),
        );
        std::fs::write(path.join("config.toml"), config).unwrap();
        let log = std::fs::File::create(path.join("log")).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(path.join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("containerd is needed: apt-get install containerd runc");
        let this = Self { child, dir };
        let begun = Instant::now();
        while !this.ctr(&["version"]) {
            assert!(begun.elapsed() < Duration::from_secs(30), "containerd does not come up");
            #[allow(clippy::disallowed_methods, reason = "before any runtime")]
            std::thread::sleep(Duration::from_millis(100));
        }
        for (name, entrypoint) in [("pause", "[\"sleep\",\"1000000\"]"), ("box", "[]")] {
            let archive = image(this.dir.path(), name, entrypoint);
            assert!(this.ctr(&["-n", "k8s.io", "images", "import", archive.to_str().unwrap()]));
        }
        this
    }

    fn ctr(&self, args: &[&str]) -> bool {
        let status = Command::new("ctr")
            .arg("--address")
            .arg(self.socket())
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|s| s.success())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A docker archive of busybox as `localhost/<name>:1`.
fn image(dir: &Path, name: &str, entrypoint: &str) -> PathBuf {
    let work = dir.join(format!("image-{name}"));
    let root = work.join("root/bin");
    std::fs::create_dir_all(&root).unwrap();
    std::fs::copy("/bin/busybox", root.join("busybox"))
        .expect("busybox is needed: apt-get install busybox-static");
    for applet in ["sh", "sleep", "cat", "echo", "true", "false", "test", "touch"] {
        let _ = std::os::unix::fs::symlink("busybox", root.join(applet));
    }
    let run = |command: &mut Command| assert!(command.status().unwrap().success());
    run(Command::new("tar")
        .arg("-C")
        .arg(work.join("root"))
        .arg("-cf")
        .arg(work.join("layer.tar"))
        .arg("."));
    let sum = Command::new("sha256sum").arg(work.join("layer.tar")).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap()[..64].to_owned();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["PATH=/bin"],"Entrypoint":{entrypoint}}},"rootfs":{{"type":"layers","diff_ids":["sha256:{sum}"]}}}}"#
    );
    std::fs::write(work.join("config.json"), config).unwrap();
    let manifest = format!(
        r#"[{{"Config":"config.json","RepoTags":["localhost/{name}:1"],"Layers":["layer.tar"]}}]"#
    );
    std::fs::write(work.join("manifest.json"), manifest).unwrap();
    let archive = dir.join(format!("{name}.tar"));
    run(Command::new("tar").arg("-C").arg(&work).arg("-cf").arg(&archive).args([
        "manifest.json",
        "config.json",
        "layer.tar",
    ]));
    archive
}

fn pod(uid: &str, containers: &str) -> Arc<Pod> {
    let text = format!(
        r#"{{"metadata":{{"name":"p-{uid}","namespace":"default","uid":"{uid}"}},
            "spec":{{"hostNetwork":true,"terminationGracePeriodSeconds":5,"containers":[{containers}]}}}}"#
    );
    Arc::new(serde_json::from_str(&text).unwrap())
}

fn script(name: &str, script: &str, rest: &str) -> String {
    format!(
        r#"{{"name":"{name}","image":"localhost/box:1","imagePullPolicy":"Never","command":["sh","-c",{script:?}]{rest}}}"#
    )
}

struct Agent {
    changes: mpsc::Sender<PodChange>,
    _shutdown: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

fn agent(containerd: &Containerd, world: &Arc<World>) -> (Agent, NodeContext) {
    let dir = containerd.dir.path();
    let node = NodeContext {
        root_dir: dir.join("kubelet"),
        pod_logs_dir: dir.join("logs"),
        container_logs_dir: dir.join("links"),
        cgroup_root: format!("/longshore-test-{}", std::process::id()),
        ..NodeContext::new("n", vec!["127.0.0.1".parse().unwrap()])
    };
    let endpoint = format!("unix://{}", containerd.socket().display());
    let runtime = CriRuntime::new(&endpoint, Duration::from_secs(30)).unwrap();
    let sync = SyncLoop::new(
        Arc::new(node.clone()),
        Arc::new(runtime),
        world.clone(),
        world.clone(),
        world.clone(),
        world.clone(),
    );
    let (changes, receiver) = mpsc::channel(16);
    let (shutdown, stop) = watch::channel(false);
    let task = tokio::spawn(sync.run(receiver, stop));
    (Agent { changes, _shutdown: shutdown, task }, node)
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_live_and_die_over_containerd() {
    let containerd = Containerd::start();
    let world = World::new();
    let (first, node) = agent(&containerd, &world);
    first.changes.send(PodChange::Synced(PodSource::File)).await.unwrap();

    let web = pod(
        "1",
        &format!(
            "{},{}",
            script(
                "a",
                "trap 'exit 0' TERM; touch /tmp.ready; echo up; while true; do sleep 0.05; done",
                r#","readinessProbe":{"exec":{"command":["test","-e","/tmp.ready"]},"periodSeconds":1},
                   "resources":{"limits":{"cpu":"500m","memory":"64Mi"}},
                   "env":[{"name":"NAME","valueFrom":{"fieldRef":{"fieldPath":"metadata.name"}}}]"#
            ),
            script("b", "echo $(cat /etc/hosts | head -1); sleep 1000", ""),
        ),
    );
    first.changes.send(PodChange::Set(PodSource::File, web.clone())).await.unwrap();
    let took = world.until_ready("1").await;
    println!("ready after {took:?}");

    let crash = pod("2", &script("c", "echo last > /dev/termination-log; exit 7", ""));
    first.changes.send(PodChange::Set(PodSource::File, crash.clone())).await.unwrap();
    world
        .until("a crash loop", |w| {
            w.status("2").is_some_and(|s| {
                s.container_statuses.iter().flatten().any(|c| {
                    let last = c.last_state.as_ref().and_then(|s| s.terminated.as_ref());
                    c.restart_count == 1
                        && last.is_some_and(|t| {
                            t.exit_code == 7 && t.message.as_deref() == Some("last\n")
                        })
                })
            })
        })
        .await;

    // The agent is killed; another one finds everything as it was.
    let before = world.status("1").unwrap();
    first.task.abort();
    let _ = first.task.await;
    let (second, _) = agent(&containerd, &world);
    for pod in [&web, &crash] {
        second.changes.send(PodChange::Set(PodSource::File, pod.clone())).await.unwrap();
    }
    second.changes.send(PodChange::Synced(PodSource::File)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let after = world.status("1").unwrap();
    assert_eq!(before.container_statuses, after.container_statuses);
    assert!(ready(&after));

    let log = node.pod_log_dir(&web).join("a/0.log");
    assert!(std::fs::read_to_string(&log).unwrap().contains(" stdout F up"), "{log:?}");

    let begun = Instant::now();
    for uid in ["1", "2"] {
        let removed = PodChange::Removed(PodSource::File, PodUid::from(uid));
        second.changes.send(removed).await.unwrap();
    }
    world.until("gone", |w| w.0.lock().unwrap().gone.len() == 2).await;
    println!("gone after {:?}", begun.elapsed());
    let endpoint = format!("unix://{}", containerd.socket().display());
    let runtime = CriRuntime::new(&endpoint, Duration::from_secs(5)).unwrap();
    assert!(runtime.list_pod_sandboxes(None).await.unwrap().is_empty());
    assert!(runtime.list_containers(None).await.unwrap().is_empty());
    assert!(!node.pod_log_dir(&web).exists());
    for controller in ["memory", "cpu", "pids"] {
        let root = Path::new("/sys/fs/cgroup").join(controller);
        let kubepods = root.join(node.cgroup_root.trim_start_matches('/')).join("kubepods");
        for class in ["burstable", "besteffort"] {
            let left = std::fs::read_dir(kubepods.join(class))
                .map(|entries| entries.flatten().filter(|e| e.path().is_dir()).count());
            assert_eq!(left.unwrap_or(0), 0, "{controller} {class}");
        }
    }
    second.task.abort();
    remove_cgroups(&node.cgroup_root);
}

fn remove_cgroups(root: &str) {
    for controller in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let root = controller.path().join(root.trim_start_matches('/'));
        for sub in ["kubepods/burstable", "kubepods/besteffort", "kubepods", ""] {
            let _ = std::fs::remove_dir(root.join(sub));
        }
    }
}
