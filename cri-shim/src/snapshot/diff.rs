//! What a container changed, as a layer: a tar of its upper folder in which overlayfs' marks for
//! removed files and replaced folders have become those of OCI images (image spec, layer.md,
//! "Whiteouts").

use std::ffi::{CStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::image::get_xattr;

/// overlayfs' mark of a folder that hides what is below it.
const OPAQUE: [&CStr; 2] = [c"trusted.overlay.opaque", c"user.overlay.opaque"];

/// Writes the layer. Blocking.
///
/// # Errors
/// With the file concerned; sockets are left out, as tar has none.
pub fn write_layer(upper: &Path, to: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(to);
    tar.follow_symlinks(false);
    add_folder(&mut tar, upper, Path::new(""))
        .map_err(|e| io::Error::new(e.kind(), format!("packing {}: {e}", upper.display())))?;
    tar.into_inner()?.flush()
}

fn add_folder(tar: &mut tar::Builder<impl Write>, upper: &Path, below: &Path) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(upper.join(below))?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), below.join(entry.file_name()));
        let meta = fs::symlink_metadata(&path)?;
        let kind = meta.file_type();
        if kind.is_char_device() && meta.rdev() == 0 {
            let mut hidden = OsString::from(".wh.");
            hidden.push(entry.file_name());
            mark(tar, &below.join(hidden))?;
        } else if kind.is_dir() {
            tar.append_dir(&name, &path)?;
            if is_opaque(&path) {
                mark(tar, &name.join(".wh..wh..opq"))?;
            }
            add_folder(tar, upper, &name)?;
        } else if !kind.is_socket() {
            tar.append_path_with_name(&path, &name)?;
        }
    }
    Ok(())
}

fn mark(tar: &mut tar::Builder<impl Write>, name: &Path) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o600);
    tar.append_data(&mut header, name, io::empty())
}

fn is_opaque(path: &Path) -> bool {
    let Ok(folder) = fs::File::open(path) else { return false };
    OPAQUE.iter().any(|name| get_xattr(&folder, name).is_ok_and(|value| value == b"y"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;

    /// An overlay of the real kernel makes the marks, in a mount namespace of the test's own.
    #[test]
    fn changes_become_a_layer() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let root = tempfile::tempdir().unwrap();
        mount(Some("t"), root.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let at = |name: &str| root.path().join(name);
        for folder in ["lower/replaced", "lower/kept", "upper", "work", "merged"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in ["lower/gone", "lower/replaced/old", "lower/kept/same"] {
            fs::write(at(file), "x").unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            at("lower").display(),
            at("upper").display(),
            at("work").display()
        );
        let kind = Some("overlay");
        mount(kind, &at("merged"), kind, MsFlags::empty(), Some(options.as_str())).unwrap();
        fs::remove_file(at("merged/gone")).unwrap();
        fs::remove_dir_all(at("merged/replaced")).unwrap();
        fs::create_dir(at("merged/replaced")).unwrap();
        fs::write(at("merged/replaced/new"), "new").unwrap();
        std::os::unix::fs::symlink("/etc", at("merged/kept/link")).unwrap();
        let mut bytes = Vec::new();
        write_layer(&at("upper"), &mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        let expected = [
            ".wh.gone",
            "kept/",
            "kept/link",
            "replaced/",
            "replaced/.wh..wh..opq",
            "replaced/new",
        ];
        let trimmed: Vec<&str> = names.iter().map(|n| n.trim_end_matches('/')).collect();
        assert_eq!(trimmed, expected.map(|n| n.trim_end_matches('/')));
        for mounted in ["merged", ""] {
            let _ = nix::mount::umount2(&at(mounted), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
