//! The control plane of a lab: the test control plane, or a real one (`LONGSHORE_TEST_KUBECONFIG`)
//! behind a relay that can be cut like it. Nodes reach both at an address in the lab.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::caller::Caller;
use super::command::run;
use super::lab::{LAN_ADDRESS, Lab, within};
use super::node::Node;
use super::{eventually, image};
use crate::control_plane::pki::hex;
use crate::control_plane::serve::{Bind, Endpoint};
use crate::control_plane::{self, ControlPlane};

/// A control plane that nodes of a lab can join.
pub struct Cluster {
    /// The administrator's client; not concerned by faults and cuts.
    pub admin: Caller,
    server: SocketAddr,
    ca_pem: String,
    front: Front,
    namespace: String,
}

enum Front {
    Fake { plane: Box<ControlPlane>, nodes: Endpoint, _admin: Endpoint },
    Real { relay: Relay },
}

impl Cluster {
    /// The control plane of `lab`.
    ///
    /// # Errors
    /// When it cannot be started or reached.
    pub async fn new(lab: &Lab) -> Result<Self> {
        let mut cluster = match std::env::var("LONGSHORE_TEST_KUBECONFIG") {
            Ok(path) => Self::real(lab, &path).await?,
            Err(_) => Self::fake(lab).await?,
        };
        // Longshore's own administrator step.
        let output = std::process::Command::new(super::node::longshore_binary()?)
            .args(["cluster-setup", "-o", "json"])
            .output()?;
        let list: Value = serde_json::from_slice(&output.stdout).context("read cluster-setup")?;
        for object in list["items"].as_array().into_iter().flatten() {
            let plural = format!("{}s", object["kind"].as_str().unwrap_or_default().to_lowercase());
            let version = object["apiVersion"].as_str().unwrap_or_default();
            let (code, answer) =
                cluster.admin.post(&format!("/apis/{version}/{plural}"), object.clone()).await;
            if ![201, 409].contains(&code) {
                bail!("apply cluster-setup: {code} {answer}");
            }
        }
        let made = cluster
            .admin
            .create("/api/v1/namespaces", json!({"metadata": {"generateName": "t-"}}))
            .await?;
        cluster.namespace = made["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let account = cluster.path("serviceaccounts/default");
        eventually("the default ServiceAccount is there", async || {
            cluster.admin.read(&account).await.map(drop)
        })
        .await;
        Ok(cluster)
    }

    async fn fake(lab: &Lab) -> Result<Self> {
        let plane = ControlPlane::new()?;
        let nodes = plane.serve(&[LAN_ADDRESS.into()], lab.lan_bind(6443))?;
        let own = plane.serve_loopback(0)?;
        plane.publish(nodes.address())?;
        let text = plane.admin_kubeconfig(own.address());
        Ok(Self {
            admin: Caller(control_plane::client(&text).await?),
            server: nodes.address(),
            ca_pem: ca_of(&text)?,
            front: Front::Fake { plane: Box::new(plane), nodes, _admin: own },
            namespace: String::new(),
        })
    }

    async fn real(lab: &Lab, kubeconfig: &str) -> Result<Self> {
        let text = std::fs::read_to_string(kubeconfig)
            .with_context(|| format!("read {kubeconfig} (LONGSHORE_TEST_KUBECONFIG)"))?;
        let parsed = kube::config::Kubeconfig::from_yaml(&text)?;
        let url = parsed
            .clusters
            .first()
            .and_then(|c| c.cluster.as_ref()?.server.clone())
            .context("no server in the kubeconfig")?;
        let server: SocketAddr = url
            .trim_start_matches("https://")
            .parse()
            .with_context(|| format!("{url}: the suites need an address and a port"))?;
        // Its certificate is good for this address only, so the lab's router has it too.
        run(&format!("ip -n {} addr add {}/32 dev br0", lab.lan().name(), server.ip()))?;
        let path = lab.lan().path();
        let bind: Bind = Box::new(move || within(&path, move || TcpListener::bind(server)));
        Ok(Self {
            admin: Caller(control_plane::client(&text).await?),
            server,
            ca_pem: ca_of(&text)?,
            front: Front::Real { relay: Relay::start(server, bind)? },
            namespace: String::new(),
        })
    }

    /// Where nodes reach the API.
    pub fn server(&self) -> SocketAddr {
        self.server
    }

    /// The test control plane, for tests that make it misbehave; `None` on a real one.
    pub fn fake_plane(&self) -> Option<&ControlPlane> {
        match &self.front {
            Front::Fake { plane, .. } => Some(plane),
            Front::Real { .. } => None,
        }
    }

    /// Cuts nodes off until [`Cluster::restore`]: connections break, new ones are refused.
    pub async fn cut(&self) {
        match &self.front {
            Front::Fake { nodes, .. } => nodes.stop().await,
            Front::Real { relay } => relay.stop().await,
        }
    }

    /// Lets nodes connect again.
    ///
    /// # Errors
    /// When the address cannot be bound again.
    pub fn restore(&self) -> Result<()> {
        match &self.front {
            Front::Fake { nodes, .. } => nodes.resume(),
            Front::Real { relay } => relay.resume(),
        }
    }

    /// Skips the real control plane, whatever the environment says: for benchmarks.
    ///
    /// # Errors
    /// As [`Cluster::new`].
    pub async fn for_benchmark(lab: &Lab) -> Result<Self> {
        let mut cluster = Self::fake(lab).await?;
        cluster.namespace = "default".into();
        let account = cluster.path("serviceaccounts/default");
        eventually("the default ServiceAccount is there", async || {
            cluster.admin.read(&account).await.map(drop)
        })
        .await;
        Ok(cluster)
    }

    /// A path of this test's own namespace.
    pub fn path(&self, rest: &str) -> String {
        format!("/api/v1/namespaces/{}/{rest}", self.namespace)
    }

    /// This test's own namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// `sha256:...` of the CA.
    ///
    /// # Errors
    /// When the CA cannot be read.
    pub fn ca_pin(&self) -> Result<String> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(self.ca_pem.as_bytes())?;
        let cert = pem.parse_x509()?;
        Ok(format!("sha256:{}", hex(&Sha256::digest(cert.tbs_certificate.subject_pki.raw))))
    }

