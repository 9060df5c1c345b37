//! One node: its namespaces, its `longshore`, and what a test does to it.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::{checked, descendants, processes_of};
use super::containerd::Containerd;
use super::lab::{Lab, NetNs, within};
use super::leaks::{self, Snapshot};
use super::net::{self, Answer};
use super::{eventually, image};

/// Which runtime the agent drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// The built-in CRI shim.
    Shim,
    /// Debian's containerd, with runc and the CNI plugins.
    Containerd,
}

/// How a node is made.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Node name; also names its namespaces.
    pub name: &'static str,
    /// The last number of its address on the lab's network.
    pub number: u8,
    /// Runtime.
    pub runtime: Runtime,
    /// The `longshore` binary, where it is not [`longshore_binary`].
    pub binary: Option<PathBuf>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { name: "node", number: 2, runtime: Runtime::Shim, binary: None }
    }
}

/// A node under test.
pub struct Node {
    name: String,
    options: NodeOptions,
    netns: NetNs,
    dir: PathBuf,
    cgroup: String,
    init: Child,
    init_pid: u32,
    longshore: Option<Child>,
    arguments: Vec<String>,
    containerd: Option<Containerd>,
    before: Snapshot,
}

/// The `longshore` binary: `LONGSHORE_BIN`, else the one that cargo built next to this test.
///
/// # Errors
/// When there is none.
pub fn longshore_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LONGSHORE_BIN") {
        return Ok(path.into());
    }
    built("longshore")
}

/// A binary of the workspace that cargo built next to this test.
///
/// # Errors
/// When it is not there.
pub fn built(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own
        .ancestors()
        .skip(1)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("no {name} next to {}: cargo build --workspace --bins", own.display())
        })?;
    Ok(path)
}

/// `binary` as a proxy alone that keeps all it has in `folder`.
pub fn proxy_alone(binary: &Path, folder: &Path) -> Command {
    let mut command = Command::new(binary);
    command.args(["run", "--only", "proxy"]);
    for (flag, part) in [
        ("--root-dir", "root"),
        ("--state-dir", "state"),
        ("--run-dir", "run"),
        ("--pod-manifest-path", "manifests"),
    ] {
        command.arg(flag).arg(folder.join(part));
    }
    command
}

/// PID 1 of a node: private mounts, then reaps what is orphaned.
const INIT: &str = r#"set -e
mount -t tmpfs tmpfs /run
mount --bind "$WORK/var-lib" /var/lib
mount --bind "$WORK/var-log" /var/log
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$WORK/etc,workdir=$WORK/etc-work" /etc
rm -rf /etc/cni/net.d /etc/kubernetes /etc/longshore
mkdir -p /run/lock /run/netns /etc/kubernetes/manifests
[ ! -d /opt/cni ] || [ -z "$HIDE_CNI" ] || mount -t tmpfs tmpfs /opt/cni
hostname "$NAME"
: > "$WORK/ready"
while :; do sleep 100000 & wait $! || :; done
"#;

