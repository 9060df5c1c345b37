//! Taking CSI drivers that have made themselves known.
//!
//! A driver is told that it is registered once the API knows of it, or once it is clear that the API
//! does not answer: what a node has mounted must go on while the control plane is away.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use super::Csi;
use super::client::Client;
use super::drivers::{NodeInfo, usable_version};
use super::node_info::Published;
use crate::plugins::{PluginHandler, PluginInfo, Refusal};

/// How long the API may take before a driver is told that it is registered all the same.
const PUBLISH: Duration = Duration::from_secs(10);

/// Takes CSI drivers.
pub(super) struct Drivers {
    pub(super) csi: Arc<Csi>,
    /// What the API knows.
    pub(super) published: watch::Receiver<Published>,
}

#[async_trait]
impl PluginHandler for Drivers {
    fn kind(&self) -> &'static str {
        "CSIPlugin"
    }

    async fn take(&self, socket: &Path, plugin: PluginInfo) -> Result<(), Refusal> {
        let (csi, mut published) = (&self.csi, self.published.clone());
        let PluginInfo { name, endpoint, supported_versions, .. } = plugin;
        if name.is_empty()
            || name.len() > 253
            || name.contains(['/', '\0'])
            || name.starts_with('.')
        {
            return Err(Refusal::Invalid(format!("{name:?} is no name of a CSI driver")));
        }
        let version = usable_version(&supported_versions).ok_or_else(|| {
            Refusal::Invalid(format!(
                "CSI driver {name:?}: none of the versions specified {supported_versions:?} are \
                 supported; this node understands 1.x"
            ))
        })?;
        if let Some(conflict) = csi.drivers.conflict(&name, socket, version) {
            return Err(Refusal::Invalid(conflict));
        }
        let endpoint = if endpoint.is_empty() { socket } else { Path::new(&endpoint) };
        let told = Client::new(&name, endpoint).info().await;
        let told = NodeInfo::from(told.map_err(|error| Refusal::Failed(error.to_string()))?);
        if told.node_id.is_empty() {
            let reason = format!("CSI driver {name:?} tells no name of the node (node_id)");
            return Err(Refusal::Failed(reason));
        }
        csi.drivers.put(&name, socket, endpoint, version);
        csi.drivers.tell(&name, Some(told.clone()));
        let known = published.wait_for(|published| {
            published.infos.get(&name) == Some(&Some(told.clone()))
                || published.refused.contains_key(&name)
        });
        match tokio::time::timeout(PUBLISH, known).await {
            Ok(Ok(published)) => match published.refused.get(&name) {
                Some(reason) => {
                    let reason = reason.clone();
                    drop(published);
                    csi.drivers.remove(&name, socket);
                    Err(Refusal::Failed(reason))
                }
                None => Ok(()),
            },
            // The control plane is away; it is told when it is back.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }

    fn registered(&self, name: &str) {
        self.csi.registered(name);
    }

    fn untold(&self, name: &str, socket: &Path) {
        self.csi.drivers.remove(name, socket);
    }

    fn unregistered(&self, name: &str, socket: &Path) {
        self.csi.unregistered(name, socket);
    }
}
