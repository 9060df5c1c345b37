//! Files that are read again when they change: certificates are renewed under the running server.
//!
//! They are looked at when they are used, at most once a second; nothing waits or polls meanwhile.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How old a look may be.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What says that a file is another one now.
type Mark = (u64, u64, i64, i64, u64);

/// Makes a value of the files' contents, in their order.
pub(super) type Read<T> = fn(&[Vec<u8>]) -> Result<T, String>;

/// A value that comes from files.
pub(super) struct Reloaded<T> {
    paths: Vec<PathBuf>,
    read: Read<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    looked: Option<Instant>,
    marks: Vec<Option<Mark>>,
    value: Option<Arc<T>>,
}

impl<T> Reloaded<T> {
    /// Of `paths`, made by `read`. Nothing is read yet.
    pub(super) fn new(paths: Vec<PathBuf>, read: Read<T>) -> Self {
        Self {
            paths,
            read,
            state: Mutex::new(State { looked: None, marks: Vec::new(), value: None }),
        }
    }

    /// The value as the files have it; the one before where they cannot be used; `None` where they
    /// never could.
    pub(super) fn get(&self) -> Option<Arc<T>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.is_some_and(|looked| looked.elapsed() < LOOK_AGAIN) {
            return state.value.clone();
        }
        state.looked = Some(Instant::now());
        let marks: Vec<_> = self.paths.iter().map(mark).collect();
        if marks == state.marks {
            return state.value.clone();
        }
        match self.load() {
            Ok(value) => state.value = Some(Arc::new(value)),
            Err(error) => tracing::warn!(%error, "the node API goes on with what it had"),
        }
        state.marks = marks;
        state.value.clone()
    }

    fn load(&self) -> Result<T, String> {
        let contents: Vec<Vec<u8>> = self
            .paths
            .iter()
            .map(|path| {
                fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
            })
            .collect::<Result<_, _>>()?;
        (self.read)(&contents).map_err(|error| {
            let names: Vec<_> = self.paths.iter().map(|p| p.display().to_string()).collect();
            format!("cannot use {}: {error}", names.join(" and "))
        })
    }
}

fn mark(path: &PathBuf) -> Option<Mark> {
    let meta = fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()))
}