impl Node {
    /// Makes the node's namespaces; nothing runs in them yet.
    ///
    /// # Errors
    /// When the machine does not let them be made.
    pub async fn new(lab: &Lab, options: NodeOptions) -> Result<Self> {
        let address = Ipv4Addr::new(10, 99, 0, options.number);
        let netns = lab.namespace(options.name, address, &format!("fd99::{}", options.number))?;
        let dir = lab.dir().join(options.name);
        for folder in ["var-lib", "var-log", "etc", "etc-work"] {
            std::fs::create_dir_all(dir.join(folder))?;
        }
        let cgroup = format!("{}-{}", lab.id(), options.name);
        // A real control plane sees the nodes of many tests.
        let name = format!("{}-{}", options.name, lab.id());
        leaks::create_cgroups(&cgroup).context("make the node's cgroups")?;
        let log = File::create(dir.join("init.log"))?;
        let mut init = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "nsenter"])
            .arg(format!("--net={}", netns.path().display()))
            .args(["--", "unshare", "--mount", "--pid", "--ipc", "--uts", "--fork"])
            .args(["--kill-child=KILL", "--mount-proc", "--propagation", "private", "--"])
            .args(["sh", "-c", INIT])
            .env("WORK", &dir)
            .env("NAME", &name)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the node's init (setpriv, nsenter, unshare)")?;
        for _ in 0..1000 {
            if dir.join("ready").exists() {
                break;
            }
            if let Some(status) = init.try_wait()? {
                let said = std::fs::read_to_string(dir.join("init.log")).unwrap_or_default();
                bail!("the node's init ended with {status}: {said}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let init_pid =
            *descendants(init.id()).first().context("the node's init did not get ready")?;
        let mut node = Self {
            before: Snapshot::take(init_pid, netns.name(), &cgroup),
            options,
            name,
            netns,
            dir,
            cgroup,
            init,
            init_pid,
            longshore: None,
            arguments: Vec::new(),
            containerd: None,
        };
        if node.options.runtime == Runtime::Containerd {
            node.containerd = Some(Containerd::start(&node).await?);
        }
        Ok(node)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the lab's network.
    pub fn address(&self) -> IpAddr {
        Ipv4Addr::new(10, 99, 0, self.options.number).into()
    }

    /// Its work folder, the same path inside and outside.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its network namespace.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// PID 1 of its namespaces, as the machine counts.
    pub fn init_pid(&self) -> u32 {
        self.init_pid
    }

    /// The parent cgroup of its pods.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// A path of the node, as the test reaches it.
    pub fn path(&self, inside: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.init_pid)).join(inside.trim_start_matches('/'))
    }

    /// A command that will run in the node's namespaces.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.init_pid))
            .args(["--mount", "--net", "--pid", "--ipc", "--uts", "--wd=/", "--"])
            .arg(program)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command in the node to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        self.command(program).args(arguments).output().with_context(|| format!("run {program}"))
    }

    /// Runs a command in the node and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        checked(&format!("{program} {arguments:?}"), &self.output(program, arguments)?)
    }

    fn binary(&self) -> Result<PathBuf> {
        self.options.binary.clone().map_or_else(longshore_binary, Ok)
    }

    /// Runs `longshore` with these arguments to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn longshore(&self, arguments: &[&str]) -> Result<Output> {
        self.command(self.binary()?).args(arguments).output().context("run longshore")
    }

    /// Starts `longshore run` with the flags that this namespace needs and `arguments`; a later
    /// [`Node::restart`] uses the same.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, arguments: &[&str]) -> Result<()> {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
        self.spawn()
    }

    /// Sets eviction thresholds that the machine under the tests does not reach: nodes share its disk
    /// and memory, and one under pressure takes no pods.
    ///
    /// # Errors
    /// When the node has not joined yet.
    pub fn lower_eviction_thresholds(&self) -> Result<()> {
        self.configure(|config| {
            if config.get("evictionHard").is_none() {
                config["evictionHard"] = serde_json::json!({"memory.available": "1Mi",
                    "nodefs.available": "1Mi", "imagefs.available": "1Mi", "nodefs.inodesFree": "0%"});
            }
        })
    }

    /// Changes the node's KubeletConfiguration, for its next start.
    ///
    /// # Errors
    /// When the node has not joined yet.
    pub fn configure(&self, change: impl FnOnce(&mut serde_json::Value)) -> Result<()> {
        let path = self.path("/var/lib/kubelet/config.yaml");
        let text = std::fs::read_to_string(&path).context("read the node's configuration")?;
        let mut config: serde_json::Value = serde_saphyr::from_str(&text)?;
        let before = config.clone();
        change(&mut config);
        if config != before {
            std::fs::write(&path, config.to_string()).context("write the node's configuration")?;
        }
        Ok(())
    }

    fn spawn(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.dir.join("longshore.log"))?;
        let mut command = self.command(self.binary()?);
        command
            .args(["run", "--hostname-override", &self.name])
            .arg(format!("--node-ip={}", self.address()))
            .arg(format!("--cgroup-root=/{}", self.cgroup));
        if let Some(containerd) = &self.containerd {
            command.arg(format!("--container-runtime-endpoint={}", containerd.endpoint()));
        }
        let child = command
            .args(&self.arguments)
            .env("LONGSHORE_LOG", std::env::var("LONGSHORE_LOG").unwrap_or("info".into()))
            .env("RUST_BACKTRACE", "1")
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start longshore run")?;
        self.longshore = Some(child);
        Ok(())
    }

    /// The process id of the running `longshore`.
    pub fn longshore_pid(&self) -> Option<u32> {
        let child = self.longshore.as_ref()?;
        // nsenter forks to enter the PID namespace.
        let children =
            std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Ends `longshore` with `signal` and waits until it is gone. Containers live on.
    pub async fn end(&mut self, signal: Signal) {
        let pid = self.longshore_pid();
        let Some(mut child) = self.longshore.take() else { return };
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
        for _ in 0..1500 {
            if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("longshore did not end within 15 s of {signal}");
    }

    /// `kill -9` and start anew with the same arguments.
    ///
    /// # Errors
    /// When it cannot be started again.
    pub async fn restart(&mut self) -> Result<()> {
        self.end(Signal::SIGKILL).await;
        self.spawn()
    }

    /// Fails if `longshore` has ended by itself.
    ///
    /// # Errors
    /// With how it ended and its last words.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(child) = &mut self.longshore
            && let Some(status) = child.try_wait()?
        {
            bail!(
                "longshore ended: {status} (signal {:?})\n{}",
                status.signal(),
                self.log_tail(40)
            );
        }
        Ok(())
    }

    /// Waits until the agent says that it is healthy.
    pub async fn ready(&mut self) {
        let this = self;
        eventually("the agent's /healthz is ok", async || -> Result<()> {
            this.check_alive()?;
            let answer = this.get(([127, 0, 0, 1], 10248).into(), "/healthz")?;
            if answer.code != 200 {
                bail!("{}: {}", answer.code, answer.body);
            }
            Ok(())
        })
        .await;
    }

    /// GETs from the node's own namespace.
    ///
    /// # Errors
    /// What the socket says.
    pub fn get(&self, to: SocketAddr, path: &str) -> std::io::Result<Answer> {
        net::http_get(&self.netns.path(), to, path)
    }

    /// The last `lines` of the node's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = std::fs::read_to_string(self.dir.join("longshore.log")).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Puts a manifest into the static pod folder, atomically.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_manifest(&self, name: &str, text: &str) -> Result<()> {
        let folder = self.path("/etc/kubernetes/manifests");
        let temporary = folder.join(format!(".{name}.tmp"));
        std::fs::write(&temporary, text)?;
        Ok(std::fs::rename(temporary, folder.join(name))?)
    }

    /// Takes it away.
    ///
    /// # Errors
    /// When it is not there.
    pub fn remove_manifest(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.path("/etc/kubernetes/manifests").join(name))?)
    }

    /// Imports the example image into the node's runtime.
    ///
    /// # Errors
    /// When the archive cannot be made or the runtime refuses it.
    pub fn import_example_image(&self) -> Result<()> {
        let archive = self.dir.join("example-image.tar");
        image::write_archive(&archive, &[image::IMAGE], Some(&built("workload")?), &["/bin/sh"])?;
        match &self.containerd {
            Some(containerd) => containerd.import(self, &archive),
            None => {
                let output = self.longshore(&["image", "import", &archive.to_string_lossy()])?;
                checked("longshore image import", &output).map(drop)
            }
        }
    }

    /// The network namespace of the pod with this address: found by its processes, so for any
    /// runtime.
    ///
    /// # Errors
    /// When no process has it.
    pub fn pod_netns(&self, ip: IpAddr) -> Result<PathBuf> {
        for pid in processes_of(self.init_pid) {
            let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
            let Ok(addresses) = within(&path, || {
                Ok(nix::ifaddrs::getifaddrs()?
                    .filter_map(|a| a.address)
                    .filter_map(|a| {
                        a.as_sockaddr_in()
                            .map(|v4| IpAddr::from(v4.ip()))
                            .or_else(|| a.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
                    })
                    .collect::<Vec<_>>())
            }) else {
                continue;
            };
            if addresses.contains(&ip) {
                return Ok(path);
            }
        }
        bail!("no process of {} has the address {ip}", self.name)
    }

    /// What exists now in the node's namespaces.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::take(self.init_pid, self.netns.name(), &self.cgroup)
    }

    /// Waits until nothing of any pod is left.
    pub async fn nothing_of_pods_left(&self) {
        eventually("nothing of the pods is left on the node", async || {
            let left = self.snapshot().left_by_pods(&self.before);
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })
        .await;
    }

    /// What the node left beyond what was there before `longshore` ran.
    pub fn left_behind(&self) -> Vec<String> {
        self.snapshot().beyond(&self.before)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of node {} (last lines) ---\n{}", self.name, self.log_tail(150));
            eprintln!("--- end of log; what is on the node ---");
            for thing in self.left_behind() {
                eprintln!("{thing}");
            }
        }
        let _ = kill(Pid::from_raw(self.init_pid as i32), Signal::SIGKILL);
        let _ = self.init.kill();
        let _ = self.init.wait();
        if let Some(mut child) = self.longshore.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        leaks::remove_cgroups(&self.cgroup);
    }
}
