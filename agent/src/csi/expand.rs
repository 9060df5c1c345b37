//! Has a driver make a volume larger that is in use.

use std::path::Path;

use super::wire::csi::{CapacityRange, NodeExpandVolumeRequest};
use super::{Csi, CsiError, CsiVolume, request};

impl Csi {
    /// Whether the driver `name` makes volumes larger on the node (EXPAND_VOLUME).
    pub async fn expands(&self, name: &str) -> Result<bool, CsiError> {
        Ok(self.drivers.client(name)?.capabilities().await?.expand)
    }

    /// Makes the volume that is published at `path` as large as `bytes`.
    pub async fn expand(
        &self,
        volume: &CsiVolume,
        path: &Path,
        bytes: i64,
    ) -> Result<(), CsiError> {
        let key = volume.key();
        let _only = self.only(&key).await;
        let client = self.drivers.client(&volume.driver)?;
        let capabilities = client.capabilities().await?;
        let secrets = self.secret("NodeExpandSecretRef", volume.expand_secret.as_ref()).await?;
        let staging = self.layout.staging(&key);
        let staging = capabilities.stage.then(|| staging.display().to_string());
        let request = NodeExpandVolumeRequest {
            volume_id: volume.handle.clone(),
            volume_path: path.display().to_string(),
            capacity_range: Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            staging_target_path: staging.unwrap_or_default(),
            volume_capability: Some(request::capability(volume, capabilities, None)),
            secrets: secrets.into_iter().collect(),
        };
        client.expand(request).await
    }
}
