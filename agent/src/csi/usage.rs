//! What a driver says of how full a volume is.

use std::path::Path;

use super::wire::csi::volume_usage::Unit;
use super::wire::csi::{NodeGetVolumeStatsRequest, VolumeUsage};
use super::{Csi, CsiError};
use crate::volume::Room;

impl Csi {
    /// Bytes and inodes of the volume at `path`; `None` where the driver does not tell
    /// (GET_VOLUME_STATS).
    pub async fn usage(
        &self,
        driver: &str,
        handle: &str,
        path: &Path,
    ) -> Result<Option<(Room, Room)>, CsiError> {
        let client = self.drivers.client(driver)?;
        if !client.capabilities().await?.stats {
            return Ok(None);
        }
        let request = NodeGetVolumeStatsRequest {
            volume_id: handle.to_owned(),
            volume_path: path.display().to_string(),
            staging_target_path: String::new(),
        };
        Ok(rooms(&client.stats(request).await?.usage))
    }
}

/// Bytes and inodes of what was told; `None` where nothing was.
fn rooms(told: &[VolumeUsage]) -> Option<(Room, Room)> {
    let of = |unit: Unit| {
        let found = told.iter().find(|usage| usage.unit == i32::from(unit))?;
        let number = |n: i64| u64::try_from(n).unwrap_or(0);
        Some(Room {
            available: number(found.available),
            capacity: number(found.total),
            used: number(found.used),
        })
    };
    let (bytes, inodes) = (of(Unit::Bytes), of(Unit::Inodes));
    (bytes.is_some() || inodes.is_some())
        .then(|| (bytes.unwrap_or_default(), inodes.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_by_unit_is_taken() {
        let usage = |unit: i32, used| VolumeUsage { available: 1, total: 10, used, unit };
        let room = |used| Room { available: 1, capacity: 10, used };
        assert_eq!(rooms(&[usage(2, 3), usage(1, 4)]), Some((room(4), room(3))));
        assert_eq!(rooms(&[usage(1, -4)]), Some((room(0), Room::default())));
        assert_eq!(rooms(&[usage(0, 4)]), None);
        assert_eq!(rooms(&[]), None);
    }
}
