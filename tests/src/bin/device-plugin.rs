//! A device plugin for tests: its devices are lines of a file, `ID HEALTH NUMA,NUMA`.
//!
//! What it gives to containers is `/dev/null` under the name of each device, a folder and an environment
//! variable. It registers as plugins do: at `kubelet.sock`, again when its own socket is removed or that
//! one is another; or by a socket in the registry of plugins. Files in its folder tell it to misbehave,
//! and it writes down what it was asked.
//!
//! `device-plugin RESOURCE FOLDER OPTIONS-AS-JSON`

#![allow(clippy::print_stderr, reason = "a tool for tests")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

#[allow(clippy::all, clippy::pedantic, missing_docs, dead_code, reason = "generated code")]
mod api {
    tonic::include_proto!("v1beta1");
}

use api::device_plugin_server::{DevicePlugin, DevicePluginServer};
use tests::driver::registration::PluginInfo;
use tests::driver::{Registrar, Script, TICK, listen};

const KUBELET: &str = "/var/lib/kubelet/device-plugins";

/// How it shall be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Options {
    pre_start: bool,
    preferred: bool,
    /// Names of CDI for the devices, without the last part.
    cdi: Option<String>,
    /// Socket in the registry to register by.
    registry: Option<PathBuf>,
    version: Option<String>,
}

struct Plugin {
    resource: String,
    script: Script,
    options: Options,
}

type Answer<T> = Result<Response<T>, Status>;

impl Plugin {
    async fn begin(&self, verb: &str, call: Value) -> Result<(), Status> {
        self.script.begin(verb, call).await
    }

    fn devices(&self) -> Vec<api::Device> {
        let text = fs::read_to_string(self.script.0.join("devices")).unwrap_or_default();
        let parse = |line: &str| {
            let mut words = line.split_whitespace();
            let (id, health) = (words.next()?, words.next()?);
            let nodes = words.next().unwrap_or_default().split(',');
            let nodes = nodes.filter_map(|n| Some(api::NumaNode { id: n.parse().ok()? })).collect();
            Some(api::Device {
                id: id.to_owned(),
                health: health.to_owned(),
                topology: Some(api::TopologyInfo { nodes }),
            })
        };
        text.lines().filter_map(parse).collect()
    }

