//! A DRA driver for tests: it prepares for each claim what a file says, `REQUEST DEVICE` a line of
//! `claims/NAME` in its folder, and describes each device in CDI as an environment variable.
//!
//! It registers by a socket in the registry of plugins. Files in its folder tell it to misbehave, and it
//! writes down what it was asked.
//!
//! `dra-driver NAME FOLDER OPTIONS-AS-JSON`

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::json;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

#[allow(clippy::all, clippy::pedantic, missing_docs, dead_code, reason = "generated code")]
mod api {
    pub(super) mod v1 {
        tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
    }
    pub(super) mod v1beta1 {
        tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1beta1");
    }
    pub(super) mod health {
        tonic::include_proto!("v1alpha1");
    }
}

use api::health::dra_resource_health_server::{DraResourceHealth, DraResourceHealthServer};
use api::{health, v1, v1beta1};
use tests::driver::registration::PluginInfo;
use tests::driver::{Registrar, Script, TICK, listen};

const REGISTRY: &str = "/var/lib/kubelet/plugins_registry";
const CDI: &str = "/var/run/cdi";
const POOL: &str = "pool";

/// How it shall be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Options {
    /// Services that it names in the registry.
    versions: Option<Vec<String>>,
    /// What its sockets are called, for one of several instances.
    instance: String,
    /// Whether it tells of its devices' health.
    health: bool,
}

#[derive(Clone)]
struct Driver {
    name: String,
    script: Script,
    instance: String,
}

type Answer<T> = Result<Response<T>, Status>;

impl Driver {
    fn cdi_file(&self, claim: &str) -> PathBuf {
        Path::new(CDI).join(format!("{}-{claim}.json", self.name))
    }

    /// The devices of one claim, described in CDI under the claim's UID.
    fn devices(&self, claim: &v1::Claim) -> anyhow::Result<Vec<v1::Device>> {
        let file = self.script.0.join("claims").join(&claim.name);
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let lines: Vec<_> = text.lines().filter_map(|line| line.split_once(' ')).collect();
        let device = |(_, device): &(&str, &str)| {
            let variable = format!("DRA_{}={}", device.replace('-', "_"), claim.name);
            json!({"name": format!("{}-{device}", claim.uid), "containerEdits": {"env": [variable]}})
        };
        let kind = format!("{}/device", self.name);
        let spec = json!({"cdiVersion": "0.6.0", "kind": kind,
            "devices": lines.iter().map(device).collect::<Vec<_>>()});
        fs::create_dir_all(CDI)?;
        fs::write(self.cdi_file(&claim.uid), spec.to_string())?;
        let told = |(request, device): &(&str, &str)| v1::Device {
            request_names: vec![(*request).to_owned()],
            pool_name: POOL.into(),
            device_name: (*device).to_owned(),
            cdi_device_ids: vec![format!("{kind}={}-{device}", claim.uid)],
            share_id: None,
        };
        Ok(lines.iter().map(told).collect())
    }

    async fn prepare(
        &self,
        request: Request<v1::NodePrepareResourcesRequest>,
        service: &str,
    ) -> Answer<v1::NodePrepareResourcesResponse> {
        let mut response = v1::NodePrepareResourcesResponse::default();
        for claim in request.into_inner().claims {
            let call = json!({"claim": claim.name, "uid": claim.uid, "by": self.instance,
                "service": service});
            self.script.begin("prepare", call).await?;
            let (devices, error) = match self.devices(&claim) {
                Ok(devices) => (devices, String::new()),
                Err(error) => (Vec::new(), format!("{error:#}")),
            };
            response.claims.insert(claim.uid, v1::NodePrepareResourceResponse { devices, error });
        }
        Ok(Response::new(response))
    }

    async fn unprepare(
        &self,
        request: Request<v1::NodeUnprepareResourcesRequest>,
    ) -> Answer<v1::NodeUnprepareResourcesResponse> {
        let mut response = v1::NodeUnprepareResourcesResponse::default();
        for claim in request.into_inner().claims {
            let call = json!({"claim": claim.name, "uid": claim.uid, "by": self.instance});
            self.script.begin("unprepare", call).await?;
            // It may never have been prepared.
            let _ = fs::remove_file(self.cdi_file(&claim.uid));
            response.claims.insert(claim.uid, v1::NodeUnprepareResourceResponse::default());
        }
        Ok(Response::new(response))
    }

