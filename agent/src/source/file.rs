//! Pods (and in standalone mode all else) from a folder of manifests, watched with inotify.
//!
//! Events say only where to look; what is there is read whole and compared, so that a lost or
//! doubled event changes nothing. A slow look at the folder is the safety net.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use inotify::WatchMask;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::folder_events::{self, Events};
use crate::join::files::{FileError, write_atomic};
use crate::source::url::{Said, UrlSide};
use crate::source::{PodChange, PodSource};
use crate::standalone::folder::{Folder, FolderChange, Problem, Ready, Scope};
use crate::standalone::yaml::MAX_FILE;

/// How long events are collected: a manifest replaced by `rm` and `cp` is one change.
const SETTLE: Duration = Duration::from_millis(25);
/// The safety net.
const RESCAN: Duration = Duration::from_secs(20);
/// While the folder does not exist or cannot be watched.
const RETRY: Duration = Duration::from_millis(500);
/// More files than this are not a folder of manifests.
const MAX_FILES: usize = 10_000;

/// Takes what is not a pod.
pub trait ObjectSink: Send + Sync {
    /// The folder says this.
    fn apply(&self, change: FolderChange);
    /// The folder has been read once.
    fn synced(&self);
}

/// A folder of manifests.
pub struct FileSource {
    directory: PathBuf,
    folder: Folder,
    /// Identity of each file as last read.
    read: BTreeMap<String, Identity>,
    problems: watch::Sender<Vec<Problem>>,
    sink: Option<Arc<dyn ObjectSink>>,
    url: Option<UrlSide>,
}

/// Changes when a file's content may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: Option<SystemTime>,
}

/// What woke the loop.
enum Wake {
    /// Something happened in the folder.
    Event,
    /// The watch is lost.
    Lost,
    /// Time to look.
    Timer,
    /// The node ends.
    Shutdown,
}

impl FileSource {
    /// The source of `directory` on `node`; what is not a pod goes to `sink`.
    pub fn new(
        directory: PathBuf,
        node: &str,
        scope: Scope,
        sink: Option<Arc<dyn ObjectSink>>,
    ) -> Self {
        Self {
            directory,
            folder: Folder::new(node, scope),
            read: BTreeMap::new(),
            problems: watch::Sender::new(Vec::new()),
            sink,
            url: None,
        }
    }

    /// Takes what an address says for one more file.
    pub fn with_url(mut self, url: UrlSide) -> Self {
        self.url = Some(url);
        self
    }

    /// What is wrong in the folder, now and as it changes.
    pub fn problems(&self) -> watch::Receiver<Vec<Problem>> {
        self.problems.subscribe()
    }

    /// Tells the folder's pods until `shutdown` becomes true.
    pub async fn run(mut self, pods: mpsc::Sender<PodChange>, mut shutdown: watch::Receiver<bool>) {
        let mut synced = false;
        let mut events = None;
        loop {
            // Watched before it is read, so that nothing falls between.
            if events.is_none() {
                let content = WatchMask::CLOSE_WRITE | WatchMask::ATTRIB;
                events = folder_events::watch(&self.directory, content).ok();
            }
            let mut changes = self.look(!synced);
            changes.extend(self.look_at_url());
            self.tell_problems();
            if self.tell(changes, &pods).await.is_err() {
                return;
            }
            // What an address ran is not taken for orphaned before it has had a chance to say so.
            if !synced && self.url.as_ref().is_none_or(|url| url.taken != Said::Nothing) {
                synced = true;
                if let Some(sink) = &self.sink {
                    sink.synced();
                }
                if pods.send(PodChange::Synced(PodSource::File)).await.is_err() {
                    return;
                }
            }
            let patience = if events.is_some() { RESCAN } else { RETRY };
            let url = async {
                // Whoever asks may be gone; then there is no news.
                let news = match &mut self.url {
                    Some(url) => url.said.changed().await.is_ok(),
                    None => false,
                };
                if !news {
                    std::future::pending::<()>().await;
                }
            };
            let wake = tokio::select! {
                event = next(&mut events) => event,
                () = url => Wake::Timer,
                () = tokio::time::sleep(patience) => Wake::Timer,
                () = crate::shutdown::requested(&mut shutdown) => {Wake::Shutdown }
            };
            match wake {
                Wake::Shutdown => return,
                Wake::Lost => events = None,
                Wake::Timer => {}
                Wake::Event => {
                    let until = Instant::now() + SETTLE;
                    while let Ok(wake) = tokio::time::timeout_at(until, next(&mut events)).await {
                        if matches!(wake, Wake::Lost) {
                            events = None;
                        }
                    }
                }
            }
        }
    }

