//! Volumes that are given as devices (`volumeMode: Block`): the pod's links to them, and what of them a
//! container gets.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::{Component, Path};

use cri_shim::api;
use k8s_openapi::api::core::v1::Container;

use super::VolumeError;
use super::claim::FILESYSTEM;
use super::node::Place;

/// Makes `link` lead to `target`, in the place of whatever link was there.
pub(crate) fn link(target: &Path, link: &Path) -> io::Result<()> {
    match fs::read_link(link) {
        Ok(found) if found == target => return Ok(()),
        Ok(_) => fs::remove_file(link)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    symlink(target, link)
}

/// Links the pod to the block device `source` of a `local` PersistentVolume. What leads to the device
/// may lead elsewhere after a reboot, so that the link is to the device itself.
pub(super) fn apply(name: &str, source: &str, at: &Path) -> Result<(), VolumeError> {
    let invalid = |reason: String| VolumeError::Device { volume: name.into(), reason };
    let path = Path::new(source);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(invalid(format!("local.path {source:?} must be absolute, without '..'")));
    }
    let device = path.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => invalid(format!("path {source:?} does not exist")),
        _ => VolumeError::io("look at", path)(error),
    })?;
    let found = fs::metadata(&device).map_err(VolumeError::io("look at", &device))?;
    if !found.file_type().is_block_device() {
        return Err(invalid(format!(
            "path {source:?} is no block device; use volumeMode Filesystem for a folder"
        )));
    }
    link(&device, at).map_err(VolumeError::io("link", at))
}

/// What a container gets of the pod's devices. `places` are volumes that are in place.
pub(super) fn plan_devices(
    container: &Container,
    places: &HashMap<String, Place>,
) -> Result<Vec<api::Device>, VolumeError> {
    let one = |name: &str, path: &str| {
        let invalid = |reason: String| VolumeError::Invalid { volume: name.to_owned(), reason };
        if !path.starts_with('/') {
            return Err(invalid(format!("devicePath {path:?} must be an absolute path")));
        }
        let Some(place) = places.get(name) else {
            return Err(invalid(format!(
                "cannot find volume {name:?} to pass into container {:?}",
                container.name
            )));
        };
        let Some(link) = &place.device else {
            return Err(VolumeError::Mode {
                volume: name.to_owned(),
                mode: FILESYSTEM.into(),
                field: "volumeDevices",
            });
        };
        Ok(api::Device {
            container_path: path.to_owned(),
            host_path: path_text(link),
            permissions: if place.read_only { "r" } else { "mrw" }.into(),
        })
    };
    container.volume_devices.iter().flatten().map(|d| one(&d.name, &d.device_path)).collect()
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::volume::usage::Measure;

    fn place(device: bool, read_only: bool) -> Place {
        Place {
            path: PathBuf::from("/published"),
            device: device.then(|| PathBuf::from("/link")),
            read_only,
            relabel: false,
            claim: None,
            measure: Measure::Nobody,
        }
    }

    #[test]
    fn a_container_gets_its_devices_with_what_it_may_do() {
        let places = HashMap::from([
            ("disk".to_owned(), place(true, false)),
            ("snapshot".to_owned(), place(true, true)),
            ("files".to_owned(), place(false, false)),
        ]);
        let of = |name: &str, path: &str| {
            let container: Container = serde_json::from_value(serde_json::json!({"name": "c",
                "volumeDevices": [{"name": name, "devicePath": path}]}))
            .unwrap();
            plan_devices(&container, &places).map_err(|error| error.to_string())
        };
        for (name, permissions) in [("disk", "mrw"), ("snapshot", "r")] {
            let expected = api::Device {
                container_path: "/dev/xvda".into(),
                host_path: "/link".into(),
                permissions: permissions.into(),
            };
            assert_eq!(of(name, "/dev/xvda"), Ok(vec![expected]));
        }
        for (name, path, words) in [
            ("disk", "xvda", "must be an absolute path"),
            ("none", "/x", "cannot find volume \"none\" to pass into container \"c\""),
            (
                "files",
                "/x",
                "volume files has volumeMode Filesystem, but is specified in volumeDevices",
            ),
        ] {
            let error = of(name, path).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(plan_devices(&Container::default(), &places).unwrap(), []);
    }

    #[test]
    fn only_a_block_device_is_linked_to() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let at = root.path().join("link");
        for (source, words) in [
            ("dev/sda", "must be absolute"),
            ("/dev/../etc", "without '..'"),
            ("/dev/no-such-disk", "does not exist"),
            (file.to_str().unwrap(), "is no block device"),
        ] {
            let error = apply("pv", source, &at).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.reason(), "FailedMapVolume");
        }
        assert!(!at.exists());
    }
}
