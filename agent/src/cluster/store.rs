//! The last known objects on disk, so that pods and Services come back after a restart with the
//! control plane away.
//!
//! One file for each kind: a header line, then a line for each change, `["key",object]` or
//! `["key",null]` for what is gone; the last one of a key counts. Changes are added some time after
//! they came, the more that costs the less often, and the file is written anew (temporary file,
//! fsync, rename) when more than half of it no longer counts. Memory holds where an object is in the
//! file, not the object: a cluster has tens of thousands of Services, and nobody asks for them again.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{self, BufRead as _, BufReader, BufWriter, Seek as _, SeekFrom, Write as _};
use std::marker::PhantomData;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use tokio::sync::Notify;
use tokio::time::Instant;

/// First line of every file; a file of another version is set aside.
const HEADER: &str = "{\"longshore\":2}\n";
/// That of files in which nothing is gone and no key is twice. They are read, and written anew.
const HEADER_1: &str = "{\"longshore\":1}\n";
/// Shortest time between two writes.
const PAUSE: Duration = Duration::from_millis(1000);
/// A write that took t is followed by a pause of this many times t, ...
const PAUSE_FACTOR: u32 = 50;
/// ... but by no longer one: what a disk that was slow once has not taken is lost with the machine.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Changes of so many bytes are written at once, and so much of a file may always be out of date.
const MUCH: u64 = 1 << 20;

/// What is known of one kind, by `namespace/name`, and its file.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    state: Mutex<State>,
    /// Held by who writes the file.
    writing: Mutex<()>,
    changed: Notify,
    full: Notify,
}

#[derive(Default)]
struct State {
    held: HashMap<Box<str>, Held>,
    /// What is not in the file yet: an object's JSON, or that it is gone.
    pending: BTreeMap<Box<str>, Option<Box<str>>>,
    pending_bytes: u64,
    /// The length of the file as far as it is whole; 0 where it has to be written anew.
    file: u64,
    /// Bytes of it that count.
    live: u64,
    /// The file of the last run has been looked at.
    recalled: bool,
    /// All there is has been told, so that what only the file has is gone.
    complete: bool,
}

/// One object.
struct Held {
    /// Of its JSON; by it a change is told from a repetition.
    sum: u64,
    /// Its line's offset and length in the file; none while it is pending.
    place: Option<(u64, u32)>,
}

fn sum(json: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(json.as_bytes());
    hasher.finish()
}

impl State {
    fn hold(&mut self, key: &str, sum: u64, place: Option<(u64, u32)>) {
        self.live += place.map_or(0, |(_, length)| u64::from(length));
        if let Some(before) = self.held.insert(key.into(), Held { sum, place }) {
            self.live -= before.place.map_or(0, |(_, length)| u64::from(length));
        }
    }

    fn forget(&mut self, key: &str) -> bool {
        let Some(before) = self.held.remove(key) else { return false };
        self.live -= before.place.map_or(0, |(_, length)| u64::from(length));
        true
    }

    fn pend(&mut self, key: &str, json: Option<Box<str>>) {
        self.pending_bytes += (key.len() + json.as_ref().map_or(4, |json| json.len()) + 6) as u64;
        self.pending.insert(key.into(), json);
    }
}

