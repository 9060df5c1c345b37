//! Taking DRA drivers that have made themselves known.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use super::client::{Service, endpoint};
use super::drivers::Drivers;
use crate::plugins::{PluginHandler, PluginInfo, Refusal};

/// Takes DRA drivers.
pub(super) struct Registered(pub(super) Arc<Drivers>);

#[async_trait]
impl PluginHandler for Registered {
    fn kind(&self) -> &'static str {
        "DRAPlugin"
    }

    async fn take(&self, socket: &Path, plugin: PluginInfo) -> Result<(), Refusal> {
        let PluginInfo { name, endpoint: told, supported_versions, .. } = plugin;
        if name.is_empty() {
            return Err(Refusal::Invalid("DRA driver name is empty".into()));
        }
        let endpoint = endpoint(&told, socket);
        let service = Service::choose(&supported_versions).map_err(|why| {
            Refusal::Invalid(format!(
                "invalid supported gRPC versions of DRA driver plugin {name} at endpoint {}: {why}",
                endpoint.display()
            ))
        })?;
        self.0.add(&name, socket, &endpoint, service).map_err(Refusal::Failed)
    }

    fn registered(&self, _: &str) {}

    fn untold(&self, name: &str, socket: &Path) {
        self.0.remove(name, socket);
    }

    fn unregistered(&self, name: &str, socket: &Path) {
        self.0.remove(name, socket);
    }
}
