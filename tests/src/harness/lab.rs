//! The network of one test: a bridge namespace where the control plane listens, and an outside
//! client; nodes are joined to it by veths.

use std::fs::File;
use std::hash::{Hash as _, Hasher as _};
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::command::run;

/// Where the lab's router, the control plane, is.
pub const LAN_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Where the outside client is.
pub const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 200);

/// A network namespace by name, removed on drop.
pub struct NetNs {
    name: String,
}

impl NetNs {
    fn create(name: &str) -> Result<Self> {
        run(&format!("ip netns add {name}"))?;
        run(&format!("ip -n {name} link set lo up"))?;
        Ok(Self { name: name.to_owned() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `work` on a thread inside.
    ///
    /// # Errors
    /// When the namespace cannot be entered, and what `work` returns.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        within(&self.path(), work)
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = run(&format!("ip netns del {}", self.name));
    }
}

/// Runs `work` on a thread in the network namespace at `path`.
///
/// # Errors
/// As [`NetNs::within`].
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                work()
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
}

/// One test's network and work folder.
pub struct Lab {
    id: String,
    lan: NetNs,
    outside: NetNs,
    dir: PathBuf,
}

impl Lab {
    /// The lab of the test `name`: what an earlier run left behind is swept first.
    ///
    /// # Errors
    /// When the machine does not let namespaces be made.
    pub fn new(name: &str) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("these tests need root: run them by `make test`, which calls sudo");
        }
        let mut hasher = std::hash::DefaultHasher::new();
        (name, std::env::current_exe()?.parent()).hash(&mut hasher);
        let id = format!("lt{:08x}", hasher.finish() as u32);
        sweep(&id);
        let dir = Path::new("/tmp/longshore-tests").join(&id);
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let lan = NetNs::create(&format!("{id}-lan"))?;
        let outside = NetNs::create(&format!("{id}-out"))?;
        let l = lan.name();
        run(&format!("ip -n {l} link add br0 type bridge"))?;
        run(&format!("ip -n {l} addr add {LAN_ADDRESS}/24 dev br0"))?;
        run(&format!("ip -n {l} addr add fd99::1/64 dev br0 nodad"))?;
        run(&format!("ip -n {l} link set br0 up"))?;
        let lab = Self { id, lan, outside, dir };
        lab.attach(&lab.outside, OUTSIDE_ADDRESS, "fd99::200")?;
        Ok(lab)
    }

    /// The id that everything of this lab is named by.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The control plane's namespace.
    pub fn lan(&self) -> &NetNs {
        &self.lan
    }

    /// The outside client's namespace.
    pub fn outside(&self) -> &NetNs {
        &self.outside
    }

    /// A folder that is removed with the lab.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A namespace `suffix` on the bridge.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn namespace(&self, suffix: &str, v4: Ipv4Addr, v6: &str) -> Result<NetNs> {
        let namespace = NetNs::create(&format!("{}-{suffix}", self.id))?;
        self.attach(&namespace, v4, v6)?;
        Ok(namespace)
    }

    fn attach(&self, namespace: &NetNs, v4: Ipv4Addr, v6: &str) -> Result<()> {
        let (lan, n) = (self.lan.name(), namespace.name());
        let port = format!("p{}", u32::from(v4) & 0xff);
        run(&format!("ip -n {lan} link add {port} type veth peer name eth0 netns {n}"))?;
        run(&format!("ip -n {lan} link set {port} master br0 up"))?;
        run(&format!("ip -n {n} addr add {v4}/24 dev eth0"))?;
        run(&format!("ip -n {n} addr add {v6}/64 dev eth0 nodad"))?;
        run(&format!("ip -n {n} link set eth0 up"))?;
        run(&format!("ip -n {n} route add default via {LAN_ADDRESS}"))?;
        run(&format!("ip -n {n} -6 route add default via fd99::1"))?;
        Ok(())
    }

    /// Makes listening sockets in the control plane's namespace.
    pub fn lan_bind(&self, port: u16) -> crate::control_plane::serve::Bind {
        let path = self.lan.path();
        Box::new(move || {
            within(&path, move || TcpListener::bind((IpAddr::from(LAN_ADDRESS), port)))
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        super::leaks::detach_loops(&self.id);
        if std::thread::panicking() && std::env::var_os("LONGSHORE_TEST_KEEP").is_some() {
            return;
        }
        sweep_files(&self.id);
    }
}

/// Ends and removes what an earlier run of the same lab left.
fn sweep(id: &str) {
    let names = run("ip netns list").unwrap_or_default();
    for name in names.split_whitespace().filter(|n| n.starts_with(id)) {
        let pids = run(&format!("ip netns pids {name}")).unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|p| p.parse().ok()) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        let _ = run(&format!("ip netns del {name}"));
    }
    super::leaks::detach_loops(id);
    sweep_files(id);
}

fn sweep_files(id: &str) {
    super::leaks::remove_cgroups(id);
    let dir = Path::new("/tmp/longshore-tests").join(id);
    // Mounts below it belong to the node's namespace and went with it.
    let _ = std::fs::remove_dir_all(dir);
}
