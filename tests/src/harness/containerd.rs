//! containerd inside a node's namespaces, to drive the agent over another CRI: Debian's, or for
//! benchmarks the one in the folder `LONGSHORE_BENCH_PEERS`.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, bail};

use super::eventually;
use super::node::Node;

/// A running containerd.
pub struct Containerd {
    process: Child,
}

/// The bridge network that it is given: Debian's plugins, with host ports.
pub const CNI_NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "test", "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.245.0.0/24"}]],
              "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

const SOCKET: &str = "/run/containerd/containerd.sock";

impl Containerd {
    /// Starts it in the namespaces of `node`, with a bridge network of its own.
    ///
    /// # Errors
    /// When containerd, runc or the CNI plugins are not installed.
    pub async fn start(node: &Node) -> Result<Self> {
        for program in ["containerd", "runc", "ctr"] {
            super::command::run(&format!("which {program}")).with_context(|| {
                format!("{program} is missing: apt-get install containerd runc")
            })?;
        }
        let plugins = ["/usr/lib/cni", "/opt/cni/bin"]
            .into_iter()
            .find(|folder| Path::new(folder).join("bridge").exists())
            .context("no CNI plugins: apt-get install containernetworking-plugins")?;
        let etc = node.path("/etc/containerd");
        std::fs::create_dir_all(&etc)?;
        std::fs::write(
            etc.join("config.toml"),
            format!(
                r#"version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{}"
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{plugins}"
  conf_dir = "/etc/cni/net.d"
"#,
                super::image::PAUSE
            ),
        )?;
        let cni = node.path("/etc/cni/net.d");
        std::fs::create_dir_all(&cni)?;
        std::fs::write(cni.join("10-test.conflist"), CNI_NETWORK)?;
        let log = File::create(node.dir().join("containerd.log"))?;
        let mut process = node.command("containerd");
        if let Some(peers) = std::env::var_os("LONGSHORE_BENCH_PEERS")
            && Path::new(&peers).join("containerd").exists()
        {
            process = node.command(Path::new(&peers).join("containerd"));
            // Where it looks for its shim.
            let path = std::env::var("PATH").unwrap_or_default();
            process.env("PATH", format!("{}:{path}", peers.to_string_lossy()));
        }
        let process = process
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start containerd")?;
        let socket = node.path(SOCKET);
        eventually("containerd's socket answers", async || {
            if !socket.exists() {
                bail!("{SOCKET} is not there");
            }
            node.run("ctr", &["version"]).map(drop)
        })
        .await;
        let containerd = Self { process };
        let pause = node.dir().join("pause.tar");
        super::image::write_archive(
            &pause,
            &[super::image::PAUSE],
            None,
            &["sleep", "1000000000"],
        )?;
        containerd.import(node, &pause)?;
        Ok(containerd)
    }

    /// What `--container-runtime-endpoint` takes.
    pub fn endpoint(&self) -> String {
        format!("unix://{SOCKET}")
    }

    /// Imports an archive into the namespace that CRI uses.
    ///
    /// # Errors
    /// When containerd refuses it.
    pub fn import(&self, node: &Node, archive: &Path) -> Result<()> {
        node.run("ctr", &["-n", "k8s.io", "images", "import", &archive.to_string_lossy()]).map(drop)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The node's init takes it along; this only reaps.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
