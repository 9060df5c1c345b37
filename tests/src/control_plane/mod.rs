//! The test control plane: an API server small enough to live in a test process, with the wire
//! behaviour that a node meets on a real one, and misbehaviour on demand.
//!
//! It is no simulation of etcd or of consensus; it is a faithful peer for list/watch, writes with
//! conflicts, subresources, certificates, tokens and authorization. The same contract tests run
//! against it and against a real kube-apiserver (`tests/tests/contract.rs`).

pub mod admission;
pub mod api;
pub mod auth;
mod controllers;
mod csr;
mod discovery;
pub mod error;
pub mod faults;
pub mod patch;
pub mod pki;
mod read;
pub mod request;
pub mod resources;
pub mod selector;
pub mod serve;
pub mod store;
mod subresource;
mod write;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use api::Api;
use controllers::Controllers;
use faults::Faults;
use pki::{Identity, Pki};
use request::RequestInfo;
use resources::known;
use serve::{Bind, Endpoint};
use store::Store;

/// A control plane: state, CA, controllers, and the endpoints that serve them.
pub struct ControlPlane {
    api: Arc<Api>,
    admin: Identity,
    controllers: tokio::task::JoinHandle<()>,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.controllers.abort();
    }
}

impl ControlPlane {
    /// A fresh cluster with kubeadm's namespaces and policy. It serves nothing yet.
    ///
    /// # Errors
    /// When keys cannot be made.
    pub fn new() -> Result<Self> {
        let store = Arc::new(Store::new());
        let pki = Arc::new(Pki::new()?);
        let controllers = Arc::new(Controllers {
            store: store.clone(),
            pki: pki.clone(),
            approve: AtomicBool::new(true),
            signing_seconds: AtomicU64::new(365 * 24 * 3600),
        });
        let api = Arc::new(Api::new(store, pki.clone(), controllers.clone()));
        let admin = pki.client("kubernetes-admin", &["system:masters"])?;
        let plane = Self { api, admin, controllers: tokio::spawn(controllers.run()) };
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            plane.put("", "namespaces", json!({"metadata": {"name": name}}))?;
        }
        for object in auth::bootstrap_policy() {
            let plural = match object["kind"].as_str().unwrap_or_default() {
                "ClusterRole" => "clusterroles",
                "ClusterRoleBinding" => "clusterrolebindings",
                "Role" => "roles",
                _ => "rolebindings",
            };
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
            plane.put(&namespace, plural, object)?;
        }
        Ok(plane)
    }

    fn put(&self, namespace: &str, plural: &str, object: Value) -> Result<()> {
        let info =
            RequestInfo { namespace: namespace.into(), verb: "create", ..RequestInfo::default() };
        write::create(&self.api.store, &controllers::system(), known(plural), &info, object)
            .map_err(|e| anyhow::anyhow!("create {plural}: {}", e.message))?;
        Ok(())
    }

    /// Serves at the address that `bind` binds; `names` are further addresses of its certificate.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub fn serve(&self, names: &[IpAddr], bind: Bind) -> Result<Endpoint> {
        let identity = self.api.pki.server(names)?;
        let tls = Arc::new(self.api.pki.tls_server(&identity)?);
        Endpoint::start(self.api.clone(), tls, bind)
    }

    /// Publishes `server` (`host:port`) in cluster-info and as `default/kubernetes`, for joins.
    ///
    /// # Errors
    /// When the objects cannot be written.
    pub fn publish(&self, server: SocketAddr) -> Result<()> {
        let kubeconfig = format!(
            "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {}\n    server: https://{server}\n  name: \"\"\ncontexts: null\ncurrent-context: \"\"\nkind: Config\npreferences: {{}}\nusers: null\n",
            STANDARD.encode(self.api.pki.ca_pem()),
        );
        self.put(
            "kube-public",
            "configmaps",
            json!({"metadata": {"name": "cluster-info"},
            "data": {"kubeconfig": kubeconfig}}),
        )?;
        self.put(
            "default",
            "services",
            json!({"metadata": {"name": "kubernetes"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443,
                "targetPort": server.port()}]}}),
        )?;
        self.put(
            "default",
            "endpointslices",
            json!({"metadata": {"name": "kubernetes",
                "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": if server.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{"addresses": [server.ip()], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "protocol": "TCP", "port": server.port()}]}),
        )
    }

    /// A new bootstrap token (`id.secret`), valid for `seconds` (negative: expired already).
    ///
    /// # Errors
    /// When it cannot be stored.
    pub fn bootstrap_token(&self, seconds: i64) -> Result<String> {
        let random = |n: usize| -> String {
            (0..n).map(|_| fastrand::alphanumeric().to_ascii_lowercase()).collect()
        };
        let (id, secret) = (random(6), random(16));
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        self.put(
            "kube-system",
            "secrets",
            json!({
                "metadata": {"name": format!("bootstrap-token-{id}")},
                "type": "bootstrap.kubernetes.io/token",
                "stringData": {"token-id": id, "token-secret": secret,
                    "expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                    "usage-bootstrap-authentication": "true", "usage-bootstrap-signing": "true",
                    "auth-extra-groups": "system:bootstrappers:kubeadm:default-node-token"},
            }),
        )?;
        Ok(format!("{id}.{secret}"))
    }

    /// `--discovery-token-ca-cert-hash`.
    ///
    /// # Errors
    /// When the CA cannot be parsed.
    pub fn ca_pin(&self) -> Result<String> {
        self.api.pki.ca_pin()
    }

    /// Misbehaviour towards everybody but administrators.
    pub fn faults(&self) -> &Faults {
        &self.api.faults
    }

    /// What was asked so far.
    pub fn records(&self) -> Vec<api::Record> {
        self.api.records()
    }

    /// Forgets the history: every watch gets 410 Gone.
    pub fn compact(&self) {
        self.api.store.compact();
    }

    /// Whether CSRs are approved by themselves.
    pub fn approve_csrs(&self, yes: bool) {
        self.api.controllers.approve.store(yes, Ordering::Relaxed);
        self.api.store.touch();
    }

    /// For how long certificates are signed (`--cluster-signing-duration`).
    pub fn sign_for(&self, seconds: u64) {
        self.api.controllers.signing_seconds.store(seconds, Ordering::Relaxed);
    }

    /// A kubeconfig for the administrator, at `server`.
    pub fn admin_kubeconfig(&self, server: SocketAddr) -> String {
        self.kubeconfig(server, &self.admin)
    }

    /// A kubeconfig (JSON, which is YAML) for a client identity of this CA.
    ///
    /// # Errors
    /// When the identity cannot be made.
    pub fn client_kubeconfig(
        &self,
        server: SocketAddr,
        user: &str,
        groups: &[&str],
    ) -> Result<String> {
        Ok(self.kubeconfig(server, &self.api.pki.client(user, groups)?))
    }

    fn kubeconfig(&self, server: SocketAddr, identity: &Identity) -> String {
        json!({"apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("https://{server}"),
                "certificate-authority-data": STANDARD.encode(self.api.pki.ca_pem())}}],
            "users": [{"name": "test", "user": {
                "client-certificate-data": STANDARD.encode(&identity.cert_pem),
                "client-key-data": STANDARD.encode(&identity.key_pem)}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}]})
        .to_string()
    }

    /// Stores an object as it is, whatever an API server would make of it.
    ///
    /// # Errors
    /// None that a caller can mend.
    pub fn store(&self, plural: &str, mut object: Value) -> Result<()> {
        let (namespace, name) = store::key_of(&object);
        let write = |old: Option<&Arc<Value>>| {
            for field in ["uid", "creationTimestamp"] {
                object["metadata"][field] = match old {
                    Some(old) => old["metadata"][field].clone(),
                    None if field == "uid" => format!("{plural}-{namespace}-{name}").into(),
                    None => "2026-01-02T03:04:05Z".into(),
                };
            }
            Ok(store::Write::Put(object))
        };
        let stored = self.api.store.write(known(plural), &namespace, &name, write);
        stored.map(drop).map_err(|e| anyhow::anyhow!("store {plural}: {}", e.message))
    }

    /// Removes a stored object, if it is there.
    pub fn remove(&self, plural: &str, namespace: &str, name: &str) {
        let write = |old: Option<&Arc<Value>>| match old {
            Some(old) => Ok(store::Write::Remove((**old).clone())),
            None => Ok(store::Write::Keep),
        };
        let _ = self.api.store.write(known(plural), namespace, name, write);
    }

    /// Serves on a loopback port of this machine, for administrators.
    ///
    /// # Errors
    /// When no port can be bound.
    pub fn serve_loopback(&self, port: u16) -> Result<Endpoint> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        self.serve(&[address.ip()], Box::new(move || std::net::TcpListener::bind(address)))
    }
}

/// A typed client from a kubeconfig's text.
///
/// # Errors
/// When the kubeconfig makes no client.
pub async fn client(kubeconfig: &str) -> Result<kube::Client> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let parsed = kube::config::Kubeconfig::from_yaml(kubeconfig).context("read the kubeconfig")?;
    let mut config = kube::Config::from_custom_kubeconfig(parsed, &Default::default()).await?;
    // A test wants to see every answer, also those that a client had better try again.
    config.default_retry = false;
    kube::Client::try_from(config).context("make the client")
}
