//! Images made of plain tars, a registry, and namespaces of the test's own.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use base64::Engine;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use sha2::{Digest, Sha256};

/// Moves the test (each is a process of its own) into its own network and mount namespace.
pub fn own_namespaces() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .unwrap();
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

pub enum Entry {
    Dir(&'static str, u32),
    File(&'static str, &'static [u8]),
}

#[derive(Clone)]
pub struct Layer {
    pub tar: Vec<u8>,
    pub blob: Vec<u8>,
    pub media_type: &'static str,
}

impl Layer {
    pub fn plain(entries: &[Entry]) -> Self {
        let mut builder = tar::Builder::new(Vec::new());
        for entry in entries {
            let mut header = tar::Header::new_gnu();
            let (path, data): (_, &[u8]) = match entry {
                Entry::Dir(path, mode) => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    (path, b"")
                }
                Entry::File(path, data) => {
                    header.set_mode(0o644);
                    (path, data)
                }
            };
            header.set_size(data.len() as u64);
            builder.append_data(&mut header, path, data).unwrap();
        }
        let tar = builder.into_inner().unwrap();
        Self { blob: tar.clone(), tar, media_type: "application/vnd.oci.image.layer.v1.tar" }
    }

    pub fn gzip(entries: &[Entry]) -> Self {
        let plain = Self::plain(entries);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain.tar).unwrap();
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        Self { blob: encoder.finish().unwrap(), media_type, ..plain }
    }

    pub fn zstd(entries: &[Entry]) -> Self {
        let plain = Self::plain(entries);
        let media_type = "application/vnd.oci.image.layer.v1.tar+zstd";
        Self { blob: zstd::encode_all(&plain.tar[..], 3).unwrap(), media_type, ..plain }
    }
}

#[derive(Clone)]
pub struct ImageSpec {
    pub layers: Vec<Layer>,
    pub diff_ids: Vec<String>,
}

impl ImageSpec {
    pub fn new(layers: Vec<Layer>) -> Self {
        let diff_ids = layers.iter().map(|layer| digest(&layer.tar)).collect();
        Self { layers, diff_ids }
    }

    pub fn config(&self) -> Vec<u8> {
        serde_json::to_vec(&serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["A=b"], "Cmd": ["/bin/app"], "Volumes": null, "Labels": null},
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            "history": [],
        }))
        .unwrap()
    }

    pub fn config_digest(&self) -> String {
        digest(&self.config())
    }

    pub fn manifest(&self) -> Vec<u8> {
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| {
                serde_json::json!({"mediaType": layer.media_type,
                    "digest": digest(&layer.blob), "size": layer.blob.len()})
            })
            .collect();
        serde_json::to_vec(&serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": self.config_digest(), "size": self.config().len()},
            "layers": layers,
        }))
        .unwrap()
    }
}

fn add(builder: &mut tar::Builder<Vec<u8>>, path: &str, data: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, path, data).unwrap();
}

/// As `docker save` used to write it: layers first, the list of contents last.
pub fn docker_archive(image: &ImageSpec, tags: &[&str]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut paths = Vec::new();
    for (n, layer) in image.layers.iter().enumerate() {
        paths.push(format!("{n}/layer.tar"));
        add(&mut builder, &paths[n], &layer.tar);
    }
    let config = format!("{}.json", &image.config_digest()[7..]);
    add(&mut builder, &config, &image.config());
    let manifest =
        serde_json::json!([{"Config": config, "RepoTags": tags, "Layers": paths}]).to_string();
    add(&mut builder, "manifest.json", manifest.as_bytes());
    builder.into_inner().unwrap()
}

pub fn oci_layout(image: &ImageSpec, name: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    add(&mut builder, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    let manifest = image.manifest();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest(&manifest), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": name}}]});
    add(&mut builder, "index.json", index.to_string().as_bytes());
    let blobs = image.layers.iter().map(|layer| layer.blob.clone());
    for blob in blobs.chain([manifest, image.config()]) {
        add(&mut builder, &format!("./blobs/sha256/{}", &digest(&blob)[7..]), &blob);
    }
    builder.into_inner().unwrap()
}

pub struct Registry {
    process: Child,
    folder: tempfile::TempDir,
    data: PathBuf,
    pub address: SocketAddr,
    auth: Option<String>,
}

/// How a registry is talked to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    None,
    /// With a certificate for 127.0.0.1, signed by a CA of its own.
    Server,
    /// The same, and only for clients with a certificate by that CA.
    Client,
}

impl Registry {
    pub fn start(user: Option<(&str, &str)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        Self::run(folder, &data, user, Tls::None)
    }

    /// Another way to what this one has.
    pub fn beside(&self, user: Option<(&str, &str)>, tls: Tls) -> Self {
        Self::run(tempfile::tempdir().unwrap(), &self.data, user, tls)
    }

