//! The volumes of drivers: put in place by them, and made larger while they are used.

use std::path::Path;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::{NodeVolumes, Place, Slot, claim_named};
use crate::csi::CsiVolume;
use crate::objects::ObjectError;
use crate::volume::gather::Growing;
use crate::volume::growth::{Outcome, status_patch};
use crate::volume::usage::Measure;
use crate::volume::{Group, VolumeError};

impl NodeVolumes {
    /// Has a driver's volume put in place; where it is, and whether the driver wants to be asked again.
    pub(super) async fn set_up(
        &self,
        slot: &Slot,
        pod: &Pod,
        name: &str,
        volume: &CsiVolume,
        group: Option<Group>,
        again: bool,
    ) -> Result<(Place, bool), VolumeError> {
        let Some(csi) = &self.csi else {
            let source = ObjectError::Standalone { what: "a CSI volume" };
            return Err(VolumeError::Object { volume: name.to_owned(), source });
        };
        let placed = csi.set_up(pod, volume, group, again, slot.ending.subscribe()).await;
        let placed = placed.map_err(|source| VolumeError::Csi {
            volume: name.to_owned(),
            spec_name: volume.spec_name.clone(),
            block: volume.block,
            source: Box::new(source),
        })?;
        let place = Place {
            path: placed.path,
            device: placed.link,
            read_only: volume.read_only,
            relabel: !volume.read_only,
            claim: claim_named(pod, name),
            measure: Measure::Driver(volume.driver.clone(), volume.handle.clone()),
        };
        Ok((place, placed.republish))
    }

    /// Whether the volume may come to grow while the pod uses it. A driver is asked when there is time:
    /// what runs already needs none right after a restart.
    pub(super) async fn may_grow(&self, volume: &CsiVolume, ask: bool) -> bool {
        let Some(csi) = self.csi.as_ref().filter(|_| !volume.ephemeral && !volume.read_only) else {
            return false;
        };
        // One that is away now may be back then.
        !ask || csi.expands(&volume.driver).await.unwrap_or(true)
    }

    /// Has a driver make a volume larger, and the claim say how it went. The pod does not wait for a
    /// volume that does not grow: it is tried again.
    pub(super) async fn grow(&self, volume: &CsiVolume, path: &Path, growing: &Growing) {
        let Some(csi) = &self.csi else { return };
        let Growing { growth, key, claim } = growing;
        let tell = async |outcome: Outcome<'_>| {
            let Some(patch) = status_patch(claim, growth, outcome, Timestamp::now()) else {
                return true;
            };
            let told = self.objects.patch_claim_status(key, patch).await;
            if let Err(error) = &told {
                tracing::warn!(claim = %key, %error, "cannot tell how a volume grows");
            }
            told.is_ok()
        };
        match csi.expands(&volume.driver).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(claim = %key, %error, "a volume that shall grow does not yet");
                return;
            }
        }
        // The controller must not ask for less meanwhile.
        if !tell(Outcome::Begun).await {
            return;
        }
        match csi.expand(volume, path, growth.bytes).await {
            Ok(()) => {
                tracing::info!(claim = %key, bytes = growth.bytes, "a volume has grown");
                tell(Outcome::Grown).await;
            }
            Err(error) => {
                tracing::warn!(claim = %key, %error, "a volume that shall grow does not yet");
                let reason = error.to_string();
                if error.is_infeasible() {
                    tell(Outcome::Infeasible(&reason)).await;
                } else if error.is_final() {
                    tell(Outcome::Failed(&reason)).await;
                }
            }
        }
    }
}
