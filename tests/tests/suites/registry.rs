//! Real registries (docker-registry) in a node's network.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use tests::harness::{Node, eventually, image};

/// A registry in the node's network, on loopback; ends with the value.
pub struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts it; with `auth` for that user and password only.
pub fn registry(node: &Node, port: u16, auth: Option<(&str, &str)>) -> Registry {
    let dir = node.dir().join(format!("registry-{port}"));
    std::fs::create_dir_all(&dir).unwrap();
    let mut config = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}/data}}}}\nhttp: {{addr: \
         \"127.0.0.1:{port}\"}}\n",
        dir.display()
    );
    if let Some((user, password)) = auth {
        let file = dir.join("htpasswd").display().to_string();
        node.run("htpasswd", &["-Bbc", &file, user, password]).unwrap();
        config += &format!("auth: {{htpasswd: {{realm: tests, path: {file}}}}}\n");
    }
    let path = dir.join("config.yml");
    std::fs::write(&path, config).unwrap();
    let log = std::fs::File::create(dir.join("log")).unwrap();
    // The registry is a child of the nsenter that is killed.
    let mut command = node.command("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "docker-registry", "serve"])
        .arg(&path)
        .stdout(Stdio::null())
        .stderr(log);
    Registry(command.spawn().unwrap())
}

/// Pushes an image of this name, with busybox in it once or twice, so that the layers of the
/// example image and of two such images differ.
pub async fn push(node: &Node, name: &str, busybox: bool, credentials: Option<&str>) {
    let archive = node.dir().join(format!("push-{busybox}.tar"));
    let program = busybox.then(|| PathBuf::from("/bin/busybox"));
    image::write_archive(&archive, &[image::IMAGE], program.as_deref(), &["/bin/sh"]).unwrap();
    let (from, to) = (format!("docker-archive:{}", archive.display()), format!("docker://{name}"));
    let mut words = vec!["copy", "--insecure-policy", "--dest-tls-verify=false"];
    if let Some(credentials) = credentials {
        words.extend(["--dest-creds", credentials]);
    }
    words.extend([from.as_str(), to.as_str()]);
    eventually(&format!("{name} is pushed"), async || node.run("skopeo", &words)).await;
}
