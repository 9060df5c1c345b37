//! The tests' device plugin on a node.

use std::ops::Deref;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use super::eventually;
use super::node::{Node, built};
use super::scripted::Scripted;

/// A plugin that runs on a node.
pub struct DevicePlugin {
    resource: String,
    scripted: Scripted,
    options: Value,
}

impl Deref for DevicePlugin {
    type Target = Scripted;

    fn deref(&self) -> &Scripted {
        &self.scripted
    }
}

impl DevicePlugin {
    /// Starts the plugin of `resource` with these devices, and waits until the node has taken it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(node: &Node, resource: &str, devices: &str, options: Value) -> Result<Self> {
        let mut plugin = Self::prepare(node, resource, devices, options)?;
        plugin.spawn(node)?;
        plugin.registered(1).await;
        Ok(plugin)
    }

    /// One that is not started yet.
    ///
    /// # Errors
    /// What the file system says.
    pub fn prepare(node: &Node, resource: &str, devices: &str, options: Value) -> Result<Self> {
        let inside = Path::new("/var/lib/device-test").join(resource.replace('/', "_"));
        let scripted = Scripted::prepare(node, inside);
        std::fs::create_dir_all(&scripted.folder)?;
        let plugin = Self { resource: resource.to_owned(), scripted, options };
        plugin.devices(devices)?;
        Ok(plugin)
    }

    /// Starts it (again).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&mut self, node: &Node) -> Result<()> {
        let mut command = node.command(built("device-plugin")?);
        command.arg(&self.resource).arg(&self.scripted.inside);
        self.scripted.spawn(command.arg(self.options.to_string()))
    }

    /// Has these devices from now on: `ID[!][@NUMA,NUMA]`, an exclamation mark is unhealthy.
    ///
    /// # Errors
    /// What the file system says.
    pub fn devices(&self, devices: &str) -> Result<()> {
        let line = |text: &str| {
            let (id, nodes) = text.split_once('@').unwrap_or((text, ""));
            let health = if id.ends_with('!') { "Unhealthy" } else { "Healthy" };
            format!("{} {health} {nodes}\n", id.trim_end_matches('!'))
        };
        let text: String = devices.split_whitespace().map(line).collect();
        // Seen whole or not at all.
        std::fs::write(self.folder.join("devices.new"), text)?;
        std::fs::rename(self.folder.join("devices.new"), self.folder.join("devices"))?;
        Ok(())
    }

    /// What it was asked so far: all calls of `verb`.
    pub fn calls_of(&self, verb: &str) -> Vec<Value> {
        self.calls().into_iter().filter(|call| call["verb"] == verb).collect()
    }

    /// The devices of each call of `verb`, joined by commas.
    pub fn asked(&self, verb: &str) -> Vec<String> {
        let ids = |call: Value| {
            let ids = call["devices"].as_array().cloned().unwrap_or_default();
            ids.iter().map(|id| id.as_str().unwrap_or_default()).collect::<Vec<_>>().join(",")
        };
        self.calls_of(verb).into_iter().map(ids).collect()
    }

    /// Waits until `verb` was called so often.
    pub async fn called(&self, verb: &str, times: usize) {
        eventually(&format!("{times} calls of {verb}"), async || {
            let calls = self.calls_of(verb);
            if calls.len() >= times { Ok(()) } else { bail!("{calls:?}") }
        })
        .await;
    }

    /// Waits until the node has taken it so often.
    pub async fn registered(&self, times: usize) {
        let verb = if self.options["registry"].is_null() { "registered" } else { "notify" };
        self.called(verb, times).await;
        self.called("list", times).await;
    }

    /// Kills it; its socket stays, as after a crash.
    pub fn stop(&mut self) {
        self.scripted.end();
    }
}

/// Asks the PodResources API of a node.
pub mod pod_resources {
    use hyper_util::rt::TokioIo;
    use tokio::net::UnixStream;
    use tonic::transport::{Channel, Endpoint};

    pub use wire::pod_resources_lister_client::PodResourcesListerClient as Client;
    pub use wire::{
        AllocatableResourcesRequest, ContainerDevices, GetPodResourcesRequest,
        ListPodResourcesRequest, PodResources,
    };

    #[allow(clippy::all, clippy::pedantic, missing_docs, dead_code, reason = "generated code")]
    mod wire {
        tonic::include_proto!("v1");
    }

    /// A client.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn connect(node: &super::Node) -> anyhow::Result<Client<Channel>> {
        let path = node.path("/var/lib/kubelet/pod-resources/kubelet.sock");
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(&path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        Ok(Client::new(endpoint.connect_with_connector(connector).await?))
    }
}