    fn check(&self, ids: &[String]) -> Result<(), Status> {
        let devices = self.devices();
        let good = |id: &String| devices.iter().any(|d| d.id == *id && d.health == "Healthy");
        match ids.iter().find(|id| !good(id)) {
            Some(id) => Err(Status::invalid_argument(format!("no healthy device {id}"))),
            None if ids.is_empty() => Err(Status::invalid_argument("no devices")),
            None => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream =
        Pin<Box<dyn Stream<Item = Result<api::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<api::Empty>,
    ) -> Answer<api::DevicePluginOptions> {
        self.begin("options", json!({})).await?;
        Ok(Response::new(api::DevicePluginOptions {
            pre_start_required: self.options.pre_start,
            get_preferred_allocation_available: self.options.preferred,
        }))
    }

    async fn list_and_watch(&self, _: Request<api::Empty>) -> Answer<Self::ListAndWatchStream> {
        self.begin("list", json!({})).await?;
        let (to, stream) = tokio::sync::mpsc::channel(1);
        let plugin = Plugin {
            resource: self.resource.clone(),
            script: self.script.clone(),
            options: self.options.clone(),
        };
        tokio::spawn(async move {
            let mut told = None;
            while !to.is_closed() {
                let now = plugin.devices();
                if told.as_ref() != Some(&now) {
                    let response = api::ListAndWatchResponse { devices: now.clone() };
                    if to.send(Ok(response)).await.is_err() {
                        return;
                    }
                    told = Some(now);
                }
                tokio::time::sleep(TICK).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    /// The last ones.
    async fn get_preferred_allocation(
        &self,
        request: Request<api::PreferredAllocationRequest>,
    ) -> Answer<api::PreferredAllocationResponse> {
        let mut container_responses = Vec::new();
        for asked in request.into_inner().container_requests {
            let (mut free, must) = (asked.available_device_i_ds, asked.must_include_device_i_ds);
            free.sort();
            self.begin(
                "preferred",
                json!({"available": free, "must": must, "size": asked.allocation_size}),
            )
            .await?;
            free.retain(|id| !must.contains(id));
            let size = usize::try_from(asked.allocation_size).unwrap_or(0);
            let rest = free.into_iter().rev().take(size.saturating_sub(must.len()));
            let ids = must.iter().cloned().chain(rest).collect();
            container_responses
                .push(api::ContainerPreferredAllocationResponse { device_i_ds: ids });
        }
        Ok(Response::new(api::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(
        &self,
        request: Request<api::AllocateRequest>,
    ) -> Answer<api::AllocateResponse> {
        let mut container_responses = Vec::new();
        for asked in request.into_inner().container_requests {
            let mut ids = asked.devices_ids;
            ids.sort();
            self.begin("allocate", json!({"devices": ids})).await?;
            self.check(&ids)?;
            let folder = self.script.0.join("given");
            fs::create_dir_all(&folder)?;
            fs::write(folder.join("of"), &self.resource)?;
            let short = self.resource.rsplit('/').next().unwrap_or_default().to_uppercase();
            container_responses.push(api::ContainerAllocateResponse {
                envs: [(short, ids.join(","))].into(),
                mounts: vec![api::Mount {
                    container_path: "/given".into(),
                    host_path: folder.display().to_string(),
                    read_only: true,
                }],
                devices: ids
                    .iter()
                    .map(|id| api::DeviceSpec {
                        container_path: format!("/dev/{id}"),
                        host_path: "/dev/null".into(),
                        permissions: "rw".into(),
                    })
                    .collect(),
                annotations: [("device.test.example/ids".into(), ids.join("_"))].into(),
                cdi_devices: self
                    .options
                    .cdi
                    .iter()
                    .flat_map(|kind| ids.iter().map(move |id| format!("{kind}={id}")))
                    .map(|name| api::CdiDevice { name })
                    .collect(),
            });
        }
        Ok(Response::new(api::AllocateResponse { container_responses }))
    }

    async fn pre_start_container(
        &self,
        request: Request<api::PreStartContainerRequest>,
    ) -> Answer<api::PreStartContainerResponse> {
        let mut ids = request.into_inner().devices_ids;
        ids.sort();
        self.begin("prestart", json!({"devices": ids})).await?;
        Ok(Response::new(api::PreStartContainerResponse {}))
    }
}

/// Calls the node.
async fn register(plugin: &Plugin, endpoint: &str) -> Result<(), Status> {
    let connector = tower::service_fn(|_| async {
        UnixStream::connect(format!("{KUBELET}/kubelet.sock")).await.map(TokioIo::new)
    });
    let channel = tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client = api::registration_client::RegistrationClient::new(channel);
    let version = plugin.options.version.clone().unwrap_or_else(|| "v1beta1".into());
    client
        .register(api::RegisterRequest {
            version,
            endpoint: endpoint.to_owned(),
            resource_name: plugin.resource.clone(),
            options: None,
        })
        .await?;
    Ok(())
}

fn identity(path: &str) -> Option<(u64, i64, i64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Serves until the node is seen to have started anew.
async fn serve_once(plugin: &Arc<Plugin>, name: &str) -> anyhow::Result<()> {
    let (own, theirs) = (format!("{KUBELET}/{name}"), format!("{KUBELET}/kubelet.sock"));
    let mut serving = Box::pin(
        tonic::transport::Server::builder()
            .add_service(DevicePluginServer::from_arc(plugin.clone()))
            .serve_with_incoming(listen(Path::new(&own))?),
    );
    let seen = identity(&theirs);
    let again = async {
        loop {
            match register(plugin, name).await {
                Ok(()) => {
                    plugin.begin("registered", json!({})).await?;
                    break;
                }
                Err(status) => {
                    plugin.begin("refused", json!({"error": status.message()})).await?;
                    tokio::time::sleep(TICK * 5).await;
                    if identity(&own).is_none() || identity(&theirs) != seen {
                        return Ok::<(), Status>(());
                    }
                }
            }
        }
        while identity(&own).is_some() && identity(&theirs) == seen {
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    };
    tokio::select! {
        result = &mut serving => result?,
        result = again => result?,
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [resource, folder, options] = &arguments[..] else {
        anyhow::bail!("usage: device-plugin RESOURCE FOLDER OPTIONS-AS-JSON");
    };
    let options: Options = serde_json::from_str(options).context("read the options")?;
    let folder = PathBuf::from(folder);
    fs::create_dir_all(&folder)?;
    let plugin = Arc::new(Plugin { resource: resource.clone(), script: Script(folder), options });
    if let Some(socket) = plugin.options.registry.clone() {
        let endpoint = plugin.script.0.join("plugin.sock");
        let serving = tonic::transport::Server::builder()
            .add_service(DevicePluginServer::from_arc(plugin.clone()))
            .serve_with_incoming(listen(&endpoint)?);
        let info = PluginInfo {
            r#type: "DevicePlugin".into(),
            name: resource.clone(),
            endpoint: endpoint.display().to_string(),
            supported_versions: vec!["v1beta1".into()],
        };
        let registering = tonic::transport::Server::builder()
            .add_service(Registrar::service(plugin.script.clone(), info))
            .serve_with_incoming(listen(&socket)?);
        tokio::try_join!(serving, registering)?;
        return Ok(());
    }
    let name = format!("{}.sock", resource.replace('/', "_"));
    loop {
        serve_once(&plugin, &name).await?;
    }
}