    /// Looks at the folder and reads what is not as it was. Small, local files: read in place.
    fn look(&mut self, first: bool) -> Vec<FolderChange> {
        let mut changes = Vec::new();
        let now = SystemTime::now();
        match list(&self.directory) {
            Err(error) => {
                // The folder as a whole being away says nothing about what shall run.
                if !(first && error.kind() == io::ErrorKind::NotFound) {
                    self.folder
                        .unreadable("", format!("read {}: {error}", self.directory.display()));
                }
            }
            Ok(found) => {
                changes.extend(self.folder.removed(""));
                let known: BTreeSet<String> = self.folder.files().into_iter().collect();
                let is_url = |name: &String| self.url.as_ref().is_some_and(|u| u.name == *name);
                let gone: Vec<String> = known
                    .into_iter()
                    .filter(|name| !found.contains_key(name) && !is_url(name))
                    .collect();
                for (name, identity) in found {
                    if self.read.get(&name) == Some(&identity) {
                        continue;
                    }
                    match read(&self.directory.join(&name)) {
                        Ok(text) => {
                            let seen = jiff::Timestamp::now().to_string();
                            changes.extend(self.folder.read(&name, &text, &seen));
                        }
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        Err(error) => self.folder.unreadable(&name, error),
                    }
                    // A file touched in this very moment may be written on within the clock's grain.
                    let fresh = identity
                        .modified
                        .and_then(|modified| now.duration_since(modified).ok())
                        .is_none_or(|age| age < Duration::from_millis(20));
                    if fresh {
                        self.read.remove(&name);
                    } else {
                        self.read.insert(name, identity);
                    }
                }
                // Last, so that an object that moved to another file never goes away.
                for name in gone {
                    changes.extend(self.folder.removed(&name));
                    self.read.remove(&name);
                }
            }
        }
        changes
    }

    /// Takes what the address says; at the start, what it said before if it does not answer.
    fn look_at_url(&mut self) -> Vec<FolderChange> {
        let Some(url) = &mut self.url else { return Vec::new() };
        let said = url.said.borrow_and_update().clone();
        if said == url.taken {
            return Vec::new();
        }
        let first = std::mem::replace(&mut url.taken, said.clone()) == Said::Nothing;
        let seen = jiff::Timestamp::now().to_string();
        match said {
            Said::Nothing => Vec::new(),
            Said::Text(text) => {
                let changes = self.folder.read(&url.name, &text, &seen);
                let refused = |problem: &Problem| problem.file == url.name;
                if !self.folder.problems().iter().any(refused)
                    && let Err(error) = keep(&url.kept, &text)
                {
                    tracing::warn!(path = %url.kept.display(), %error,
                        "cannot keep the static pods of an address; they would not come back after \
                         a boot without it");
                }
                changes
            }
            Said::Failed(cause) => {
                let mut changes = Vec::new();
                if first && let Ok(text) = read(&url.kept) {
                    changes = self.folder.read(&url.name, &text, &seen);
                }
                self.folder.unreadable(&url.name, cause);
                changes
            }
        }
    }

