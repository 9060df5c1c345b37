//! Writes a volume of files so that a reader sees either all of the old or all of the new.
//!
//! Layout, as every Kubernetes program expects it: the files lie in a directory named by the time,
//! `..data` links to it, and each name in the volume's root links through `..data`. An update is
//! one rename of `..data`.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use super::VolumeError;
use super::payload::{Current, File, Payload, Step, plan_write};

const DATA: &str = "..data";
const DATA_TMP: &str = "..data_tmp";
/// What is read back for comparison is bounded: a ConfigMap or Secret holds 1 MiB.
const MAX_READ: u64 = 16 << 20;

/// Makes `directory` hold `wanted`; whether anything had to change. Files belong to `group` where
/// one is given (`fsGroup`), which may then read them.
pub(super) fn apply_payload(
    directory: &Path,
    wanted: &Payload,
    group: Option<u32>,
) -> Result<bool, VolumeError> {
    // Compared and written alike, so that a changed mode counts as a change.
    let mut effective = Payload::default();
    for (path, file) in wanted.files() {
        let mode = if group.is_some() { file.mode | 0o440 } else { file.mode };
        let file = File { mode, ..file.clone() };
        effective.insert(path, file).map_err(|cause| invalid(directory, cause))?;
    }
    effective.check().map_err(|cause| invalid(directory, cause))?;
    let current = observe(directory)?;
    let now = jiff::Timestamp::now().as_nanosecond();
    let fresh = format!("..{}.{}", now / 1_000_000_000, now % 1_000_000_000);
    let steps = plan_write(&current, &effective, &fresh);
    for step in &steps {
        apply_step(directory, step, &effective, group)?;
    }
    Ok(!steps.is_empty())
}

fn invalid(directory: &Path, reason: String) -> VolumeError {
    let volume = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    VolumeError::Invalid { volume, reason }
}

fn observe(directory: &Path) -> Result<Current, VolumeError> {
    let mut root = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(VolumeError::io("read", directory))? {
        let entry = entry.map_err(VolumeError::io("read", directory))?;
        let link = fs::read_link(entry.path()).ok();
        root.insert(
            entry.file_name().to_string_lossy().into_owned(),
            link.map(|link| link.to_string_lossy().into_owned()),
        );
    }
    // A link that points elsewhere than to a sibling is not ours.
    let data = root
        .get(DATA)
        .cloned()
        .flatten()
        .filter(|target| target.starts_with("..") && !target.contains('/') && target != "..")
        .filter(|target| directory.join(target).is_dir());
    let mut payload = Payload::default();
    if let Some(data) = &data {
        // Unreadable content is written anew.
        let _ = read_back(&directory.join(data), "", &mut payload, 0);
    }
    Ok(Current { data, payload, root })
}

fn read_back(at: &Path, prefix: &str, payload: &mut Payload, depth: usize) -> io::Result<()> {
    if depth > 64 {
        return Err(io::Error::other("too deep"));
    }
    for entry in fs::read_dir(at)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let metadata = fs::symlink_metadata(entry.path())?;
        if metadata.is_dir() {
            read_back(&entry.path(), &path, payload, depth + 1)?;
            continue;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(entry.path())?;
        let mut data = Vec::new();
        Read::by_ref(&mut file).take(MAX_READ).read_to_end(&mut data)?;
        let file = File { data, mode: metadata.mode() & 0o7777, uid: metadata.uid() };
        payload.insert(&path, file).map_err(io::Error::other)?;
    }
    Ok(())
}