    /// A file of its CA: `ca.pem`, and `client.pem` with `client.key` by it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(folder: tempfile::TempDir, data: &Path, user: Option<(&str, &str)>, tls: Tls) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: false\nstorage:\n  filesystem:\n    \
             rootdirectory: {}\nhttp:\n  addr: {address}\n",
            data.display()
        );
        if tls != Tls::None {
            let [certificate, key] = make_certificates(folder.path());
            config += &format!("  tls:\n    certificate: {certificate}\n    key: {key}\n");
        }
        if tls == Tls::Client {
            let ca = folder.path().join("ca.pem");
            config += &format!("    clientcas:\n      - {}\n", ca.display());
        }
        let mut auth = None;
        if let Some((user, password)) = user {
            let file = folder.path().join("htpasswd");
            let made = Command::new("htpasswd")
                .args(["-Bbc"])
                .arg(&file)
                .args([user, password])
                .stderr(Stdio::null())
                .status();
            assert!(made.expect("htpasswd (apache2-utils) is needed").success());
            config +=
                &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display());
            let text = format!("{user}:{password}");
            auth = Some(base64::engine::general_purpose::STANDARD.encode(text));
        }
        let path = folder.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(path)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker-registry is needed");
        let data = data.to_owned();
        let registry = Self { process, folder, data, address, auth };
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(started.elapsed() < Duration::from_secs(20), "{}", registry.log());
            std::thread::yield_now();
        }
        registry
    }

    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// How often a blob was fetched.
    pub fn downloads(&self, digest: &str) -> usize {
        let path = format!("/blobs/{digest}");
        self.log().lines().filter(|l| l.contains(&path) && l.contains("\"GET ")).count()
    }

    /// Flips bytes of a stored blob.
    pub fn damage(&self, blob: &[u8]) {
        let hex = &digest(blob)[7..];
        let path =
            self.data.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
        let mut content = fs::read(&path).unwrap();
        assert_eq!(content, blob);
        let middle = content.len() / 2;
        content[middle] ^= 0xff;
        fs::write(path, content).unwrap();
    }

    pub fn push(&self, repository: &str, tag: &str, image: &ImageSpec) {
        self.push_blobs(repository, image);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        self.put(&format!("/v2/{repository}/manifests/{tag}"), kind, &image.manifest());
    }

    /// An index of `own` for this machine and `other` for another; returns its digest.
    pub fn push_index(
        &self,
        repository: &str,
        tag: &str,
        own: &ImageSpec,
        other: &ImageSpec,
    ) -> String {
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let entries: Vec<_> = [(other, "s390x"), (own, "amd64")]
            .into_iter()
            .map(|(image, architecture)| {
                self.push_blobs(repository, image);
                let manifest = image.manifest();
                let path = format!("/v2/{repository}/manifests/{}", digest(&manifest));
                self.put(&path, kind, &manifest);
                serde_json::json!({"mediaType": kind, "digest": digest(&manifest),
                    "size": manifest.len(),
                    "platform": {"os": "linux", "architecture": architecture}})
            })
            .collect();
        let kind = "application/vnd.oci.image.index.v1+json";
        let index = serde_json::json!(
            {"schemaVersion": 2, "mediaType": kind, "manifests": entries})
        .to_string();
        self.put(&format!("/v2/{repository}/manifests/{tag}"), kind, index.as_bytes());
        digest(index.as_bytes())
    }

    fn push_blobs(&self, repository: &str, image: &ImageSpec) {
        let blobs = image.layers.iter().map(|layer| layer.blob.clone());
        for blob in blobs.chain([image.config()]) {
            let path = format!("/v2/{repository}/blobs/uploads/");
            let answer = self.request("POST", &path, "", b"");
            let location = answer
                .lines()
                .find_map(|line| line.strip_prefix("Location: "))
                .unwrap_or_else(|| panic!("no upload: {answer}"));
            let (_, path) = location.split_once("://").unwrap().1.split_once('/').unwrap();
            let path = format!("/{path}&digest={}", digest(&blob));
            self.put(&path, "application/octet-stream", &blob);
        }
    }

    fn put(&self, path: &str, kind: &str, body: &[u8]) {
        let answer = self.request("PUT", path, kind, body);
        assert!(answer.starts_with("HTTP/1.1 201"), "{path}: {answer}");
    }

    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let auth = match &self.auth {
            Some(auth) => format!("Authorization: Basic {auth}\r\n"),
            None => String::new(),
        };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{auth}Content-Type: {kind}\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            self.address,
            body.len()
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.replace("\r\n", "\n")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A CA in `folder`, a certificate for 127.0.0.1 and one for a client by it; the paths of the
/// server's certificate and key.
fn make_certificates(folder: &Path) -> [String; 2] {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let new = |names: &[&str], name: &str| {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params
    };
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    // Clients choose their certificate by the name of the CA.
    let mut ca = new(&[], &format!("CA of {}", folder.display()));
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    write("ca.pem", ca.self_signed(&ca_key).unwrap().pem());
    let issuer = Issuer::new(ca, ca_key);
    let issue = |names: &[&str], name: &str| {
        let key = KeyPair::generate().unwrap();
        let certificate = new(names, name).signed_by(&key, &issuer).unwrap();
        [
            write(&format!("{name}.pem"), certificate.pem()),
            write(&format!("{name}.key"), key.serialize_pem()),
        ]
    };
    issue(&[], "client");
    issue(&["127.0.0.1"], "registry")
}

/// A proxy before `target` that cuts each connection after `limit` bytes of answers.
pub fn cutting_proxy(target: SocketAddr, limit: u64) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let server = TcpStream::connect(target).unwrap();
                let (mut up_from, mut up_to) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut up_from, &mut up_to));
                let (mut down_from, mut down_to) = (&server, &client);
                let _ = std::io::copy(&mut (&mut down_from).take(limit), &mut down_to);
                let _ = client.shutdown(std::net::Shutdown::Both);
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}
