//! Calls to a device plugin, each in its time: one that hangs holds up the pods that want its devices
//! and no others.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::inventory::Options;
use super::wire::device_plugin_client::DevicePluginClient;
use super::wire::{
    AllocateRequest, ContainerAllocateRequest, ContainerAllocateResponse,
    ContainerPreferredAllocationRequest, Empty, ListAndWatchResponse, PreStartContainerRequest,
    PreferredAllocationRequest,
};
use crate::plugins::{connect, in_time};

/// To answer at all, to say what it can, and what it prefers.
const ASK: Duration = Duration::from_secs(10);
/// To make devices ready for a container. Kubelet would wait for ever.
const ALLOCATE: Duration = Duration::from_secs(120);
/// To make them ready for a start, as under kubelet.
const PRE_START: Duration = Duration::from_secs(30);

/// A plugin, by its connection.
#[derive(Clone, Debug)]
pub(super) struct Client(DevicePluginClient<Channel>);

fn ids(devices: &BTreeSet<String>) -> Vec<String> {
    devices.iter().cloned().collect()
}

impl Client {
    /// Whoever listens at `socket`, and what it wants to be asked.
    pub(super) async fn connect(socket: &Path) -> Result<(Self, Options), Status> {
        let channel = in_time(ASK, connect(socket)).await?;
        let mut client = DevicePluginClient::new(channel);
        let told = in_time(ASK, client.get_device_plugin_options(Empty {})).await?.into_inner();
        let options = Options {
            pre_start: told.pre_start_required,
            preferred: told.get_preferred_allocation_available,
        };
        Ok((Self(client), options))
    }

    /// All its devices, whenever they change. The first answer may take its time.
    pub(super) async fn list_and_watch(&self) -> Result<Streaming<ListAndWatchResponse>, Status> {
        self.0.clone().list_and_watch(Empty {}).await.map(Response::into_inner)
    }

    /// Which `size` of `available` it prefers, those that it must choose among them.
    pub(super) async fn preferred(
        &self,
        available: &BTreeSet<String>,
        must: &BTreeSet<String>,
        size: usize,
    ) -> Result<BTreeSet<String>, Status> {
        let request = PreferredAllocationRequest {
            container_requests: vec![ContainerPreferredAllocationRequest {
                available_device_i_ds: ids(available),
                must_include_device_i_ds: ids(must),
                allocation_size: i32::try_from(size).unwrap_or(i32::MAX),
            }],
        };
        let told =
            in_time(ASK, self.0.clone().get_preferred_allocation(request)).await?.into_inner();
        let first = told.container_responses.into_iter().next();
        Ok(first.map(|answer| answer.device_i_ds.into_iter().collect()).unwrap_or_default())
    }

    /// Makes the devices ready for a container; `None` if it does not say how.
    pub(super) async fn allocate(
        &self,
        devices: &BTreeSet<String>,
    ) -> Result<Option<ContainerAllocateResponse>, Status> {
        let request = AllocateRequest {
            container_requests: vec![ContainerAllocateRequest { devices_ids: ids(devices) }],
        };
        let told = in_time(ALLOCATE, self.0.clone().allocate(request)).await?.into_inner();
        Ok(told.container_responses.into_iter().next())
    }

    /// Makes them ready for a start.
    pub(super) async fn pre_start(&self, devices: &BTreeSet<String>) -> Result<(), Status> {
        let request = PreStartContainerRequest { devices_ids: ids(devices) };
        in_time(PRE_START, self.0.clone().pre_start_container(request)).await.map(drop)
    }
}