    /// A bootstrap token that is good for `seconds`, as `kubeadm token create` makes one.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn token(&self, seconds: i64) -> Result<String> {
        let random = |n: usize| -> String {
            (0..n).map(|_| fastrand::alphanumeric().to_ascii_lowercase()).collect()
        };
        let (id, secret) = (random(6), random(16));
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        let object = json!({"metadata": {"name": format!("bootstrap-token-{id}")},
            "type": "bootstrap.kubernetes.io/token",
            "stringData": {"token-id": id, "token-secret": secret,
                "expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
                "auth-extra-groups": "system:bootstrappers:kubeadm:default-node-token"}});
        self.admin.create("/api/v1/namespaces/kube-system/secrets", object).await?;
        if seconds > 0 {
            let info = "/api/v1/namespaces/kube-public/configmaps/cluster-info";
            eventually("cluster-info is signed with the token", async || {
                let info = self.admin.read(info).await?;
                if info["data"][format!("jws-kubeconfig-{id}")].is_string() {
                    Ok(())
                } else {
                    bail!("not yet: {}", info["data"])
                }
            })
            .await;
        }
        Ok(format!("{id}.{secret}"))
    }

    /// Joins `node` (files only), imports the example image, starts `longshore run` and waits until
    /// the node is Ready.
    ///
    /// # Errors
    /// When the join fails.
    pub async fn join(&self, node: &mut Node, run: &[&str]) -> Result<()> {
        self.join_only(node).await?;
        node.start(run)?;
        node.ready().await;
        self.node_ready(node.name()).await;
        node.import_example_image()
    }

    /// Writes what makes `node` a member, and starts nothing.
    ///
    /// # Errors
    /// When the join fails.
    pub async fn join_only(&self, node: &Node) -> Result<()> {
        let (server, token, pin) =
            (self.server.to_string(), self.token(3600).await?, self.ca_pin()?);
        let output = node.longshore(&[
            "join",
            &server,
            "--token",
            &token,
            "--discovery-token-ca-cert-hash",
            &pin,
            "--node-name",
            node.name(),
            "--node-ip",
            &node.address().to_string(),
            "--no-start",
        ])?;
        super::command::checked("longshore join", &output)?;
        node.lower_eviction_thresholds()
    }

    /// Waits until the node is Ready.
    pub async fn node_ready(&self, name: &str) {
        eventually("the node is Ready", async || {
            let node = self.admin.read(&format!("/api/v1/nodes/{name}")).await?;
            if condition(&node, "Ready") == Some("True") {
                Ok(())
            } else {
                bail!("{}", node["status"]["conditions"])
            }
        })
        .await;
    }

    /// Creates a pod bound to `node`: `spec` with the example image filled in where none is named.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn pod(&self, node: &Node, name: &str, mut spec: Value) -> Result<Value> {
        spec["nodeName"] = node.name().into();
        fill_image(&mut spec);
        let object = json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": spec});
        self.admin.create(&self.path("pods"), object).await
    }

    /// The pod as it is now.
    ///
    /// # Errors
    /// When it is not there.
    pub async fn read_pod(&self, name: &str) -> Result<Value> {
        self.admin.read(&self.path(&format!("pods/{name}"))).await
    }

    /// Waits until the pod is as `good` says, and returns it.
    pub async fn pod_until(&self, name: &str, what: &str, good: impl Fn(&Value) -> bool) -> Value {
        eventually(&format!("pod {name}: {what}"), async || {
            let pod = self.read_pod(name).await?;
            if good(&pod) { Ok(pod) } else { bail!("{:#}", pod["status"]) }
        })
        .await
    }

    /// Waits until the pod is Ready.
    pub async fn pod_ready(&self, name: &str) -> Value {
        self.pod_until(name, "Ready", |p| condition(p, "Ready") == Some("True")).await
    }

    /// Deletes the pod and waits until the node has confirmed.
    ///
    /// # Errors
    /// When the delete is refused.
    pub async fn delete_pod(&self, name: &str) -> Result<()> {
        let path = self.path(&format!("pods/{name}"));
        self.admin.remove(&path).await?;
        self.pod_gone(name).await;
        Ok(())
    }

    /// Waits until the pod's object is gone.
    pub async fn pod_gone(&self, name: &str) {
        eventually(&format!("pod {name} is gone"), async || {
            match self.admin.get(&self.path(&format!("pods/{name}"))).await {
                (404, _) => Ok(()),
                (_, pod) => Err(pod["status"].clone()),
            }
        })
        .await;
    }

    /// Takes this test's objects away; only a real control plane outlives the test.
    pub async fn end(&self, nodes: &[&str]) {
        if self.fake_plane().is_none() {
            let namespace = format!("/api/v1/namespaces/{}", self.namespace);
            self.admin.delete(&namespace, Value::Null).await;
            for node in nodes {
                self.admin.delete(&format!("/api/v1/nodes/{node}"), Value::Null).await;
            }
        }
    }
}

