//! Who pulled which image with what, so that a pod that may not pull an image cannot use it just because
//! another's pull brought it here (KEP-2535, `KubeletEnsureSecretPulledImages`).
//!
//! Before a pull an intent is written, after it a record, then the intent goes: a crash between any two
//! leaves the image known as pulled here, by nobody in particular, and the next pod must show the
//! registry its credentials. The files are kubelet's (`<root-dir>/image_manager/{pulling,pulled}`).
//! `record` and `decide` are pure; this file reads and writes, one at a time.

pub mod decide;
pub mod record;

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cri_shim::api;
use jiff::Timestamp;
use tokio::sync::Mutex;

use crate::join::files::{FileError, write_atomic};
use crate::metrics::METRICS;
use crate::pod::image_name::{parse_image, without_tag};
use decide::{Check, Known, Match, Policy, Shown, plan_check, plan_match};
use record::{PullCredentials, PulledRecord, decode_intent, encode_intent, file_name};

/// A record that cannot be written or removed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Its folder cannot be made.
    #[error("create {path}: {cause}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] FileError),
    /// It cannot be removed.
    #[error("remove {path}: {cause}")]
    Remove {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The work was broken off.
    #[error("writing was broken off: {0}")]
    Aborted(String),
}

/// Pulls under way, by image.
type UnderWay = Arc<std::sync::Mutex<HashMap<String, u32>>>;

/// A pull under way. One that is given up (dropped) keeps its file until the image's next pull ends: the
/// runtime may go on with it.
#[must_use]
pub struct Intent {
    image: String,
    under_way: UnderWay,
}

fn lock(under_way: &UnderWay) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
    under_way.lock().unwrap_or_else(|e| e.into_inner())
}

impl Intent {
    fn begin(image: &str, under_way: &UnderWay) -> Self {
        *lock(under_way).entry(image.to_owned()).or_default() += 1;
        Self { image: image.to_owned(), under_way: under_way.clone() }
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        let mut under_way = lock(&self.under_way);
        match under_way.get_mut(&self.image) {
            Some(pulls) if *pulls > 1 => *pulls -= 1,
            _ => {
                under_way.remove(&self.image);
            }
        }
    }
}

/// The files.
struct Files {
    pulling: PathBuf,
    pulled: PathBuf,
    under_way: UnderWay,
}

/// The records of a node.
pub struct PullRecords {
    policy: Policy,
    under_way: UnderWay,
    files: Arc<Mutex<Files>>,
}

impl PullRecords {
    /// Those below `root_dir`, which need not be there yet.
    pub fn new(root_dir: &Path, policy: Policy) -> Self {
        let dir = root_dir.join("image_manager");
        let under_way = UnderWay::default();
        let files = Files {
            pulling: dir.join("pulling"),
            pulled: dir.join("pulled"),
            under_way: under_way.clone(),
        };
        Self { policy, under_way, files: Arc::new(Mutex::new(files)) }
    }

    /// Does `work` where it may block, alone.
    async fn alone<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Files) -> Result<T, RecordError> + Send + 'static,
    ) -> Result<T, RecordError> {
        let mut files = self.files.clone().lock_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let done = work(&mut files);
            METRICS.images.pull_records(count(&files.pulling), count(&files.pulled));
            done
        });
        done.await.unwrap_or_else(|error| Err(RecordError::Aborted(error.to_string())))
    }

    /// Whether pulls were under way when the agent ended.
    pub async fn must_recover(&self) -> bool {
        !self.files.lock().await.intents().is_empty()
    }

    /// Makes records of what was being pulled when the agent ended, if it is there now. `images` are
    /// those of the node.
    pub async fn recover(&self, images: Vec<api::Image>) {
        let now = Timestamp::now();
        let done = self.alone(move |files| {
            for image in files.intents() {
                let full = parse_image(&image).map(|name| name.full).unwrap_or_default();
                let is = |name: &String| *name == image || *name == full;
                let found =
                    images.iter().find(|i| i.repo_tags.iter().chain(&i.repo_digests).any(is));
                if let Some(found) = found {
                    files.note(&image, &found.id, None, now)?;
                    remove(&files.pulling.join(file_name(&image)))?;
                }
            }
            Ok(())
        });
        if let Err(error) = done.await {
            tracing::warn!(%error, "pulls that were under way at the last start are not recorded");
        }
    }

    /// Whether pods may use `image` (as they name it), which is here with this id.
    pub async fn check(&self, image: &str, id: &str) -> Check {
        let known = self.files.lock().await.known(image, id);
        let check = plan_check(&self.policy, image, &known);
        match check {
            Check::Allowed(result) | Check::MustPull(result) => {
                METRICS.images.must_pull_checked(result)
            }
            Check::Compare(_) => {}
        }
        check
    }

    /// Whether a pod that shows this may use `image`, of which `check` said to compare with `of`.
    pub async fn compare(
        &self,
        (image, id): (&str, &str),
        of: &PullCredentials,
        shown: &Shown,
    ) -> bool {
        let matched = plan_match(of, shown);
        let found = matched != Match::None;
        METRICS.images.must_pull_checked(if found {
            "credentialRecordFound"
        } else {
            "mustAuthenticate"
        });
        if let Match::FoundAs(secret) = matched {
            let with =
                PullCredentials { kubernetes_secrets: vec![secret], ..PullCredentials::default() };
            self.note((image, id), with).await;
        }
        found
    }

    /// `image` is about to be pulled; to be followed by `pulled` or `failed`.
    ///
    /// # Errors
    /// It cannot be written; then the image must not be pulled.
    pub async fn intend(&self, image: &str) -> Result<Intent, RecordError> {
        let intent = Intent::begin(image, &self.under_way);
        let image = image.to_owned();
        let write = move |files: &mut Files| {
            write(&files.pulling, &file_name(&image), &encode_intent(&image))
        };
        self.alone(write).await?;
        Ok(intent)
    }

    /// It was pulled, and has this id; `with` tells what opened the registry.
    pub async fn pulled(&self, intent: Intent, id: &str, with: PullCredentials) {
        if self.note((&intent.image, id), with).await {
            self.failed(intent).await;
        }
        // Else the intent stays, and is made a record at the next start.
    }

    /// The pull is over.
    pub async fn failed(&self, intent: Intent) {
        let image = intent.image.clone();
        let done = self.alone(move |files| {
            let path = files.pulling.join(file_name(&intent.image));
            let image = intent.image.clone();
            drop(intent);
            if lock(&files.under_way).contains_key(&image) { Ok(()) } else { remove(&path) }
        });
        if let Err(error) = done.await {
            tracing::warn!(image, %error, "the intent to pull an image stays");
        }
    }

    async fn note(&self, (image, id): (&str, &str), with: PullCredentials) -> bool {
        let (owned, id, now) = (image.to_owned(), id.to_owned(), Timestamp::now());
        let done = self.alone(move |files| files.note(&owned, &id, Some(&with), now));
        match done.await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(image, %error, "who may use an image is not recorded");
                false
            }
        }
    }

    /// Forgets images that are gone; `ids` are those of the node, as they were at `until`.
    pub async fn prune(&self, ids: HashSet<String>, until: Timestamp) {
        // Records tell whole seconds.
        let until = until.checked_sub(jiff::SignedDuration::from_secs(1)).unwrap_or(until);
        let done = self.alone(move |files| {
            for record in files.records() {
                if record.is_older_than(until) && !ids.contains(&record.image_ref) {
                    remove(&files.pulled.join(file_name(&record.image_ref)))?;
                }
            }
            Ok(())
        });
        if let Err(error) = done.await {
            tracing::warn!(%error, "records of images that are gone stay");
        }
    }
}