    fn tell_problems(&self) {
        let problems = self.folder.problems();
        self.problems.send_if_modified(|shown| {
            for problem in problems.iter().filter(|problem| !shown.contains(problem)) {
                tracing::error!(manifest = %problem, "manifest refused");
            }
            let changed = *shown != problems;
            *shown = problems;
            changed
        });
    }

    async fn tell(
        &self,
        changes: Vec<FolderChange>,
        pods: &mpsc::Sender<PodChange>,
    ) -> Result<(), mpsc::error::SendError<PodChange>> {
        // What pods refer to is there before they are.
        let (of_pods, others): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| {
            matches!(change, FolderChange::PodRemoved(..) | FolderChange::Set(_, Ready::Pod(_)))
        });
        if let Some(sink) = &self.sink {
            for change in others {
                sink.apply(change);
            }
        }
        for change in of_pods {
            if let Some(sink) = &self.sink {
                sink.apply(change.clone());
            }
            match change {
                FolderChange::Set(_, Ready::Pod(pod)) => {
                    pods.send(PodChange::Set(PodSource::File, pod)).await?;
                }
                FolderChange::PodRemoved(_, uid) => {
                    pods.send(PodChange::Removed(PodSource::File, uid)).await?;
                }
                FolderChange::Set(..) | FolderChange::Removed(_) => {}
            }
        }
        Ok(())
    }
}

/// What an event of the folder says.
async fn next(events: &mut Option<Events>) -> Wake {
    if folder_events::next(events).await { Wake::Event } else { Wake::Lost }
}

/// The manifests of the folder; dot files and editors' backups are none.
fn list(directory: &Path) -> io::Result<BTreeMap<String, Identity>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') || name.ends_with('~') || found.len() >= MAX_FILES {
            continue;
        }
        // Through links: a folder of manifests may be a mounted ConfigMap.
        let Ok(metadata) = fs::metadata(entry.path()) else { continue };
        if metadata.is_file() {
            let identity = Identity {
                device: metadata.dev(),
                inode: metadata.ino(),
                size: metadata.len(),
                modified: metadata.modified().ok(),
            };
            found.insert(name, identity);
        }
    }
    Ok(found)
}

