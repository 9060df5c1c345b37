//! Calls to a driver's node service.
//!
//! A connection is made for each call: they are rare, and a driver that was replaced behind the same
//! socket is simply the one that answers.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tonic::{Code, Status};

use super::CsiError;
use super::request::Capabilities;
use super::wire::csi::node_client::NodeClient;
use super::wire::csi::{
    NodeExpandVolumeRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest,
};
use crate::metrics::METRICS;
use crate::plugins::{code_name, connect, in_time};

/// How long a driver may take for one call, as under kubelet.
const CALL: Duration = Duration::from_secs(120);

/// A driver, by its socket.
#[derive(Clone, Debug)]
pub(super) struct Client {
    /// Its name, for metrics.
    driver: String,
    socket: PathBuf,
}

/// One call in its time.
macro_rules! call {
    ($self:ident, $method:literal, $verb:ident, $request:expr) => {{
        let began = Instant::now();
        let work = async {
            let mut client = NodeClient::new(connect(&$self.socket).await?);
            client.$verb($request).await.map(tonic::Response::into_inner)
        };
        let answer = in_time(CALL, work).await;
        let code = code_name(answer.as_ref().err().map_or(Code::Ok, Status::code));
        let method = concat!("/csi.v1.Node/", $method).to_owned();
        METRICS.csi_called(&$self.driver, method, code, began.elapsed());
        answer.map_err(CsiError::from)
    }};
}

impl Client {
    pub(super) fn new(driver: &str, socket: &Path) -> Self {
        Self { driver: driver.to_owned(), socket: socket.to_path_buf() }
    }

    pub(super) async fn info(&self) -> Result<NodeGetInfoResponse, CsiError> {
        call!(self, "NodeGetInfo", node_get_info, NodeGetInfoRequest {})
    }

    pub(super) async fn capabilities(&self) -> Result<Capabilities, CsiError> {
        let told = call!(
            self,
            "NodeGetCapabilities",
            node_get_capabilities,
            NodeGetCapabilitiesRequest {}
        )?;
        Ok(Capabilities::of(&told.capabilities))
    }

    pub(super) async fn stats(
        &self,
        request: NodeGetVolumeStatsRequest,
    ) -> Result<NodeGetVolumeStatsResponse, CsiError> {
        call!(self, "NodeGetVolumeStats", node_get_volume_stats, request)
    }

    pub(super) async fn expand(&self, request: NodeExpandVolumeRequest) -> Result<(), CsiError> {
        call!(self, "NodeExpandVolume", node_expand_volume, request).map(drop)
    }

    pub(super) async fn stage(&self, request: NodeStageVolumeRequest) -> Result<(), CsiError> {
        call!(self, "NodeStageVolume", node_stage_volume, request).map(drop)
    }

    pub(super) async fn unstage(&self, handle: &str, staging: &Path) -> Result<(), CsiError> {
        let request = NodeUnstageVolumeRequest {
            volume_id: handle.to_owned(),
            staging_target_path: staging.display().to_string(),
        };
        call!(self, "NodeUnstageVolume", node_unstage_volume, request).map(drop)
    }

    pub(super) async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), CsiError> {
        call!(self, "NodePublishVolume", node_publish_volume, request).map(drop)
    }

    pub(super) async fn unpublish(&self, handle: &str, target: &Path) -> Result<(), CsiError> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: handle.to_owned(),
            target_path: target.display().to_string(),
        };
        call!(self, "NodeUnpublishVolume", node_unpublish_volume, request).map(drop)
    }
}