impl Files {
    fn known(&self, image: &str, id: &str) -> Known {
        let unreadable = |path: &Path, reason: &dyn std::fmt::Display| {
            tracing::warn!(path = %path.display(), %reason,
                "a record of a pull cannot be read; the image is pulled again. Remove the file if this goes on");
            Known::Unreadable
        };
        let path = self.pulled.join(file_name(id));
        match fs::read(&path) {
            Ok(text) => match PulledRecord::decode(&text) {
                Ok(record) if record.image_ref == id => return Known::Record(record),
                Ok(_) => {}
                Err(reason) => return unreadable(&path, &reason),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return unreadable(&path, &error),
        }
        if lock(&self.under_way).contains_key(image) {
            return Known::Intent;
        }
        let path = self.pulling.join(file_name(image));
        match fs::read(&path) {
            Ok(text) => match decode_intent(&text) {
                Ok(of) if of == image => Known::Intent,
                Ok(_) => Known::Nothing,
                Err(reason) => unreadable(&path, &reason),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Known::Nothing,
            Err(error) => unreadable(&path, &error),
        }
    }

    /// Adds to the record of `id`, which is made anew where it cannot be read.
    fn note(
        &self,
        image: &str,
        id: &str,
        with: Option<&PullCredentials>,
        now: Timestamp,
    ) -> Result<(), RecordError> {
        let (name, path) = (without_tag(image).unwrap_or(image), self.pulled.join(file_name(id)));
        let read = fs::read(&path).ok().and_then(|text| PulledRecord::decode(&text).ok());
        let read = read.filter(|record| record.image_ref == id);
        let is_new = read.is_none();
        let mut record = read.unwrap_or_else(|| PulledRecord::new(id, now));
        let changed = with.is_some_and(|with| record.merge(name, with, now));
        if is_new || changed {
            write(&self.pulled, &file_name(id), &record.encode())?;
        }
        Ok(())
    }

    fn intents(&self) -> Vec<String> {
        contents(&self.pulling, decode_intent)
    }

    fn records(&self) -> Vec<PulledRecord> {
        contents(&self.pulled, PulledRecord::decode)
    }
}

/// Our and kubelet's files in a folder, without those that are half written.
fn files_in(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("sha256-") && !name.ends_with(".tmp")
    })
}

fn count(dir: &Path) -> usize {
    files_in(dir).count()
}

fn contents<T>(dir: &Path, decode: impl Fn(&[u8]) -> Result<T, String>) -> Vec<T> {
    let mut found = Vec::new();
    for path in files_in(dir) {
        let read = fs::read(&path).map_err(|error| error.to_string());
        match read.and_then(|text| decode(&text)) {
            Ok(content) => found.push(content),
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "a record of a pull cannot be read");
            }
        }
    }
    found
}

fn write(dir: &Path, name: &str, content: &[u8]) -> Result<(), RecordError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|cause| RecordError::Folder { path: dir.to_owned(), cause })?;
    Ok(write_atomic(&dir.join(name), 0o600, content)?)
}

fn remove(path: &Path) -> Result<(), RecordError> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(RecordError::Remove { path: path.to_owned(), cause })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
