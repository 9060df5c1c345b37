//! Takes CSI volumes back: from the pod, and from the node after the last pod.
//!
//! A pod's record goes last of all. So nothing is forgotten by a crash in between, and nothing below
//! a volume's folder is removed that the driver has not taken away: only empty folders are.

use std::fs;
use std::path::Path;

use super::layout::Layout;
use super::record::{Record, absent};
use super::volume::unique_name;
use super::{Csi, CsiError, blocking, entries, is_mount_point};
use crate::ids::PodUid;

/// Whether any pod but that of `except` has a record of the volume.
pub(super) fn users(
    layout: &Layout,
    driver: &str,
    handle: &str,
    except: &Path,
) -> Result<bool, CsiError> {
    for pod in entries(&layout.pods())? {
        let Some(uid) = pod.file_name().and_then(|name| name.to_str()) else { continue };
        for folder in entries(&layout.of_pod(&PodUid::from(uid)))? {
            if folder == except {
                continue;
            }
            match Record::read(&folder) {
                Ok(None) => {}
                Ok(Some(record)) if !record.is_of(driver, handle) => {}
                Ok(Some(_)) => return Ok(true),
                Err(error) => {
                    tracing::warn!(%error, "a volume may be staged for longer than it is used");
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
        let folder = self.layout.of_pod(uid);
        let mut failure = None;
        for volume in blocking(move || entries(&folder)).await? {
            if let Err(error) = self.take_back(uid, &volume).await {
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

    async fn take_back(&self, uid: &PodUid, folder: &Path) -> Result<(), CsiError> {
        let of = folder.to_owned();
        let Some(record) = blocking(move || Record::read(&of)).await? else {
            // Nothing was ever asked of a driver; what may be left is an empty folder.
            return Ok(());
        };
        let name = unique_name(record.driver(), record.handle());
        let _only = self.only(&name).await;
        let client = self.drivers.client(record.driver())?;
        let target = Layout::target(folder);
        client.unpublish(record.handle(), &target).await?;
        blocking(move || remove_empty(&target)).await?;
        let (layout, of, looked) = (self.layout.clone(), folder.to_owned(), record.clone());
        let used = blocking(move || users(&layout, looked.driver(), looked.handle(), &of)).await?;
        if !used {
            self.unstage(&record).await?;
        }
        let of = folder.to_owned();
        blocking(move || Record::remove(&of)).await?;
        self.in_use.remove(&name, uid);
        Ok(())
    }

    /// Takes the staged volume back from the node, if it is staged.
    async fn unstage(&self, record: &Record) -> Result<(), CsiError> {
        let stage = self.layout.stage(record.driver(), record.handle());
        let of = stage.clone();
        if blocking(move || Record::read(&of)).await?.is_none() {
            return Ok(());
        }
        let client = self.drivers.client(record.driver())?;
        let global = Layout::global(&stage);
        if client.capabilities().await?.stage {
            client.unstage(record.handle(), &global).await?;
        }
        blocking(move || {
            remove_empty(&global)?;
            Record::remove(&stage)
        })
        .await
    }

    /// Takes back what the driver `name` has staged for no pod that there is. Whoever is about to use
    /// a volume has a record first.
    pub(super) async fn take_back_unused(&self, name: &str) {
        let folder = self.layout.staged().join(name);
        let stages = match blocking(move || entries(&folder)).await {
            Ok(stages) => stages,
            Err(error) => {
                tracing::warn!(driver = name, %error, "cannot tell which volumes are staged");
                return;
            }
        };
        for stage in stages {
            if let Err(error) = self.take_back_if_unused(name, &stage).await {
                tracing::warn!(stage = %stage.display(), %error, "cannot take a staged volume back");
            }
        }
    }

    async fn take_back_if_unused(&self, driver: &str, stage: &Path) -> Result<(), CsiError> {
        let of = stage.to_owned();
        let record = blocking(move || Record::read(&of)).await?;
        let Some(record) = record.filter(|record| record.driver() == driver) else { return Ok(()) };
        let _only = self.only(&unique_name(driver, record.handle())).await;
        let (layout, looked) = (self.layout.clone(), record.clone());
        let used =
            blocking(move || users(&layout, looked.driver(), looked.handle(), Path::new("")))
                .await?;
        if used {
            return Ok(());
        }
        tracing::info!(driver, volume = record.handle(), "no pod has this staged volume any more");
        self.unstage(&record).await
    }
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
        assert!(!users(&layout, "d", "h", Path::new("")).unwrap());
        let folder = |uid: &str, name: &str| {
            let folder = layout.volume(&PodUid::from(uid), name);
            fs::create_dir_all(&folder).unwrap();
            folder
        };
        let (own, other) = (folder("a", "pv"), folder("b", "pv"));
        folder("c", "without");
        let used = |handle: &str| users(&layout, "d", handle, &own).unwrap();
        Record::of_stage("d", "h").write(&own).unwrap();
        assert!(!used("h"), "its own does not count");
        Record::of_stage("d", "h").write(&other).unwrap();
        assert!(used("h") && !used("other"));
        // What cannot be read may be of it: nothing is taken back.
        fs::write(other.join(FILE), "{").unwrap();
        assert!(used("h") && used("other"));
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
