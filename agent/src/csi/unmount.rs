//! Takes CSI volumes back: from the pod, and from the node after the last pod.
//!
//! A pod's record goes last of all. So nothing is forgotten by a crash in between, and nothing below
//! a volume's folder is removed that the driver has not taken away: only empty folders are.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::layout::{DATA, Layout};
use super::record::{Record, absent};
use super::volume::Key;
use super::{Csi, CsiError, blocking, device, entries, is_mount_point};
use crate::ids::PodUid;

/// Whether any pod but that of `except` has a record of the volume.
pub(super) fn users(layout: &Layout, key: &Key, except: &Path) -> Result<bool, CsiError> {
    for pod in entries(&layout.pods())? {
        let Some(uid) = pod.file_name().and_then(|name| name.to_str()) else { continue };
        let all = layout.of_pod(&PodUid::from(uid), key.device.is_some());
        let folders = match &key.device {
            None => entries(&all)?,
            // Each device has a stage of its own, even of the same volume.
            Some(name) => BTreeSet::from([all.join(name)]),
        };
        for folder in folders {
            if folder == except {
                continue;
            }
            match Record::read(&folder) {
                Ok(None) => {}
                Ok(Some(record)) if !record.is_of(&key.driver, &key.handle) => {}
                Ok(Some(_)) => return Ok(true),
                Err(error) => {
                    tracing::warn!(%error, "a volume counts as used by a pod whose record cannot be read");
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

impl Csi {
    /// Takes all CSI volumes of the pod back. One that fails does not hold up the others.
    pub async fn tear_down(&self, uid: &PodUid) -> Result<(), CsiError> {
        let mut failure = None;
        let (layout, of) = (self.layout.clone(), uid.clone());
        let found = blocking(move || {
            let mut found = Vec::new();
            for devices in [false, true] {
                let all = entries(&layout.of_pod(&of, devices))?;
                found.extend(all.into_iter().map(|volume| (volume, devices)));
            }
            Ok(found)
        });
        for (volume, devices) in found.await? {
            if let Err(error) = self.take_back(uid, &volume, devices).await {
                // Whoever asked tells of the first, and asks again.
                tracing::debug!(%uid, volume = %volume.display(), %error, "a CSI volume stays");
                failure.get_or_insert(error);
            }
        }
        match failure {
            Some(error) => Err(error),
            None => {
                // Also what was never mounted.
                self.in_use.remove_pod(uid);
                Ok(())
            }
        }
    }

    async fn take_back(
        &self,
        uid: &PodUid,
        folder: &Path,
        is_device: bool,
    ) -> Result<(), CsiError> {
        let of = folder.to_owned();
        let Some(record) = blocking(move || Record::read(&of)).await? else {
            // Nothing was ever asked of a driver; what may be left is an empty folder.
            return Ok(());
        };
        let device = if is_device { Some(name_of(folder)?) } else { None };
        let key = record.key(device);
        let _only = self.only(&key).await;
        let client = self.drivers.client(&key.driver)?;
        let target = self.layout.target(uid, folder, &key);
        if let Some(link) = self.layout.link(uid, &key) {
            blocking(move || device::unlink(&link)).await?;
        }
        client.unpublish(&key.handle, &target).await?;
        let (layout, of, looked) = (self.layout.clone(), folder.to_owned(), key.clone());
        let used = blocking(move || {
            remove_empty(&target)?;
            let used = users(&layout, &looked, &of)?;
            if !used {
                // Of one that was never staged.
                device::tidy(&layout, &looked);
            }
            Ok(used)
        })
        .await?;
        if !used {
            self.unstage(&key).await?;
        }
        let of = folder.to_owned();
        blocking(move || Record::remove(&of)).await?;
        self.in_use.remove(&key.unique_name(), uid);
        Ok(())
    }

    /// Takes the staged volume back from the node, if it is staged.
    async fn unstage(&self, key: &Key) -> Result<(), CsiError> {
        let (stage, of) = (self.layout.stage(key), key.clone());
        let found = blocking(move || Record::read(&stage)).await?;
        if !found.is_some_and(|found| found.is_of(&of.driver, &of.handle)) {
            return Ok(());
        }
        let client = self.drivers.client(&key.driver)?;
        let global = self.layout.staging(key);
        if client.capabilities().await?.stage {
            client.unstage(&key.handle, &global).await?;
        }
        let layout = self.layout.clone();
        blocking(move || {
            if of.device.is_some() {
                device::remove_staging(&global)?;
            } else {
                remove_empty(&global)?;
            }
            Record::remove(&layout.stage(&of))?;
            device::tidy(&layout, &of);
            Ok(())
        })
        .await
    }

    /// Takes back what the driver `name` has staged for no pod that there is. Whoever is about to use
    /// a volume has a record first.
    pub(super) async fn take_back_unused(&self, name: &str) {
        let (folder, devices) = (self.layout.staged().join(name), self.layout.devices());
        let stages = blocking(move || {
            let files = entries(&folder)?.into_iter().map(|stage| (stage, None));
            let mut all: Vec<_> = files.collect();
            for device in entries(&devices)? {
                all.push((device.join(DATA), Some(name_of(&device)?)));
            }
            Ok(all)
        });
        let stages = match stages.await {
            Ok(stages) => stages,
            Err(error) => {
                tracing::warn!(driver = name, %error, "cannot tell which volumes are staged");
                return;
            }
        };
        for (stage, device) in stages {
            if let Err(error) = self.take_back_if_unused(name, &stage, device).await {
                tracing::warn!(stage = %stage.display(), %error, "cannot take a staged volume back");
            }
        }
    }

    async fn take_back_if_unused(
        &self,
        driver: &str,
        stage: &Path,
        device: Option<String>,
    ) -> Result<(), CsiError> {
        let of = stage.to_owned();
        let record = blocking(move || Record::read(&of)).await?;
        let Some(record) = record.filter(|record| record.driver() == driver) else { return Ok(()) };
        let key = record.key(device);
        let _only = self.only(&key).await;
        let (layout, looked) = (self.layout.clone(), key.clone());
        if blocking(move || users(&layout, &looked, Path::new(""))).await? {
            return Ok(());
        }
        tracing::info!(driver, volume = key.handle, "no pod has this staged volume any more");
        self.unstage(&key).await
    }
}

/// The name of a folder, which is that of a PersistentVolume.
fn name_of(folder: &Path) -> Result<String, CsiError> {
    let name = folder.file_name().and_then(|name| name.to_str());
    let odd = || CsiError::Invalid(format!("{} is no name of a volume", folder.display()));
    name.map(str::to_owned).ok_or_else(odd)
}

/// Removes the folder where a volume was mounted; one that is still mounted or not empty stays.
fn remove_empty(path: &Path) -> Result<(), CsiError> {
    if is_mount_point(path)? {
        return Err(CsiError::Invalid(format!(
            "the driver says that it took the volume back, but {} is still mounted",
            path.display()
        )));
    }
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if !found.is_dir() => fs::remove_file(path),
        _ => fs::remove_dir(path),
    };
    absent(removed).map_err(CsiError::io("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::record::FILE;

    #[test]
    fn a_volume_is_used_as_long_as_another_pod_has_a_record() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let key = |handle: &str| Record::of_stage("d", handle).key(None);
        assert!(!users(&layout, &key("h"), Path::new("")).unwrap());
        let folder = |uid: &str, name: &str| {
            let folder = layout.of_pod(&PodUid::from(uid), false).join(name);
            fs::create_dir_all(&folder).unwrap();
            folder
        };
        let (own, other) = (folder("a", "pv"), folder("b", "pv"));
        folder("c", "without");
        let used = |handle: &str| users(&layout, &key(handle), &own).unwrap();
        Record::of_stage("d", "h").write(&own).unwrap();
        assert!(!used("h"), "its own does not count");
        Record::of_stage("d", "h").write(&other).unwrap();
        assert!(used("h") && !used("other"));
        // What cannot be read may be of it: nothing is taken back.
        fs::write(other.join(FILE), "{").unwrap();
        assert!(used("h") && used("other"));
    }

    #[test]
    fn a_device_is_used_by_its_name() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let folder = layout.of_pod(&PodUid::from("a"), true).join("pv");
        fs::create_dir_all(&folder).unwrap();
        Record::of_stage("d", "h").write(&folder).unwrap();
        let used = |device: Option<&str>, handle: &str, except: &Path| {
            let key = Record::of_stage("d", handle).key(device.map(str::to_owned));
            users(&layout, &key, except).unwrap()
        };
        assert!(used(Some("pv"), "h", Path::new("")));
        assert!(!used(Some("pv"), "h", &folder), "its own does not count");
        assert!(!used(Some("other"), "h", Path::new("")), "it has a stage of its own");
        assert!(!used(Some("pv"), "other", Path::new("")));
        assert!(!used(None, "h", Path::new("")));
    }

    #[test]
    fn only_an_empty_folder_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("mount");
        remove_empty(&target).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("data"), "x").unwrap();
        assert!(remove_empty(&target).is_err());
        assert_eq!(fs::read(target.join("data")).unwrap(), b"x");
        fs::remove_file(target.join("data")).unwrap();
        remove_empty(&target).unwrap();
        assert!(!target.exists());
    }
}
