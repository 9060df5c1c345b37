//! Small state on disk: written whole (temporary file, fsync, rename), versioned, and set aside
//! where it cannot be read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of the shape; another one is set aside.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    content: T,
}

/// What was kept at `path`; `None` if nothing was, or nothing that can be read.
pub fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "cannot read kept state; going on without");
            return None;
        }
    };
    match serde_json::from_slice::<Envelope<T>>(&text) {
        Ok(envelope) if envelope.version == VERSION => Some(envelope.content),
        outcome => {
            let cause = match outcome {
                Ok(envelope) => format!("version {} is not {VERSION}", envelope.version),
                Err(error) => error.to_string(),
            };
            let aside = path.with_extension("unreadable");
            tracing::error!(
                path = %path.display(), aside = %aside.display(), cause,
                "kept state cannot be read and is set aside; going on without"
            );
            let _ = fs::rename(path, aside);
            None
        }
    }
}

/// Keeps `content` at `path`, unless it is there already.
pub fn write_if_changed<T: Serialize>(path: &Path, content: &T) -> io::Result<()> {
    let text = serde_json::to_vec(&Envelope { version: VERSION, content })?;
    if fs::read(path).is_ok_and(|kept| kept == text) {
        return Ok(());
    }
    let Some(parent) = path.parent() else { return Err(io::Error::other("no folder")) };
    fs::create_dir_all(parent)?;
    let temporary = path.with_extension("new");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_rubbish_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/state.json");
        assert_eq!(read::<Vec<u8>>(&path), None);
        write_if_changed(&path, &vec![1_u8, 2]).unwrap();
        assert_eq!(read::<Vec<u8>>(&path), Some(vec![1, 2]));
        for rubbish in [&b"{"[..], b"", b"{\"version\":9,\"content\":[1]}"] {
            fs::write(&path, rubbish).unwrap();
            assert_eq!(read::<Vec<u8>>(&path), None);
            assert!(!path.exists() && path.with_extension("unreadable").exists());
        }
    }
}