/// The `status` of a condition.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)?["status"]
        .as_str()
}

/// Names the example image where a container names none, and ends pods quickly unless they say
/// otherwise.
pub fn fill_image(spec: &mut Value) {
    for kind in ["containers", "initContainers"] {
        for container in spec[kind].as_array_mut().into_iter().flatten() {
            if container["image"].is_null() {
                container["image"] = image::IMAGE.into();
            }
        }
    }
    if let Some(map) = spec.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
    if spec["terminationGracePeriodSeconds"].is_null() {
        spec["terminationGracePeriodSeconds"] = 2.into();
    }
}

fn ca_of(kubeconfig: &str) -> Result<String> {
    let parsed = kube::config::Kubeconfig::from_yaml(kubeconfig)?;
    let data = parsed
        .clusters
        .first()
        .and_then(|c| c.cluster.as_ref()?.certificate_authority_data.clone())
        .context("no certificate-authority-data in the kubeconfig")?;
    Ok(String::from_utf8(STANDARD.decode(data)?)?)
}

/// A TCP relay that can be cut.
struct Relay {
    to: SocketAddr,
    bind: Bind,
    running: Mutex<Option<(tokio::task::JoinHandle<()>, watch::Sender<bool>)>>,
}

impl Relay {
    fn start(to: SocketAddr, bind: Bind) -> Result<Self> {
        let relay = Self { to, bind, running: Mutex::new(None) };
        relay.resume()?;
        Ok(relay)
    }

    fn resume(&self) -> Result<()> {
        let listener = (self.bind)().context("bind the relay")?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (cut, is_cut) = watch::channel(false);
        let to = self.to;
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut near, _)) = listener.accept().await else { continue };
                let mut is_cut = is_cut.clone();
                tokio::spawn(async move {
                    let carry = async {
                        let mut far = tokio::net::TcpStream::connect(to).await?;
                        tokio::io::copy_bidirectional(&mut near, &mut far).await?;
                        io::Result::Ok(())
                    };
                    tokio::select! {
                        _ = carry => {}
                        _ = is_cut.changed() => {}
                    }
                });
            }
        });
        *self.running.lock().unwrap() = Some((task, cut));
        Ok(())
    }

    async fn stop(&self) {
        let running = self.running.lock().unwrap().take();
        if let Some((task, cut)) = running {
            task.abort();
            let _ = task.await;
            cut.send_replace(true);
            // The relay's connections end on their own tasks.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// An address of a pod.
///
/// # Errors
/// When it has none yet.
pub fn pod_ip(pod: &Value) -> Result<IpAddr> {
    Ok(pod["status"]["podIP"].as_str().context("the pod has no address")?.parse()?)
}
