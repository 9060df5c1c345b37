//! Removing folders that others have filled.
//!
//! A container can nest folders without end, and a layer's author too. The standard library goes
//! down a tree by recursion with a descriptor a level; here each folder that is not empty is first
//! moved to the top, so that no depth costs more than any other.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{OFlag, openat, renameat},
    sys::stat::Mode,
    unistd::{UnlinkatFlags, unlinkat},
};

/// Removes `path` and all that is in it, following no links. Nothing there is a success.
///
/// # Errors
/// The kernel's, such as that something is mounted inside.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    match File::open(parent) {
        Ok(parent) => Ok(remove_tree_at(parent.as_fd(), name)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// As [`remove_tree`], for `name` in an open folder.
pub(crate) fn remove_tree_at(parent: BorrowedFd, name: &OsStr) -> Result<(), Errno> {
    let top = match open_folder(parent, name) {
        Ok(top) => top,
        Err(Errno::ENOENT) => return Ok(()),
        // No folder, or a link to one.
        Err(Errno::ENOTDIR | Errno::ELOOP) => {
            return absent(unlinkat(parent, name, UnlinkatFlags::NoRemoveDir));
        }
        Err(errno) => return Err(errno),
    };
    loop {
        let entries = entries(&top)?;
        if entries.is_empty() {
            return absent(unlinkat(parent, name, UnlinkatFlags::RemoveDir));
        }
        for (name, is_folder) in entries {
            if !is_folder {
                absent(unlinkat(&top, name.as_c_str(), UnlinkatFlags::NoRemoveDir))?;
                continue;
            }
            let folder = open_folder(top.as_fd(), name.as_c_str())?;
            empty(&folder, &top)?;
            absent(unlinkat(&top, name.as_c_str(), UnlinkatFlags::RemoveDir))?;
        }
    }
}

/// Removes what is in `folder`; what has something in it itself goes to `top`.
fn empty(folder: &OwnedFd, top: &OwnedFd) -> Result<(), Errno> {
    for (name, is_folder) in entries(folder)? {
        let name = name.as_c_str();
        if !is_folder {
            absent(unlinkat(folder, name, UnlinkatFlags::NoRemoveDir))?;
            continue;
        }
        match unlinkat(folder, name, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => loop {
                let new = format!(".removed-{:016x}", fastrand::u64(..));
                match renameat(folder, name, top, new.as_str()) {
                    // The name is somebody's already.
                    Err(Errno::EEXIST | Errno::ENOTEMPTY | Errno::ENOTDIR) => {}
                    moved => break moved,
                }
            },
            removed => absent(removed),
        }?;
    }
    Ok(())
}

fn open_folder<P: ?Sized + nix::NixPath>(parent: BorrowedFd, name: &P) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// The names in a folder, and which of them are folders.
pub(crate) fn entries(folder: &OwnedFd) -> Result<Vec<(CString, bool)>, Errno> {
    let mut dir = Dir::openat(folder, ".", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut entries = Vec::new();
    for entry in dir.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let is_folder = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            // Some filesystems do not say.
            None => open_folder(folder.as_fd(), name).is_ok(),
        };
        entries.push((name.to_owned(), is_folder));
    }
    Ok(entries)
}

fn absent(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use nix::sys::stat::mkdirat;

    use super::*;

    #[test]
    fn trees_of_any_depth_are_removed_and_links_are_not_followed() {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("kept")).unwrap();
        fs::write(outer.path().join("kept/file"), "x").unwrap();
        let tree = outer.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::write(tree.join("a/b/file"), "x").unwrap();
        symlink(outer.path().join("kept"), tree.join("a/link")).unwrap();
        symlink("/", tree.join("root")).unwrap();
        // Deeper than a path is long, or descriptors are many.
        let mut at: OwnedFd = File::open(&tree).unwrap().into();
        for _ in 0..20_000 {
            mkdirat(&at, "deep", Mode::S_IRWXU).unwrap();
            at = open_folder(at.as_fd(), "deep").unwrap();
        }
        drop(at);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        remove_tree(&tree).unwrap();
        assert_eq!(fs::read_to_string(outer.path().join("kept/file")).unwrap(), "x");
        // What is no folder goes as itself.
        symlink("kept", outer.path().join("link")).unwrap();
        remove_tree(&outer.path().join("link")).unwrap();
        assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 1);
    }
}
