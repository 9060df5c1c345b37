//! What is different with a volume that is given as a device (`volumeMode: Block`): kubelet's layout
//! has it apart from those with files, and the pod has a link to it.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use super::layout::Layout;
use super::mount::private_folder;
use super::record::absent;
use super::volume::Key;
use super::{CsiError, has_mounts};
use crate::volume::link_device;

/// Makes what the driver wants to find before it publishes the device at `target`, and the pod's
/// `link` to it.
pub(super) fn prepare(target: &Path, link: &Path) -> Result<(), CsiError> {
    for folder in [target.parent(), link.parent()].into_iter().flatten() {
        private_folder(folder)?;
    }
    link_device(target, link).map_err(CsiError::io("link", link))
}

/// Whether a device is at `path`.
pub(super) fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}

/// Removes the pod's link.
pub(super) fn unlink(link: &Path) -> Result<(), CsiError> {
    absent(fs::remove_file(link)).map_err(CsiError::io("remove", link))
}

/// Removes the folder in which the driver had staged the device. It held what the driver needed for it,
/// no data; what is still mounted stays.
pub(super) fn remove_staging(staging: &Path) -> Result<(), CsiError> {
    if has_mounts(staging)? {
        return Err(CsiError::Invalid(format!(
            "the driver says that it took the device back, but something is still mounted in {}",
            staging.display()
        )));
    }
    absent(fs::remove_dir_all(staging)).map_err(CsiError::io("remove", staging))
}

/// Removes the folders of the volume that no pod needs any more, as far as they are empty.
pub(super) fn tidy(layout: &Layout, key: &Key) {
    let Some(name) = &key.device else { return };
    let folder = layout.devices().join(name);
    // Kubelet's own map of a device is in `dev`.
    for folder in [layout.published(name), folder.join("dev"), folder] {
        let _ = fs::remove_dir(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::PodUid;

    #[test]
    fn a_device_lies_where_kubelet_has_it() {
        let layout = Layout::new(Path::new("/r"));
        let device = Some("pv".to_owned());
        let key = Key { driver: "d".into(), handle: "h".into(), device };
        let uid = PodUid::from("u");
        let show = |path: std::path::PathBuf| path.display().to_string();
        let devices = "/r/plugins/kubernetes.io/csi/volumeDevices";
        assert_eq!(show(layout.stage(&key)), format!("{devices}/pv/data"));
        assert_eq!(show(layout.staging(&key)), format!("{devices}/staging/pv"));
        let record = layout.of_pod(&uid, true).join("pv");
        assert_eq!(show(layout.target(&uid, &record, &key)), format!("{devices}/publish/pv/u"));
        let link = layout.link(&uid, &key).unwrap();
        assert_eq!(show(link), "/r/pods/u/volumeDevices/kubernetes.io~csi/pv");
        assert_eq!(show(record), "/r/pods/u/plugins/kubernetes.io~csi/pv");
    }

    #[test]
    fn what_is_empty_is_tidied_up_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let key = Key { driver: "d".into(), handle: "h".into(), device: Some("pv".into()) };
        fs::create_dir_all(layout.published("pv").join("of-another-pod")).unwrap();
        fs::create_dir_all(layout.devices().join("pv/dev")).unwrap();
        tidy(&layout, &key);
        assert!(layout.published("pv").exists() && !layout.devices().join("pv").exists());
        fs::create_dir_all(layout.staging(&key)).unwrap();
        fs::write(layout.staging(&key).join("image-meta.json"), "{}").unwrap();
        remove_staging(&layout.staging(&key)).unwrap();
        remove_staging(&layout.staging(&key)).unwrap();
        assert!(!layout.staging(&key).exists());
    }

    #[test]
    fn a_link_is_made_anew_where_it_leads_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let (target, link) = (root.path().join("publish/u"), root.path().join("pod/pv"));
        prepare(Path::new("/elsewhere"), &link).unwrap();
        prepare(&target, &link).unwrap();
        prepare(&target, &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), target);
        assert!(target.parent().unwrap().is_dir() && !is_device(&link));
        unlink(&link).unwrap();
        unlink(&link).unwrap();
    }
}