    /// What the file `health` says: `DEVICE HEALTH SECONDS WORDS` a line.
    fn health(&self) -> Vec<health::DeviceHealth> {
        let text = fs::read_to_string(self.script.0.join("health")).unwrap_or_default();
        let parse = |line: &str| {
            let mut words = line.splitn(4, ' ');
            let (device, state, seconds) = (words.next()?, words.next()?, words.next()?);
            Some(health::DeviceHealth {
                device: Some(health::DeviceIdentifier {
                    pool_name: POOL.into(),
                    device_name: device.into(),
                }),
                health: health::HealthStatus::from_str_name(state)?.into(),
                health_check_timeout_seconds: seconds.parse().ok()?,
                message: words.next().unwrap_or_default().into(),
                ..Default::default()
            })
        };
        text.lines().filter_map(parse).collect()
    }
}

#[tonic::async_trait]
impl v1::dra_plugin_server::DraPlugin for Driver {
    async fn node_prepare_resources(
        &self,
        request: Request<v1::NodePrepareResourcesRequest>,
    ) -> Answer<v1::NodePrepareResourcesResponse> {
        self.prepare(request, "v1").await
    }

    async fn node_unprepare_resources(
        &self,
        request: Request<v1::NodeUnprepareResourcesRequest>,
    ) -> Answer<v1::NodeUnprepareResourcesResponse> {
        self.unprepare(request).await
    }
}

#[tonic::async_trait]
impl v1beta1::dra_plugin_server::DraPlugin for Driver {
    async fn node_prepare_resources(
        &self,
        request: Request<v1::NodePrepareResourcesRequest>,
    ) -> Answer<v1::NodePrepareResourcesResponse> {
        self.prepare(request, "v1beta1").await
    }

    async fn node_unprepare_resources(
        &self,
        request: Request<v1::NodeUnprepareResourcesRequest>,
    ) -> Answer<v1::NodeUnprepareResourcesResponse> {
        self.unprepare(request).await
    }
}

#[tonic::async_trait]
impl DraResourceHealth for Driver {
    type NodeWatchResourcesStream =
        Pin<Box<dyn Stream<Item = Result<health::NodeWatchResourcesResponse, Status>> + Send>>;

    async fn node_watch_resources(
        &self,
        _: Request<health::NodeWatchResourcesRequest>,
    ) -> Answer<Self::NodeWatchResourcesStream> {
        self.script.begin("health", json!({})).await?;
        let (to, stream) = tokio::sync::mpsc::channel(1);
        let driver = self.clone();
        tokio::spawn(async move {
            let mut told = None;
            while !to.is_closed() {
                let devices = driver.health();
                if told.as_ref() != Some(&devices) {
                    let response = health::NodeWatchResourcesResponse { devices: devices.clone() };
                    if to.send(Ok(response)).await.is_err() {
                        return;
                    }
                    told = Some(devices);
                }
                tokio::time::sleep(TICK).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, folder, options] = &arguments[..] else {
        anyhow::bail!("usage: dra-driver NAME FOLDER OPTIONS-AS-JSON");
    };
    let options: Options = serde_json::from_str(options).context("read the options")?;
    let folder = PathBuf::from(folder);
    fs::create_dir_all(folder.join("claims"))?;
    let driver =
        Driver { name: name.clone(), script: Script(folder), instance: options.instance.clone() };
    let endpoint = driver.script.0.join(format!("dra{}.sock", options.instance));
    let served = tonic::transport::Server::builder()
        .add_service(v1::dra_plugin_server::DraPluginServer::new(driver.clone()))
        .add_service(v1beta1::dra_plugin_server::DraPluginServer::new(driver.clone()))
        .add_optional_service(options.health.then(|| DraResourceHealthServer::new(driver.clone())))
        .serve_with_incoming(listen(&endpoint)?);
    let versions = options.versions.clone();
    let info = PluginInfo {
        r#type: "DRAPlugin".into(),
        name: name.clone(),
        endpoint: endpoint.display().to_string(),
        supported_versions: versions
            .unwrap_or_else(|| ["v1.DRAPlugin", "v1beta1.DRAPlugin"].map(String::from).into()),
    };
    let socket = Path::new(REGISTRY).join(format!("{name}{}-reg.sock", options.instance));
    let registering = tonic::transport::Server::builder()
        .add_service(Registrar::service(driver.script.clone(), info))
        .serve_with_incoming(listen(&socket)?);
    tokio::try_join!(served, registering)?;
    Ok(())
}