/// Writes `text` whole; it may hold secrets.
fn keep(path: &Path, text: &[u8]) -> Result<(), FileError> {
    if fs::read(path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    write_atomic(path, 0o600, text)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut text = Vec::new();
    let length = file.take(MAX_FILE + 1).read_to_end(&mut text)?;
    if length as u64 > MAX_FILE {
        return Err(io::Error::other(format!("larger than {} MiB", MAX_FILE >> 20)));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::PodUid;

    const POD: &str = "kind: Pod\napiVersion: v1\nmetadata: {name: web}\nspec:\n  containers:\n  - {name: c, image: i}\n";

    async fn next_change(pods: &mut mpsc::Receiver<PodChange>) -> PodChange {
        tokio::time::timeout(Duration::from_secs(10), pods.recv()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn files_that_come_change_and_go_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("manifests");
        let source = FileSource::new(at.clone(), "n", Scope::StaticPods, None);
        let mut problems = source.problems();
        let (tell, mut pods) = mpsc::channel(16);
        let (_stop, stopped) = watch::channel(false);
        tokio::spawn(source.run(tell, stopped));
        assert!(matches!(next_change(&mut pods).await, PodChange::Synced(PodSource::File)));
        fs::create_dir(&at).unwrap();
        fs::write(at.join("p.yaml"), POD).unwrap();
        let PodChange::Set(_, first) = next_change(&mut pods).await else { panic!() };
        // A broken file is a problem, and the pod stays.
        fs::write(at.join("p.yaml"), &POD[..60]).unwrap();
        problems.wait_for(|problems| !problems.is_empty()).await.unwrap();
        fs::write(at.join("p.yaml"), POD).unwrap();
        problems.wait_for(Vec::is_empty).await.unwrap();
        // Removed and put back at once, or moved, is no change.
        fs::remove_file(at.join("p.yaml")).unwrap();
        fs::write(at.join(".new"), POD).unwrap();
        fs::rename(at.join(".new"), at.join("q.yaml")).unwrap();
        fs::write(at.join("r.yaml"), POD.replace("web", "two")).unwrap();
        let PodChange::Set(_, second) = next_change(&mut pods).await else { panic!() };
        assert_eq!(second.metadata.name.as_deref(), Some("two-n"));
        fs::remove_file(at.join("q.yaml")).unwrap();
        let PodChange::Removed(_, uid) = next_change(&mut pods).await else { panic!() };
        assert_eq!(uid, PodUid::of(&first));
    }

    #[tokio::test]
    async fn an_address_is_one_more_file_and_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("state/static-pod-url");
        let start = |said| {
            let (taken, name) = (Said::Nothing, "http://host/pods".to_owned());
            let url = UrlSide { name, said, kept: kept.clone(), taken };
            let folder = dir.path().join("manifests");
            let source = FileSource::new(folder, "n", Scope::StaticPods, None).with_url(url);
            let problems = source.problems();
            let (tell, pods) = mpsc::channel(16);
            let (stop, stopped) = watch::channel(false);
            tokio::spawn(source.run(tell, stopped));
            (pods, problems, stop)
        };
        let list = |pods: &[&str]| {
            let pod = |name: &&str| {
                format!(
                    r#"{{"metadata":{{"name":"{name}"}},"spec":{{"containers":[{{"name":"c","image":"i"}}]}}}}"#
                )
            };
            let items: Vec<String> = pods.iter().map(pod).collect();
            let list = format!(
                r#"{{"kind":"PodList","apiVersion":"v1","metadata":{{}},"items":[{}]}}"#,
                items.join(",")
            );
            Said::Text(list.into())
        };
        fs::create_dir(dir.path().join("manifests")).unwrap();
        fs::write(dir.path().join("manifests/p.yaml"), POD).unwrap();
        let (say, said) = watch::channel(Said::Nothing);
        let (mut pods, mut problems, _stop) = start(said);
        // The folder waits for no address, but nothing is orphaned before it was asked.
        let PodChange::Set(_, first) = next_change(&mut pods).await else { panic!() };
        assert_eq!(first.metadata.name.as_deref(), Some("web-n"));
        assert!(pods.try_recv().is_err());
        say.send_replace(list(&["a", "b"]));
        let PodChange::Set(_, a) = next_change(&mut pods).await else { panic!() };
        let PodChange::Set(_, b) = next_change(&mut pods).await else { panic!() };
        let source = "kubernetes.io/config.source";
        assert_eq!(a.metadata.annotations.as_ref().unwrap()[source], "http");
        assert!(matches!(next_change(&mut pods).await, PodChange::Synced(PodSource::File)));
        // What is no answer, or no pod, takes nothing away.
        for bad in
            [Said::Failed("503".into()), Said::Text("{".into()), Said::Text("kind: x".into())]
        {
            say.send_replace(bad);
            problems.wait_for(|problems| !problems.is_empty()).await.unwrap();
            problems.borrow_and_update();
            say.send_replace(list(&["a", "b"]));
            problems.wait_for(Vec::is_empty).await.unwrap();
        }
        say.send_replace(list(&["b"]));
        let PodChange::Removed(_, gone) = next_change(&mut pods).await else { panic!() };
        assert_eq!(gone, PodUid::of(&a));
        // A boot with the address away.
        let (say, said) = watch::channel(Said::Failed("no route".into()));
        let (mut pods, _problems, _stop) = start(said);
        let mut names = Vec::new();
        while let PodChange::Set(_, pod) = next_change(&mut pods).await {
            names.push(pod.metadata.name.clone().unwrap());
        }
        assert_eq!(names, ["web-n", "b-n"]);
        say.send_replace(list(&[]));
        let PodChange::Removed(_, gone) = next_change(&mut pods).await else { panic!() };
        assert_eq!(gone, PodUid::of(&b));
    }
}