impl Store {
    /// The store of `kind` in `dir`; nothing is read yet.
    pub fn new(dir: &Path, kind: &str) -> Self {
        Self {
            inner: Arc::new(Inner {
                path: dir.join(format!("{kind}.jsonl")),
                state: Mutex::default(),
                writing: Mutex::default(),
                changed: Notify::new(),
                full: Notify::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the file holds, which also becomes what the store holds; objects are read one by one.
    /// Objects that the store was given meanwhile are not among them. `None` if there is no file, or one
    /// that cannot be read: it is renamed to `*.unreadable` and the error is logged. A last line that
    /// was not written whole is left out.
    pub fn load<K: DeserializeOwned>(&self) -> Option<Loaded<K>> {
        let _one = self.inner.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.recall();
        let state = self.state();
        let mut places: Vec<_> = state.held.values().filter_map(|held| held.place).collect();
        if places.is_empty() && state.file == 0 {
            return None;
        }
        drop(state);
        places.sort_unstable();
        let file = File::open(&self.inner.path).map_err(|error| self.unreadable(&error)).ok()?;
        Some(Loaded { file, places: places.into_iter(), of: PhantomData })
    }

    fn unreadable(&self, error: &io::Error) {
        let path = self.inner.path.display();
        tracing::error!(%path, %error, "cannot read the last known objects");
    }

    /// Adds to what is held what only the file has. Called by who holds `writing`.
    fn recall(&self) {
        if std::mem::replace(&mut self.state().recalled, true) {
            return;
        }
        let path = &self.inner.path;
        let found = match File::open(path) {
            Ok(file) => read(&file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.unreadable(&error),
        };
        match found {
            Ok(found) => {
                let mut state = self.state();
                if state.complete {
                    return;
                }
                state.file = found.file;
                for (key, held) in found.held {
                    if !state.held.contains_key(&key) && !state.pending.contains_key(&key) {
                        state.hold(&key, held.sum, held.place);
                    }
                }
            }
            Err(cause) => {
                let aside = path.with_extension("jsonl.unreadable");
                let _ = fs::rename(path, &aside);
                tracing::error!(path = %path.display(), aside = %aside.display(), %cause,
                    "the last known objects cannot be read; set aside");
            }
        }
    }

    /// Holds `object` under `key`.
    pub fn put<K: Serialize>(&self, key: &str, object: &K) {
        let Ok(json) = serde_json::to_string(object) else { return };
        let sum = sum(&json);
        let mut state = self.state();
        if state.held.get(key).is_some_and(|held| held.sum == sum) {
            return;
        }
        state.hold(key, sum, None);
        state.pend(key, Some(json.into()));
        self.tell(state);
    }

    /// Forgets `key`.
    pub fn remove(&self, key: &str) {
        let mut state = self.state();
        if state.forget(key) {
            state.pend(key, None);
            self.tell(state);
        }
    }

    /// Forgets all but what `keep` wants, and tells what that is.
    pub fn keep(&self, keep: impl Fn(&str) -> bool) -> Vec<Box<str>> {
        let mut state = self.state();
        state.complete |= !state.recalled;
        let gone: Vec<Box<str>> = state.held.keys().filter(|key| !keep(key)).cloned().collect();
        if gone.is_empty() {
            return gone;
        }
        for key in &gone {
            state.forget(key);
            state.pend(key, None);
        }
        self.tell(state);
        gone
    }

    fn tell(&self, state: MutexGuard<'_, State>) {
        let full = state.pending_bytes > MUCH;
        drop(state);
        self.inner.changed.notify_one();
        if full {
            self.inner.full.notify_one();
        }
    }

    /// Writes what is not in the file yet.
    pub fn write(&self) {
        let _one = self.inner.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.recall();
        let (pending, anew, much) = {
            let mut state = self.state();
            let much = std::mem::take(&mut state.pending_bytes) > MUCH;
            let anew = state.file == 0 || state.file > 2 * state.live + MUCH;
            (std::mem::take(&mut state.pending), anew, much)
        };
        if pending.is_empty() && !anew {
            return;
        }
        let written = if anew { self.write_anew(&pending) } else { self.append(&pending) };
        if let Err(error) = written {
            let path = self.inner.path.display();
            tracing::error!(%path, %error, "cannot keep the last known objects; free disk space");
            let mut state = self.state();
            for (key, json) in pending {
                // Unless there is something newer.
                if !state.pending.contains_key(&key) {
                    state.pend(&key, json);
                }
            }
        } else if much {
            drop(pending);
            crate::sys::release_memory();
        }
    }

    fn append(&self, pending: &BTreeMap<Box<str>, Option<Box<str>>>) -> io::Result<()> {
        let begin = self.state().file;
        let mut file = fs::OpenOptions::new().write(true).open(&self.inner.path)?;
        // What a write that failed left of a line.
        file.set_len(begin)?;
        file.seek(SeekFrom::Start(begin))?;
        let mut out = BufWriter::new(file);
        let (places, end) = write_lines(&mut out, begin, pending)?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_data()?;
        self.place(places, pending, end);
        Ok(())
    }

    fn write_anew(&self, pending: &BTreeMap<Box<str>, Option<Box<str>>>) -> io::Result<()> {
        let path = &self.inner.path;
        let mut old: Vec<(u64, u32)> =
            self.state().held.values().filter_map(|held| held.place).collect();
        old.sort_unstable();
        let from = if old.is_empty() { None } else { Some(File::open(path)?) };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let temporary = path.with_extension("jsonl.tmp");
        let _ = fs::remove_file(&temporary);
        let file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        let mut out = BufWriter::new(file);
        out.write_all(HEADER.as_bytes())?;
        let mut at = HEADER.len() as u64;
        let (mut moved, mut line) = (Vec::with_capacity(old.len()), Vec::new());
        for (offset, length) in old {
            line.resize(length as usize, 0);
            if let Some(from) = &from {
                from.read_exact_at(&mut line, offset)?;
            }
            out.write_all(&line)?;
            moved.push((offset, at));
            at += u64::from(length);
        }
        let (places, end) = write_lines(&mut out, at, pending)?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&temporary, path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        for held in self.state().held.values_mut() {
            if let Some((offset, _)) = &mut held.place
                && let Ok(found) = moved.binary_search_by_key(offset, |(before, _)| *before)
            {
                *offset = moved[found].1;
            }
        }
        self.place(places, pending, end);
        Ok(())
    }

    /// Notes where lines are, unless their objects have changed meanwhile.
    fn place(
        &self,
        places: Vec<(u64, u32)>,
        pending: &BTreeMap<Box<str>, Option<Box<str>>>,
        end: u64,
    ) {
        let mut state = self.state();
        state.file = end;
        for ((key, json), place) in pending.iter().zip(places) {
            let Some(json) = json else { continue };
            let sum = sum(json);
            let same = state.held.get(key).is_some_and(|h| h.sum == sum && h.place.is_none());
            if same && !state.pending.contains_key(key) {
                state.hold(key, sum, Some(place));
            }
        }
    }

    /// Writes after changes, for ever.
    pub async fn run(self) {
        let mut pause = PAUSE;
        let mut last = LastWrite { store: self.clone(), due: false };
        loop {
            self.inner.changed.notified().await;
            last.due = true;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.inner.full.notified() => {}
            }
            last.due = false;
            let started = Instant::now();
            let store = self.clone();
            let _ = tokio::task::spawn_blocking(move || store.write()).await;
            pause = (started.elapsed() * PAUSE_FACTOR).clamp(PAUSE, LONGEST_PAUSE);
        }
    }
}

/// Writes what is due when the loop ends, so that a restart finds it.
struct LastWrite {
    store: Store,
    due: bool,
}

impl Drop for LastWrite {
    fn drop(&mut self) {
        if self.due {
            self.store.write();
        }
    }
}

/// The objects of a file, read one by one. One that cannot be understood is left out and logged.
pub struct Loaded<K> {
    file: File,
    places: std::vec::IntoIter<(u64, u32)>,
    of: PhantomData<fn() -> K>,
}

impl<K: DeserializeOwned> Iterator for Loaded<K> {
    type Item = K;

    fn next(&mut self) -> Option<K> {
        loop {
            let (offset, length) = self.places.next()?;
            let mut line = vec![0; length as usize];
            let read = self.file.read_exact_at(&mut line, offset).map_err(|e| e.to_string());
            let object = read.and_then(|()| {
                let (_, raw): (&str, &RawValue) =
                    serde_json::from_slice(&line).map_err(|e| e.to_string())?;
                serde_json::from_str(raw.get()).map_err(|e| e.to_string())
            });
            match object {
                Ok(object) => return Some(object),
                Err(error) => {
                    tracing::error!(offset, %error, "a last known object cannot be read; left out");
                }
            }
        }
    }
}

/// What is where in a file.
fn read(file: &File) -> Result<State, String> {
    let mut lines = BufReader::with_capacity(64 << 10, file);
    let (mut line, mut state) = (Vec::new(), State::default());
    let mut next = |line: &mut Vec<u8>| {
        line.clear();
        lines.read_until(b'\n', line).map_err(|e| e.to_string())
    };
    let mut at = next(&mut line)? as u64;
    let first = line == HEADER_1.as_bytes();
    if !first && line != HEADER.as_bytes() {
        return Err("it is of another version".to_owned());
    }
    for number in 2.. {
        let length = next(&mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        let (key, raw): (&str, Option<&RawValue>) =
            serde_json::from_slice(&line).map_err(|e| format!("line {number}: {e}"))?;
        match raw {
            Some(raw) => {
                let place = (at, u32::try_from(length).map_err(|e| e.to_string())?);
                state.hold(key, sum(raw.get()), Some(place));
            }
            None => drop(state.forget(key)),
        }
        at += length as u64;
    }
    state.file = if first { 0 } else { at };
    Ok(state)
}

/// Writes lines at an offset; the place of each and where they end.
fn write_lines(
    out: &mut impl io::Write,
    begin: u64,
    pending: &BTreeMap<Box<str>, Option<Box<str>>>,
) -> io::Result<(Vec<(u64, u32)>, u64)> {
    let (mut places, mut at) = (Vec::with_capacity(pending.len()), begin);
    for (key, json) in pending {
        let json = json.as_deref().unwrap_or("null");
        // Keys are Kubernetes names: no quotes or backslashes.
        writeln!(out, "[\"{key}\",{json}]")?;
        let length = key.len() + json.len() + 6;
        places.push((at, u32::try_from(length).map_err(io::Error::other)?));
        at += length as u64;
    }
    out.flush()?;
    Ok((places, at))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn map(name: &str) -> ConfigMap {
        let mut map = ConfigMap::default();
        map.metadata.name = Some(name.to_owned());
        map
    }

    fn all(store: &Store) -> Option<Vec<ConfigMap>> {
        store.load().map(Iterator::collect)
    }

    #[test]
    fn a_half_written_line_is_left_out_and_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("maps.jsonl");
        let store = Store::new(dir.path(), "maps");
        store.put("a", &map("a"));
        store.write();
        let whole = fs::read(&path).unwrap();
        store.put("b", &map("b"));
        store.write();
        let both = fs::read(&path).unwrap();
        for end in whole.len()..both.len() {
            fs::write(&path, &both[..end]).unwrap();
            let again = Store::new(dir.path(), "maps");
            assert_eq!(all(&again).unwrap(), [map("a")]);
            again.put("c", &map("c"));
            again.write();
            assert_eq!(all(&Store::new(dir.path(), "maps")).unwrap(), [map("a"), map("c")]);
        }
    }

    #[test]
    fn a_file_does_not_grow_with_the_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("maps.jsonl");
        let store = Store::new(dir.path(), "maps");
        let large = |i: usize, round: usize| {
            let mut map = map(&format!("m{i}"));
            map.data = Some([("k".into(), format!("{round}{}", "x".repeat(20_000)))].into());
            map
        };
        for round in 0..30 {
            for i in 0..10 {
                store.put(&format!("m{i}"), &large(i, round));
            }
            if round == 20 {
                store.remove("m3");
                store.put("m3", &large(3, 21));
            }
            store.write();
            // As is: nothing is written.
            store.put("m0", &large(0, round));
            assert!(store.state().pending.is_empty());
        }
        store.remove("m9");
        store.write();
        let length = fs::metadata(&path).unwrap().len();
        assert!(length < 2 * 200_000 + MUCH + 200_000 + 20_000, "{length}");
        let mut found = all(&Store::new(dir.path(), "maps")).unwrap();
        found.sort_by_key(|map| map.metadata.name.clone());
        let expected: Vec<_> = (0..9).map(|i| large(i, 29)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn files_of_the_first_version_are_read_and_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("maps.jsonl");
        let json = serde_json::to_string(&map("a")).unwrap();
        fs::write(&path, format!("{HEADER_1}[\"a\",{json}]\n")).unwrap();
        let store = Store::new(dir.path(), "maps");
        assert_eq!(all(&store).unwrap(), [map("a")]);
        store.put("b", &map("b"));
        store.write();
        assert!(fs::read_to_string(&path).unwrap().starts_with(HEADER));
        assert_eq!(all(&Store::new(dir.path(), "maps")).unwrap(), [map("a"), map("b")]);
    }

    #[test]
    fn what_a_full_disk_refused_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("absent"), "maps");
        // A file where the folder is to be.
        fs::write(dir.path().join("absent"), "").unwrap();
        store.put("a", &map("a"));
        store.write();
        store.put("b", &map("b"));
        store.remove("a");
        fs::remove_file(dir.path().join("absent")).unwrap();
        store.write();
        let again = Store::new(&dir.path().join("absent"), "maps");
        assert_eq!(all(&again).unwrap(), [map("b")]);
    }

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "maps");
        assert!(store.load::<ConfigMap>().is_none());
        for name in ["a", "b", "c"] {
            store.put(&format!("n/{name}"), &map(name));
        }
        store.remove("n/b");
        store.write();
        let again = Store::new(dir.path(), "maps");
        assert_eq!(all(&again).unwrap(), [map("a"), map("c")]);
        again.keep(|key| key == "n/c");
        again.write();
        assert_eq!(all(&Store::new(dir.path(), "maps")).unwrap(), [map("c")]);

        let path = dir.path().join("maps.jsonl");
        for damaged in ["", "{}\n", "{\"longshore\":2}\n[\"a\",{\"metadata\":{\"name\"\n"] {
            std::fs::write(&path, damaged).unwrap();
            assert!(Store::new(dir.path(), "maps").load::<ConfigMap>().is_none());
            assert!(!path.exists());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_is_written_when_the_loop_ends() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "configmaps");
        let running = tokio::spawn(store.clone().run());
        store.put("a", &map("a"));
        tokio::task::yield_now().await;
        running.abort();
        let _ = running.await;
        let again = Store::new(dir.path(), "configmaps");
        assert_eq!(all(&again).map(|all| all.len()), Some(1));
    }
}
