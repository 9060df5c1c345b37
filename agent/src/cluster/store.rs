//! The last known objects on disk, so that pods and Services come back after a restart with the
//! control plane away.
//!
//! One file for each kind: a header line, then one JSON object a line. A file is written whole
//! (temporary file, fsync, rename) some time after a change; the more it costs, the less often.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::join::files::write_atomic;

/// First line of every file; a file of another version is set aside.
const HEADER: &str = r#"{"longshore":1}"#;
/// Shortest time between two writes.
const PAUSE: Duration = Duration::from_millis(1000);
/// A write that took t is followed by a pause of this many times t, ...
const PAUSE_FACTOR: u32 = 50;
/// ... but by no longer one: what a disk that was slow once has not taken is lost with the machine.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What is known of one kind, by `namespace/name`, and its file.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    objects: std::sync::Mutex<BTreeMap<String, Box<str>>>,
    changed: Notify,
}

impl Store {
    /// The store of `kind` in `dir`; nothing is read yet.
    pub fn new(dir: &Path, kind: &str) -> Self {
        Self {
            inner: Arc::new(Inner {
                path: dir.join(format!("{kind}.jsonl")),
                objects: std::sync::Mutex::default(),
                changed: Notify::new(),
            }),
        }
    }

    fn objects(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Box<str>>> {
        self.inner.objects.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the file holds; it also becomes what the store holds. `None` if there is no file, or one
    /// that cannot be read: it is renamed to `*.unreadable` and the error is logged.
    pub fn load<K: DeserializeOwned>(&self) -> Option<Vec<K>> {
        let path = &self.inner.path;
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "cannot read the last known objects");
                return None;
            }
        };
        match parse(&text) {
            Ok((held, objects)) => {
                *self.objects() = held;
                Some(objects)
            }
            Err(cause) => {
                let aside = path.with_extension("jsonl.unreadable");
                let _ = std::fs::rename(path, &aside);
                tracing::error!(path = %path.display(), aside = %aside.display(), %cause,
                    "the last known objects cannot be read; set aside");
                None
            }
        }
    }

    /// Holds `object` under `key`.
    pub fn put<K: Serialize>(&self, key: &str, object: &K) {
        let Ok(text) = serde_json::to_string(object) else { return };
        let mut objects = self.objects();
        if objects.get(key).is_some_and(|held| **held == *text) {
            return;
        }
        objects.insert(key.to_owned(), text.into());
        drop(objects);
        self.inner.changed.notify_one();
    }

    /// Forgets `key`.
    pub fn remove(&self, key: &str) {
        if self.objects().remove(key).is_some() {
            self.inner.changed.notify_one();
        }
    }

    /// Forgets all but `keys`.
    pub fn keep(&self, keep: impl Fn(&str) -> bool) {
        let mut objects = self.objects();
        let before = objects.len();
        objects.retain(|key, _| keep(key));
        if objects.len() != before {
            self.inner.changed.notify_one();
        }
    }

    fn text(&self) -> String {
        let objects = self.objects();
        let length: usize = objects.iter().map(|(k, v)| k.len() + v.len() + 8).sum();
        let mut text = String::with_capacity(length + HEADER.len() + 1);
        text.push_str(HEADER);
        text.push('\n');
        for (key, object) in objects.iter() {
            // Keys are Kubernetes names: no quotes or backslashes.
            text.push_str("[\"");
            text.push_str(key);
            text.push_str("\",");
            text.push_str(object);
            text.push_str("]\n");
        }
        text
    }

    /// Writes what is held now.
    pub fn write(&self) {
        if let Err(error) = write_atomic(&self.inner.path, 0o600, self.text().as_bytes()) {
            tracing::error!(%error, "cannot keep the last known objects");
        }
    }

    /// Writes after changes, for ever.
    pub async fn run(self) {
        let mut pause = PAUSE;
        let mut last = LastWrite { store: self.clone(), due: false };
        loop {
            self.inner.changed.notified().await;
            last.due = true;
            tokio::time::sleep(pause).await;
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

type Parsed<K> = (BTreeMap<String, Box<str>>, Vec<K>);

fn parse<K: DeserializeOwned>(text: &str) -> Result<Parsed<K>, String> {
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Err("it is of another version".to_owned());
    }
    let (mut held, mut objects) = (BTreeMap::new(), Vec::new());
    for (number, line) in lines.enumerate() {
        let (key, raw): (String, Box<serde_json::value::RawValue>) =
            serde_json::from_str(line).map_err(|e| format!("line {}: {e}", number + 2))?;
        objects.push(
            serde_json::from_str(raw.get()).map_err(|e| format!("line {}: {e}", number + 2))?,
        );
        held.insert(key, raw.get().into());
    }
    Ok((held, objects))
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
        assert_eq!(again.load::<ConfigMap>().unwrap(), [map("a"), map("c")]);
        again.keep(|key| key == "n/c");
        again.write();
        assert_eq!(Store::new(dir.path(), "maps").load::<ConfigMap>().unwrap(), [map("c")]);

        let path = dir.path().join("maps.jsonl");
        for damaged in ["", "{}\n", "{\"longshore\":1}\n[\"a\",{\"metadata\":{\"name\""] {
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
        assert_eq!(again.load::<ConfigMap>().map(|all| all.len()), Some(1));
    }
}
