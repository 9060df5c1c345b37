//! Calls to a DRA driver, each in its time: one that hangs holds up the pods that have its devices and
//! no others.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};

use super::wire::health::dra_resource_health_client::DraResourceHealthClient;
use super::wire::health::{NodeWatchResourcesRequest, NodeWatchResourcesResponse};
use super::wire::v1::{
    Claim, NodePrepareResourcesRequest, NodePrepareResourcesResponse,
    NodeUnprepareResourcesRequest, NodeUnprepareResourcesResponse,
};
use super::wire::{v1, v1beta1};
use crate::metrics::METRICS;
use crate::plugins::{code_name, connect, in_time};

/// How long a driver may take for one call, as under kubelet.
const CALL: Duration = Duration::from_secs(45);

/// What a driver speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// `dra/v1`.
    V1,
    /// `dra/v1beta1`.
    V1Beta1,
}

impl Service {
    /// As drivers name them; what the node understands.
    const ALL: [(&str, Self); 2] =
        [("v1.DRAPlugin", Self::V1), ("v1beta1.DRAPlugin", Self::V1Beta1)];

    /// The first of those that the driver names which the node understands.
    ///
    /// # Errors
    /// In kubelet's words why there is none.
    pub fn choose(named: &[String]) -> Result<Self, String> {
        if named.is_empty() {
            return Err("empty list of supported gRPC services (aka supported versions)".into());
        }
        let known = |name: &String| Self::ALL.iter().find(|(known, _)| known == name);
        named.iter().find_map(known).map(|(_, service)| *service).ok_or_else(|| {
            let ours = Self::ALL.map(|(name, _)| name);
            format!(
                "none of services supported by the plugin ({named:?}) are supported by the kubelet ({ours:?})"
            )
        })
    }

    fn package(self) -> &'static str {
        match self {
            Self::V1 => "k8s.io.kubelet.pkg.apis.dra.v1",
            Self::V1Beta1 => "k8s.io.kubelet.pkg.apis.dra.v1beta1",
        }
    }
}

/// One instance of a driver, by its socket and, while there is one, its connection.
#[derive(Clone, Debug)]
pub struct Client {
    pub(super) driver: String,
    pub(super) endpoint: PathBuf,
    pub(super) service: Service,
    pub(super) channel: Option<Channel>,
}

impl Client {
    /// Has the claims prepared.
    pub async fn prepare(
        &self,
        claims: Vec<Claim>,
    ) -> Result<NodePrepareResourcesResponse, Status> {
        let request = NodePrepareResourcesRequest { claims };
        self.timed("NodePrepareResources", async {
            let channel = self.channel().await?;
            match self.service {
                Service::V1 => {
                    let mut client = v1::dra_plugin_client::DraPluginClient::new(channel);
                    client.node_prepare_resources(request).await
                }
                Service::V1Beta1 => {
                    let mut client = v1beta1::dra_plugin_client::DraPluginClient::new(channel);
                    client.node_prepare_resources(request).await
                }
            }
        })
        .await
    }

    /// Has them taken back.
    pub async fn unprepare(
        &self,
        claims: Vec<Claim>,
    ) -> Result<NodeUnprepareResourcesResponse, Status> {
        let request = NodeUnprepareResourcesRequest { claims };
        self.timed("NodeUnprepareResources", async {
            let channel = self.channel().await?;
            match self.service {
                Service::V1 => {
                    let mut client = v1::dra_plugin_client::DraPluginClient::new(channel);
                    client.node_unprepare_resources(request).await
                }
                Service::V1Beta1 => {
                    let mut client = v1beta1::dra_plugin_client::DraPluginClient::new(channel);
                    client.node_unprepare_resources(request).await
                }
            }
        })
        .await
    }

    async fn channel(&self) -> Result<Channel, Status> {
        match &self.channel {
            Some(channel) => Ok(channel.clone()),
            None => connect(&self.endpoint).await,
        }
    }

    async fn timed<T>(
        &self,
        method: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let began = Instant::now();
        let result = in_time(CALL, call).await;
        let code = code_name(result.as_ref().err().map_or(Code::Ok, Status::code));
        let method = format!("/{}.DRAPlugin/{method}", self.service.package());
        METRICS.dra_called(&self.driver, method, code, began.elapsed());
        result.map(Response::into_inner)
    }
}

/// What a driver tells of its devices' health.
pub async fn watch_health(
    channel: Channel,
) -> Result<Streaming<NodeWatchResourcesResponse>, Status> {
    let mut client = DraResourceHealthClient::new(channel);
    client.node_watch_resources(NodeWatchResourcesRequest {}).await.map(Response::into_inner)
}

/// The socket that a driver answers at.
pub fn endpoint(told: &str, registration: &Path) -> PathBuf {
    if told.is_empty() { registration.to_owned() } else { PathBuf::from(told) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_first_choice_that_is_known_counts() {
        let choose = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            Service::choose(&names)
        };
        assert_eq!(choose(&["v1.DRAPlugin", "v1beta1.DRAPlugin"]), Ok(Service::V1));
        assert_eq!(choose(&["v2.DRAPlugin", "v1beta1.DRAPlugin"]), Ok(Service::V1Beta1));
        assert_eq!(choose(&["v1beta1.DRAPlugin", "v1.DRAPlugin"]), Ok(Service::V1Beta1));
        assert!(choose(&[]).unwrap_err().contains("empty list"));
        let error = choose(&["v1alpha4.Node"]).unwrap_err();
        assert!(error.contains("v1alpha4.Node") && error.contains("v1.DRAPlugin"), "{error}");
    }
}