fn apply_step(
    directory: &Path,
    step: &Step,
    payload: &Payload,
    group: Option<u32>,
) -> Result<(), VolumeError> {
    match step {
        Step::WriteData(name) => {
            let data = directory.join(name);
            make_directory(&data, group)?;
            for (path, file) in payload.files() {
                write_file(&data, path, file, group)?;
            }
            Ok(())
        }
        Step::Switch(name) => {
            let temporary = directory.join(DATA_TMP);
            remove_any(&temporary)?;
            symlink(name, &temporary).map_err(VolumeError::io("link", &temporary))?;
            let data = directory.join(DATA);
            // A real directory in the place of the link would make the rename fail for ever.
            if fs::symlink_metadata(&data).is_ok_and(|metadata| metadata.is_dir()) {
                remove_any(&data)?;
            }
            fs::rename(&temporary, &data).map_err(VolumeError::io("rename", &data))
        }
        Step::Link(name) => {
            let link = directory.join(name);
            remove_any(&link)?;
            symlink(format!("{DATA}/{name}"), &link).map_err(VolumeError::io("link", &link))?;
            lchown(&link, None, group).map_err(VolumeError::io("chown", &link))
        }
        Step::RemoveLink(name) | Step::RemoveData(name) => remove_any(&directory.join(name)),
    }
}

fn make_directory(path: &Path, group: Option<u32>) -> Result<(), VolumeError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(VolumeError::io("create", path))?,
    }
    let mode = if group.is_some() { 0o2755 } else { 0o755 };
    chown(path, None, group).map_err(VolumeError::io("chown", path))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(VolumeError::io("chmod", path))
}

fn write_file(data: &Path, path: &str, file: &File, group: Option<u32>) -> Result<(), VolumeError> {
    let mut at: PathBuf = data.to_path_buf();
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        at.push(part);
        if parts.peek().is_some() {
            make_directory(&at, group)?;
        }
    }
    // Closed to everybody else until owner and mode are right.
    let mut handle = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&at)
        .map_err(VolumeError::io("create", &at))?;
    handle.write_all(&file.data).map_err(VolumeError::io("write", &at))?;
    chown(&at, Some(file.uid), group).map_err(VolumeError::io("chown", &at))?;
    handle.set_permissions(Permissions::from_mode(file.mode)).map_err(VolumeError::io("chmod", &at))
}

/// Removes a file, link or directory, and never what a link points to.
fn remove_any(path: &Path) -> Result<(), VolumeError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(VolumeError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(entries: &[(&str, &str, u32)]) -> Payload {
        let mut payload = Payload::default();
        for (path, data, mode) in entries {
            let file = File { data: data.as_bytes().to_vec(), mode: *mode, uid: 0 };
            payload.insert(path, file).unwrap();
        }
        payload
    }

    #[test]
    fn files_appear_through_the_data_link_and_change_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let first = payload(&[("a", "1", 0o644), ("d/b", "2", 0o400)]);
        assert!(apply_payload(at, &first, None).unwrap());
        assert!(!apply_payload(at, &first, None).unwrap(), "nothing changed, yet it wrote");
        assert_eq!(fs::read_link(at.join("a")).unwrap(), Path::new("..data/a"));
        assert_eq!(fs::read_to_string(at.join("d/b")).unwrap(), "2");
        assert_eq!(fs::metadata(at.join("d/b")).unwrap().mode() & 0o7777, 0o400);
        let before = fs::read_link(at.join("..data")).unwrap();

        let second = payload(&[("a", "3", 0o600)]);
        assert!(apply_payload(at, &second, None).unwrap());
        assert_ne!(fs::read_link(at.join("..data")).unwrap(), before);
        assert_eq!(fs::read_to_string(at.join("a")).unwrap(), "3");
        assert!(fs::symlink_metadata(at.join("d")).is_err());
        assert!(!at.join(before).exists(), "the old directory stayed");
    }

    #[test]
    fn what_was_tampered_with_is_put_right() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let wanted = payload(&[("a", "1", 0o644)]);
        apply_payload(at, &wanted, None).unwrap();
        fs::write(at.join("..data/a"), "evil").unwrap();
        fs::remove_file(at.join("a")).unwrap();
        fs::create_dir(at.join("a")).unwrap();
        fs::write(at.join("extra"), "x").unwrap();
        fs::create_dir(at.join("..leftover")).unwrap();
        apply_payload(at, &wanted, None).unwrap();
        assert_eq!(fs::read_to_string(at.join("a")).unwrap(), "1");
        let mut names: Vec<_> = fs::read_dir(at)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), 3, "{names:?}");
    }
}
