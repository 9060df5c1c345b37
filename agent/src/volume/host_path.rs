//! `hostPath`: a path of the host, with its type checked before each use.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;

use super::VolumeError;

/// Checks (or makes) what the source's type asks for.
pub(super) fn apply(volume: &str, source: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = Path::new(&source.path);
    let invalid = |reason: String| VolumeError::Invalid { volume: volume.into(), reason };
    if !path.is_absolute() || source.path.split('/').any(|part| part == "..") {
        return Err(invalid(format!("hostPath {:?} must be absolute, without '..'", source.path)));
    }
    let kind = source.type_.as_deref().unwrap_or_default();
    match kind {
        "" => return Ok(()),
        "DirectoryOrCreate" => {
            let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
            match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(VolumeError::io("create", path))?,
            }
        }
        "FileOrCreate" => {
            let made = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path);
            match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map(drop).map_err(VolumeError::io("create", path))?,
            }
        }
        _ => {}
    }
    let found = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(invalid(format!(
                "hostPath type check failed: {} does not exist, and must be a {kind}",
                source.path
            )));
        }
        Err(error) => return Err(VolumeError::io("look at", path)(error)),
    };
    let fits = match kind {
        "Directory" | "DirectoryOrCreate" => found.is_dir(),
        "File" | "FileOrCreate" => found.is_file(),
        "Socket" => found.is_socket(),
        "CharDevice" => found.is_char_device(),
        "BlockDevice" => found.is_block_device(),
        other => return Err(invalid(format!("hostPath type {other:?} is unknown"))),
    };
    if fits {
        Ok(())
    } else {
        Err(invalid(format!("hostPath type check failed: {} is not a {kind}", source.path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("file"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (path, kind, ok) in [
            (at("none"), "", true),
            (at("dir"), "Directory", true),
            (at("file"), "Directory", false),
            (at("none"), "Directory", false),
            (at("new/deep"), "DirectoryOrCreate", true),
            (at("file"), "DirectoryOrCreate", false),
            (at("file"), "File", true),
            (at("dir"), "File", false),
            (at("newfile"), "FileOrCreate", true),
            (at("dir"), "FileOrCreate", false),
            (at("nodir/file"), "FileOrCreate", false),
            (at("socket"), "Socket", true),
            (at("file"), "Socket", false),
            ("/dev/null".into(), "CharDevice", true),
            ("/dev/null".into(), "BlockDevice", false),
            (at("file"), "Pipe", false),
            ("relative".into(), "", false),
            ("/a/../b".into(), "", false),
        ] {
            let source = HostPathVolumeSource { path: path.clone(), type_: Some(kind.into()) };
            assert_eq!(apply("v", &source).is_ok(), ok, "{path} {kind}");
        }
        assert!(Path::new(&at("new/deep")).is_dir() && Path::new(&at("newfile")).is_file());
    }
}
